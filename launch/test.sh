#!/usr/bin/env bash
# Sets up what is missing, then runs the tests:  bash launch/test.sh [ARGUMENT...]
# Arguments go to pytest; without any, what takes long and what needs torch or libtpu is left out (CI runs it too):
# bash launch/test.sh -m slow
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh test

asked=yes
[ $# -gt 0 ] || { asked="" && set -- -m "not slow and not tpu and not parity"; }
status=0
# a process per core: most of the time goes into compiling; a file's tests stay together and share what they built
.venv/bin/python -m pytest --numprocesses auto --dist loadfile "$@" || status=$?

group() { # group NAME WHAT MODULE...: what to do for a group that was left out, or that skips without these modules
    local name="$1" what="$2"
    shift 2
    if ! .venv/bin/python -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"; then
        if [ -n "$asked" ]; then
            echo "$name group skipped: $what (bash launch/setup.sh $name)" >&2
        else
            echo "$name group left out: $what (bash launch/setup.sh $name), then bash launch/test.sh -m $name" >&2
        fi
    elif [ -z "$asked" ]; then
        echo "$name group left out: bash launch/test.sh -m $name" >&2
    fi
}
# the last lines say what was left out, where nobody overlooks it
group parity "it needs torch and transformers" torch transformers
group tpu "compiling for TPUs needs libtpu, but no TPU" libtpu
[ -n "$asked" ] || echo "slow group left out: bash launch/test.sh -m slow" >&2
exit "$status"
