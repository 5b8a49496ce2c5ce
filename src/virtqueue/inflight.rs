//! What is in flight, in memory that outlives the process (vhost-user specification, "Inflight I/O
//! tracking").
//!
//! An [`InflightRegion`] is what a front end keeps for its back ends; each queue has an
//! [`InflightPart`] of it, or one in the server's own memory, of the same layout. Where a server
//! ends, however it does, the next one finds there which heads had been taken off the available
//! ring and not been returned, and in what order. The invariant: after each store, the used ring's
//! index and the part together say for every head that was taken whether it has been returned.
//!
//! In words of 64 bits a part is: its features; version, entries, head of the last batch and used
//! index, 16 bits each; then for each head a word with the mark in its low byte and the link to
//! the one before it in the batch in its top 16 bits, and a word that counts.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::QueueIndex;
use super::layout;
use super::memory::{Mapping, MemoryError, MemoryLostEvent};
use super::shared_words::Words;
use crate::state::QueuePart;

#[cfg(test)]
#[allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    reason = "tests may fail by panicking"
)]
mod tests;

/// The version of the layout; 0 is a part that was never used.
const VERSION: u16 = 1;

/// Where the words of a part are.
const FEATURES: usize = 0;
const STATE: usize = 1;
const ENTRIES: usize = 2;

/// Names no head: a batch's list ends here at the latest. Only lists behind what a faulty driver
/// made available are ended.
const NONE: u16 = u16::MAX;

/// What can be wrong with a region.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// It can't be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It can't be made.
    #[error("making {len:#x} bytes for what is in flight")]
    Create {
        /// Its length in bytes.
        len: u64,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Queues of an impossible size.
    #[error("what is in flight of {queues} queues of {size} entries can't be kept")]
    Shape {
        /// How many queues.
        queues: u16,
        /// How many entries each.
        size: u16,
    },
    /// It is too short for the queues that it is said to be of.
    #[error("{len:#x} bytes for what is in flight, where the queues take {wanted:#x}")]
    Short {
        /// Bytes that it has.
        len: u64,
        /// Bytes that are needed.
        wanted: u64,
    },
    /// Not the layout that is known here.
    #[error("what is in flight is in version {version}, with features {features:#x}")]
    Version {
        /// What it says.
        version: u16,
        /// What it says.
        features: u64,
    },
    /// It is of a queue of another size.
    #[error("what is in flight is of a queue of {found} entries, where it has {wanted}")]
    Entries {
        /// What it says.
        found: u16,
        /// What was handed over with it.
        wanted: u16,
    },
    /// A head is in flight that the queue doesn't have.
    #[error("head {head} is said to be in flight, of a queue with {size} entries")]
    Head {
        /// Which.
        head: u16,
        /// The queue's size.
        size: u16,
    },
}

/// What a front end keeps of all queues, mapped.
#[derive(Clone, Debug)]
pub struct InflightRegion {
    mapping: Arc<Mapping>,
    queues: u16,
    size: u16,
}

impl InflightRegion {
    /// What an [`MemoryLostEvent`] calls the first byte of a region that is gone.
    pub const GONE: u64 = u64::MAX - (1 << 40);

    /// Makes a file for a region for `queues` queues of `size` entries each, empty, which nobody
    /// can shorten; answers how long it is, too.
    ///
    /// # Errors
    ///
    /// Queues can't be of that size, or there is no memory.
    pub fn create(queues: u16, size: u16) -> Result<(File, u64), InflightError> {
        use rustix::fs::{MemfdFlags, SealFlags};
        let len = region_len(queues, size)?;
        let fail = |source: rustix::io::Errno| InflightError::Create {
            len,
            source: source.into(),
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create(c"ringfsd-inflight", flags).map_err(fail)?;
        rustix::fs::ftruncate(&file, len).map_err(fail)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        if let Err(error) = rustix::fs::fcntl_add_seals(&file, seals) {
            log::debug!("what is in flight can be truncated by the front end: {error}");
        }
        Ok((file.into(), len))
    }

    /// Maps the region of `queues` queues of `size` entries each that is `len` bytes of `file` from
    /// `offset` on. `alarm` tells [`GONE`](Self::GONE) should the file be truncated later.
    ///
    /// # Errors
    ///
    /// It is too short, or the file is, or can't be mapped.
    pub fn map(
        file: File,
        (offset, len): (u64, u64),
        (queues, size): (u16, u16),
        alarm: &Arc<MemoryLostEvent>,
    ) -> Result<Self, InflightError> {
        let wanted = region_len(queues, size)?;
        if len < wanted {
            return Err(InflightError::Short { len, wanted });
        }
        let bytes =
            usize::try_from(wanted).map_err(|_wide| InflightError::Shape { queues, size })?;
        let mapping = Mapping::of_words(file, offset, bytes, Self::GONE, alarm)?;
        Ok(Self {
            mapping: Arc::new(mapping),
            queues,
            size,
        })
    }

    /// What is mapped: the file, where in it the region begins, and how long it is.
    #[must_use]
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64, u64)> {
        let (file, offset) = self.mapping.file()?;
        Some((file, offset, region_len(self.queues, self.size).ok()?))
    }

