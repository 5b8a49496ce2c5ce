//! A shared mapping of a file, accessed as atomic words.
//!
//! All accesses are to whole words of 64 bits, each of which is atomic. A process that maps the
//! file after this one was killed sees each word as it was before or after a store, and the stores
//! of a thread in order. The invariant: each word that is returned is in the mapping.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Bytes of a word.
pub(crate) const WORD: usize = size_of::<u64>();

/// The first bytes of a file, or anonymous memory, as words. Mapped until this is dropped.
#[derive(Debug)]
pub(crate) struct MappedWords {
    start: NonNull<AtomicU64>,
    len: usize,
    file: Option<OwnedFd>,
}

// SAFETY: it owns its mapping, and lends nothing but atomic words.
unsafe impl Send for MappedWords {}
// SAFETY: as above.
unsafe impl Sync for MappedWords {}

impl MappedWords {
    /// Maps `words` words of `file`, which must have and keep at least this length: accessing a
    /// word beyond its end kills the process (`SIGBUS`).
    ///
    /// # Errors
    ///
    /// Those of `mmap(2)`; `EINVAL` for no words, or more than the address space has.
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

    /// Maps `words` words of zeroed anonymous memory. Unlike a `memfd`, it isn't subject to
    /// `RLIMIT_FSIZE`, and no other process can map it.
    ///
    /// # Errors
    ///
    /// As for [`map`](Self::map).
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

    /// The number of words.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The mapped file, if there is one.
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
        // SAFETY: all of them are in bounds of the mapping, which lives as long as `self`, is
        // aligned to pages, and is accessed by atomic words alone; any bytes are a valid word.
        Some(unsafe { std::slice::from_raw_parts(words.as_ptr(), count) })
    }

    /// Releases the memory of `words` words from `first` on, which are 0 afterwards. The range must
    /// consist of whole pages.
    ///
    /// # Errors
    ///
    /// Those of `madvise(MADV_REMOVE)`: `EOPNOTSUPP` if the file system doesn't support it;
    /// `EINVAL` for a range that doesn't consist of whole pages or isn't in the mapping.
    pub(crate) fn release(&self, first: usize, words: usize) -> Result<(), Errno> {
        if first.checked_add(words).is_none_or(|end| end > self.len) {
            return Err(Errno::INVAL);
        }
        // SAFETY: the range was checked to be within the mapping.
        let start = unsafe { self.start.add(first) };
        // SAFETY: the memory belongs to this mapping and is accessed as atomic words alone, whose
        // users see a change to 0 as if by a store.
        unsafe { rustix::mm::madvise(start.as_ptr().cast(), words * WORD, Advice::LinuxRemove) }
    }
}

/// A known number of words in a row of a mapping, which stays mapped as long as this lives.
#[derive(Debug)]
pub(crate) struct WordArray<const N: usize> {
    start: NonNull<[AtomicU64; N]>,
    _words: Arc<MappedWords>,
}

impl<const N: usize> WordArray<N> {
    /// The words from `first` on; `None` if they reach beyond the end.
    pub(crate) fn new(words: &Arc<MappedWords>, first: usize) -> Option<Self> {
        let row: &[AtomicU64; N] = words.get_some(first, N)?.try_into().ok()?;
        Some(Self {
            start: NonNull::from(row),
            _words: Arc::clone(words),
        })
    }

    /// The words.
    #[inline]
    pub(crate) fn words(&self) -> &[AtomicU64; N] {
        // SAFETY: the words are part of the mapping, which this keeps, and are accessed by atomic
        // words alone.
        unsafe { self.start.as_ref() }
    }
}

/// Words in a row of a mapping, which stays mapped as long as this lives.
#[derive(Debug)]
pub(crate) struct WordRow {
    start: NonNull<AtomicU64>,
    len: usize,
    _words: Arc<MappedWords>,
}

impl WordRow {
    /// The `count` words from `first` on; `None` if they reach beyond the end.
    pub(crate) fn new(words: &Arc<MappedWords>, first: usize, count: usize) -> Option<Self> {
        let row = words.get_some(first, count)?;
        Some(Self {
            start: NonNull::new(row.as_ptr().cast_mut())?,
            len: row.len(),
            _words: Arc::clone(words),
        })
    }

    /// The word at `index`; `None` beyond the end.
    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<&AtomicU64> {
        if index >= self.len {
            return None;
        }
        // SAFETY: the index is in bounds of the row.
        let word = unsafe { self.start.add(index) };
        // SAFETY: the row is part of the mapping, which this keeps, and is accessed by atomic words
        // alone.
        Some(unsafe { word.as_ref() })
    }
}

impl Drop for MappedWords {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and nothing borrowed from it outlives it.
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

    fn words(count: usize) -> MappedWords {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = rustix::fs::memfd_create(c"words", flags).unwrap();
        rustix::fs::ftruncate(&file, (count * WORD) as u64).unwrap();
        MappedWords::map(file, count).unwrap()
    }

    #[test]
    fn two_mappings_of_a_file_share_its_words() {
        let one = words(1024);
        let other = MappedWords::map(one.file().unwrap().try_clone().unwrap(), 1024).unwrap();
        one.get(1023).unwrap().store(7, Ordering::Relaxed);
        assert_eq!(other.get(1023).unwrap().load(Ordering::Relaxed), 7);
        assert!(one.get(1024).is_none());
    }

    #[test]
    fn row_of_words_stays_when_the_mapping_is_dropped() {
        let all = Arc::new(words(1024));
        assert!(WordRow::new(&all, 1000, 25).is_none());
        let row = WordRow::new(&all, 1000, 24).unwrap();
        assert!(WordArray::<25>::new(&all, 1000).is_none());
        let array = WordArray::<24>::new(&all, 1000).unwrap();
        all.get(1023).unwrap().store(3, Ordering::Relaxed);
        drop(all);
        assert_eq!(row.get(23).unwrap().load(Ordering::Relaxed), 3);
        assert!(row.get(24).is_none());
        drop(row);
        assert_eq!(array.words()[23].load(Ordering::Relaxed), 3);
    }

    #[test]
    fn released_words_are_zero() {
        for words in [words(2048), MappedWords::without_file(2048).unwrap()] {
            release_and_check(&words);
        }
    }

    fn release_and_check(words: &MappedWords) {
        words.get(511).unwrap().store(1, Ordering::Relaxed);
        words.get(512).unwrap().store(2, Ordering::Relaxed);
        words.release(512, 512).unwrap();
        let load = |index: usize| words.get(index).unwrap().load(Ordering::Relaxed);
        assert_eq!((load(511), load(512)), (1, 0));
        assert!(words.release(1024, 4096).is_err());
    }
}
