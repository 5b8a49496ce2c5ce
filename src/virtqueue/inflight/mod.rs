//! Tracks the heads in flight in memory that outlives the process (vhost-user specification,
//! "Inflight I/O tracking").
//!
//! An [`InflightRegion`] is memory that a front end keeps for its back ends. Each queue has an
//! [`InflightPart`] of it, or one with the same layout in the server's state table. When a server
//! process ends, for whatever reason, the next one finds there which heads were taken off the
//! available ring and not returned, and in which order. The invariant: after each store, the index
//! of the used ring and the part together say for every head that was taken whether it was
//! returned.
//!
//! A part consists of 64-bit words: its features; then version, number of entries, head of the last
//! batch and used index, with 16 bits each; then two words for each head. The first of these has
//! the mark in its low byte and the link to the previous head of the batch in its top 16 bits; the
//! second is a counter.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::QueueIndex;
use super::layout;
use super::shared_words::SharedWords;
use crate::guest_memory::{Mapping, MemoryError, MemoryLostEvent};
use crate::state::QueuePart;

#[cfg(test)]
#[allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    reason = "tests may fail by panicking"
)]
mod tests;

/// The version of the layout; 0 marks a part that was never used.
const VERSION: u16 = 1;

/// Positions of the words in a part.
const FEATURES: usize = 0;
const STATE: usize = 1;
const ENTRIES: usize = 2;

/// Ends a batch's list. Only lists that follow a chain of a faulty driver are ended by it: in all
/// others the used index says how many heads the last batch has.
const NONE: u16 = u16::MAX;

/// Why an in-flight region can't be used.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// It can't be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It can't be created.
    #[error("creating an in-flight region of {len:#x} bytes")]
    Create {
        /// Its length in bytes.
        len: u64,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The number or the size of the queues is invalid.
    #[error("there can't be an in-flight region for {queues} queues of {size} entries")]
    Shape {
        /// The number of queues.
        queues: u16,
        /// The number of entries of each.
        size: u16,
    },
    /// It is too short for its queues.
    #[error("the in-flight region has {len:#x} bytes, and its queues need {wanted:#x}")]
    Short {
        /// Its length in bytes.
        len: u64,
        /// The length that the queues need.
        wanted: u64,
    },
    /// Its version or features are not supported.
    #[error("the in-flight region has the unsupported version {version} or features {features:#x}")]
    Version {
        /// The version in the region.
        version: u16,
        /// The features in the region.
        features: u64,
    },
    /// It belongs to a queue of another size.
    #[error("the in-flight region is of a queue of {found} entries instead of {wanted}")]
    Entries {
        /// The number in the region.
        found: u16,
        /// The number that the front end gave with the region.
        wanted: u16,
    },
    /// It marks a head that the queue doesn't have.
    #[error("the in-flight region marks head {head} of a queue with {size} entries")]
    Head {
        /// The head.
        head: u16,
        /// The queue's size.
        size: u16,
    },
}

/// A front end's in-flight region for all queues, mapped.
#[derive(Clone, Debug)]
pub(crate) struct InflightRegion {
    mapping: Arc<Mapping>,
    queues: u16,
    size: u16,
}

impl InflightRegion {
    /// The address by which a [`MemoryLostEvent`] reports the first byte of a lost region.
    pub(crate) const GONE: u64 = u64::MAX - (1 << 40);

