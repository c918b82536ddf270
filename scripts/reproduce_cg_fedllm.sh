#!/usr/bin/env bash
# CG-FedLLM (arXiv 2405.13746): as published, its auto-encoder fitted on clients' real gradients, and corrected, on public ones.
source "$(dirname "$0")/reproduce_common.sh"

runs_of() {
    sized configs/classify_chain.yaml seed=1 "${newswire[@]}" federation.expected_cohort=50 federation.rounds=20 federation.server.lr=1e-2
    run no-privacy method=fedit
    run published-no-noise method=cg_fedllm:published codec.fit_at=server privacy.enabled=false
    run published method=cg_fedllm:published codec.fit_at=server
    run corrected method=cg_fedllm codec.code_size=null codec.refresh=4
}
each runs_of llama-7b qwen-7b
