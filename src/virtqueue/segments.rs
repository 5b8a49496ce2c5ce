//! What is large of a chain, in memory that is used again.
//!
//! A chain goes through several hands, and to copy some 200 bytes each time took up to 5 % of a
//! GETATTR. So these lie on the heap, and each thread keeps some of what it has done with. The
//! invariant: what is kept is empty.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use smallvec::SmallVec;

use super::bad_chain::{BadChain, MOST_PIECES};
use super::layout::{self, Descriptor};
use super::memory::{Memory, Slice};

/// Slices that a guest needs for any request without a payload of several pages.
const INLINE: usize = 6;

/// How many a thread keeps: as many as one pass takes, and then some that were waited for.
const KEPT: usize = 128;

/// How many of them may have come to room for many slices: 6 KiB each, where requests are of 1 MiB.
const KEPT_LARGE: usize = 16;

/// For how many slices at most.
const LARGE: usize = 1024;

thread_local! {
    #[allow(clippy::vec_box, reason = "they go in and out without being copied")]
    /// What this thread has done with, the last on top.
    static SPARE: RefCell<Vec<Box<Segments>>> = const { RefCell::new(Vec::new()) };
}

/// Where a chain's bytes are, and how far it has come with them.
#[derive(Debug, Default)]
pub(super) struct Segments {
    /// First what the device may read, then where it may write, in order.
    pub(super) slices: SmallVec<[Slice; INLINE]>,
    /// The first slice that is writable.
    pub(super) first_writable: usize,
    /// The first that was not read to its end.
    pub(super) next_readable: usize,
    /// Bytes that were not read yet.
    pub(super) readable_len: usize,
    /// Bytes of room to write, whether or not they were written.
    pub(super) writable_len: usize,
    /// Of the room behind the header, what a [`GuestBuffer`](crate::io::GuestBuffer) was made of.
    pub(super) lent: usize,
    /// Bytes copied out of and into guest memory.
    pub(super) copied: usize,
    /// Pieces that the used ring counts as in flight.
    pub(super) held: usize,
}

impl Segments {
    /// Adds what one descriptor points to.
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
        let all_there = memory.slices(descriptor.address, u64::from(descriptor.len), |slice| {
            slices.push(slice);
        });
        if !write {
            self.first_writable = self.slices.len();
        }
        if self.slices.len() > MOST_PIECES {
            return Err(BadChain::Pieces);
        }
        if all_there {
            Ok(())
        } else {
            Err(BadChain::Address)
        }
    }

    /// Takes up to `most` bytes, and at least one, of what is to be read next.
    pub(super) fn take_readable(&mut self, most: usize) -> Option<Slice> {
        while self.next_readable < self.first_writable {
            let first = self.slices.get_mut(self.next_readable)?;
            let count = first.len.min(most);
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

    /// The parts of the writable bytes `skip..skip + len`, in order.
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

    /// Empties it; the room for slices stays.
    fn clear(&mut self) {
        let Self {
            slices,
            first_writable,
            next_readable,
            readable_len,
            writable_len,
            lent,
            copied,
            held,
        } = self;
        slices.clear();
        for number in [
            first_writable,
            next_readable,
            readable_len,
            writable_len,
            lent,
            copied,
            held,
        ] {
            *number = 0;
        }
    }

    /// How many such a thread may keep.
    fn worth_keeping(&self) -> usize {
        match self.slices.capacity() {
            room if room <= INLINE => KEPT,
            room if room <= LARGE => KEPT_LARGE,
            _ => 0,
        }
    }
}

/// A [`Segments`] on loan from the thread that it is dropped on.
#[derive(Debug)]
pub(super) struct Pooled(Option<Box<Segments>>);

impl Pooled {
    /// An empty one.
    pub(super) fn take() -> Self {
        let spare = SPARE.with_borrow_mut(Vec::pop);
        Self(Some(spare.unwrap_or_default()))
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        let Some(mut body) = self.0.take() else {
            return;
        };
        // A thread that ends keeps nothing.
        let _ended = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < body.worth_keeping() {
                body.clear();
                spare.push(body);
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

    fn kept() -> usize {
        SPARE.with_borrow(Vec::len)
    }

    fn slice() -> Slice {
        Slice {
            pointer: std::ptr::null_mut(),
            len: 0,
            guest: 0,
        }
    }

    #[test]
    fn what_is_used_again_is_empty() {
        let mut first = Pooled::take();
        first.slices.push(slice());
        first.writable_len = 7;
        first.copied = 8;
        let address = std::ptr::from_ref::<Segments>(&first);
        drop(first);
        let second = Pooled::take();
        assert_eq!(std::ptr::from_ref::<Segments>(&second), address);
        assert!(second.slices.is_empty());
        assert_eq!((second.writable_len, second.copied), (0, 0));
    }

    #[test]
    fn no_more_is_kept_than_is_of_use() {
        let many: Vec<_> = (0..2 * KEPT).map(|_| Pooled::take()).collect();
        drop(many);
        assert_eq!(kept(), KEPT);

        for (slices, most) in [(100, KEPT_LARGE), (2 * LARGE, 0)] {
            SPARE.take();
            let large: Vec<_> = (0..KEPT)
                .map(|_| {
                    let mut body = Pooled::take();
                    body.slices.extend((0..slices).map(|_| slice()));
                    body
                })
                .collect();
            drop(large);
            assert_eq!(kept(), most, "of {slices} slices");
        }
    }
}
