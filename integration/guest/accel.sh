#!/usr/bin/env bash
# Prints the QEMU arguments that select the accelerator: KVM if a stock kernel has booted under it on
# this machine, TCG otherwise. The result is kept in the cache folder until the machine is rebooted or
# QEMU or the kernel changes.
#
#   accel.sh            print the arguments, one a line
#   accel.sh --kernel   print the kernel parameter that says whether the guest can rely on its TSC
#
# Environment: RINGFSD_GUEST_CACHE (see setup.sh); RINGFSD_GUEST_ACCEL=kvm|tcg overrules the probe.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${RINGFSD_GUEST_CACHE:-$(cd "$here/../.." && pwd)/target/guest}
probe_limit=15

# Boots a kernel without a root file system: if it gets as far as missing that, KVM works.
kvm_boots_a_kernel() {
    [[ -r /dev/kvm && -w /dev/kvm ]] || return 1
    local kernel=$1 console
    console=$(mktemp)
    # In a subshell, so that its message about a QEMU that aborts is discarded.
    (
        timeout --kill-after=2 "$probe_limit" qemu-system-x86_64 \
            -accel kvm -cpu host -machine q35 -m 512 -nodefaults -no-user-config -display none \
            -no-reboot -serial "file:$console" -kernel "$kernel" \
            -append 'console=ttyS0 panic=-1' || true
    ) >/dev/null 2>&1
    local found=1
    if grep -q 'Unable to mount root fs' "$console"; then found=0; fi
    rm -f "$console"
    return "$found"
}

main() {
    local answer=${RINGFSD_GUEST_ACCEL:-} kernel key kept=$cache/accel
    if [[ -z $answer ]]; then
        kernel=$(printf '%s\n' "$cache"/kernels/*/vmlinuz | tail -n 1)
        if [[ ! -s $kernel ]]; then
            echo "accel: no kernel in $cache: run setup.sh first" >&2
            exit 1
        fi
        key=$(</proc/sys/kernel/random/boot_id)\ $(stat -L -c %Y.%s "$(type -P qemu-system-x86_64)" "$kernel" | tr '\n' ' ')
        if [[ -s $kept && $(head -n 1 "$kept") == "$key" ]]; then
            answer=$(tail -n 1 "$kept")
        else
            answer=tcg
            if kvm_boots_a_kernel "$kernel"; then answer=kvm; fi
            printf '%s\n' "$key" "$answer" >"$kept.$$"
            mv "$kept.$$" "$kept"
        fi
    fi
    # An emulated kernel measures how fast its TSC counts while the host may be busy; its clock may
    # then run many times too fast, and timeouts expire at once.
    if [[ ${1:-} == --kernel ]]; then
        if [[ $answer == kvm ]]; then echo tsc=reliable; else echo tsc=unstable; fi
        return
    fi
    case $answer in
        kvm) printf '%s\n' -accel kvm -cpu host ;;
        tcg) printf '%s\n' -accel tcg,thread=multi -cpu max ;;
        *)
            echo "accel: RINGFSD_GUEST_ACCEL is kvm or tcg, not $answer" >&2
            exit 2
            ;;
    esac
}

main "$@"
