//! Where the counters are in shared memory, and how a program with another layout reads them.
//!
//! The memory is a header with what concerns the whole server, then one block for each thread. Both
//! consist of sections, which the header lists, so a program finds what another version has written
//! and carries it over. The invariant: positions are computed from a list that was checked to be
//! within the memory.

use super::buckets::BUCKETS;

/// Words of a page.
pub(crate) const PAGE: usize = 512;

/// Words of a histogram: the sum in nanoseconds, and the buckets.
pub(crate) const ROW: usize = 1 + BUCKETS;

/// One more than the highest opcode. Row 0, which no opcode uses, is for those that don't exist.
pub(crate) const OPCODES: usize = 64;

/// How many pairs of an operation and an errno a block has room for.
pub(crate) const ERRORS: usize = 128;

/// Buckets of a histogram of numbers of chains, one for each power of two.
pub(crate) const POWERS: usize = 16;

/// The first word of the memory.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"ringfsM\0");
/// The version of the header. A program that reads another one starts its counters at 0.
pub(crate) const VERSION: u64 = 1;
/// The version of the histograms' buckets.
const BUCKET_VERSION: u64 = 1;

/// A section: a part of the header or of each block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Section {
    /// Of the header: counters of the server ([`Server`]).
    Server,
    /// Of the header: counters and histograms of recoveries and upgrades ([`Process`]).
    Processes,
    /// Of a block: counters of a thread ([`Count`]).
    Counts,
    /// Of a block: values of now ([`Gauge`]).
    Gauges,
    /// Of a block: requests by opcode.
    Requests,
    /// Of a block: pairs of a key (see [`error_key`]) and a count.
    Errors,
    /// Of a block: how many chains were returned together, by powers of two.
    Batches,
    /// Of a block: how many chains a kick or poll has found, by powers of two.
    Depths,
    /// Of a block: for each opcode a histogram.
    OpcodeLatency,
    /// Of a block: for each queue a histogram.
    QueueLatency,
}

impl Section {
    pub(crate) const ALL: [Self; 10] = [
        Self::Server,
        Self::Processes,
        Self::Counts,
        Self::Gauges,
        Self::Requests,
        Self::Errors,
        Self::Batches,
        Self::Depths,
        Self::OpcodeLatency,
        Self::QueueLatency,
    ];

    /// Whether it is in the header, and not in each block.
    const fn is_of_header(self) -> bool {
        matches!(self, Self::Server | Self::Processes)
    }
}

/// Counters of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Server {
    /// VMMs that have connected.
    Connections,
    /// Sessions that a process has resumed.
    Resumed,
    /// Sessions that use another engine than the chosen one, because it isn't available any more.
    EngineFallbacks,
    /// Descriptors of inodes that were closed because there were too many.
    Evictions,
    /// Seconds since 1970 at which the counters began.
    Began,
}

/// Counters of a thread. Their numbers never change their meaning; 4 were batches, which the section
/// of their sizes counts too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Count {
    /// Bytes that READ has returned.
    BytesRead,
    /// Bytes that WRITE has written.
    BytesWritten,
    /// Wake-ups by a kick.
    Kicks,
    /// Calls of the guest.
    Calls,
    /// Chains that were sent to other workers.
    Offloaded = 5,
    /// Chains of other workers that this thread has served.
    Stolen,
    /// Requests that had to wait for the host.
    Deferred,
    /// Requests that could not be decoded.
    Malformed,
    /// Chains that were returned empty for a fault.
    FaultyChains,
    /// Requests that were dropped without a reply.
    Dropped,
    /// Chains of all batches.
    PublishedChains,
    /// Chains that looks at a ring have found.
    FoundChains,
}

/// Values of a thread, which end with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gauge {
    /// Requests that are being served.
    InFlight,
    /// The opcodes whose histograms are in use, one bit each.
    Opcodes,
    /// The queues whose histograms are in use, one bit each: the first of several words.
    Queues,
}

