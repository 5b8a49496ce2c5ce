#!/usr/bin/env bash
# Runs the suites of this folder on uring and tokio, each with short settings, so that all of them
# take some minutes: for the gate. Installs what they need. Without /dev/fuse all are skipped, and
# counted as skipped.
#
#   all.sh [RUNTIME...]    only on these: uring, tokio, and tokio-uring if $RINGFSD has it
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

suites=(
    'pjdfstest'
    'overlay'
    'single'
    'requests'
    'remount'
    'set-id'
    'set-id --server-arg --cache=always --server-arg --writeback'
    'set-id --server-arg --cache=metadata'
    'host'
    'rename'
    'fsx --ops 1000'
    'fio --size 4M'
    'stress --seconds 1 --only access chmod copy-file dentry dir fallocate fpunch link rename seek symlink utime xattr'
    'git --commits 100 --files 200'
    'memory-tree'
    'vfs'
    'host-changes --seconds 3'
    'host-changes --seconds 3 --server-arg --cache=always'
)
# What these serve has no part of its own for each runtime, so they run on the first one only.
once=(
    'pjdfstest --overlay yes'
    'pjdfstest --vfs yes'
    'memory-tree --may-block yes'
    'fuse-backend'
    'fuse-backend --kind vfs'
    'fuse-backend --kind overlay'
)
runtimes=("${@:-uring}")
(($#)) || runtimes=(uring tokio)
passed=0 failed=0 skipped=0 began=$SECONDS

# The module may not have been loaded yet.
[[ -c /dev/fuse ]] || modprobe fuse 2>/dev/null || true
if [[ ! -c /dev/fuse ]]; then
    skipped=$((${#suites[@]} * ${#runtimes[@]} + ${#once[@]}))
    echo "0 suites passed, 0 failed, $skipped skipped: there is no /dev/fuse"
    exit 0
fi

# run RUNTIME SUITE [OPTION VALUE]...: runs one suite; shows its output if it fails.
run() {
    local runtime=$1 suite=$2 output status=0 start=$SECONDS
    shift 2
    output=$(mktemp)
    timeout --kill-after=30 600 "$here/$suite.sh" --runtime "$runtime" "$@" >"$output" 2>&1 || status=$?
    if ((status)); then
        failed=$((failed + 1))
        echo "FAILED $suite on $runtime: status $status"
        sed 's/^/    /' "$output"
    else
        passed=$((passed + 1))
        echo "passed $suite on $runtime ($((SECONDS - start)) s): $(grep -E ' passed, ' "$output" | tail -n 1)"
    fi
    rm -f "$output"
}

# Builds what all suites use, which may take longer than a suite is given.
"$here/with.sh" -- true

for runtime in "${runtimes[@]}"; do
    more=()
    [[ $runtime != "${runtimes[0]}" ]] || more=("${once[@]}")
    for suite in "${suites[@]}" "${more[@]}"; do
        read -ra words <<<"$suite"
        # Everything after --only is one value.
        if [[ $suite == *' --only '* ]]; then
            read -ra words <<<"${suite%% --only *}"
            words+=(--only "${suite#* --only }")
        fi
        run "$runtime" "${words[@]}"
    done
done
echo "$passed suites passed, $failed failed, $skipped skipped ($((SECONDS - began)) s)"
((failed == 0))
