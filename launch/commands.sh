# shellcheck shell=bash
# Shared by the launchers: options, one message for all missing options, and commands that --dry-run prints.

launcher="launch/$(basename -- "$0")"
dry="" # set by --dry-run: commands are printed, nothing is run

fail() {
    echo "$launcher: $*" >&2
    exit 1
}

quoted() { # a command as it can be pasted into a shell
    local word line=""
    for word in "$@"; do
        case "$word" in
            '' | *[!A-Za-z0-9_.,:=/@%+-]*) word="'${word//\'/\'\\\'\'}'" ;;
        esac
        line="$line${line:+ }$word"
    done
    echo "$line"
}

run() { # run COMMAND...
    if [ -n "$dry" ]; then quoted "$@"; else "$@"; fi
}

# read_options "NAME ..." "FLAG ..." ARGUMENT...: `--name value` and `--name=value` set $name, `--flag` sets $flag to yes,
# dashes as underscores; --dry-run is one of them everywhere. What follows `--` is left in the array `rest`.
read_options() {
    local names=" $1 " flags=" $2 dry-run " option value
    shift 2
    rest=()
    while [ $# -gt 0 ]; do
        option="${1#--}"
        case "$1" in
            --)
                shift
                rest=("$@")
                break
                ;;
            --?*=*) option="${option%%=*}" value="${1#*=}" ;;
            --?*) value="" ;;
            *) fail "'$1' is not an option; what jaxkd is to do comes after --, as in: $launcher ... -- train --config FILE --workdir DIR" ;;
        esac
        if [[ "$names" == *" $option "* ]]; then
            if [[ "$1" != *=* ]]; then
                [ $# -gt 1 ] || fail "--$option needs a value"
                value="$2"
                shift
            fi
            printf -v "${option//-/_}" '%s' "$value"
        elif [[ "$flags" == *" $option "* && "$1" != *=* ]]; then
            printf -v "${option//-/_}" yes
        else
            # shellcheck disable=SC2086  # lists of words
            fail "no option --$option; there are:$(printf ' --%s' $names) and the flags$(printf ' --%s' $flags)"
        fi
        shift
    done
    # shellcheck disable=SC2154  # set above
    dry="${dry_run:-}"
}

# shellcheck disable=SC2034  # used by the scripts that source this file
work="rest: what jaxkd is to do, such as train --config FILE --workdir DIR"

require() { # require "NAME: what it is" ...: names all missing options at once
    local item needed missing=""
    for item in "$@"; do
        needed="${item%%:*}"
        [ -n "${!needed:-}" ] || missing="$missing"$'\n'"  --${needed//_/-}:${item#*:}"
    done
    missing="${missing/--rest:/-- ARGUMENT...:}"
    [ -z "$missing" ] || fail "these are missing:$missing"
}

number_from() { # number_from LOWEST NAME: the value of $NAME is a whole number, not below
    [[ "${!2}" =~ ^[0-9]+$ && "${!2}" -ge "$1" ]] || fail "--${2//_/-}=${!2} must be a whole number from $1 on"
}

kubernetes_name() { # kubernetes_name LONGEST: checks $name, to which JobSet appends the numbers of slices and hosts
    # shellcheck disable=SC2154  # an option of both that call this
    [[ "$name" =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ && "${#name}" -le "$1" ]] ||
        fail "--name=$name must be at most $1 lower-case letters, digits and dashes, beginning with a letter"
}

starts_again() { # starts_again CODE: whether a run that exited with CODE is to be restarted (docs/launch.md)
    case "$1" in
        69 | 70 | 75) true ;;
        130) false ;;
        *) [ "$1" -ge 128 ] ;; # killed by a signal; JAX aborts a process when another host is gone
    esac
}