    /// Creates a file for an empty region for `queues` queues of `size` entries each, sealed
    /// against truncation. Returns the file and its length.
    ///
    /// # Errors
    ///
    /// Fails if the number or size of the queues is invalid, or if there is no memory.
    pub(crate) fn create(queues: u16, size: u16) -> Result<(File, u64), InflightError> {
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
            log::debug!("the front end can truncate the in-flight region: {error}");
        }
        Ok((file.into(), len))
    }

    /// Maps the region of `queues` queues of `size` entries each that takes `len` bytes of `file`
    /// from `offset` on. If the file is truncated later, `memory_lost` reports [`GONE`](Self::GONE)
    /// plus the offset.
    ///
    /// # Errors
    ///
    /// Fails if `len` or the file is too short, or if the file can't be mapped.
    pub(crate) fn map(
        file: File,
        (offset, len): (u64, u64),
        (queues, size): (u16, u16),
        memory_lost: &Arc<MemoryLostEvent>,
    ) -> Result<Self, InflightError> {
        let wanted = region_len(queues, size)?;
        if len < wanted {
            return Err(InflightError::Short { len, wanted });
        }
        let bytes =
            usize::try_from(wanted).map_err(|_wide| InflightError::Shape { queues, size })?;
        let mapping = Mapping::map_words(file, offset, bytes, Self::GONE, memory_lost)?;
        Ok(Self {
            mapping: Arc::new(mapping),
            queues,
            size,
        })
    }

    /// Returns the mapped file, the offset of the region in it, and the region's length in bytes.
    #[must_use]
    pub(crate) fn file(&self) -> Option<(BorrowedFd<'_>, u64, u64)> {
        let (file, offset) = self.mapping.file()?;
        Some((file, offset, region_len(self.queues, self.size).ok()?))
    }

    /// Returns the number of queues and the number of entries of each.
    #[must_use]
    pub(crate) fn shape(&self) -> (u16, u16) {
        (self.queues, self.size)
    }

    /// Returns the part of a queue, or `None` if the region is for fewer queues.
    #[must_use]
    pub(crate) fn part(&self, queue: QueueIndex) -> Option<InflightPart> {
        if queue.0 >= self.queues {
            return None;
        }
        let words = part_words(self.size);
        let first = words.checked_mul(usize::from(queue.0))?;
        Some(InflightPart {
            words: SharedWords::in_mapping(Arc::clone(&self.mapping), first, words),
            entries: self.size,
            in_table: false,
        })
    }
}

/// Words of a part with `size` entries, rounded up to whole cache lines as in other back ends.
#[allow(clippy::arithmetic_side_effects, reason = "`size` has 16 bits")]
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

/// The marks of one queue's heads in flight.
#[derive(Clone, Debug)]
pub struct InflightPart {
    words: SharedWords,
    /// Heads that the part has room for.
    entries: u16,
    /// Whether it is in the state table, which no front end can access.
    in_table: bool,
}

/// A head that was in flight when its server ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resumed {
    pub(super) head: u16,
    pub(super) counter: u64,
}

/// The result of recovering a part.
#[derive(Debug)]
pub(super) struct Recovered {
    pub(super) inflight: Inflight,
    /// The heads in flight, in the order in which they were taken. `None` if the part recorded
    /// nothing about these rings.
    pub(super) heads: Option<Vec<Resumed>>,
}

impl InflightPart {
    /// First word of the part in a queue's part of the state table.
    const FIRST: usize = super::Journal::WORDS;

    /// The part in a queue's part of the state table.
    #[must_use]
    pub fn in_table(part: QueuePart) -> Self {
        Self {
            words: SharedWords::in_table(part, Self::FIRST, part_words(layout::MAX_SIZE)),
            entries: layout::MAX_SIZE,
            in_table: true,
        }
    }

    /// Clears all marks. Only for a queue that doesn't run and whose guest was reset.
    pub fn clear(&self) {
        self.words.store(STATE, 0);
    }

    /// Returns the number of heads that the part has room for.
    pub(super) fn entries(&self) -> u16 {
        self.entries
    }

