#!/usr/bin/env bash
# A cargo build inside the mount: sources, target directory and the resulting program.
# Options: those of with.sh.
# shellcheck disable=SC2016 # the steps are expanded by the shells that run them
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"
on_mount "$@"

unset CARGO_TARGET_DIR
export CARGO_NET_OFFLINE=true
crate=$MNT/crate
mkdir -p "$crate/src"
printf '%s\n' '[package]' 'name = "hello"' 'version = "0.1.0"' 'edition = "2024"' '[workspace]' \
    >"$crate/Cargo.toml"
for module in $(seq 40); do
    echo "mod m$module;"
    printf 'pub fn f() -> u64 { (0..%s_u64).map(|x| x * x).sum() }\n' "$module" \
        >"$crate/src/m$module.rs"
done >"$crate/src/main.rs"
{
    echo 'fn main() { let mut all = 0;'
    for module in $(seq 40); do echo "all += m$module::f();"; done
    echo 'println!("{all}"); }'
    echo '#[test] fn it_works() { assert_eq!(m3::f(), 5); }'
} >>"$crate/src/main.rs"

# step NAME SECONDS SCRIPT
step() { check "cargo: $1" "$2" bash -euc "$3"; }
export crate here
step 'build and run' 300 'cd "$crate" && [[ $(cargo run --quiet) == 213200 ]]'
step 'nothing to build again' 60 'cd "$crate" && cargo build -v 2>&1 | tee /dev/stderr |
    grep -q "Fresh hello"'
step 'a changed file is seen' 120 'cd "$crate" && sed -i "s/x \* x/x/" src/m40.rs &&
    [[ $(cargo run --quiet) == 193440 ]]'
step 'release and test' 300 'cd "$crate" && cargo build --quiet --release && cargo test --quiet'
step 'clean' 60 'cd "$crate" && cargo clean --quiet && [[ ! -e target ]]'
# Its dependencies were downloaded when the bridge was built, in the same versions.
step 'a crate with dependencies' 600 'cp -r "$here/../vmm" "$MNT/vmm" && rm -rf "$MNT/vmm/target" &&
    cp "$here/../../Cargo.lock" "$MNT/vmm/" && cd "$MNT/vmm" && cargo build --quiet && cargo build -v 2>&1 | grep -q "Fresh ringfsd-vmm"'
summary
