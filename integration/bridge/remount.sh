#!/usr/bin/env bash
# Mounts repeatedly on one connection, as a guest does: written data are still there, and file handles
# of inodes that the server remembers from the previous mount are still valid. Options: those of
# with.sh except --server; --times N (20).
# shellcheck disable=SC2016 # the steps are expanded by the shells that run them
set -euo pipefail
# shellcheck source=suite.sh
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"
own='times'
on_mount --stay-connected --server-arg --remember-inodes=1000 "$@"

# handle FILE: prints its file handle in hexadecimal; opened HANDLE: prints the content of its file.
handle() {
    perl -e 'my ($h, $id) = (pack("Ii", 128, 0) . "\0" x 128, pack("i", 0));
        syscall(303, -100, $ARGV[0], $h, $id, 0) == 0 or die "name_to_handle_at: $!\n";
        print unpack("H*", $h)' "$1"
}
opened() {
    perl -e 'open(my $mount, "<", $ENV{MNT}) or die "$ENV{MNT}: $!\n";
        my $fd = syscall(304, fileno($mount), pack("H*", $ARGV[0]), 0);
        $fd >= 0 or die "open_by_handle_at: $!\n";
        open(my $file, "<&=", $fd) or die "$!\n";
        print <$file>' "$1"
}
again() { umount "$MNT" && "$here/again.sh" "$AGAIN" "${1:-}" "$MNT"; }
export -f handle opened again
export here times=${times:-20}

check 'a file is there after each mount' $((times * 5)) bash -euc '
    for ((round = 0; round < times; round++)); do
        echo "$round" >"$MNT/round"
        again
        [[ $(<"$MNT/round") == "$round" ]]
    done'
check 'a file handle outlives a mount' 30 bash -euc '
    mkdir -p "$MNT/a/b" && echo held >"$MNT/a/b/file" && kept=$(handle "$MNT/a/b/file")
    again && [[ $(opened "$kept") == held ]] && again && [[ $(opened "$kept") == held ]]'
check 'a file handle outlives a rename and a mount' 30 bash -euc '
    kept=$(handle "$MNT/a/b/file") && mv "$MNT/a/b" "$MNT/c" && again && [[ $(opened "$kept") == held ]]'
check 'nothing stays of a removed file' 30 bash -euc '
    kept=$(handle "$MNT/c/file") && rm "$MNT/c/file" && again && ! opened "$kept"'
check 'a mount has its own options' 30 bash -euc 'again ro && ! touch "$MNT/new" && again && touch "$MNT/new"'
check 'what is written shortly before is there' 60 bash -euc '
    for ((round = 0; round < 5; round++)); do
        head -c 3M /dev/urandom >"$PLAIN/large"
        cp "$PLAIN/large" "$MNT/large"
        again
        cmp "$PLAIN/large" "$MNT/large"
    done'
check 'it is mounted at the end' 10 mountpoint -q "$MNT"
summary
