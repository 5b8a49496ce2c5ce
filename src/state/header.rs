//! The header of the state table (its first page): layout, counters and the negotiated parameters;
//! and the block that holds the front end's session.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

use super::{StateError, Table};
use crate::sys::receipt::Receipt;
use crate::sys::shared::{MappedWords, WORD};

/// Words of a chunk: 64 KiB.
pub(super) const CHUNK: usize = 8192;

/// Maximum number of threads of a process that have a journal.
pub(super) const THREADS: usize = 256;

/// Words of a thread's journal: as many notes as a directory listing can need, and a whole number
/// of pages.
pub(super) const WORDS: usize = 8192;

/// The first word of a table.
const MAGIC: u64 = u64::from_le_bytes(*b"ringfsd\0");
/// The version that this program writes and reads. Any change of position or meaning requires
/// another one.
pub(super) const VERSION: u64 = 1;

/// Words of a page: memory is returned to the system in whole pages.
const PAGE: usize = 512;

/// Positions of the words of the header.
mod at {
    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION: usize = 1;
    pub(super) const CHUNKS: usize = 2;
    pub(super) const QUEUES: usize = 3;
    /// Digest of the four words before.
    pub(super) const CHECK: usize = 4;
    /// Node ids below this one are used.
    pub(super) const NODES: usize = 8;
    /// Handles below this one are used.
    pub(super) const HANDLES: usize = 9;
    pub(super) const GENERATION: usize = 10;
    /// The half of the thread journals that is in use: 0 or 1.
    pub(super) const HALF: usize = 11;
    /// Whether the log line that a VMM can connect was written: 0 or 1.
    pub(super) const ANNOUNCED: usize = 12;
    /// The valid one of the front end's two blocks: 1 or 2, or 0 for none.
    pub(super) const SNAPSHOT: usize = 16;
    /// The valid one of the two agreements.
    pub(super) const AGREED: usize = 24;
    pub(super) const AGREEMENTS: usize = 32;
    /// How much of the reply to the front end was sent.
    pub(super) const RECEIPT: usize = 56;
    /// The valid one of the two blocks of the guest's limits: 1 or 2, or 0 for none. 0 in a table of
    /// a program that knows none.
    pub(super) const LIMITED: usize = 64;
    pub(super) const GUEST_LIMITS: usize = 72;
    /// The valid one of the two texts of log levels: 1 or 2, or 0 for none. 0 in a table of a
    /// program that knows none.
    pub(super) const LOGGED: usize = 104;
    pub(super) const LOG_LEVELS: usize = 128;
}

/// Words of each of the two texts of log levels: the length in bytes, and the bytes.
const LOG_LEVELS: usize = 128;

/// The negotiated parameters, as `fuse` encodes them.
pub(crate) type Agreement = [u64; 8];

/// The limits of a guest that were set while it was served, as `limits` encodes them.
pub(crate) type GuestLimits = [u64; 14];

/// Words of each of the front end's two blocks.
const SNAPSHOT: usize = 16 * 1024;

/// Words for each queue: the requests in flight and their results.
const QUEUE: usize = 1 << 19;

/// The capacity of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Maximum number of inodes.
    pub inodes: usize,
    /// Maximum number of open files and lock owners together.
    pub handles: usize,
    /// Queues of the device.
    pub queues: u16,
}

impl Limits {
    /// The length of the table's file, most of which is holes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        Layout::of(self).bytes()
    }
}

