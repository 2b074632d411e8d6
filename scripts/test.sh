#!/usr/bin/env bash
# Installs the test extras and runs the suite. Arguments go to pytest: bash scripts/test.sh -m slow
EXTRAS="${EXTRAS:-test}"
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
# Two workers, each with the modules that share its engines and servers: more would not fit the memory of a small machine.
exec python -m pytest -n 2 --dist loadfile "$@"
