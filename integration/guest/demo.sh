#!/usr/bin/env bash
# Demonstrates ringfsd from scratch: downloads what a guest needs, builds the server, shares a folder,
# boots a virtual machine on it, and shows both sides of the share.
#
#   demo.sh
#
# Takes some three minutes after the first build, most of that if the machine has no KVM and QEMU
# emulates each instruction; the speeds shown are then the emulation's, not the server's.
#
# Environment: RINGFSD_GUEST_CACHE (see setup.sh).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)

heading() { printf '\n== %s\n' "$*"; }

if (($# > 0)); then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 2
fi

work=''
# shellcheck disable=SC2317 # called by the trap
cleanup() { [[ -z $work ]] || rm -rf "$work"; }
trap cleanup EXIT
work=$(mktemp -d "${TMPDIR:-/tmp}/ringfsd-demo.XXXXXX")
chmod 755 "$work"

heading 'Preparing QEMU, a kernel for the guest, the server'
"$here/setup.sh"
cargo build --release --locked --manifest-path "$repo/Cargo.toml" --target-dir "$repo/target"
"$repo/target/release/ringfsd" --version

heading "A folder of this host, $work/share"
mkdir "$work/share"
printf 'Hello from the host.\n' >"$work/share/hello.txt"
cp "$repo/README.md" "$work/share/"
mkdir "$work/share/photos"
touch "$work/share/photos/"{one,two,three}.jpg
head -c 64M /dev/urandom >"$work/share/64-MiB"
ls -l "$work/share"

heading 'A virtual machine on it'
if [[ $("$here/accel.sh") != *kvm* ]]; then
    printf 'KVM is not available: the guest is emulated, and its speeds say little.\n\n'
fi

cat >"$work/script" <<'GUEST'
#!/bin/sh
echo '$ uname -sr; grep virtiofs /proc/mounts'
uname -sr
grep virtiofs /proc/mounts
echo
echo '$ ls -l /mnt'
ls -l /mnt
echo
echo '$ cat /mnt/hello.txt'
cat /mnt/hello.txt
echo
echo '$ echo ... >/mnt/from-the-guest.txt'
echo "Hello from the guest, $(uname -r)." >/mnt/from-the-guest.txt
now() { cut -d ' ' -f 1 /proc/uptime; }
# Of 64 MiB.
speed() {
    start=$(now)
    dd "$@" bs=1M 2>/dev/null
    echo "$start $(now)" | awk '{ printf "%.0f MiB/s (64 MiB in %.2f s)\n", 64 / ($2 - $1), $2 - $1 }'
}
echo
echo '$ dd bs=1M ...'
echo "read:  $(speed if=/mnt/64-MiB of=/dev/null)"
echo "write: $(speed if=/dev/zero of=/mnt/written count=64 conv=fsync)"
echo
[ "$(md5sum </mnt/64-MiB)" = "$(cat /mnt/.sum)" ] && echo 'the 64 MiB are identical to those of the host'
GUEST
md5sum <"$work/share/64-MiB" >"$work/share/.sum"
"$here/run.sh" --share "$work/share" --tag demo -- "$work/script"

heading 'What the guest wrote, on the host'
cat "$work/share/from-the-guest.txt"
ls -l "$work/share/written"

heading 'Your turn'
cat <<'END'
integration/guest/run.sh --share DIR -- 'ls -l /mnt'    any folder, any command
integration/guest/suite.sh                              some 270 checks, in guests
target/release/ringfsd --help                           the server by itself
END
