#!/usr/bin/env bash
# Makes .venv and installs the project with its tests' tools, and the extras named (setup.cfg). Does nothing where that is already done.
#   bash scripts/setup.sh [EXTRA ...]      for example: bash scripts/setup.sh eval
set -euo pipefail
cd "$(dirname "$0")/.."

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: needs Python 3.11 or 3.12; name it with PYTHON=/path/to/python" >&2
    exit 1
}

extras=$(IFS=,; echo "dev${*:+,$*}")
stamp=.venv/installed-$extras.sha256
wanted=$(cat setup.cfg pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi
python=$(find_python)
if ! .venv/bin/python -c '' 2>/dev/null; then
    rm -rf .venv
    "$python" -m venv .venv
fi
echo "setup: installing into .venv (some minutes the first time)" >&2
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# --no-compile: Python compiles what is imported, when it is; compiling all of torch and scipy takes half a minute.
install=(.venv/bin/python -m pip install -qq --no-compile -c constraints.txt)
"${install[@]}" setuptools
"${install[@]}" --no-build-isolation -e ".[$extras]"
echo "$wanted" > "$stamp"
