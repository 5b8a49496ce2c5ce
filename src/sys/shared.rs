//! Words in memory that other processes may have too: a shared mapping of a file.
//!
//! All access is by whole words of 64 bits, each atomic by itself, so whoever maps the file after
//! this process was killed sees each word as it was before or after a store, and the stores of one
//! thread in their order. The invariant: every word that is asked for lies in the mapping.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Bytes of a word.
pub(crate) const WORD: usize = size_of::<u64>();

/// A file's first bytes as words, or memory that no file names, mapped until this is dropped.
#[derive(Debug)]
pub(crate) struct SharedWords {
    start: NonNull<AtomicU64>,
    len: usize,
    file: Option<OwnedFd>,
}

// SAFETY: it owns its mapping, and gives out nothing but atomic words.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps `words` words of `file`, which is at least as long, and stays so: a word that is no
    /// longer there when it is used ends the process (`SIGBUS`).
    ///
    /// # Errors
    ///
    /// As `mmap(2)`; `EINVAL` for no words, or more than there are addresses.
    pub(crate) fn map(file: OwnedFd, words: usize) -> Result<Self, Errno> {
        let bytes = bytes_of(words)?;
        // SAFETY: a new mapping at an address that the kernel chooses touches no other memory.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), bytes, ACCESS, FLAGS, file.as_fd(), 0)
        }?;
        Ok(Self {
            start: NonNull::new(start.cast()).ok_or(Errno::NOMEM)?,
            len: words,
            file: Some(file),
        })
    }

    /// Maps `words` words of memory that is 0 and has no file. `RLIMIT_FSIZE` doesn't limit it, as it
    /// does a `memfd`; nobody else can map it.
    ///
    /// # Errors
    ///
    /// As [`map`](Self::map).
    pub(crate) fn without_file(words: usize) -> Result<Self, Errno> {
        let bytes = bytes_of(words)?;
        // SAFETY: as for a file.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, ACCESS, FLAGS) }?;
        Ok(Self {
            start: NonNull::new(start.cast()).ok_or(Errno::NOMEM)?,
            len: words,
            file: None,
        })
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The file behind them, if there is one.
    pub(crate) fn file(&self) -> Option<&OwnedFd> {
        self.file.as_ref()
    }

    /// The word at `index`; `None` beyond the end.
    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<&AtomicU64> {
        if index >= self.len {
            return None;
        }
        // SAFETY: the index is in bounds of the mapping.
        let word = unsafe { self.start.add(index) };
        // SAFETY: the mapping lives as long as `self`, is aligned to pages, and is accessed by
        // atomic words alone; any bytes are a valid word.
        Some(unsafe { word.as_ref() })
    }

    /// The `count` words from `index` on; `None` if they reach beyond the end.
    #[inline]
    pub(crate) fn get_some(&self, index: usize, count: usize) -> Option<&[AtomicU64]> {
        if index.checked_add(count).is_none_or(|end| end > self.len) {
            return None;
        }
        // SAFETY: the first of them is in bounds of the mapping, or just behind its end.
        let words = unsafe { self.start.add(index) };
        // SAFETY: all of them are in bounds of the mapping, which lives as long as `self`, is aligned
        // to pages, and is accessed by atomic words alone; any bytes are a valid word.
        Some(unsafe { std::slice::from_raw_parts(words.as_ptr(), count) })
    }

    /// Gives the memory of `words` words from `first` on back to the system; they are 0 from then
    /// on. Both are to be whole pages, or the kernel refuses.
    ///
    /// # Errors
    ///
    /// As `madvise(MADV_REMOVE)`: `EOPNOTSUPP` where the file system can't; `EINVAL` for what isn't
    /// whole pages in the mapping.
    pub(crate) fn give_back(&self, first: usize, words: usize) -> Result<(), Errno> {
        if first.checked_add(words).is_none_or(|end| end > self.len) {
            return Err(Errno::INVAL);
        }
        // SAFETY: the range was found to be within the mapping.
        let start = unsafe { self.start.add(first) };
        // SAFETY: it is this mapping's own memory, which is accessed by atomic words alone: to
        // whoever has one of them it becomes 0, as by a store.
        unsafe { rustix::mm::madvise(start.as_ptr().cast(), words * WORD, Advice::LinuxRemove) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrowed from it outlives it.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len * WORD) };
        if let Err(error) = unmapped {
            log::error!("unmapping shared memory: {error}");
        }
    }
}

const ACCESS: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);
const FLAGS: MapFlags = MapFlags::SHARED.union(MapFlags::NORESERVE);

fn bytes_of(words: usize) -> Result<usize, Errno> {
    let bytes = words.checked_mul(WORD).filter(|bytes| *bytes != 0);
    bytes.ok_or(Errno::INVAL)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    fn words(count: usize) -> SharedWords {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = rustix::fs::memfd_create(c"words", flags).unwrap();
        rustix::fs::ftruncate(&file, (count * WORD) as u64).unwrap();
        SharedWords::map(file, count).unwrap()
    }

    #[test]
    fn two_mappings_of_a_file_share_its_words() {
        let one = words(1024);
        let other = SharedWords::map(one.file().unwrap().try_clone().unwrap(), 1024).unwrap();
        one.get(1023).unwrap().store(7, Ordering::Relaxed);
        assert_eq!(other.get(1023).unwrap().load(Ordering::Relaxed), 7);
        assert!(one.get(1024).is_none());
    }

    #[test]
    fn what_is_given_back_is_zero() {
        for words in [words(2048), SharedWords::without_file(2048).unwrap()] {
            give_back_and_check(&words);
        }
    }

    fn give_back_and_check(words: &SharedWords) {
        words.get(511).unwrap().store(1, Ordering::Relaxed);
        words.get(512).unwrap().store(2, Ordering::Relaxed);
        words.give_back(512, 512).unwrap();
        let load = |index: usize| words.get(index).unwrap().load(Ordering::Relaxed);
        assert_eq!((load(511), load(512)), (1, 0));
        assert!(words.give_back(1024, 4096).is_err());
    }
}
