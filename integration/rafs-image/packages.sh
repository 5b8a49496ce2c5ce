#!/usr/bin/env bash
# Installs what building the feature nydus needs besides Rust and a C compiler, if it is missing.
set -euo pipefail

packages=()
type -P cmake >/dev/null || packages+=(cmake)
type -P make >/dev/null || packages+=(make)
type -P pkg-config >/dev/null || packages+=(pkg-config)
[[ -e /usr/include/openssl/ssl.h ]] || packages+=(libssl-dev)
((${#packages[@]})) || exit 0

if ! type -P apt-get >/dev/null || ((EUID)); then
    echo "packages.sh: install these by hand: ${packages[*]}" >&2
    exit 1
fi
apt() { DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 "$@" >&2; }
apt install --no-install-recommends "${packages[@]}" ||
    { apt update && apt install --no-install-recommends "${packages[@]}"; }
