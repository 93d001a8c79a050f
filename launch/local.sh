#!/usr/bin/env bash
# Sets up what is missing, then trains; without arguments the quickstart:  bash launch/local.sh [ARGUMENT...]
# Arguments go to `jaxkd train`, and paths in them are relative to the repository. A --config of your own has its
# output in runs/NAME unless you give --workdir too. --dry-run prints the commands and does nothing.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/commands.sh

config="" workdir="" previous="" arguments=()
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then
        dry=yes
        continue
    fi
    arguments+=("$argument")
    case "$previous" in --config | -config) config="$argument" ;; esac
    case "$argument" in
        --config=* | -config=*) config="${argument#*=}" ;;
        --workdir | -workdir | --workdir=* | -workdir=*) workdir=given ;;
    esac
    previous="$argument"
done
set -- ${arguments[@]+"${arguments[@]}"}
if [ -z "$workdir" ]; then
    name="${config%%:*}" # configs/x.py:argument
    set -- --workdir "runs/$(basename -- "${name:-quickstart}" .py)" "$@"
fi
if [ -z "$config" ]; then
    set -- --config configs/quickstart.py "$@"
fi
run bash launch/setup.sh math
# On a CPU each step allocates its arrays anew: with huge pages, where Linux offers them, that takes a third of the time.
command=(env "GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}" .venv/bin/jaxkd train "$@")
[ -n "$dry" ] || exec "${command[@]}"
quoted "${command[@]}"
