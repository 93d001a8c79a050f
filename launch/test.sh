#!/usr/bin/env bash
# Sets up what is missing, then runs the tests:  bash launch/test.sh [ARGUMENT...]   (arguments go to pytest)
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh test

status=0
.venv/bin/python -m pytest "$@" || status=$?
# the last line says what was left out, where nobody overlooks it
.venv/bin/python -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("transformers")))' ||
    echo "parity group skipped: it needs torch and transformers (bash launch/setup.sh parity)" >&2
exit "$status"
