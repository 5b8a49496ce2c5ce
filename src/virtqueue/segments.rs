//! A chain's large parts, in pooled allocations.
//!
//! A chain is moved several times, and copying its roughly 200 bytes each time took up to 5 % of a
//! GETATTR. So the segments are on the heap, and each thread pools some allocations that it no
//! longer uses. The invariant: pooled segments are empty.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use smallvec::SmallVec;

use super::bad_chain::{BadChain, MAX_SEGMENTS};
use super::layout::{self, Descriptor};
use crate::guest_memory::{Memory, Slice};

/// Slices that suffice for any request without a payload of several pages.
const INLINE: usize = 6;

/// The most allocations that a thread pools: enough for the chains of one drain, and for some that
/// completed later.
const POOL_SIZE: usize = 128;

/// The pool size up to which allocations with room for more than [`INLINE`] slices are pooled: such
/// an allocation takes 6 KiB for requests of 1 MiB.
const POOL_SIZE_LARGE: usize = 16;

/// Allocations with room for more slices are never pooled.
const MAX_POOLED_SLICES: usize = 1024;

thread_local! {
    #[allow(clippy::vec_box, reason = "the boxes move in and out without a copy of their content")]
    /// The pool of this thread, with the latest allocation on top.
    static POOL: RefCell<Vec<Box<Segments>>> = const { RefCell::new(Vec::new()) };
}

/// The memory of a chain, and how much of it was read.
#[derive(Debug, Default)]
pub(super) struct Segments {
    /// The slices that the device may read, followed by those that it may write, in order.
    pub(super) slices: SmallVec<[Slice; INLINE]>,
    /// Index of the first writable slice.
    pub(super) first_writable: usize,
    /// Index of the first slice that was not read completely.
    pub(super) next_readable: usize,
    /// Readable bytes that were not read yet.
    pub(super) readable_len: usize,
    /// Writable bytes, whether or not they were written.
    pub(super) writable_len: usize,
    /// End of the writable bytes that a [`GuestBuffer`](crate::io::GuestBuffer) gives access to.
    pub(super) lent_end: usize,
    /// Bytes copied from and to guest memory.
    pub(super) copied: usize,
    /// Segments that the used ring counts as in flight.
    pub(super) counted: usize,
    /// Which buffers were left out.
    left_out: LeftOut,
}

/// Whether a chain has buffers that aren't in guest memory. What comes behind one is left out, too.
#[derive(Clone, Copy, Debug, Default)]
struct LeftOut {
    readable: bool,
    writable: bool,
}

impl Segments {
    /// Adds the buffer of one descriptor. A buffer that isn't completely in guest memory is left out,
    /// and so are those of its direction behind it. It is a fault only if nothing comes before it.
    pub(super) fn add(&mut self, memory: &Memory, descriptor: &Descriptor) -> Result<(), BadChain> {
        let write = descriptor.has(layout::WRITE);
        if !write && self.writable_len != 0 {
            return Err(BadChain::Order);
        }
        let len = if write {
            &mut self.writable_len
        } else {
            &mut self.readable_len
        };
        let more = usize::try_from(descriptor.len).map_err(|_wide| BadChain::TooLong)?;
        *len = len.checked_add(more).ok_or(BadChain::TooLong)?;
        if u32::try_from(*len).is_err() {
            return Err(BadChain::TooLong);
        }
        let slices = &mut self.slices;
        let before = slices.len();
        let all_mapped = memory.slices(descriptor.address, u64::from(descriptor.len), |slice| {
            slices.push(slice);
        });
        let left_out = if write {
            &mut self.left_out.writable
        } else {
            &mut self.left_out.readable
        };
        *left_out |= !all_mapped;
        if *left_out {
            slices.truncate(before);
            *len = len.saturating_sub(more);
            if *len == 0 {
                return Err(BadChain::Address);
            }
        }
        if !write {
            self.first_writable = self.slices.len();
        }
        if self.slices.len() > MAX_SEGMENTS {
            return Err(BadChain::TooManySegments);
        }
        Ok(())
    }

    /// Whether buffers were left out.
    pub(super) fn is_incomplete(&self) -> bool {
        self.left_out.readable || self.left_out.writable
    }

    /// Starts to load what a FUSE request is decoded from and what its reply begins with into the
    /// processor's cache: Linux uses up to two buffers for each of them.
    pub(super) fn prefetch(&self) {
        let writable = self.slices.get(self.first_writable..).unwrap_or_default();
        for slice in self.slices.iter().take(2).chain(writable.iter().take(2)) {
            slice.prefetch();
        }
    }

