#!/usr/bin/env bash
# Starts a server, boots a guest on it, mounts the share at /mnt, runs a script in the guest, and
# returns the script's stdout, stderr and exit status as its own.
#
#   run.sh [OPTION...] -- SCRIPT
#
# SCRIPT is a file (run by its #! line, which must name something the guest has) or shell text for
# busybox sh. In the guest it finds busybox, guest-suite, $TAG and $BOOT.
#
#   --share DIR           the folder to serve (a new, empty one)
#   --server COMMAND      starts the server; %SOCKET% and %SHARE% stand for the paths
#                         (target/release/ringfsd --socket %SOCKET% --shared-dir %SHARE%, and
#                         --request-queues N if there is more than one)
#   --socket PATH         use the server that listens there instead of starting one
#   --kernel 6.1|6.12     the guest's kernel (6.12)
#   --queues N            request queues (1)
#   --queue-size N        entries of each queue (QEMU's default)
#   --cpus N              the guest's CPUs (2)
#   --memory SIZE         the guest's memory (1G)
#   --tag TAG             the tag (share)
#   --no-mount            do not mount the share
#   --after-reset SCRIPT  reset the guest when the first script has ended with 0, or by the first
#                         script's own `reboot -f`; then run this one
#   --timeout SECONDS     limit for everything (120)
#   --log-dir DIR         keep console.log, server.log, vmm.log, stdout, stderr there
#   --qemu-arg ARG        one more argument for QEMU; may be given again
#   --quiet               do not show the logs of a failure
#
# Exit status: the script's own; 124 on timeout; 125 if this script, the server, the VMM or the
# guest's kernel failed; 2 for wrong options. Unless it is 0, the logs are shown on stderr.
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

share='' socket='' server='' kernel=6.12 queues=1 queue_size='' cpus=2 memory=1G tag=share mount=yes
script='' after_reset='' limit=120 logs='' quiet=false
qemu_args=()

say() { printf 'run: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 125
}

parse() {
    takes=(
        [--share]=share [--server]=server [--socket]=socket [--kernel]=kernel [--queues]=queues
        [--queue-size]=queue_size [--cpus]=cpus [--memory]=memory [--tag]=tag
        [--after-reset]=after_reset [--timeout]=limit [--log-dir]=logs [--qemu-arg]=qemu_args+
        [--]=scripts
    )
    sets=([--no-mount]=mount=no [--quiet]=quiet=true)
    local scripts=()
    read_options "$@"
    ((${#scripts[@]} == 1)) || usage "exactly one SCRIPT goes after --, not ${#scripts[@]}"
    script=${scripts[0]}
    [[ -n $script ]] || usage "no script to run"
    local number
    for number in "$queues" "$cpus" "$limit" ${queue_size:+"$queue_size"}; do
        [[ $number =~ ^[1-9][0-9]*$ ]] || usage "$number is not a positive number"
    done
    [[ $memory =~ ^[1-9][0-9]*[MG]$ ]] || usage "--memory is given as 512M or 2G, not $memory"
    [[ -z $share || -d $share ]] || usage "--share $share is not a folder"
    [[ -s $cache/kernels/$kernel/vmlinuz ]] ||
        usage "no kernel $kernel; there are:$(printf ' %s' "$(cd "$cache/kernels" 2>/dev/null && echo *)") (setup.sh fetches them)"
    [[ -n $server ]] || server_default "$repo" "$queues"
    type -P qemu-system-x86_64 >/dev/null || usage "no QEMU: run setup.sh first"
}

work='' server_pid='' server_status='' vmm='' clock='' control='' out='' err=''

# shellcheck disable=SC2317 # called by the trap
cleanup() {
    local status=$?
    trap - EXIT
    trap '' HUP INT TERM PIPE
    local process
    for process in $vmm $control $clock; do
        kill -KILL "$process" 2>/dev/null || true
        wait "$process" 2>/dev/null || true
    done
    if [[ -n $server_pid ]]; then
        server_stop "$server_pid"
        printf '%s\n' "$server_status" >"$logs/server.status"
    fi
    # The rest of the guest's output is passed on. A reader whose pipe was never opened is released by
    # opening it.
    for process in $out $err; do
        : 9<>"$work/stdout" 8<>"$work/stderr"
        wait "$process" 2>/dev/null || true
    done
    if ((status != 0)) && ! $quiet && [[ -n $logs ]]; then show_logs || true; fi
    if [[ -n $work ]]; then rm -rf "$work"; fi
    exit "$status"
}

# shellcheck disable=SC2317 # called by cleanup
show_logs() {
    local log lines=40
    # A guest that timed out has printed on its console where its processes were.
    if ((status == 124)); then lines=200; fi
    for log in vmm server console; do
        [[ -s $logs/$log.log ]] || continue
        printf -- '--- %s.log, the last lines\n' "$log"
        # Without control characters.
        tail -n "$lines" "$logs/$log.log" | tr -d '\r\033'
        printf '\n'
    done >&2
}

# Packs the scripts into an initramfs of their own, appended to the common one.
pack() {
    local common=$1 text=$2 name=$3
    if [[ -f $text ]]; then
        cp "$text" "$work/pack/run/$name"
    else
        printf '%s\n' "$text" >"$work/pack/run/$name"
    fi
    chmod 755 "$work/pack/run/$name"
    (cd "$work/pack" && find . | cpio --quiet -o -H newc -R 0:0) |
        cat "$common" - >"$work/initramfs"
}

# Replies to the guest's init (which documents the protocol) and leaves the verdict in a file.
converse() {
    local boots=0 word rest
    # Opened read-only, so that it ends when the VMM has ended.
    exec 8<"$work/control.out" 9<>"$work/control.in"
    while read -r word rest <&8; do
        case $word in
            boot)
                boots=$((boots + 1))
                if ((boots == 2)) && grep -q 'Kernel panic' "$logs/console.log"; then
                    echo "failed the guest's kernel panicked" >"$work/verdict"
                    return
                elif ((boots > 2)) || { ((boots == 2)) && [[ -z $after_reset ]]; }; then
                    echo "failed the guest was reset, and nothing is to be run after that" >"$work/verdict"
                    return
                fi
                echo "$boots" >&9
                ;;
            exit)
                if [[ $rest == 0 && -n $after_reset && $boots == 1 ]]; then
                    echo reset >&9
                else
                    echo "exit $rest" >"$work/verdict"
                    echo poweroff >&9
                    return
                fi
                ;;
            failed)
                echo "failed $rest" >"$work/verdict"
                return
                ;;
        esac
    done
}

