use std::time::Duration;

use super::double::Device;
use super::*;
use crate::memory::Region;

const SOON: Duration = Duration::from_secs(10);

fn ring(options: QueueOptions) -> (Memory, Queue, Device) {
    let memory = Memory::new(&[Region::new(0x1_0000, 64 << 20)]).unwrap();
    let queue = Queue::new(&memory, &options).unwrap();
    let device = Device::new(&memory, queue.addresses(), options.size, options.event_idx);
    (memory, queue, device)
}

fn with_events(size: u16) -> QueueOptions {
    QueueOptions {
        event_idx: true,
        ..QueueOptions::new(size)
    }
}

fn bufs(count: u32) -> Vec<Buf> {
    (0..count)
        .map(|i| Buf::new(Gpa(0x100_0000 + u64::from(i) * 0x100), i + 1))
        .collect()
}

#[test]
fn a_direct_chain_arrives_as_it_was_pushed() {
    let (_memory, mut queue, mut device) = ring(QueueOptions::new(8));
    let buffers = bufs(5);
    queue.push(&buffers[..3], &buffers[3..], 7).unwrap();
    assert_eq!(queue.free(), 3);
    let chain = device.pop().unwrap();
    assert!(!chain.indirect);
    assert_eq!(chain.readable, buffers[..3]);
    assert_eq!(chain.writable, buffers[3..]);
    assert_eq!(queue.pop().unwrap(), None);
    device.complete(chain.head, 42);
    let used = queue.pop().unwrap().unwrap();
    assert_eq!(used, Used { token: 7, len: 42 });
    assert_eq!(queue.free(), 8);
    assert_eq!(queue.pop().unwrap(), None);
}

#[test]
fn an_indirect_chain_takes_one_descriptor_and_may_be_longer_than_the_ring() {
    let (_memory, mut queue, mut device) = ring(QueueOptions {
        indirect: true,
        indirect_capacity: 16,
        ..QueueOptions::new(4)
    });
    let buffers = bufs(16);
    let head = queue.push(&buffers[..1], &buffers[1..], 0).unwrap();
    assert_eq!(queue.free(), 3);
    let chain = device.pop().unwrap();
    assert!(chain.indirect);
    assert_eq!(chain.readable, buffers[..1]);
    assert_eq!(chain.writable, buffers[1..]);
    let table = Gpa(queue.read_desc(head).addr);
    assert_eq!(queue.indirect_table(head), Some(table));
}

#[test]
fn a_chain_longer_than_its_table_is_direct() {
    let (_memory, mut queue, mut device) = ring(QueueOptions {
        indirect: true,
        indirect_capacity: 2,
        ..QueueOptions::new(4)
    });
    queue.push(&bufs(3), &[], 0).unwrap();
    assert!(!device.pop().unwrap().indirect);
    assert_eq!(queue.free(), 1);
}

#[test]
fn a_full_ring_refuses_and_recovers() {
    let (_memory, mut queue, mut device) = ring(QueueOptions::new(4));
    queue.push(&bufs(3), &[], 0).unwrap();
    let refused = queue.push(&bufs(2), &[], 1);
    assert!(matches!(
        refused,
        Err(RingError::Full { needed: 2, free: 1 })
    ));
    assert!(matches!(
        queue.push(&bufs(5), &[], 1),
        Err(RingError::TooLong { longest: 4, .. })
    ));
    assert!(matches!(
        queue.push(&[], &[], 1),
        Err(RingError::EmptyChain)
    ));
    let chain = device.pop().unwrap();
    device.complete(chain.head, 0);
    queue.pop().unwrap().unwrap();
    queue.push(&bufs(4), &[], 2).unwrap();
    assert_eq!(device.pop().unwrap().readable.len(), 4);
}

#[test]
fn only_powers_of_two_are_sizes() {
    let memory = Memory::new(&[Region::new(0, 64 << 20)]).unwrap();
    for size in [0, 3, 65535] {
        let made = Queue::new(&memory, &QueueOptions::new(size));
        assert!(matches!(made, Err(RingError::Size(_))));
    }
    for size in [1, 32768] {
        assert_eq!(
            Queue::new(&memory, &QueueOptions::new(size))
                .unwrap()
                .size(),
            size
        );
    }
}

