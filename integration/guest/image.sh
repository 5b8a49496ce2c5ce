#!/usr/bin/env bash
# Serves a RAFS image to a real guest and compares what the guest sees with the directory that the
# image was made of: every name, mode, owner, time, link, extended attribute and byte; twice, from the
# blob and from the cache. Then the same image as the lowest layer of an overlay, as a container has it.
#
#   image.sh [OPTION...]
#
#   --program FILE    the server, built with the feature nydus (built here if not given)
#   --version 5|6     the version of the image (6)
#   --kernel 6.1|6.12, --timeout SECONDS   as for run.sh
#
# Environment: RINGFSD_GUEST_CACHE (see setup.sh).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
# shellcheck source=options.sh
source "$here/options.sh"

program='' version=6 kernel=6.12 limit=300
# shellcheck disable=SC2034 # used by name
takes=([--program]=program [--version]=version [--kernel]=kernel [--timeout]=limit)
# shellcheck disable=SC2034 # used by name
sets=()
read_options "$@"

work=$(mktemp -d "${TMPDIR:-/tmp}/ringfsd-image.XXXXXX")
trap 'rm -rf "$work"' EXIT

# Not optimized: a guest that is emulated is slower still. All features, as the unit tests build it.
if [[ -z $program ]]; then
    cargo build --quiet --locked --all-features --manifest-path "$repo/Cargo.toml"
    program=$repo/target/debug/ringfsd
fi
cargo build --quiet --locked --manifest-path "$repo/integration/rafs-image/Cargo.toml" \
    --target-dir "$repo/target"

source_dir=$work/source
mkdir "$source_dir"
(
    cd "$source_dir"
    cp -r "$repo/src" .
    mkdir -p empty deep/1/2/3/4 many
    seq 500 | xargs -I{} sh -c 'echo {} >many/{}'
    head -c 5000001 /dev/urandom >large
    truncate -s 3M sparse
    printf data | dd of=sparse bs=1 seek=1000000 conv=notrunc status=none
    ln large linked
    ln -s deep/1 link
    mkfifo fifo
    mknod null c 1 3
    chmod 4751 large
    chmod 1777 deep
    chown 1000:70000 many/1
    touch -d '2001-02-03 04:05:06.789' large
    touch 'a b' $'\t' "$(printf 'n%.0s' {1..255})"
)
"$repo/target/debug/ringfsd-rafs-image" "$source_dir" "$work/image" --version "$version" >/dev/null

# The same lines on both sides, of what busybox can tell. A directory's size is the file system's own
# affair, and builders record no time for the root.
cat >"$work/list" <<'LIST'
#!/bin/sh
find . -mindepth 1 ! -type d -exec stat -c '%n %f %u %g %h %s %Y %t %T' {} + | sort
find . -mindepth 1 -type d -exec stat -c '%n %f %u %g %Y' {} + | sort
find . -type l -exec readlink {} + | sort
find . -type f -exec sha256sum {} + | sort
LIST
cat >"$work/script" <<SCRIPT
#!/bin/sh
cd /mnt || exit
export LC_ALL=C
for pass in blob cache; do
    echo "== \$pass"
    $(sed 1d "$work/list")
    echo 2 >/proc/sys/vm/drop_caches
    echo 1 >/proc/sys/vm/drop_caches
done
! touch new 2>/dev/null
SCRIPT
chmod +x "$work/list" "$work/script"

printf -v server '%q --socket %%SOCKET%% --rafs %q --blobs %q --seccomp kill' \
    "$program" "$work/image/bootstrap" "$work/image/blobs"
"$here/run.sh" --server "$server" --kernel "$kernel" --timeout "$limit" -- "$work/script" >"$work/seen"

for pass in blob cache; do
    echo "== $pass"
    (cd "$source_dir" && LC_ALL=C sh "$work/list")
done >"$work/expected"
diff "$work/expected" "$work/seen"
printf 'image of version %s: %s lines are the same in the guest\n' "$version" "$(wc -l <"$work/seen")"

# A container: the root file system is the image, with a writable directory on top that is this
# guest's own. Its programs change, remove and replace what the image has.
cp "$(type -P busybox)" "$source_dir/src/busybox"
rm -rf "$work/image"
"$repo/target/debug/ringfsd-rafs-image" "$source_dir" "$work/image" --version "$version" >/dev/null
mkdir -p "$work/top/upper" "$work/top/work"
cat >"$work/container" <<'CONTAINER'
#!/bin/sh
cd /mnt && chroot . /src/busybox sh -ec '
    /src/busybox mkdir /bin && /src/busybox --install -s /bin && PATH=/bin
    echo more >>large && mv many/1 many/one && rm -r deep && mkdir deep && echo new >deep/file
    rm many/2 && echo other >many/2 && chmod 600 many/3 && ln many/4 many/four
    seq 200 | xargs -P 4 -n 20 sh -c "for n; do echo \$n >many/new\$n; done" -
    grep -c . many/* | grep -vc ":1$" || true
    ls many | wc -l; ls deep; cat many/2 many/one; tail -c 5 large; sha256sum src/lib.rs'
CONTAINER
chmod +x "$work/container"
printf -v layers 'upper=%s,work=%s,xattr=user' "$work/top/upper" "$work/top/work"
"$here/run.sh" --server "$server --overlay $(printf %q "$layers")" --kernel "$kernel" \
    --timeout "$limit" -- "$work/container" >"$work/seen"
cat >"$work/expected" <<SEEN
0
701
file
other
1
more
$(cd "$source_dir" && sha256sum src/lib.rs)
SEEN
diff "$work/expected" "$work/seen"
[[ $(<"$work/top/upper/many/2") == other && ! -e $work/top/upper/src ]]
printf 'image as the lowest layer of a container: as expected\n'
