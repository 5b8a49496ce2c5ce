#!/usr/bin/env bash
# Fuzzes each target under AddressSanitizer, from the seeds and the inputs that earlier runs have found.
#
#   run.sh SECONDS [TARGET...]    all targets at the same time
#
# Needs a nightly compiler; installs cargo-fuzz if it is missing. Prints for each target how many
# requests it has made. A crash ends the target's run, and its input is kept in artifacts/TARGET.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if (($# < 1)); then
    echo 'usage: run.sh SECONDS [TARGET...]' >&2
    exit 2
fi
seconds=$1
# Absolute paths: a thread that serves a share has a working directory of its own.
here=$PWD
targets=("${@:2}")
if ((${#targets[@]} == 0)); then
    targets=(ring decode request migration vhost_user back_channel state session_snapshot control)
fi

if ! cargo fuzz --version >/dev/null 2>&1; then
    cargo install cargo-fuzz --locked
fi
cargo +nightly fuzz build --fuzz-dir .

# fuzz TARGET: runs one target, and prints a line about it.
fuzz() {
    local target=$1 log cover
    mkdir -p "corpus/$target" "artifacts/$target"
    log=$(mktemp)
    # Through a pipe: targets limit the size of files that they write.
    if ! cargo +nightly fuzz run --fuzz-dir . "$target" "$here/corpus/$target" "$here/seeds/$target" -- \
        -max_total_time="$seconds" -max_len=8192 -timeout=30 -rss_limit_mb=2048 \
        -artifact_prefix="$here/artifacts/$target/" 2>&1 | cat >"$log"; then
        echo "$target: failed"
        tail -n 60 "$log"
        return 1
    fi
    # The last number of covered edges; then the inputs and the requests of the run.
    cover=$(grep -o 'cov: [0-9]*' "$log" | tail -n 1)
    echo "$target: ${cover:-cov: none}, $(grep -o '^Done [0-9]* runs' "$log"), $(grep '^fuzzed requests' "$log")"
    rm -f "$log"
}

running=()
for target in "${targets[@]}"; do
    fuzz "$target" &
    running+=($!)
done
failed=0
for one in "${running[@]}"; do
    wait "$one" || failed=1
done
exit "$failed"
