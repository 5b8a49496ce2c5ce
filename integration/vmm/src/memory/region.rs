//! Regions of guest memory: as requested, and as mapped.
//!
//! The invariant: a [`MappedRegion`] is mapped from `new` to `drop`, and what `locate` returns is
//! inside.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

/// A guest physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

impl Gpa {
    /// The address `bytes` further on, wrapping, since a hostile driver's addresses do.
    #[must_use]
    pub fn offset(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

/// A buffer in guest memory, as a descriptor names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buf {
    /// Its guest address.
    pub gpa: Gpa,
    /// How many bytes it has.
    pub len: u32,
}

impl Buf {
    /// A buffer of `len` bytes at `gpa`. Nothing is checked: a hostile driver's may lie anywhere.
    #[must_use]
    pub fn new(gpa: Gpa, len: u32) -> Self {
        Self { gpa, len }
    }
}

/// A region of guest memory as asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address of its first byte.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Where in the memfd it begins; need not be a page's boundary.
    pub file_offset: u64,
    /// The user address that is sent to the server; by default the address of the mapping here.
    pub user_address: Option<u64>,
}

impl Region {
    /// A region of `len` bytes at guest address `gpa`, from the start of its memfd.
    #[must_use]
    pub fn new(gpa: u64, len: u64) -> Self {
        Self {
            gpa,
            len,
            file_offset: 0,
            user_address: None,
        }
    }

    /// The same, beginning `offset` bytes into its memfd.
    #[must_use]
    pub fn file_offset(self, offset: u64) -> Self {
        Self {
            file_offset: offset,
            ..self
        }
    }

    /// The same, with a user address that is not where it is mapped here.
    #[must_use]
    pub fn user_address(self, address: u64) -> Self {
        Self {
            user_address: Some(address),
            ..self
        }
    }
}

/// A mapped region with its memfd.
#[derive(Debug)]
pub struct MappedRegion {
    pub(super) region: Region,
    fd: OwnedFd,
    /// Where the memfd's first byte is mapped; the region begins `file_offset` further.
    mapping: NonNull<u8>,
    /// Bytes mapped: `file_offset + len`.
    mapped: usize,
}

// SAFETY: the mapping is made in `MappedRegion::new` and unmapped in `drop` only, and every
// access through `mapping` is by raw pointer; no reference into it is ever made but for the
// rings' atomics, so a handle may move to another thread.
unsafe impl Send for MappedRegion {}
// SAFETY: as for `Send`. Two threads (or a thread and the server) that copy to the same bytes at
// once race on plain bytes, of which every value is valid; the ring's protocol keeps them apart.
unsafe impl Sync for MappedRegion {}

impl MappedRegion {
    pub(super) fn new(region: Region) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let file_len = region
            .file_offset
            .checked_add(region.len)
            .ok_or_else(invalid)?;
        let mapped = usize::try_from(file_len).map_err(io::Error::other)?;
        if region.gpa.checked_add(region.len).is_none() {
            return Err(invalid());
        }
        let fd = rustix::fs::memfd_create("guest memory", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, file_len)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses the address (null hint, no MAP_FIXED), so no mapping that
        // exists is replaced.
        let mapping =
            unsafe { rustix::mm::mmap(ptr::null_mut(), mapped, protection, flags, &fd, 0) }?;
        let mapping = NonNull::new(mapping.cast()).ok_or_else(invalid)?;
        Ok(Self {
            region,
            fd,
            mapping,
            mapped,
        })
    }

    /// Guest physical address of its first byte.
    #[must_use]
    pub fn gpa(&self) -> u64 {
        self.region.gpa
    }

    /// Its length in bytes, never 0 unless it was asked for so.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a region is not a collection")]
    pub fn len(&self) -> u64 {
        self.region.len
    }

    /// Where in the memfd it begins.
    #[must_use]
    pub fn file_offset(&self) -> u64 {
        self.region.file_offset
    }

    /// The user address to tell the server.
    #[must_use]
    pub fn user_address(&self) -> u64 {
        self.region
            .user_address
            .unwrap_or_else(|| self.start().addr() as u64)
    }

    /// The memfd.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn start(&self) -> *mut u8 {
        // The offset is at most `mapped`, which is a usize.
        let offset = usize::try_from(self.region.file_offset).unwrap_or(self.mapped);
        self.mapping.as_ptr().wrapping_add(offset)
    }

    /// How many bytes of `len` from `gpa` on are here, and where the first is.
    pub(super) fn locate(&self, gpa: Gpa, len: usize) -> Option<(*mut u8, usize)> {
        let offset = gpa.0.checked_sub(self.region.gpa)?;
        let left = self.region.len.checked_sub(offset).filter(|&n| n > 0)?;
        let offset = usize::try_from(offset).ok()?;
        let left = usize::try_from(left).ok()?;
        Some((self.start().wrapping_add(offset), left.min(len)))
    }
}

impl Drop for MappedRegion {
    fn drop(&mut self) {
        // SAFETY: `mapping` and `mapped` are what `mmap` gave in `new`, this is the only unmap,
        // and `Memory` hands its pointers only to owners of a clone of it.
        if let Err(error) = unsafe { rustix::mm::munmap(self.mapping.as_ptr().cast(), self.mapped) }
        {
            debug_assert!(false, "munmap of a mapping of ours: {error}");
        }
    }
}
