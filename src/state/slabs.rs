//! Allocates slots for records and blobs: chunks of slots of one size.
//!
//! The table records the kind of each chunk. Which slots are in use is known only to this process
//! and determined anew when a table is opened, so a kill can't leave an allocation half done. An
//! empty chunk is returned to the system. The invariant: a slot in use has one owner.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::header::{CHUNK, Layout};
use super::{SlotRef, StateError, reserve};
use crate::sys::shared::{MappedWords, WORD};

/// Words of a record: a cache line.
pub(super) const RECORD: usize = 8;

/// The word of a record that says whether it is in use. Not 0 if so.
pub(super) const STATE: usize = RECORD - 1;

/// Sizes of blobs, in words.
const BLOB_SIZES: [usize; 14] = [2, 3, 4, 5, 6, 8, 12, 16, 24, 40, 64, 256, 1024, CHUNK];

/// What the slots of a chunk hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RecordKind {
    Inode,
    Handle,
    Lock,
    Mapping,
    /// Blobs of this many words: names, file handles, ranges. One of `BLOB_SIZES`.
    Blob(usize),
}

impl RecordKind {
    /// The smallest blob size that holds `words`; `None` if there is none.
    pub(super) fn blob(words: usize) -> Option<Self> {
        BLOB_SIZES
            .into_iter()
            .find(|size| *size >= words)
            .map(Self::Blob)
    }

    fn words(self) -> usize {
        match self {
            Self::Inode | Self::Handle | Self::Lock | Self::Mapping => RECORD,
            Self::Blob(words) => words,
        }
    }

    /// Number of slots in a chunk.
    fn slots(self) -> usize {
        CHUNK / self.words()
    }

    /// The number that stands for it in the table.
    fn number(self) -> u64 {
        match self {
            Self::Inode => 1,
            Self::Handle => 2,
            Self::Lock => 3,
            Self::Mapping => 4,
            Self::Blob(words) => 16 + words as u64,
        }
    }

    fn from_number(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Inode),
            2 => Some(Self::Handle),
            3 => Some(Self::Lock),
            4 => Some(Self::Mapping),
            blob => BLOB_SIZES
                .into_iter()
                .map(Self::Blob)
                .find(|kind| kind.number() == blob),
        }
    }

    /// The index of this kind's list of chunks with free slots.
    fn list(self) -> usize {
        match self {
            Self::Inode => 0,
            Self::Handle => 1,
            Self::Lock => 2,
            Self::Mapping => 3,
            Self::Blob(words) => {
                4 + BLOB_SIZES
                    .iter()
                    .position(|size| *size == words)
                    .unwrap_or(0)
            }
        }
    }
}

const LISTS: usize = 4 + BLOB_SIZES.len();

/// The first word of a slot.
pub(super) fn word_of(slot: SlotRef) -> usize {
    slot as usize
}

/// A chunk in use.
#[derive(Debug)]
struct Chunk {
    kind: RecordKind,
    used: usize,
    /// One bit for each slot.
    bits: Box<[u64]>,
    /// Whether it is on its kind's list.
    listed: bool,
}

impl Chunk {
    fn new(kind: RecordKind) -> Self {
        Self {
            kind,
            used: 0,
            bits: vec![0; kind.slots().div_ceil(64)].into(),
            listed: false,
        }
    }

    /// Marks slot number `at` as used; false if it is used already.
    fn mark(&mut self, at: usize) -> bool {
        let (Some(bits), bit) = (self.bits.get_mut(at / 64), 1 << (at % 64)) else {
            return false;
        };
        if at >= self.kind.slots() || *bits & bit != 0 {
            return false;
        }
        *bits |= bit;
        self.used += 1;
        true
    }

    /// Allocates any free slot.
    fn allocate(&mut self) -> Option<usize> {
        let free = self.bits.iter().position(|bits| *bits != u64::MAX)?;
        let at = free * 64 + self.bits[free].trailing_ones() as usize;
        self.mark(at).then_some(at)
    }

    fn is_full(&self) -> bool {
        self.used == self.kind.slots()
    }
}

#[derive(Debug, Default)]
struct State {
    /// By number; `None` for an unused chunk.
    chunks: Vec<Option<Chunk>>,
    /// Chunks in use that may have free slots, by kind.
    with_room: [Vec<u32>; LISTS],
    /// Unused chunks below the length of `chunks`.
    free: Vec<u32>,
    /// Words in use.
    words: usize,
}

