#!/usr/bin/env bash
# jaxkd on a cluster that xpk made:  bash launch/xpk.sh --name NAME --cluster C --image IMAGE --accelerator v6e-64 [OPTION...] -- ARGUMENT...
# --slices N, --project P, --zone Z, --priority medium, --restarts 50, --grace 600 (seconds), --dry-run
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/commands.sh"
source "$here/accelerators.sh"

name="" cluster="" image="" accelerator="" slices=1 project="" zone="" priority="" restarts=50 grace=600
read_options "name cluster image accelerator slices project zone priority restarts grace" "" "$@"
require "name: of the workload" "cluster: made by xpk" "image: made from launch/Dockerfile" "accelerator: such as v6e-64" "$work"
kubernetes_name 16
number_from 1 slices
number_from 0 restarts
number_from 60 grace
accelerator "$accelerator"
[ -n "$gcloud_name" ] || fail "xpk has no name for $generation:$grid: use a size that has a number (see docs/launch.md)"
[ "$grid" != 2x4 ] || sentence="$sentence; xpk takes hosts of four chips, so that these are 2 hosts and processes"
[ "$generation" != tpu7x ] || sentence="$sentence; xpk runs two containers, and so two processes, on each host"
echo "$launcher: $slices x $sentence" >&2
command=(xpk workload create "--workload=$name" "--cluster=$cluster" "--tpu-type=$gcloud_name" "--num-slices=$slices"
    "--docker-image=$image" "--max-restarts=$restarts" '--restart-on-exit-codes=69,70,75'
    "--termination-grace-period-seconds=$grace")
[ -z "$project" ] || command+=("--project=$project")
[ -z "$zone" ] || command+=("--zone=$zone")
[ -z "$priority" ] || command+=("--priority=$priority")
# xpk's shell is the container's first process; exec replaces it, so that jaxkd gets the signals.
run "${command[@]}" "--command=exec $(quoted bash launch/host.sh --chip "$generation" -- "${rest[@]}")"
