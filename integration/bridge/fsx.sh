#!/usr/bin/env bash
# fsx (of crates.io): random operations on one file, mapped memory among them, with each read checked.
# Options: those of with.sh, --ops N (20,000 for each of four mixes; the large mix does a tenth),
# --seed S, --only 'NAME...'. Most of the time goes to the disk, at each msync (TMPDIR=/dev/shm is ten
# times as fast), and to waking another processor, on a virtual machine. As fsx, bridge and server
# work in turns, `taskset -c 0 fsx.sh` is twice as fast, and another run fits beside it.
# shellcheck disable=SC2016 # expanded by the shell that runs it
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"
need_crate fsx 0.3.2
own='ops seed only'
on_mount "$@"

ops=${ops:-20000} seed=${seed:-$RANDOM}
echo "seed $seed"
config=$(mktemp -d)
trap 'rm -rf "$config"' EXIT

# A process for each 10,000 operations, as fsx 0.3.2 keeps the mapping of each mapped read: with every
# mapping it gets slower, and after some 400,000 operations it reaches the limit. Once in some million
# operations it asks for a range of no bytes, which is EINVAL anywhere, and ends: the next continues.
pieces='for ((n = 0; n < count; n += 10000)); do
    ops=$((count - n > 10000 ? 10000 : count - n))
    fsx -q -f "$config/$name.toml" -N "$ops" -S $((seed + n / 10000)) -P "$config" "$MNT/fsx-$name" \
        >"$config/said" 2>&1 && continue
    tail -n 1 "$config/said" | grep -q "POSIX_FALLOCATE.* 0x0 bytes" || { cat "$config/said"; exit 1; }
done'
export config seed

# mix NAME OPS TOML...: does one run with these settings.
mix() {
    local name=$1 count=$2
    shift 2
    [[ " ${only:-$name} " == *" $name "* ]] || return 0
    printf '%s\n' "$@" >"$config/$name.toml"
    check "fsx $name, $count operations" $((60 + count / 50)) \
        env name="$name" count="$count" bash -euc "$pieces"
}

everything=('[weights]' 'close_open = 1' 'invalidate = 1' 'fsync = 0.2' 'fdatasync = 0.2'
    'punch_hole = 2' 'sendfile = 5' 'posix_fadvise = 1' 'copy_file_range = 2')
mix default "$ops" 'flen = 262144'
mix everything "$ops" 'flen = 262144' "${everything[@]}" 'posix_fallocate = 2'
mix large $((ops / 10)) 'flen = 16777216' '[opsize]' 'max = 2097152' "${everything[@]}" \
    'posix_fallocate = 2'
# Without posix_fallocate: if fsx aligns, it asks for a range of no bytes.
mix pages "$ops" 'flen = 1048576' '[opsize]' 'align = 4096' 'max = 131072' "${everything[@]}"
summary
