#!/usr/bin/env bash
# A file system that is no directory of the host, mounted here by the real FUSE client: the example
# memory_tree, whose files are in memory, served by the library. Programs make, write, read, list, rename
# and remove files there; each result is compared with what they do in a plain directory.
#
# Options: those of with.sh but --server, and
#   --may-block yes    the tree is called on threads that may wait
set -euo pipefail
# shellcheck source=suite.sh
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"
if [[ -z ${MNT:-} ]]; then
    root=$here/../..
    server="$(realpath "$root")/target/release/examples/memory_tree %SOCKET%"
    if [[ " $* " == *' --may-block yes '* ]]; then server+=' --may-block'; fi
    features=()
    if [[ " $* " =~ ' --runtime '([a-z-]+)' ' ]]; then
        server+=" --runtime ${BASH_REMATCH[1]}"
        if [[ ${BASH_REMATCH[1]} == tokio-uring ]]; then features=(--features tokio-uring); fi
    fi
    cargo build --quiet --release --locked --manifest-path "$root/Cargo.toml" --example memory_tree \
        "${features[@]}"
    set -- --server "$server" --request-queues 2 "$@"
fi
own='may-block'
on_mount "$@"

# shellcheck source=programs.sh
. "$here/programs.sh"
run_programs
summary
