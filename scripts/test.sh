#!/usr/bin/env bash
# Installs the test extras and runs the suite. Arguments go to pytest: bash scripts/test.sh -m slow
EXTRAS="${EXTRAS:-test}"
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
exec python -m pytest "$@"
