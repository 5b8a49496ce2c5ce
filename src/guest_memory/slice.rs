//! A contiguous part of guest memory, to be read and written.
//!
//! The invariant: no reference to guest memory is ever made, as the guest may change it at any
//! time; all access is through raw pointers.

use super::GuestAddress;

/// A contiguous part of guest memory within one region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slice {
    pub(crate) pointer: *mut u8,
    pub(crate) len: usize,
    pub(crate) guest: GuestAddress,
}

// SAFETY: a slice is an address. Code that accesses memory through it holds the snapshot that it
// came from, on any thread, and the memory is shared with the guest in any case.
unsafe impl Send for Slice {}

impl Slice {
    /// Copies the first `into.len()` bytes to `into`, which must not be longer than the slice.
    pub(crate) fn read(&self, into: &mut [u8]) {
        assert!(into.len() <= self.len);
        // SAFETY: the slice's holder keeps its snapshot, so `pointer..+len` is mapped, and the
        // assertion keeps within; `into` is the server's own memory, so they don't overlap.
        unsafe { std::ptr::copy_nonoverlapping(self.pointer, into.as_mut_ptr(), into.len()) };
    }

    /// Copies `from`, which must not be longer than the slice, to its first bytes.
    pub(crate) fn write(&self, from: &[u8]) {
        assert!(from.len() <= self.len);
        #[cfg(test)]
        if !super::crash_injection::store_takes_effect() {
            return;
        }
        // SAFETY: the slice's holder keeps its snapshot, so `pointer..+len` is mapped, and the
        // assertion keeps within; `from` is the server's own memory, so they don't overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.pointer, from.len()) };
    }

    /// Starts to load the first bytes into the processor's cache, for a use in the near future.
    pub(crate) fn prefetch(&self) {
        const LINE: usize = 64;
        prefetch(self.pointer);
        if self.len > LINE {
            prefetch(self.pointer.wrapping_add(LINE));
        }
    }

    /// Returns the slice without its first `count` bytes; `count` must not exceed its length.
    pub(crate) fn skip(self, count: usize) -> Self {
        assert!(count <= self.len);
        Self {
            pointer: self.pointer.wrapping_add(count),
            len: self.len - count,
            guest: self.guest + count as u64,
        }
    }

    /// Returns the first `count` bytes of the slice; `count` must not exceed its length.
    pub(crate) fn first(self, count: usize) -> Self {
        assert!(count <= self.len);
        Self { len: count, ..self }
    }
}

/// Starts to load the cache line at `pointer`. Has no other effect, whatever the address is.
fn prefetch(pointer: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the instruction is part of SSE, which x86-64 includes, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(pointer.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = pointer;
}
