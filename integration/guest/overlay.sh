#!/usr/bin/env bash
# A real guest on an overlay: it changes a tree of a lower layer, and the host compares what is in the
# upper layer afterwards. Ends with "passed" or a line for what is wrong.
#
#   overlay.sh [OPTION...]    options of run.sh: --kernel, --timeout, --queues
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/ringfsd-overlay.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
mkdir -p "$work"/{lower/etc/conf,lower/usr/bin,upper,work}
chmod 755 "$work"
echo 'from the image' >"$work/lower/etc/name"
echo 'old' >"$work/lower/etc/conf/old"
head -c 3000000 /dev/urandom >"$work/lower/usr/data"
cp -a "$work/lower" "$work/copy"

# shellcheck disable=SC2016 # expanded in the guest
script='set -eu
cd /mnt
[ "$(cat etc/name)" = "from the image" ]
exec 3<etc/name
echo changed >etc/name
[ "$(cat <&3)" = changed ]
rm -r etc/conf
mkdir etc/conf
[ -z "$(ls etc/conf)" ]
dd if=usr/data of=usr/bin/copy bs=64k 2>/dev/null
printf X | dd of=usr/data bs=1 seek=1000000 conv=notrunc 2>/dev/null
mv etc/name etc/renamed
ls etc | sort | tr "\n" " "
sync'
listed=$("$here/run.sh" --share "$work" --server "RINGFSD=${RINGFSD:-$repo/target/release/ringfsd} \
    $here/../bridge/overlay-server.sh %SOCKET% %SHARE%" "$@" -- "$script")

wrong() {
    echo "FAILED: $*"
    exit 1
}
[[ $listed == 'conf renamed ' ]] || wrong "the guest lists '$listed'"
diff -r "$work/copy" "$work/lower" || wrong 'the lower layer was changed'
cmp -s "$work/lower/usr/data" "$work/upper/usr/bin/copy" || wrong 'the copied file differs'
[[ $(cat "$work/upper/etc/renamed") == changed ]] || wrong 'the renamed file'
[[ -c $work/upper/etc/name ]] || wrong 'no whiteout is where the file was renamed'
[[ $(getfattr --absolute-names --only-values -n trusted.overlay.opaque "$work/upper/etc/conf") == y ]] ||
    wrong 'the directory that was made again is not opaque'
[[ $(cmp -l "$work/lower/usr/data" "$work/upper/usr/data" | wc -l) -le 1 ]] ||
    wrong 'more than one byte differs'
[[ $(stat -c %s "$work/upper/usr/data") == 3000000 ]] || wrong 'the size of the copied-up file'
[[ -z $(ls "$work/work/work") ]] || wrong 'something is left in the work directory'
echo passed
