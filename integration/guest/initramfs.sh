#!/usr/bin/env bash
# Builds the guest's initramfs for a kernel series and prints its path: busybox, the modules that
# virtio-fs needs (in the order of loading), the static guest-suite and init. Rebuilt only if one of
# these has changed.
#
#   initramfs.sh 6.1|6.12
#
# Environment: RINGFSD_GUEST_CACHE (see setup.sh).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${RINGFSD_GUEST_CACHE:-$(cd "$here/../.." && pwd)/target/guest}
PATH=$PATH:/usr/sbin:/sbin
modules=(virtio_pci virtio_console virtiofs overlay)
target=x86_64-unknown-linux-gnu

die() {
    printf 'initramfs: %s\n' "$*" >&2
    exit 1
}

# Builds the static binary in a target folder of its own, as it has flags of its own.
build_suite() {
    local log=$cache/suite-build.log
    RUSTFLAGS='-C target-feature=+crt-static' cargo build --quiet --release --locked \
        --manifest-path "$here/suite/Cargo.toml" --target "$target" --target-dir "$cache/suite" \
        >"$log" 2>&1 || {
        cat "$log" >&2
        die "guest-suite can't be built"
    }
    printf '%s\n' "$cache/suite/$target/release/guest-suite"
}

# Copies a module and its dependencies into the tree, uncompressed, each once, and records the order.
add_module() {
    local kernel=$1 release=$2 tree=$3 module=$4 verb path name
    while read -r verb path _; do
        [[ $verb == insmod ]] || continue
        name=${path##*/}
        name=${name%.xz}
        [[ ! -e $tree/lib/modules/$name ]] || continue
        case $path in
            *.xz) xz -dc "$path" >"$tree/lib/modules/$name" ;;
            *.zst) die "$path: zstd modules are not supported" ;;
            *) cp "$path" "$tree/lib/modules/$name" ;;
        esac
        printf '%s\n' "$name" >>"$tree/lib/modules/order"
    done < <(modprobe -d "$kernel" -S "$release" --show-depends "$module" || echo "missing $module")
}

build() {
    local kernel=$1 suite=$2 busybox=$3 image=$4 tree release module applet
    release=$(<"$kernel/release")
    tree=$(mktemp -d "$cache/initramfs/.tree.XXXXXX")
    # shellcheck disable=SC2064 # the current path
    trap "rm -rf '$tree' '$image.new'" EXIT
    chmod 755 "$tree"
    mkdir -p "$tree"/{bin,dev,etc,lib/modules,mnt,proc,root,run,sys,tmp,home/user}
    cp "$busybox" "$tree/bin/busybox"
    while read -r applet; do
        [[ $applet == busybox ]] || ln -s busybox "$tree/bin/$applet"
    done < <("$busybox" --list)
    cp "$suite" "$tree/bin/guest-suite"
    cp "$here/init" "$tree/init"
    chmod 755 "$tree/init" "$tree/bin/guest-suite"
    printf 'root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n' >"$tree/etc/passwd"
    printf 'root:x:0:\nuser:x:1000:\n' >"$tree/etc/group"
    : >"$tree/lib/modules/order"
    for module in "${modules[@]}"; do add_module "$kernel" "$release" "$tree" "$module"; done
    (cd "$tree" && find . -print0 | LC_ALL=C sort -z | cpio --null --quiet -o -H newc -R 0:0) >"$image.new"
    mv "$image.new" "$image"
}

main() {
    [[ $# == 1 ]] || { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
    local kernel=$cache/kernels/$1 suite busybox key image
    [[ -s $kernel/release ]] || die "no kernel $1 in $cache: run setup.sh first"
    busybox=$(type -P busybox) || die "no busybox: run setup.sh first"
    mkdir -p "$cache/initramfs"
    suite=$(build_suite)
    key=$(sha256sum "$suite" "$busybox" "$here/init" "$here/initramfs.sh" "$kernel/release" |
        cut -d ' ' -f 1 | sha256sum | cut -c 1-16)
    image=$cache/initramfs/$1-$key.cpio
    if [[ ! -s $image ]]; then
        exec {lock}>"$cache/initramfs/lock"
        flock "$lock"
        if [[ ! -s $image ]]; then
            build "$kernel" "$suite" "$busybox" "$image"
            # Older ones stay as long as a running guest may still need them.
            find "$cache/initramfs" -name "$1-*.cpio" -mmin +60 ! -path "$image" -delete
        fi
    fi
    printf '%s\n' "$image"
}

main "$@"
