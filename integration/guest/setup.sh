#!/usr/bin/env bash
# Prepares the machine to run guests: installs by apt what is missing (QEMU, from backports if the
# release's own is older than 10; busybox; module and archive tools) and unpacks the guests' kernels
# into the cache folder, without installing them. Returns at once if nothing is missing. Needs root
# only if something has to be installed.
#
#   setup.sh            prepare
#   setup.sh --check    print what is missing, change nothing; exit 1 if something is missing
#
# Environment: RINGFSD_GUEST_CACHE, the cache folder (default: target/guest in the repository).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${RINGFSD_GUEST_CACHE:-$(cd "$here/../.." && pwd)/target/guest}
qemu_wanted=10
qemu_least=7
kernels=(6.1 6.12)
backports_list=/etc/apt/sources.list.d/ringfsd-backports.sources

# Required commands, and the packages that contain them.
declare -A package_of=(
    [busybox]=busybox-static
    [cpio]=cpio
    [modprobe]=kmod
    [depmod]=kmod
    [xz]=xz-utils
    [setfattr]=attr
    [setpriv]=util-linux
    [newuidmap]=uidmap
    [flock]=util-linux
    [cc]=gcc
    [mkfs.ext4]=e2fsprogs
    [mkfs.xfs]=xfsprogs
)

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

qemu_major() {
    local version
    version=$(qemu-system-x86_64 --version 2>/dev/null) || return 1
    [[ $version =~ version\ ([0-9]+)\. ]] || return 1
    printf '%s\n' "${BASH_REMATCH[1]}"
}

# Prints the packages that are missing, except QEMU.
missing_packages() {
    local command
    for command in "${!package_of[@]}"; do
        PATH=$PATH:/usr/sbin:/sbin type -P "$command" >/dev/null || printf '%s\n' "${package_of[$command]}"
    done
    # A busybox that needs shared libraries would not start in the guest.
    if dpkg-query -W -f '${db:Status-Status}\n' busybox-static 2>/dev/null | grep -qx installed; then
        :
    else
        printf 'busybox-static\n'
    fi
    # The suite is linked statically.
    [[ -e /usr/lib/x86_64-linux-gnu/libc.a ]] || printf 'libc6-dev\n'
}

kernel_is_there() { [[ -s $cache/kernels/$1/release && -s $cache/kernels/$1/vmlinuz ]]; }

