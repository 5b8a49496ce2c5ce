//! A file's bytes mapped into memory, read and written one by one so that the compiler neither
//! merges nor omits an access. Invariant: no access outside of the mapping.

#![expect(
    unsafe_code,
    reason = "mmap, and access to what others may change meanwhile"
)]

use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, MsyncFlags, ProtFlags};

use crate::failure::{Failure, Outcome};

/// Bytes of a file, mapped.
#[derive(Debug)]
pub(crate) struct Region {
    start: NonNull<u8>,
    length: usize,
}

impl Region {
    /// Maps the first `length` bytes so that writes reach the file.
    pub(crate) fn shared(file: impl AsFd, length: usize) -> rustix::io::Result<Self> {
        Self::map(
            file,
            length,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
        )
    }

    /// Maps the first `length` bytes to be read only.
    pub(crate) fn read_only(file: impl AsFd, length: usize) -> rustix::io::Result<Self> {
        Self::map(file, length, ProtFlags::READ, MapFlags::SHARED)
    }

    /// Maps the first `length` bytes so that writes stay in this process.
    pub(crate) fn private(file: impl AsFd, length: usize) -> rustix::io::Result<Self> {
        Self::map(
            file,
            length,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )
    }

    fn map(
        file: impl AsFd,
        length: usize,
        protection: ProtFlags,
        flags: MapFlags,
    ) -> rustix::io::Result<Self> {
        // SAFETY: the kernel chooses a free address, so nothing that is in use is replaced.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, protection, flags, file, 0) }?;
        let start = NonNull::new(start.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { start, length })
    }

    fn at(&self, index: usize) -> NonNull<u8> {
        assert!(index < self.length, "outside of the region");
        // SAFETY: within the mapping, by the line above; it lives as long as `self`.
        unsafe { self.start.add(index) }
    }

    pub(crate) fn byte(&self, index: usize) -> u8 {
        // SAFETY: `at` gives an address of the mapping, which was mapped to be read.
        unsafe { self.at(index).read_volatile() }
    }

    pub(crate) fn bytes(&self, from: usize, length: usize) -> Vec<u8> {
        (from..from + length)
            .map(|index| self.byte(index))
            .collect()
    }

    /// Writes; the region must not be a read-only one, or the process is killed.
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: `at` gives an address of the mapping. No reference into it exists.
            unsafe { self.at(at + index).write_volatile(*byte) };
        }
    }

    /// Has what was written reach the file.
    pub(crate) fn sync(&self) -> Outcome {
        // SAFETY: start and length are those of the mapping.
        unsafe { rustix::mm::msync(self.start.as_ptr().cast(), self.length, MsyncFlags::SYNC) }
            .map_err(Failure::from)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more: accesses borrow `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
