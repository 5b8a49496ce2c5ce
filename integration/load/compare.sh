#!/usr/bin/env bash
# Measures virtio-fs servers in turn on the same share with the same cases, and prints medians and
# ratios as Markdown. Runs on Debian, as root; installs what is missing.
#
#   compare.sh [OPTION...] [-- LOAD-OPTION...]
#
#   --rounds N        rounds, each of which runs every case with every server (3)
#   --seconds S       time that a case is measured for (3)
#   --warm-up S       time that it runs before it is measured (0.5)
#   --cases A,B       cases, as `load --list` prints them (those of docs/benchmarks.md)
#   --servers A,B     some of ringfsd-uring, ringfsd-tokio, ringfsd-default, virtiofsd-N with a pool of
#                     N threads, c-virtiofsd, bare, fio (all, with pools of 0, 4 and 16)
#   --quick           one round, half a second each
#   --ringfsd PATH    this program instead of one built here
#   --ringfsd-args A  more arguments for ringfsd
#   --server N=LINE   one more server: its name, and a shell command in which %SOCKET% and %SHARE%
#                     stand for the paths, and %QUEUES% for the number of request queues (without
#                     it, cases with more than one are left out); may be repeated
#   --server-cpus L   pin each server to these processors, in taskset's notation (not pinned)
#   --load-cpus L     pin the load generator and the bare calls likewise (not pinned)
#   --file-size B     size of each of the two large files (256m)
#   --dir DIR         where the share is made; not on tmpfs (the target directory)
#   --results FILE    keep the single results there, a line of JSON each
#
# Every server runs as root, with logs for errors only. ringfsd and virtiofsd run with --sandbox
# none, --seccomp none and --allow-direct-io. ringfsd-default is ringfsd with default options, its
# sandbox and its system-call filter, so that it shows what these cost. The C virtiofsd can't run
# without either: it has sandbox=chroot, its system-call filter, and allow_direct_io.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
peers=$target/peers
# Starts and ends servers: server_start, server_wait, server_stop.
# shellcheck source=../guest/server.sh
source "$here/../guest/server.sh"

rounds=3
seconds=3
warm_up=0.5
cases=getattr@1,getattr@32,lookup@32,lookup-new@8,lookup-absent@8,read/4k@1,read/4k@32
cases+=,read/64k@8,read-direct/4k@1,read-direct/4k@32,write/4k@32,read-seq/1m@8,write-seq/1m@8
cases+=,create@8,open-read-close@8,cold@8,readdirplus/32k@1,mixed/4k@32,read/4k@8x4,idle
servers='ringfsd-uring,ringfsd-tokio,ringfsd-default,virtiofsd-0,virtiofsd-4,virtiofsd-16,c-virtiofsd,bare,fio'
ringfsd=
ringfsd_args=
server_cpus=
load_cpus=
file_size=256m
dir=$target
results=
load_args=()
declare -A more_servers=()
more_names=

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

fail() {
    echo "compare.sh: $*" >&2
    exit 1
}

while (($# > 0)); do
    case $1 in
        --quick)
            rounds=1 seconds=0.5 warm_up=0.1
            shift
            continue
            ;;
        --help | -h)
            usage
            exit
            ;;
        --)
            shift
            load_args=("$@")
            break
            ;;
    esac
    if (($# < 2)); then
        usage >&2
        exit 2
    fi
    case $1 in
        --rounds) rounds=$2 ;;
        --seconds) seconds=$2 ;;
        --warm-up) warm_up=$2 ;;
        --cases) cases=$2 ;;
        --servers) servers=$2 ;;
        --ringfsd) ringfsd=$2 ;;
        --ringfsd-args) ringfsd_args=$2 ;;
        --server)
            more_servers[${2%%=*}]=${2#*=}
            more_names+=",${2%%=*}"
            ;;
        --server-cpus) server_cpus=$2 ;;
        --load-cpus) load_cpus=$2 ;;
        --file-size) file_size=$2 ;;
        --dir) dir=$2 ;;
        --results) results=$2 ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
    shift 2
done
IFS=, read -ra case_list <<<"$cases"
servers+=$more_names
IFS=, read -ra server_list <<<"$servers"

for name in "${server_list[@]}"; do
    case $name in
        ringfsd-uring | ringfsd-tokio | ringfsd-default | virtiofsd-[0-9]* | c-virtiofsd | bare | fio) ;;
        *) [[ -n ${more_servers[$name]:-} ]] || fail "there is no server $name" ;;
    esac
done

wanted() {
    [[ ",$servers," == *",$1"* ]]
}

### What is needed

# shellcheck source=peers.sh
source "$here/peers.sh"

for tool in cargo taskset setpriv awk; do
    command -v "$tool" >/dev/null || fail "$tool is missing"
done
((EUID == 0)) || fail 'the servers must run as root'

