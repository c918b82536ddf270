# Sourced by the reproduce_*.sh: options, set-up, runs that are continued or kept, and the paper's claim beside what came out.
#   --full   the paper's models and data from the hub, one after another; --only NAME: one of them      --quick   a random model of seconds
#   --report   what is there, without training
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

size=default
train=yes
only=
while [ $# -gt 0 ]; do
    case "$1" in
        --full | --quick) size=${1#--} ;;
        --report) train=no ;;
        --only)
            [ $# -gt 1 ] || { echo "$(basename "$0"): --only: expected a name after it" >&2; exit 2; }
            only=$2
            shift
            ;;
        *) echo "$(basename "$0"): unknown option $1; expected --full, --only NAME, --quick or --report" >&2; exit 2 ;;
    esac
    shift
done
if [ -n "$only" ] && [ "$size" != full ]; then
    echo "$(basename "$0"): --only $only: expected with --full, which has several models or tasks" >&2
    exit 2
fi
bash scripts/setup.sh
python=.venv/bin/python
fedllm=.venv/bin/fedllm
paper=$(basename "$0" .sh)
paper=${paper#reproduce_}
runs=runs/reproduce/$paper-$size
done_runs=()

# each FUNCTION NAME...: the runs that FUNCTION makes, and their table; at --full for every one of the paper's models or tasks
each() {
    local function=$1 name names
    shift
    names=("$@")
    if [ "$size" != full ]; then
        "$function" default
        tell
        return
    fi
    [ -z "$only" ] || names=("$only")
    for name in "${names[@]}"; do
        if [[ " $* " != *" $name "* ]]; then
            echo "$(basename "$0"): --only $name: expected one of $*" >&2
            exit 2
        fi
        echo "$name"
        runs=runs/reproduce/$paper-full/$name
        done_runs=()
        model=$name
        "$function" "$name"
        tell
    done
}

# sized CONFIG [key=value ...]: the default size of this paper; --quick and --full (configs/paper/MODEL-PAPER.yaml) have their own. Papers
# know no public text of the task's own subject and no start on it. --quick keeps the epsilon, which the paper's claim is about.
plain=(task.public=newsgroups codec.public_labels=random federation.warm_start.steps=0 federation.server.schedule=constant)
# Newswire (Reuters R8), which several papers' default size takes; four stories a client.
newswire=(task.source=reuters-r8 federation.clients=1370 task.eval_examples=1000 task.monitor_examples=20 task.max_length=40)
common=()
sized() {
    config=$1
    shift
    common=("${plain[@]}" "$@")
    if [ "$size" = full ]; then
        config=configs/paper/$model-${paper//_/-}.yaml
        common=()
    elif [ "$size" = quick ]; then
        config=$runs/tiny/config.yaml
        common=(codec.fit_steps=2)
        local setting
        for setting in "$@"; do
            case $setting in privacy.target.epsilon=*) common+=("$setting") ;; esac
        done
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

# tell: claims of the paper, and the runs; also into $runs/table.md where there are any
tell() {
    local file=/dev/null
    if [ ${#done_runs[@]} -gt 0 ]; then file=$runs/table.md; fi
    "$python" scripts/reproduce_table.py "$paper" ${done_runs[@]+"${done_runs[@]}"} | tee "$file"
    local benchmarks=
    case $paper in
        dr_encoder | cg_fedllm) benchmarks=mmlu,ceval-valid ;;
        dp_lora) benchmarks=boolq,piqa,winogrande ;;
        dp_fedlora) benchmarks=mmlu,bbh,bigbench_crass_ai_multiple_choice ;;
    esac
    if [ "$size" = full ] && [ ${#done_runs[@]} -gt 0 ] && [ -n "$benchmarks" ]; then
        echo "The paper's question benchmarks: $fedllm evaluate RUN --tasks $benchmarks (bash scripts/setup.sh eval)"
    fi
}
