//! The first page of the table: whose it is, how it is laid out, what was agreed on; and the block
//! in which the front end's part lies.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

use super::thread_journal::{THREADS, WORDS};
use super::{StateError, Table};
use crate::sys::receipt::Receipt;
use crate::sys::shared::{SharedWords, WORD};

/// Words of a chunk: 64 KiB.
pub(super) const CHUNK: usize = 8192;

/// The first word of a table.
const MAGIC: u64 = u64::from_le_bytes(*b"ringfsd\0");
/// What this program writes and reads. Whatever moves or gets another meaning needs another.
pub(super) const VERSION: u64 = 1;

/// Words of a page: what is given back to the system is whole pages.
const PAGE: usize = 512;

/// Where the words of the header are.
mod at {
    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION: usize = 1;
    pub(super) const CHUNKS: usize = 2;
    pub(super) const QUEUES: usize = 3;
    /// Over the four before.
    pub(super) const CHECK: usize = 4;
    /// Node ids below were given out.
    pub(super) const NODES: usize = 8;
    /// Handles below were.
    pub(super) const HANDLES: usize = 9;
    pub(super) const GENERATION: usize = 10;
    /// Which half of the threads' room is in use: 0 or 1.
    pub(super) const HALF: usize = 11;
    /// The log has told that a VMM can connect: 0 or 1.
    pub(super) const ANNOUNCED: usize = 12;
    /// Which of the front end's two blocks holds: 1 or 2, and 0 for none.
    pub(super) const FRONT: usize = 16;
    /// Which of the two agreements does.
    pub(super) const AGREED: usize = 24;
    pub(super) const AGREEMENTS: usize = 32;
    /// How much of the reply to the front end was sent.
    pub(super) const RECEIPT: usize = 56;
}

/// Words of what was agreed on with the guest: as `fuse` writes them.
pub type Agreement = [u64; 8];

/// Words of each of the front end's two blocks.
const FRONT: usize = 16 * 1024;

/// Words for each queue: what is in flight, and what became of it.
const QUEUE: usize = 1 << 19;

/// How much a table is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Inodes, at most.
    pub inodes: usize,
    /// Open files and lock owners together, at most.
    pub handles: usize,
    /// Queues of the device.
    pub queues: u16,
}

impl Limits {
    /// How long the file of such a table is, most of it holes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        Layout::of(self).bytes()
    }
}

/// Where the parts of a table are, in words from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) queue_count: usize,
    pub(super) queues: usize,
    pub(super) journal_entries: usize,
    pub(super) kinds: usize,
    pub(super) chunks: usize,
    pub(super) chunk_count: usize,
}

impl Layout {
    pub(super) fn of(limits: &Limits) -> Self {
        // A record, and as much again for its name and file handle, or twice as much for one of
        // the longest names: a guest whose names are all long knows fewer inodes.
        let inodes = limits.inodes.saturating_mul(16);
        let handles = limits.handles.saturating_mul(8);
        let words = inodes.saturating_add(handles).saturating_add(64 * CHUNK);
        Self::with(words.div_ceil(CHUNK), usize::from(limits.queues))
    }

    fn with(chunk_count: usize, queue_count: usize) -> Self {
        let queues = PAGE + 2 * FRONT;
        let journal_entries = queues + queue_count * QUEUE;
        let kinds = journal_entries + 2 * THREADS * WORDS;
        Self {
            queue_count,
            queues,
            journal_entries,
            kinds,
            chunks: (kinds + chunk_count).next_multiple_of(CHUNK),
            chunk_count,
        }
    }

    pub(super) fn words(&self) -> usize {
        self.chunks + self.chunk_count * CHUNK
    }

    /// What is used from the beginning: where, and how many words.
    pub(super) fn always_used(&self) -> impl Iterator<Item = (usize, usize)> {
        let head = (0, self.queues);
        let kinds = (self.kinds, self.chunk_count);
        // As many requests in flight as queues have entries, as a rule.
        let queues = (0..self.queue_count).map(|queue| (self.queues + queue * QUEUE, 1024 * 8));
        [head, kinds].into_iter().chain(queues)
    }

    pub(super) fn bytes(&self) -> u64 {
        (self.words() * WORD) as u64
    }

    fn check(&self) -> u64 {
        digest([
            MAGIC,
            VERSION,
            self.chunk_count as u64,
            self.queue_count as u64,
        ])
    }
}

