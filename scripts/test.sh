#!/usr/bin/env bash
# The whole test suite, from nothing: sets up what is missing, lints, runs pytest (tests fetch the demo assets they read).
# Arguments go to pytest: bash scripts/test.sh tests/fedllm/data -k partition
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh deepspeed
status=0
.venv/bin/python -m ruff check . || status=1
.venv/bin/python -m pytest "$@" || status=$?
exit "$status"
