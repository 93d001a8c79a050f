#!/usr/bin/env bash
# TPU VMs through queued resources:  bash launch/tpu_vm.sh VERB --name NAME --zone ZONE --accelerator v6e-64 [OPTION...] [-- ARGUMENT...]
#   create    ask for the slices          run      start jaxkd on every host, detached     delete   give them back
#   setup     code and packages to them   logs     follow host 0                           status   state, and codes of the run
#   babysit   all of these until the run is done: attaches to a run that is going on, restarts it after a preemption or the loss
#             of a host, repeats gcloud calls that fail, stops at an error
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
grace=600    # seconds that a run has to save before it is killed, as on GKE (docs/launch.md)

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

setup() { # copies what is committed; uncommitted changes are left out
    local archive="${TMPDIR:-/tmp}/$name.tar.gz"
    run git -C "$here/.." archive --format=tar.gz --output="$archive" HEAD &&
        run gcloud alpha compute tpus queued-resources scp "$archive" "$name:jaxkd.tar.gz" "${where[@]}" --node=all --worker=all || return
    # The images' own Python is 3.10: uv installs another.
    everywhere "mkdir -p $folder && tar -xzf jaxkd.tar.gz -C $folder && python3 -m pip install --quiet --user uv && export PATH=\"\$HOME/.local/bin:\$PATH\" && uv python install --quiet 3.12 && JAXKD_PYTHON=\"\$(uv python find 3.12)\" bash $folder/launch/setup.sh tpu gcs"
}

start() {
    everywhere "$(quoted bash $folder/launch/host.sh --chip "$generation" --background .launch -- "${rest[@]}")"
}

state() {
    run "${queued[@]}" describe "$name" "${where[@]}" "--format=value(state.state)"
}

codes() { # one line per host: "code 75", "code running", or "code lost" if it neither runs nor has recorded an exit code
    everywhere "echo code \$({ cd $folder/.launch && { cat run.code || { kill -0 \$(cat run.pid) && echo running; }; }; } 2>/dev/null || echo lost)"
}

signal() { # signal COMMAND: a kill command without its process id, run for the supervisors of runs that have not ended
    everywhere "cd $folder/.launch 2>/dev/null && [ ! -e run.code ] && $1\$(cat run.pid) 2>/dev/null; true" >/dev/null 2>&1 || true
}

delete() {
    run "${queued[@]}" delete "$name" "${where[@]}" --force --quiet
}

# ------------------------------------------------------------------ babysit: gcloud's messages go to the file $errors

permanent() { # permanent CODE: whether repeating the gcloud call that just failed cannot help
    case "$1" in 2 | 126 | 127) return 0 ;; esac # a wrong command line; no gcloud
    grep -Eq 'PERMISSION_DENIED|INVALID_ARGUMENT|Error parsing \[|active account selected' "$errors"
}

give_up() { # give_up VERB
    echo "$launcher: gcloud cannot $1 $name, however often it is asked; it says:" >&2
    cat "$errors" >&2
    exit 1
}

# Sets `observed` to the state that gcloud reports, NONE on NOT_FOUND. A call that fails says nothing about the slices, on which
# a run may be going on: it is repeated without limit.
answered=""
look() {
    local code
    while true; do
        code=0
        observed="$(state 2>"$errors")" || code=$?
        [ "$code" = 0 ] || ! grep -q NOT_FOUND "$errors" || code=0 observed=NONE
        [ "$code" != 0 ] || break
        # After one successful call the command line is known to be right.
        if [ -z "$answered" ] && permanent "$code"; then give_up describe; fi
        echo "$launcher: gcloud did not say how $name is, asked again in $poll s: $(grep -m 1 ERROR "$errors" || tail -n 1 "$errors")" >&2
        sleep "$poll"
    done
    answered=yes
}

attempt() { # attempt create|delete: fails with a message if another attempt may succeed
    local code=0
    "$1" 2>"$errors" || code=$?
    if [ "$code" = 0 ]; then
        cat "$errors" >&2
    elif [ "$1" = delete ] && grep -q NOT_FOUND "$errors"; then
        return 0 # it is gone already
    elif permanent "$code"; then
        give_up "$1"
    else
        cat "$errors" >&2
        echo "$launcher: $1 failed, looked at again in $poll s" >&2
        return 1
    fi
}

wait_for_slices() { # requests slices that do not exist, and returns when they are ACTIVE
    while true; do
        look
        case "$observed" in
            ACTIVE) return ;;
            NONE) attempt create || true ;;
            FAILED | SUSPENDED | SUSPENDING)
                echo "$launcher: $name is $observed: deleted and asked for again" >&2
                attempt delete || true
                ;;
            *) echo "$launcher: $name is ${observed:-in no state}" >&2 ;;
        esac
        sleep "$poll"
    done
}

