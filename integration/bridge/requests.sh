#!/usr/bin/env bash
# Counts the requests of a fixed program, 15,000 writes of 4 KiB to a new file, with several options of
# the server. A count doesn't depend on the speed of the machine.
#
#   requests.sh [OPTION...]
#
#   --runtime R    ringfsd's runtime: auto (default), uring, tokio
#   --peers yes    count with virtiofsd too, and print the counts only
#
# A further request for each write is one too many, so a limit is 60 above the number of writes: the
# rest is INIT, CREATE, FLUSH and the like.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"

runtime=auto peers=''
while (($#)); do
    case $1 in
    --runtime) runtime=$2 ;;
    --peers) peers=$2 ;;
    *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2 && exit 2 ;;
    esac
    shift 2
done
writes=15000

# requests OPTION...: sets count to the number of requests, with these options of with.sh.
requests() {
    local output
    # shellcheck disable=SC2016 # expanded by the shell that with.sh starts
    output=$("$here/with.sh" "$@" -- bash -c \
        'dd if=/dev/zero of="$MNT/file" bs=4k count='$writes' status=none' 2>&1) || {
        echo "$output"
        return 1
    }
    count=$(sed -n 's/^bridge: \([0-9]*\) requests.*/\1/p' <<<"$output")
    [[ $count ]]
}

# expect LEAST MOST ARGUMENT...: counts with these arguments of ringfsd.
expect() {
    local least=$1 most=$2 name="ringfsd ${*:3}" arguments=()
    shift 2
    while (($#)); do
        arguments+=(--server-arg "$1")
        shift
    done
    if ! requests --runtime "$runtime" "${arguments[@]}"; then
        failed=$((failed + 1))
        echo "FAILED $name"
    elif ((count < least || count > most)); then
        failed=$((failed + 1))
        echo "FAILED $name: $count requests, not $least to $most"
    else
        passed=$((passed + 1))
        echo "passed $name: $count requests"
    fi
}

once=$((writes + 60)) twice=$((2 * writes + 60))
expect $writes $once
expect $writes $once --no-xattr
expect $writes $once --no-xattr --killpriv-v2
# The requests that the default saves are there without it, or this would count nothing.
expect $((2 * writes)) $twice --no-killpriv-v2
expect 1 $((writes / 10)) --writeback
expect 1 $((writes / 10)) --writeback --no-xattr

if [[ $peers == yes ]]; then
    for more in '' --xattr '--xattr --killpriv-v2'; do
        arguments=()
        for argument in $more; do arguments+=(--server-arg "$argument"); done
        requests --server virtiofsd "${arguments[@]}"
        echo "virtiofsd $more: $count requests"
    done
fi
summary
