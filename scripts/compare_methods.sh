#!/usr/bin/env bash
# Every method side by side: methods x epsilon x domains, tuned by one public procedure, three seeds; a table and figures.
#   bash scripts/compare_methods.sh             MiniLM, epsilon 3 and no privacy: four hours of one core
#   bash scripts/compare_methods.sh --full      SmolLM2-135M, epsilon 1, 3, 8 and none, published forms too: days
#   bash scripts/compare_methods.sh --quick     a random model of seconds, for a look at the steps
#   ... --report                                what is there, without training
#   ... --only KEY...                           these methods, tasks or budgets: two processes share the work
#   ... key=value ...                           for every run: model.dtype=float32 where the processor knows no bfloat16
# Interrupted, it continues where it was.
set -euo pipefail
cd "$(dirname "$0")/.."

grid=methods
options=()
settings=()
while [ $# -gt 0 ]; do
    case "$1" in
        --full) grid=methods_full ;;
        --quick) grid=methods_quick ;;
        --report | --again | --json) options+=("$1") ;;
        [a-z]*=*) settings+=("$1") ;;
        --only) options+=("$@"); set -- "$1" ;;
        *) echo "compare_methods: unknown option $1; expected --full, --quick, --report, --again, --json, key=value or --only KEY..." >&2; exit 2 ;;
    esac
    shift
done

bash scripts/setup.sh
python=.venv/bin/python
if [ "$grid" = methods_quick ]; then
    for number in 1 2 3; do
        folder=runs/methods-quick/$(echo one two three | cut -d' ' -f"$number")
        [ -f "$folder/config.yaml" ] || "$python" scripts/tiny_model.py "$folder" "$number"
    done
fi
out=runs/${grid//_/-}/comparison
for setting in ${settings[@]+"${settings[@]}"}; do out+=-${setting//[^a-z0-9_.=]/_}; done
"$python" scripts/grid.py "configs/grids/$grid.yaml" ${settings[@]+"${settings[@]}"} --out "$out" ${options[@]+"${options[@]}"}
