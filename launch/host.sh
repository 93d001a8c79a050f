#!/usr/bin/env bash
# Runs jaxkd on one host of a job, with the flags of its chips:  bash launch/host.sh [--chip NAME] [--dry-run] -- ARGUMENT...
# --chip: one of launch/flags (v4, v5e, v5p, v6e, tpu7x, gpu), or JAXKD_CHIP; without it no flags are set. Your own
#   LIBTPU_INIT_ARGS and XLA_FLAGS go after those of the file and so override them; other variables that are set are kept.
# --background DIR: starts it detached from the terminal; DIR gets run.log, run.pid and, when it ends, run.code (exit code).
# SIGTERM reaches jaxkd, which saves and exits with 75. SkyPilot's variables become jaxkd's, where GPUs are used.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/commands.sh"
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
chip="${JAXKD_CHIP:-}" background="" supervise=""
read_options "chip background supervise" "" "$@"
require "$work"
jaxkd="$root/.venv/bin/jaxkd"
[ -n "$dry" ] || [ -x "$jaxkd" ] || fail "jaxkd is not set up here: bash launch/setup.sh tpu (or cuda12) makes .venv"

settings=()
setting() { # setting NAME VALUE
    export "$1=$2"
    settings+=("$1=$2")
}

flags() { # flags FILE: its lines are NAME=VALUE; values of a repeated name are joined by spaces
    local line name tpu="" xla=""
    while IFS= read -r line || [ -n "$line" ]; do
        case "$line" in '' | '#'*) continue ;; esac
        name="${line%%=*}"
        case "$name" in
            LIBTPU_INIT_ARGS) tpu="$tpu${tpu:+ }${line#*=}" ;;
            XLA_FLAGS) xla="$xla${xla:+ }${line#*=}" ;;
            *) [ -n "${!name:-}" ] || setting "$name" "${line#*=}" ;;
        esac
    done <"$1"
    [ -z "$tpu" ] || setting LIBTPU_INIT_ARGS "$tpu${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
    [ -z "$xla" ] || setting XLA_FLAGS "$xla${XLA_FLAGS:+ $XLA_FLAGS}"
}

if [ -n "$chip" ] && [ -z "$supervise" ]; then
    file="$root/launch/flags/$chip.env"
    [ -f "$file" ] || fail "no flags for chip '$chip'; launch/flags has: $(cd "$root/launch/flags" && echo *.env)"
    [ -n "$background" ] || flags "$file"
fi

# On TPUs JAX detects the other hosts; on GPUs SkyPilot provides them.
if [ "${SKYPILOT_NUM_NODES:-1}" -gt 1 ] && [ "${SKYPILOT_NUM_GPUS_PER_NODE:-0}" -gt 0 ] && [ -z "${JAXKD_COORDINATOR:-}" ]; then
    setting JAXKD_COORDINATOR "${SKYPILOT_NODE_IPS%%$'\n'*}:8476"
    setting JAXKD_NUM_PROCESSES "$SKYPILOT_NUM_NODES"
    setting JAXKD_PROCESS_ID "$SKYPILOT_NODE_RANK"
fi

cd "$root"
if [ -n "$dry" ]; then
    quoted env ${settings[@]+"${settings[@]}"} .venv/bin/jaxkd "${rest[@]}"
elif [ -n "$background" ]; then
    mkdir -p "$background"
    pid="$(cat "$background/run.pid" 2>/dev/null || true)"
    # Not by the process alone: one that has ended stays visible until its parent collects it, in a container perhaps for good.
    if [ -n "$pid" ] && [ ! -e "$background/run.code" ] && kill -0 "$pid" 2>/dev/null; then fail "a run is going on here, process $pid: $background/run.log"; fi
    rm -f "$background/run.code"
    # A session of its own: it outlives the ssh connection that started it.
    setsid bash "$root/launch/host.sh" --supervise "$background" --chip "$chip" -- "${rest[@]}" \
        </dev/null >>"$background/run.log" 2>&1 &
    echo $! >"$background/run.pid"
    echo "started, process $!: $background/run.log"
elif [ -n "$supervise" ]; then
    # Waits to record the exit code, and forwards SIGTERM: bash alone would exit and leave the child running.
    code=0
    bash "$root/launch/host.sh" --chip "$chip" -- "${rest[@]}" &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null || true' TERM
    while true; do
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break # a signal ends `wait` early
    done
    echo "$code" >"$supervise/run.code.new" && mv "$supervise/run.code.new" "$supervise/run.code"
else
    exec "$jaxkd" "${rest[@]}"
fi
