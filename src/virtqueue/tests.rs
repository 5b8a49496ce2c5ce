//! Tests of the queue with a driver that writes the ring byte by byte.

use std::sync::Arc;

use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};

use super::layout::{INDIRECT, NEXT, WRITE};
use super::{
    BadChain, Call, Chain, Features, Queue, QueueError, QueueIndex, RingAddresses, Setup, Tracking,
};
use crate::guest_memory::{DirtyLog, Memory, MemoryLostEvent, Region, RegionDescription};

pub(super) const SIZE: u16 = 8;
const USER: u64 = 0x7f00_0000_0000;
pub(crate) const DESCRIPTORS: u64 = 0x1000;
pub(super) const AVAILABLE: u64 = 0x2000;
pub(super) const USED: u64 = 0x3000;
/// Start of the second region. There is a hole between the second and the third.
const BORDER: u64 = 0x1_0000;
const END: u64 = 0x2_0000;
const ISLAND: u64 = 0x4_0000;

/// Guest memory, and the driver's side of one queue in it.
pub(crate) struct Driver {
    files: Vec<(u64, std::fs::File)>,
    memory: Arc<Memory>,
    log: Option<std::fs::File>,
    available: u16,
}

impl Driver {
    pub(crate) fn new(logging: bool) -> Self {
        let memory_lost = Arc::new(MemoryLostEvent::new().unwrap());
        let mut files = Vec::new();
        let mut regions = Vec::new();
        for (start, len) in [(0, BORDER), (BORDER, END - BORDER), (ISLAND, 0x1000)] {
            let file = memfd(len);
            let map = file.try_clone().unwrap();
            let description = RegionDescription {
                file: map,
                offset: 0,
                guest: start,
                user: USER + start,
                len,
            };
            regions.push(Region::map(description, &memory_lost).unwrap());
            files.push((start, file));
        }
        let log = logging.then(|| memfd(0x1000));
        let map = log.as_ref().map(|file| {
            Arc::new(DirtyLog::map(file.try_clone().unwrap(), 0, 0x1000, &memory_lost).unwrap())
        });
        Self {
            files,
            memory: Arc::new(Memory::new(regions, map).unwrap()),
            log,
            available: 0,
        }
    }

    pub(crate) fn queue(&self, features: Features) -> Queue {
        let addresses = RingAddresses {
            descriptors: USER + DESCRIPTORS,
            available: USER + AVAILABLE,
            used: USER + USED,
            log: Some(USED),
        };
        let call = Arc::new(Call::default());
        Queue::new(
            QueueIndex(1),
            SIZE,
            features,
            addresses,
            &self.memory,
            0,
            call,
        )
        .unwrap()
    }

    /// Sets up a tracked queue; `next` is the available index that the front end gives.
    pub(super) fn tracked(
        &self,
        next: u16,
        call: Arc<Call>,
        tracking: Tracking,
    ) -> Result<Queue, QueueError> {
        let setup = Setup {
            index: QueueIndex(1),
            size: SIZE,
            features: PLAIN,
            addresses: RingAddresses {
                descriptors: USER + DESCRIPTORS,
                available: USER + AVAILABLE,
                used: USER + USED,
                log: None,
            },
            next,
        };
        Queue::tracked(&setup, &self.memory, call, Some(tracking))
    }

    /// Resets both rings, as a driver does when it starts again.
    pub(super) fn reset(&mut self) {
        self.available = 0;
        self.write(AVAILABLE + 2, &[0; 2]);
        self.write(USED + 2, &[0; 2]);
    }

    /// Returns the available index.
    pub(super) fn available(&self) -> u16 {
        self.available
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        let (start, file) = self.files.iter().rev().find(|(s, _)| *s <= at).unwrap();
        std::os::unix::fs::FileExt::write_all_at(file, bytes, at - start).unwrap();
    }

