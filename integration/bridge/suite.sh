# shellcheck shell=bash
# To be sourced by the suites here: gets them onto a mount, installs what they need, counts.
#
# A suite takes with.sh's options and its own (see $own). It runs twice: outside, where it installs
# and calls itself under with.sh, and inside, where $MNT is.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/crate.sh"
PATH=$crates/bin:$PATH
passed=0 failed=0

# need PROGRAM PACKAGE: installs a package of the distribution unless the program is there.
need() {
    command -v "$1" >/dev/null && return
    echo "installing $2"
    apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$2" >/dev/null
}

# need_crate PROGRAM VERSION: builds a program of crates.io unless this version is there.
need_crate() {
    crate "$1" "$2"
    PATH=${crate%/*}:$PATH
}

# on_mount ARGUMENT...: goes on under with.sh. Options named in $own become variables.
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

# check NAME SECONDS COMMAND...: one test; what it says is shown if it fails or is not done in time.
check() {
    local name=$1 limit=$2 began=$SECONDS status=0 output
    shift 2
    output=$(mktemp)
    timeout --kill-after=10 "$limit" "$@" >"$output" 2>&1 </dev/null || status=$?
    if ((status)); then
        failed=$((failed + 1))
        case $status in
        124 | 137) echo "FAILED $name: not done after $limit s" ;;
        *) echo "FAILED $name: status $status" ;;
        esac
        tail -n "${shown:-25}" "$output" | sed 's/^/    /'
    else
        passed=$((passed + 1))
        echo "passed $name ($((SECONDS - began)) s)"
    fi
    rm -f "$output"
}

# summary: the last line; the status says whether all passed.
summary() {
    echo "$passed passed, $failed failed"
    ((failed == 0))
}
