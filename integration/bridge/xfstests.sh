#!/usr/bin/env bash
# xfstests through the bridge: test and scratch file system are each a server of their own, started
# by mount(8) and ended by umount(8), on ext4 images in $TMPDIR. The tests have a PID namespace and a
# /tmp of their own, so several runs are possible at the same time, and no path given here may be in
# /tmp. Run by hand only, as it takes an hour.
#
#   xfstests.sh --checkout DIR [OPTION...] [-- ARGUMENT...]
#
#   --checkout DIR       a built checkout of xfstests
#   --server S           ringfsd (default), virtiofsd, or none: the images alone, for comparison
#   --runtime R          ringfsd's runtime: auto (default), uring, tokio
#   --server-arg A       a further argument for ringfsd or virtiofsd; may be repeated
#   --results DIR        keep the output of the tests there
#   --overlay yes        ringfsd serves an overlay of three directories in the image (the kernel's
#                        overlayfs, for comparison: --server none -- -overlay TEST...)
#   --stay-connected     a server continues over umount(8) and the next mount(8), as it does for a
#                        guest that mounts again
#
# The arguments are those of xfstests' `check` (`-g generic/quick`). $RINGFSD, $VIRTIOFSD and $BRIDGE
# name the programs, which this script doesn't build.
set -euo pipefail

if [[ ${1:-} != --inside ]]; then
    for user in fsgqa fsgqa2; do
        getent passwd $user >/dev/null || useradd --create-home --user-group $user
    done
    exec unshare --mount --pid --fork --kill-child --mount-proc -- "$(realpath "$0")" --inside "$@"
fi
shift

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout='' server=ringfsd runtime=auto results='' overlay='' stays='' arguments=()
while (($#)); do
    case $1 in
    --checkout) checkout=$(realpath "$2") ;;
    --server) server=$2 ;;
    --runtime) runtime=$2 ;;
    --server-arg) arguments+=("$2") ;;
    --results) results=$2 ;;
    --overlay) overlay=$2 ;;
    --stay-connected)
        stays=--stay-connected
        shift
        continue
        ;;
    --) shift && break ;;
    *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2 && exit 2 ;;
    esac
    shift 2
done
((!$#)) && set -- -g generic/quick
# Not below /tmp, which is mounted over.
work=$(mktemp -d "${TMPDIR:-/var/tmp}/ringfsd-xfstests.XXXXXX")
results=${results:-$work/results}
mkdir -p "$results"
results=$(realpath "$results")
chmod 755 "$work"
mkdir --mode 1777 "$work/tmp"
mount --bind "$work/tmp" /tmp

case $server in
ringfsd)
    command=("${RINGFSD:?}" --socket %SOCKET% --shared-dir %SHARE% --request-queues 2)
    if [[ $overlay == yes ]]; then command=("$here/overlay-server.sh" %SOCKET% %SHARE%); fi
    command+=(--runtime "$runtime" "${arguments[@]}")
    queues=2
    ;;
virtiofsd)
    command=("${VIRTIOFSD:?}" --socket-path %SOCKET% --shared-dir %SHARE% --sandbox none
        --seccomp none "${arguments[@]}")
    queues=1
    ;;
none) ;;
*) echo "xfstests.sh: no server $server" >&2 && exit 2 ;;
esac

