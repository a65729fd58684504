#!/usr/bin/env bash
# Everything that must hold before a commit: format, lint, tests. Does its own set-up.
# Usage: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_environment.sh

python -m ruff format --check .
python -m ruff check .
python -m pytest "$@"
