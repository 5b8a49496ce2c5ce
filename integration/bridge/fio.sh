#!/usr/bin/env bash
# fio: writes blocks with checksums and reads them back, with the access patterns of programs.
# Options: those of with.sh, --size S (64M for each job).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"
need fio fio
own=size
on_mount "$@"

# job NAME OPTION...: runs one job, which writes and verifies.
job() {
    local name=$1
    shift
    check "fio $name" 120 fio --name="$name" --directory="$MNT" --size="${size:-64M}" \
        --verify=crc32c --verify_fatal=1 --verify_dump=0 --group_reporting --minimal "$@"
    rm -f "$MNT/$name".*
}

job sequential --rw=write --bs=1M --ioengine=psync
job sequential-odd --rw=write --bs=61k --ioengine=psync --end_fsync=1
job random --rw=randwrite --bs=4k --ioengine=psync --size=16M
job random-synced --rw=randwrite --bs=16k --ioengine=psync --fsync=16 --size=16M
job mapped --rw=randwrite --bs=4k --ioengine=mmap --size=16M
job direct --rw=randwrite --bs=4k --ioengine=libaio --iodepth=32 --direct=1 --size=16M
job direct-large --rw=write --bs=1M --ioengine=libaio --iodepth=8 --direct=1
job ring --rw=randwrite --bs=8k --ioengine=io_uring --iodepth=32 --size=32M
job mixed --rw=randrw --bsrange=1k-256k --bs_unaligned --ioengine=psync --size=32M
job four --rw=randwrite --bs=8k --ioengine=psync --numjobs=4 --size=16M
summary
