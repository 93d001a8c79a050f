#!/usr/bin/env bash
# Sets up what is missing, then runs the tests:  bash launch/test.sh [ARGUMENT...]
# Arguments go to pytest; without any, what takes long is left out (CI runs it too):  bash launch/test.sh -m slow
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh test

slow=asked
[ $# -gt 0 ] || { slow="left out" && set -- -m "not slow"; }
status=0
# a process per core: most of the time goes into compiling; a file's tests stay together and share what they built
.venv/bin/python -m pytest --numprocesses auto --dist loadfile "$@" || status=$?
# the last lines say what was left out, where nobody overlooks it
.venv/bin/python -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("transformers")))' ||
    echo "parity group skipped: it needs torch and transformers (bash launch/setup.sh parity)" >&2
.venv/bin/python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("libtpu"))' ||
    echo "tpu group skipped: compiling for TPUs needs libtpu, but no TPU (bash launch/setup.sh tpu)" >&2
[ "$slow" = asked ] || echo "slow group left out: bash launch/test.sh -m slow" >&2
exit "$status"
