# shellcheck shell=bash disable=SC2034
# To be sourced: starts a server for a guest, waits for its socket, ends it. A server is a process
# group of its own, so that its children end with it; and it ends with the script that started it,
# however that ends.

# server_default REPOSITORY QUEUES: sets server to the command of the repository's own server.
server_default() {
    printf -v server '%q --socket %%SOCKET%% --shared-dir %%SHARE%%' "$1/target/release/ringfsd"
    # One queue is the default.
    (($2 == 1)) || server+=" --request-queues $2"
}

# server_start COMMAND SOCKET SHARE LOG: starts COMMAND, a shell command in which %SOCKET% and %SHARE%
# stand for the two paths. Sets server_pid.
server_start() {
    local command=$1 socket share
    printf -v socket %q "$2"
    printf -v share %q "$3"
    command=${command//%SOCKET%/"$socket"}
    command=${command//%SHARE%/"$share"}
    setsid setpriv --pdeathsig KILL bash -c "$command" </dev/null >"$4" 2>&1 &
    server_pid=$!
}

# Whether a process listens on a unix socket of this path, without connecting to it.
server_listens() {
    [[ -S $1 ]] && awk -v path="$1" '
        $4 == "00010000" && substr($0, length($0) - length(path)) == " " path { found = 1 }
        END { exit !found }' /proc/net/unix
}

# server_wait SOCKET SECONDS [PID]: waits until a process listens on the socket; fails on timeout, and
# at once if the process has ended.
server_wait() {
    local deadline=$((SECONDS + $2))
    until server_listens "$1"; do
        if [[ -n ${3:-} ]] && ! kill -0 "$3" 2>/dev/null; then return 1; fi
        ((SECONDS < deadline)) || return 1
        sleep 0.02
    done
}

# server_stop PID: terminates the server, kills it after five seconds. Sets server_status to its exit
# status.
server_stop() {
    local tries
    kill -TERM -- "-$1" 2>/dev/null || true
    for ((tries = 0; tries < 250; tries++)); do
        kill -0 "$1" 2>/dev/null || break
        sleep 0.02
    done
    kill -KILL -- "-$1" 2>/dev/null || true
    server_status=0
    wait "$1" 2>/dev/null || server_status=$?
}

# Ends the process `guest` and the server `server_pid`, removes the folder `work`, and exits with the
# current status. A suite that starts a server for several guests calls this by its EXIT trap.
# shellcheck disable=SC2154 # the suite sets guest and work
suite_cleanup() {
    local status=$?
    trap - EXIT
    trap '' HUP INT TERM PIPE
    if [[ -n $guest ]]; then
        kill -TERM "$guest" 2>/dev/null || true
        wait "$guest" 2>/dev/null || true
    fi
    if [[ -n $server_pid ]]; then server_stop "$server_pid"; fi
    if [[ -n $work ]]; then rm -rf "$work"; fi
    exit "$status"
}
