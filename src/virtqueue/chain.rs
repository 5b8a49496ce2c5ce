//! One request: a chain of descriptors, resolved to memory, and its way back.
//!
//! The invariant: a chain that was taken goes back to the used ring once, by one of the
//! answers or else when it is dropped.

use std::sync::Arc;

use super::bad_chain::BadChain;
use super::inflight::Resumed;
use super::journal::{INTENT, Journal, Previous};
use super::layout::{self, Descriptor};
use super::memory::Memory;
use super::segments::Pooled;
use super::sync::Window;
use super::used::{QueueStats, Return, UsedRing};
use crate::io::GuestBuffer;

/// The descriptor table of a queue, the memory its descriptors point into, and where its chains
/// go back.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) size: u16,
    pub(super) descriptors: Window,
    pub(super) memory: Arc<Memory>,
    pub(super) used: Arc<UsedRing>,
}

/// How a chain ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// As whoever served it wished.
    Answered,
    /// Nobody has answered it.
    Dropped,
    /// There is a fault in it.
    Refused,
}

/// One request off the ring: bytes to read, room to write, and the duty to go back.
///
/// It is moved from hand to hand, so what is large of it lies elsewhere.
#[derive(Debug)]
pub struct Chain {
    body: Pooled,
    table: Arc<Table>,
    head: u16,
    /// The head is marked as in flight for this chain.
    marked: bool,
    /// A server that is no more had taken it.
    resumed: bool,
    returned: bool,
}

impl Chain {
    /// Walks the chain at `head`, which a server before this one may have taken. A bad one has been
    /// returned empty when this says so.
    pub(super) fn take(
        table: &Arc<Table>,
        head: u16,
        indirect: bool,
        resumed: bool,
    ) -> Result<Self, BadChain> {
        let mut chain = Self {
            body: Pooled::take(),
            table: Arc::clone(table),
            head,
            marked: false,
            resumed,
            returned: false,
        };
        let walked = chain.walk(indirect);
        let pieces = chain.body.slices.len();
        let (marked, counted) = chain.used().take(head, pieces, resumed);
        chain.marked = marked;
        if counted.is_ok() {
            chain.body.held = pieces;
        }
        match walked.and(counted) {
            Ok(()) => Ok(chain),
            Err(fault) => Err(chain.refuse(fault)),
        }
    }

    /// Takes a chain once more that was in flight as its server ended; `None` if it had been
    /// answered: it has gone back with that answer.
    pub(super) fn resume(
        table: &Arc<Table>,
        from: Resumed,
        indirect: bool,
    ) -> Option<Result<Self, BadChain>> {
        let mut chain = match Self::take(table, from.head, indirect, true) {
            Ok(chain) => chain,
            Err(fault) => return Some(Err(fault)),
        };
        if let Some(journal) = table.used.journal() {
            if !journal.is_of(from.head, from.counter) {
                journal.begin(from.head, from.counter);
            } else if let Some(len) = journal.outcome(from.head) {
                chain.put_back(usize::try_from(len).unwrap_or(0), End::Answered);
                return None;
            }
        }
        Some(Ok(chain))
    }