start_server() {
    if [[ -n $socket ]]; then
        # A server in another network namespace isn't listed here.
        server_listens "$socket" || [[ $socket == /proc/*/root/* && -S $socket ]] ||
            fail "no server listens on $socket"
        return
    fi
    socket=$work/socket
    server_start "$server" "$socket" "$share" "$logs/server.log"
    server_wait "$socket" 20 "$server_pid" ||
        fail "the server does not listen: $server"
}

start_vmm() {
    local device=vhost-user-fs-pci,chardev=fs,tag=$tag,num-request-queues=$queues machine reboot=()
    # A comma in a path is doubled for QEMU.
    local pipes=${work//,/,,} server_socket=${socket//,/,,}
    [[ -z $queue_size ]] || device+=,queue-size=$queue_size
    [[ -n $after_reset ]] || reboot=(-no-reboot)
    machine_arguments "$cpus" "$memory" "$cache" "$kernel" "$work/initramfs" "$logs/console.log" ||
        fail "no accelerator can be chosen"
    setpriv --pdeathsig KILL qemu-system-x86_64 "${machine[@]}" "${reboot[@]}" \
        -chardev "pipe,id=control,path=$pipes/control" -device virtserialport,chardev=control,name=control \
        -chardev "file,id=stdout,path=$pipes/stdout" -device virtserialport,chardev=stdout,name=stdout \
        -chardev "file,id=stderr,path=$pipes/stderr" -device virtserialport,chardev=stderr,name=stderr \
        -chardev "socket,id=fs,path=$server_socket" -device "$device" \
        "${qemu_args[@]}" </dev/null >"$logs/vmm.log" 2>&1 &
    vmm=$!
}

# A process that ends because the VMM has ended may be noticed before it.
vmm_ends_too() {
    local tries
    for ((tries = 0; tries < 50; tries++)); do
        kill -0 "$vmm" 2>/dev/null || return 0
        sleep 0.02
    done
    return 1
}

main() {
    parse "$@"
    work=$(mktemp -d "${TMPDIR:-/tmp}/ringfsd-guest.XXXXXX")
    trap cleanup EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    chmod 755 "$work"
    logs=${logs:-$work/log}
    mkdir -p "$logs" "$work/pack/run"
    : >"$logs/console.log"
    if [[ -z $share ]]; then
        share=$work/share
        mkdir "$share"
    fi
    sleep "$limit" &
    clock=$!

    local common
    common=$("$here/initramfs.sh" "$kernel") || fail "the initramfs can't be built"
    printf 'TAG=%q\nMOUNT=%s\nTIMEOUT=%s\n' "$tag" "$mount" "$limit" >"$work/pack/run/guest.conf"
    [[ -z $after_reset ]] || pack "$common" "$after_reset" after-reset
    pack "$common" "$script" script

    start_server
    mkfifo "$work"/{control.in,control.out,stdout,stderr}
    tee -p "$logs/stdout" <"$work/stdout" &
    out=$!
    tee -p "$logs/stderr" <"$work/stderr" >&2 &
    err=$!
    converse &
    control=$!
    start_vmm

    local ended='' status=0
    wait -n -p ended "$control" "$vmm" "$clock" ${server_pid:+"$server_pid"} || status=$?
    if [[ ! -s $work/verdict ]]; then
        if [[ $ended != "$clock" ]] && vmm_ends_too; then ended=$vmm; fi
        case $ended in
            "$clock")
                say "the guest did not end within $limit seconds"
                exit 124
                ;;
            "$vmm")
                if grep -q 'Kernel panic' "$logs/console.log"; then
                    fail "the guest's kernel panicked"
                elif grep -qE 'reboot: Restarting|sysrq: Resetting' "$logs/console.log"; then
                    fail "the guest was reset, and nothing is to be run after that"
                fi
                fail "the VMM ended before the guest's script did"
                ;;
            "${server_pid:-none}") fail "the server ended ($status) while the guest was running" ;;
            *) fail "the guest's control port fell silent" ;;
        esac
    fi
    local verdict rest
    read -r verdict rest <"$work/verdict"
    [[ $verdict == exit ]] || fail "$rest"
    # The guest unmounts and turns itself off.
    wait -n -p ended "$vmm" "$clock" || true
    if [[ $ended != "$vmm" ]]; then
        say "the guest's script ended with $rest, and the guest did not within $limit seconds"
        exit 124
    fi
    exit "$rest"
}

main "$@"