    pub(crate) fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        assert!(self.memory.read(at, &mut bytes));
        bytes
    }

    pub(super) fn describe(
        &self,
        table: u64,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = table + 16 * u64::from(index);
        self.write(at, &address.to_le_bytes());
        self.write(at + 8, &len.to_le_bytes());
        self.write(at + 12, &flags.to_le_bytes());
        self.write(at + 14, &next.to_le_bytes());
    }

    /// Writes a chain of descriptors from index 0 of `table` on.
    pub(crate) fn chain(&self, table: u64, parts: &[(u64, u32, u16)]) {
        for (i, (address, len, flags)) in parts.iter().enumerate() {
            let last = i + 1 == parts.len();
            let flags = if last { *flags } else { *flags | NEXT };
            let index = u16::try_from(i).unwrap();
            self.describe(table, index, *address, *len, flags, index + 1);
        }
    }

    pub(super) fn offer(&mut self, head: u16) {
        let at = AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.write(at, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.write(AVAILABLE + 2, &self.available.to_le_bytes());
    }

    /// Makes head 0 available, and takes that chain off the ring.
    pub(crate) fn pop_one(&mut self, queue: &mut Queue) -> Result<Chain, BadChain> {
        self.offer(0);
        queue.pop().unwrap()
    }

    pub(crate) fn used_index(&self) -> u16 {
        u16::from_le_bytes(self.read(USED + 2))
    }

    pub(crate) fn used_element(&self, index: u16) -> (u32, u32) {
        let at = USED + 4 + 8 * u64::from(index % SIZE);
        let id = u32::from_le_bytes(self.read(at));
        (id, u32::from_le_bytes(self.read(at + 4)))
    }

    fn dirty_pages(&self) -> Vec<u64> {
        let mut bits = [0; 0x1000];
        let log = self.log.as_ref().unwrap();
        std::os::unix::fs::FileExt::read_exact_at(log, &mut bits, 0).unwrap();
        (0..0x8000)
            .filter(|page| bits[usize::try_from(page / 8).unwrap()] & (1 << (page % 8)) != 0)
            .collect()
    }
}

fn memfd(len: u64) -> std::fs::File {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = std::fs::File::from(fd);
    file.set_len(len).unwrap();
    file
}

pub(crate) const PLAIN: Features = Features {
    event_idx: false,
    indirect: true,
};
const EVENT: Features = Features {
    event_idx: true,
    indirect: true,
};

#[test]
fn read_of_chain_crosses_descriptors_and_regions_in_order() {
    let mut driver = Driver::new(false);
    let mut queue = driver.queue(PLAIN);
    driver.write(0x5000, b"abc");
    driver.write(BORDER - 2, b"de");
    driver.write(BORDER, b"fgh");
    driver.chain(DESCRIPTORS, &[(0x5000, 3, 0), (BORDER - 2, 5, 0)]);
    let mut chain = driver.pop_one(&mut queue).unwrap();
    assert_eq!(chain.readable(), 8);
    let (mut first, mut rest) = ([0; 4], [0; 10]);
    assert_eq!(chain.read(&mut first), 4);
    assert_eq!(chain.read(&mut rest), 4);
    assert_eq!((&first, &rest[..4]), (b"abcd", &b"efgh"[..]));
    assert_eq!(chain.read(&mut rest), 0);
}

#[test]
fn reply_fills_writable_descriptors_and_is_visible_once_published() {
    let mut driver = Driver::new(false);
    let mut queue = driver.queue(PLAIN);
    let parts = [
        (0x5000, 3, WRITE),
        (0x6000, 0, WRITE),
        (BORDER - 1, 9, WRITE),
    ];
    driver.chain(DESCRIPTORS, &parts);
    let chain = driver.pop_one(&mut queue).unwrap();
    chain.reply(&[b"head", b"body"]);
    assert_eq!(driver.used_index(), 0, "visible before it was published");
    queue.used().publish();
    assert_eq!(driver.used_index(), 1);
    assert_eq!(driver.used_element(0), (0, 8));
    assert_eq!(&driver.read::<3>(0x5000), b"hea");
    assert_eq!(&driver.read::<5>(BORDER - 1), b"dbody");
}

#[test]
fn reply_that_does_not_fit_is_returned_empty() {
    let mut driver = Driver::new(false);
    let mut queue = driver.queue(PLAIN);
    driver.chain(DESCRIPTORS, &[(0x5000, 3, WRITE)]);
    let chain = driver.pop_one(&mut queue).unwrap();
    chain.reply(&[b"four"]);
    queue.used().publish();
    assert_eq!(driver.used_element(0), (0, 0));
    assert_eq!(driver.read::<4>(0x5000), [0; 4]);
}

