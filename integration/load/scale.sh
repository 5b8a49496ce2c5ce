#!/usr/bin/env bash
# Measures how ringfsd and virtiofsd scale: many servers on this host, and one server whose guest
# knows very many inodes, lists very large directories, or has very many files open. Prints Markdown.
# Runs as root.
#
#   scale.sh [OPTION...]
#
#   --servers A,B    some of ringfsd, virtiofsd (both)
#   --fleets A,B     numbers of servers (1,10,100,500; none for no such measurement)
#   --inodes A,B     numbers of inodes known by one guest (100000,1000000,3000000; none)
#   --entries A,B    numbers of entries of a directory (10000,100000,1000000; none)
#   --open-files A,B numbers of open files (1000,10000,100000; none)
#   --seconds N      how long a fleet is measured while it is idle, and then while it is busy (5)
#   --ringfsd PATH   this program instead of one built here
#   --load PATH      the same of the load generator
#   --fleet-args A   arguments for ringfsd in a fleet
#   --dir DIR        where the share is: a tmpfs is mounted below it (the target directory)
#
# Servers log errors only. In a fleet they run with their default options. With many inodes ringfsd gets
# --max-inodes as large as the number; virtiofsd, which otherwise needs a descriptor for each inode,
# --inode-file-handles=mandatory above half a million. The limit of open files is raised to fs.nr_open
# (with CAP_SYS_RESOURCE, otherwise to the hard limit), from which ringfsd derives --max-handles and
# virtiofsd --rlimit-nofile: open files need four thirds of their number.
# A million inodes in a tmpfs take about 1 GB of the host's memory.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

servers=ringfsd,virtiofsd fleets=1,10,100,500 inodes=100000,1000000,3000000
entries=10000,100000,1000000 open_files=1000,10000,100000 seconds=5 ringfsd='' load='' fleet_args=''
target=${CARGO_TARGET_DIR:-$root/target}
dir=$target
while (($#)); do
    if (($# < 2)); then
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
    fi
    case $1 in
    --servers) servers=$2 ;;
    --fleets) fleets=$2 ;;
    --inodes) inodes=$2 ;;
    --entries) entries=$2 ;;
    --open-files) open_files=$2 ;;
    --seconds) seconds=$2 ;;
    --ringfsd) ringfsd=$2 ;;
    --load) load=$2 ;;
    --fleet-args) fleet_args=$2 ;;
    --dir) dir=$2 ;;
    *) echo "scale.sh: no option $1" >&2 && exit 2 ;;
    esac
    shift 2
done
((EUID == 0)) || {
    echo 'scale.sh: the servers must run as root' >&2
    exit 1
}

mkdir -p "$dir"
scratch=$(mktemp -d "$dir/scale-XXXXXX")
peers=$target/peers
pid=''
cleanup() {
    if [[ $pid ]]; then kill "$pid" 2>/dev/null || true; fi
    umount -l "$scratch/share" 2>/dev/null || true
    rm -rf --one-file-system "$scratch"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
# shellcheck source=peers.sh
. "$here/peers.sh"
for name in ringfsd load; do
    if [[ -z ${!name} ]]; then
        folder=$root
        if [[ $name == load ]]; then folder=$here; fi
        cargo build --quiet --release --locked --target-dir "$target" --manifest-path "$folder/Cargo.toml"
        printf -v "$name" %s "$target/release/$name"
    fi
done
if [[ ,$servers, == *,virtiofsd,* ]]; then get_virtiofsd; fi
ulimit -n "$(cat /proc/sys/fs/nr_open)" 2>/dev/null || ulimit -n "$(ulimit -Hn)"
echo "- the limit of open files is $(ulimit -n)"
mkdir "$scratch/share" "$scratch/sockets"
mount -t tmpfs -o nr_inodes=0,size=100% tmpfs "$scratch/share"
IFS=, read -ra server_list <<<"$servers"

# line SERVER SOCKET [ARGUMENT...]
line() {
    local server=$1 socket=$2
    shift 2
    case $server in
    ringfsd) echo "$ringfsd --socket $socket --shared-dir $scratch/share --log-level error $*" ;;
    virtiofsd) echo "$virtiofsd --socket-path $socket --shared-dir $scratch/share --log-level error $*" ;;
    *) echo "scale.sh: no server $server" >&2 && return 2 ;;
    esac
}

echo "- $(date -u +%F), $(nproc) processors, Linux $(uname -r), load average $(cut -d ' ' -f 1-3 /proc/loadavg)"
if [[ $fleets != none ]]; then
    heading=(--heading)
    echo
    for count in ${fleets//,/ }; do
        for server in "${server_list[@]}"; do
            args=''
            if [[ $server == ringfsd ]]; then args=$fleet_args; fi
            "$load" fleet --command "$(line "$server" %SOCKET% "$args")" --dir "$scratch/sockets" \
                --count "$count" --seconds "$seconds" --label "$server" "${heading[@]}"
            heading=()
        done
    done
fi

most=0
options=()
for name in inodes entries open_files; do
    if [[ ${!name} == none ]]; then continue; fi
    options+=("--${name/_/-}" "${!name}")
    for number in ${!name//,/ }; do most=$((number > most ? number : most)); done
done
if ((${#options[@]})); then
    for server in "${server_list[@]}"; do
        socket=$scratch/sockets/$server
        args=''
        # Beside the files there are their directories.
        if [[ $server == ringfsd ]]; then args="--max-inodes $((most + most / 100 + 20000))"; fi
        # Otherwise it needs a descriptor for each inode.
        if [[ $server == virtiofsd ]] && ((most > 500000)); then args=--inode-file-handles=mandatory; fi
        sh -c "exec $(line "$server" "$socket" "$args")" </dev/null &
        pid=$!
        until [[ -S $socket ]]; do
            kill -0 "$pid"
            sleep 0.05
        done
        printf '\n%s, µs of CPU for one request (of time that passed, %s in flight):\n' "$server" 32
        "$load" many --socket "$socket" --shared-dir "$scratch/share" --pid "$pid" "${options[@]}"
        kill "$pid" 2>/dev/null || true
        wait "$pid" || true
        pid=''
    done
fi