/// Numbers about processes. Each is a counter, followed by a histogram of pauses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Process {
    /// Serving processes that were killed, and what followed them.
    Recovery,
    /// Switches to another program.
    Upgrade,
    /// Switches that have failed; the histogram is that of the pauses until the old program served.
    FailedUpgrade,
}

/// Words of one of [`Process`].
pub(crate) const PROCESS: usize = 1 + ROW;
/// How many [`Process`] has.
const PROCESSES: usize = 3;
/// How many [`Server`] and [`Count`] may ever have.
const COUNTS: usize = 32;
/// Words of the bits in [`Gauge`]; more queues share the last bit.
const GAUGES: usize = 20;
/// The most queues whose histograms are marked as in use one by one.
pub(crate) const MAX_QUEUES: usize = (GAUGES - Gauge::Queues as usize) * 64;

/// Position and size of a section, in words: from the start of the memory, or of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) first: usize,
    pub(crate) words: usize,
}

/// The positions of everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Threads that have a block.
    pub(crate) threads: usize,
    /// Words of a block.
    pub(crate) block: usize,
    /// Words before the first block.
    pub(crate) header: usize,
    /// The sections, in the order of [`Section::ALL`].
    parts: [Part; Section::ALL.len()],
}

/// Words of the header before its sections.
const FIXED: usize = 8;
/// Words of the header with its list of sections.
const LIST: usize = FIXED + 2 * Section::ALL.len();

/// Words of a section of a block, but for the histograms of queues.
const fn words_of(section: Section) -> usize {
    match section {
        Section::Server | Section::Counts => COUNTS,
        Section::Processes => PROCESSES * PROCESS,
        Section::Gauges => GAUGES,
        Section::Requests => OPCODES,
        Section::Errors => 2 * ERRORS,
        Section::Batches | Section::Depths => POWERS,
        Section::OpcodeLatency => OPCODES * ROW,
        Section::QueueLatency => 0,
    }
}

/// Where a section of a block begins in the layout of this program.
pub(crate) const fn offset_of(section: Section) -> usize {
    let (mut offset, mut at) = (0, 0);
    while at < section as usize {
        let before = Section::ALL[at];
        if !before.is_of_header() {
            offset += words_of(before);
        }
        at += 1;
    }
    offset
}

/// Words of a block that are at the same offsets in every layout of this program: all but the
/// histograms of queues.
pub(crate) const BLOCK: usize = offset_of(Section::QueueLatency);

impl Layout {
    /// The layout of this program for so many threads and queues.
    pub(crate) fn new(threads: usize, queues: usize) -> Self {
        let mut parts = [Part::default(); Section::ALL.len()];
        let (mut header, mut block) = (LIST, 0);
        for (part, section) in parts.iter_mut().zip(Section::ALL) {
            let words = match section {
                Section::QueueLatency => queues.min(MAX_QUEUES) * ROW,
                section => words_of(section),
            };
            let end = if section.is_of_header() {
                &mut header
            } else {
                &mut block
            };
            *part = Part { first: *end, words };
            *end += words;
        }
        Self {
            threads,
            block: block.next_multiple_of(PAGE),
            header: header.next_multiple_of(PAGE),
            parts,
        }
    }

    /// The layout that a header of this or another program describes. `None` if the header has another
    /// version, or describes what isn't within `words` words.
    pub(crate) fn of_header(words: usize, word: impl Fn(usize) -> u64) -> Option<Self> {
        let count = |at: usize| usize::try_from(word(at)).ok().filter(|it| *it <= words);
        if words < LIST || word(0) != MAGIC || word(1) != VERSION || word(2) != BUCKET_VERSION {
            return None;
        }
        let (threads, block, header) = (count(3)?, count(4)?, count(5)?);
        let blocks = threads.checked_mul(block)?;
        if header.checked_add(blocks)? > words {
            return None;
        }
        let listed = count(6)?;
        let mut parts = [Part::default(); Section::ALL.len()];
        for ((part, section), at) in parts
            .iter_mut()
            .zip(Section::ALL)
            .zip((FIXED..).step_by(2))
            .take(listed)
        {
            *part = Part {
                first: count(at)?,
                words: count(at + 1)?,
            };
            let end = part.first.checked_add(part.words)?;
            if end
                > if section.is_of_header() {
                    header
                } else {
                    block
                }
            {
                return None;
            }
        }
        Some(Self {
            threads,
            block,
            header,
            parts,
        })
    }