#[test]
fn dropped_chain_is_returned_and_counted() {
    let mut driver = Driver::new(false);
    let mut queue = driver.queue(PLAIN);
    driver.chain(DESCRIPTORS, &[(0x5000, 3, WRITE)]);
    drop(driver.pop_one(&mut queue).unwrap());
    assert_eq!((driver.used_index(), driver.used_element(0)), (1, (0, 0)));
    assert_eq!(
        (queue.used().stats().dropped, queue.used().in_flight()),
        (1, 0)
    );
}

#[test]
fn chain_with_indirect_table_is_resolved() {
    let mut driver = Driver::new(false);
    let mut queue = driver.queue(PLAIN);
    driver.chain(0x8008, &[(0x5000, 4, 0), (0x6000, 16, WRITE)]);
    driver.chain(DESCRIPTORS, &[(0x8008, 32, INDIRECT)]);
    let chain = driver.pop_one(&mut queue).unwrap();
    assert_eq!((chain.readable(), chain.writable()), (4, 16));
}

#[test]
fn malformed_chain_is_returned_empty_with_its_fault() {
    type Case = (&'static str, &'static [(u64, u32, u16)], BadChain);
    let cases: &[Case] = &[
        ("hole", &[(END - 4, 8, 0)], BadChain::Address),
        ("wrap", &[(u64::MAX - 2, 8, 0)], BadChain::Address),
        ("4 GiB", &[(0x5000, u32::MAX, WRITE)], BadChain::Address),
        (
            "order",
            &[(0x5000, 4, WRITE), (0x6000, 4, 0)],
            BadChain::Order,
        ),
        (
            "no table",
            &[(0x8000, 0, INDIRECT)],
            BadChain::IndirectLength,
        ),
        (
            "odd table",
            &[(0x8000, 17, INDIRECT)],
            BadChain::IndirectLength,
        ),
        ("table in a hole", &[(END, 16, INDIRECT)], BadChain::Address),
        (
            "wrapping table",
            &[(u64::MAX - 7, 16, INDIRECT)],
            BadChain::Address,
        ),
        (
            "indirect next",
            &[(0x8000, 16, INDIRECT), (0, 1, 0)],
            BadChain::IndirectNext,
        ),
    ];
    for (name, parts, fault) in cases {
        let mut driver = Driver::new(false);
        let mut queue = driver.queue(PLAIN);
        driver.chain(DESCRIPTORS, parts);
        assert_eq!(driver.pop_one(&mut queue).unwrap_err(), *fault, "{name}");
        assert_eq!(
            (driver.used_index(), driver.used_element(0)),
            (1, (0, 0)),
            "{name}"
        );
    }
}

#[test]
fn buffers_outside_of_memory_are_left_out_with_those_behind_them() {
    type Case = (&'static str, &'static [(u64, u32, u16)], (usize, usize));
    let cases: &[Case] = &[
        (
            "all there",
            &[(0x5000, 40, 0), (0x6000, 16, WRITE)],
            (40, 16),
        ),
        (
            "where a read goes",
            &[(0x5000, 40, 0), (0x6000, 16, WRITE), (END, 4096, WRITE)],
            (40, 16),
        ),
        (
            "what is written",
            &[(0x5000, 40, 0), (END - 4, 4096, 0), (0x6000, 16, WRITE)],
            (40, 16),
        ),
        (
            "between others",
            &[
                (0x5000, 40, 0),
                (u64::MAX - 9, 20, 0),
                (0x5100, 8, 0),
                (0x6000, 16, WRITE),
                (END, 8, WRITE),
                (0x7000, 4096, WRITE),
            ],
            (40, 16),
        ),
        ("no room", &[(0x5000, 40, 0), (END, 40, 0)], (40, 0)),
    ];
    for (name, parts, expected) in cases {
        let mut driver = Driver::new(false);
        let mut queue = driver.queue(PLAIN);
        driver.write(0x5000, &[7; 40]);
        driver.chain(DESCRIPTORS, parts);
        let mut chain = driver.pop_one(&mut queue).unwrap();
        assert_eq!((chain.readable(), chain.writable()), *expected, "{name}");
        assert_eq!(chain.is_incomplete(), *name != "all there", "{name}");
        let mut request = [0; 48];
        assert_eq!(chain.read(&mut request), 40, "{name}");
        assert_eq!(request[..40], [7; 40], "{name}");
        assert!(chain.reply_buffer(16, 1).is_none(), "{name}");
        chain.reply(&[&[1; 16]]);
        queue.used().publish();
        let replied = u32::try_from(expected.1).unwrap();
        assert_eq!(driver.used_element(0), (0, replied), "{name}");
        // The pooled allocation is used again.
        driver.chain(DESCRIPTORS, &[(0x5000, 4, 0), (0x6000, 4, WRITE)]);
        let next = driver.pop_one(&mut queue).unwrap();
        assert!(!next.is_incomplete(), "{name}");
    }
}

