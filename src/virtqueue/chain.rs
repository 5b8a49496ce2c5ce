//! One request: a chain of descriptors, resolved to guest memory.
//!
//! The invariant: a chain is returned to the used ring exactly once, by one of the replies or when
//! it is dropped.

use std::sync::Arc;

use super::bad_chain::BadChain;
use super::inflight::Resumed;
use super::journal::{INTENT, Journal, Previous};
use super::layout::{self, Descriptor};
use super::segments::Pooled;
use super::sync::Window;
use super::used::{QueueStats, Return, UsedRing};
use crate::guest_memory::{self, Memory};
use crate::io::GuestBuffer;

/// The descriptor table of a queue, the memory that its descriptors point into, and its used ring.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) size: u16,
    pub(super) descriptors: Window,
    pub(super) memory: Arc<Memory>,
    pub(super) used: Arc<UsedRing>,
}

/// How a chain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// It was returned by one of the replies.
    Replied,
    /// It was dropped without a reply.
    Dropped,
    /// It was refused for a fault.
    Refused,
}

/// One request taken off the ring: bytes to read, and room for the reply.
///
/// A chain is moved often, so its large parts are in a separate allocation.
#[derive(Debug)]
pub struct Chain {
    segments: Pooled,
    table: Arc<Table>,
    head: u16,
    /// Whether the head is marked as in flight for this chain.
    marked: bool,
    /// Whether a previous server process had taken the chain.
    resumed: bool,
    returned: bool,
}

impl Chain {
    /// Takes the chain at `head`; `resumed` says that a previous server process had taken it. A
    /// faulty chain has been returned empty when this returns its fault.
    pub(super) fn from_head(
        table: &Arc<Table>,
        head: u16,
        indirect: bool,
        resumed: bool,
    ) -> Result<Self, BadChain> {
        let mut chain = Self {
            segments: Pooled::new(),
            table: Arc::clone(table),
            head,
            marked: false,
            resumed,
            returned: false,
        };
        let walked = chain.walk(table, indirect);
        let segments = chain.segments.slices.len();
        let (marked, counted) = chain.used().begin(head, segments, resumed);
        chain.marked = marked;
        if counted.is_ok() {
            chain.segments.counted = segments;
        }
        match walked.and(counted) {
            Ok(()) => Ok(chain),
            Err(fault) => Err(chain.refuse(fault)),
        }
    }

    /// Takes a chain again that was in flight when its server ended. Returns `None` if the reply
    /// was in place already; the chain has been returned with it then.
    pub(super) fn resume(
        table: &Arc<Table>,
        from: Resumed,
        indirect: bool,
    ) -> Option<Result<Self, BadChain>> {
        let mut chain = match Self::from_head(table, from.head, indirect, true) {
            Ok(chain) => chain,
            Err(fault) => return Some(Err(fault)),
        };
        if let Some(journal) = table.used.journal() {
            if !journal.belongs_to(from.head, from.counter) {
                journal.begin(from.head, from.counter);
            } else if let Some(len) = journal.reply_len(from.head) {
                chain.complete(usize::try_from(len).unwrap_or(0), Outcome::Replied);
                return None;
            }
        }
        Some(Ok(chain))
    }

