#!/usr/bin/env bash
# CG-FedLLM (arXiv 2405.13746): as published, its auto-encoder fitted on clients' real gradients, and corrected, on public ones. --full: LLaMA-7B,
# and Qwen-7B which is our choice, at the paper's three epsilons, and LLaMA-7B with its three clients (C-Eval's and MMLU's rounds and ranks; the text stays Dolly, our
# choice, since neither benchmark has one text to train on).
source "$(dirname "$0")/reproduce_common.sh"

runs_of() {
    model=${1%-eps*}
    model=${model%-three-*}
    sized configs/classify_chain.yaml seed=1 "${newswire[@]}" federation.expected_cohort=50 federation.rounds=20 federation.server.lr=1e-2
    case $1 in
        *-three-ceval) common=(federation.clients=3 federation.expected_cohort=3 federation.rounds=5 lora.r=16) ;;
        *-three-mmlu) common=(federation.clients=3 federation.expected_cohort=3 federation.rounds=8) ;;
        *-eps*) common=("privacy.target.epsilon=${1##*-eps}") ;;
    esac
    run no-privacy method=fedit
    run published-no-noise method=cg_fedllm:published codec.fit_at=server privacy.enabled=false
    run published method=cg_fedllm:published codec.fit_at=server
    run corrected method=cg_fedllm codec.code_size=null codec.refresh=4
}
each runs_of {llama-7b,qwen-7b}{,-eps2,-eps0.25} llama-7b-three-{ceval,mmlu}
