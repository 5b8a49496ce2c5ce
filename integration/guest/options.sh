# shellcheck shell=bash
# To be sourced by a script: reads its options. The comment at the script's head is what --help
# prints, up to the line that begins with `set`.

# Options that take a value, with the variable that it is put in. `NAME+` is an array that each value
# is appended to. If there is `--`, its variable is an array of everything that follows it.
declare -A takes=()
# Options without a value, each with the assignment that it stands for.
declare -A sets=()

# usage REASON...: the script was called in a wrong way.
usage() {
    printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2
    exit 2
}

# read_options ARGUMENT...: sets the variables that takes and sets name.
read_options() {
    local name
    while (($# > 0)); do
        [[ -n $1 ]] || usage "an empty argument (--help lists the options)"
        name=${takes[$1]:-}
        if [[ $1 == --help || $1 == -h ]]; then
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
            exit 0
        elif [[ -n ${sets[$1]:-} ]]; then
            printf -v "${sets[$1]%%=*}" %s "${sets[$1]#*=}"
        elif [[ -z $name ]]; then
            usage "no such option: $1 (--help lists them)"
        elif [[ $1 == -- ]]; then
            local -n rest=$name
            # shellcheck disable=SC2034 # the script's array
            rest=("${@:2}")
            return
        elif (($# < 2)); then
            usage "$1 wants a value"
        else
            if [[ $name == *+ ]]; then
                local -n list=${name%+}
                list+=("$2")
            else
                printf -v "$name" %s "$2"
            fi
            shift
        fi
        shift
    done
}
