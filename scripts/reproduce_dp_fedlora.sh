#!/usr/bin/env bash
# DP-FedLoRA (arXiv 2509.09097): its epsilon recomputed; its published setting, whose adapters are noise, and the corrected form.
source "$(dirname "$0")/reproduce_common.sh"

runs_of() {
    local few=(federation.clients=200 federation.expected_cohort=2 federation.rounds=10 federation.local.steps=5 federation.local.lr=0.3
        privacy.clip.norm=0.1) average=(federation.server.optimizer=sgd federation.server.lr=1)
    sized configs/classify_chain.yaml seed=1 "${newswire[@]}" privacy.target.epsilon=25 privacy.target.delta=1e-5 codec.refresh=3
    if [ "$size" = quick ]; then few=(privacy.clip.norm=0.1); fi
    if [ "$size" = full ]; then few=(); average=(); fi
    run no-privacy method=fedit ${few[@]+"${few[@]}"} ${average[@]+"${average[@]}"}
    run published method=dp_fedlora:published ${few[@]+"${few[@]}"}
    run corrected method=dp_fedlora ${few[@]+"${few[@]}"} ${average[@]+"${average[@]}"}
    if [ "$size" = default ]; then
        run corrected-many-clients method=dp_fedlora federation.expected_cohort=50 federation.rounds=20 \
            federation.server.lr=3e-2 privacy.clip.norm=0.1
    fi
}
"$python" scripts/reproduce_dp_fedlora_privacy.py
each runs_of llama-7b qwen-7b
