#!/usr/bin/env bash
# Passes every test there is, on a fresh Debian machine with Rust: installs what is missing, then
# formatting, lints, documentation, unit and loom tests, the tests over a socket, others' suites on a
# mount of this machine's own, and real guests.
#
#   test.sh [STEP...]     only these steps: format lint doc unit loom bridge guest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

started=$SECONDS
steps=("${@:-all}")

wanted() {
    [[ ${steps[0]} == all ]] || [[ " ${steps[*]} " == *" $1 "* ]]
}

step() {
    printf '\n== %s (%d s)\n' "$*" "$((SECONDS - started))"
}

if ! command -v cargo >/dev/null; then
    echo 'test.sh: cargo is missing: install Rust first' >&2
    exit 1
fi

if wanted format; then
    step 'formatting'
    cargo fmt --all --check
    cargo fmt --manifest-path integration/guest/suite/Cargo.toml --check
fi

if wanted lint; then
    step 'lints'
    cargo clippy --workspace --all-targets --locked -- -D warnings
    cargo clippy --manifest-path integration/guest/suite/Cargo.toml --all-targets --locked -- -D warnings
fi

if wanted doc; then
    step 'documentation'
    RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --locked
fi

if wanted unit; then
    step 'unit tests, tests over a socket, examples in the documentation'
    cargo test --workspace --locked
fi

if wanted loom; then
    step 'loom: every interleaving of the channel'
    CARGO_PROFILE_RELEASE_LTO=off RUSTFLAGS='--cfg ringfsd_loom' cargo test --locked --release --test loom --target-dir target/loom
fi

if wanted bridge; then
    step "others' suites through the bridge"
    integration/bridge/all.sh
fi

if wanted guest; then
    step 'real guests'
    integration/guest/setup.sh
    cargo build --release --locked
    # Each runtime, 1 and 4 request queues, an old kernel and one that spreads over the queues.
    integration/guest/suite.sh --runtime uring --queues 1 --kernel 6.1
    integration/guest/suite.sh --runtime tokio --queues 4 --kernel 6.1
    integration/guest/suite.sh --runtime tokio --queues 1 --kernel 6.12
    integration/guest/suite.sh --runtime uring --queues 4 --kernel 6.12
fi

step 'all passed'
