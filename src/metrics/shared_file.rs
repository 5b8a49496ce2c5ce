//! The file that the counters are in, where they have to outlive the serving process.
//!
//! The process that starts serving processes holds it, and uses it only where one program follows
//! another, to carry the counters over. As a serving process may have put anything there, the file is
//! read, not mapped, and only if it is memory that can't change its length. The invariant: the file
//! never changes its length.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use super::layout::{ERRORS, Gauge, Layout, OTHERS, Section};
use super::{MetricsError, Shape};
use crate::sys::shared::WORD;

/// The file of the counters.
#[derive(Debug)]
pub(crate) struct SharedFile {
    file: OwnedFd,
    layout: Layout,
}

impl SharedFile {
    /// Makes a file for counters of this shape.
    ///
    /// # Errors
    ///
    /// There is no memory for it, or `RLIMIT_FSIZE` is smaller.
    pub(crate) fn create(shape: &Shape) -> Result<Self, MetricsError> {
        let layout = shape.layout();
        let bytes = layout.words() * WORD;
        let allocate = |source| MetricsError::Allocate { bytes, source };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create(c"ringfsd-metrics", flags).map_err(allocate)?;
        rustix::fs::ftruncate(&file, bytes as u64).map_err(allocate)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(allocate)?;
        let this = Self { file, layout };
        let words: Vec<_> = layout.describe().collect();
        this.write(0, &words).map_err(allocate)?;
        Ok(this)
    }

    /// Continues with the file of the previous program. If that has another layout, with a new file that
    /// has the sums of its counters. A file that can't be read is left out: the counters begin at 0.
    ///
    /// # Errors
    ///
    /// There is no memory for a new file.
    pub(crate) fn take_over(shape: &Shape, previous: OwnedFd) -> Result<Self, MetricsError> {
        let found = is_fixed(&previous)
            .then(|| find_layout(&previous))
            .flatten();
        match found {
            Some(layout) if layout == shape.layout() => Ok(Self {
                file: previous,
                layout,
            }),
            Some(layout) => {
                let this = Self::create(shape)?;
                let previous = Self {
                    file: previous,
                    layout,
                };
                this.carry_over(&previous).map_err(MetricsError::Read)?;
                log::info!("the counters have another layout: carrying over their sums");
                Ok(this)
            }
            None => {
                log::warn!("the counters of the previous program can't be read: starting at 0");
                Self::create(shape)
            }
        }
    }

    /// The descriptor of the file, for [`Registry::in_file`](super::Registry::in_file).
    pub(crate) fn into_file(self) -> OwnedFd {
        self.file
    }

    /// Adds the counters of `previous` to those of the first thread.
    fn carry_over(&self, previous: &Self) -> Result<(), Errno> {
        for section in Section::ALL {
            let (from, to) = (previous.layout.part(section), self.layout.part(section));
            let words = from.words.min(to.words);
            let mut sums = vec![0; words];
            let mut errors = BTreeMap::new();
            for start in previous.layout.starts(section) {
                let block = previous.read(start, words)?;
                match section {
                    Section::Errors => add_errors(&mut errors, &block),
                    Section::Gauges => add_words(&mut sums, &block, |all, word| all | word),
                    _ => add_words(&mut sums, &block, u64::wrapping_add),
                }
            }
            if section == Section::Errors {
                write_errors(errors, &mut sums);
            }
            if let Some(start) = self.layout.starts(section).next() {
                self.write(start, &sums)?;
                if section == Section::Gauges {
                    self.write(start + Gauge::InFlight as usize, &[0])?;
                }
            }
        }
        Ok(())
    }

    fn read(&self, first: usize, count: usize) -> Result<Vec<u64>, Errno> {
        read_words(&self.file, first, count)
    }

    fn write(&self, first: usize, words: &[u64]) -> Result<(), Errno> {
        let bytes: Vec<u8> = words.iter().copied().flat_map(u64::to_ne_bytes).collect();
        let mut done = 0;
        while done < bytes.len() {
            let at = (first * WORD + done) as u64;
            done += rustix::io::pwrite(&self.file, &bytes[done..], at)?;
        }
        Ok(())
    }
}

impl AsFd for SharedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The most words that a file may have: those for the largest number of threads and queues.
const MAX_WORDS: usize = 64 << 20;

fn find_layout(file: &OwnedFd) -> Option<Layout> {
    let len = rustix::fs::fstat(file).ok()?.st_size;
    let len = usize::try_from(len).ok()? / WORD;
    let header = read_words(file, 0, len.min(64)).ok()?;
    let layout = Layout::of_header(len, |at| header.get(at).copied().unwrap_or(0));
    layout.filter(|_| len <= MAX_WORDS)
}

/// Whether it is memory whose length can't be changed.
fn is_fixed(file: &OwnedFd) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

/// Reads words; less than `count` at the end of the file.
fn read_words(file: &OwnedFd, first: usize, count: usize) -> Result<Vec<u64>, Errno> {
    let mut bytes = vec![0; count * WORD];
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pread(file, &mut bytes[done..], (first * WORD + done) as u64)? {
            0 => break,
            n => done += n,
        }
    }
    let words = bytes[..done].as_chunks().0;
    Ok(words.iter().copied().map(u64::from_ne_bytes).collect())
}

fn add_words(sums: &mut [u64], words: &[u64], add: impl Fn(u64, u64) -> u64) {
    for (sum, word) in sums.iter_mut().zip(words) {
        *sum = add(*sum, *word);
    }
}

/// Adds pairs of a key and a count. There are at most as many keys as opcodes and errnos that exist,
/// unless a serving process has written others; those beyond the room for all threads are left out.
fn add_errors(errors: &mut BTreeMap<u64, u64>, words: &[u64]) {
    const MAX: usize = 256 * ERRORS;
    for [key, count] in words.as_chunks().0 {
        if *key != 0 && (errors.len() < MAX || errors.contains_key(key)) {
            let sum = errors.entry(*key).or_default();
            *sum = sum.wrapping_add(*count);
        }
    }
}

/// Writes pairs. Those that there is no room for are added to the last one.
fn write_errors(errors: BTreeMap<u64, u64>, words: &mut [u64]) {
    let (pairs, _) = words.as_chunks_mut::<2>();
    let last = pairs.len().min(ERRORS).saturating_sub(1);
    let mut others = 0_u64;
    for (at, (key, count)) in errors.into_iter().enumerate() {
        match pairs.get_mut(at).filter(|_| at < last && key != OTHERS) {
            Some(pair) => *pair = [key, count],
            None => others = others.wrapping_add(count),
        }
    }
    if others != 0
        && let Some(pair) = pairs.get_mut(last)
    {
        *pair = [OTHERS, others];
    }
}
