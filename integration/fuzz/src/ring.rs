//! Rings and chains: any content of the descriptor table, the available ring and its index.
//!
//! Each chain that comes off the ring is used as a request would use it. What must hold: each is
//! returned exactly once, and the queue still works.

use ringfsd::internals::virtqueue::{Features, Queue};

use crate::count;
use crate::guest::{DESCRIPTOR_LEN, DESCRIPTORS, Guest, INDIRECT, descriptor};
use crate::source::Source;

/// Entries of the ring.
const SIZE: u16 = 16;

/// Where descriptors point: the start of each region, what lies before its end, the hole, the
/// ring itself, the ends of the address space.
const PLACES: [u64; 12] = [
    0,
    0x2000,
    0x4000,
    0x7ff0,
    0x8000,
    0x10000,
    0x3fff0,
    0x40000,
    0x50000,
    0x57ff0,
    0x58000,
    u64::MAX - 0xff,
];

/// Lengths of buffers.
const LENGTHS: [u32; 10] = [
    0,
    1,
    16,
    40,
    64,
    0x1000,
    0x8000,
    0x4_0000,
    0x8000_0000,
    u32::MAX,
];

/// One input: rounds of a table, heads, and what is done with each chain.
pub fn run(data: &[u8]) {
    thread_local! {
        static GUEST: std::cell::RefCell<Guest> = std::cell::RefCell::new(Guest::new(SIZE));
    }
    GUEST.with_borrow_mut(|guest| with(guest, Source::new(data)));
}

fn with(guest: &mut Guest, mut source: Source<'_>) {
    let flags = source.u8();
    let features = Features {
        event_idx: flags & 1 != 0,
        indirect: flags & 2 != 0,
    };
    let mut queue = guest.queue(features);
    let mut chains: usize = 0;
    while !source.is_empty() {
        let what = source.u8();
        if what & 0x80 != 0 {
            table(guest, &mut source, DESCRIPTORS);
        }
        if what & 0x40 != 0 {
            // Where an indirect table may be meant to lie.
            table(guest, &mut source, 0x10000);
        }
        if what == 0x3f {
            jump(guest, &mut queue, &mut source);
            continue;
        }
        let heads: Vec<u16> = (0..=what & 0xf)
            .map(|_| match source.u8() {
                0xff => source.u16(),
                head => u16::from(head % 18),
            })
            .collect();
        guest.make_available(&heads);
        let _again = queue.enable_notifications();
        queue.disable_notifications();
        chains += serve(&mut queue, &mut source);
        queue.used().publish();
        // A reply may have gone over the rings themselves, so what lies there tells nothing.
        assert_eq!(queue.used().stats().chains, chains as u64, "all came back");
        assert_eq!(queue.used().in_flight(), 0);
        guest.go_on_at(queue.next_available());
    }
    count::add(chains);
}

/// An index that jumps: nothing is taken that was not there, and nothing is lost.
fn jump(guest: &mut Guest, queue: &mut Queue, source: &mut Source<'_>) {
    let far = source.u16();
    if far.wrapping_sub(guest.available()) > SIZE {
        guest.set_available(far);
        assert!(queue.pop().is_none(), "the index can't be");
        guest.set_available(guest.available());
    }
}

/// Writes a whole table: six bytes of input make a descriptor.
fn table(guest: &Guest, source: &mut Source<'_>, at: u64) {
    let mut bytes = [0; SIZE as usize * DESCRIPTOR_LEN];
    for slot in bytes.chunks_exact_mut(DESCRIPTOR_LEN) {
        let [place, offset, len, flags, next] = [(); 5].map(|()| source.u8());
        let address = match PLACES.get(usize::from(place % 16)) {
            Some(place) => place.wrapping_add(u64::from(offset)),
            None => source.u64(),
        };
        let len = match LENGTHS.get(usize::from(len % 16)) {
            Some(len) => *len,
            // Whole descriptors, for indirect tables.
            None if u16::from(flags) & INDIRECT != 0 => u32::from(len) * 16,
            None => source.u32(),
        };
        let next = match next {
            0xff => source.u16(),
            next => u16::from(next % 18),
        };
        slot.copy_from_slice(&descriptor(address, len, u16::from(flags & 7), next));
    }
    guest.write(at, &bytes);
}

fn serve(queue: &mut Queue, source: &mut Source<'_>) -> usize {
    let mut taken = 0;
    let mut kept = Vec::new();
    while let Some(chain) = queue.pop() {
        taken += 1;
        let Ok(mut chain) = chain else { continue };
        let act = source.u8();
        let (readable, writable) = (chain.readable(), chain.writable());
        if act & 1 != 0 {
            let mut bytes = vec![0; usize::from(source.u8())];
            let got = chain.read(&mut bytes);
            assert_eq!(got, bytes.len().min(readable));
            assert_eq!(chain.readable(), readable - got);
        }
        if act & 2 != 0 {
            let (len, left) = (usize::from(source.u16()), chain.readable());
            let payload = chain.payload(len);
            assert_eq!(payload.is_some(), len <= left);
        }
        if act & 4 != 0 {
            let room = chain.reply_buffer(16, source.u16().into());
            if let Some(room) = room {
                assert!(room.len() + 16 <= writable);
            }
        }
        match act >> 3 & 3 {
            0 => chain.reply(&[&[7; 16], &[8; 100][..usize::from(act >> 5) * 10]]),
            1 => chain.reply_filled(&[7; 16], writable.saturating_sub(16)),
            2 => chain.no_reply(),
            _ => kept.push(chain),
        }
    }
    drop(kept);
    taken
}
