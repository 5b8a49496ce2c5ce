//! A minimal device side of a ring: every request is completed at once, with a reply that consists
//! of a header without error.
//!
//! The generator's own speed is measured against it. The invariant: it reads and writes only inside
//! the areas that it has resolved, and a reply's header only where the driver has made room for
//! one.

#![expect(
    unsafe_code,
    reason = "rings are shared with another thread and reached through raw pointers"
)]

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use vmm::fuse::wire::{InHeader, OutHeader};
use vmm::memory::MemoryError;
use vmm::{Gpa, Memory, Queue};

/// The device of one ring. Its chains are indirect.
#[derive(Debug)]
pub(crate) struct Responder {
    memory: Memory,
    size: u16,
    descriptors: *mut u8,
    available: *mut u8,
    used: *mut u8,
    /// Available entries taken, all of which are used.
    taken: u16,
    /// The used index at the last decision whether to call.
    called: u16,
}

// SAFETY: the pointers are into memory that `memory` keeps mapped, wherever the owner runs, and
// what the driver may touch at the same time is accessed atomically.
unsafe impl Send for Responder {}

impl Responder {
    /// The device of this queue, which has EVENT_IDX and indirect descriptors.
    pub(crate) fn new(memory: &Memory, queue: &Queue) -> Result<Self, MemoryError> {
        let at = queue.addresses();
        let entries = usize::from(queue.size());
        Ok(Self {
            descriptors: memory.pointer(at.descriptors, 16 * entries)?,
            available: memory.pointer(at.available, 6 + 2 * entries)?,
            used: memory.pointer(at.used, 6 + 8 * entries)?,
            memory: memory.clone(),
            size: queue.size(),
            taken: 0,
            called: 0,
        })
    }

    /// Replies until it is told to stop, and never asks for a kick.
    pub(crate) fn run(&mut self, queue_call: &vmm::Event, stop: &AtomicBool) {
        // Relaxed: no other data depends on it.
        while !stop.load(Ordering::Relaxed) {
            // The other side's clock and this flag cost more than polling the ring.
            for _ in 0..64 {
                if self.turn() && queue_call.signal().is_err() {
                    return;
                }
                std::hint::spin_loop();
            }
        }
    }

    /// Replies to all available requests. True if the driver wants a call.
    pub(crate) fn turn(&mut self) -> bool {
        // Acquire: pairs with the driver's Release store of the index, after the entries.
        let available = self.u16(self.available, 2).load(Ordering::Acquire);
        if available == self.taken {
            return false;
        }
        while self.taken != available {
            let slot = usize::from(self.taken & (self.size - 1));
            // Relaxed: ordered by the load of the index.
            let head = self
                .u16(self.available, 4 + 2 * slot)
                .load(Ordering::Relaxed);
            let len = self.answer(head).unwrap_or(0);
            let element = 4 + 8 * slot;
            // Relaxed: ordered by the store of the index.
            self.u32(self.used, element)
                .store(head.into(), Ordering::Relaxed);
            self.u32(self.used, element + 4)
                .store(len, Ordering::Relaxed);
            self.taken = self.taken.wrapping_add(1);
        }
        // No kick before the index has advanced by half a ring.
        let far = self.taken.wrapping_sub(self.size / 2);
        let entries = usize::from(self.size);
        self.u16(self.used, 4 + 8 * entries)
            .store(far, Ordering::Relaxed);
        // Release: pairs with the driver's Acquire load of the index.
        self.u16(self.used, 2).store(self.taken, Ordering::Release);
        // Pairs with the driver's fence between its store of used_event and its load of the index.
        fence(Ordering::SeqCst);
        let event = self
            .u16(self.available, 4 + 2 * entries)
            .load(Ordering::Relaxed);
        let old = std::mem::replace(&mut self.called, self.taken);
        self.taken.wrapping_sub(event).wrapping_sub(1) < self.taken.wrapping_sub(old)
    }

    /// Replies to one chain. Returns the bytes written.
    fn answer(&self, head: u16) -> Option<u32> {
        let slot = 16 * usize::from(head & (self.size - 1));
        let table = Gpa(self.u64(self.descriptors, slot).load(Ordering::Relaxed));
        let bytes = self.u32(self.descriptors, slot + 8).load(Ordering::Relaxed);
        let table = self.memory.pointer(table, bytes as usize).ok()?;
        let mut header = None;
        let mut reply = None;
        let mut room = 0;
        for at in (0..bytes as usize).step_by(16) {
            let gpa = Gpa(self.u64(table, at).load(Ordering::Relaxed));
            let len = self.u32(table, at + 8).load(Ordering::Relaxed);
            let flags = self.u32(table, at + 12).load(Ordering::Relaxed);
            header.get_or_insert(gpa);
            if flags & 2 != 0 {
                reply.get_or_insert(gpa);
                room += len;
            }
        }
        let header = self.memory.read_obj::<InHeader>(header?).ok()?;
        let answer = OutHeader {
            len: room,
            error: 0,
            unique: header.unique,
        };
        self.memory.write_obj(reply?, &answer).ok()?;
        Some(room)
    }

    fn u16(&self, area: *mut u8, offset: usize) -> &AtomicU16 {
        let at = area.wrapping_add(offset).cast();
        // SAFETY: the callers stay inside of the area that `new` resolved and at multiples of 2,
        // the areas are aligned to more, `self.memory` keeps them mapped, and both sides access
        // these fields atomically only.
        unsafe { AtomicU16::from_ptr(at) }
    }

    fn u32(&self, area: *mut u8, offset: usize) -> &AtomicU32 {
        let at = area.wrapping_add(offset).cast();
        // SAFETY: as in `u16`, at multiples of 4; of tables, `answer` resolved the length, and the
        // driver made their entries before the index that was loaded with Acquire.
        unsafe { AtomicU32::from_ptr(at) }
    }

    fn u64(&self, area: *mut u8, offset: usize) -> &AtomicU64 {
        let at = area.wrapping_add(offset).cast();
        // SAFETY: as in `u32`, at multiples of 16.
        unsafe { AtomicU64::from_ptr(at) }
    }
}
