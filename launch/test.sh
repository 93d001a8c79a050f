#!/usr/bin/env bash
# Sets up what is missing, then runs the tests:  bash launch/test.sh [ARGUMENT...]
# Arguments go to pytest; without any, slow tests and those that need torch or libtpu are left out (CI runs them too):
# bash launch/test.sh -m slow
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh test
python="${JAXKD_VENV:-.venv}/bin/python"

given=yes
[ $# -gt 0 ] || { given="" && set -- -m "not slow and not tpu and not parity"; }
status=0
# One process per core, since most of the time is compilation; a file's tests share fixtures and stay in one process.
"$python" -m pytest --numprocesses auto --dist loadfile "$@" || status=$?

group() { # group NAME NEED MODULE...: how to run a group that was left out, or that needs modules that are not installed
    local name="$1" need="$2"
    shift 2
    if ! "$python" -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"; then
        if [ -n "$given" ]; then
            echo "$name group skipped: $need (bash launch/setup.sh $name)" >&2
        else
            echo "$name group left out: $need (bash launch/setup.sh $name), then bash launch/test.sh -m $name" >&2
        fi
    elif [ -z "$given" ]; then
        echo "$name group left out: bash launch/test.sh -m $name" >&2
    fi
}
# The last lines say what was left out.
group parity "it needs torch and transformers" torch transformers
group tpu "compiling for TPUs needs libtpu, but no TPU" libtpu
[ -n "$given" ] || echo "slow group left out: bash launch/test.sh -m slow" >&2
exit "$status"
