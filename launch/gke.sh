#!/usr/bin/env bash
# jaxkd on TPU slices of GKE, as a JobSet:  bash launch/gke.sh VERB --name NAME --image IMAGE --accelerator v6e-64 [OPTION...] -- ARGUMENT...
#   render   prints the YAML        status   the JobSet and its pods       delete   removes it: pods save first
#   submit   applies it             logs     follows host 0 of slice 0
# --slices N, --spot, --namespace default, --queue Q (Kueue), --service-account A, --restarts 10, --grace 600 (seconds), --dry-run
# shellcheck disable=SC2034  # variables that only the template names
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/commands.sh"
source "$here/accelerators.sh"

verb="${1:-}"
case "$verb" in
    render | submit | status | logs | delete) shift ;;
    *) fail "'$verb' is no verb; there are render, submit, status, logs, delete" ;;
esac
name="" image="" accelerator="" slices=1 namespace=default queue="" service_account="" restarts=10 grace=600 spot=""
read_options "name image accelerator slices namespace queue service-account restarts grace" "spot" "$@"
needed=("name: of the JobSet")
case "$verb" in render | submit) needed+=("image: made from launch/Dockerfile, such as REGION-docker.pkg.dev/PROJECT/REPOSITORY/jaxkd:TAG" "accelerator: such as v6e-64" "$work") ;; esac
require "${needed[@]}"
kubernetes_name 40
kubectl=(kubectl "--namespace=$namespace")

json_list() { # a JSON list of strings, which YAML reads too
    local word list=""
    for word in "$@"; do
        word="${word//\\/\\\\}"
        word="${word//\"/\\\"}"
        word="${word//$'\n'/\\n}"
        list="$list${list:+, }\"$word\""
    done
    echo "[$list]"
}

render() {
    local line condition multislice="" args placeholder
    [ "$slices" = 1 ] || multislice=yes
    args="$(json_list -- "${rest[@]}")"
    while IFS= read -r line; do
        if [[ "$line" == *" #if "* ]]; then
            condition="${line##* #if }"
            [ -n "${!condition}" ] || continue
            line="${line%% #if *}"
        fi
        # Once from the left: what was put in is not looked at again.
        local out=""
        while [[ "$line" =~ @([a-z_]+)@ ]]; do
            placeholder="${BASH_REMATCH[1]}"
            out="$out${line%%"@$placeholder@"*}${!placeholder}"
            line="${line#*"@$placeholder@"}"
        done
        echo "$out$line"
    done <"$here/gke_jobset.yaml"
}

case "$verb" in
    render | submit)
        number_from 1 slices
        number_from 0 restarts
        number_from 60 grace
        accelerator "$accelerator"
        echo "$launcher: $slices x $sentence" >&2
        yaml="$(render)"
        ;;
esac
case "$verb" in
    render) echo "$yaml" ;;
    submit)
        if [ -n "$dry" ]; then
            quoted "${kubectl[@]}" apply -f - && echo "$yaml"
        else
            "${kubectl[@]}" apply -f - <<<"$yaml"
        fi
        ;;
    status)
        run "${kubectl[@]}" get jobset "$name" -o wide
        run "${kubectl[@]}" get pods -l "jobset.sigs.k8s.io/jobset-name=$name" -o wide
        ;;
    logs) run "${kubectl[@]}" logs -f "job/$name-slice-0" -c jaxkd ;;
    delete) run "${kubectl[@]}" delete jobset "$name" ;;
esac
