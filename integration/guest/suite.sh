#!/usr/bin/env bash
# Tests a server with real guests: guest-suite in a guest; trees that are read and written there,
# compared with what the host sees; unmount and mount; a hard reset of the guest in the middle of
# work; a second machine on the same server after the first has gone; the server's own end. Prints a
# line for each step, and for each check of guest-suite that failed, and at the end "N passed, N
# failed", which counts both. Exit status 1 if anything failed, 2 for wrong options.
#
#   suite.sh [OPTION...]
#
#   --runtime NAME      given to the server as --runtime NAME
#   --queues N          request queues (1); the guest gets as many CPUs, two at least
#   --kernel 6.1|6.12   the guest's kernel (6.12)
#   --sandbox KIND      given to the server as --sandbox KIND
#   --ordinary-user     run the server as the user daemon, with a range of ids of its own. The
#                       namespace sandbox maps these itself; with the others a user namespace around
#                       the server has them, as in a rootless container
#   --server COMMAND    starts the server, as for run.sh
#   --full              guest-suite with its full sizes: minutes instead of seconds
#   --timeout SECONDS   limit for each machine (300; with --full 1200)
#   --verbose           print a line for each check of guest-suite that passed, too
#   --log-dir DIR       keep all logs there
#
# Environment: RINGFSD_GUEST_CACHE (see setup.sh).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
cache=${RINGFSD_GUEST_CACHE:-$repo/target/guest}
guest_suite=$cache/suite/x86_64-unknown-linux-gnu/release/guest-suite
# shellcheck source=options.sh
source "$here/options.sh"
# shellcheck source=server.sh
source "$here/server.sh"
# shellcheck source=report.sh
source "$here/report.sh"

runtime='' server='' sandbox='' ordinary=false queues=1 kernel=6.12 quick=--quick verbose=false logs='' limit=''
work='' share='' server_pid='' server_status='' guest=''
declare -A value=()

# The steps that each machine must report.
# shellcheck disable=SC2034 # used by name
first=(
    guest_suite
    ten_thousand_entries_made_by_the_host_are_listed_once
    every_request_queue_is_used
    overlay_on_the_share_works
    tree_is_copied_by_the_guest
    tree_is_removed_by_the_guest
    mount_again_after_umount
    file_synced_before_the_reset_is_there
    files_written_at_the_reset_are_whole
    file_held_at_the_reset_is_written
    guest_suite_after_the_reset
)
# shellcheck disable=SC2034 # used by name
second=(
    file_of_the_first_machine_is_there
    guest_suite_in_the_second_machine
    file_is_written_by_the_second_machine
)

parse() {
    takes=(
        [--sandbox]=sandbox [--runtime]=runtime [--queues]=queues [--kernel]=kernel
        [--server]=server [--log-dir]=logs [--timeout]=limit
    )
    sets=([--full]=quick= [--verbose]=verbose=true [--ordinary-user]=ordinary=true)
    read_options "$@"
    [[ $queues =~ ^[1-9][0-9]*$ ]] || usage "--queues $queues is not a number of queues"
    [[ -n $limit ]] || limit=$([[ -n $quick ]] && echo 300 || echo 1200)
    [[ $limit =~ ^[1-9][0-9]*$ ]] || usage "--timeout $limit is not a number of seconds"
    if $ordinary; then
        [[ $(id -u) == 0 ]] || usage "--ordinary-user needs root, to become that user"
        [[ -z $server ]] || usage "--ordinary-user and --server exclude each other"
    fi
    [[ -n $server ]] || server_default "$repo" "$queues"
    [[ -z $runtime ]] || printf -v server '%s --runtime %q' "$server" "$runtime"
    [[ -z $sandbox ]] || printf -v server '%s --sandbox %q' "$server" "$sandbox"
}

