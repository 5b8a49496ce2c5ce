#!/usr/bin/env bash
# Prints the path of virtiofsd 1.14, which ringfsd is compared with: one that is installed, or one
# that this script builds into target/peers. Fails with the reason if there is none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

version=1.14.0
peers=${CARGO_TARGET_DIR:-$PWD/target}/peers

for program in "${VIRTIOFSD:-}" "$peers/bin/virtiofsd" "$(type -P virtiofsd || true)" \
    "${CARGO_HOME:-$HOME/.cargo}/bin/virtiofsd"; do
    if [[ -x $program && $("$program" --version 2>/dev/null) == "virtiofsd $version" ]]; then
        echo "$program"
        exit
    fi
done

missing=()
for package in libcap-ng-dev libseccomp-dev pkg-config; do
    dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
if ((${#missing[@]})); then
    if ! type -P apt-get >/dev/null || ((EUID)); then
        echo "virtiofsd.sh: ${missing[*]} missing: install as root" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q -o DPkg::Lock::Timeout=300 update >&2
    apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends "${missing[@]}" >&2
fi
cargo install --quiet --locked --root "$peers" --target-dir "$peers/build" \
    --version "=$version" virtiofsd >&2
echo "$peers/bin/virtiofsd"
