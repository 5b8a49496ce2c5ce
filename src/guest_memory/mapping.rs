//! A watched mapping of a file that another process may truncate.
//!
//! The invariant: all of a mapping is watched as long as it is mapped, so an access within it never
//! ends the process.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::Advice;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};

use super::error::MemoryError;
use super::sigbus::{MemoryLostEvent, Watch};

/// A watched mapping. Its watch ends before it is unmapped.
#[derive(Debug)]
pub(crate) struct Mapping {
    _watch: Watch,
    pub(super) bytes: MmapRegion<()>,
}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` on; `base` is the address by which `memory_lost`
    /// reports the first of them.
    pub(super) fn new(
        file: File,
        (offset, len): (u64, usize),
        base: u64,
        memory_lost: &Arc<MemoryLostEvent>,
    ) -> Result<Self, MapFault> {
        let unit = check_file(&file, offset, len)?;
        let bytes = MmapRegion::from_file(FileOffset::new(file, offset), len)?;
        // SAFETY: the bytes are one mapping, which was made just above and is unmapped after the
        // watch has ended (fields are dropped in order); all access to it is through raw pointers;
        // and a mapping begins at a multiple of the size of its pages.
        let watch = unsafe { Watch::new((bytes.as_ptr(), len), unit, base, memory_lost) };
        let watch = watch.map_err(MapFault::Watch)?;
        // SAFETY: the range is the mapping made above, whose contents the advice doesn't change.
        let excluded =
            unsafe { rustix::mm::madvise(bytes.as_ptr().cast(), len, Advice::LinuxDontDump) };
        if let Err(error) = excluded {
            log::debug!("a core dump would include the guest's memory: {error}");
        }
        Ok(Self {
            _watch: watch,
            bytes,
        })
    }

    /// Maps 64-bit words: `len` bytes of `file` from `offset` on.
    pub(crate) fn map_words(
        file: File,
        offset: u64,
        len: usize,
        base: u64,
        memory_lost: &Arc<MemoryLostEvent>,
    ) -> Result<Self, MemoryError> {
        let wide = len as u64;
        Self::new(file, (offset, len), base, memory_lost).map_err(|fault| match fault {
            MapFault::Map(source) => MemoryError::MapInflight {
                len: wide,
                offset,
                source,
            },
            MapFault::Watch(source) => MemoryError::Watch { len: wide, source },
        })
    }

    /// Loads the little-endian word at `index`, which must be within the mapping.
    #[inline]
    pub(crate) fn load(&self, index: usize, order: Ordering) -> u64 {
        u64::from_le(self.word(index).load(order))
    }

    /// Stores the little-endian word at `index`, which must be within the mapping.
    #[inline]
    pub(crate) fn store(&self, index: usize, value: u64, order: Ordering) {
        self.word(index).store(value.to_le(), order);
    }

    #[inline]
    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.bytes.size() / 8);
        let pointer = self.bytes.as_ptr().wrapping_add(8 * index).cast::<u64>();
        // SAFETY: the word is within the mapping by the assertion, the mapping lives as long as
        // `self`, and the word is aligned because a mapping begins at a page.
        unsafe { AtomicU64::from_ptr(pointer) }
    }
    /// Returns the mapped file, and the offset of the mapping in it.
    pub(crate) fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        let offset = self.bytes.file_offset()?;
        Some((offset.file().as_fd(), offset.start()))
    }
}

/// Why a file can't be mapped.
pub(super) enum MapFault {
    Map(MmapRegionError),
    Watch(rustix::io::Errno),
}

impl From<MmapRegionError> for MapFault {
    fn from(error: MmapRegionError) -> Self {
        Self::Map(error)
    }
}

/// Refuses a file that is shorter than the mapping, as an access beyond its end raises SIGBUS.
/// Returns the size of the pages in which the file is mapped.
fn check_file(file: &File, offset: u64, len: usize) -> Result<usize, MapFault> {
    let metadata = file.metadata().map_err(MmapRegionError::Mmap)?;
    let wide = len as u64;
    let end = offset
        .checked_add(wide)
        .ok_or(MmapRegionError::InvalidOffsetLength)?;
    if !metadata.is_file() {
        // The length and the page size of a device can't be queried.
        return Ok(len.next_multiple_of(rustix::param::page_size()));
    }
    if end > metadata.len() {
        return Err(MmapRegionError::MappingPastEof.into());
    }
    let kind = rustix::fs::fstatfs(file).map_err(|error| MmapRegionError::Mmap(error.into()))?;
    if kind.f_type != libc::HUGETLBFS_MAGIC {
        return Ok(rustix::param::page_size());
    }
    let unit = usize::try_from(kind.f_bsize).unwrap_or(usize::MAX);
    // The kernel maps whole huge pages, and refuses to unmap parts of them.
    if unit == 0 || !len.is_multiple_of(unit) {
        return Err(MmapRegionError::InvalidOffsetLength.into());
    }
    Ok(unit)
}