    /// Recovers the heads in flight of a queue of `size` entries, the indexes of whose used and
    /// available ring are `used` and `available`.
    ///
    /// # Errors
    ///
    /// Fails if the part belongs to another queue or is damaged.
    pub(super) fn recover(
        self,
        size: u16,
        used: u16,
        available: u16,
    ) -> Result<Recovered, InflightError> {
        let state = State::parse(self.words.load(STATE));
        let features = self.words.load(FEATURES);
        if state.version == 0 {
            return Ok(self.reset(size, used));
        }
        if state.version != VERSION || features != 0 {
            let version = state.version;
            return Err(InflightError::Version { version, features });
        }
        let wanted = self.recorded_entries(size);
        if state.entries != wanted {
            if self.in_table {
                // The part recorded the ring of a previous driver.
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
            inflight.unmark_last_batch(last_batch, used);
        }
        let heads = inflight.marked(size)?;
        if last_batch > size || heads.len() > usize::from(available.wrapping_sub(used)) {
            // The part recorded other rings: the driver was reset, or it wrote to the device's
            // index.
            if !heads.is_empty() {
                log::warn!(
                    "discarding {} requests in flight, which don't match the rings (available \
                     {available}, used {used})",
                    heads.len()
                );
            }
            return Ok(inflight.part.reset(size, used));
        }
        inflight.batch.reserve(usize::from(size));
        Ok(Recovered {
            inflight,
            heads: Some(heads),
        })
    }

    /// The number of entries that the part records for a queue of `size`.
    fn recorded_entries(&self, size: u16) -> u16 {
        if self.in_table { size } else { self.entries }
    }

    /// Initializes the part for a queue with nothing in flight.
    fn reset(self, size: u16, used: u16) -> Recovered {
        // First, so that a partly initialized part is never taken for a valid one.
        self.words.store(STATE, 0);
        self.words.store(FEATURES, 0);
        let entries = self.recorded_entries(size);
        for head in 0..entries {
            // A load is cheaper than a store where the memory may be a hole in its file.
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
        Recovered {
            inflight: Inflight {
                part: self,
                state,
                counter: 0,
                batch: Vec::with_capacity(usize::from(size)),
            },
            heads: None,
        }
    }
}

/// The part of a running queue. Changes require the used ring's lock.
#[derive(Debug)]
pub(super) struct Inflight {
    part: InflightPart,
    /// A copy of the part's state word.
    state: State,
    /// Heads taken so far.
    counter: u64,
    /// Heads linked since the used index was last published.
    batch: Vec<u16>,
}

impl Inflight {
    /// Unmarks the last `count` heads that were linked, which the guest has got back.
    fn unmark_last_batch(&mut self, count: u16, used: u16) {
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

    /// Returns the marked heads, in the order in which they were taken. Continues the counter from
    /// the highest value in the part.
    fn marked(&mut self, size: u16) -> Result<Vec<Resumed>, InflightError> {
        let mut heads = Vec::new();
        for head in 0..self.state.entries {
            let counter = self.part.words.load(counter_of(head));
            // Includes heads that were returned, so that no counter is used twice.
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

    /// Whether the head may be taken: the part has an entry for it, and it is not in flight.
    pub(super) fn is_free(&self, head: u16) -> bool {
        head < self.part.entries && !is_marked(self.part.words.load(entry(head)))
    }

    /// Returns the counter of the next head to be marked.
    pub(super) fn counter(&self) -> u64 {
        self.counter
    }

    /// Marks a head as in flight.
    pub(super) fn mark(&mut self, head: u16) {
        self.part.words.store(counter_of(head), self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.part.words.store(entry(head), MARK);
    }

    /// Links a head to the batch that is published next.
    pub(super) fn link(&mut self, head: u16) {
        let word = MARK | u64::from(self.state.last) << LINK;
        self.part.words.store(entry(head), word);
        self.state.last = head;
        self.part.words.store(STATE, self.state.word());
        self.batch.push(head);
    }

    /// Ends the list before a chain whose head has no entry, or whose entry belongs to another
    /// chain. The previous batch must have been published.
    pub(super) fn end_list(&mut self) {
        self.state.last = NONE;
        self.part.words.store(STATE, self.state.word());
    }

    /// Unmarks all linked heads, after they were published with the used index `used`.
    pub(super) fn published(&mut self, used: u16) {
        while let Some(head) = self.batch.pop() {
            self.unmark(head);
        }
        self.set_used(used);
    }

    /// Removes the mark, and keeps the link for a process that has to follow the batch again.
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
    /// Head of the last batch's list.
    last: u16,
    /// The index of the used ring for which the marks of the last batch were removed.
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

/// Position of the word with a head's mark.
#[allow(clippy::arithmetic_side_effects, reason = "a head has 16 bits")]
fn entry(head: u16) -> usize {
    ENTRIES + 2 * usize::from(head)
}

/// Position of the word with a head's counter.
#[allow(clippy::arithmetic_side_effects, reason = "a head has 16 bits")]
fn counter_of(head: u16) -> usize {
    ENTRIES + 2 * usize::from(head) + 1
}