/// Mixes a few words into one.
pub(super) fn digest(words: impl IntoIterator<Item = u64>) -> u64 {
    words.into_iter().fold(0x9e37_79b9_7f4a_7c15, |sum, word| {
        let product = (sum ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        product ^ product >> 32
    })
}

/// Writes the header of a new table.
pub(super) fn write(words: &SharedWords, layout: &Layout) {
    let parts = [
        (at::CHUNKS, layout.chunk_count as u64),
        (at::QUEUES, layout.queue_count as u64),
        (at::CHECK, layout.check()),
        (at::NODES, 2),
        (at::HANDLES, 1),
        (at::VERSION, VERSION),
        // Last: without it, it is no table.
        (at::MAGIC, MAGIC),
    ];
    for (at, value) in parts {
        if let Some(word) = words.get(at) {
            word.store(value, Ordering::Release);
        }
    }
}

/// Reads the header of what is in `file`, which has `found` bytes.
pub(super) fn read(file: &OwnedFd, found: u64) -> Result<Layout, StateError> {
    let mut bytes = [0; (at::CHECK + 1) * WORD];
    let len = rustix::io::pread(file.as_fd(), &mut bytes, 0).map_err(StateError::Length)?;
    let word = |at: usize| {
        let bytes = bytes.get(at * WORD..(at + 1) * WORD);
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u64::from_ne_bytes)
    };
    if len < bytes.len() || word(at::MAGIC) != MAGIC {
        return Err(StateError::Foreign);
    }
    if word(at::VERSION) != VERSION {
        return Err(StateError::Version {
            found: word(at::VERSION),
            known: VERSION,
        });
    }
    let damaged = |what, at| StateError::Damaged { what, at };
    let (chunks, queues) = (word(at::CHUNKS), word(at::QUEUES));
    // More than any file can be long.
    if chunks > 1 << 32 || queues > 1 << 16 {
        return Err(damaged("the sizes in its header", at::CHUNKS));
    }
    let count = |count| usize::try_from(count).map_err(|_large| StateError::Map(Errno::NOMEM));
    let layout = Layout::with(count(chunks)?, count(queues)?);
    if layout.check() != word(at::CHECK) {
        return Err(damaged("the sum of its header", at::CHECK));
    }
    let wanted = layout.bytes();
    if found < wanted {
        return Err(StateError::Cut { found, wanted });
    }
    Ok(layout)
}

/// How many node ids and handles are taken out of the table at once: so that it isn't written to
/// for each.
const NUMBERS: u64 = 1 << 12;

impl Table {
    /// Node ids that were never given out: the first, and how many from there on.
    pub fn more_nodes(&self) -> (u64, u64) {
        self.more(at::NODES)
    }

    /// Handles that were never given out: the first, and how many from there on.
    pub fn more_handles(&self) -> (u64, u64) {
        self.more(at::HANDLES)
    }

    fn more(&self, at: usize) -> (u64, u64) {
        let first = self.word(at).fetch_add(NUMBERS, Ordering::AcqRel);
        (first, NUMBERS)
    }

    /// Node ids below were given out, or are as good as.
    #[must_use]
    pub fn nodes_given_out(&self) -> u64 {
        self.load(at::NODES)
    }

    /// Handles below were given out, or are as good as.
    #[must_use]
    pub fn handles_given_out(&self) -> u64 {
        self.load(at::HANDLES)
    }

    /// Takes node ids below `node` for given out.
    pub fn skip_to_node(&self, node: u64) {
        self.word(at::NODES).fetch_max(node, Ordering::AcqRel);
    }

    /// Takes handles below `handle` for given out.
    pub fn skip_to_handle(&self, handle: u64) {
        self.word(at::HANDLES).fetch_max(handle, Ordering::AcqRel);
    }

    pub(super) fn half_in_use(&self) -> usize {
        usize::from(self.load(at::HALF) == 1)
    }

    pub(super) fn use_half(&self, half: usize) {
        self.store(at::HALF, half as u64);
        self.half.store(half, Ordering::Relaxed);
    }

    /// What handles of one table are told from those of another by; 0 until it is set.
    pub fn generation(&self) -> u64 {
        self.load(at::GENERATION)
    }

    /// Sets it.
    pub fn set_generation(&self, generation: u64) {
        self.store(at::GENERATION, generation);
    }

    /// What was agreed on with the guest, while there is a session.
    pub fn agreement(&self) -> Option<Agreement> {
        let first = agreement_at(self.load(at::AGREED))?;
        Some(std::array::from_fn(|n| self.load(first + n)))
    }

