#!/usr/bin/env bash
# DP-LoRA (arXiv 2312.17493): five nodes of the medical domain, all of them in every round, epsilon 2; then as many clients as there are patients.
source "$(dirname "$0")/reproduce_common.sh"

sized configs/classify.yaml seed=1 task.source=drug-reviews task.eval_examples=379 task.monitor_examples=20 task.max_length=40 \
    federation.rounds=10 federation.server.lr=3e-3 privacy.target.epsilon=2 codec.refresh=3
five=(federation.clients=5 federation.expected_cohort=5)
[ "$size" = full ] && five=()
run no-privacy method=fedit ${five[@]+"${five[@]}"}
run published method=dp_lora:published ${five[@]+"${five[@]}"}
run corrected method=dp_lora ${five[@]+"${five[@]}"}
[ "$size" = default ] && run corrected-600-clients method=dp_lora federation.clients=600 federation.expected_cohort=100
tell
