#!/usr/bin/env bash
# Compares ringfsd's overlay with the kernel's: does the same random operations on both, and compares
# what each answers and the trees afterwards; then mounts each upper directory with the other one, and
# compares again. Needs root and /dev/fuse.
#
#   oracle.sh [--seed S] [--ops N] [--rounds N] [--settings S] [--server-arg A]
#
#   --seed S        the first round's seed (random), printed; each round has the next one
#   --ops N         operations in each round (3,000)
#   --rounds N      rounds (1)
#   --settings S    the overlays' settings: default (no redirects), redirect, user (attributes user.overlay.*)
#   --server-arg A  a further argument for ringfsd; may be repeated
#   --peer PROGRAM  instead of ringfsd: `PROGRAM SOCKET overlay UPPER WORK LOWER...` serves an overlay
#
# $RINGFSD, $BRIDGE and $ORACLE name programs to use instead of those that are built here.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

seed=$((RANDOM * 32768 + RANDOM)) ops=3000 rounds=1 settings=default peer='' arguments=()
while (($#)); do
    case $1 in
    --seed) seed=$2 ;;
    --ops) ops=$2 ;;
    --rounds) rounds=$2 ;;
    --settings) settings=$2 ;;
    --peer) peer=$2 ;;
    --server-arg) arguments+=("$2") ;;
    *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2 && exit 2 ;;
    esac
    shift 2
done
case $settings in
default) ours='' theirs='' ;;
redirect) ours=,redirect-dir=on theirs=,redirect_dir=on ;;
user) ours=,xattr=user theirs=,userxattr ;;
*) echo "oracle.sh: no settings $settings" >&2 && exit 2 ;;
esac

# built PROGRAM MANIFEST: builds a program, and prints its path.
built() {
    local target
    cargo build --quiet --release --locked --manifest-path "$2" --bin "$1" >&2
    target=$(cargo metadata --format-version 1 --no-deps --manifest-path "$2" |
        sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
    echo "$target/release/$1"
}
ringfsd=${RINGFSD:-$(built ringfsd "$root/Cargo.toml")}
bridge=${BRIDGE:-$(built bridge "$here/../bridge/Cargo.toml")}
oracle=${ORACLE:-$(built overlay-oracle "$here/Cargo.toml")}

work=$(mktemp -d "${TMPDIR:-/tmp}/ringfsd-oracle.XXXXXX")
server_pid='' bridge_pid=''

stop() {
    # The bridge unmounts when it is asked to end.
    if mountpoint -q "$work/mnt/kernel"; then umount "$work/mnt/kernel"; fi
    local pid status=0
    for pid in $bridge_pid $server_pid; do
        kill -TERM "$pid" 2>/dev/null || true
        wait "$pid" || status=$?
    done
    bridge_pid='' server_pid=''
    return "$status"
}
# shellcheck disable=SC2317 # reached by the trap
cleanup() {
    stop || true
    if ! mountpoint -q "$work/mnt/ours" && ! mountpoint -q "$work/mnt/kernel"; then
        rm -rf --one-file-system "$work"
    fi
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# await FILE PATTERN PID: until the file has the pattern, or the process has ended.
await() {
    until grep -qs "$2" "$1"; do
        if ! kill -0 "$3" 2>/dev/null; then
            cat "$work/server.log" "$work/bridge.log" >&2
            return 1
        fi
        sleep 0.02
    done
}

# mount_both UPPER_OF_KERNEL UPPER_OF_OURS
mount_both() {
    mount -t overlay overlay "$work/mnt/kernel" -o \
        "lowerdir=$work/low1:$work/low2,upperdir=$work/$1/upper,workdir=$work/$1/work$theirs"
    # A log of before would tell that the next server is ready.
    rm -f "$work"/{socket,server.log,bridge.log}
    local command=("$ringfsd" --socket "$work/socket" --request-queues 2 --modcaps=+sys_admin
        --overlay "lower=$work/low1:$work/low2,upper=$work/$2/upper,work=$work/$2/work$ours"
        "${arguments[@]}")
    if [[ $peer ]]; then
        command=("$peer" "$work/socket" --request-queues 2 overlay "$work/$2/upper" "$work/$2/work"
            "$work/low1" "$work/low2")
    fi
    "${command[@]}" >"$work/server.log" 2>&1 &
    server_pid=$!
    await "$work/server.log" 'Waiting for' "$server_pid"
    "$bridge" --socket "$work/socket" --request-queues 2 "$work/mnt/ours" >"$work/bridge.log" 2>&1 &
    bridge_pid=$!
    await "$work/bridge.log" 'mounted on' "$bridge_pid"
}

failed=0 round=0
while ((round < rounds && !failed)); do
    rm -rf --one-file-system "$work"/{low1,low2,kernel,ours,mnt}
    mkdir -p "$work"/{low1,low2,{kernel,ours}/{upper,work},mnt/{kernel,ours}}
    "$oracle" populate "$((seed + round))" "$work/low1" "$work/low2"
    mount_both kernel ours
    "$oracle" compare "$work/mnt/kernel" "$work/mnt/ours" || { echo 'the layers alone differ' && failed=1; }
    "$oracle" run "$((seed + round))" "$ops" "$work/mnt/kernel" "$work/mnt/ours" || failed=1
    stop || { cat "$work/server.log" && failed=1; }
    if grep -E 'WARN|ERROR|panicked' "$work/server.log"; then failed=1; fi
    # Each reads what the other has written.
    mount_both ours kernel
    "$oracle" compare "$work/mnt/kernel" "$work/mnt/ours" ||
        { echo 'the trees differ if each mounts the upper directory of the other' && failed=1; }
    stop || failed=1
    if [[ -n $(find "$work/ours/work/work" "$work/kernel/work/work" -mindepth 1 2>/dev/null) ]]; then
        echo 'something is left in a work directory' && failed=1
    fi
    if ((failed)); then echo "FAILED with --seed $((seed + round)) --ops $ops --settings $settings"; fi
    round=$((round + 1))
done
echo "$((round - failed)) rounds passed, $failed failed, settings $settings"
exit "$failed"
