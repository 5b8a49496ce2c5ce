# shellcheck shell=bash
# To be sourced: where the servers are that ringfsd is compared with; installs what is missing.
# $here is this folder, $peers where they are kept, $scratch a temporary directory.

# apt_install PACKAGE...: installs the packages that are missing.
apt_install() {
    local missing=() name
    for name in "$@"; do dpkg -s "$name" >/dev/null 2>&1 || missing+=("$name"); done
    ((${#missing[@]})) || return 0
    echo "${0##*/}: installing ${missing[*]}" >&2
    apt-get -q -o DPkg::Lock::Timeout=300 update >&2 &&
        apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends "${missing[@]}" >&2
}

# get_virtiofsd: sets virtiofsd to the path of virtiofsd, or prints why it can't be had.
get_virtiofsd() {
    virtiofsd=${VIRTIOFSD:-$("$here/../bridge/virtiofsd.sh")}
}

# get_c_virtiofsd: sets c_virtiofsd to the path of the C one, or prints why it can't be had.
get_c_virtiofsd() {
    c_virtiofsd=${C_VIRTIOFSD:-$peers/c-virtiofsd/usr/lib/qemu/virtiofsd}
    [[ -x $c_virtiofsd ]] && return
    local version folder
    apt-get update -q >&2 || true
    # QEMU 7.2 is the last version that contains it.
    version=$(apt-cache madison qemu-system-common | awk '$3 ~ /^1:7\.2/ && !found { print $3; found = 1 }')
    if [[ -z $version ]]; then
        echo "${0##*/}: no package of QEMU 7.2, which contains the C virtiofsd: Debian 12 has one" >&2
        return 1
    fi
    folder=$(mktemp -d "$scratch/deb-XXXXXX")
    mkdir -p "$peers"
    (cd "$folder" &&
        apt-get download -q -o APT::Sandbox::User=root "qemu-system-common=$version" >&2) &&
        dpkg -x "$folder"/*.deb "$peers/c-virtiofsd"
}
