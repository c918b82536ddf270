# Sourced by the reproduce_*.sh: options, set-up, runs that are continued or kept, and the paper's claim beside what came out.
#   --full   the paper's models and data from the hub        --quick   a random model of seconds
#   --report   what is there, without training
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

size=default
train=yes
for option in "$@"; do
    case "$option" in
        --full | --quick) size=${option#--} ;;
        --report) train=no ;;
        *) echo "$(basename "$0"): unknown option $option; expected --full, --quick or --report" >&2; exit 2 ;;
    esac
done
bash scripts/setup.sh
python=.venv/bin/python
fedllm=.venv/bin/fedllm
paper=$(basename "$0" .sh)
paper=${paper#reproduce_}
runs=runs/reproduce/$paper-$size
done_runs=()

# sized CONFIG [key=value ...]: the default size of this paper; --quick and --full have their own. Papers know no public text of the task's
# own subject and no start on it.
plain=(task.public=newsgroups codec.public_labels=random federation.warm_start.steps=0 federation.server.schedule=constant)
common=()
sized() {
    config=$1
    shift
    common=("${plain[@]}" "$@")
    if [ "$size" = full ]; then
        config=configs/paper/llama-7b-${paper//_/-}.yaml
        common=()
    elif [ "$size" = quick ]; then
        config=$runs/tiny/config.yaml
        common=(codec.fit_steps=2)
        [ -f "$config" ] || "$python" scripts/tiny_model.py "$runs/tiny"
    fi
}

# run NAME [key=value ...]: one run into $runs/NAME; a finished one stays, an interrupted one is continued
run() {
    local folder=$runs/$1
    shift
    if [ "$train" = yes ] && ! [ -f "$folder/results.json" ]; then
        if [ -f "$folder/ledger.jsonl" ]; then
            "$fedllm" resume "$folder" >&2
        else
            "$fedllm" train "$config" ${common[@]+"${common[@]}"} "$@" "output_dir=$folder" >&2
        fi
    fi
    if [ -f "$folder/results.json" ]; then done_runs+=("$folder"); fi
}

# tell: claims of the paper, and the runs
tell() {
    "$python" scripts/reproduce_table.py "$paper" ${done_runs[@]+"${done_runs[@]}"}
}
