#!/usr/bin/env bash
# EW-Tune (arXiv 2210.15042): its epsilons recomputed; then on a demo task the accuracy at the noise that the Edgeworth, PLD (PRV) and RDP
# accountants choose for epsilon 8, over seeds: is the claimed gain within the noise of reseeding? --full: on its four tasks, at both deltas.
source "$(dirname "$0")/reproduce_common.sh"

# glue TASK TEXT EXAMPLES: another of the paper's tasks, batches of 2000 and 20 epochs of it too
glue() {
    common=("task.source=nyu-mll/glue:$1" "task.columns.text=$2" "federation.rounds=$((20 * ($3 / 2000)))"
        "federation.unit_sampling_rate=$(awk "BEGIN {print 2000 / $3}")")
}

runs_of() {
    local seeds=(1 2 3 4 5) seed shared
    [ "$size" = quick ] && seeds=(1 2)
    model=roberta-base
    sized configs/classify_chain.yaml "${newswire[@]}" federation.rounds=20 federation.server.lr=3e-2 codec.refresh=0 \
        privacy.clip.norm=0.1 federation.unit_sampling_rate=0.0365
    [ "$size" = quick ] && common+=(federation.unit_sampling_rate=0.1)
    case $1 in
        qnli*) glue qnli '"{question}\n{sentence}"' 104743 ;;
        qqp*) glue qqp '"{question1}\n{question2}"' 363849 ;;
        mnli*) glue mnli '"{premise}\n{hypothesis}"' 392702 ;;
    esac
    case $1 in *-1e-6) common+=(privacy.target.delta=1e-6) ;; esac
    for seed in "${seeds[@]}"; do
        # The published form averages what arrives as it is; nor may the others shrink it, so that noise is all they differ in.
        shared=(federation.clients=10 codec.shrink=false "seed=$seed")
        run "EW-seed$seed" method=ew_tune:published "${shared[@]}"
        run "PRV-seed$seed" method=ew_tune "${shared[@]}"
        run "RDP-seed$seed" method=ew_tune privacy.calibration=rdp_classic "${shared[@]}"
    done
}
[ "$size" = quick ] || "$python" scripts/reproduce_ew_tune.py
each runs_of sst2 qnli qnli-1e-6 qqp qqp-1e-6 mnli mnli-1e-6