# Makes an ordinary user start the server and own the share. newuidmap finds the user's ids in files
# that replace the host's in the server's mount namespace only.
make_ordinary() {
    local user
    user=$(id -u daemon):$(id -g daemon)
    cp "$repo/target/release/ringfsd" "$work/ringfsd"
    server=${server//"$repo/target/release/ringfsd"/"$work/ringfsd"}
    echo 'daemon:100000:65535' >"$work/subids"
    touch /etc/subuid /etc/subgid
    chown "$user" "$work/run"
    chown -hR "$user" "$share"
    if [[ ${sandbox:-namespace} == namespace ]]; then
        server+=" --uid-map :0:${user%:*}:1: --uid-map :1:100000:65535:"
        server+=" --gid-map :0:${user#*:}:1: --gid-map :1:100000:65535:"
    else
        server="unshare --map-root-user --map-users=100000,1,65535 --map-groups=100000,1,65535 $server"
    fi
    server="exec setpriv --reuid ${user%:*} --regid ${user#*:} --clear-groups $server"
    server="mount --bind $work/subids /etc/subuid; mount --bind $work/subids /etc/subgid; $server"
    printf -v server 'exec unshare --mount bash -ec %q' "$server"
    quick="${quick:+$quick }--user-namespace"
}

# Counts a guest's reports and passes on the lines to show.
block='' block_passed=0 block_failed=0
take() {
    local line=$1
    case $line in
        'step ok '*) ok "${line#step ok }" ;;
        'step FAILED '*)
            line=${line#step FAILED }
            failed "${line%%:*}" "${line#*: }"
            ;;
        'value '*)
            read -r _ line rest <<<"$line"
            value[$line]=$rest
            ;;
        'checks '*) block=${line#checks } block_passed=0 block_failed=0 ;;
        *' passed, '*' failed')
            if ((block_failed == 0)); then
                ok "$block ($block_passed checks)"
            else
                failed "$block" "$block_failed of $((block_passed + block_failed)) checks"
            fi
            ;;
        'ok '*)
            block_passed=$((block_passed + 1)) passed=$((passed + 1))
            if $verbose; then printf '  %s\n' "$line"; fi
            ;;
        'FAILED '*)
            block_failed=$((block_failed + 1)) failed=$((failed + 1))
            printf '  %s\n' "$line"
            ;;
        *) printf '  %s\n' "$line" ;;
    esac
}

# The script of a boot: settings, then the common text.
script_of() {
    printf '#!/bin/sh\nPHASE=%s QUICK=%q QUEUES=%s\n' "$1" "$quick" "$queues"
    cat "$here/steps.sh"
}

# machine NAME ARGUMENTS...: runs a guest on the server; every step in the array of that name that
# it does not report has failed.
machine() {
    local name=$1 line start='' last=nothing from status=0 gone=0
    local -n expected=$1
    shift
    exec {from}< <(exec "$here/run.sh" --socket "$work/run/socket" --kernel "$kernel" \
        --queues "$queues" --cpus "$((queues > 2 ? queues : 2))" --timeout "$limit" \
        --log-dir "$logs/$name" "$@" 2>"$logs/$name.run")
    guest=$!
    while true; do
        status=0
        IFS= read -r -t 1 -u "$from" line || status=$?
        if ((status == 0)); then
            last=$start$line start=''
            take "$last"
        elif ((status <= 128)); then
            break
        else
            # The second is over, with a part of a line at most.
            start+=$line
            if ! kill -0 "$server_pid" 2>/dev/null && ((++gone == 10)); then
                # A guest without its server would only wait for its time limit.
                kill -TERM "$guest"
            fi
        fi
    done
    exec {from}<&-
    status=0
    wait "$guest" || status=$?
    guest=''
    local why="the ${name} machine ended before, with $status"
    ((gone == 0)) || why+=', after the server'
    why+=" (last heard: $last)"
    for line in "${expected[@]}"; do
        [[ -n ${seen[$line]:-} ]] || failed "$line" "$why"
    done
    if ((status != 0)); then
        failed "the_${name}_machine_ends_well" "status $status"
        cat "$logs/$name.run"
    else
        ok "the_${name}_machine_ends_well"
    fi
}