#[test]
fn the_largest_ring_fills_and_empties() {
    let (_memory, mut queue, mut device) = ring(with_events(32768));
    for token in 0..32768 {
        queue.stage(&bufs(1), &[], token).unwrap();
    }
    assert!(matches!(
        queue.push(&bufs(1), &[], 0),
        Err(RingError::Full { .. })
    ));
    assert!(device.pop().is_none());
    assert!(queue.kick().unwrap());
    while let Some(chain) = device.pop() {
        device.complete(chain.head, 0);
    }
    for token in 0..32768 {
        assert_eq!(queue.pop().unwrap().unwrap().token, token);
    }
}

#[test]
fn indexes_wrap_and_completions_come_out_of_order() {
    for indirect in [false, true] {
        let (_memory, mut queue, mut device) = ring(QueueOptions {
            event_idx: true,
            indirect,
            indirect_capacity: 4,
            ..QueueOptions::new(16)
        });
        let buffers = bufs(3);
        for round in 0..20_000_u64 {
            for i in 0..4 {
                queue
                    .stage(&buffers[..1], &buffers[1..], round * 4 + i)
                    .unwrap();
            }
            queue.publish();
            let chains: Vec<_> = std::iter::from_fn(|| device.pop()).collect();
            assert_eq!(chains.len(), 4);
            for chain in chains.iter().rev() {
                device.complete(chain.head, 1);
            }
            for i in (0..4).rev() {
                assert_eq!(queue.pop().unwrap().unwrap().token, round * 4 + i);
            }
        }
        assert_eq!(queue.free(), 16);
        assert_eq!(queue.in_flight(), 0);
    }
}

#[test]
fn without_event_idx_the_flag_says_whether_to_kick() {
    let (_memory, mut queue, device) = ring(QueueOptions::new(8));
    queue.push(&bufs(1), &[], 0).unwrap();
    device.set_used_flags(USED_NO_NOTIFY);
    assert!(!queue.kick().unwrap());
    assert_eq!(queue.kick_event().take().unwrap(), 0);
    device.set_used_flags(0);
    assert!(!queue.kick().unwrap(), "nothing new to tell of");
    queue.push(&bufs(1), &[], 0).unwrap();
    assert!(queue.kick().unwrap());
    device.set_used_flags(USED_NO_NOTIFY);
    queue.kick_always().unwrap();
    assert_eq!(queue.kick_event().take().unwrap(), 2);
}

#[test]
fn with_event_idx_a_busy_device_is_not_kicked() {
    let (_memory, mut queue, mut device) = ring(with_events(8));
    queue.push(&bufs(1), &[], 0).unwrap();
    assert!(
        queue.kick().unwrap(),
        "the first chain crosses avail_event 0"
    );
    queue.push(&bufs(1), &[], 0).unwrap();
    assert!(!queue.kick().unwrap(), "the device has not asked again");
    while device.pop().is_some() {}
    queue.push(&bufs(1), &[], 0).unwrap();
    assert!(queue.kick().unwrap(), "it has asked now");
}

#[test]
fn waiting_for_several_asks_for_one_call() {
    let (_memory, mut queue, mut device) = ring(with_events(8));
    for token in 0..3 {
        queue.push(&bufs(1), &[], token).unwrap();
    }
    queue.ask_for_call(3);
    let chains: Vec<_> = std::iter::from_fn(|| device.pop()).collect();
    let calls = chains.iter().map(|chain| device.complete(chain.head, 0));
    assert_eq!(calls.collect::<Vec<_>>(), [false, false, true]);
    queue.wait_for(3, Duration::ZERO).unwrap();
}

#[test]
fn suppressed_calls_do_not_come() {
    for event_idx in [false, true] {
        let (_memory, mut queue, mut device) = ring(QueueOptions {
            event_idx,
            ..QueueOptions::new(8)
        });
        queue.suppress_calls();
        queue.push(&bufs(1), &[], 0).unwrap();
        let chain = device.pop().unwrap();
        assert!(!device.complete(chain.head, 0));
        queue.spin(SOON).unwrap();
    }
}

