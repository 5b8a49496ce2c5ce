#!/usr/bin/env bash
# Runs every test, on a fresh Debian machine with Rust: installs what is missing, then runs
# formatting, lints, spelling, dependencies, documentation, unit and loom tests, the tests over a
# socket, 45 seconds of each fuzz target, other projects' suites on a mount of this machine, real
# guests, and other projects' suites in those.
#
#   test.sh [STEP...]     only these steps: format lint tools doc unit loom fuzz bridge recovery package
#                         guest others
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Under nohup, or in the background of a script, every server under test would ignore SIGHUP, or
# SIGINT and SIGQUIT, and a shell can't undo that. (It ignores SIGQUIT itself, so that tells nothing.)
if ((0x$(awk '$1 == "SigIgn:" { print $2 }' /proc/$$/status) & 3)); then
    exec env --default-signal=HUP,INT,QUIT "$PWD/integration/test.sh" "$@"
fi

started=$SECONDS
skipped=0
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

# The feature nydus has C libraries among its dependencies.
if wanted lint || wanted doc || wanted unit || wanted guest; then
    step 'what images need: cmake, OpenSSL'
    integration/rafs-image/packages.sh
    export OPENSSL_NO_VENDOR=1
fi

if wanted format; then
    step 'formatting'
    cargo fmt --all --check
    cargo fmt --manifest-path integration/guest/suite/Cargo.toml --check
    cargo fmt --manifest-path integration/fuzz/Cargo.toml --check
    cargo fmt --manifest-path integration/rafs-image/Cargo.toml --check
    cargo fmt --manifest-path integration/dragonball/Cargo.toml --check
fi

if wanted lint; then
    step 'lints'
    cargo clippy --workspace --all-targets --locked -- -D warnings
    cargo clippy --workspace --all-targets --all-features --locked -- -D warnings
    cargo clippy --manifest-path integration/rafs-image/Cargo.toml --target-dir target --locked -- -D warnings
    cargo clippy --manifest-path integration/guest/suite/Cargo.toml --all-targets --locked -- -D warnings
    cargo clippy --manifest-path integration/fuzz/Cargo.toml --lib --bin seeds --locked -- -D warnings
    # The interface, without what is hidden: each type that it mentions has a public name.
    cargo rustc --lib --profile check --all-features --locked -- \
        --cfg ringfsd_surface -A warnings -D unnameable_types
fi

if wanted tools; then
    step 'spelling, unused dependencies, licences and sources of dependencies'
    cargo xtask tools
fi

if wanted doc; then
    step 'documentation'
    RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --all-features --locked
fi

if wanted unit; then
    step 'unit tests, tests over a socket, examples in the documentation'
    # What launchers see of ringfsd in virtiofsd's place is compared with virtiofsd.
    if VIRTIOFSD=$(integration/bridge/virtiofsd.sh); then
        export VIRTIOFSD
    else
        echo 'skipped: comparing launchers and options with virtiofsd'
        skipped=$((skipped + 1))
    fi
    cargo test --workspace --locked
    # What the features add, in one build: the device in the process of its VMM, and the examples in
    # its documentation; the tests of the third engine, and those that run on all engines in turn;
    # images.
    cargo test --locked --all-features --test embed
    cargo test --locked --all-features --doc embed
    cargo test --locked --all-features --lib --test suite --test model -- \
        tokio_uring io:: pool:: lifecycle:: rafs
    cargo test --locked --all-features --test confinement --test allocations
fi

if wanted loom; then
    step 'loom: every interleaving of the channel and of the used ring'
    cargo xtask test loom
fi

if wanted fuzz; then
    step 'fuzzing: each target for 45 seconds'
    if rustup toolchain list 2>/dev/null | grep -q '^nightly'; then
        integration/fuzz/run.sh 45
    else
        echo 'skipped: fuzzing needs a nightly compiler (rustup toolchain install nightly)'
        skipped=$((skipped + 1))
    fi
fi

if wanted bridge; then
    step "other projects' suites through the bridge"
    integration/bridge/all.sh
fi

if wanted recovery; then
    step 'servers that are killed and replaced under load'
    cargo build --release --locked
    cargo build --release --locked --package ringfsd-recovery --bin kill
    target/release/kill --mode supervised --kills 60
    target/release/kill --mode supervised --kills 60 -- --runtime tokio
    target/release/kill --mode state --kills 150
    target/release/kill --mode state --end both --kills 150
    target/release/kill --mode upgraded --kills 20
    # Prometheus' view of a kill and an upgrade; the dashboard and the alerts.
    cargo build --release --locked --package ringfsd-load
    integration/metrics/check.sh
fi

if wanted package; then
    step 'packages: build, install, serve, remove; the crate as it would be published'
    integration/guest/setup.sh
    cargo xtask package check
    # Without compiling: the sources are those that have been compiled.
    cargo package --locked --offline --no-verify --allow-dirty --quiet
    integration/package/published.sh
fi

if wanted guest; then
    step 'real guests'
    integration/guest/setup.sh
    cargo build --release --locked
    # Each runtime, 1 and 4 request queues, an old kernel and one that uses all queues; each sandbox, as
    # root and as an ordinary user. In all of them a system call that the filter lacks kills the server.
    integration/guest/suite.sh --runtime uring --queues 1 --kernel 6.1 --sandbox namespace
    integration/guest/suite.sh --runtime tokio --queues 4 --kernel 6.1 --sandbox namespace --ordinary-user
    integration/guest/suite.sh --runtime tokio --queues 1 --kernel 6.12 --sandbox chroot
    integration/guest/suite.sh --runtime uring --queues 4 --kernel 6.12 --sandbox none --ordinary-user
    # Two directories under one mount.
    integration/guest/vfs.sh
    # A lower layer, and all changes in an upper one.
    integration/guest/overlay.sh
    # A container image.
    integration/guest/image.sh
    # The space that a guest may take, on file systems with quotas.
    integration/guest/quota.sh
    # A working guest, whose server is killed and upgraded.
    integration/guest/upgrade.sh --kills 5 --upgrades 5 --queues 2
    # A guest under load that is migrated to and fro.
    integration/guest/migrate.sh --ordinary-user --queues 2
    integration/guest/migrate.sh --mode file-handles
fi

if wanted others; then
    step "other projects' suites in a real guest"
    cargo build --release --locked
    integration/guest/others.sh --only pjdfstest --queues 4
    integration/guest/others.sh --only fsx --ops 10000 --kernel 6.1 --runtime tokio
fi

if ((skipped)); then
    step "all passed, $skipped skipped"
else
    step 'all passed'
fi
