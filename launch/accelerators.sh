# shellcheck shell=bash disable=SC2034  # its variables are used by the scripts that source it
# TPU slices by name, for the other scripts: `accelerator v5p-128` sets generation, grid, gcloud_name, chips,
# hosts, chips_per_host, devices, gke, runtime and sentence, or says what is wrong. jaxkd/core/chips.py knows the same
# names; this file uses no Python, because a launcher runs before anything is installed.

# generation | as gcloud spells it | its number counts | a chip has so many of those | JAX devices a chip | GKE's name | gcloud's runtime
accelerator_table="\
v4 v4 TensorCores 2 1 tpu-v4-podslice tpu-ubuntu2204-base
v5e v5litepod chips 1 1 tpu-v5-lite-podslice v2-alpha-tpuv5-lite
v5p v5p TensorCores 2 1 tpu-v5p-slice v2-alpha-tpuv5
v6e v6e chips 1 1 tpu-v6e-slice v2-alpha-tpuv6e
tpu7x tpu7x TensorCores 2 2 tpu7x none"

# Grids that a number names.
flat_grids="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
cube_grids="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16"

chips_of() { # 4x4x8 -> 128
    local product=1 side
    for side in ${1//x/ }; do product=$((product * side)); done
    echo "$product"
}

accelerator() { # accelerator NAME: sets the variables above
    local name="$1" asked size known="" line alias counted per_chip per_device candidate
    asked="$(printf '%s' "${name%%[-:=]*}" | tr '[:upper:]' '[:lower:]')"
    size="${name#"${name%%[-:=]*}"}"
    size="${size#[-:=]}"
    case "$asked" in v5litepod) asked=v5e ;; v7x) asked=tpu7x ;; esac
    generation=""
    while read -r line; do
        # shellcheck disable=SC2086  # seven words
        set -- $line
        known="$known${known:+, }$1"
        if [ "$1" = "$asked" ]; then
            generation="$1" alias="$2" counted="$3" per_chip="$4" per_device="$5" gke="$6" runtime="$7"
        fi
    done <<<"$accelerator_table"
    if [ -z "$generation" ] || ! [[ "$size" =~ ^[1-9][0-9]*(x[1-9][0-9]*)*$ ]]; then
        fail "no accelerator '$name': give a generation ($known) and a size, such as v5e-16 (or v5litepod-16), v5p-32, v6e-8, or a grid of chips such as v5e:4x4 or tpu7x-4x4x8"
    fi
    local grids="$cube_grids" dimensions=3 largest=4
    case "$generation" in v5e | v6e) grids="$flat_grids" dimensions=2 largest=8 ;; esac
    grid="" number=""
    if [[ "$size" == *x* ]]; then
        grid="$size"
        [ "$(tr -cd x <<<"$size" | wc -c)" -eq $((dimensions - 1)) ] ||
            fail "no accelerator '$name': a $generation slice has $dimensions dimensions, such as ${grids##* }"
    fi
    local numbers=""
    for candidate in $grids; do
        chips=$(($(chips_of "$candidate") * per_chip))
        numbers="$numbers${numbers:+, }$chips"
        if [ "$candidate" = "$grid" ] || { [ -z "$grid" ] && [ "$chips" = "$size" ]; }; then
            grid="$candidate" number="$chips"
        fi
    done
    [ -n "$grid" ] || fail "no accelerator '$name': the number of a $generation slice counts $counted ($per_chip a chip) and is one of $numbers; another grid of chips is given as such"
    chips="$(chips_of "$grid")"
    # A flat slice of up to eight chips, and four of the others, are on one host; larger ones have four a host.
    hosts=1
    [ "$chips" -le "$largest" ] || hosts=$((chips / 4))
    chips_per_host=$((chips / hosts))
    devices=$((chips * per_device))
    gcloud_name="${number:+$alias-$number}"
    sentence="$generation:$grid, chips: $chips, hosts and processes: $hosts (chips of each: $chips_per_host), JAX devices: $devices"
    [ "$per_chip" = 1 ] || [[ "$size" == *x* ]] || sentence="$sentence; the number in $name counts $counted, $per_chip a chip, not chips"
}