mkdir -p "$dir"
scratch=$(mktemp -d "$dir/compare-XXXXXX")
share=$scratch/share
socket=$scratch/socket
server_pid=
cleanup() {
    if [[ -n $server_pid ]]; then server_stop "$server_pid"; fi
    rm -rf "$scratch"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir "$share"
[[ $cases != *direct* || $(stat -f -c %T "$share") != tmpfs ]] || fail "O_DIRECT cases, and $dir is on tmpfs: choose a --dir on a disk"
lines=${results:-$scratch/results}
: >"$lines"

# The same target directory for both, whether they are one workspace or two.
cargo build --quiet --release --target-dir "$target" --manifest-path "$here/Cargo.toml"
load=$target/release/load
# A case without size and depth gets the defaults, so that fio can use them.
for index in "${!case_list[@]}"; do
    full=$("$load" --list | awk -v name="${case_list[index]}" '
        $1 == name { gsub(/[][]/, "", $NF); print $NF }')
    case_list[index]=${full:-${case_list[index]}}
done
left_out=()
drop() {
    left_out+=("$1")
    local kept=() name
    for name in "${server_list[@]}"; do [[ $name == "$1"* ]] || kept+=("$name"); done
    server_list=("${kept[@]}")
}
virtiofsd=
c_virtiofsd=
if wanted ringfsd- && [[ -z $ringfsd ]]; then
    cargo build --quiet --release --target-dir "$target" --manifest-path "$root/Cargo.toml"
    ringfsd=$target/release/ringfsd
fi
if wanted virtiofsd- && ! get_virtiofsd; then
    drop virtiofsd-
    virtiofsd=
fi
if wanted c-virtiofsd && ! get_c_virtiofsd; then
    drop c-virtiofsd
    c_virtiofsd=
fi
if wanted fio && ! apt_install fio; then drop fio; fi

### The servers

pinned() {
    if [[ -n $server_cpus ]]; then
        printf 'exec taskset -c %q %s' "$server_cpus" "$1"
    else
        printf 'exec %s' "$1"
    fi
}

# Prints the command of a server with this number of queues.
command_of() {
    local name=$1 queues=$2 line
    if [[ -n ${more_servers[$name]:-} ]]; then
        pinned "${more_servers[$name]//%QUEUES%/"$queues"}"
        return
    fi
    case $name in
        ringfsd-*)
            printf -v line '%q --socket %%SOCKET%% --shared-dir %%SHARE%%' "$ringfsd"
            line+=' --once --log-level error'
            if [[ $name != ringfsd-default ]]; then
                line+=" --runtime ${name#ringfsd-}$ringfsd_open"
            fi
            ((queues == 1)) || line+=" --request-queues $queues"
            line+=" $ringfsd_direct $ringfsd_args"
            ;;
        virtiofsd-*)
            printf -v line '%q --socket-path %%SOCKET%% --shared-dir %%SHARE%%' "$virtiofsd"
            line+=' --sandbox none --seccomp none --allow-direct-io --log-level error'
            line+=" --thread-pool-size ${name#virtiofsd-}"
            ;;
        c-virtiofsd)
            printf -v line '%q -f --socket-path=%%SOCKET%% -o source=%%SHARE%%' "$c_virtiofsd"
            line+=' -o sandbox=chroot -o allow_direct_io -o log_level=err'
            ;;
    esac
    pinned "$line"
}

# Without a sandbox and a filter, as virtiofsd runs; an older ringfsd has no such options.
ringfsd_open=
if wanted ringfsd- && "$ringfsd" --help | grep -q -e --sandbox; then
    ringfsd_open=' --sandbox none --seccomp none'
fi
ringfsd_direct=
if wanted ringfsd- && "$ringfsd" --help | grep -q -e --allow-direct-io; then
    ringfsd_direct=--allow-direct-io
fi

pin_load=()
[[ -z $load_cpus ]] || pin_load=(taskset -c "$load_cpus")
# A case that takes longer than this is taken to hang.
bound=$(awk -v a="$seconds" -v b="$warm_up" 'BEGIN { print int(a + b) + 60 }')

failures=()
measure_server() {
    local name=$1 case=$2 queues=1
    [[ $case =~ @[0-9]+x([0-9]+)$ ]] && queues=${BASH_REMATCH[1]}
    # The peers serve one request queue only.
    if ((queues > 1)); then
        if [[ $name == *virtiofsd* ]]; then return; fi
        if [[ ${more_servers[$name]:-%QUEUES%} != *%QUEUES%* ]]; then return; fi
    fi
    rm -f "$socket"
    server_start "$(command_of "$name" "$queues")" "$socket" "$share" "$scratch/log"
    if ! server_wait "$socket" 10 "$server_pid"; then
        cat "$scratch/log" >&2
        fail "$name did not start"
    fi
    local status=0
    "${pin_load[@]}" timeout "$bound" "$load" --socket "$socket" --shared-dir "$share" \
        --pid "$server_pid" --label "$name" --case "$case" --seconds "$seconds" \
        --warm-up "$warm_up" --file-size "$file_size" --keep --json "${load_args[@]}" \
        >>"$lines" || status=$?
    if ((status == 2)); then
        fail 'load does not know these options'
    elif ((status > 0)); then
        failures+=("$case, $name")
        tail -n 5 "$scratch/log" >&2
    fi
    server_stop "$server_pid"
    server_pid=
}

