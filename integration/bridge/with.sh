#!/usr/bin/env bash
# Runs a command with a virtio-fs server mounted here: starts the server on a scratch directory,
# mounts it through the bridge, runs the command, unmounts, cleans up, returns its exit status.
#
#   with.sh [OPTION...] [--] COMMAND [ARGUMENT...]
#
#   --server S            ringfsd (default), virtiofsd, or a shell command in which %SOCKET% and
#                         %SHARE% stand for the two paths
#   --runtime R           ringfsd's runtime: auto (default), uring, tokio; tokio-uring if $RINGFSD has it
#   --request-queues N    request queues, each with a thread (default 2; 1 for virtiofsd)
#   --server-arg A        a further argument for ringfsd or virtiofsd; may be repeated
#   --vfs yes             ringfsd serves two directories under one mount: $MNT and $SHARE are the
#                         first one's, $MNT2 and $SHARE2 the second one's
#   --log FILE            keep the server's log
#   --stay-connected      the command may unmount and mount again on the same connection
#                         (`umount "$MNT" && again.sh "$AGAIN" '' "$MNT"`)
#
# The command finds the mount in $MNT, the directory behind it in $SHARE, in $PLAIN an empty
# directory beside it, on the same file system, and in $SERVER_PID the server's process. If the server
# dies, panics or breaks the protocol, the status is 125 whatever the command's is. $RINGFSD,
# $VIRTIOFSD and $BRIDGE name programs to use instead of those that are built here or found in $PATH.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
. "$here/../guest/server.sh"

server=ringfsd runtime=auto queues='' log='' stays='' vfs='' arguments=()
while (($#)); do
    case $1 in
    --server) server=$2 ;;
    --runtime) runtime=$2 ;;
    --request-queues) queues=$2 ;;
    --server-arg) arguments+=("$2") ;;
    --vfs) vfs=$2 ;;
    --log) log=$2 ;;
    --stay-connected)
        stays=--stay-connected
        shift
        continue
        ;;
    --) shift && break ;;
    -*) echo "with.sh: no option $1" >&2 && exit 2 ;;
    *) break ;;
    esac
    shift 2
done
if ((!$#)); then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi

# built PROGRAM MANIFEST: builds a program, and prints its path.
built() {
    local target
    cargo build --quiet --release --locked --manifest-path "$2" >&2
    target=$(cargo metadata --format-version 1 --no-deps --manifest-path "$2" |
        sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
    echo "$target/release/$1"
}

bridge=${BRIDGE:-$(built bridge "$here/Cargo.toml")}
case $server in
ringfsd)
    queues=${queues:-2}
    shared=(--shared-dir %SHARE%)
    if [[ $vfs == yes ]]; then
        shared=(--vfs /one=%SHARE%/one --vfs /deep/two=%SHARE%/two)
    fi
    command=("${RINGFSD:-$(built ringfsd "$root/Cargo.toml")}" --socket %SOCKET%
        "${shared[@]}" --runtime "$runtime" --request-queues "$queues" "${arguments[@]}")
    ;;
virtiofsd)
    command=("${VIRTIOFSD:-virtiofsd}" --socket-path %SOCKET% --shared-dir %SHARE%
        --sandbox none --seccomp none "${arguments[@]}")
    ;;
*) command=("$server") ;;
esac

work=$(mktemp -d "${TMPDIR:-/tmp}/ringfsd-bridge.XXXXXX")
# Tests become other users, who need access to it.
chmod 755 "$work"
export MNT=$work/mnt SHARE=$work/share PLAIN=$work/plain
mkdir "$MNT" "$SHARE" "$PLAIN"
mounted=$MNT
if [[ $vfs == yes ]]; then mkdir "$SHARE/one" "$SHARE/two"; fi
log=${log:-$work/server.log}
server_pid='' bridge_pid=''

# shellcheck disable=SC2317 # reached by the trap
cleanup() {
    if [[ $bridge_pid ]]; then
        kill -TERM "$bridge_pid" 2>/dev/null || true
        wait "$bridge_pid" || true
    fi
    if [[ $server_pid ]]; then server_stop "$server_pid"; fi
    # Never remove through a mount that still exists.
    if ! mountpoint -q "$mounted"; then rm -rf --one-file-system "$work"; fi
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

server_start "${command[*]}" "$work/socket" "$SHARE" "$log"
if ! server_wait "$work/socket" 10 "$server_pid"; then
    echo "with.sh: the server does not start:" >&2
    cat "$log" >&2
    exit 125
fi
mkfifo "$work/bridge.wanted"
setpriv --pdeathsig TERM "$bridge" --socket "$work/socket" --request-queues "${queues:-1}" \
    ${stays:+"$stays"} "$MNT" 0<>"$work/bridge.wanted" >"$work/bridge.log" 2>&1 &
bridge_pid=$!
echo "$bridge_pid" >"$work/bridge.pid"
export AGAIN=$work/bridge SERVER_PID=$server_pid
until grep -qs 'mounted on' "$work/bridge.log"; do
    if ! kill -0 "$bridge_pid" 2>/dev/null; then
        cat "$work/bridge.log" "$log" >&2
        exit 125
    fi
    sleep 0.02
done

if [[ $vfs == yes ]]; then
    export MNT2=$mounted/deep/two SHARE2=$SHARE/two
    MNT=$mounted/one SHARE=$SHARE/one
fi
status=0
(cd "$work" && exec "$@") || status=$?

bridge_status=0
kill -TERM "$bridge_pid" 2>/dev/null || true
wait "$bridge_pid" || bridge_status=$?
bridge_pid=''
server_stop "$server_pid"
server_pid=''
grep -vE '^bridge: (mounted on|unmounted)' "$work/bridge.log" >&2 || true
grep -E 'WARN|ERROR|panicked' "$log" | sed 's/^/server: /' >&2 || true
# virtiofsd ends with its client, and reports that as a failure.
if [[ $server == virtiofsd ]] && ((server_status == 1)); then server_status=0; fi
if ((bridge_status || server_status)); then
    echo "with.sh: the bridge ended with $bridge_status, the server with $server_status" >&2
    exit 125
fi
if ! grep -q ' 0 faults' "$work/bridge.log" || grep -q panicked "$log"; then exit 125; fi
exit "$status"
