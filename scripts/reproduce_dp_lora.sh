#!/usr/bin/env bash
# DP-LoRA (arXiv 2312.17493): five nodes, all of them in each of 50 rounds, a step on a batch of 32, epsilon 2; then many small clients. On
# newswire: on the demo's medical text training without privacy stays at the commonest label.
# --full: the general, the financial and the medical domain on Llama-2-7B, GPT-2 and GLM, the general and the financial one on BERT
# (whose tasks have labels; the medical ones of the paper are answered in words), and the general one on Qwen-7B, our choice.
source "$(dirname "$0")/reproduce_common.sh"

runs_of() {
    local five=(federation.clients=5 federation.expected_cohort=5 federation.rounds=50 federation.local.batch=32)
    local columns='task.columns.text="{instruction}\n\n{input}\n\n{output}"'
    model=${1%-finance}
    model=${model%-medical}
    sized configs/classify_chain.yaml seed=1 "${newswire[@]}" federation.server.lr=1e-2 privacy.clip.norm=0.1 privacy.target.epsilon=2 \
        codec.refresh=0
    if [ "$size" = quick ]; then five=(federation.clients=5 federation.expected_cohort=5); fi
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
    if [ "$size" = default ]; then
        run corrected-many-clients method=dp_lora federation.expected_cohort=50 federation.rounds=20 federation.server.lr=3e-2
    fi
}
each runs_of {llama-7b,gpt2,glm-4-9b}{,-finance,-medical} bert-base{,-finance} qwen-7b
