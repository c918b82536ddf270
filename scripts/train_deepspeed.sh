#!/usr/bin/env bash
# One run over many ranks, by the `deepspeed` launcher: the same algorithm, each rank with its share of the cohort. Sets up what is missing.
#   bash scripts/train_deepspeed.sh configs/quickstart.yaml --num_gpus 2 [key=value ...]
#   bash scripts/train_deepspeed.sh CONFIG --num_gpus 8 parallel.mode=data engine.name=deepspeed engine.deepspeed=configs/deepspeed/zero3.json
#   bash scripts/train_deepspeed.sh --resume runs/quickstart --num_gpus 4          an interrupted run, on any number of ranks
# --num_gpus N   ranks on each machine (without a GPU: processes that share the cores)
# --hostfile F   several machines, lines such as `node1 slots=8`; each has this folder and .venv at the same path, and answers ssh
# --json         one JSON object on standard output
# parallel.mode is clients unless given, data with engine.name=deepspeed. Exit status as of fedllm: 0 done, 1 failed or interrupted, 2 wrong use or bad config.
set -euo pipefail
here=$(pwd)
cd "$(dirname "$0")/.."

fail() { echo "train_deepspeed: $1" >&2; exit 2; }

config="" resumed="" hostfile="" ranks="" overrides=() options=()
while [ $# -gt 0 ]; do
    case "$1" in
        --num_gpus | --hostfile | --resume)
            if [ $# -lt 2 ]; then fail "$1: expected a value after it"; fi
            case "$1" in
                --num_gpus) ranks=$2 ;;
                --hostfile) hostfile=$2 ;;
                --resume) resumed=$2 ;;
            esac
            shift ;;
        --json) options+=(--json) ;;
        -*) fail "unknown option $1; expected --num_gpus N, --hostfile F, --resume RUN_DIR or --json" ;;
        *=*) overrides+=("$1") ;;
        *) if [ -n "$config" ]; then fail "two configs, $config and $1; expected one"; fi; config=$1 ;;
    esac
    shift
done
# Paths are as the caller sees them where such a file is there, else as seen from the project's folder.
seen() { if [ -e "$here/$1" ]; then echo "$here/$1"; else echo "$1"; fi; }
if [ -n "$config" ] && [ -n "$resumed" ]; then fail "a config and --resume; expected one of them"; fi
if [ -z "$config$resumed" ]; then fail "no config; for example: bash scripts/train_deepspeed.sh configs/quickstart.yaml --num_gpus 2"; fi
for override in ${resumed:+${overrides[@]+"${overrides[@]}"}}; do
    [[ "$override" =~ ^(engine|parallel)\. ]] || fail "$override: a resumed run keeps its config, but for keys of engine and parallel"
done
if [ -n "$ranks" ] && ! [[ "$ranks" =~ ^[1-9][0-9]*$ ]]; then fail "--num_gpus $ranks: expected a number of ranks, 1 or more"; fi
if [ -n "$hostfile" ] && ! [ -f "$(seen "$hostfile")" ]; then fail "$hostfile: no such hostfile"; fi

bash scripts/setup.sh deepspeed
python=.venv/bin/python
if [ -z "${DS_ACCELERATOR:-}" ] && ! command -v nvidia-smi > /dev/null; then
    export DS_ACCELERATOR=cpu
fi
launch=(--no_local_rank --log_level critical)
if [ -n "$hostfile" ]; then
    hostfile=$(seen "$hostfile")
    if grep -vqE '^[[:space:]]*(#.*)?$|^[[:space:]]*[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*$' "$hostfile"; then
        fail "$hostfile: expected lines such as: node1 slots=8"
    fi
    hosts=$(grep -vE '^[[:space:]]*(#|$)' "$hostfile" | awk '{print $1}')
    if [ -z "$hosts" ]; then fail "$hostfile: names no host; expected lines such as: node1 slots=8"; fi
    for host in $hosts; do
        ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" true < /dev/null > /dev/null 2>&1 ||
            fail "$host ($hostfile): not reachable by ssh; expected a host that answers without a password"
    done
    command -v pdsh > /dev/null || fail "several machines need pdsh, which is not installed; expected the package pdsh of your system"
    launch+=(--hostfile "$hostfile")
else
    if [ -z "$ranks" ]; then
        ranks=$( (nvidia-smi --list-gpus 2> /dev/null || true) | grep -c . || true)
        if [ "$ranks" = 0 ]; then fail "no GPU found; expected --num_gpus N, the number of ranks"; fi
    fi
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    launch+=(--hostfile /dev/null --master_port "$port")
fi
if [ -n "$ranks" ]; then launch+=(--num_gpus "$ranks"); fi

if [ -n "$resumed" ]; then
    command=(resume "$(seen "$resumed")" ${overrides[@]+"${overrides[@]}"})
else
    mode=parallel.mode=clients
    if grep -qs '^parallel:' "$(seen "$config")"; then mode=""; fi
    for override in ${overrides[@]+"${overrides[@]}"}; do
        if [[ "$override" == engine.name=deepspeed ]]; then mode=parallel.mode=data; fi
    done
    command=(train "$(seen "$config")" ${mode:+"$mode"} ${overrides[@]+"${overrides[@]}"})
fi
status=0
# -m fedllm, from this folder: no path to a program that other machines may have elsewhere.
"$python" -m deepspeed.launcher.runner "${launch[@]}" --module fedllm "${command[@]}" ${options[@]+"${options[@]}"} || status=$?
case "$status" in
    0 | 1 | 2) exit "$status" ;;  # fedllm has told why
    130 | 143) exit 1 ;;
    *)
        echo "train_deepspeed: a rank was killed (out of memory?); all up to the last round is kept, continue with --resume RUN_DIR" >&2
        exit 1 ;;
esac
