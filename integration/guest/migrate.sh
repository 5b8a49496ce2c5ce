#!/usr/bin/env bash
# Migrates a virtual machine to and fro between two QEMUs of this host, each with a server of its own
# on the same share, while a load in the guest verifies everything that it reads (guest-suite --load).
# Also cancels a migration, and makes a destination refuse one: the source must continue.
#
#   migrate.sh [OPTION...]
#
#   --times N             number of migrations (3)
#   --mode MODE           find-paths or file-handles (find-paths)
#   --between SECONDS     how long the load runs between two migrations (2)
#   --server COMMAND      starts a server; %SOCKET% and %SHARE% stand for the paths
#   --ordinary-user       run the servers as an ordinary user
#   --kernel 6.1|6.12     the guest's kernel (6.12)
#   --queues N            request queues (1)
#   --memory SIZE         the guest's memory (256M)
#   --timeout SECONDS     limit for everything (300, and 30 for each migration)
#   --log-dir DIR         keep the logs there
#
# Prints a line for each check. Exit status 1 if one failed.
#
# Environment: RINGFSD_GUEST_CACHE, RINGFSD_GUEST_ACCEL (see setup.sh, accel.sh).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
cache=${RINGFSD_GUEST_CACHE:-$repo/target/guest}
# shellcheck source=options.sh
source "$here/options.sh"
# shellcheck source=server.sh
source "$here/server.sh"
# shellcheck source=machine.sh
source "$here/machine.sh"
# shellcheck source=report.sh
source "$here/report.sh"

times=3 mode=find-paths between=2 server='' kernel=6.12 queues=1 memory=256M limit='' logs=''
ordinary=false
work='' clock=''
# By number of the machine: process and descriptors of QMP; by number of the server: its process.
vmm=() qmp_in=() qmp_out=() servers=()

parse() {
    takes=(
        [--times]=times [--mode]=mode [--between]=between [--server]=server [--kernel]=kernel
        [--queues]=queues [--memory]=memory [--timeout]=limit [--log-dir]=logs
    )
    sets=([--ordinary-user]=ordinary=true)
    read_options "$@"
    [[ $times =~ ^[1-9][0-9]*$ ]] || usage "--times $times is not a number of migrations"
    limit=${limit:-$((300 + 30 * times))}
    if [[ -z $server ]]; then
        server_default "$repo" "$queues"
        server+=" --posix-locks --flock --migration-mode $mode"
        [[ $mode != file-handles ]] || server+=" --inode-file-handles prefer"
    fi
    if $ordinary; then
        [[ $(id -u) == 0 ]] || usage "--ordinary-user needs root, to become that user"
    fi
}

# shellcheck disable=SC2317 # called by the trap
cleanup() {
    local status=$? process
    trap - EXIT
    trap '' HUP INT TERM PIPE
    for process in "${vmm[@]}" $clock; do
        kill -KILL "$process" 2>/dev/null || true
        wait "$process" 2>/dev/null || true
    done
    for process in "${servers[@]}"; do server_stop "$process"; done
    if [[ -n $work ]]; then rm -rf "$work"; fi
    exit "$status"
}

# Reports a failure that ends the run.
give_up() {
    failed "$@"
    local log
    for log in "$logs"/*.log; do
        [[ -s $log ]] || continue
        printf -- '--- %s, the last lines\n' "${log##*/}"
        tail -n 25 "$log" | tr -d '\r\033'
    done
    report || exit 1
}

start_server() {
    local number=$1 command=$2 socket=$work/run/socket.$1
    if $ordinary; then
        command="exec setpriv --reuid daemon --regid daemon --clear-groups ${command//"$repo/target/release/ringfsd"/"$work/ringfsd"}"
    fi
    server_start "$command" "$socket" "${3:-$work/share}" "$logs/server.$number.log"
    servers[number]=$server_pid
    server_wait "$socket" 20 "$server_pid" || give_up server_listens "$command"
}

# start_machine NUMBER SERVER [ARGUMENT...]: QEMU, paused if it is to take a migration.
start_machine() {
    local number=$1 socket=$work/run/socket.$2 machine pipe
    shift 2
    for pipe in qmp control; do mkfifo "$work/$pipe.$number".{in,out}; done
    machine_arguments 2 "$memory" "$cache" "$kernel" "$work/initramfs" "$logs/console.$number.log" ||
        give_up "machine_${number}_starts" "it is not known what can run a guest"
    # Each device has a name, so that the machines match.
    setpriv --pdeathsig KILL qemu-system-x86_64 "${machine[@]}" -no-reboot \
        -chardev "pipe,id=control,path=$work/control.$number" -device virtserialport,chardev=control,name=control \
        -chardev "file,id=stdout,path=$logs/stdout,append=on" -device virtserialport,chardev=stdout,name=stdout \
        -chardev "file,id=stderr,path=$logs/stderr,append=on" -device virtserialport,chardev=stderr,name=stderr \
        -chardev "pipe,id=qmp,path=$work/qmp.$number" -mon chardev=qmp,mode=control \
        -chardev "socket,id=fs,path=$socket" \
        -device "vhost-user-fs-pci,chardev=fs,tag=share,num-request-queues=$queues" \
        "$@" </dev/null >"$logs/vmm.$number.log" 2>&1 &
    vmm[number]=$!
    exec {qmp_in[number]}<>"$work/qmp.$number.in" {qmp_out[number]}<>"$work/qmp.$number.out"
    qmp "$number" qmp_capabilities
    # The source is told of a destination that refuses, and continues.
    qmp "$number" migrate-set-capabilities '{"capabilities": [{"capability": "return-path", "state": true}]}'
}

