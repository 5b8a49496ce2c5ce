//! Requests that are made once and sent many times, without an allocation: for load.
//!
//! A [`Prepared`] request keeps its area in guest memory. Between two sendings its arguments can be
//! patched in place. It goes over a [`Queue`] and not through the client, whose bookkeeping
//! allocates; the sender pops the queue too.

use zerocopy::{Immutable, IntoBytes};

use super::requests::{Call, bad_reply};
use super::wire::{InHeader, OutHeader};
use super::{Client, Errno, FuseError, Guest};
use crate::memory::{Buf, Memory};
use crate::ring::{Queue, RingError};

/// A request that is prepared in guest memory. It may be in flight once at a time.
#[derive(Debug)]
pub struct Prepared {
    opcode: u32,
    memory: Memory,
    readable: Vec<Buf>,
    writable: Vec<Buf>,
}

impl<G: Guest> Client<G> {
    /// Makes a request that can be sent again and again, laid out as requests are now. Its place
    /// in guest memory is its own from now on.
    ///
    /// # Errors
    /// [`FuseError::Memory`].
    pub fn prepare(&mut self, call: &Call<'_>) -> Result<Prepared, FuseError> {
        let (readable, writable) = self.place(call, 0)?;
        Ok(Prepared {
            opcode: call.opcode(),
            memory: self.guest.memory().clone(),
            readable: readable.bufs,
            writable: writable.bufs,
        })
    }
}

impl Prepared {
    /// Where [`Prepared::patch`] finds the request's arguments: after its header.
    pub const ARGUMENTS: usize = size_of::<InHeader>();

    /// Replaces bytes of the request, `at` bytes after its beginning. What is past its end is
    /// left out.
    ///
    /// # Errors
    /// [`FuseError::Memory`].
    pub fn patch<T: IntoBytes + Immutable>(&self, at: usize, value: &T) -> Result<(), FuseError> {
        let mut left = value.as_bytes();
        let mut skip = at;
        for buf in &self.readable {
            let len = buf.len as usize;
            let from = skip.min(len);
            skip -= from;
            let (now, later) = left.split_at(left.len().min(len - from));
            self.memory.write(buf.gpa.offset(from as u64), now)?;
            left = later;
        }
        Ok(())
    }

    /// Gives the request this number and stages it, with `unique` as its token too. Kick the
    /// queue after the last one.
    ///
    /// # Errors
    /// [`RingError::Full`] inside of [`FuseError::Ring`], and [`FuseError::Memory`].
    pub fn stage(&self, queue: &mut Queue, unique: u64) -> Result<(), FuseError> {
        self.patch(std::mem::offset_of!(InHeader, unique), &unique)?;
        queue.stage(&self.readable, &self.writable, unique)?;
        Ok(())
    }

    /// Checks the reply, of which `used` bytes were written. Returns how many follow the header.
    ///
    /// # Errors
    /// As [`Client::collect`].
    pub fn check(&self, unique: u64, used: u32) -> Result<u32, FuseError> {
        let opcode = self.opcode;
        if used == 0 {
            return if self.writable.is_empty() {
                Ok(0)
            } else {
                Err(FuseError::Empty { opcode })
            };
        }
        let mut header = OutHeader::default();
        self.read_reply(0, header.as_mut_bytes())?;
        if header.unique != unique || header.len != used || used < 16 {
            let what = format!("{header:?} for request {unique:#x}, and {used} bytes used");
            return Err(bad_reply(opcode, what));
        }
        match header.error {
            0 => Ok(used - 16),
            -4095..=-1 => Err(FuseError::Refused {
                opcode,
                errno: Errno(-header.error),
            }),
            error => Err(bad_reply(opcode, format!("error {error}"))),
        }
    }

    /// Copies bytes of the reply, from `at` bytes after the beginning of its header on, as far as
    /// there is room for it.
    ///
    /// # Errors
    /// [`FuseError::Memory`].
    pub fn read_reply(&self, at: usize, bytes: &mut [u8]) -> Result<(), FuseError> {
        let mut left = bytes;
        let mut skip = at;
        for buf in &self.writable {
            let len = buf.len as usize;
            let from = skip.min(len);
            skip -= from;
            let (now, later) = left.split_at_mut(left.len().min(len - from));
            self.memory.read(buf.gpa.offset(from as u64), now)?;
            left = later;
        }
        Ok(())
    }

    /// The buffers that the server reads.
    #[must_use]
    pub fn readable(&self) -> &[Buf] {
        &self.readable
    }

    /// The buffers that the server writes.
    #[must_use]
    pub fn writable(&self) -> &[Buf] {
        &self.writable
    }

    /// The number of its descriptors.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        self.readable.len() + self.writable.len()
    }
}

/// Tells a full ring from other errors.
impl FuseError {
    /// Whether the ring had too few free descriptors.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Ring(RingError::Full { .. }))
    }
}