    /// For how many queues it is, of how many entries each.
    #[must_use]
    pub fn shape(&self) -> (u16, u16) {
        (self.queues, self.size)
    }

    /// The part of a queue; `None` if the region is for fewer queues.
    #[must_use]
    pub fn part(&self, queue: QueueIndex) -> Option<InflightPart> {
        if queue.0 >= self.queues {
            return None;
        }
        let words = part_words(self.size);
        let first = words.checked_mul(usize::from(queue.0))?;
        Some(InflightPart {
            words: Words::handed(Arc::clone(&self.mapping), first, words),
            entries: self.size,
            kept: false,
        })
    }
}

/// Words of a part of `size` entries: whole lines of a processor's cache, as in other back ends.
#[allow(clippy::arithmetic_side_effects, reason = "of a number of 16 bits")]
fn part_words(size: u16) -> usize {
    (ENTRIES + 2 * usize::from(size)).next_multiple_of(8)
}

fn region_len(queues: u16, size: u16) -> Result<u64, InflightError> {
    if queues == 0 || size == 0 || size > layout::MAX_SIZE {
        return Err(InflightError::Shape { queues, size });
    }
    let len = (part_words(size) as u64).saturating_mul(8);
    Ok(len.saturating_mul(u64::from(queues)))
}

/// Where one queue's heads in flight are marked.
#[derive(Clone, Debug)]
pub struct InflightPart {
    words: Words,
    /// Heads that there is room for.
    entries: u16,
    /// Nobody else has it.
    kept: bool,
}

/// A head that was in flight as its server ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resumed {
    pub(super) head: u16,
    pub(super) counter: u64,
}

/// What was found in a part.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) inflight: Inflight,
    /// The heads in flight, in the order in which they were taken. `None` if the part has no past
    /// that belongs to the rings.
    pub(super) past: Option<Vec<Resumed>>,
}

impl InflightPart {
    /// Where the part begins in what is kept of a queue.
    const FIRST: usize = super::Journal::WORDS;

    /// The part that is in the words of a queue, of the server's own memory.
    #[must_use]
    pub fn kept(part: QueuePart) -> Self {
        Self {
            words: Words::kept(part, Self::FIRST, part_words(layout::MAX_SIZE)),
            entries: layout::MAX_SIZE,
            kept: true,
        }
    }

    /// Forgets all that is in flight. For a queue that does not run and whose guest was reset.
    pub fn clear(&self) {
        self.words.store(STATE, 0);
    }

    /// Heads that there is room for.
    pub(super) fn entries(&self) -> u16 {
        self.entries
    }

    /// Finds what is in flight of a queue of `size` entries, whose used ring's index is `used` and
    /// whose available ring's is `available`.
    ///
    /// # Errors
    ///
    /// The part is of something else, or was damaged.
    pub(super) fn recover(
        self,
        size: u16,
        used: u16,
        available: u16,
    ) -> Result<Found, InflightError> {
        let state = State::parse(self.words.load(STATE));
        let features = self.words.load(FEATURES);
        if state.version == 0 {
            return Ok(self.reset(size, used));
        }
        if state.version != VERSION || features != 0 {
            let version = state.version;
            return Err(InflightError::Version { version, features });
        }
        let wanted = self.in_use(size);
        if state.entries != wanted {
            if self.kept {
                // A ring of another size is another driver's.
                return Ok(self.reset(size, used));
            }
            let found = state.entries;
            return Err(InflightError::Entries { found, wanted });
        }
        let mut inflight = Inflight {
            part: self,
            state,
            counter: 0,
            batch: Vec::new(),
        };
        let last_batch = used.wrapping_sub(state.used);
        if last_batch <= size {
            inflight.end_last_batch(last_batch, used);
        }
        let heads = inflight.marked(size)?;
        if last_batch > size || heads.len() > usize::from(available.wrapping_sub(used)) {
            // Not those rings: their driver was reset, or it has written to what isn't its own.
            if !heads.is_empty() {
                log::warn!(
                    "{} requests were in flight, and the rings (available {available}, used \
                     {used}) are not those of that time: they are forgotten",
                    heads.len()
                );
            }
            return Ok(inflight.part.reset(size, used));
        }
        inflight.batch.reserve(usize::from(size));
        Ok(Found {
            inflight,
            past: Some(heads),
        })
    }

    /// The number of entries that stands in a part for a queue of `size`.
    fn in_use(&self, size: u16) -> u16 {
        if self.kept { size } else { self.entries }
    }

    /// Makes the part that of a queue with nothing in flight.
    fn reset(self, size: u16, used: u16) -> Found {
        // First, so that no half of the marks is ever taken for the whole.
        self.words.store(STATE, 0);
        self.words.store(FEATURES, 0);
        let entries = self.in_use(size);
        for head in 0..entries {
            // To look at memory costs less than to write to it, where it may be a hole.
            if self.words.load(entry(head)) != 0 {
                self.words.store(entry(head), 0);
            }
        }
        let state = State {
            version: VERSION,
            entries,
            last: NONE,
            used,
        };
        self.words.store(STATE, state.word());
        Found {
            inflight: Inflight {
                part: self,
                state,
                counter: 0,
                batch: Vec::with_capacity(usize::from(size)),
            },
            past: None,
        }
    }
}