#[test]
fn a_silent_device_times_out() {
    let (_memory, mut queue, _device) = ring(with_events(8));
    queue.push(&bufs(1), &[], 0).unwrap();
    let waited = queue.wait(Duration::from_millis(1));
    assert!(matches!(waited, Err(RingError::TimedOut { in_flight: 1 })));
    assert!(queue.spin(Duration::ZERO).is_err());
}

#[test]
fn what_was_not_in_flight_is_an_error() {
    let (_memory, mut queue, mut device) = ring(QueueOptions::new(8));
    queue.push(&bufs(1), &[], 5).unwrap();
    let head = device.pop().unwrap().head;
    device.complete(head + 1, 0);
    device.complete(700, 0);
    device.complete(head, 0);
    device.complete(head, 0);
    assert!(matches!(queue.pop(), Err(RingError::NotInFlight { .. })));
    assert!(matches!(
        queue.pop(),
        Err(RingError::NotInFlight { id: 700 })
    ));
    assert_eq!(queue.pop().unwrap().unwrap().token, 5);
    assert!(queue.pop().is_err(), "returned twice");
    device.set_used_idx(100);
    assert!(matches!(
        queue.pop(),
        Err(RingError::UsedIndex { used: 100, .. })
    ));
}

#[test]
fn hand_written_descriptors_reach_the_device() {
    let (_memory, mut queue, mut device) = ring(QueueOptions::new(8));
    let index = queue.reserve().unwrap();
    assert_eq!(queue.free(), 7);
    let written = Descriptor {
        addr: 0x5000,
        len: 9,
        flags: Descriptor::WRITE,
        next: 3,
    };
    queue.write_desc(index, written);
    assert_eq!(queue.read_desc(index), written);
    queue.push_head(index);
    let chain = device.pop().unwrap();
    assert_eq!(chain.writable, [Buf::new(Gpa(0x5000), 9)]);
    device.complete(chain.head, 4);
    assert_eq!(queue.used_idx(), 1);
    assert_eq!(queue.used_elem(0), (u32::from(index), 4));
    assert_eq!(queue.pop_raw().unwrap(), Some((u32::from(index), 4)));
    queue.set_avail_idx(9);
    assert_eq!(queue.avail_idx(), 9);
}

#[test]
fn a_reset_queue_starts_over() {
    let (memory, mut queue, mut device) = ring(with_events(4));
    queue.push(&bufs(3), &[], 0).unwrap();
    device.pop().unwrap();
    queue.reset();
    assert_eq!(
        (queue.free(), queue.in_flight(), queue.avail_idx()),
        (4, 0, 0)
    );
    let mut device = Device::new(&memory, queue.addresses(), 4, true);
    queue.push(&bufs(4), &[], 1).unwrap();
    assert_eq!(device.pop().unwrap().readable.len(), 4);
}

/// Driver and device on two threads: no completion is lost, and none waits for ever.
#[test]
fn two_threads_that_sleep_never_miss_each_other() {
    for event_idx in [false, true] {
        let (_memory, mut queue, mut device) = ring(QueueOptions {
            event_idx,
            indirect: true,
            indirect_capacity: 4,
            ..QueueOptions::new(16)
        });
        let (kick, call) = (queue.kick_event().clone(), queue.call_event().clone());
        let rounds = 20_000;
        let server = std::thread::spawn(move || {
            let mut served = 0;
            while served < rounds {
                while let Some(chain) = device.pop() {
                    served += 1;
                    if device.complete(chain.head, 8) {
                        call.signal().unwrap();
                    }
                }
                if served < rounds {
                    assert!(kick.wait(SOON).unwrap(), "a kick was lost at {served}");
                    kick.take().unwrap();
                }
            }
        });
        let buffers = bufs(2);
        let (mut pushed, mut popped) = (0, 0);
        while popped < rounds {
            while pushed < rounds && queue.in_flight() < 5 {
                queue.stage(&buffers[..1], &buffers[1..], pushed).unwrap();
                pushed += 1;
            }
            queue.kick().unwrap();
            queue.wait(SOON).unwrap();
            while let Some(used) = queue.pop().unwrap() {
                assert_eq!(used.token, popped);
                popped += 1;
            }
        }
        server.join().unwrap();
    }
}
