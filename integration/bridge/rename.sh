#!/usr/bin/env bash
# Programs write one file by rename and read it, while the server reopens its inodes by file handle:
# no program gets an error. Options: those of with.sh except --server; --seconds N (3).
# shellcheck disable=SC2016 # the steps are expanded by the shells that run them
set -euo pipefail
# shellcheck source=suite.sh
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"
own='seconds'
on_mount --request-queues 4 --server-arg --inode-file-handles=prefer "$@"

export seconds=${seconds:-3}
# writer NUMBER: writes by rename and reads, and fails at the first error.
writer() {
    perl -e '
        use Time::HiRes "time";
        my ($rounds, $errors, $end) = (0, 0, time + $ENV{seconds});
        my ($own, $path) = ("$ENV{MNT}/own.$ARGV[0]", "$ENV{MNT}/file");
        while (time < $end) {
            my ($new, $file);
            $rounds++;
            next if open($new, ">", $own) && print($new "$rounds\n") && close($new)
                && rename($own, $path) && open($file, "<", $path) && defined(<$file>);
            $errors++;
            warn "round $rounds: $!\n" if $errors < 5;
        }
        print "$rounds rounds, $errors failed\n";
        exit($errors > 0)' "$1"
}
export -f writer
check 'a file is read that eight programs write by rename' $((seconds + 30)) bash -euo pipefail -c '
    echo first >"$MNT/file"
    pids=() status=0
    for program in 1 2 3 4 5 6 7 8; do writer "$program" & pids+=($!); done
    for pid in "${pids[@]}"; do wait "$pid" || status=1; done
    exit $status'
summary
