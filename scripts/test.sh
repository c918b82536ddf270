#!/usr/bin/env bash
# The whole test suite, from nothing: sets up what is missing, lints, fetches the demo assets that tests read, runs pytest.
# Arguments go to pytest: bash scripts/test.sh tests/fedllm/data -k partition
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/python -m ruff check .
exec .venv/bin/python -m pytest "$@"
