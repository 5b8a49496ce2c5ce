#!/usr/bin/env bash
# Kills and upgrades a server repeatedly while a guest works: QEMU's connection, the guest's mount and
# its open files stay in use, nothing is lost and nothing done twice. Prints a line for each step, the
# pauses (median, 99th percentile, longest; milliseconds), and "N passed, N failed". Exit status 1 if
# anything failed, 2 for wrong options.
#
#   upgrade.sh [OPTION...]
#
#   --kills N           number of kills of the serving process (10)
#   --upgrades N        number of upgrades (10)
#   --every SECONDS     time that the guest works in between (0.3)
#   --queues N          request queues (1)
#   --kernel 6.1|6.12   the guest's kernel (6.12)
#   --server COMMAND    starts the server, as for run.sh; must contain --supervise
#   --program FILE      the program to upgrade to (target/release/ringfsd)
#   --log-dir DIR       keep all logs there
#
# Environment: RINGFSD_GUEST_CACHE (see setup.sh).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
# shellcheck source=options.sh
source "$here/options.sh"
# shellcheck source=server.sh
source "$here/server.sh"
# shellcheck source=report.sh
source "$here/report.sh"

kills=10 upgrades=10 every=0.3 queues=1 kernel=6.12 server='' logs='' program=$repo/target/release/ringfsd
work='' server_pid='' guest=''

parse() {
    takes=(
        [--kills]=kills [--upgrades]=upgrades [--every]=every [--queues]=queues [--kernel]=kernel
        [--server]=server [--program]=program [--log-dir]=logs
    )
    read_options "$@"
    if [[ -z $server ]]; then
        server_default "$repo" "$queues"
        server+=' --supervise'
    fi
}

# The guest's part: each of its operations fails if it is done twice or not at all.
guest_script() {
    cat <<'SCRIPT'
#!/bin/sh
set -u
fail() {
    echo "worker $1, round $2: $3"
    exit 1
}
worker() {
    n=0
    exec 3>>"/mnt/log.$1"
    while [ ! -e /mnt/stop ]; do
        n=$((n + 1))
        d=/mnt/work.$1.$n
        mkdir "$d" || fail "$1" "$n" mkdir
        echo "$n" >"$d/a" || fail "$1" "$n" write
        mv "$d/a" "$d/b" || fail "$1" "$n" rename
        ln "$d/b" "$d/c" || fail "$1" "$n" link
        ln -s b "$d/l" || fail "$1" "$n" symlink
        [ "$(cat "$d/c")" = "$n" ] || fail "$1" "$n" read
        head -c 300000 /dev/urandom >"/tmp/$1" && cp "/tmp/$1" "$d/large" || fail "$1" "$n" copy
        cmp "/tmp/$1" "$d/large" || fail "$1" "$n" compare
        rm "$d/b" "$d/l" || fail "$1" "$n" unlink
        echo "$n" >&3 || fail "$1" "$n" append
        if [ $((n % 4)) != 0 ]; then rm -r "$d" || fail "$1" "$n" remove; fi
    done
    echo "$n" >"/mnt/rounds.$1"
}
echo unlinked >/mnt/unlinked
exec 4<>/mnt/unlinked
rm /mnt/unlinked
worker 1 & first=$!
worker 2 & second=$!
touch /mnt/working
status=0
wait $first || status=1
wait $second || status=1
[ "$(cat <&4)" = unlinked ] || { echo "the unlinked file is lost"; status=1; }
exit $status
SCRIPT
}

# Waits until the log has so many lines of this kind; fails if the server ends, or on timeout.
logged() {
    local deadline=$((SECONDS + 30))
    until (($(grep -c "$1" "$logs/server.log" || true) >= $2)); do
        kill -0 "$server_pid" 2>/dev/null || { echo "the server has ended"; return 1; }
        ((SECONDS < deadline)) || { echo "no such line: $1"; return 1; }
        sleep 0.005
    done
}

kill_it() {
    local n child
    for ((n = 1; n <= kills; n++)); do
        sleep "$every"
        child=$(pgrep -P "$server_pid") || { echo "no process serves"; return 1; }
        kill -KILL "$child"
        logged '\] serving again, after' "$n" || return 1
    done
}