/// Positions of the parts of a table, in words from its start.
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
        // A record, and the same again for its name and file handle, or twice as much with one of
        // the longest names. A guest whose names are all long can know fewer inodes.
        let inodes = limits.inodes.saturating_mul(16);
        let handles = limits.handles.saturating_mul(8);
        let words = inodes.saturating_add(handles).saturating_add(64 * CHUNK);
        Self::with(words.div_ceil(CHUNK), usize::from(limits.queues))
    }

    fn with(chunk_count: usize, queue_count: usize) -> Self {
        let queues = PAGE + 2 * SNAPSHOT;
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

    /// The ranges that are always used: position and number of words.
    pub(super) fn always_used(&self) -> impl Iterator<Item = (usize, usize)> {
        let head = (0, self.queues);
        let kinds = (self.kinds, self.chunk_count);
        // Room for as many requests in flight as queues usually have entries.
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

/// A digest of some words.
pub(super) fn digest(words: impl IntoIterator<Item = u64>) -> u64 {
    words.into_iter().fold(0x9e37_79b9_7f4a_7c15, |sum, word| {
        let product = (sum ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        product ^ product >> 32
    })
}

/// Writes the header of a new table.
pub(super) fn write(words: &MappedWords, layout: &Layout) {
    let parts = [
        (at::CHUNKS, layout.chunk_count as u64),
        (at::QUEUES, layout.queue_count as u64),
        (at::CHECK, layout.check()),
        (at::NODES, 2),
        (at::HANDLES, 1),
        (at::VERSION, VERSION),
        // Last, because only this word makes it a table.
        (at::MAGIC, MAGIC),
    ];
    for (at, value) in parts {
        if let Some(word) = words.get(at) {
            word.store(value, Ordering::Release);
        }
    }
}

/// Reads the header of `file`, which has `found` bytes.
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
    // More than the longest file could hold.
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
        return Err(StateError::Truncated { found, wanted });
    }
    Ok(layout)
}

/// How many node ids and handles are reserved at once, so that the table isn't written for each.
const RESERVED_NUMBERS: u64 = 1 << 12;

impl Table {
    /// Reserves unused node ids: the first, and their number.
    pub fn more_nodes(&self) -> (u64, u64) {
        self.reserve_numbers(at::NODES)
    }

    /// Reserves unused handles: the first, and their number.
    pub fn more_handles(&self) -> (u64, u64) {
        self.reserve_numbers(at::HANDLES)
    }

    fn reserve_numbers(&self, at: usize) -> (u64, u64) {
        let first = self.word(at).fetch_add(RESERVED_NUMBERS, Ordering::AcqRel);
        (first, RESERVED_NUMBERS)
    }

    /// Node ids below this one are used or reserved.
    #[must_use]
    pub fn nodes_given_out(&self) -> u64 {
        self.load(at::NODES)
    }

    /// Handles below this one are used or reserved.
    #[must_use]
    pub fn handles_given_out(&self) -> u64 {
        self.load(at::HANDLES)
    }

    /// Marks node ids below `node` as used.
    pub fn skip_to_node(&self, node: u64) {
        self.word(at::NODES).fetch_max(node, Ordering::AcqRel);
    }

    /// Marks handles below `handle` as used.
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

    /// A number that distinguishes this table's handles from those of other tables; 0 until it is
    /// set.
    pub fn generation(&self) -> u64 {
        self.load(at::GENERATION)
    }

    /// Sets the generation.
    pub fn set_generation(&self, generation: u64) {
        self.store(at::GENERATION, generation);
    }

    /// The negotiated parameters, while there is a session.
    pub fn agreement(&self) -> Option<Agreement> {
        let first = agreement_at(self.load(at::AGREED))?;
        Some(std::array::from_fn(|n| self.load(first + n)))
    }

    /// Records the negotiated parameters, or that there are none any more. Must not be called
    /// concurrently.
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

    /// The guest's limits, if they were set while it was served.
    pub fn guest_limits(&self) -> Option<GuestLimits> {
        let first = guest_limits_at(self.load(at::LIMITED))?;
        Some(std::array::from_fn(|n| self.load(first + n)))
    }

    /// Records the guest's limits, or that those of the command line apply. Must not be called
    /// concurrently.
    pub fn set_guest_limits(&self, limits: Option<&GuestLimits>) {
        let Some(limits) = limits else {
            self.store(at::LIMITED, 0);
            return;
        };
        let other = 1 + self.load(at::LIMITED) % 2;
        if let Some(first) = guest_limits_at(other) {
            for (n, word) in limits.iter().enumerate() {
                self.store(first + n, *word);
            }
        }
        self.store(at::LIMITED, other);
    }

    /// Maximum length of the text of log levels, bytes.
    pub const MAX_LOG_LEVELS_LEN: usize = (LOG_LEVELS - 1) * WORD;

    /// The log levels that were set while the server ran, as `logging` shows them, if there are
    /// any.
    #[must_use]
    pub fn log_levels(&self) -> Option<String> {
        let first = log_levels_at(self.load(at::LOGGED))?;
        let len = usize::try_from(self.load(first)).ok()?;
        if len > Self::MAX_LOG_LEVELS_LEN {
            return None;
        }
        let words = (first + 1..).take(len.div_ceil(WORD));
        let mut bytes: Vec<u8> = words.flat_map(|at| self.load(at).to_le_bytes()).collect();
        bytes.truncate(len);
        String::from_utf8(bytes).ok()
    }

    /// Records the log levels, or that those of the command line apply. Returns whether there is
    /// room for them. Must not be called concurrently.
    pub fn set_log_levels(&self, levels: Option<&str>) -> bool {
        let Some(levels) = levels else {
            self.store(at::LOGGED, 0);
            return true;
        };
        let other = 1 + self.load(at::LOGGED) % 2;
        let Some(first) = log_levels_at(other).filter(|_| levels.len() <= Self::MAX_LOG_LEVELS_LEN)
        else {
            return false;
        };
        self.store(first, levels.len() as u64);
        for (at, part) in (first + 1..).zip(levels.as_bytes().chunks(WORD)) {
            let mut word = [0; WORD];
            word.iter_mut().zip(part).for_each(|(to, from)| *to = *from);
            self.store(at, u64::from_le_bytes(word));
        }
        self.store(at::LOGGED, other);
        true
    }

    /// Maximum length of the front end's session, bytes.
    pub const MAX_SNAPSHOT_LEN: usize = (SNAPSHOT - 2) * WORD;

    /// The front end's session, as `vhost_user` encoded it.
    #[must_use]
    pub fn session_snapshot(&self) -> Option<Vec<u8>> {
        let first = snapshot_at(self.load(at::SNAPSHOT))?;
        let len = usize::try_from(self.load(first)).ok()?;
        if len > Self::MAX_SNAPSHOT_LEN {
            return None;
        }
        let words = (0..len.div_ceil(WORD)).map(|n| self.load(first + 2 + n));
        let bytes: Vec<u8> = words.clone().flat_map(u64::to_le_bytes).take(len).collect();
        (digest(words) == self.load(first + 1)).then_some(bytes)
    }

    /// Records the front end's session; empty bytes mean that there is none. A reader finds either
    /// all of it, or all of the previous one. Must not be called concurrently.
    pub fn set_session_snapshot(&self, bytes: &[u8]) {
        if bytes.is_empty() || bytes.len() > Self::MAX_SNAPSHOT_LEN {
            self.store(at::SNAPSHOT, 0);
            return;
        }
        let other = 1 + self.load(at::SNAPSHOT) % 2;
        let Some(first) = snapshot_at(other) else {
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
        self.store(at::SNAPSHOT, other);
    }

    /// Whether a process of this server has announced that a VMM can connect.
    #[must_use]
    pub fn is_announced(&self) -> bool {
        self.load(at::ANNOUNCED) == 1
    }

    /// Records that this was announced.
    pub fn set_announced(&self) {
        self.store(at::ANNOUNCED, 1);
    }

    /// How much was sent of the reply in the front end's session. Must not be used concurrently.
    pub(crate) fn receipt(&self) -> Option<Receipt<'_>> {
        Receipt::new(self.words.get_some(at::RECEIPT, Receipt::WORDS)?)
    }

    /// Whether there is a session to resume: a guest's, or a front end's.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.agreement().is_some() || self.session_snapshot().is_some()
    }

    /// The number of queues that the table has space for.
    #[must_use]
    pub fn queue_count(&self) -> usize {
        self.layout.queue_count
    }

    /// The words of queue `index`, [`QueuePart::WORDS`] of them; they are 0 in a new table. `None`
    /// if the table was made for fewer queues.
    #[must_use]
    pub fn queue(self: &Arc<Self>, index: u16) -> Option<QueuePart> {
        let index = usize::from(index);
        (index < self.layout.queue_count).then(|| QueuePart {
            table: Arc::clone(self),
            first: self.layout.queues + index * QUEUE,
        })
    }
}

/// The part of the table that belongs to one queue: the requests in flight and their results.
#[derive(Clone, Debug)]
pub struct QueuePart {
    table: Arc<Table>,
    first: usize,
}

impl QueuePart {
    /// The number of words.
    pub const WORDS: usize = QUEUE;

    /// One word; `None` beyond the last.
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

fn agreement_at(half: u64) -> Option<usize> {
    match half {
        1 => Some(at::AGREEMENTS),
        2 => Some(at::AGREEMENTS + 8),
        _ => None,
    }
}

fn guest_limits_at(half: u64) -> Option<usize> {
    match half {
        1 => Some(at::GUEST_LIMITS),
        2 => Some(at::GUEST_LIMITS + 16),
        _ => None,
    }
}

fn log_levels_at(half: u64) -> Option<usize> {
    match half {
        1 => Some(at::LOG_LEVELS),
        2 => Some(at::LOG_LEVELS + LOG_LEVELS),
        _ => None,
    }
}

fn snapshot_at(half: u64) -> Option<usize> {
    match half {
        1 => Some(PAGE),
        2 => Some(PAGE + SNAPSHOT),
        _ => None,
    }
}
