#!/usr/bin/env bash
# Boots a guest on two directories under one mount (`--vfs`): each is a mount of its own there, with its
# own device number and space, guest-suite's renames pass on one of them, and what the guest has written is in
# the directories.
#
#   vfs.sh [OPTION...]
#
#   --runtime uring|tokio   the server's runtime (auto)
#   --server PROGRAM        ringfsd (target/release/ringfsd)
#   --kernel 6.1|6.12       the guest's kernel (6.12)
#   --log-dir DIR           keep the logs there
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
# shellcheck source=options.sh
source "$here/options.sh"
runtime=auto program=$repo/target/release/ringfsd kernel=6.12 logs=''
takes=([--runtime]=runtime [--server]=program [--kernel]=kernel [--log-dir]=logs)
read_options "$@"

work=$(mktemp -d "${TMPDIR:-/tmp}/ringfsd-vfs.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/share/{one,two}
echo 'of the first' >"$work/share/one/file"
echo 'of the second' >"$work/share/two/file"

cat >"$work/script" <<'GUEST'
#!/bin/sh
set -eu
# A directory is mounted when it is walked through.
for path in / /one /deep /deep/two; do ls "/mnt$path/." >/dev/null; done
devices=$(stat -c %d /mnt /mnt/one /mnt/deep/two | sort -u | wc -l)
[ "$devices" = 3 ] || { echo "$devices device numbers for 3 file systems" >&2; exit 1; }
[ "$(stat -c %d /mnt/deep)" = "$(stat -c %d /mnt)" ]
[ "$(grep -c ' virtiofs ' /proc/mounts)" = 3 ] || { cat /proc/mounts >&2; exit 1; }
grep -qx 'of the first' /mnt/one/file
grep -qx 'of the second' /mnt/deep/two/file
[ "$(stat -f -c %b /mnt)" = 0 ]
[ "$(stat -f -c %b /mnt/one)" -gt 0 ]
! mkdir /mnt/new 2>/dev/null
! rmdir /mnt/one 2>/dev/null
! ln /mnt/one/file /mnt/deep/two/linked 2>/dev/null
mv /mnt/one/file /mnt/deep/two/moved
head -c 5000000 /dev/urandom >/mnt/deep/two/large
cp /mnt/deep/two/large /mnt/one/copy
cmp /mnt/deep/two/large /mnt/one/copy
sync -f /mnt/one/copy
mkdir /mnt/one/checks && chmod 755 /mnt/one/checks
guest-suite --quick /mnt/one/checks rename
GUEST
chmod +x "$work/script"

printf -v server '%q --socket %%SOCKET%% --runtime %s --vfs /one=%%SHARE%%/one --vfs /deep/two=%%SHARE%%/two' \
    "$program" "$runtime"
"$here/run.sh" --share "$work/share" --server "$server" --kernel "$kernel" --timeout 240 \
    ${logs:+--log-dir "$logs"} -- "$work/script" | tail -n 3
cmp "$work/share/one/copy" "$work/share/two/large"
[[ $(<"$work/share/two/moved") == 'of the first' && ! -e $work/share/one/file ]]
echo 'vfs: two directories under one mount: passed'