    /// Resolves the descriptors of the chain.
    fn walk(&mut self, table: &Table, indirect: bool) -> Result<(), BadChain> {
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
            self.segments.add(&table.memory, &descriptor)?;
            if !descriptor.has(layout::NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(BadChain::Loop)
    }

    fn walk_indirect(&mut self, memory: &Memory, table: &Descriptor) -> Result<(), BadChain> {
        const DESCRIPTOR_LEN: u32 = 16;
        let size = table.len.checked_div(DESCRIPTOR_LEN).unwrap_or(0);
        if size == 0 || !table.len.is_multiple_of(DESCRIPTOR_LEN) || size > u32::from(u16::MAX) {
            return Err(BadChain::IndirectLength);
        }
        let len = u64::from(table.len);
        // The whole table, if it is in one region, so that its address is resolved once.
        let whole = memory
            .slice(table.address, len)
            .filter(|slice| slice.len as u64 == len);
        let mut index = 0;
        for _ in 0..size {
            if u32::from(index) >= size {
                return Err(BadChain::Index);
            }
            let mut bytes = [0; layout::DESCRIPTOR_LEN];
            let offset = layout::descriptor_at(index);
            if let Some(whole) = &whole {
                whole.skip(offset).read(&mut bytes);
            } else {
                let at = table.address.checked_add(offset as u64);
                if !memory.read(at.ok_or(BadChain::Address)?, &mut bytes) {
                    return Err(BadChain::Address);
                }
            }
            let descriptor = Descriptor::parse(bytes);
            if descriptor.has(layout::INDIRECT) {
                return Err(BadChain::NestedIndirect);
            }
            self.segments.add(memory, &descriptor)?;
            if !descriptor.has(layout::NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(BadChain::Loop)
    }

    /// Returns the chain empty because of `fault`.
    pub(super) fn refuse(mut self, fault: BadChain) -> BadChain {
        self.complete(0, Outcome::Refused);
        self.used().publish();
        fault
    }

    /// Starts to load the request, and where the reply goes, into the processor's cache. The guest
    /// has written to them last, so they are in another processor's cache. To be called some time
    /// before the chain is served.
    pub fn prefetch(&self) {
        self.segments.prefetch();
    }

    /// Whether buffers of the chain aren't in guest memory, though its first ones are. They are left
    /// out, with those behind them: what can be read and written is the beginning. A guest may use
    /// memory of a device as a buffer, as the DAX window's.
    #[must_use]
    pub fn is_incomplete(&self) -> bool {
        self.segments.is_incomplete()
    }

    /// Returns the number of bytes that were not read yet.
    #[must_use]
    pub fn readable(&self) -> usize {
        self.segments.readable_len
    }

    /// Copies the next bytes to `into`. Returns how many; fewer than `into` has only at the end.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        let mut rest = into;
        let wanted = rest.len().min(self.segments.readable_len);
        let mut missing = wanted;
        while missing != 0 {
            let Some(part) = self.segments.take_readable(missing) else {
                break;
            };
            let (now, later) = rest.split_at_mut(part.len);
            part.read(now);
            rest = later;
            missing = missing.saturating_sub(part.len);
        }
        self.segments.copied = self.segments.copied.saturating_add(wanted);
        wanted
    }

    /// Returns the next `len` bytes as a buffer in guest memory, or `None` if fewer are left.
    pub fn payload(&mut self, len: usize) -> Option<GuestBuffer> {
        if len > self.segments.readable_len {
            return None;
        }
        let memory = Arc::clone(&self.table.memory);
        let mut missing = len;
        let slices = std::iter::from_fn(|| {
            let part = (missing != 0).then(|| self.segments.take_readable(missing))??;
            missing = missing.saturating_sub(part.len);
            Some(part)
        });
        Some(guest_memory::buffer(slices, memory))
    }

    /// Returns the number of bytes that the reply may have.
    #[must_use]
    pub fn writable(&self) -> usize {
        self.segments.writable_len
    }

    /// Returns the `len` writable bytes after the first `skip` as a buffer, or `None` if there are
    /// fewer.
    pub fn reply_buffer(&mut self, skip: usize, len: usize) -> Option<GuestBuffer> {
        let end = skip.checked_add(len)?;
        if end > self.segments.writable_len {
            return None;
        }
        self.segments.lent_end = self.segments.lent_end.max(end);
        let memory = Arc::clone(&self.table.memory);
        Some(guest_memory::buffer(
            self.segments.writable_range(skip, len),
            memory,
        ))
    }

    /// Copies `from` to the writable bytes from `skip` on. The caller has checked that it fits.
    fn write(&mut self, skip: usize, from: &[u8]) {
        self.segments.copied = self.segments.copied.saturating_add(from.len());
        let mut rest = from;
        for slice in self.segments.writable_range(skip, from.len()) {
            let (now, later) = rest.split_at(slice.len.min(rest.len()));
            slice.write(now);
            rest = later;
        }
    }

    /// Replies with the concatenation of `parts`, or with an empty reply if they don't fit. The
    /// guest sees the reply after the next [`UsedRing::publish`].
    pub fn reply(mut self, parts: &[&[u8]]) {
        let total: usize = parts
            .iter()
            .fold(0, |sum, part| sum.saturating_add(part.len()));
        if total > self.segments.writable_len {
            self.complete(0, Outcome::Replied);
            return;
        }
        let mut at = 0;
        for part in parts {
            self.write(at, part);
            at = at.saturating_add(part.len());
        }
        self.complete(total, Outcome::Replied);
    }

    /// Replies with `header` and the `filled` bytes after it, which are in place already.
    pub fn reply_filled(mut self, header: &[u8], filled: usize) {
        let total = header.len().saturating_add(filled);
        if total > self.segments.writable_len {
            self.complete(0, Outcome::Replied);
            return;
        }
        self.write(0, header);
        self.complete(total, Outcome::Replied);
    }

    /// Returns the chain without a reply, as FORGET requires.
    pub fn no_reply(mut self) {
        self.complete(0, Outcome::Replied);
    }

    /// Returns the index of the chain's first descriptor, by which the guest identifies it.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Returns the journal's record of the chain, if a previous server process had taken the chain
    /// and ended before it replied. Must be called before anything is recorded.
    #[must_use]
    pub fn previous(&self) -> Option<Previous> {
        self.resumed.then(|| match self.used().journal() {
            Some(journal) => journal.previous(self.head),
            None => Previous::default(),
        })
    }

    /// Records the number of the request in the journal.
    pub fn record_unique(&self, unique: u64) {
        if let Some(journal) = self.journal() {
            journal.record_unique(self.head, unique);
        }
    }

    /// Records in the journal what the server is about to do for the request. The first word of an
    /// intent must not be 0; recording one whose first word is 0 clears the intent.
    pub fn record_intent(&self, intent: [u64; INTENT]) {
        if let Some(journal) = self.journal() {
            journal.record_intent(self.head, intent);
        }
    }

    /// Whether the chain has a slot in a journal.
    #[must_use]
    pub fn has_journal(&self) -> bool {
        self.journal().is_some()
    }

    /// Returns the journal, if the chain has a slot in it.
    fn journal(&self) -> Option<&Journal> {
        self.table.used.journal().filter(|_| self.marked)
    }

    /// Returns the used ring of the chain's queue.
    #[must_use]
    pub fn used(&self) -> &Arc<UsedRing> {
        &self.table.used
    }

    /// Returns the chain to the used ring, with `written` bytes of reply.
    fn complete(&mut self, written: usize, outcome: Outcome) {
        self.returned = true;
        if self.table.memory.is_logging() {
            // Lent bytes may have been written even if the operation failed.
            for slice in self
                .segments
                .writable_range(0, written.max(self.segments.lent_end))
            {
                self.table.memory.mark_dirty(slice.guest, slice.len as u64);
            }
        }
        let stats = QueueStats {
            chains: 1,
            dropped: u64::from(outcome == Outcome::Dropped),
            refused: u64::from(outcome == Outcome::Refused),
            copied: self.segments.copied as u64,
        };
        let len = u32::try_from(written).unwrap_or(0);
        if let Some(journal) = self.journal() {
            // The reply is in place, so a process that resumes need not serve the request again.
            journal.record_reply(self.head, len);
        }
        let returned = Return {
            head: self.head,
            len,
            segments: self.segments.counted,
            marked: self.marked,
        };
        self.used().push(returned, stats);
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        if self.returned {
            return;
        }
        // No later batch is certain to publish this.
        self.complete(0, Outcome::Dropped);
        self.used().publish();
    }
}
