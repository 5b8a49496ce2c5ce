//! Room in the table: chunks of places of one size.
//!
//! What a chunk is for stands in the table; which of its places are taken is this process's own
//! knowledge, found out anew when a table is opened, so that there is nothing of the allocation
//! that a kill could leave half done. A chunk without anything in it is given back to the system.
//! The invariant: a place that is taken is taken by one.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::header::{CHUNK, Layout};
use super::{RecordRef, StateError, reserve};
use crate::sys::shared::{SharedWords, WORD};

/// Words of a record: a cache line.
pub(super) const RECORD: usize = 8;

/// The word of a record that says whether it is one. Not 0 if so.
pub(super) const STATE: usize = RECORD - 1;

/// Words of the texts that there are.
const TEXTS: [usize; 14] = [2, 3, 4, 5, 6, 8, 12, 16, 24, 40, 64, 256, 1024, CHUNK];

/// What a chunk is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RecordKind {
    Inode,
    Handle,
    Lock,
    /// Texts of so many words: names, file handles, ranges. One of `TEXTS`.
    Text(usize),
}

impl RecordKind {
    /// The smallest text with `words`; `None` if there is none so long.
    pub(super) fn text(words: usize) -> Option<Self> {
        TEXTS
            .into_iter()
            .find(|size| *size >= words)
            .map(Self::Text)
    }

    fn words(self) -> usize {
        match self {
            Self::Inode | Self::Handle | Self::Lock => RECORD,
            Self::Text(words) => words,
        }
    }

    /// How many fit in a chunk.
    fn places(self) -> usize {
        CHUNK / self.words()
    }

    /// As it stands in the table.
    fn number(self) -> u64 {
        match self {
            Self::Inode => 1,
            Self::Handle => 2,
            Self::Lock => 3,
            Self::Text(words) => 16 + words as u64,
        }
    }

    fn from_number(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Inode),
            2 => Some(Self::Handle),
            3 => Some(Self::Lock),
            text => TEXTS
                .into_iter()
                .map(Self::Text)
                .find(|kind| kind.number() == text),
        }
    }

    /// Which list of chunks with room is this kind's.
    fn list(self) -> usize {
        match self {
            Self::Inode => 0,
            Self::Handle => 1,
            Self::Lock => 2,
            Self::Text(words) => 3 + TEXTS.iter().position(|size| *size == words).unwrap_or(0),
        }
    }
}

const LISTS: usize = 3 + TEXTS.len();

/// The first word of a place.
pub(super) fn word_of(place: RecordRef) -> usize {
    place as usize
}

/// A chunk that is in use.
#[derive(Debug)]
struct Chunk {
    kind: RecordKind,
    taken: usize,
    /// One bit a place.
    bits: Box<[u64]>,
    /// It stands in its kind's list.
    listed: bool,
}

impl Chunk {
    fn new(kind: RecordKind) -> Self {
        Self {
            kind,
            taken: 0,
            bits: vec![0; kind.places().div_ceil(64)].into(),
            listed: false,
        }
    }

    /// Takes the place with number `at`; false if it is taken.
    fn mark(&mut self, at: usize) -> bool {
        let (Some(bits), bit) = (self.bits.get_mut(at / 64), 1 << (at % 64)) else {
            return false;
        };
        if at >= self.kind.places() || *bits & bit != 0 {
            return false;
        }
        *bits |= bit;
        self.taken += 1;
        true
    }

    /// Takes any place.
    fn take(&mut self) -> Option<usize> {
        let free = self.bits.iter().position(|bits| *bits != u64::MAX)?;
        let at = free * 64 + self.bits[free].trailing_ones() as usize;
        self.mark(at).then_some(at)
    }

    fn is_full(&self) -> bool {
        self.taken == self.kind.places()
    }
}

#[derive(Debug, Default)]
struct State {
    /// By number; `None` for one that is nobody's.
    chunks: Vec<Option<Chunk>>,
    /// Chunks in use that may have room, by kind.
    with_room: [Vec<u32>; LISTS],
    /// Chunks that are nobody's, below the length of `chunks`.
    free: Vec<u32>,
    /// Words taken.
    words: usize,
}

/// Which places are taken.
#[derive(Debug)]
pub(super) struct Slabs {
    /// Where the table says what each chunk is for.
    kinds: usize,
    /// Where the first chunk begins.
    start: usize,
    /// How many there may be.
    most: usize,
    /// Room of a chunk is reserved on the file system before it is used.
    reserved: bool,
    state: Mutex<State>,
}

impl Slabs {
    /// Of a new table.
    pub(super) fn new(layout: &Layout, reserved: bool) -> Self {
        Self {
            kinds: layout.kinds,
            start: layout.chunks,
            most: layout.chunk_count,
            reserved,
            state: Mutex::default(),
        }
    }

