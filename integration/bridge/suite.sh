# shellcheck shell=bash
# To be sourced by the suites of this folder: runs them on a mount, installs what they need, counts.
#
# A suite takes with.sh's options and its own (see $own). It runs twice: outside, where it installs
# programs and calls itself under with.sh, and inside, where $MNT is set.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/crate.sh"
PATH=$crates/bin:$PATH
passed=0 failed=0

# need PROGRAM PACKAGE: installs a package of the distribution unless the program exists.
need() {
    command -v "$1" >/dev/null && return
    echo "installing $2"
    apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$2" >/dev/null
}

# need_crate PROGRAM VERSION: builds a program from crates.io unless this version exists.
need_crate() {
    crate "$1" "$2"
    PATH=${crate%/*}:$PATH
}

# on_mount ARGUMENT...: runs the script again under with.sh. Options named in $own become variables.
on_mount() {
    [[ -z ${MNT:-} ]] || return 0
    local options=()
    while (($#)); do
        if [[ $1 == --* && " ${own:-} " == *" ${1#--} "* ]]; then
            local name=${1#--}
            export "${name//-/_}=$2"
            shift 2
        else
            options+=("$1")
            shift
        fi
    done
    exec "$here/with.sh" "${options[@]}" -- "$(realpath "$0")"
}

# check NAME SECONDS COMMAND...: runs one test; shows its output if it fails or takes too long.
check() {
    local name=$1 limit=$2 began=$SECONDS status=0 output
    shift 2
    output=$(mktemp)
    timeout --kill-after=10 "$limit" "$@" >"$output" 2>&1 </dev/null || status=$?
    if ((status)); then
        failed=$((failed + 1))
        case $status in
        124 | 137) echo "FAILED $name: not finished after $limit s" ;;
        *) echo "FAILED $name: status $status" ;;
        esac
        tail -n "${shown:-25}" "$output" | sed 's/^/    /'
    else
        passed=$((passed + 1))
        echo "passed $name ($((SECONDS - began)) s)"
    fi
    rm -f "$output"
}

# summary: prints the last line; the status says whether all passed.
summary() {
    echo "$passed passed, $failed failed"
    ((failed == 0))
}