apt() {
    local log
    log=$(mktemp)
    if ! DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 "$@" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

codename() {
    # shellcheck source=/dev/null
    (. /etc/os-release && printf '%s\n' "${VERSION_CODENAME:-}")
}

# Prints "URI<tab>key" of the machine's own main Debian source, from either spelling of a list.
main_source() {
    local suite=$1
    if [[ -r /etc/apt/sources.list.d/debian.sources ]]; then
        awk -v suite="$suite" '
            function flush_stanza(   i, n, words) {
                n = split(suites, words, " ")
                for (i = 1; i <= n && !done; i++)
                    if (words[i] == suite && uri != "") { print uri "\t" key; done = 1 }
                uri = suites = key = ""
            }
            /^[[:space:]]*$/ { flush_stanza(); next }
            tolower($1) == "uris:" { uri = $2 }
            tolower($1) == "suites:" { suites = substr($0, index($0, ":") + 1) }
            tolower($1) == "signed-by:" { key = $2 }
            END { flush_stanza() }
        ' /etc/apt/sources.list.d/debian.sources
    elif [[ -r /etc/apt/sources.list ]]; then
        awk -v suite="$suite" '
            $1 == "deb" && !done {
                key = ""; at = 2
                if ($2 ~ /^\[/) {
                    do {
                        word = $at; gsub(/[\[\]]/, "", word)
                        if (word ~ /^signed-by=/) key = substr(word, 11)
                    } while ($(at++) !~ /\]$/ && at <= NF)
                }
                if ($(at + 1) == suite) { print $at "\t" key; done = 1 }
            }
        ' /etc/apt/sources.list
    fi
}

# Adds the backports suite to apt, from the machine's own package source.
add_backports() {
    local suite source uri key
    suite=$(codename)
    [[ -n $suite ]] || return 1
    apt-cache policy | grep -q "n=$suite-backports" && return 0
    source=$(main_source "$suite")
    [[ -n $source ]] || return 1
    IFS=$'\t' read -r uri key <<<"$source"
    {
        printf 'Types: deb\nURIs: %s\nSuites: %s-backports\nComponents: main\n' "$uri" "$suite"
        [[ -z $key ]] || printf 'Signed-By: %s\n' "$key"
    } >"$backports_list"
    say "added $suite-backports"
    apt update
    apt-cache policy | grep -q "n=$suite-backports"
}

# The installed version, if an attempt to install a newer one has failed.
vain() { printf '%s/no-newer-qemu-than-%s\n' "$cache" "$(qemu_major || echo none)"; }

install_qemu() {
    local major
    if add_backports; then
        say "installing QEMU from $(codename)-backports"
        apt install --no-install-recommends -t "$(codename)-backports" qemu-system-x86 ||
            say "QEMU from backports can't be installed"
    else
        say "no backports suite to be had"
    fi
    if ! major=$(qemu_major); then
        say "installing the release's own QEMU"
        apt install --no-install-recommends qemu-system-x86 || die "QEMU can't be installed"
        major=$(qemu_major) || die "qemu-system-x86_64 is installed but does not run"
    fi
    if ((major < qemu_wanted)); then
        ((major >= qemu_least)) || die "QEMU $major is too old: vhost-user-fs needs $qemu_least at least"
        say "QEMU $major is there, $qemu_wanted can't be had: going on with $major (no migration)"
        : >"$(vain)"
    fi
}

# Prints "package version" of the cloud kernel of a series (6.1, 6.12), the newest apt knows.
kernel_package() {
    local series=$1 version depends best='' best_depends=''
    while IFS=$'\t' read -r version depends; do
        [[ $version == "$series".* ]] || continue
        if [[ -z $best ]] || dpkg --compare-versions "$version" gt "$best"; then
            best=$version best_depends=$depends
        fi
    done < <(apt-cache show linux-image-cloud-amd64 2>/dev/null | awk '
        $1 == "Version:" { version = $2 }
        $1 == "Depends:" { print version "\t" $2 }')
    [[ -n $best_depends ]] || return 1
    printf '%s %s\n' "${best_depends%,}" "$best"
}

fetch_kernel() {
    local series=$1 wanted package version work
    wanted=$(kernel_package "$series") || {
        say "no kernel $series to be had from apt: guests with it can't be run"
        return 1
    }
    read -r package version <<<"$wanted"
    say "fetching kernel $series ($package $version)"
    work=$(mktemp -d "$cache/kernels/.fetch.XXXXXX")
    # apt-get downloads as a user of its own, who needs access to the folder.
    chmod 755 "$work"
    (cd "$work" && apt download "$package=$version") || {
        rm -rf "$work"
        return 1
    }
    mkdir "$work/root"
    dpkg -x "$work"/*.deb "$work/root"
    local release=("$work"/root/boot/vmlinuz-*)
    release=("${release[@]##*/vmlinuz-}")
    mkdir -p "$work/kernel/lib/modules"
    mv "$work/root/boot/vmlinuz-${release[0]}" "$work/kernel/vmlinuz"
    mv "$work/root/boot/config-${release[0]}" "$work/kernel/config"
    if [[ -d $work/root/usr/lib/modules ]]; then
        mv "$work/root/usr/lib/modules/${release[0]}" "$work/kernel/lib/modules/"
    else
        mv "$work/root/lib/modules/${release[0]}" "$work/kernel/lib/modules/"
    fi
    PATH=$PATH:/usr/sbin:/sbin depmod -b "$work/kernel" "${release[0]}"
    printf '%s\n' "${release[0]}" >"$work/kernel/release"
    rm -rf "${cache:?}/kernels/$series"
    mv "$work/kernel" "$cache/kernels/$series"
    rm -rf "$work"
}

main() {
    local check=false
    case ${1:-} in
        '') ;;
        --check) check=true ;;
        *)
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
            exit 2
            ;;
    esac

    local packages=() lacking=() series major
    mapfile -t packages < <(missing_packages | sort -u)
    major=$(qemu_major) || major=0
    if ((major >= qemu_least)) && [[ -e $(vain) ]]; then qemu_wanted=$major; fi
    for series in "${kernels[@]}"; do
        kernel_is_there "$series" || lacking+=("$series")
    done

    if ((${#packages[@]} == 0 && ${#lacking[@]} == 0 && major >= qemu_wanted)); then
        return 0
    fi
    ((${#packages[@]} == 0)) || say "missing: ${packages[*]}"
    ((major >= qemu_wanted)) || say "QEMU is $( ((major)) && echo "$major" || echo missing ), required is $qemu_wanted"
    ((${#lacking[@]} == 0)) || say "kernels not there yet: ${lacking[*]}"
    if $check; then return 1; fi
    type -P apt-get >/dev/null || die "no apt-get on this machine: install these by hand"

    mkdir -p "$cache/kernels"
    exec {lock}>"$cache/setup.lock"
    flock "$lock"

    if ((${#packages[@]} > 0 || major < qemu_wanted)); then
        [[ $(id -u) == 0 ]] || die "packages have to be installed: run this as root"
    fi
    if ((${#packages[@]} > 0)); then
        say "installing ${packages[*]}"
        apt install --no-install-recommends "${packages[@]}" ||
            { apt update && apt install --no-install-recommends "${packages[@]}"; } ||
            die "packages can't be installed: ${packages[*]}"
    fi
    ((major >= qemu_wanted)) || install_qemu

    local failed=0
    for series in "${lacking[@]}"; do
        kernel_is_there "$series" && continue
        if [[ -z $(kernel_package "$series" || true) && $(id -u) == 0 ]]; then
            add_backports || true
        fi
        fetch_kernel "$series" || failed=$((failed + 1))
    done
    ((failed < ${#kernels[@]})) || die "no kernel for the guests"
    say "ready: QEMU $(qemu_major), kernels$(for series in "${kernels[@]}"; do kernel_is_there "$series" && printf ' %s' "$(<"$cache/kernels/$series/release")"; done)"
}

main "$@"
