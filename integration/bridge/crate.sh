# shellcheck shell=bash
# To be sourced: builds programs from crates.io, linked statically, so that a guest can run them too.

crates=${PEERS:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/target/peers}

# crate PROGRAM VERSION: builds a program unless this version exists. Sets crate to its path.
crate() {
    local root=$crates/$1-$2
    crate=$root/bin/$1
    [[ ! -x $crate ]] || return 0
    echo "building $1 $2"
    # Little optimization: the programs mostly wait for the file system, and compiling takes longer.
    CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
        RUSTFLAGS='-C target-feature=+crt-static' cargo install --quiet --locked \
        --target x86_64-unknown-linux-gnu --target-dir "$root.build" --root "$root" "$1@$2"
    rm -rf "$root.build"
}