    /// The words of the header that describe this layout.
    pub(crate) fn describe(&self) -> impl Iterator<Item = u64> {
        let fixed = [
            MAGIC,
            VERSION,
            BUCKET_VERSION,
            self.threads as u64,
            self.block as u64,
            self.header as u64,
            Section::ALL.len() as u64,
            0,
        ];
        let list = self
            .parts
            .into_iter()
            .flat_map(|part| [part.first as u64, part.words as u64]);
        fixed.into_iter().chain(list)
    }

    /// Words of the whole memory.
    pub(crate) fn words(&self) -> usize {
        self.header + self.threads * self.block
    }

    /// The part of a section.
    pub(crate) fn part(&self, section: Section) -> Part {
        self.parts[section as usize]
    }

    /// The positions of the first words of a section: one in the header, or one in each block.
    pub(crate) fn starts(&self, section: Section) -> impl Iterator<Item = usize> + use<> {
        let (threads, block) = match section.is_of_header() {
            true => (1, 0),
            false => (self.threads, self.block),
        };
        let start = if section.is_of_header() {
            0
        } else {
            self.header
        };
        let first = self.part(section).first;
        (0..threads).map(move |thread| start + thread * block + first)
    }
}

/// The key of an operation that failed with `errno`. 0 is no key, as there is no errno 0.
pub(crate) fn error_key(opcode: usize, errno: u32) -> u64 {
    (opcode as u64) << 32 | u64::from(errno)
}

/// The key of errors that there was no room for.
pub(crate) const OTHERS: u64 = 1 << 63;

/// The opcode and the errno of a key.
pub(crate) fn error_of(key: u64) -> (usize, u32) {
    let opcode = usize::try_from(key >> 32).unwrap_or(0);
    (opcode, u32::try_from(key & 0xffff_ffff).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_read_from_its_own_description() {
        let layout = Layout::new(5, 9);
        let words: Vec<_> = layout.describe().collect();
        assert_eq!(words.len(), LIST);
        let read =
            |words: &[u64], len| Layout::of_header(len, |at| words.get(at).copied().unwrap_or(0));
        assert_eq!(read(&words, layout.words()), Some(layout));
        assert_eq!(read(&words, layout.words() - 1), None);
        for at in 0..words.len() {
            for value in [1 << 40, u64::MAX] {
                let mut words = words.clone();
                words[at] = value;
                let found = read(&words, layout.words());
                // The reserved word means nothing, and a longer list is that of a newer program.
                assert!(found.is_none() || at == FIXED - 1, "word {at}: {found:?}");
            }
        }
    }

    #[test]
    fn sections_of_blocks_are_at_constant_offsets() {
        let layout = Layout::new(3, 4);
        for section in Section::ALL
            .into_iter()
            .filter(|section| !section.is_of_header())
        {
            assert_eq!(
                layout.part(section).first,
                offset_of(section),
                "{section:?}"
            );
        }
    }

    #[test]
    fn sections_don_t_overlap() {
        let layout = Layout::new(3, 4);
        for of_header in [true, false] {
            let mut parts: Vec<_> = Section::ALL
                .into_iter()
                .filter(|section| section.is_of_header() == of_header)
                .map(|section| layout.part(section))
                .collect();
            parts.sort_by_key(|part| part.first);
            for pair in parts.windows(2) {
                assert!(pair[0].first + pair[0].words <= pair[1].first);
            }
        }
    }

    #[test]
    fn memory_of_a_thread_is_at_most_64_kib_without_its_queues() {
        assert!(Layout::new(1, 0).block * 8 <= 64 << 10);
    }
}
