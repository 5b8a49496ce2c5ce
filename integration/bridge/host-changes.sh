#!/usr/bin/env bash
# Programs write on the mount while the host changes the shared directory: it replaces files and
# directories by rename, removes them, makes backups, truncates them. Each record whose write was
# acknowledged to a program must be at its path, or in what the host removed from there afterwards;
# no reader may get ESTALE.
#
# Options: those of with.sh, and
#   --seconds N    duration (10)
#   --writers N    programs that write at the same time (3)
#   --seed N       seed of the random numbers (the time)
#   --mode M       file-handles: with --inode-file-handles=prefer; no-open: with --no-open
set -euo pipefail
# shellcheck source=suite.sh
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"
own='seconds writers seed mode'
if [[ -z ${MNT:-} ]]; then
    case " $* " in
    *' --mode file-handles '*) set -- "$@" --server-arg --inode-file-handles=prefer ;;
    *' --mode no-open '*) set -- "$@" --server-arg --no-open ;;
    *' --mode '*) echo "host-changes.sh: no such mode" >&2 && exit 2 ;;
    esac
fi
on_mount "$@"

program=${HOST_CHANGES:-}
if [[ -z $program ]]; then
    manifest=$here/../host-changes/Cargo.toml
    cargo build --quiet --release --locked --manifest-path "$manifest"
    program=$(realpath "$here/../../target/release/host-changes")
fi
seconds=${seconds:-10}
options=(--seconds "$seconds" --writers "${writers:-3}")
if [[ ${seed:-} ]]; then options+=(--seed "$seed"); fi
if [[ ${mode:-} ]]; then options+=("--$mode"); fi
output=$(mktemp)
status=0
timeout --kill-after=10 $((seconds + 60)) \
    "$program" --mount "$MNT" --share "$SHARE" "${options[@]}" >"$output" 2>&1 || status=$?
cat "$output"
rm -f "$output"
if ((status)); then failed=1; else passed=1; fi
summary
