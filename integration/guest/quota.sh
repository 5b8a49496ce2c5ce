#!/usr/bin/env bash
# Runs the tests of --limit-space in a guest, whose kernel has project quotas, which that of the host
# may lack: it sees the host's root directory, read-only, and runs there what this machine has built.
# Ends with "passed".
#
#   quota.sh [OPTION...]    options of run.sh: --kernel, --timeout
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
cache=${RINGFSD_GUEST_CACHE:-$repo/target/guest}
kernel=$cache/kernels/6.12
work=$(mktemp -d "${TMPDIR:-/tmp}/ringfsd-quota.XXXXXX")
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"

# The modules, uncompressed, in the order in which they are loaded.
release=$(<"$kernel/release")
for module in ext4 xfs quota_v2 loop; do
    while read -r verb path _; do
        [[ $verb == insmod ]] || continue
        name=${path##*/}
        name=${name%.xz}
        [[ -e $work/$name ]] && continue
        case $path in
            *.xz) xz -dc "$path" >"$work/$name" ;;
            *) cp "$path" "$work/$name" ;;
        esac
        echo "$name" >>"$work/order"
    done < <(modprobe -d "$kernel" -S "$release" --show-depends "$module")
done

cd "$repo"
suite=$(cargo test --locked --test suite --no-run --message-format json 2>"$work/log" |
    sed -n 's/.*"executable":"\([^"]*suite-[^"]*\)".*/\1/p') || {
    cat "$work/log"
    exit 1
}

script="set -eu
while read -r module; do insmod /mnt$work/\$module 2>/dev/null || true; done </mnt$work/order
mount -t tmpfs tmp /mnt/tmp
mount -t proc proc /mnt/proc
mount -o bind /dev /mnt/dev
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
chroot /mnt $suite --nocapture --test-threads 1 limit_space::"
said=$("$here/run.sh" --share / --server "${RINGFSD:-$repo/target/release/ringfsd} --socket %SOCKET% \
    --shared-dir / --readonly --cache always" "$@" -- "$script")
if grep -q SKIPPED <<<"$said" || ! grep -q '4 passed' <<<"$said"; then
    echo "FAILED: $said"
    exit 1
fi
echo passed
