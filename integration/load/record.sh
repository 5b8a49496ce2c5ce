#!/usr/bin/env bash
# Records the requests of programs' work on a mount of ringfsd, through the bridge, which is the real
# FUSE client, and prints how many there were of each kind: the table of load's case vm-like.
#
#   record.sh [DIR] >vm-like.tsv
#
# The work is that of work.sh on a tree of 2,000 files and in SQLite, once; and another mount reads a
# tree that is there already. DIR is where it is done (the target directory). $RINGFSD and $BRIDGE name
# programs to use instead of those that are built here; $RECORDINGS is a directory in which the
# recordings are kept (not kept by default). Columns: kind, bytes (READ and WRITE: rounded up to a power
# of two from 4 KiB), count. A LOOKUP is known if its node was in the reply to an earlier request other
# than a listing. As root.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
dir=${1:-$target}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
folder=${RECORDINGS:-$scratch}
mkdir -p "$folder"
for name in ringfsd bridge; do
    variable=${name^^}
    if [[ -n ${!variable:-} ]]; then continue; fi
    manifest=$root/Cargo.toml
    if [[ $name == bridge ]]; then manifest=$here/../bridge/Cargo.toml; fi
    cargo build --quiet --release --locked --target-dir "$target" --manifest-path "$manifest"
    printf -v "$variable" %s "$target/release/$name"
done
{
    echo '#!/bin/sh'
    # A file for each mount.
    printf 'exec %q --record %q/$$.tsv "$@"\n' "$BRIDGE" "$folder"
} >"$scratch/bridge"
chmod +x "$scratch/bridge"
export RINGFSD BRIDGE=$scratch/bridge FIXTURES=$dir/work-fixtures
"$here/work.sh" --rounds 1 --servers ringfsd --ringfsd "$RINGFSD" --works tree,sqlite --files 2000 --dir "$dir" >&2
# shellcheck disable=SC2016 # expanded where the mount is
TMPDIR=$dir "$here/../bridge/with.sh" --server-arg --log-level=error -- bash -ec '
    tar xf "$FIXTURES/tree.tar" -C "$SHARE"
    cd "$MNT"
    tar tf "$FIXTURES/tree.tar" | grep -v "/$" | xargs -d "\n" cat >/dev/null
    grep -rc unsafe_impl tree >/dev/null || true
    du -s tree' >&2

echo "# Requests of programs' work, recorded by record.sh on Linux $(uname -r): kind, bytes, count."
awk -F '\t' '
    BEGIN {
        split("1 lookup 2 forget 3 getattr 4 setattr 5 readlink 6 symlink 8 mknod 9 mkdir 10 unlink 11 rmdir " \
            "12 rename 13 link 14 open 15 read 16 write 17 statfs 18 release 20 fsync 21 setxattr 22 getxattr " \
            "23 listxattr 24 removexattr 25 flush 26 init 27 opendir 28 readdir 29 releasedir 30 fsyncdir " \
            "31 getlk 32 setlk 33 setlkw 34 access 35 create 36 interrupt 38 destroy 39 ioctl 40 poll " \
            "42 batch-forget 43 fallocate 44 readdirplus 45 rename2 46 lseek 47 copy-file-range 50 syncfs " \
            "51 tmpfile 52 statx 53 copy-file-range-64", words, " ")
        for (i = 1; i in words; i += 2) names[words[i]] = words[i + 1]
    }
    FNR == 1 { delete known }
    {
        kind = ($3 in names) ? names[$3] : "opcode-" $3
        size = 0
        if (kind == "lookup") {
            if (!$9) kind = "lookup-absent"
            else kind = ($9 in known) ? "lookup-known" : "lookup-new"
        }
        if (kind == "read" || kind == "write") for (size = 4096; size < $5; size *= 2);
        if ($9) known[$9]
        count[kind "\t" size]++
    }
    END { for (row in count) print row "\t" count[row] }' "$folder"/*.tsv |
    LC_ALL=C sort -t "$(printf '\t')" -k1,1 -k2,2n