#[test]
fn loops_invalid_indexes_and_nested_tables_are_refused() {
    let mut driver = Driver::new(false);
    let mut queue = driver.queue(PLAIN);
    driver.describe(DESCRIPTORS, 0, 0x5000, 1, NEXT, 0);
    assert_eq!(driver.pop_one(&mut queue).unwrap_err(), BadChain::Loop);
    driver.describe(DESCRIPTORS, 0, 0x5000, 1, NEXT, SIZE);
    assert_eq!(driver.pop_one(&mut queue).unwrap_err(), BadChain::Index);
    driver.describe(0x8000, 0, 0x9000, 16, INDIRECT, 0);
    driver.describe(DESCRIPTORS, 0, 0x8000, 16, INDIRECT, 0);
    assert_eq!(
        driver.pop_one(&mut queue).unwrap_err(),
        BadChain::NestedIndirect
    );
    driver.describe(0x8000, 0, 0x9000, 16, NEXT, 2);
    driver.describe(DESCRIPTORS, 0, 0x8000, 32, INDIRECT, 0);
    assert_eq!(driver.pop_one(&mut queue).unwrap_err(), BadChain::Index);
    driver.offer(SIZE);
    assert_eq!(queue.pop().unwrap().unwrap_err(), BadChain::Index);
    let mut queue = driver.queue(Features::default());
    driver.available = 0;
    driver.describe(DESCRIPTORS, 0, 0x8000, 16, INDIRECT, 0);
    let fault = driver.pop_one(&mut queue).unwrap_err();
    assert_eq!(fault, BadChain::IndirectNotNegotiated);
}

#[test]
fn more_heads_in_flight_than_entries_are_refused() {
    let mut driver = Driver::new(false);
    let mut queue = driver.queue(PLAIN);
    driver.chain(DESCRIPTORS, &[(0x5000, 3, WRITE)]);
    let in_flight: Vec<_> = (0..SIZE)
        .map(|_| driver.pop_one(&mut queue).unwrap())
        .collect();
    assert_eq!(driver.pop_one(&mut queue).unwrap_err(), BadChain::TooMany);
    drop(in_flight);
    assert!(driver.pop_one(&mut queue).is_ok());
}

#[test]
fn segments_in_flight_are_limited() {
    let mut driver = Driver::new(false);
    let mut queue = driver.queue(PLAIN);
    driver.chain(DESCRIPTORS, &[(0x5000, 3, 0), (0x6000, 3, WRITE)]);
    let others = super::bad_chain::MAX_SEGMENTS_IN_FLIGHT - 2;
    queue.used().begin(0, others, false).1.unwrap();
    let chain = driver.pop_one(&mut queue).unwrap();
    let refused = driver.pop_one(&mut queue).unwrap_err();
    assert_eq!(refused, BadChain::TooManySegmentsInFlight);
    drop(chain);
    assert!(
        driver.pop_one(&mut queue).is_ok(),
        "a returned chain makes room"
    );
}

#[test]
fn invalid_available_index_yields_no_chain_until_it_is_valid_again() {
    let driver = Driver::new(false);
    let mut queue = driver.queue(EVENT);
    driver.chain(DESCRIPTORS, &[(0x5000, 3, WRITE)]);
    driver.write(AVAILABLE + 2, &(SIZE + 1).to_le_bytes());
    assert!(queue.pop().is_none());
    assert!(
        !queue.enable_notifications(),
        "waiting for a kick, not spinning"
    );
    driver.write(AVAILABLE + 2, &1u16.to_le_bytes());
    assert!(queue.pop().is_some());
}