# Sets `answers`, one word per host, and fails unless all hosts answer. They are counted, since gcloud leaves out slices that it
# cannot prepare, and the batches after one in which a host failed. `ask_hosts aloud` shows what ssh prints.
ask_hosts() {
    local output count
    if [ -n "${1:-}" ]; then output="$(codes)" || true; else output="$(codes 2>/dev/null)" || true; fi
    answers="$(sed -n 's/^.*code \([0-9a-z][0-9a-z]*\)$/\1/p' <<<"$output" | tr '\n' ' ')"
    count="$(wc -w <<<"$answers")"
    [ "$count" -lt $((hosts * slices)) ] || return 0
    echo "$launcher: of $((hosts * slices)) hosts, $((count)) answered" >&2
    return 1
}

some() { # some WORD: whether any host answered WORD
    [[ " $answers " == *" $1 "* ]]
}

# Ends the run with SIGTERM, as a preemption does; kills what has not ended after $grace seconds.
end_run() {
    local waited=0
    signal "kill -TERM "
    while [ "$waited" -lt "$grace" ]; do
        sleep "$poll"
        waited=$((waited + poll))
        if ask_hosts && ! some running; then return; fi
    done
    echo "$launcher: it did not end within $grace s: killed" >&2
    signal "kill -KILL -- -" # the supervisor's session, with jaxkd in it
}

# Waits until no host runs; sets `outcome` to done, gone, error CODE or again CODE.
wait_for_run() {
    local word worst=0 complete torn=0
    while true; do
        sleep "$poll"
        complete=yes
        ask_hosts || complete=""
        if [ -z "$complete" ]; then
            look
            if [ "$observed" != ACTIVE ]; then
                outcome=gone
                return
            fi
        fi
        if some running && some lost; then
            torn=$((torn + 1))
        elif [ -n "$complete" ]; then
            torn=0
        fi
        if [ "$torn" = 3 ]; then
            echo "$launcher: some hosts run and wait for others that have lost the run: ended, to be started again" >&2
            end_run
            outcome="again lost"
            return
        fi
        if [ -n "$complete" ] && ! some running; then break; fi
    done
    for word in $answers; do
        [ "$word" != lost ] || word=137 # its own shell was killed
        # The error of one host is the reason for the other exit codes.
        if [ "$word" != 0 ] && { [ "$worst" = 0 ] || ! starts_again "$word"; }; then worst="$word"; fi
    done
    if [ "$worst" = 0 ]; then
        outcome="done"
    elif starts_again "$worst"; then
        outcome="again $worst"
    else
        outcome="error $worst"
    fi
}

babysit() {
    local round=0 code observed answers outcome errors complete
    if [ -n "$dry" ]; then
        state && create && state && codes && setup && start && codes
        [ -n "$keep" ] || delete
        return
    fi
    errors="$(mktemp)"
    # shellcheck disable=SC2064  # the name of now
    trap "rm -f $(quoted "$errors")" EXIT
    while true; do
        wait_for_slices
        outcome="again 255"
        complete=yes
        ask_hosts aloud || complete="" # the first connection, at which ssh may ask a question
        if some running; then
            echo "$launcher: a run is going on: attached to it" >&2
            wait_for_run
        elif [ -n "$complete" ] && setup && start; then # not if a host did not answer: a run may be going on there
            wait_for_run
        fi
        code="${outcome#* }"
        case "$outcome" in
            done)
                echo "$launcher: the run is done" >&2
                [ -n "$keep" ] || until attempt delete; do sleep "$poll"; done
                return
                ;;
            error*)
                echo "$launcher: the run ended with code $code, which a restart would not correct; the slices are kept: bash $launcher logs, then delete" >&2
                exit "$code"
                ;;
        esac
        # A run that was stopped by a signal has saved: no retry is counted.
        [ "$code" = 75 ] || [ "$outcome" = gone ] || round=$((round + 1))
        [ "$round" -le "$retries" ] || fail "gave up after $retries retries; the last ended with $code"
        echo "$launcher: tried again in $poll s ($outcome; retry $round of $retries)" >&2
        sleep "$poll"
    done
}

case "$verb" in
    run) start ;;
    logs) run "${queued[@]}" ssh "$name" "${where[@]}" --node=0 --worker=0 --command="tail -n 200 -F $folder/.launch/run.log" ;;
    status) state && codes ;;
    *) "$verb" ;;
esac