    fn walk(&mut self, indirect: bool) -> Result<(), BadChain> {
        let table = Arc::clone(&self.table);
        let mut index = self.head;
        for _ in 0..table.size {
            if index >= table.size {
                return Err(BadChain::Index);
            }
            let mut bytes = [0; layout::DESCRIPTOR_LEN];
            let at = layout::descriptor_at(index);
            table.descriptors.read(at, &mut bytes);
            let descriptor = Descriptor::parse(bytes);
            if descriptor.has(layout::INDIRECT) {
                if !indirect {
                    return Err(BadChain::IndirectNotNegotiated);
                }
                if descriptor.has(layout::NEXT) {
                    return Err(BadChain::IndirectNext);
                }
                return self.walk_indirect(&table.memory, &descriptor);
            }
            self.body.add(&table.memory, &descriptor)?;
            if !descriptor.has(layout::NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(BadChain::Loop)
    }

    fn walk_indirect(&mut self, memory: &Memory, table: &Descriptor) -> Result<(), BadChain> {
        const ONE: u32 = 16;
        let size = table.len.checked_div(ONE).unwrap_or(0);
        if size == 0 || !table.len.is_multiple_of(ONE) || size > u32::from(u16::MAX) {
            return Err(BadChain::IndirectLength);
        }
        let mut index = 0;
        for _ in 0..size {
            if u32::from(index) >= size {
                return Err(BadChain::Index);
            }
            let mut bytes = [0; layout::DESCRIPTOR_LEN];
            let offset = layout::descriptor_at(index) as u64;
            let at = table.address.checked_add(offset).ok_or(BadChain::Address)?;
            if !memory.read(at, &mut bytes) {
                return Err(BadChain::Address);
            }
            let descriptor = Descriptor::parse(bytes);
            if descriptor.has(layout::INDIRECT) {
                return Err(BadChain::NestedIndirect);
            }
            self.body.add(memory, &descriptor)?;
            if !descriptor.has(layout::NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(BadChain::Loop)
    }

    /// Returns the chain empty for the fault in it.
    pub(super) fn refuse(mut self, fault: BadChain) -> BadChain {
        self.put_back(0, End::Refused);
        self.used().publish();
        fault
    }

    /// Bytes that were not read yet.
    #[must_use]
    pub fn readable(&self) -> usize {
        self.body.readable_len
    }

    /// Copies the next bytes out; returns how many, fewer than asked only at the end.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        let mut rest = into;
        let wanted = rest.len().min(self.body.readable_len);
        let mut missing = wanted;
        while missing != 0 {
            let Some(part) = self.body.take_readable(missing) else {
                break;
            };
            let (now, later) = rest.split_at_mut(part.len);
            part.read(now);
            rest = later;
            missing = missing.saturating_sub(part.len);
        }
        self.body.copied = self.body.copied.saturating_add(wanted);
        wanted
    }

    /// The next `len` bytes to read, left where they are. `None` if there are fewer.
    pub fn payload(&mut self, len: usize) -> Option<GuestBuffer> {
        if len > self.body.readable_len {
            return None;
        }
        let memory = Arc::clone(&self.table.memory);
        let mut missing = len;
        let pieces = std::iter::from_fn(|| {
            let part = (missing != 0).then(|| self.body.take_readable(missing))??;
            missing = missing.saturating_sub(part.len);
            Some(part)
        });
        Some(super::memory::buffer(pieces, memory))
    }

    /// Room for the reply in bytes.
    #[must_use]
    pub fn writable(&self) -> usize {
        self.body.writable_len
    }

    /// The room behind the first `skip` bytes, `len` bytes of it. `None` if there is less.
    pub fn room(&mut self, skip: usize, len: usize) -> Option<GuestBuffer> {
        let end = skip.checked_add(len)?;
        if end > self.body.writable_len {
            return None;
        }
        self.body.lent = self.body.lent.max(end);
        let memory = Arc::clone(&self.table.memory);
        Some(super::memory::buffer(
            self.body.writable_range(skip, len),
            memory,
        ))
    }

    /// Copies `from` to the writable bytes from `skip` on; the caller has seen that they fit.
    fn write(&mut self, skip: usize, from: &[u8]) {
        self.body.copied = self.body.copied.saturating_add(from.len());
        let mut rest = from;
        for slice in self.body.writable_range(skip, from.len()) {
            let (now, later) = rest.split_at(slice.len.min(rest.len()));
            slice.write(now);
            rest = later;
        }
    }

    /// Answers with `parts`, one after the other; with nothing if they don't fit. The guest
    /// sees it at the next [`UsedRing::publish`].
    pub fn reply(mut self, parts: &[&[u8]]) {
        let total: usize = parts
            .iter()
            .fold(0, |sum, part| sum.saturating_add(part.len()));
        if total > self.body.writable_len {
            self.put_back(0, End::Answered);
            return;
        }
        let mut at = 0;
        for part in parts {
            self.write(at, part);
            at = at.saturating_add(part.len());
        }
        self.put_back(total, End::Answered);
    }

    /// Answers with `header`, the `filled` bytes behind it being in place already.
    pub fn reply_filled(mut self, header: &[u8], filled: usize) {
        let total = header.len().saturating_add(filled);
        if total > self.body.writable_len {
            self.put_back(0, End::Answered);
            return;
        }
        self.write(0, header);
        self.put_back(total, End::Answered);
    }

    /// Goes back without an answer, as is right for FORGET.
    pub fn no_reply(mut self) {
        self.put_back(0, End::Answered);
    }

    /// The first of its descriptors, by which the guest knows it.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the journal holds of the chain, if a server before this one had taken it and ended
    /// before it was answered. To be asked for before anything is noted.
    #[must_use]
    pub fn previous(&self) -> Option<Previous> {
        self.resumed.then(|| match self.used().journal() {
            Some(journal) => journal.previous(self.head),
            None => Previous::default(),
        })
    }

    /// Notes which request this is.
    pub fn note_unique(&self, unique: u64) {
        if let Some(journal) = self.journal() {
            journal.note_unique(self.head, unique);
        }
    }

    /// Notes what is about to be done for the request, in words of which the first is not 0; or,
    /// by one that is, that what was noted means nothing any more.
    pub fn set_intent(&self, intent: [u64; INTENT]) {
        if let Some(journal) = self.journal() {
            journal.set_intent(self.head, intent);
        }
    }

    /// Whether what is noted is kept.
    #[must_use]
    pub fn has_journal(&self) -> bool {
        self.journal().is_some()
    }

    /// The journal, if the chain has a slot in it.
    fn journal(&self) -> Option<&Journal> {
        self.table.used.journal().filter(|_| self.marked)
    }

    /// Where this chain goes back.
    #[must_use]
    pub fn used(&self) -> &Arc<UsedRing> {
        &self.table.used
    }

    fn put_back(&mut self, written: usize, end: End) {
        self.returned = true;
        if self.table.memory.is_logging() {
            // What was lent may have been written to even if the operation failed.
            for slice in self.body.writable_range(0, written.max(self.body.lent)) {
                self.table.memory.mark_dirty(slice.guest, slice.len as u64);
            }
        }
        let more = QueueStats {
            chains: 1,
            dropped: u64::from(end == End::Dropped),
            refused: u64::from(end == End::Refused),
            copied: self.body.copied as u64,
        };
        let len = u32::try_from(written).unwrap_or(0);
        if let Some(journal) = self.journal() {
            // The reply is in place; whoever finds this mark need not serve the request again.
            journal.done(self.head, len);
        }
        let back = Return {
            head: self.head,
            len,
            pieces: self.body.held,
            marked: self.marked,
        };
        self.used().push(back, more);
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        if self.returned {
            return;
        }
        // No one is left to publish this one with a batch.
        self.put_back(0, End::Dropped);
        self.used().publish();
    }
}