/// The allocator of a table.
#[derive(Debug)]
pub(super) struct Slabs {
    /// Position of the chunks' kinds in the table.
    chunk_kinds: usize,
    /// Position of the first chunk.
    start: usize,
    /// Maximum number of chunks.
    max_chunks: usize,
    /// Whether space for a chunk is reserved on the file system before it is used.
    reserved: bool,
    state: Mutex<State>,
}

impl Slabs {
    /// The allocator of a new table.
    pub(super) fn new(layout: &Layout, reserved: bool) -> Self {
        Self {
            chunk_kinds: layout.kinds,
            start: layout.chunks,
            max_chunks: layout.chunk_count,
            reserved,
            state: Mutex::default(),
        }
    }

    /// The allocator of an existing table: it has the chunks with their kinds, and only the slots
    /// of records are in use. See [`claim`](Self::claim).
    pub(super) fn from_table(words: &MappedWords, layout: &Layout) -> Result<Self, StateError> {
        let slabs = Self::new(layout, true);
        let mut state = slabs.lock();
        for number in 0..layout.chunk_count {
            let at = slabs.chunk_kinds + number;
            let kind = words.get(at).map_or(0, load);
            if kind == 0 {
                continue;
            }
            let what = "a chunk of an unknown kind";
            let kind = RecordKind::from_number(kind).ok_or(StateError::Damaged { what, at })?;
            let mut chunk = Chunk::new(kind);
            if !matches!(kind, RecordKind::Blob(_)) {
                for slot in 0..kind.slots() {
                    let first = slabs.start + number * CHUNK + slot * RECORD;
                    if words.get(first + STATE).map_or(0, load) != 0 {
                        chunk.mark(slot);
                    }
                }
            }
            state.words += chunk.used * kind.words();
            state.chunks.resize_with(number, || None);
            state.chunks.push(Some(chunk));
        }
        state.free = (0..state.chunks.len())
            .filter(|number| state.chunks[*number].is_none())
            .filter_map(|number| u32::try_from(number).ok())
            .collect();
        drop(state);
        Ok(slabs)
    }

    /// Claims the blob at `slot` of a table that was opened, of at least `words`. False if there is
    /// none, or it is claimed already.
    pub(super) fn claim(&self, slot: SlotRef, words: usize) -> bool {
        let mut state = self.lock();
        let Some((number, at)) = self.number_of(slot) else {
            return false;
        };
        let Some(Some(chunk)) = state.chunks.get_mut(number) else {
            return false;
        };
        let RecordKind::Blob(size) = chunk.kind else {
            return false;
        };
        let claimed = words <= size && at.is_multiple_of(size) && chunk.mark(at / size);
        if claimed {
            state.words += size;
        }
        claimed
    }

    /// The size in words of the blob slot at `slot`; `None` if there is none.
    pub(super) fn blob_words(&self, slot: SlotRef) -> Option<usize> {
        let state = self.lock();
        let (number, at) = self.number_of(slot)?;
        match state.chunks.get(number)?.as_ref()?.kind {
            RecordKind::Blob(size) if at.is_multiple_of(size) => Some(size),
            _ => None,
        }
    }

    /// Called after the last [`claim`](Self::claim): makes free slots available and releases chunks
    /// of which nothing was claimed.
    pub(super) fn finish_claims(&self, words: &MappedWords) {
        let mut state = self.lock();
        for number in 0..state.chunks.len() {
            let Some(chunk) = &state.chunks[number] else {
                continue;
            };
            if chunk.used == 0 {
                self.release(&mut state, words, number);
            } else if !chunk.is_full() {
                add_to_list(&mut state, number);
            }
        }
    }

    pub(super) fn allocate(&self, words: &MappedWords, kind: RecordKind) -> Option<SlotRef> {
        let mut state = self.lock();
        loop {
            let Some(number) = state.with_room[kind.list()].last().copied() else {
                self.open_chunk(&mut state, words, kind)?;
                continue;
            };
            let number = number as usize;
            let slot = match &mut state.chunks[number] {
                Some(chunk) if chunk.kind == kind => chunk.allocate(),
                _ => None,
            };
            if let Some(at) = slot {
                state.words += kind.words();
                let word = self.start + number * CHUNK + at * kind.words();
                return u32::try_from(word).ok();
            }
            state.with_room[kind.list()].pop();
            if let Some(chunk) = state.chunks[number].as_mut().filter(|it| it.kind == kind) {
                chunk.listed = false;
            }
        }
    }

