#!/usr/bin/env bash
# File systems of fuse-backend-rs, mounted here by the real FUSE client: the example fuse_backend
# serves one by the library's adapter. Programs make, write, read, list, rename and remove files
# there; each result is compared with what they do in a plain directory.
#
# Options: those of with.sh but --server, and
#   --kind KIND        its passthrough (default), a `vfs` of two directories, or an `overlay`
#   --immediate yes    the file system is called on the workers
set -euo pipefail
# shellcheck source=suite.sh
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"
if [[ -z ${MNT:-} ]]; then
    root=$here/../..
    cargo build --quiet --release --locked --manifest-path "$root/Cargo.toml" --example fuse_backend
    options=''
    if [[ " $* " == *' --immediate yes '* ]]; then options+=' --immediate'; fi
    if [[ " $* " =~ ' --runtime '([a-z-]+)' ' ]]; then options+=" --runtime ${BASH_REMATCH[1]}"; fi
    kind=passthrough
    if [[ " $* " =~ ' --kind '([a-z]+)' ' ]]; then kind=${BASH_REMATCH[1]}; fi
    case $kind in
    passthrough) dirs='' served='%SHARE%' ;;
    vfs) dirs='one two' served='one=%SHARE%/one two=%SHARE%/two' ;;
    overlay) dirs='upper work below above' served='%SHARE%/upper %SHARE%/work %SHARE%/above %SHARE%/below' ;;
    *) echo "fuse-backend.sh: no kind $kind" >&2 && exit 2 ;;
    esac
    server=''
    for dir in $dirs; do server+="mkdir %SHARE%/$dir && "; done
    server+="exec $(realpath "$root")/target/release/examples/fuse_backend %SOCKET%$options $kind $served"
    set -- --server "$server" --request-queues 2 "$@"
fi
own='kind immediate'
on_mount "$@"

# shellcheck source=programs.sh
. "$here/programs.sh"
if [[ ${kind:-} == overlay ]]; then
    # Its RENAME is not implemented (EXDEV), and git renames files.
    programs=(copies_a_tree writes_in_place makes_and_removes_names many_at_once removes_everything)
fi
if [[ ${kind:-} == vfs ]]; then
    mount=$MNT
    for name in one two; do
        MNT=$mount/$name
        run_programs "$name: "
    done
else
    run_programs
fi
summary
