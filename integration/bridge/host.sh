#!/usr/bin/env bash
# Programs use the mount while the same files are changed on the host: what they write, set and create
# reaches the file that the path leads to, and no program gets ESTALE. Options: those of with.sh;
# --seconds N (1 for each storm).
# shellcheck disable=SC2016 # the steps are expanded by the shells that run them
set -euo pipefail
# shellcheck source=suite.sh
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"
own='seconds'
on_mount "$@"

export seconds=${seconds:-1}
# replaced FILE: replaces it on the host by another file with the same content.
replaced() { cp "$SHARE/$1" "$SHARE/.$1" && mv "$SHARE/.$1" "$SHARE/$1"; }
export -f replaced

check 'lines appended beside an editor arrive' 30 bash -euc '
    : >"$MNT/log"
    for ((line = 0; line < 40; line++)); do
        echo "$line" >>"$MNT/log"
        replaced log
    done
    [[ $(<"$SHARE/log") == $(seq 0 39) ]]'
check 'lines appended beside an editor that keeps a backup arrive' 30 bash -euc '
    : >"$MNT/kept"
    for ((line = 0; line < 20; line++)); do
        echo "$line" >>"$MNT/kept"
        ln -f "$SHARE/kept" "$SHARE/kept~"
        replaced kept
        echo "$line" >>"$MNT/kept"
        mv "$SHARE/kept" "$SHARE/kept~"
        cp "$SHARE/kept~" "$SHARE/kept"
    done
    [[ $(<"$SHARE/kept") == $(for ((line = 0; line < 20; line++)); do echo "$line"; echo "$line"; done) ]]'
check 'what is set arrives' 30 bash -euc '
    echo content >"$MNT/set"
    for ((n = 0; n < 15; n++)); do
        replaced set && chmod $((600 + n % 8)) "$MNT/set"
        [[ $(stat -c %a "$SHARE/set") == $((600 + n % 8)) ]]
        replaced set && touch -d "@$n" "$MNT/set"
        [[ $(stat -c %Y "$SHARE/set") == "$n" ]]
        replaced set && truncate -s $n "$MNT/set"
        [[ $(stat -c %s "$SHARE/set") == "$n" ]]
    done'
check 'what is made in a replaced directory arrives' 30 bash -euc '
    mkdir "$SHARE/dir"
    for ((n = 0; n < 15; n++)); do
        : >"$MNT/dir/before"
        mv "$SHARE/dir" "$SHARE/dir.$n" && mkdir "$SHARE/dir"
        echo "$n" >"$MNT/dir/made$n"
        [[ $(<"$SHARE/dir/made$n") == "$n" && ! -e $SHARE/dir.$n/made$n ]]
    done'
check 'a working directory that was moved is worked in' 10 bash -euc '
    mkdir "$SHARE/cwd" && cd "$MNT/cwd" && mv "$SHARE/cwd" "$SHARE/moved"
    echo 1 >one && mkdir two && echo 3 >two/three && mv one two/one && rm two/three
    [[ $(<"$SHARE/moved/two/one") == 1 && ! -e $SHARE/moved/two/three ]]'
check 'what is open, and removed on the host, is used on' 10 bash -euc '
    exec 5>>"$MNT/open" && rm "$SHARE/open" && echo line >&5 && chmod 600 /proc/self/fd/5
    exec 6<>/proc/self/fd/5 && read -r line <&6 && [[ $line == line ]]'

# Opens a file again and again, while it is replaced without a pause; prints how often that was done
# and how often it failed.
storm() {
    perl -e '
        use Time::HiRes "time"; use Fcntl;
        my ($name, $mode) = @ARGV;
        my ($opens, $errors, $end) = (0, 0, time + $ENV{seconds});
        my $flags = { read => O_RDONLY, write => O_WRONLY | O_APPEND, empty => O_WRONLY | O_TRUNC }->{$mode};
        while (time < $end) {
            $opens++;
            if (sysopen(my $file, "$ENV{MNT}/$name", $flags)) {
                syswrite($file, "line\n") if $mode ne "read";
            } else { $errors++; warn "$mode: $!\n" if $errors < 5 }
        }
        print "$mode: $opens opened, $errors failed\n";
        exit($errors > 0)' "$@"
}
# replacer: replaces a file until its standard input ends.
replacer() {
    perl -e '
        my $path = "$ENV{SHARE}/$ARGV[0]"; my $in = "";
        vec($in, 0, 1) = 1;
        until (select(my $ready = $in, undef, undef, 0)) {
            open(my $file, ">", "$path.new") or die; print $file "new\n"; close $file;
            rename("$path.new", $path) or die;
        }' "$1"
}
export -f storm replacer
for mode in read write empty; do
    check "a file that is replaced without a pause is opened to $mode" 60 bash -euo pipefail -c '
        echo old >"$SHARE/storm"
        exec 7> >(replacer storm)
        pids=()
        for _ in 1 2 3; do storm storm '$mode' & pids+=($!); done
        status=0
        for pid in "${pids[@]}"; do wait "$pid" || status=1; done
        exec 7>&-
        exit $status'
done
summary
