//! The load generator's path, from a prepared request to the check of its reply, allocates nothing.

#![expect(clippy::unwrap_used, reason = "a test's fixture may panic")]

use std::time::Duration;

use testing::allocations::{Counting, of_this_thread};
use vmm::fuse::wire::{OutHeader, ReadIn, opcode};
use vmm::fuse::{Call, Client, Lane, Prepared};
use vmm::ring::QueueOptions;
use vmm::{Memory, Queue, Region};
use zerocopy::IntoBytes;

#[global_allocator]
static COUNTING: Counting = Counting;

/// Returns every chain as a device does, with an empty reply that has no error, through plain
/// copies: driver and device take turns here.
fn serve(memory: &Memory, queue: &Queue, seen: &mut u16, requests: &[Prepared]) {
    let at = queue.addresses();
    let mask = u64::from(queue.size() - 1);
    while *seen != queue.avail_idx() {
        let slot = u64::from(*seen) & mask;
        let head: u16 = memory.read_obj(at.available.offset(4 + 2 * slot)).unwrap();
        let unique = u64::from(*seen);
        let request = &requests[usize::from(*seen) % requests.len()];
        let reply = OutHeader {
            len: 16,
            error: 0,
            unique,
        };
        memory.write_obj(request.writable()[0].gpa, &reply).unwrap();
        let element = [u32::from(head), 16];
        memory
            .write_obj(at.used.offset(4 + 8 * slot), &element)
            .unwrap();
        *seen = seen.wrapping_add(1);
    }
    memory.write_obj(at.used.offset(2), seen).unwrap();
    memory
        .write_obj(at.used.offset(4 + 8 * (mask + 1)), seen)
        .unwrap();
    queue.call_event().signal().unwrap();
}

#[test]
fn a_prepared_request_allocates_nothing() {
    let memory = Memory::new(&[Region::new(0, 16 << 20)]).unwrap();
    let options = QueueOptions {
        event_idx: true,
        indirect: true,
        indirect_capacity: 8,
        ..QueueOptions::new(64)
    };
    let queue = Queue::new(&memory, &options).unwrap();
    let mut client = Client::new(Lane { memory, queue });
    let read = ReadIn {
        size: 4096,
        ..ReadIn::default()
    };
    let call = Call::new(opcode::READ, 2).arg(read.as_bytes()).reply(4096);
    let requests: Vec<_> = (0..32).map(|_| client.prepare(&call).unwrap()).collect();
    let Lane { memory, mut queue } = client.into_guest();

    let offset = Prepared::ARGUMENTS + std::mem::offset_of!(ReadIn, offset);
    let mut seen = 0;
    let before = of_this_thread();
    for round in 0..100_u64 {
        for (position, request) in (0..).zip(&requests) {
            let unique = round * 32 + position;
            request.patch(offset, &(unique * 4096)).unwrap();
            request.stage(&mut queue, unique).unwrap();
        }
        queue.kick().unwrap();
        serve(&memory, &queue, &mut seen, &requests);
        queue.wait_for(32, Duration::from_secs(10)).unwrap();
        while let Some(used) = queue.pop().unwrap() {
            let request = usize::try_from(used.token % 32).unwrap();
            assert_eq!(requests[request].check(used.token, used.len).unwrap(), 0);
        }
        assert_eq!(queue.in_flight(), 0);
    }
    assert_eq!(of_this_thread(), before);
}
