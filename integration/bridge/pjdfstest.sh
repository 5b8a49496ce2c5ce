#!/usr/bin/env bash
# pjdfstest (of crates.io) on the mount and on the plain directory beside it: a test fails if it fails
# on the mount and not on the host's own file system. Options: those of with.sh, and --overlay yes: an
# overlay is served, and compared with the kernel's overlayfs, which refuses devices 0/0 too.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"
need_crate pjdfstest 0.2.2
if ! getent passwd tests >/dev/null; then
    useradd --system --no-create-home --user-group --shell /usr/sbin/nologin tests
fi
own=overlay
if [[ " $* " == *' --overlay yes '* && -z ${MNT:-} ]]; then
    set -- "$@" --server "$here/overlay-server.sh %SOCKET% %SHARE%" --request-queues 2
fi
on_mount "$@"
if [[ ${overlay:-} ]]; then
    mkdir "$PLAIN/../kernel" "$PLAIN/../kernel"/{lower,upper,work}
    mount -t overlay overlay "$PLAIN" -o \
        "lowerdir=$PLAIN/../kernel/lower,upperdir=$PLAIN/../kernel/upper,workdir=$PLAIN/../kernel/work"
fi

results=$(mktemp -d)
trap 'rm -rf "$results"; umount "$PLAIN/../other" ${overlay:+"$PLAIN"} 2>/dev/null || true' EXIT
mkdir -p "$PLAIN/../other"
mount -t tmpfs other "$PLAIN/../other"
chmod 777 "$PLAIN/../other"

# failures DIRECTORY RESULT: runs the suite, and lists the tests that failed there, sorted.
failures() {
    timeout --kill-after=10 600 pjdfstest --configuration-file "$here/pjdfstest.toml" \
        --path "$1" --secondary-fs "$PLAIN/../other" >"$results/$2.full" 2>&1 || true
    if ! grep -q '^Summary' "$results/$2.full"; then
        echo "pjdfstest did not finish on $1:"
        tail -n 5 "$results/$2.full"
        return 1
    fi
    sed -n 's/^\([^ ]*\) *FAILED$/\1/p' "$results/$2.full" | sort >"$results/$2"
    grep '^Summary' "$results/$2.full"
}

failures "$PLAIN" plain
failures "$MNT" mount
for name in $(comm -13 "$results/plain" "$results/mount"); do
    echo "FAILED only on the mount: $name"
    grep -F -A 12 -- "$name " "$results/mount.full" | sed -n '2,12{/^[a-z].* \(ok\|FAILED\|skipped\)$/q;s/^/    /p}'
    failed=$((failed + 1))
done
awk -f "$here/pjdfstest.awk" "$results/mount.full"
passed=$(grep -c ' ok$' "$results/mount.full")
summary
