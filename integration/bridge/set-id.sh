#!/usr/bin/env bash
# Programs that have the set-user-ID or set-group-ID bit, and are changed by an ordinary user: the guest
# must not run them with the rights that they have lost, whatever it has cached. Each change is made on
# the host's file system, too, and must have the same effect there. Options: those of with.sh.
#
# Linux refreshes a cached mode when it reads a file that it has written, unless the data aren't cached:
# `--server-arg --cache=metadata` is the strictest.
# shellcheck disable=SC2016 # the steps are expanded by the shells that run them
set -euo pipefail
# shellcheck source=suite.sh
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"
own=''
on_mount "$@"

# The users that change a program and run it.
writer=1000 runner=1001
as() { setpriv --reuid "$1" --regid "$1" --clear-groups -- "${@:2}"; }

# program DIR MODE: makes a program of root's that prints its effective user and group. It was written
# by root, and its attributes are known to the kernel.
program() {
    rm -f "$1/id"
    cp "$(command -v id)" "$1/id"
    # What is added to a program doesn't change it.
    head -c 20000 /dev/zero >>"$1/id"
    chmod "$2" "$1/id"
    stat "$1/id" >/dev/null
}

# runs DIR OPTION: prints the effective user (-u) or group (-g) of the program. It is executed without
# another system call on it before, as each refreshes what the kernel knows of it.
runs() { as "$runner" "$1/id" "$2"; }

# changed DIR MODE WHO CHANGE: prints whose rights the program has before and after a change, then its
# mode.
changed() {
    program "$1" "$2"
    runs "$1" "$3"
    as "$writer" env FILE="$1/id" bash -euc "$4"
    runs "$1" "$3"
    stat --format %a "$1/id"
}

# same MODE WHO CHANGE: makes a change on both file systems. The program must have root's rights before.
same() {
    local here there
    there=$(changed "$PLAIN" "$@")
    here=$(changed "$MNT" "$@")
    printf 'on the host: %s\non the mount: %s\n' "${there//$'\n'/ }" "${here//$'\n'/ }"
    [[ ${here%%$'\n'*} == 0 && $here == "$there" && $(stat --format %a "$SHARE/id") == "${here##*$'\n'}" ]]
}
export writer runner
export -f as program runs changed same

chmod 755 "$MNT" "$PLAIN"
for bits in '4777 -u' '2777 -g'; do
    read -r mode who <<<"$bits"
    # change NAME COMMANDS: does it to $FILE.
    change() { check "$mode: $1" 30 bash -euc 'same "$@"' _ "$mode" "$who" "$2"; }
    change 'appended to' 'echo more >>"$FILE"'
    change 'overwritten' 'dd if="$FILE" of="$FILE" bs=1 count=1 conv=notrunc status=none'
    change 'overwritten with O_DIRECT' \
        'dd if="$FILE" of="$FILE" bs=4096 count=1 conv=notrunc oflag=direct status=none'
    change 'written and synced' 'dd if=/dev/zero bs=1 count=1 status=none oflag=append conv=notrunc,fsync of="$FILE"'
    change 'shortened' 'truncate --size=-1 "$FILE"'
    change 'lengthened' 'truncate --size=+5000 "$FILE"'
    change 'allocated beyond its end' \
        'fallocate --offset "$(stat --format %s "$FILE")" --length 10 "$FILE"'
    change 'copied into' 'perl -e "
        open(my \$file, \"+<\", \$ENV{FILE}) or die;
        my (\$from, \$to) = (pack(\"q\", 0), pack(\"q\", -s \$file));
        syscall(326, fileno(\$file), \$from, fileno(\$file), \$to, 1, 0) == 1 or die \"copy: \$!\";
        "'
    change 'read only' 'cat "$FILE" >/dev/null'
done
summary