# The helper of mount(8), in the only directory in which it is looked for.
type=bridge-${work##*.}
helper=/sbin/mount.fuse.$type

# shellcheck disable=SC2317 # reached by the trap
cleanup() {
    local name
    for name in test scratch share/test share/scratch; do
        # A server that is still ending keeps its share busy.
        for ((tries = 0; tries < 50; tries++)); do
            mountpoint -q "$work/$name" || break
            umount -q "$work/$name" 2>/dev/null || sleep 0.1
        done
        if mountpoint -q "$work/$name"; then umount -l "$work/$name"; fi
    done
    for name in "$work"/*.img; do
        losetup --noheadings --output NAME --associated "$name" | xargs --no-run-if-empty losetup --detach
    done
    umount /tmp
    rm -f "$helper" "$work"/*.img
    rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

mkdir "$work"/{test,scratch,share,share/test,share/scratch}
for name in test scratch; do
    truncate --size 12G "$work/$name.img"
    mkfs.ext4 -q "$work/$name.img"
    if [[ $server != none ]]; then
        mount -o loop,discard "$work/$name.img" "$work/share/$name"
        rmdir "$work/share/$name/lost+found"
    fi
done

if [[ $server == none ]]; then
    cat >"$work/config" <<CONFIG
export FSTYP=ext4
export TEST_DEV=$(losetup --find --show --direct-io=off "$work/test.img")
export SCRATCH_DEV=$(losetup --find --show --direct-io=off "$work/scratch.img")
CONFIG
else
    # The server lives as long as its mount, or as long as its bridge stays connected.
    cat >"$helper" <<HELPER
#!/usr/bin/env bash
set -euo pipefail
source=\$1 directory=\$2 options=''
shift 2
while getopts o:svn option; do [[ \$option != o ]] || options=\$OPTARG; done
if [[ ,\$options, == *,remount,* ]]; then exec mount -i -o "\$options" "\$source" "\$directory"; fi
work=$work stays=$stays
kept=\$work/\$source.kept
bridge=\$(mktemp -u "\$work/\$source.XXXXXX")
if [[ \$stays ]]; then
    status=0
    ${here@Q}/again.sh "\$(cat "\$kept" 2>/dev/null)" "\$options" "\$directory" || status=\$?
    case \$status in
    1) echo "\$bridge" >"\$kept" ;;
    # Mounted elsewhere at the same time: use another server.
    75) stays='' ;;
    *) exit "\$status" ;;
    esac
fi
command=(${command[*]@Q})
command=("\${command[@]/\\%SOCKET%/\$bridge.socket}")
command=("\${command[@]/\\%SHARE%/\$work/share/\${source#bridge-}}")
log=$results/\$source.server.log
# An overlay's former server has its work directory until it has ended.
for ((tries = 0; tries < 250; tries++)); do
    if [[ ! "$overlay" ]] || ! compgen -G "\$work/\$source.*.wanted" >/dev/null; then break; fi
    sleep 0.02
done
mkfifo "\$bridge.wanted"
(
    "\${command[@]}" >>"\$log" 2>&1 </dev/null &
    server=\$!
    until [[ -S \$bridge.socket ]]; do kill -0 \$server || exit 1; sleep 0.02; done
    status=0
    ${BRIDGE:?} --socket "\$bridge.socket" --request-queues $queues --source "\$source" -o "\$options" \
        \${stays:+"\$stays"} "\$directory" 0<>"\$bridge.wanted" >"\$bridge.log" 2>&1 &
    echo \$! >"\$bridge.pid"
    wait \$! || status=\$?
    kill \$server || true
    ended=0
    wait \$server || ended=\$?
    echo "bridge \$status, server \$ended: \$(tail -n 1 "\$bridge.log")" >>"\$log"
    rm -f "\$bridge.socket" "\$bridge.socket.pid" "\$bridge.wanted" "\$bridge.pid"
) >/dev/null 2>&1 </dev/null &
started=\$!
until grep -qs 'mounted on' "\$bridge.log"; do
    if ! kill -0 "\$started" 2>/dev/null; then
        cat "\$bridge.log" "\$log" >&2 || true
        exit 32
    fi
    sleep 0.02
done
HELPER
    chmod 755 "$helper"
    cat >"$work/config" <<CONFIG
export FSTYP=fuse
export FUSE_SUBTYP=.$type
export TEST_DEV=bridge-test
export SCRATCH_DEV=bridge-scratch
CONFIG
fi
cat >>"$work/config" <<CONFIG
export TEST_DIR=$work/test
export SCRATCH_MNT=$work/scratch
export RESULT_BASE=$results
export DUMP_CORRUPT_FS=0
CONFIG

status=0
(cd "$checkout" && TMPDIR=/tmp HOST_OPTIONS=$work/config ./check "$@") 2>&1 | tee "$results/check.full" || status=$?
# Bridges that stay connected report their result only at their end.
for kept in "$work"/*.kept; do
    [[ -e $kept ]] || continue
    bridge=$(<"$kept").pid
    [[ -s $bridge ]] || continue
    kill -TERM "$(<"$bridge")" || true
    for ((tries = 0; tries < 500; tries++)); do
        [[ -e $bridge ]] || break
        sleep 0.02
    done
done
grep -shE 'panicked|[1-9][0-9]* faults' "$results"/*.server.log && status=1
exit "$status"