make_share() {
    mkdir "$share" "$share"/{doc,part,many,out}
    chmod 755 "$share"
    # Real files: many small ones, of many packages, with links among them.
    (
        cd / && { find usr/share/doc usr/include usr/share -xdev \
            \( -type f -size -33k -o -type l \) -print0 2>/dev/null || true; } |
            head -z -n 3000 | cpio --null --quiet -pdm "$share/doc"
    )
    (
        cd "$share/doc" && { find . -type f -print0 || true; } | head -z -n 200 |
            cpio --null --quiet -pdm "$share/part"
    )
    cp -a "$share/part" "$share/removed"
    (cd "$share/many" && seq -f 'entry-%05.0f' 1 10000 | xargs touch)
}

# A tree's digest, with owners as the server sees them.
digest() {
    local view=()
    ! $ordinary || view=(nsenter --user --preserve-credentials --target "$server_pid")
    "${view[@]}" "$guest_suite" --digest "$share/$1" >"$work/digest"
    sha256sum <"$work/digest" | cut -c 1-64
}

# same NAME FOLDER: checks that the guest has seen in a folder what the host sees.
same() {
    local here_is
    [[ -n ${value[$1]:-} ]] || {
        echo "the guest did not get so far"
        return 1
    }
    here_is=$(digest "$2")
    if [[ ${value[$1]} != "$here_is" ]]; then
        cp "$work/digest" "$logs/$1.host"
        cp "$share/out/$1" "$logs/$1.guest" || true
        diff "$logs/$1.host" "$logs/$1.guest" | head -n 5
        return 1
    fi
}

not_there() {
    [[ ! -e $1 ]] || {
        find "$1" | head -n 3
        return 1
    }
}

complaints() {
    ! grep -hE 'BUG:|WARNING:|Call Trace|Oops|blocked for more than|Kernel panic|I/O error' \
        "$logs"/*/console.log
}

# Accepts an exit status of 0, and termination by the signal that was sent.
server_ends() {
    kill -0 "$server_pid" 2>/dev/null || {
        echo "it has ended already"
        return 1
    }
    kill -TERM "$server_pid"
    local tries
    for ((tries = 0; tries < 250; tries++)); do
        kill -0 "$server_pid" 2>/dev/null || return 0
        sleep 0.02
    done
    echo "it does not end within 5 seconds"
    return 1
}

good_status() {
    echo "it ended with $server_status"
    ((server_status == 0 || server_status == 143))
}

main() {
    parse "$@"
    "$here/setup.sh"
    [[ -d $cache/kernels/$kernel ]] || usage "there is no kernel $kernel"
    "$here/initramfs.sh" "$kernel" >/dev/null
    work=$(mktemp -d "${TMPDIR:-/tmp}/ringfsd-suite.XXXXXX")
    trap suite_cleanup EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    chmod 755 "$work"
    logs=${logs:-$work/logs} share=$work/share
    mkdir -p "$logs"/{first,second} "$work/run"
    make_share
    if $ordinary; then make_ordinary; fi
    script_of first >"$work/first"
    script_of after_reset >"$work/after_reset"
    script_of second_machine >"$work/second"

    server_start "$server" "$work/run/socket" "$share" "$logs/server.log"
    if ! server_wait "$work/run/socket" 20 "$server_pid"; then
        failed server_listens "$server"
        cat "$logs/server.log"
    else
        ok server_listens
        machine first --after-reset "$work/after_reset" -- "$work/first"
        step doc_as_read_by_the_guest same doc_as_read_by_the_guest doc
        step tree_as_written_by_the_guest same tree_as_written_by_the_guest written
        step tree_as_read_after_the_reset same tree_as_read_after_the_reset written
        step tree_written_by_the_guest_is_the_one_it_read diff -r "$share/part" "$share/written"
        step tree_removed_by_the_guest_is_gone not_there "$share/removed"
        machine second -- "$work/second"
        step part_as_read_by_the_second_machine same part_as_read_by_the_second_machine part
        step file_of_the_second_machine_is_here grep -qx second "$share/out/second"
        step kernels_have_no_complaint complaints
        step server_ends_when_asked_to server_ends
        server_stop "$server_pid"
        server_pid=''
        step server_ends_with_a_good_status good_status
        step server_has_not_panicked bash -c "! grep 'panicked at' $(printf %q "$logs/server.log")"
        if ((failed > 0)); then
            printf -- '--- server.log, the last lines\n'
            tail -n 20 "$logs/server.log"
        fi
    fi
    report
}

main "$@"
