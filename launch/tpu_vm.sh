#!/usr/bin/env bash
# TPU VMs through queued resources:  bash launch/tpu_vm.sh VERB --name NAME --zone ZONE --accelerator v6e-64 [OPTION...] [-- ARGUMENT...]
#   create    ask for the slices          run      start jaxkd on every host, detached     delete   give them back
#   setup     code and packages to them   logs     follow host 0                           status   state, and codes of the run
#   babysit   all of these until the run is done: starts again what was preempted or lost, stops at an error
# --slices N, --spot or --reserved, --project P, --runtime-version V, --service-account A, --retries 50 and --poll 60 (seconds)
# for babysit, --keep (babysit does not delete), --dry-run. What follows -- goes to jaxkd: -- train --config FILE --workdir DIR
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/commands.sh"
source "$here/accelerators.sh"

verb="${1:-}"
case "$verb" in
    create | setup | run | logs | status | delete | babysit) shift ;;
    *) fail "'$verb' is no verb; there are create, setup, run, logs, status, delete, babysit" ;;
esac
name="" zone="" accelerator="" project="" slices=1 runtime_version="" service_account="" retries=50 poll=60
spot="" reserved="" keep=""
read_options "name zone accelerator project slices runtime-version service-account retries poll" "spot reserved keep" "$@"
needed=("name: of the queued resource" "zone: such as us-east5-b")
case "$verb" in create | run | babysit) needed+=("accelerator: such as v6e-64") ;; esac
case "$verb" in run | babysit) needed+=("$work") ;; esac
require "${needed[@]}"
number_from 1 slices
number_from 0 retries
number_from 1 poll
[ -z "$spot" ] || [ -z "$reserved" ] || fail "--spot and --reserved exclude each other"
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")
if [ -n "$accelerator" ]; then
    accelerator "$accelerator"
    [ "$runtime" != none ] || fail "$generation is not served as TPU VMs: use launch/gke.sh or launch/xpk.sh"
    [ -n "$gcloud_name" ] || fail "gcloud has no name for $generation:$grid: use a size that has a number (see docs/launch.md)"
    echo "$launcher: $slices x $sentence" >&2
fi
queued=(gcloud compute tpus queued-resources)
folder=jaxkd # of the hosts' home

everywhere() { # everywhere COMMAND: on every host of every slice
    run "${queued[@]}" ssh "$name" "${where[@]}" --node=all --worker=all --command="$1"
}

create() {
    local command=("${queued[@]}" create "$name" "${where[@]}" "--accelerator-type=$gcloud_name"
        "--runtime-version=${runtime_version:-$runtime}")
    if [ "$slices" -gt 1 ]; then
        command+=("--node-count=$slices" "--node-prefix=$name")
    else
        command+=("--node-id=$name")
    fi
    [ -z "$spot" ] || command+=(--spot)
    [ -z "$reserved" ] || command+=(--reserved)
    [ -z "$service_account" ] || command+=("--service-account=$service_account")
    run "${command[@]}"
}

setup() { # what is committed goes there; changes that are not do not
    local archive="${TMPDIR:-/tmp}/$name.tar.gz"
    run git -C "$here/.." archive --format=tar.gz --output="$archive" HEAD &&
        run gcloud alpha compute tpus queued-resources scp "$archive" "$name:jaxkd.tar.gz" "${where[@]}" --node=all --worker=all || return
    # The images' own Python is 3.10: uv brings another.
    everywhere "mkdir -p $folder && tar -xzf jaxkd.tar.gz -C $folder && python3 -m pip install --quiet --user uv && export PATH=\"\$HOME/.local/bin:\$PATH\" && uv python install --quiet 3.12 && JAXKD_PYTHON=\"\$(uv python find 3.12)\" bash $folder/launch/setup.sh tpu gcs"
}

start() {
    everywhere "$(quoted bash $folder/launch/host.sh --chip "$generation" --background .launch -- "${rest[@]}")"
}

state() {
    run "${queued[@]}" describe "$name" "${where[@]}" "--format=value(state.state)"
}

codes() { # a line a host: "code 75", "code running", or "code lost" when it neither runs nor has written how it ended
    everywhere "cd $folder/.launch 2>/dev/null && echo code \$(cat run.code 2>/dev/null || { kill -0 \$(cat run.pid) 2>/dev/null && echo running; } || echo lost)"
}

delete() {
    run "${queued[@]}" delete "$name" "${where[@]}" --force --quiet
}

wait_for_slices() { # asks for them when they are not there; in the end they are ACTIVE
    local found
    while true; do
        found="$(state 2>/dev/null || true)"
        case "$found" in
            ACTIVE) return ;;
            '') create ;;
            FAILED | SUSPENDED | SUSPENDING)
                echo "$launcher: $name is $found: deleted and asked for again" >&2
                delete
                ;;
            *) echo "$launcher: $name is $found" >&2 ;;
        esac
        sleep "$poll"
    done
}

# Sets `outcome`: done, gone, error CODE or again CODE, when no host runs any more.
wait_for_run() {
    local lines line worst
    while true; do
        sleep "$poll"
        lines="$(codes 2>/dev/null)" || lines=""
        if [ -z "$lines" ]; then # no host answers, or not all do
            if [ "$(state 2>/dev/null || true)" != ACTIVE ]; then
                outcome=gone
                return
            fi
            continue
        fi
        case "$lines" in *"code running"*) continue ;; esac
        worst=0
        while read -r line; do
            [ "$line" != lost ] || line=137 # its own shell was killed
            case "$line" in
                0) ;;
                *)
                    # an error of one host is the reason for what the others ended with
                    if [ "$worst" = 0 ] || ! starts_again "$line"; then worst="$line"; fi
                    ;;
            esac
        done < <(sed -n 's/^.*code \([0-9a-z][0-9a-z]*\)$/\1/p' <<<"$lines")
        if [ "$worst" = 0 ]; then
            outcome="done"
        elif starts_again "$worst"; then
            outcome="again $worst"
        else
            outcome="error $worst"
        fi
        return
    done
}

babysit() {
    local round=0 code
    if [ -n "$dry" ]; then
        state && create && state && setup && start && codes
        [ -n "$keep" ] || delete
        return
    fi
    while true; do
        wait_for_slices
        if setup && start; then wait_for_run; else outcome="again 255"; fi
        code="${outcome#* }"
        case "$outcome" in
            done)
                echo "$launcher: the run is done" >&2
                [ -n "$keep" ] || delete
                return
                ;;
            error*)
                echo "$launcher: the run ended with code $code, which another start would not mend; the slices are still there: bash $launcher logs, then delete" >&2
                exit "$code"
                ;;
        esac
        # What was stopped by a signal has saved: that is not the run's fault and costs no retry.
        [ "$code" = 75 ] || [ "$outcome" = gone ] || round=$((round + 1))
        [ "$round" -le "$retries" ] || fail "gave up after $retries retries; the last ended with $code"
        echo "$launcher: started again ($outcome; retry $round of $retries)" >&2
    done
}

case "$verb" in
    run) start ;;
    logs) run "${queued[@]}" ssh "$name" "${where[@]}" --node=0 --worker=0 --command="tail -n 200 -F $folder/.launch/run.log" ;;
    status) state && codes ;;
    *) "$verb" ;;
esac
