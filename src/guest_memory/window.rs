//! The memory of a ring, with 16-bit numbers that driver and device load and store at any time.
//!
//! The invariant: each access is within the part of the ring that was resolved.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use super::slice::Slice;
use super::table::Memory;

/// The memory of one part of a ring, resolved once, with typed accesses at an offset. Loom models
/// use the `Window` of `virtqueue::sync` instead.
#[derive(Debug)]
pub(crate) struct Window {
    slice: Slice,
    _memory: Arc<Memory>,
}

// SAFETY: all accesses through a shared window are atomic or plain copies of shared memory,
// and the snapshot it holds keeps them mapped on whatever thread.
unsafe impl Sync for Window {}

impl Window {
    /// Resolves `user..user + len` in the front end's addresses. Returns `None` if it isn't within
    /// one region, or isn't mapped at a multiple of `align`.
    pub(crate) fn new(memory: &Arc<Memory>, user: u64, len: u64, align: u64) -> Option<Self> {
        let guest = memory.guest_address(user)?;
        let slice = memory.slice(guest, len)?;
        if slice.len as u64 != len || !(slice.pointer.addr() as u64).is_multiple_of(align) {
            return None;
        }
        Some(Self {
            slice,
            _memory: Arc::clone(memory),
        })
    }

    /// Copies `into.len()` bytes from `offset` to `into`.
    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) {
        self.slice.skip(offset).read(into);
    }

    /// Copies `from` to `offset`.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        self.slice.skip(offset).write(from);
    }

    /// Starts to load what begins at `offset` into the processor's cache.
    pub(crate) fn prefetch(&self, offset: usize) {
        if offset < self.slice.len {
            self.slice.skip(offset).first(1).prefetch();
        }
    }

    /// Loads the 16-bit little-endian number at `offset`.
    pub(crate) fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        u16::from_le(self.atomic_u16(offset).load(order))
    }

    /// Stores the 16-bit little-endian number at `offset`.
    pub(crate) fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        #[cfg(test)]
        if !super::crash_injection::store_takes_effect() {
            return;
        }
        self.atomic_u16(offset).store(value.to_le(), order);
    }

    fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        assert!(offset.is_multiple_of(2) && offset + 2 <= self.slice.len);
        let pointer = self.slice.pointer.wrapping_add(offset).cast::<u16>();
        // SAFETY: the number is within the window by the assertion, the snapshot that the window
        // holds keeps it mapped, and it is aligned: `new` checked the start of the window (the
        // callers pass an even alignment), and the assertion checked the offset.
        unsafe { AtomicU16::from_ptr(pointer) }
    }
}
