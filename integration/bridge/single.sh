#!/usr/bin/env bash
# A single file as the share: the mount is a directory with that file in it, and nothing else.
# Options: those of with.sh except --server and --server-arg.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"
if [[ -z ${MNT:-} ]]; then
    ringfsd=${RINGFSD:-}
    if [[ -z $ringfsd ]]; then
        cargo build --quiet --release --locked --manifest-path "$here/../../Cargo.toml"
        ringfsd=$(realpath "$here/../../target/release/ringfsd")
    fi
    runtime=auto
    if [[ ${1:-} == --runtime ]]; then
        runtime=$2
        shift 2
    fi
    on_mount --server "cp $ringfsd %SHARE%/only && echo beside >%SHARE%/beside && exec $ringfsd --socket %SOCKET% --shared-dir %SHARE%/only --runtime $runtime" "$@"
fi

check 'the directory has one name' 10 test "$(ls -A "$MNT")" = only
check 'the file is the one on the host' 30 cmp "$MNT/only" "$SHARE/only"
check 'it is appended to' 10 bash -c 'echo more >>"$MNT/only"'
check 'the host has that' 10 bash -c 'tail -c 5 "$SHARE/only" | grep -qx more'
check 'it is written from its beginning' 30 bash -c 'dd if=/dev/zero of="$MNT/only" bs=64K count=8 conv=notrunc,fsync'
check 'it is emptied' 10 bash -c ': >"$MNT/only" && test ! -s "$SHARE/only"'
check 'nothing is added' 10 bash -c '! touch "$MNT/new"'
check 'it is not removed' 10 bash -c '! rm "$MNT/only"'
check 'it is not renamed' 10 bash -c '! mv "$MNT/only" "$MNT/other"'
check 'what is beside it is not there' 10 test ! -e "$MNT/beside"
check 'all is synced' 30 sync --file-system "$MNT"
summary