    /// Of a table that is there: chunks with their kinds, and no place taken yet but those of
    /// records. See [`claim`](Self::claim).
    pub(super) fn found(words: &SharedWords, layout: &Layout) -> Result<Self, StateError> {
        let slabs = Self::new(layout, true);
        let mut state = slabs.lock();
        for number in 0..layout.chunk_count {
            let at = slabs.kinds + number;
            let kind = words.get(at).map_or(0, load);
            if kind == 0 {
                continue;
            }
            let what = "a chunk of an unknown kind";
            let kind = RecordKind::from_number(kind).ok_or(StateError::Damaged { what, at })?;
            let mut chunk = Chunk::new(kind);
            if !matches!(kind, RecordKind::Text(_)) {
                for place in 0..kind.places() {
                    let first = slabs.start + number * CHUNK + place * RECORD;
                    if words.get(first + STATE).map_or(0, load) != 0 {
                        chunk.mark(place);
                    }
                }
            }
            state.words += chunk.taken * kind.words();
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

    /// Takes the text at `place` of a table that was opened, of at least `words`. False if there
    /// is none, or it is taken.
    pub(super) fn claim(&self, place: RecordRef, words: usize) -> bool {
        let mut state = self.lock();
        let Some((number, at)) = self.number_of(place) else {
            return false;
        };
        let Some(Some(chunk)) = state.chunks.get_mut(number) else {
            return false;
        };
        let RecordKind::Text(size) = chunk.kind else {
            return false;
        };
        let claimed = words <= size && at.is_multiple_of(size) && chunk.mark(at / size);
        if claimed {
            state.words += size;
        }
        claimed
    }

    /// How many words the text at `place` has room for; `None` if there is none.
    pub(super) fn text_words(&self, place: RecordRef) -> Option<usize> {
        let state = self.lock();
        let (number, at) = self.number_of(place)?;
        match state.chunks.get(number)?.as_ref()?.kind {
            RecordKind::Text(size) if at.is_multiple_of(size) => Some(size),
            _ => None,
        }
    }

    /// After the last [`claim`](Self::claim): chunks are open for what is new. Chunks that nothing
    /// was claimed of are given back.
    pub(super) fn settle(&self, words: &SharedWords) {
        let mut state = self.lock();
        for number in 0..state.chunks.len() {
            let Some(chunk) = &state.chunks[number] else {
                continue;
            };
            if chunk.taken == 0 {
                self.release(&mut state, words, number);
            } else if !chunk.is_full() {
                list(&mut state, number);
            }
        }
    }

    pub(super) fn take(&self, words: &SharedWords, kind: RecordKind) -> Option<RecordRef> {
        let mut state = self.lock();
        loop {
            let Some(number) = state.with_room[kind.list()].last().copied() else {
                self.open_chunk(&mut state, words, kind)?;
                continue;
            };
            let number = number as usize;
            let place = match &mut state.chunks[number] {
                Some(chunk) if chunk.kind == kind => chunk.take(),
                _ => None,
            };
            if let Some(at) = place {
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

    fn open_chunk(&self, state: &mut State, words: &SharedWords, kind: RecordKind) -> Option<()> {
        let number = match state.free.pop() {
            Some(number) => number as usize,
            None if state.chunks.len() < self.most => {
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
            .get(self.kinds + number)?
            .store(kind.number(), std::sync::atomic::Ordering::Release);
        list(state, number);
        Some(())
    }

    pub(super) fn give_back(&self, words: &SharedWords, place: RecordRef) {
        let mut state = self.lock();
        let Some((number, at)) = self.number_of(place) else {
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
        chunk.taken -= 1;
        let (empty, list_of) = (chunk.taken == 0, chunk.kind.list());
        let alone = state.with_room[list_of].len() < 2;
        state.words -= size;
        // One that is the last of its kind with room will be needed again.
        if empty && !alone {
            self.release(&mut state, words, number);
        } else {
            list(&mut state, number);
        }
    }

    /// Makes a chunk nobody's.
    fn release(&self, state: &mut State, words: &SharedWords, number: usize) {
        if let Some(chunk) = state.chunks[number].take() {
            let listed = &mut state.with_room[chunk.kind.list()];
            listed.retain(|one| *one as usize != number);
        }
        if let Some(kind) = words.get(self.kinds + number) {
            kind.store(0, std::sync::atomic::Ordering::Release);
        }
        // Where the file system can't, the memory waits for its next use.
        if words.give_back(self.start + number * CHUNK, CHUNK).is_err() {
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

    /// Calls `each` with the places of the records of `kind`.
    pub(super) fn each(&self, kind: RecordKind, mut each: impl FnMut(RecordRef)) {
        let taken: Vec<RecordRef> = {
            let state = self.lock();
            let of_kind = |chunk: &&Option<Chunk>| chunk.as_ref().is_some_and(|it| it.kind == kind);
            let numbered = state.chunks.iter().enumerate();
            numbered
                .filter(|(_, chunk)| of_kind(chunk))
                .flat_map(|(number, chunk)| {
                    let bits = chunk.iter().flat_map(|chunk| chunk.bits.iter().enumerate());
                    let taken = bits.flat_map(|(word, bits)| {
                        (0..64)
                            .filter(move |bit| bits >> bit & 1 != 0)
                            .map(move |bit| word * 64 + bit)
                    });
                    taken.map(move |at| self.start + number * CHUNK + at * RECORD)
                })
                .filter_map(|word| u32::try_from(word).ok())
                .collect()
        };
        taken.into_iter().for_each(&mut each);
    }

    /// The chunk that `place` is in, and the word of that where it begins.
    fn number_of(&self, place: RecordRef) -> Option<(usize, usize)> {
        let word = word_of(place).checked_sub(self.start)?;
        (word / CHUNK < self.most).then_some((word / CHUNK, word % CHUNK))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn load(word: &std::sync::atomic::AtomicU64) -> u64 {
    word.load(std::sync::atomic::Ordering::Acquire)
}

/// Puts a chunk with room on its kind's list, if it isn't there.
fn list(state: &mut State, number: usize) {
    let Some(Some(chunk)) = state.chunks.get_mut(number) else {
        return;
    };
    if let (false, Ok(short)) = (chunk.listed, u32::try_from(number)) {
        chunk.listed = true;
        state.with_room[chunk.kind.list()].push(short);
    }
}
