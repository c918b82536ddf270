#!/usr/bin/env bash
# What every codec keeps of real updates' signal, on both demo models and all four demo texts (a diagnostic, not private).
#   bash scripts/codec_tables.sh [MODEL[/TASK] ...]   smollm2-135m, minilm-l6: about an hour on two cores, a tenth of it for MiniLM
# CODECS=mine adds a codec of yours, DTYPE=float32 is for processors that know no bfloat16; SEED=2 draws other clients and public
# gradients, whose results go to a folder of their own, seeds, and into no table. Results and figures go to results/codec-bench; what is
# there is kept. Public text is what SmolLM2 writes for each task.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
out=results/codec-bench${SEED:+/seeds}
mkdir -p "$out"

# bench MODEL TASK PROMPT [key=value ...]
bench() {
    local name=$1-$2${SEED:+-seed$SEED} task=$2 prompt=$3
    shift 3
    case "$only" in "$task" | "") ;; *) return ;; esac
    [ -f "$out/$name.json" ] && return
    echo "codec_tables: $name" >&2
    .venv/bin/fedllm codec bench "$config" "seed=${SEED:-1}" "model.dtype=${DTYPE:-bfloat16}" "task.source=$task" "task.generate.prompt=$prompt" \
        task.generate.count=450 codec.public_examples=400 codec.public_labels=given federation.expected_cohort=100 "$@" --rounds 2 --others 300 \
        --codecs "linear,kronecker,coordinate,chain,sketch,autoencoder${CODECS:+,$CODECS}" --priors public --sizes "$sizes" --out "runs/codec-bench/$name" \
        --json > "runs/codec-bench/$name.part"
    mv "runs/codec-bench/$name.part" "$out/$name.json"
    mv "runs/codec-bench/$name/codecs.png" "$out/$name.png"
}

mkdir -p runs/codec-bench
[ $# -gt 0 ] || set -- minilm-l6 smollm2-135m
for asked in "$@"; do
    model=${asked%%/*} only=${asked#"$model"}
    only=${only#/}
    case "$only" in
        "" | movie-reviews | newsgroups | reuters-r8 | drug-reviews) ;;
        *) echo "codec_tables: unknown task $only; expected movie-reviews, newsgroups, reuters-r8 or drug-reviews" >&2; exit 2 ;;
    esac
    case "$model" in
        minilm-l6) config=configs/classify_chain.yaml sizes=16,32,64,128,256,1164 ;;  # the last: 1/64
        smollm2-135m) config=configs/quickstart.yaml sizes=16,32,64,128,256,7200 ;;
        *) echo "codec_tables: unknown model $model; expected minilm-l6 or smollm2-135m" >&2; exit 2 ;;
    esac
    bench "$model" movie-reviews "Write one sentence from a {label} review of a movie about {words}."
    bench "$model" newsgroups "Write one sentence of a post about {label} in an online discussion that mentions {words}." federation.clients=2800
    bench "$model" reuters-r8 "Write one sentence of a news story about {label} that mentions {words}." federation.clients=1370
    bench "$model" drug-reviews "Write one sentence from a patient's {label} review of a medicine, which mentions {words}." federation.clients=600
done
files=()
for file in "$out"/{minilm-l6,smollm2-135m}-{drug-reviews,movie-reviews,newsgroups,reuters-r8}.json; do
    if [ -f "$file" ]; then files+=("$file"); fi
done
[ ${#files[@]} -eq 0 ] || .venv/bin/python scripts/codec_tables.py "${files[@]}"
