# shellcheck shell=bash disable=SC2034
# To be sourced by a script that has set here to this folder: the part of QEMU's command line that all
# guests share.

# machine_arguments CPUS MEMORY CACHE KERNEL INITRAMFS CONSOLE: sets machine to QEMU's arguments for
# a machine whose memory a server can map, which boots one of the cached kernels and writes to a
# serial console. Fails if no accelerator can be chosen.
machine_arguments() {
    local cpus=$1 memory=$2 kernel=$3/kernels/$4/vmlinuz initramfs=$5 accel tsc
    # A comma in a path is doubled for QEMU.
    local console=${6//,/,,}
    accel=$("$here/accel.sh") || return 1
    tsc=$("$here/accel.sh" --kernel) || return 1
    mapfile -t machine <<<"$accel"
    machine+=(
        -machine q35,memory-backend=memory -smp "$cpus" -m "$memory"
        -object "memory-backend-memfd,id=memory,size=$memory,share=on"
        -nodefaults -no-user-config -display none
        -kernel "$kernel" -initrd "$initramfs"
        -append "console=ttyS0 panic=-1 oops=panic mitigations=off nokaslr audit=0 cryptomgr.notests $tsc no_timer_check"
        -chardev "file,id=console,path=$console" -serial chardev:console
        -device virtio-serial-pci
    )
}
