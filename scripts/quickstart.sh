#!/usr/bin/env bash
# The main job from nothing: sets up what is missing, trains SmolLM2-135M privately on movie reviews, shows the result.
#   bash scripts/quickstart.sh              one run, runs/quickstart
#   bash scripts/quickstart.sh --contrast   also without privacy, and with noise in all coordinates; all three in one table
# An interrupted run is continued. A finished one stays: the next goes to a numbered folder (--contrast uses it again).
set -euo pipefail
cd "$(dirname "$0")/.."

contrast=no
case "${1:-}" in
    "") ;;
    --contrast) contrast=yes ;;
    *) echo "quickstart: unknown option $1; expected nothing or --contrast" >&2; exit 2 ;;
esac
if [ $# -gt 1 ]; then
    echo "quickstart: expected at most one option, got $*" >&2
    exit 2
fi

bash scripts/setup.sh
fedllm=.venv/bin/fedllm

unfinished() { [ -f "$1/ledger.jsonl" ] && ! [ -f "$1/results.json" ]; }

# train NAME CONFIG [key=value ...] -> sets `folder` to where the finished run is
train() {
    local name=$1 number=2
    shift
    folder=runs/$name
    while [ -e "$folder" ] && ! unfinished "$folder"; do
        if [ -f "$folder/results.json" ]; then
            echo "quickstart: $folder is finished and stays as it is" >&2
            if [ "$contrast" = yes ]; then return; fi
        fi
        folder=runs/$name-$number
        number=$((number + 1))
    done
    if [ -e "$folder" ]; then
        echo "quickstart: continuing $folder" >&2
        "$fedllm" resume "$folder"
    else
        echo "quickstart: training into $folder" >&2
        "$fedllm" train "$@" "output_dir=$folder"
    fi
}

train quickstart configs/quickstart.yaml
if [ "$contrast" = yes ]; then
    private=$folder
    train quickstart-no-privacy configs/quickstart.yaml method=fedit
    plain=$folder
    train quickstart-full-noise configs/quickstart_full_noise.yaml
    "$fedllm" compare "$private" "$plain" "$folder" --out runs/quickstart-comparison
fi
echo "All runs in TensorBoard: .venv/bin/tensorboard --logdir runs"