#[test]
fn publish_calls_guest_only_if_requested() {
    let driver = Driver::new(false);
    for (features, at, off, on) in [
        (EVENT, AVAILABLE + 4 + 2 * u64::from(SIZE), 5u16, 1u16),
        (PLAIN, AVAILABLE, 1, 0),
    ] {
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        let call = Arc::new(Call::default());
        call.set(Some(Arc::new(fd.try_clone().unwrap())));
        let called = || rustix::io::read(&fd, &mut [0; 8]).is_ok();
        let mut driver = Driver {
            files: driver
                .files
                .iter()
                .map(|(s, f)| (*s, f.try_clone().unwrap()))
                .collect(),
            memory: Arc::clone(&driver.memory),
            log: None,
            available: 0,
        };
        driver.write(USED + 2, &0u16.to_le_bytes());
        let addresses = RingAddresses {
            descriptors: USER + DESCRIPTORS,
            available: USER + AVAILABLE,
            used: USER + USED,
            log: None,
        };
        let mut queue = Queue::new(
            QueueIndex(1),
            SIZE,
            features,
            addresses,
            &driver.memory,
            0,
            call,
        )
        .unwrap();
        driver.chain(DESCRIPTORS, &[(0x5000, 3, WRITE)]);
        let mut serve = |driver: &mut Driver| {
            driver.pop_one(&mut queue).unwrap().no_reply();
            queue.used().publish();
        };
        driver.write(at, &0u16.to_le_bytes());
        serve(&mut driver);
        assert!(called(), "{features:?}: the first time");
        driver.write(at, &off.to_le_bytes());
        serve(&mut driver);
        assert!(!called(), "{features:?}: not wanted");
        driver.write(
            at,
            &(if features.event_idx { on + 1 } else { on }).to_le_bytes(),
        );
        serve(&mut driver);
        assert!(called(), "{features:?}: wanted");
    }
}

#[test]
fn kicks_are_requested_only_while_notifications_are_enabled() {
    let mut driver = Driver::new(false);
    driver.chain(DESCRIPTORS, &[(0x5000, 3, WRITE)]);
    let mut queue = driver.queue(PLAIN);
    queue.disable_notifications();
    assert_eq!(driver.read::<2>(USED), [1, 0]);
    assert!(!queue.enable_notifications());
    assert_eq!(driver.read::<2>(USED), [0, 0]);
    driver.offer(0);
    assert!(queue.enable_notifications(), "a chain was added before");

    let mut queue = driver.queue(EVENT);
    queue.pop().unwrap().unwrap().no_reply();
    assert!(!queue.enable_notifications());
    let event: [u8; 2] = driver.read(USED + 4 + 8 * u64::from(SIZE));
    assert_eq!(u16::from_le_bytes(event), 1);
}

#[test]
fn kick_for_filled_queue_is_requested_with_event_idx_only() {
    let mut driver = Driver::new(false);
    let event = USED + 4 + 8 * u64::from(SIZE);
    driver.write(event, &[7, 0]);
    let mut queue = driver.queue(EVENT);
    assert!(!queue.enable_notifications_when_filled());
    assert_eq!(driver.read::<2>(event), [1, 0], "at the second of 8");

    let mut queue = driver.queue(PLAIN);
    queue.disable_notifications();
    assert!(!queue.enable_notifications_when_filled());
    assert_eq!(driver.read::<2>(USED), [1, 0], "not for each");
    driver.offer(0);
    assert!(!queue.enable_notifications_when_filled());
    driver.offer(0);
    assert!(
        queue.enable_notifications_when_filled(),
        "the chains were added before"
    );
}

#[test]
fn reply_marks_its_pages_and_the_ring_dirty() {
    let mut driver = Driver::new(true);
    let mut queue = driver.queue(PLAIN);
    driver.chain(
        DESCRIPTORS,
        &[(0x5ff0, 0x20, WRITE), (BORDER - 4, 16, WRITE)],
    );
    let mut chain = driver.pop_one(&mut queue).unwrap();
    let buffer = chain.reply_buffer(16, 0x18).unwrap();
    assert_eq!(buffer.len(), 0x18);
    drop(buffer);
    chain.reply_filled(&[7; 16], 0x18);
    queue.used().publish();
    assert_eq!(
        driver.dirty_pages(),
        [USED >> 12, 5, 6, (BORDER - 1) >> 12, BORDER >> 12]
    );
}

#[test]
fn error_reply_marks_lent_pages_dirty() {
    let mut driver = Driver::new(true);
    let mut queue = driver.queue(PLAIN);
    driver.chain(DESCRIPTORS, &[(0x5000, 16, WRITE), (0x7000, 0x2000, WRITE)]);
    let mut chain = driver.pop_one(&mut queue).unwrap();
    drop(chain.reply_buffer(16, 0x2000).unwrap());
    chain.reply(&[&[0; 16]]);
    assert_eq!(driver.dirty_pages(), [3, 5, 7, 8]);
}

