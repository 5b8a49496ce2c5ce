#!/usr/bin/env bash
# Installs the Debian package in a clean Debian that runs systemd in namespaces, starts each unit with
# all of its restrictions, serves requests to a front end, upgrades, and removes the package again:
# nothing may be left. One of the front ends is a real guest. Lists the RPM.
#
# Needs root, what `cargo xtask package check` builds, and what integration/guest/setup.sh installs. The Debian is made once, from the package
# source of this machine, and kept in target/package.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

packages=target/package
session=target/debug/examples/session
# The highest score that `systemd-analyze security` may give.
worst=3.0

say() { printf 'package: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

[[ $(id -u) == 0 ]] || die 'needs root'
cgroups=$(findmnt --noheadings --first-only --types cgroup2 --output TARGET) || die 'no cgroup2 is mounted'

install_tools() {
    local missing=()
    command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
    command -v rpm >/dev/null || missing+=(rpm)
    command -v systemd-analyze >/dev/null || missing+=(systemd)
    ((${#missing[@]})) || return 0
    say "installing ${missing[*]}"
    DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 install \
        --no-install-recommends "${missing[@]}" >/dev/null
}

# The sources of this machine's own distribution.
sources() {
    local suite file
    suite=$(. /etc/os-release && printf '%s\n' "$VERSION_CODENAME")
    for file in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
        if [[ -r $file ]] && grep -q "\b$suite\b" "$file"; then
            cat "$file"
            return
        fi
    done
    die "no source of $suite in /etc/apt"
}

make_root() {
    local suite
    suite=$(. /etc/os-release && printf '%s\n' "$VERSION_CODENAME")
    if [[ ! -s $packages/debian.tar ]]; then
        say "making a minimal Debian ($suite) with systemd"
        sources >"$packages/sources"
        mmdebstrap --quiet --variant=minbase --include=systemd,systemd-sysv "$suite" \
            "$packages/debian.tar.new" "$packages/sources" --format=tar
        mv "$packages/debian.tar.new" "$packages/debian.tar"
    fi
    tar -C "$root" -xf "$packages/debian.tar"
}

# Boots systemd of the root in namespaces of its own; its process is $init. The control group is made
# for it, and no terminal is connected.
boot() {
    mkdir "$group"
    (
        echo "$BASHPID" >"$group/cgroup.procs"
        exec unshare --mount --pid --cgroup --ipc --uts --net --fork --kill-child bash -euc '
            root=$1
            mount --make-rprivate /
            mount --bind "$root" "$root"
            mount -t proc proc "$root/proc"
            mount -t sysfs -o ro sysfs "$root/sys"
            mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
            for dir in run dev; do mount -t tmpfs -o mode=755 tmpfs "$root/$dir"; done
            mount -t tmpfs tmpfs "$root/tmp"
            for device in null zero full random urandom tty; do
                touch "$root/dev/$device"
                mount --bind "/dev/$device" "$root/dev/$device"
            done
            mkdir "$root/dev/pts" "$root/dev/shm"
            mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
            ln -s pts/ptmx "$root/dev/ptmx"
            ln -s /proc/self/fd "$root/dev/fd"
            cd "$root"
            pivot_root . mnt
            umount -l /mnt
            exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd
        ' _ "$root"
    ) </dev/null >/dev/null 2>&1 &
    unshared=$!
    local tries
    for ((tries = 0; tries < 300; tries++)); do
        init=$(pgrep --parent "$unshared" || true)
        if [[ -n $init ]] && within systemctl is-system-running --wait >/dev/null 2>&1; then return; fi
        # An earlier answer than the manager's own socket is an error of the connection.
        sleep 0.2
    done
    die 'systemd does not start in namespaces'
}

# Runs a command in the booted system.
within() {
    timeout 60 nsenter --target "$init" --mount --pid --cgroup --ipc --uts --net -- "$@"
}

finish() {
    if [[ -n ${unshared:-} ]]; then
        kill -KILL "$unshared" 2>/dev/null || true
        wait "$unshared" 2>/dev/null || true
    fi
    # The processes of the namespace end with its first one.
    local tries
    for ((tries = 0; tries < 100; tries++)); do
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || true
        [[ -d $group ]] || break
        sleep 0.1
    done
    rm -rf --one-file-system "$root"
}

# What is on the disk of the system, without what dpkg and the system itself note, and without the
# backup that changes of the user database leave.
listing() {
    find "$root" -xdev -printf '/%P\n' | grep -vE \
        '^/(proc|sys|dev|run|tmp)(/|$)|^/var/(lib/dpkg|log|cache|tmp|lib/systemd|lib/private)(/|$)|^/etc/(passwd|group|shadow|gshadow|subuid|subgid)-$|^/etc/\.(pwd\.lock)$|^/etc/(machine-id|\.updated)$' |
        sort
}

# Plays a VMM on a socket of the system.
serves() {
    local output
    output=$(timeout 60 "$session" qemu "/proc/$init/root$1" 2>&1) || {
        printf '%s\n' "$output" >&2
        within journalctl --no-pager --lines 30 >&2 || true
        die "no session on $1"
    }
    grep -q '^READ the same: true' <<<"$output" || die "a file reads differently on $1"
}

# Root controls a share by its name; others can't even connect.
controlled() {
    local status
    status=$(within ringfsd ctl "$1" status --json) || die "$1 isn't controlled"
    grep -q "\"value\":\"$3\"" <<<"$status" || die "$2 controls another share: $status"
    [[ $(within stat --format %a "$2") == 700 ]] || die "others can open $2"
}

is() {
    local what
    what=$(within systemctl is-active "$1") || true
    [[ $what == "$2" ]] || {
        within journalctl --no-pager --unit "$1" --lines 30 >&2 || true
        die "$1 is $what, expected $2"
    }
}

manage() {
    within systemctl "$@" || {
        within journalctl --no-pager --lines 40 >&2 || true
        die "systemctl $* has failed"
    }
}

# With --once a service that a socket unit starts ends with its VMM, and starts again with the next one.
check_server_for_one_vmm() {
    local drop_in=/run/systemd/system/ringfsd@four.service.d tries vmm
    within bash -euc '
        mkdir -p "$0"
        command=$(grep ^ExecStart= /usr/lib/systemd/system/ringfsd@.service)
        printf "[Service]\nExecStart=\n%s --once\n" "$command" >"$0/once.conf"
        systemctl daemon-reload' "$drop_in"
    manage start ringfsd@four.socket
    for vmm in first second; do
        is ringfsd@four.service inactive
        serves /run/ringfsd/four.sock
        for ((tries = 0; tries < 100; tries++)); do
            within systemctl --quiet is-active ringfsd@four.service || break
            sleep 0.2
        done
        is ringfsd@four.socket active
        [[ $(within systemctl show --property Result --value ringfsd@four.service) == success ]] ||
            die "the server for one VMM fails after the $vmm"
    done
    is ringfsd@four.service inactive
    manage stop ringfsd@four.socket
    within rm -r "$drop_in"
}

check_units() {
    local unit score
    for unit in integration/systemd/*.service; do
        score=$(systemd-analyze security --offline=true --no-pager "$unit" 2>/dev/null |
            sed -n 's/.*exposure level for .*: \([0-9.]*\) .*/\1/p')
        say "${unit##*/}: exposure ${score:-unknown}"
        awk -v score="${score:-10}" -v worst="$worst" 'BEGIN { exit !(score <= worst) }' ||
            die "$unit: the exposure is above $worst"
    done

    within mkdir -p /srv/one /srv/two /srv/three /srv/four
    manage start ringfsd@one ringfsd-state@two ringfsd-user@mine
    # Type=notify: started means that a VMM can connect.
    serves /run/ringfsd/one.sock
    serves /run/ringfsd/two.sock
    serves /run/ringfsd-user/mine.sock
    controlled one /run/ringfsd/one.ctl /srv/one
    controlled two /run/ringfsd/two.ctl /srv/two
    controlled mine /run/ringfsd-user/mine.ctl /var/lib/ringfsd/mine
    within ringfsd top --batch 1 | grep -q '^ringfsd top: 3 shares, [^g]*$' || die 'top misses a share'
    # A real guest. It may make device nodes, as the unit leaves the right to.
    integration/guest/run.sh --socket "/proc/$init/root/run/ringfsd/one.sock" --timeout 300 -- \
        'echo guest >/mnt/made && mknod /mnt/device c 1 3 && chmod 4755 /mnt/made && ls -l /mnt' >&2 ||
        die 'no guest on ringfsd@one'
    [[ $(<"$root/srv/one/made") == guest && -c $root/srv/one/device && -u $root/srv/one/made ]] ||
        die 'the guest has made something else'
    manage reload ringfsd@one ringfsd-state@two ringfsd-user@mine
    serves /run/ringfsd/one.sock
    serves /run/ringfsd/two.sock
    serves /run/ringfsd-user/mine.sock

    manage start ringfsd@three.socket
    is ringfsd@three.service inactive
    serves /run/ringfsd/three.sock
    is ringfsd@three.service active
    check_server_for_one_vmm

    local main
    main=$(within systemctl show --property MainPID --value ringfsd@one)
    within bash -c "kill -KILL \$(cat /proc/$main/task/$main/children)"
    serves /run/ringfsd/one.sock
    is ringfsd@one.service active

    manage stop ringfsd@one ringfsd-state@two ringfsd-user@mine
    is ringfsd@one.service inactive
    within test ! -e /run/ringfsd/one.sock
    within test ! -e /run/ringfsd/one.ctl
}

install_tools
mkdir -p "$packages"
root=$(mktemp -d "$PWD/$packages/root.XXXXXX")
group=$cgroups/ringfsd-package-$$
trap finish EXIT
make_root
boot

# A virtiofsd that is installed keeps its place.
listing >"$packages/before"
mkdir -p "$root/usr/libexec"
echo 'a program' >"$root/usr/libexec/virtiofsd"
cp "$packages/ringfsd.deb" "$root/ringfsd.deb"
within dpkg --install /ringfsd.deb >/dev/null
[[ $(<"$root/usr/libexec/virtiofsd") == 'a program' ]] || die 'the virtiofsd that was installed is gone'
within dpkg --purge ringfsd >/dev/null
[[ $(<"$root/usr/libexec/virtiofsd") == 'a program' ]] || die 'the virtiofsd that was installed is gone'
rm "$root/usr/libexec/virtiofsd"

within dpkg --install /ringfsd.deb >/dev/null
rm "$root/ringfsd.deb"
for program in ringfsd /usr/libexec/ringfsd /usr/libexec/virtiofsd /usr/lib/ringfsd/virtiofsd; do
    within "$program" --version >/dev/null || die "$program doesn't run"
done
[[ $(readlink "$root/usr/libexec/virtiofsd") == /etc/alternatives/virtiofsd ]] || die 'no alternative'
check_units
rm -rf "$root"/srv/{one,two,three,four}
# What belongs to the operator: a share, and the state of a guest.
within rm -rf /var/lib/ringfsd/mine /run/ringfsd/two.state
within dpkg --purge ringfsd >/dev/null
# A virtiofsd of old had that directory.
[[ -d $root/usr/libexec ]] && rmdir --ignore-fail-on-non-empty "$root/usr/libexec"
listing >"$packages/after"
diff "$packages/before" "$packages/after" || die 'the package leaves files'
within test ! -e /run/ringfsd || die 'the package leaves /run/ringfsd'
is ringfsd@three.service inactive

rpm -qpl "$packages/ringfsd.rpm" >"$packages/rpm-files"
for file in /usr/bin/ringfsd /usr/lib/systemd/system/ringfsd@.service /usr/share/man/man1/ringfsd.1 \
    /usr/share/qemu/vhost-user/50-ringfsd.json; do
    grep -qx "$file" "$packages/rpm-files" || die "the RPM lacks $file"
done
say "installed, served and removed: $(stat -c %s "$packages/ringfsd") bytes of program"