    /// Remembers what was agreed on, or that nothing is any more. Not to be called by two at once.
    pub fn set_agreement(&self, agreement: Option<Agreement>) {
        let Some(agreement) = agreement else {
            self.store(at::AGREED, 0);
            return;
        };
        let other = 1 + self.load(at::AGREED) % 2;
        if let Some(first) = agreement_at(other) {
            for (n, word) in agreement.into_iter().enumerate() {
                self.store(first + n, word);
            }
        }
        self.store(at::AGREED, other);
    }

    /// The most bytes that the front end's part may have.
    pub const MOST_FRONT: usize = (FRONT - 2) * WORD;

    /// What the front end has said, as `front` wrote it down.
    #[must_use]
    pub fn front(&self) -> Option<Vec<u8>> {
        let first = front_at(self.load(at::FRONT))?;
        let len = usize::try_from(self.load(first)).ok()?;
        if len > Self::MOST_FRONT {
            return None;
        }
        let words = (0..len.div_ceil(WORD)).map(|n| self.load(first + 2 + n));
        let bytes: Vec<u8> = words.clone().flat_map(u64::to_le_bytes).take(len).collect();
        (digest(words) == self.load(first + 1)).then_some(bytes)
    }

    /// Remembers what the front end has said; with no bytes, that there is none. Whoever reads
    /// finds all of it, or all of what was there before. Not to be called by two at once.
    pub fn set_front(&self, bytes: &[u8]) {
        if bytes.is_empty() || bytes.len() > Self::MOST_FRONT {
            self.store(at::FRONT, 0);
            return;
        }
        let other = 1 + self.load(at::FRONT) % 2;
        let Some(first) = front_at(other) else {
            return;
        };
        let words = bytes.chunks(WORD).map(|chunk| {
            let mut word = [0; WORD];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_le_bytes(word)
        });
        self.store(first, bytes.len() as u64);
        self.store(first + 1, digest(words.clone()));
        for (n, word) in words.enumerate() {
            self.store(first + 2 + n, word);
        }
        self.store(at::FRONT, other);
    }

    /// Whether a process of this server has told launchers that a VMM can connect.
    #[must_use]
    pub fn is_announced(&self) -> bool {
        self.load(at::ANNOUNCED) == 1
    }

    /// One has.
    pub fn set_announced(&self) {
        self.store(at::ANNOUNCED, 1);
    }

    /// How much was sent of the reply that stands in the front end's part. Not to be used by two at
    /// once.
    pub(crate) fn receipt(&self) -> Option<Receipt<'_>> {
        Receipt::new(self.words.get_some(at::RECEIPT, Receipt::WORDS)?)
    }

    /// Whether there is something to go on from: a guest's session, or a front end's.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.agreement().is_some() || self.front().is_some()
    }

    /// How many queues it has room for.
    #[must_use]
    pub fn queue_count(&self) -> usize {
        self.layout.queue_count
    }

    /// The words of queue `index`, [`QueuePart::WORDS`] of them, 0 in a new table. `None` if the
    /// table has been made for fewer queues.
    #[must_use]
    pub fn queue(self: &Arc<Self>, index: u16) -> Option<QueuePart> {
        let index = usize::from(index);
        (index < self.layout.queue_count).then(|| QueuePart {
            table: Arc::clone(self),
            first: self.layout.queues + index * QUEUE,
        })
    }
}

/// The part of the table that belongs to one queue: what is in flight, and what became of it.
#[derive(Clone, Debug)]
pub struct QueuePart {
    table: Arc<Table>,
    first: usize,
}

impl QueuePart {
    /// How many words it has.
    pub const WORDS: usize = QUEUE;

    /// One of its words; `None` beyond the last.
    #[inline]
    #[must_use]
    pub fn word(&self, at: usize) -> Option<&AtomicU64> {
        if at >= QUEUE {
            return None;
        }
        self.table.words.get(self.first + at)
    }

    /// The `count` words from `at` on; `None` if they reach beyond the last.
    #[inline]
    #[must_use]
    pub fn words(&self, at: usize, count: usize) -> Option<&[AtomicU64]> {
        if at.checked_add(count).is_none_or(|end| end > QUEUE) {
            return None;
        }
        self.table.words.get_some(self.first + at, count)
    }
}

fn agreement_at(which: u64) -> Option<usize> {
    match which {
        1 => Some(at::AGREEMENTS),
        2 => Some(at::AGREEMENTS + 8),
        _ => None,
    }
}

fn front_at(which: u64) -> Option<usize> {
    match which {
        1 => Some(PAGE),
        2 => Some(PAGE + FRONT),
        _ => None,
    }
}