#[test]
fn queue_with_ring_outside_memory_or_invalid_size_is_refused() {
    let driver = Driver::new(false);
    let make = |size, descriptors, available, used| {
        let addresses = RingAddresses {
            descriptors,
            available,
            used,
            log: None,
        };
        let call = Arc::new(Call::default());
        Queue::new(
            QueueIndex(1),
            size,
            PLAIN,
            addresses,
            &driver.memory,
            0,
            call,
        )
        .map(|_| ())
    };
    let good = (USER + DESCRIPTORS, USER + AVAILABLE, USER + USED);
    assert!(make(8, good.0, good.1, good.2).is_ok());
    assert!(matches!(
        make(0, good.0, good.1, good.2),
        Err(QueueError::Size(..))
    ));
    assert!(matches!(
        make(6, good.0, good.1, good.2),
        Err(QueueError::Size(..))
    ));
    for (descriptors, available, used) in [
        (0x1000, good.1, good.2),
        (good.0 + 8, good.1, good.2),
        (good.0, good.1 + 1, good.2),
        (good.0, good.1, good.2 + 2),
        (USER + END - 16, good.1, good.2),
        (USER + BORDER - 16, good.1, good.2),
    ] {
        let result = make(8, descriptors, available, used);
        assert!(
            matches!(
                result,
                Err(QueueError::Address { .. } | QueueError::NotShared { .. })
            ),
            "{descriptors:#x}"
        );
    }
}

proptest! {
    /// For any layout, partial reads return the bytes in order, the payload is the rest, and a
    /// reply fills the writable descriptors in order.
    #[test]
    fn any_layout_is_read_and_written_in_order(
        readable in prop::collection::vec((0u64..0x8000, 0u32..700), 0..4),
        writable in prop::collection::vec(0u32..700, 1..4),
        takes in prop::collection::vec(0usize..600, 0..6),
    ) {
        let mut driver = Driver::new(false);
        let mut queue = driver.queue(PLAIN);
        // Readable parts are around the border of two regions and contain a pattern; writable ones
        // don't overlap them.
        let pattern: Vec<u8> = (0..0x4200u32).map(|i| u8::try_from(i % 253).unwrap()).collect();
        let (below, above) = pattern.split_at(0x4000);
        driver.write(BORDER - 0x4000, below);
        driver.write(BORDER, above);
        let mut expected = Vec::new();
        let mut parts = Vec::new();
        for (offset, len) in readable {
            parts.push((BORDER - 0x4000 + offset % 0x3f00, len, 0));
        }
        for (at, len, _) in &parts {
            let mut bytes = vec![0; usize::try_from(*len).unwrap()];
            assert!(driver.memory.read(*at, &mut bytes));
            expected.extend(bytes);
        }
        let mut at = BORDER + 0x6000;
        for len in &writable {
            parts.push((at, *len, WRITE));
            at += 0x400;
        }
        driver.chain(DESCRIPTORS, &parts);
        let mut chain = driver.pop_one(&mut queue).unwrap();
        let mut got = Vec::new();
        for take in takes {
            let mut bytes = vec![0; take];
            let n = chain.read(&mut bytes);
            got.extend_from_slice(&bytes[..n]);
        }
        let rest = chain.readable();
        prop_assert_eq!(got.len() + rest, expected.len());
        let payload = chain.payload(rest).unwrap();
        let mut bytes = vec![0; rest];
        payload.copy_out(0, &mut bytes);
        got.extend(bytes);
        prop_assert_eq!(got, expected);

        let room = chain.writable();
        let reply: Vec<u8> = (0..room).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let (head, body) = reply.split_at(room / 3);
        chain.reply(&[head, body]);
        queue.used().publish();
        prop_assert_eq!(driver.used_element(0), (0, u32::try_from(room).unwrap()));
        let mut written = Vec::new();
        for (at, len, flags) in parts {
            if flags & WRITE != 0 {
                let mut bytes = vec![0; usize::try_from(len).unwrap()];
                assert!(driver.memory.read(at, &mut bytes));
                written.extend(bytes);
            }
        }
        prop_assert_eq!(written, reply);
    }
}