measure_bare() {
    case $1 in
        idle* | mixed* | *x[0-9]*) return ;;
    esac
    "${pin_load[@]}" timeout "$bound" "$load" bare --shared-dir "$share" --case "$1" \
        --seconds "$seconds" --warm-up "$warm_up" --file-size "$file_size" --keep --json \
        >>"$lines" ||
        failures+=("$1, bare")
}

# Runs fio for cases that bypass the page cache: the disk's own limit at that depth.
measure_fio() {
    local case=$1 mode field
    [[ $case =~ ^(read|write)(-seq)?-direct/([0-9]+[km])@([0-9]+)$ ]] || return 0
    case ${BASH_REMATCH[1]}${BASH_REMATCH[2]} in
        read) mode=randread field=8 ;;
        write) mode=randwrite field=49 ;;
        read-seq) mode=read field=8 ;;
        write-seq) mode=write field=49 ;;
    esac
    # The numbers of the terse format, version 3: operations a second of reads, of writes.
    "${pin_load[@]}" timeout "$bound" fio --name=limit --filename="$share/ringfsd-load/direct" \
        --ioengine=io_uring --direct=1 --rw="$mode" --bs="${BASH_REMATCH[3]}" \
        --iodepth="${BASH_REMATCH[4]}" --time_based --runtime="$(milliseconds "$seconds")" \
        --ramp_time="$(milliseconds "$warm_up")" --invalidate=1 --randrepeat=1 \
        --output-format=terse --terse-version=3 |
        awk -F ';' -v field="$field" -v name="$case" '
            $1 == 3 {
                printf "{\"server\":\"fio\",\"case\":\"%s\",", name
                printf "\"operations_per_second\":%s}\n", $field
                found = 1
            }
            END { exit !found }' >>"$lines" ||
        failures+=("$case, fio")
}

milliseconds() {
    awk -v s="$1" 'BEGIN { printf "%dms", s * 1000 }'
}

### The rounds

# Makes the files once, so that it is not measured.
timeout 600 "$load" bare --shared-dir "$share" --case getattr --seconds 0 --warm-up 0 \
    --file-size "$file_size" --keep --json >/dev/null

total=$((rounds * ${#case_list[@]} * ${#server_list[@]}))
count=0
for ((round = 1; round <= rounds; round++)); do
    for case in "${case_list[@]}"; do
        # Another server comes first in each round, as the first of a case is affected by the case before.
        for ((turn = 0; turn < ${#server_list[@]}; turn++)); do
            name=${server_list[(turn + round - 1) % ${#server_list[@]}]}
            count=$((count + 1))
            if [[ -t 2 ]]; then
                printf '\r\033[K%d of %d: %s, %s' "$count" "$total" "$case" "$name" >&2
            fi
            case $name in
                bare) measure_bare "$case" ;;
                fio) measure_fio "$case" ;;
                *) measure_server "$name" "$case" ;;
            esac
        done
    done
done
if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi

### The report

pin_words() {
    if [[ -n $1 ]]; then echo "pinned to processors $1"; else echo 'not pinned'; fi
}

processor=$(awk -F ': ' '/^model name/ { print $2; exit }' /proc/cpuinfo)
memory=$(awk '/^MemTotal/ { printf "%.0f", $2 / 1048576 }' /proc/meminfo)
read -r file_system device < <(findmnt -n -o FSTYPE,SOURCE -T "$share")
read -r one five _ </proc/loadavg
cat <<REPORT
- $(date -u +%F), $(nproc) processors ($processor), $memory GiB, Linux $(uname -r), \
$file_system on $device
- rounds: $rounds, each case $seconds s after $warm_up s, load average at the end $one (1 min), \
$five (5 min)
- servers $(pin_words "$server_cpus"), load generator $(pin_words "$load_cpus")\
${load_args[*]:+, with ${load_args[*]}}
REPORT
if [[ -n $ringfsd ]]; then
    echo "- $("$ringfsd" --version)${ringfsd_args:+, with $ringfsd_args}"
    [[ -n $ringfsd_direct ]] || echo '- this ringfsd has no option to pass O_DIRECT on'
fi
[[ -z $virtiofsd ]] || echo "- $("$virtiofsd" --version)"
[[ -z $c_virtiofsd ]] || echo "- C $("$c_virtiofsd" --version | head -n 1)"
for name in "${left_out[@]}"; do echo "- $name* is left out: it could not be installed"; done
for failure in "${failures[@]}"; do echo "- failed: $failure"; done
echo
"$load" table "$lines"
((${#failures[@]} == 0))
