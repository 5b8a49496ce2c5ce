# shellcheck shell=bash disable=SC2034
# To be sourced: counts what passed and what failed, and prints a line for each.

passed=0 failed=0
# By name: what has been told of.
declare -A seen=()

# ok NAME[ WHAT IS WORTH KNOWING OF IT]
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

# step NAME COMMAND...: what the command says is the reason if it fails.
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

# The closing line; fails if anything has failed.
report() {
    printf '%d passed, %d failed\n' "$passed" "$failed"
    ((failed == 0))
}
