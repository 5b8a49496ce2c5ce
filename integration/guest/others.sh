#!/usr/bin/env bash
# Runs other projects' suites in a real guest, on a share: pjdfstest and fsx of crates.io, linked
# statically. integration/bridge runs more of them, and faster. Prints their closing lines, and before
# those what failed and what was skipped for which reason. Exit status 1 if anything failed.
#
#   others.sh [OPTION...]
#
#   --only NAME         only this one: pjdfstest, fsx
#   --ops N             operations of fsx (20,000)
#   --timeout SECONDS   limit for the guest (1200)
#   --runtime R         ringfsd's runtime: auto (default), uring, tokio
#   --kernel, --queues, --cpus, --server, --log-dir
#                       as for run.sh
#
# Environment: RINGFSD_GUEST_CACHE (see setup.sh).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
# shellcheck source=options.sh
source "$here/options.sh"
# shellcheck source=server.sh
source "$here/server.sh"
# shellcheck source=../bridge/crate.sh
source "$here/../bridge/crate.sh"
only='' ops=20000 limit=1200 runtime=auto kernel=6.12 queues=1 server='' cpus='' logs=''
options=() work=''

parse() {
    takes=(
        [--only]=only [--ops]=ops [--timeout]=limit [--runtime]=runtime [--kernel]=kernel
        [--queues]=queues [--server]=server [--cpus]=cpus [--log-dir]=logs
    )
    read_options "$@"
    options=(${cpus:+--cpus "$cpus"} ${logs:+--log-dir "$logs"})
    if [[ -z $server ]]; then
        server_default "$repo" "$queues"
        server+=" --runtime $runtime"
    fi
}

# program NAME VERSION: puts a program of crates.io into the share.
program() {
    crate "$1" "$2"
    cp "$crate" "$work/share/bin/$1"
}

configure() {
    cp "$here"/../bridge/pjdfstest.{toml,awk} "$work/share/bin/"
    cat >"$work/share/bin/fsx.toml" <<'CONFIG'
flen = 262144
[weights]
close_open = 1
invalidate = 1
fsync = 0.2
fdatasync = 0.2
punch_hole = 2
sendfile = 5
posix_fadvise = 1
copy_file_range = 2
posix_fallocate = 2
CONFIG
}

# The guest's part.
guest_script() {
    echo "#!/bin/sh"
    echo "only=$only ops=$ops seed=$RANDOM"
    cat <<'SCRIPT'
set -u
cp -r /mnt/bin /tmp/bin
mkdir -m 777 /tmp/other /tmp/artifacts
printf '%s\n' nobody:x:65534:65534::/:/bin/sh tests:x:999:999::/:/bin/sh >>/etc/passwd
printf '%s\n' nogroup:x:65534: tests:x:999: >>/etc/group
status=0

run_pjdfstest() {
    mkdir -m 755 /mnt/pjdfstest
    /tmp/bin/pjdfstest --configuration-file /tmp/bin/pjdfstest.toml --path /mnt/pjdfstest \
        --secondary-fs /tmp/other >/tmp/pjdfstest 2>&1 || status=1
    grep -A 12 ' FAILED$' /tmp/pjdfstest
    awk -f /tmp/bin/pjdfstest.awk /tmp/pjdfstest
    summary=$(grep '^Summary' /tmp/pjdfstest) || { tail -n 5 /tmp/pjdfstest; status=1; }
    echo "pjdfstest: $summary"
}

# A process for each 2,000 operations: fsx 0.3.2 keeps each mapping that it has read. A process that
# asks for a range of no bytes ends, and the next continues, as in integration/bridge/fsx.sh.
run_fsx() {
    n=0
    while [ "$n" -lt "$ops" ]; do
        if ! /tmp/bin/fsx -q -f /tmp/bin/fsx.toml -N 2000 -S $((seed + n)) -P /tmp/artifacts /mnt/fsx >/tmp/fsx 2>&1 &&
            ! tail -n 1 /tmp/fsx | grep -q 'POSIX_FALLOCATE.* 0x0 bytes'
        then
            tail -n 20 /tmp/fsx
            status=1
            break
        fi
        n=$((n + 2000))
    done
    echo "fsx: $n operations passed of $ops, seed $seed"
}

for suite in ${only:-pjdfstest fsx}; do
    "run_$suite"
done
exit $status
SCRIPT
}

main() {
    parse "$@"
    "$here/setup.sh"
    work=$(mktemp -d "${TMPDIR:-/tmp}/ringfsd-others.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    chmod 755 "$work"
    mkdir -p "$work/share/bin"
    program pjdfstest 0.2.2
    program fsx 0.3.2
    configure
    guest_script >"$work/script"
    # Before the time limit starts.
    "$here/initramfs.sh" "$kernel" >/dev/null
    "$here/run.sh" --share "$work/share" --server "$server" --kernel "$kernel" --queues "$queues" \
        --timeout "$limit" "${options[@]}" -- "$work/script"
}

main "$@"