/// The part of a queue that runs; whoever changes it holds the used ring's lock.
#[derive(Debug)]
pub(super) struct Inflight {
    part: InflightPart,
    /// As it stands in the part.
    state: State,
    /// Heads taken so far.
    counter: u64,
    /// What was linked since the used index was last shown.
    batch: Vec<u16>,
}

impl Inflight {
    /// Takes the marks off the last `count` heads that were linked: the guest has them back.
    fn end_last_batch(&mut self, count: u16, used: u16) {
        let mut head = self.state.last;
        for _ in 0..count {
            if head >= self.part.entries {
                break;
            }
            let word = self.part.words.load(entry(head));
            self.unmark(head);
            head = link_of(word);
        }
        if count != 0 {
            self.set_used(used);
        }
    }

    /// The heads that are marked, in the order in which they were taken. Goes on counting where
    /// that ended.
    fn marked(&mut self, size: u16) -> Result<Vec<Resumed>, InflightError> {
        let mut heads = Vec::new();
        for head in 0..self.state.entries {
            let counter = self.part.words.load(counter_of(head));
            // Also of those that are back: no taking is ever counted like one before.
            self.counter = self.counter.max(counter.wrapping_add(1));
            if is_marked(self.part.words.load(entry(head))) {
                if head >= size {
                    return Err(InflightError::Head { head, size });
                }
                heads.push(Resumed { head, counter });
            }
        }
        heads.sort_by_key(|resumed| resumed.counter);
        Ok(heads)
    }

    /// Whether the head may be taken: there is an entry for it, and it is not in flight.
    pub(super) fn is_free(&self, head: u16) -> bool {
        head < self.part.entries && !is_marked(self.part.words.load(entry(head)))
    }

    /// What the next head to be marked counts as.
    pub(super) fn counter(&self) -> u64 {
        self.counter
    }

    /// Marks a head as in flight.
    pub(super) fn mark(&mut self, head: u16) {
        self.part.words.store(counter_of(head), self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.part.words.store(entry(head), MARK);
    }

    /// Links a head to the batch that is shown to the guest next.
    pub(super) fn link(&mut self, head: u16) {
        let word = MARK | u64::from(self.state.last) << LINK;
        self.part.words.store(entry(head), word);
        self.state.last = head;
        self.part.words.store(STATE, self.state.word());
        self.batch.push(head);
    }

    /// Ends the list: what follows is something that has no entry, or whose entry is another's.
    /// The batch before has been shown.
    pub(super) fn cut(&mut self) {
        self.state.last = NONE;
        self.part.words.store(STATE, self.state.word());
    }

    /// The guest has been shown all that was linked: the used index is `used`.
    pub(super) fn shown(&mut self, used: u16) {
        while let Some(head) = self.batch.pop() {
            self.unmark(head);
        }
        self.set_used(used);
    }

    /// Takes the mark off; the link stays, for who has to go through the batch once more.
    fn unmark(&self, head: u16) {
        let word = self.part.words.load(entry(head));
        self.part.words.store(entry(head), word & !MARKS);
    }

    fn set_used(&mut self, used: u16) {
        self.state.used = used;
        self.part.words.store(STATE, self.state.word());
    }
}

/// The second word of a part.
#[derive(Clone, Copy, Debug)]
struct State {
    version: u16,
    entries: u16,
    /// Head of the list of the last batch.
    last: u16,
    /// The used ring's index, as it was when the last batch's marks had been taken off.
    used: u16,
}

impl State {
    fn parse(word: u64) -> Self {
        let [v0, v1, e0, e1, l0, l1, u0, u1] = word.to_le_bytes();
        Self {
            version: u16::from_le_bytes([v0, v1]),
            entries: u16::from_le_bytes([e0, e1]),
            last: u16::from_le_bytes([l0, l1]),
            used: u16::from_le_bytes([u0, u1]),
        }
    }

    fn word(self) -> u64 {
        u64::from(self.version)
            | u64::from(self.entries) << 16
            | u64::from(self.last) << 32
            | u64::from(self.used) << 48
    }
}

const MARK: u64 = 1;
const MARKS: u64 = 0xff;
const LINK: u32 = 48;

fn is_marked(word: u64) -> bool {
    word & MARKS != 0
}

fn link_of(word: u64) -> u16 {
    let [.., low, high] = word.to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// Where the word with the mark of a head is.
#[allow(clippy::arithmetic_side_effects, reason = "a head has 16 bits")]
fn entry(head: u16) -> usize {
    ENTRIES + 2 * usize::from(head)
}

/// Where the word is that a head was counted with.
#[allow(clippy::arithmetic_side_effects, reason = "a head has 16 bits")]
fn counter_of(head: u16) -> usize {
    ENTRIES + 2 * usize::from(head) + 1
}