upgrade_it() {
    local n
    for ((n = 1; n <= upgrades; n++)); do
        sleep "$every"
        "$program" upgrade --pid "$server_pid" >>"$logs/upgrade.log" || return 1
    done
}

# Checks that the guest still works: its logs grow.
still_works() {
    local before deadline=$((SECONDS + 60))
    before=$(stat -c %s "$work/share/log.1" "$work/share/log.2" | paste -sd+ | bc)
    until (($(stat -c %s "$work/share/log.1" "$work/share/log.2" | paste -sd+ | bc) > before)); do
        ((SECONDS < deadline)) || { echo "the guest makes no progress"; return 1; }
        sleep 0.05
    done
}

# Checks that each line was appended once, in order, and that the remaining directories exist.
all_is_there() {
    local w rounds
    for w in 1 2; do
        rounds=$(cat "$work/share/rounds.$w")
        cmp <(seq 1 "$rounds") "$work/share/log.$w" || return 1
        local there=0 n
        for ((n = 4; n <= rounds; n += 4)); do
            [[ $(cat "$work/share/work.$w.$n/c") == "$n" ]] || return 1
            there=$((there + 1))
        done
        (($(find "$work/share" -maxdepth 1 -name "work.$w.*" | wc -l) == there)) || return 1
        echo "$rounds rounds" >>"$logs/rounds"
    done
}

# Summarises numbers, one a line, as median, 99th percentile and maximum.
figures() {
    sort -n | awk -v what="$1" '{ v[NR] = $1 }
        function rank(p) { r = int(NR * p + 0.999999); return v[r < 1 ? 1 : r] }
        END { if (NR) printf "pause of %d %s: p50 %.1f ms, p99 %.1f ms, longest %.1f ms\n",
            NR, what, rank(0.5), rank(0.99), v[NR] }'
}

main() {
    parse "$@"
    "$here/setup.sh"
    "$here/initramfs.sh" "$kernel" >/dev/null
    work=$(mktemp -d "${TMPDIR:-/tmp}/ringfsd-upgrade.XXXXXX")
    trap suite_cleanup EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    logs=${logs:-$work/logs}
    mkdir -p "$logs" "$work/run" "$work/share"
    : >"$logs/rounds"
    guest_script >"$work/script"
    server_start "$server" "$work/run/socket" "$work/share" "$logs/server.log"
    server_wait "$work/run/socket" 20 "$server_pid" || {
        cat "$logs/server.log"
        exit 1
    }
    "$here/run.sh" --socket "$work/run/socket" --kernel "$kernel" --queues "$queues" --timeout 1200 \
        --log-dir "$logs/vm" -- "$work/script" >"$logs/guest" 2>&1 &
    guest=$!
    local deadline=$((SECONDS + 180))
    until [[ -e $work/share/working ]]; do
        kill -0 "$guest" 2>/dev/null && ((SECONDS < deadline)) || {
            cat "$logs/guest"
            exit 1
        }
        sleep 0.1
    done
    step "killed_${kills}_times" kill_it
    step guest_works_after_the_kills still_works
    step "upgraded_${upgrades}_times" upgrade_it
    step guest_works_after_the_upgrades still_works
    local status=0
    touch "$work/share/stop"
    wait "$guest" || status=$?
    guest=''
    step guest_has_met_no_error bash -c "(($status == 0)) || { tail -n 5 $(printf %q "$logs/guest"); false; }"
    step all_is_there_once all_is_there
    step kernel_has_no_complaint bash -c "! grep -hE 'BUG:|WARNING:|Call Trace|blocked for more' $(printf %q "$logs/vm/console.log")"
    step server_has_not_panicked bash -c "! grep 'panicked at' $(printf %q "$logs/server.log")"
    paste -sd' ' "$logs/rounds"
    sed -n 's/.*\] serving again, after \([0-9.]*\) ms.*/\1/p' "$logs/server.log" | figures kills
    sed -n 's/.*guest waited for \([0-9.]*\) ms.*/\1/p' "$logs/upgrade.log" | figures upgrades
    ((failed == 0)) || tail -n 20 "$logs/server.log"
    report
}

main "$@"