# qmp MACHINE COMMAND [ARGUMENTS]: sets qmp_answer to the reply; fails on an error.
qmp_answer=''
qmp() {
    local number=$1 line
    printf '{"execute": "%s"%s}\n' "$2" "${3:+, \"arguments\": $3}" >&"${qmp_in[number]}"
    while IFS= read -r -t 30 -u "${qmp_out[number]}" line; do
        printf '%s: %s\n' "$2" "$line" >>"$logs/qmp.$number"
        case $line in
            '{"return"'*)
                qmp_answer=$line
                return 0
                ;;
            '{"error"'*)
                qmp_answer=$line
                return 1
                ;;
        esac
    done
    qmp_answer="machine $number says nothing"
    return 1
}

# end_machine NUMBER: quits it, as a management program does with a machine that was migrated away.
end_machine() {
    local number=$1
    # A machine whose migration has failed may have ended by itself.
    if kill -0 "${vmm[number]}" 2>/dev/null; then
        printf '{"execute": "quit"}\n' >&"${qmp_in[number]}"
    fi
    wait "${vmm[number]}" 2>/dev/null || true
    exec {qmp_in[number]}>&- {qmp_out[number]}>&-
    unset "vmm[number]" "qmp_in[number]" "qmp_out[number]"
}

# settled MACHINE: waits for the end of its migration; sets migration to the outcome.
migration='' downtime=''
settled() {
    local deadline=$((SECONDS + 60))
    migration='' downtime=''
    while ((SECONDS < deadline)); do
        qmp "$1" query-migrate || return 1
        [[ $qmp_answer =~ \"status\":\ \"([a-z-]+)\" ]] && migration=${BASH_REMATCH[1]}
        case $migration in
            completed)
                [[ $qmp_answer =~ \"downtime\":\ ([0-9]+) ]] && downtime=${BASH_REMATCH[1]}
                return 0
                ;;
            failed | cancelled) return 0 ;;
        esac
        sleep 0.05
    done
    return 1
}

# has_status MACHINE STATUS: waits until a machine is in this state.
has_status() {
    local deadline=$((SECONDS + 20))
    while ((SECONDS < deadline)); do
        qmp "$1" query-status || return 1
        [[ $qmp_answer != *"\"status\": \"$2\""* ]] || return 0
        sleep 0.05
    done
    return 1
}

# Prints the rounds that the load has last reported, all parts together; nothing if it hasn't started.
rounds() {
    awk '/^rounds / { sum = 0; gsub(/[^0-9 ]/, ""); for (i = 1; i <= NF; i++) sum += $i }
        END { print sum }' "$logs/stdout"
}

# makes_progress: waits until the load has made progress; fails if the load has.
makes_progress() {
    local before deadline=$((SECONDS + 60)) now
    before=$(rounds)
    while ((SECONDS < deadline)); do
        if grep -q '^FAILED' "$logs/stdout"; then return 1; fi
        now=$(rounds)
        if ((${now:-0} > ${before:-0} + 20)); then return 0; fi
        sleep 0.2
    done
    return 1
}

ended() { tail -n 3 "$logs/stdout" "$logs/stderr" 2>/dev/null | tr '\n' ' '; }

# migrate FROM TO: starts a migration on the source.
migrate() {
    qmp "$1" migrate "{\"uri\": \"unix:$work/incoming.$2\"}"
}

downtimes=()
main() {
    parse "$@"
    "$here/setup.sh"
    work=$(mktemp -d "${TMPDIR:-/tmp}/ringfsd-migrate.XXXXXX")
    trap cleanup EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    chmod 755 "$work"
    logs=${logs:-$work/logs}
    mkdir -p "$logs" "$work/run" "$work/share/load" "$work/empty" "$work/pack/run"
    : >"$logs/stdout" >"$logs/stderr"
    if $ordinary; then
        cp "$repo/target/release/ringfsd" "$work/ringfsd"
        chown -R daemon:daemon "$work/run" "$work/share" "$work/empty"
    fi
    # Ends what still waits.
    (sleep "$limit" && kill -TERM $$) &
    clock=$!

    local common now=0 next number
    common=$("$here/initramfs.sh" "$kernel")
    printf 'TAG=share\nMOUNT=yes\nTIMEOUT=%s\n' "$limit" >"$work/pack/run/guest.conf"
    printf '#!/bin/sh\nexec guest-suite --load /mnt/load /mnt/stop\n' >"$work/pack/run/script"
    chmod 755 "$work/pack/run/script"
    (cd "$work/pack" && find . | cpio --quiet -o -H newc -R 0:0) | cat "$common" - >"$work/initramfs"

    start_server 0 "$server"
    start_server 1 "$server"
    start_machine 0 0
    echo 1 >"$work/control.0.in"
    local deadline=$((SECONDS + 120))
    until [[ $(rounds) -gt 0 ]]; do
        ((SECONDS < deadline)) || give_up the_guest_starts_its_load "not within two minutes"
        kill -0 "${vmm[0]}" 2>/dev/null || give_up the_guest_starts_its_load "$(ended)"
        sleep 0.2
    done
    ok the_guest_starts_its_load

    # Cancelled while memory is being copied.
    start_machine 1 1 -incoming "unix:$work/incoming.1"
    qmp 0 migrate-set-parameters '{"max-bandwidth": 1000000}'
    migrate 0 1 || give_up migration_begins "$qmp_answer"
    sleep 1
    qmp 0 migrate_cancel
    settled 0 || give_up migration_is_broken_off "$qmp_answer"
    # QEMU 10 reports one or the other, depending on when the destination hangs up.
    if [[ $migration == cancelled || $migration == failed ]] && makes_progress; then
        ok source_continues_after_a_cancelled_migration
    else
        failed source_continues_after_a_cancelled_migration "$migration; $(ended)"
    fi
    end_machine 1
    qmp 0 migrate-set-parameters '{"max-bandwidth": 10000000000}'

    # To a share without the files.
    start_server 2 "$server" "$work/empty"
    start_machine 2 2 -incoming "unix:$work/incoming.2"
    migrate 0 2 || give_up migration_begins "$qmp_answer"
    settled 0 || give_up migration_is_refused "$qmp_answer"
    if [[ $migration == failed ]] && has_status 0 running && makes_progress; then
        ok source_continues_after_a_refused_migration
    else
        failed source_continues_after_a_refused_migration "$migration; $(ended)"
    fi
    if kill -0 "${servers[2]}" 2>/dev/null; then
        ok destination_that_refused_lives
    else
        failed destination_that_refused_lives "$(tail -n 3 "$logs/server.2.log" | tr '\n' ' ')"
    fi
    end_machine 2
    server_stop "${servers[2]}"
    unset 'servers[2]'

    for ((number = 1; number <= times; number++)); do
        next=$((number + 2))
        start_machine "$next" $((number % 2)) -incoming "unix:$work/incoming.$next"
        migrate "$now" "$next" || give_up "migration_$number" "$qmp_answer"
        settled "$now" || give_up "migration_$number" "$qmp_answer"
        [[ $migration == completed ]] || give_up "migration_$number" "$migration: $qmp_answer"
        has_status "$next" running || give_up "migration_$number" "$qmp_answer"
        # The source's server learns here that its machine is gone.
        end_machine "$now"
        now=$next
        downtimes+=("$downtime")
        if makes_progress; then
            ok "migration_$number [$downtime ms without the guest running]"
        else
            give_up "migration_$number" "the load does not go on: $(ended)"
        fi
        sleep "$between"
    done

    touch "$work/share/stop"
    local word='' rest=''
    exec {from}<>"$work/control.$now.out" {to}<>"$work/control.$now.in"
    read -r -t 60 -u "$from" word rest || give_up the_load_ends_well "the guest says nothing"
    if [[ "$word $rest" == 'exit 0' ]]; then
        ok the_load_ends_well
    else
        failed the_load_ends_well "$word $rest"
    fi
    grep -E '^(ok|FAILED)' "$logs/stdout" | sed 's/^/  /'
    echo poweroff >&"$to"
    wait "${vmm[now]}" || true
    unset "vmm[now]"
    if grep -hE 'BUG:|WARNING:|Call Trace|Oops|blocked for more than|Kernel panic|I/O error' "$logs"/console.*.log; then
        failed kernel_has_no_complaint "see above"
    else
        ok kernel_has_no_complaint
    fi
    if grep -H 'panicked at' "$logs"/server.*.log; then
        failed servers_have_not_panicked "see above"
    else
        ok servers_have_not_panicked
    fi
    for number in "${!servers[@]}"; do
        server_stop "${servers[number]}"
        if ((server_status == 0 || server_status == 143)); then
            ok "server_${number}_ends_with_a_good_status"
        else
            failed "server_${number}_ends_with_a_good_status" "$server_status"
        fi
        unset "servers[number]"
    done
    if find "$work/share" -name '.ringfsd*' | grep .; then
        failed nothing_is_left_in_the_share "see above"
    else
        ok nothing_is_left_in_the_share
    fi
    printf '%s\n' "${downtimes[@]}" | sort -n | awk '{ all[NR] = $1 } END {
        printf "without the guest running: %d ms at the median, %d ms at most, of %d\n", all[int((NR + 1) / 2)], all[NR], NR }'
    report
}

main "$@"
