#!/usr/bin/env bash
# DP-LoRA (arXiv 2312.17493): five nodes of the medical domain, all of them in every round, epsilon 2; then as many clients as there are
# patients. --full: the general, the financial and the medical domain on Llama-2-7B, GPT-2 and GLM, the general and the financial one on BERT
# (whose tasks have labels; the medical ones of the paper are answered in words), and the general one on Qwen-7B, our choice.
source "$(dirname "$0")/reproduce_common.sh"

runs_of() {
    local five=(federation.clients=5 federation.expected_cohort=5) columns='task.columns.text="{instruction}\n\n{input}\n\n{output}"'
    model=${1%-finance}
    model=${model%-medical}
    sized configs/classify_chain.yaml seed=1 task.source=drug-reviews task.eval_examples=379 task.monitor_examples=20 task.max_length=40 \
        federation.rounds=10 federation.server.lr=3e-3 privacy.target.epsilon=2 codec.refresh=3
    [ "$size" = full ] && five=()
    # Which texts of these domains the paper trains on is not published in a form to fetch: these sources are our choice.
    case $1 in
        bert-base-finance) common=(task.source=zeroshot/twitter-financial-news-sentiment task.columns.text=text task.columns.label=label) ;;
        *-finance) common=(task.source=FinGPT/fingpt-sentiment-train "$columns") ;;
        *-medical) common=(task.source=lavita/ChatDoctor-HealthCareMagic-100k "$columns") ;;
    esac
    run no-privacy method=fedit ${five[@]+"${five[@]}"}
    run published method=dp_lora:published ${five[@]+"${five[@]}"}
    run corrected method=dp_lora ${five[@]+"${five[@]}"}
    if [ "$size" = default ]; then run corrected-600-clients method=dp_lora federation.clients=600 federation.expected_cohort=100; fi
}
each runs_of {llama-7b,gpt2,glm-4-9b}{,-finance,-medical} bert-base{,-finance} qwen-7b
