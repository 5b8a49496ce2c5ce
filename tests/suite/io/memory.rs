//! Memory as a guest has it: in segments, and accessed by others at the same time.

#![allow(unsafe_code, reason = "the suite plays the guest's memory")]

use std::ops::Range;

use ringfsd::io::{Guard, GuestBuffer};

/// Page-aligned memory that stays readable whatever happens to the buffers made of it.
#[derive(Clone, Copy)]
pub(crate) struct Arena {
    pub(crate) start: *mut u8,
    pub(crate) len: usize,
}

impl Arena {
    pub(crate) fn new(len: usize) -> Self {
        let layout = std::alloc::Layout::from_size_align(len, 4096).unwrap();
        // SAFETY: the layout's size is not zero. Never freed: the process is short-lived.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        assert!(!start.is_null());
        Self { start, len }
    }

    pub(crate) fn fill(&self, bytes: &[u8], at: usize) {
        assert!(at + bytes.len() <= self.len);
        let to = self.start.wrapping_add(at);
        // SAFETY: within the arena; no operation runs on it, no reference to it exists.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        // SAFETY: within the arena, and `bytes` is as long.
        unsafe { std::ptr::copy_nonoverlapping(self.start, bytes.as_mut_ptr(), self.len) };
        bytes
    }

    pub(crate) fn buffer(&self, pieces: &[Range<usize>], guard: Guard) -> GuestBuffer {
        let pieces = pieces.iter().map(|piece| {
            assert!(piece.end <= self.len);
            (self.start.wrapping_add(piece.start), piece.len())
        });
        // SAFETY: the pieces lie in the arena, which is never freed and never referred to.
        unsafe { GuestBuffer::from_raw_pieces(pieces, guard) }
    }
}

/// Pieces of the given sizes with gaps between them, and where the last one ends.
pub(crate) fn with_gaps(sizes: &[usize]) -> (Vec<Range<usize>>, usize) {
    let mut at = 3;
    let pieces = sizes
        .iter()
        .map(|size| {
            let piece = at..at + size;
            at += size + 5;
            piece
        })
        .collect();
    (pieces, at)
}

/// A buffer of all of the arena.
pub(crate) fn whole(arena: Arena, guard: Guard) -> GuestBuffer {
    arena.buffer(std::slice::from_ref(&(0..arena.len)), guard)
}
