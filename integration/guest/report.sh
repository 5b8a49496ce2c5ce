# shellcheck shell=bash disable=SC2034
# To be sourced: counts what passed and what failed, and prints a line for each.

passed=0 failed=0
# The names that have been reported.
declare -A seen=()

# ok NAME[ REMARK]
ok() {
    passed=$((passed + 1))
    seen[${1%% *}]=1
    printf 'ok %s\n' "$1"
}

# failed NAME REASON
failed() {
    failed=$((failed + 1))
    seen[$1]=1
    printf 'FAILED %s: %s\n' "$1" "$2"
}

# step NAME COMMAND...: runs a command; its output is the reason if it fails.
step() {
    local name=$1 why
    shift
    if why=$("$@" 2>&1); then
        ok "$name"
    else
        why=${why//$'\n'/ }
        failed "$name" "${why:0:400}"
    fi
}

# Prints the closing line; fails if anything has failed.
report() {
    printf '%d passed, %d failed\n' "$passed" "$failed"
    ((failed == 0))
}
