//! The file that the counters are in, where they have to outlive the serving process.
//!
//! The process that starts serving processes holds it. It maps nothing, as it must not depend on what a
//! serving process writes there: it reads and writes the file. The invariant: the file never changes
//! its length.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use super::buckets::bucket_of;
use super::layout::{ERRORS, Gauge, Layout, PROCESS, Process, Section};
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
        let len = rustix::fs::fstat(&previous).map_or(0, |stat| stat.st_size);
        let len = usize::try_from(len).unwrap_or(0) / WORD;
        let header = read_words(&previous, 0, len.min(64)).unwrap_or_default();
        let found = Layout::of_header(len, |at| header.get(at).copied().unwrap_or(0));
        match found {
            Some(layout) if is_fixed(&previous) && layout == shape.layout() => Ok(Self {
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

    /// Counts what happened to a serving process, and the pause until the next one served.
    pub(crate) fn count(&self, process: Process, pause: Duration) {
        // The serving process has the same descriptors, and may have replaced this one.
        if !is_fixed(&self.file) {
            return;
        }
        let nanoseconds = u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX);
        let first = self.layout.part(Section::Processes).first + process as usize * PROCESS;
        let more = [(0, 1), (1, nanoseconds), (2 + bucket_of(nanoseconds), 1)];
        for (at, more) in more {
            let known = self.read(first + at, 1).unwrap_or_default();
            let value = known
                .first()
                .map_or(more, |known| known.saturating_add(more));
            if let Err(error) = self.write(first + at, &[value]) {
                log::warn!("counting a restart: {error}");
            }
        }
    }

    /// Adds the counters of `previous` to those of the first thread.
    fn carry_over(&self, previous: &Self) -> Result<(), Errno> {
        for section in Section::ALL {
            let (from, to) = (previous.layout.part(section), self.layout.part(section));
            let words = from.words.min(to.words);
            let mut blocks = Vec::new();
            for start in previous.layout.starts(section) {
                blocks.push(previous.read(start, words)?);
            }
            let sums = match section {
                Section::Errors => sum_errors(&blocks, words),
                Section::Gauges => sum_words(&blocks, words, |all, word| all | word),
                _ => sum_words(&blocks, words, u64::wrapping_add),
            };
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

fn sum_words(blocks: &[Vec<u64>], words: usize, add: impl Fn(u64, u64) -> u64) -> Vec<u64> {
    let mut sums = vec![0; words];
    for block in blocks {
        for (sum, word) in sums.iter_mut().zip(block) {
            *sum = add(*sum, *word);
        }
    }
    sums
}

/// Adds up pairs of a key and a count. Those that there is no room for are added to the last one.
fn sum_errors(blocks: &[Vec<u64>], words: usize) -> Vec<u64> {
    let mut counts = BTreeMap::<u64, u64>::new();
    for [key, count] in blocks.iter().flat_map(|block| block.as_chunks().0) {
        if *key != 0 {
            let sum = counts.entry(*key).or_default();
            *sum = sum.wrapping_add(*count);
        }
    }
    let mut sums = vec![0; words];
    let (pairs, _) = sums.as_chunks_mut::<2>();
    let last = pairs.len().min(ERRORS).saturating_sub(1);
    let mut others = 0_u64;
    for (at, (key, count)) in counts.into_iter().enumerate() {
        match pairs
            .get_mut(at)
            .filter(|_| at < last && key != super::layout::OTHERS)
        {
            Some(pair) => *pair = [key, count],
            None => others = others.wrapping_add(count),
        }
    }
    if others != 0
        && let Some(pair) = pairs.get_mut(last)
    {
        *pair = [super::layout::OTHERS, others];
    }
    sums
}