    /// Removes and returns the next readable bytes: at least one and at most `max`.
    pub(super) fn take_readable(&mut self, max: usize) -> Option<Slice> {
        while self.next_readable < self.first_writable {
            let first = self.slices.get_mut(self.next_readable)?;
            let count = first.len.min(max);
            let part = first.first(count);
            *first = first.skip(count);
            if first.len == 0 {
                self.next_readable = self.next_readable.saturating_add(1);
            }
            if count != 0 {
                self.readable_len = self.readable_len.saturating_sub(count);
                return Some(part);
            }
        }
        None
    }

    /// Returns the slices of the writable bytes `skip..skip + len`, in order.
    pub(super) fn writable_range(&self, skip: usize, len: usize) -> impl Iterator<Item = Slice> {
        let (mut skip, mut len) = (skip, len);
        let writable = self.slices.get(self.first_writable..).unwrap_or_default();
        writable.iter().map_while(move |slice| {
            if len == 0 {
                return None;
            }
            let skipped = skip.min(slice.len);
            skip = skip.saturating_sub(skipped);
            let part = slice.skip(skipped);
            let part = part.first(part.len.min(len));
            len = len.saturating_sub(part.len);
            Some(part)
        })
    }

    /// Empties the segments, and keeps the allocation.
    fn clear(&mut self) {
        let Self {
            slices,
            first_writable,
            next_readable,
            readable_len,
            writable_len,
            lent_end,
            copied,
            counted,
            left_out,
        } = self;
        slices.clear();
        *left_out = LeftOut::default();
        for number in [
            first_writable,
            next_readable,
            readable_len,
            writable_len,
            lent_end,
            copied,
            counted,
        ] {
            *number = 0;
        }
    }

    /// The pool size up to which this allocation is pooled.
    fn pool_limit(&self) -> usize {
        match self.slices.capacity() {
            capacity if capacity <= INLINE => POOL_SIZE,
            capacity if capacity <= MAX_POOLED_SLICES => POOL_SIZE_LARGE,
            _ => 0,
        }
    }
}

/// [`Segments`] that return to the pool of the thread on which they are dropped.
#[derive(Debug)]
pub(super) struct Pooled(Option<Box<Segments>>);

impl Pooled {
    /// Returns empty segments, from this thread's pool if possible.
    pub(super) fn new() -> Self {
        let pooled = POOL.with_borrow_mut(Vec::pop);
        Self(Some(pooled.unwrap_or_default()))
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        let Some(mut segments) = self.0.take() else {
            return;
        };
        // Fails on a thread that is ending and has no pool any more.
        let _ended = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            if pool.len() < segments.pool_limit() {
                segments.clear();
                pool.push(segments);
            }
        });
    }
}

impl Deref for Pooled {
    type Target = Segments;

    fn deref(&self) -> &Segments {
        self.0
            .as_ref()
            .expect("invariant: there until it is dropped")
    }
}

impl DerefMut for Pooled {
    fn deref_mut(&mut self) -> &mut Segments {
        self.0
            .as_mut()
            .expect("invariant: there until it is dropped")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pooled() -> usize {
        POOL.with_borrow(Vec::len)
    }

    fn slice() -> Slice {
        Slice {
            pointer: std::ptr::null_mut(),
            len: 0,
            guest: 0,
        }
    }

    #[test]
    fn reused_segments_are_empty() {
        let mut first = Pooled::new();
        first.slices.push(slice());
        first.writable_len = 7;
        first.copied = 8;
        let address = std::ptr::from_ref::<Segments>(&first);
        drop(first);
        let second = Pooled::new();
        assert_eq!(std::ptr::from_ref::<Segments>(&second), address);
        assert!(second.slices.is_empty());
        assert_eq!((second.writable_len, second.copied), (0, 0));
    }

    #[test]
    fn pool_keeps_limited_number_of_allocations() {
        let many: Vec<_> = (0..2 * POOL_SIZE).map(|_| Pooled::new()).collect();
        drop(many);
        assert_eq!(pooled(), POOL_SIZE);

        for (slices, limit) in [(100, POOL_SIZE_LARGE), (2 * MAX_POOLED_SLICES, 0)] {
            POOL.take();
            let large: Vec<_> = (0..POOL_SIZE)
                .map(|_| {
                    let mut segments = Pooled::new();
                    segments.slices.extend((0..slices).map(|_| slice()));
                    segments
                })
                .collect();
            drop(large);
            assert_eq!(pooled(), limit, "of {slices} slices");
        }
    }
}
