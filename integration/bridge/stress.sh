#!/usr/bin/env bash
# stress-ng: its file system stressors, one after the other, with their own checks. Each first runs on
# the plain directory: if it fails there, the host is the cause, and it is skipped. Options: those of
# with.sh, --seconds N (5 for each), --only 'NAME...'.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"
need stress-ng stress-ng
own='seconds only'
on_mount "$@"

seconds=${seconds:-5} skipped=0
# The stressors of the class that use files below the working directory.
stressors=${only:-access acl bad-ioctl chattr chdir chmod chown copy-file dentry dir dirdeep
    dirmany dnotify fallocate fanotify fcntl fiemap file-ioctl filename flock fpunch fsize fstat
    getdent handle hdd inode-flags inotify io iomix lease link locka lockf lockofd mknod mmap
    msync open readahead rename seek sendfile splice symlink sync-file touch utime verity xattr}
for name in $stressors; do
    stress-ng "--$name" 1 --dry-run --timeout 1 >/dev/null 2>&1 || continue
    run=(stress-ng "--$name" 2 --timeout "$seconds" --verify --metrics-brief --temp-path)
    status=0
    timeout --kill-after=5 $((seconds * 6 + 30)) "${run[@]/$seconds/1}" "$PLAIN" \
        >/dev/null 2>&1 </dev/null || status=$?
    if ((status)); then
        skipped=$((skipped + 1))
        echo "skipped $name: status $status on the plain directory"
        continue
    fi
    check "stress-ng $name" $((seconds * 6 + 30)) "${run[@]}" "$MNT"
done
echo "$skipped skipped"
summary
