#!/bin/sh
# The guest's part of suite.sh, which puts a line of settings before it: PHASE (first,
# after_reset, second_machine), QUICK (options of guest-suite), QUEUES. Prints "step ok NAME" or
# "step FAILED NAME: why" for each step, "value NAME ..." for what the host compares, and what
# guest-suite prints.
set -u

step() {
    name=$1
    shift
    if why=$("$@" 2>&1); then
        echo "step ok $name"
    else
        echo "step FAILED $name: $(echo "$why" | tr '\n' ' ')"
    fi
}

# Sends a tree's digest to the host as one number; the whole is left in the share, for inspection.
digest() {
    guest-suite --digest "/mnt/$2" >"/tmp/$1" || echo "the digest of $2 failed"
    cp "/tmp/$1" "/mnt/out/$1"
    echo "value $1 $(sha256sum <"/tmp/$1" | cut -c 1-64)"
}

checks() {
    echo "checks $1"
    mkdir "/mnt/$1" && chmod 755 "/mnt/$1"
    # shellcheck disable=SC2086 # several words, or none
    guest-suite $QUICK "/mnt/$1" ${2:+"$2"}
}

full_folder() {
    find /mnt/many -name 'entry-*' >/tmp/many
    listed=$(wc -l </tmp/many)
    different=$(sort -u /tmp/many | wc -l)
    echo "$listed listed, $different of them different"
    [ "$listed" = 10000 ] && [ "$different" = 10000 ]
}

remount() {
    for round in 1 2 3; do
        echo "$round" >/mnt/out/round || return 1
        umount /mnt || return 1
        if grep ' /mnt ' /proc/mounts; then return 1; fi
        mount -t virtiofs "$TAG" /mnt || return 1
        grep -x "$round" /mnt/out/round || return 1
    done
}

overlay() {
    # The upper layer is in the guest's memory: the layer below is what is tested.
    mkdir -p /tmp/layers/upper /tmp/layers/work /tmp/merged
    mount -t overlay overlay -o lowerdir=/mnt/doc,upperdir=/tmp/layers/upper,workdir=/tmp/layers/work \
        /tmp/merged || return 1
    file=$(cd /mnt/doc && find . -type f | head -n 1)
    cmp "/mnt/doc/$file" "/tmp/merged/$file" || return 1
    before=$(md5sum <"/mnt/doc/$file")
    echo more >>"/tmp/merged/$file" && rm -r "/tmp/merged/${file%/*}" || return 1
    umount /tmp/merged || return 1
    [ "$(md5sum <"/mnt/doc/$file")" = "$before" ]
}

# Each CPU has a queue of its own, as long as there are enough; a kernel before 6.11 uses only the first.
queues() {
    cpu=0
    while [ "$cpu" -lt "$QUEUES" ]; do
        taskset -c "$cpu" ls -lR /mnt/many >/dev/null || return 1
        cpu=$((cpu + 1))
    done
    grep -E 'virtio[0-9]+-requests' /proc/interrupts >/tmp/interrupts
    cat /tmp/interrupts
    used=$(awk '{ n = 0; for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) n += $i; if (n > 0) u++ }
        END { print u + 0 }' /tmp/interrupts)
    case $(uname -r) in
        6.1.*) [ "$used" -ge 1 ] ;;
        *) [ "$used" = "$QUEUES" ] ;;
    esac
}

first() {
    checks guest_suite
    step ten_thousand_entries_made_by_the_host_are_listed_once full_folder
    step every_request_queue_is_used queues
    digest doc_as_read_by_the_guest doc
    step overlay_on_the_share_works overlay
    step tree_is_copied_by_the_guest cp -a /mnt/part /mnt/written
    step tree_is_removed_by_the_guest rm -r /mnt/removed
    step mount_again_after_umount remount
    digest tree_as_written_by_the_guest written
    echo synced >/mnt/out/synced
    sync
    # The reset comes while these are writing.
    for writer in 1 2; do
        (while :; do echo line >>"/mnt/out/writer-$writer"; done) >/dev/null 2>&1 &
    done
    (while :; do ls -lR /mnt/doc; done) >/dev/null 2>&1 &
    # shellcheck disable=SC2217 # only held open
    sleep 3600 <>/mnt/out/held >/dev/null 2>&1 &
}

after_reset() {
    step file_synced_before_the_reset_is_there grep -qx synced /mnt/out/synced
    step files_written_at_the_reset_are_whole sh -c '! grep -vnx line /mnt/out/writer-1 /mnt/out/writer-2'
    step file_held_at_the_reset_is_written sh -c 'echo new >/mnt/out/held'
    checks guest_suite_after_the_reset rename
    digest tree_as_read_after_the_reset written
}

second_machine() {
    step file_of_the_first_machine_is_there grep -qx synced /mnt/out/synced
    checks guest_suite_in_the_second_machine handle
    digest part_as_read_by_the_second_machine part
    step file_is_written_by_the_second_machine sh -c 'echo second >/mnt/out/second'
}

"$PHASE"