    fn open_chunk(&self, state: &mut State, words: &MappedWords, kind: RecordKind) -> Option<()> {
        let number = match state.free.pop() {
            Some(number) => number as usize,
            None if state.chunks.len() < self.max_chunks => {
                state.chunks.push(None);
                state.chunks.len() - 1
            }
            None => return None,
        };
        if self.reserved
            && let Some(file) = words.file()
            && let Err(error) = reserve(file, self.start + number * CHUNK, CHUNK)
        {
            log::error!("no room for the state table: {error}");
            state.free.extend(u32::try_from(number));
            return None;
        }
        state.chunks[number] = Some(Chunk::new(kind));
        words
            .get(self.chunk_kinds + number)?
            .store(kind.number(), std::sync::atomic::Ordering::Release);
        add_to_list(state, number);
        Some(())
    }

    pub(super) fn free(&self, words: &MappedWords, slot: SlotRef) {
        let mut state = self.lock();
        let Some((number, at)) = self.number_of(slot) else {
            return;
        };
        let Some(Some(chunk)) = state.chunks.get_mut(number) else {
            return;
        };
        let size = chunk.kind.words();
        let (at, bit) = (at / size / 64, 1 << (at / size % 64));
        if chunk.bits[at] & bit == 0 {
            return;
        }
        chunk.bits[at] &= !bit;
        chunk.used -= 1;
        let (empty, list_of) = (chunk.used == 0, chunk.kind.list());
        let alone = state.with_room[list_of].len() < 2;
        state.words -= size;
        // The last chunk of its kind with free slots will be needed again.
        if empty && !alone {
            self.release(&mut state, words, number);
        } else {
            add_to_list(&mut state, number);
        }
    }

    /// Releases a chunk.
    fn release(&self, state: &mut State, words: &MappedWords, number: usize) {
        if let Some(chunk) = state.chunks[number].take() {
            let listed = &mut state.with_room[chunk.kind.list()];
            listed.retain(|one| *one as usize != number);
        }
        if let Some(kind) = words.get(self.chunk_kinds + number) {
            kind.store(0, std::sync::atomic::Ordering::Release);
        }
        // If the file system can't free the space, the memory stays for the chunk's next use.
        if words.release(self.start + number * CHUNK, CHUNK).is_err() {
            for word in 0..CHUNK {
                if let Some(word) = words.get(self.start + number * CHUNK + word) {
                    word.store(0, std::sync::atomic::Ordering::Relaxed);
                }
            }
        }
        if let Ok(number) = u32::try_from(number) {
            state.free.push(number);
        }
    }

    pub(super) fn bytes_in_use(&self) -> usize {
        self.lock().words * WORD
    }

    /// Calls `each` with the slots of the records of `kind`.
    pub(super) fn for_each(&self, kind: RecordKind, mut each: impl FnMut(SlotRef)) {
        let used: Vec<SlotRef> = {
            let state = self.lock();
            let of_kind = |chunk: &&Option<Chunk>| chunk.as_ref().is_some_and(|it| it.kind == kind);
            let numbered = state.chunks.iter().enumerate();
            numbered
                .filter(|(_, chunk)| of_kind(chunk))
                .flat_map(|(number, chunk)| {
                    let bits = chunk.iter().flat_map(|chunk| chunk.bits.iter().enumerate());
                    let used = bits.flat_map(|(word, bits)| {
                        (0..64)
                            .filter(move |bit| bits >> bit & 1 != 0)
                            .map(move |bit| word * 64 + bit)
                    });
                    used.map(move |at| self.start + number * CHUNK + at * RECORD)
                })
                .filter_map(|word| u32::try_from(word).ok())
                .collect()
        };
        used.into_iter().for_each(&mut each);
    }

    /// The chunk that `slot` is in, and the slot's position in it.
    fn number_of(&self, slot: SlotRef) -> Option<(usize, usize)> {
        let word = word_of(slot).checked_sub(self.start)?;
        (word / CHUNK < self.max_chunks).then_some((word / CHUNK, word % CHUNK))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn load(word: &std::sync::atomic::AtomicU64) -> u64 {
    word.load(std::sync::atomic::Ordering::Acquire)
}

/// Puts a chunk with free slots on its kind's list, unless it is there.
fn add_to_list(state: &mut State, number: usize) {
    let Some(Some(chunk)) = state.chunks.get_mut(number) else {
        return;
    };
    if let (false, Ok(short)) = (chunk.listed, u32::try_from(number)) {
        chunk.listed = true;
        state.with_room[chunk.kind.list()].push(short);
    }
}
