//! Guest memory: memfds at chosen guest addresses, mapped here too.
//!
//! It allocates addresses ([`Memory::alloc`]), copies bytes in and out, and resolves a guest
//! address to a pointer for the rings. It does not say who may access which bytes when: the other
//! side is another process, and the ring's protocol rules that. The invariant: a range that has
//! been resolved is wholly inside one mapping, which lives as long as any clone of its [`Memory`].

#![expect(
    unsafe_code,
    reason = "guest memory is mapped by hand and reached through raw pointers"
)]

mod bump;
mod region;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use bump::Bump;
pub use bump::Mark;
pub use region::{Buf, Gpa, MappedRegion, Region};

/// Errors of guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region could not be made.
    #[error("can't make the memory region at guest address {gpa:#x} of {len} bytes")]
    Create {
        /// The region's guest address.
        gpa: u64,
        /// The region's length.
        len: u64,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// An access is not inside the regions.
    #[error("guest address {gpa:#x} and the {len} bytes there are not in guest memory")]
    OutOfRange {
        /// The address of the access.
        gpa: u64,
        /// Its length.
        len: u64,
    },
    /// No region has that much left.
    #[error("guest memory has no {len} bytes left")]
    Exhausted {
        /// The requested length.
        len: u64,
    },
    /// Bytes could not be moved between guest memory and a file.
    #[error("can't move bytes between guest memory and a file")]
    Transfer(#[source] io::Error),
}

/// Guest memory. A clone is a second handle to the same memory.
#[derive(Clone, Debug)]
pub struct Memory {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    regions: Vec<MappedRegion>,
    bump: Mutex<Bump>,
}

impl Memory {
    /// Makes guest memory of these regions, zeroed. They may touch but should not overlap.
    ///
    /// # Errors
    /// [`MemoryError::Create`] with what the kernel said.
    pub fn new(regions: &[Region]) -> Result<Self, MemoryError> {
        let mapped: Result<Vec<_>, _> = regions
            .iter()
            .map(|&region| {
                MappedRegion::new(region).map_err(|source| MemoryError::Create {
                    gpa: region.gpa,
                    len: region.len,
                    source,
                })
            })
            .collect();
        Ok(Self {
            inner: Arc::new(Inner {
                regions: mapped?,
                bump: Mutex::new(Bump::new(regions)),
            }),
        })
    }

    /// The regions, in the order they were asked for.
    #[must_use]
    pub fn regions(&self) -> &[MappedRegion] {
        &self.inner.regions
    }

    /// The address one past the highest byte.
    #[must_use]
    pub fn end(&self) -> Gpa {
        let ends = self.inner.regions.iter().map(|r| r.gpa() + r.len());
        Gpa(ends.max().unwrap_or(0))
    }

    /// The mapping of `len` bytes at `gpa`, if one region contains all of them.
    ///
    /// The pointer is good while a clone of this memory lives.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub fn pointer(&self, gpa: Gpa, len: usize) -> Result<*mut u8, MemoryError> {
        match self.locate(gpa, len) {
            Some((pointer, found)) if found == len => Ok(pointer),
            _ => Err(out_of_range(gpa, len)),
        }
    }

    /// The user address that the server knows `gpa` by.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub fn user_address(&self, gpa: Gpa) -> Result<u64, MemoryError> {
        let region = self.inner.regions.iter().find_map(|region| {
            let (_, found) = region.locate(gpa, 1)?;
            (found == 1).then(|| region.user_address().wrapping_add(gpa.0 - region.gpa()))
        });
        region.ok_or_else(|| out_of_range(gpa, 1))
    }

    /// Copies `bytes` to `gpa`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`]; what came before the first missing byte is written then.
    pub fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        let mut at = gpa;
        let mut left = bytes;
        while !left.is_empty() {
            let (to, len) = self
                .locate(at, left.len())
                .ok_or_else(|| out_of_range(gpa, bytes.len()))?;
            // SAFETY: `locate` gives `len` bytes inside a mapping that `self` keeps, `left` has at
            // least as many, and a Rust slice never lies in guest memory, so they can't overlap.
            unsafe { ptr::copy_nonoverlapping(left.as_ptr(), to, len) };
            left = left.get(len..).unwrap_or_default();
            at = at.offset(len as u64);
        }
        Ok(())
    }

    /// Copies from `gpa` to `bytes`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub fn read(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let whole = bytes.len();
        let mut at = gpa;
        let mut left = bytes;
        while !left.is_empty() {
            let (from, len) = self
                .locate(at, left.len())
                .ok_or_else(|| out_of_range(gpa, whole))?;
            // SAFETY: as in `write`, the other way round; every byte's value is a valid `u8`.
            unsafe { ptr::copy_nonoverlapping(from, left.as_mut_ptr(), len) };
            left = left.get_mut(len..).unwrap_or_default();
            at = at.offset(len as u64);
        }
        Ok(())
    }

    /// Copies `len` bytes from `gpa` to a vector.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub fn read_vec(&self, gpa: Gpa, len: usize) -> Result<Vec<u8>, MemoryError> {
        let mut bytes = vec![0; len];
        self.read(gpa, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads one value from `gpa`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub fn read_obj<T: FromBytes + IntoBytes>(&self, gpa: Gpa) -> Result<T, MemoryError> {
        let mut value = T::new_zeroed();
        self.read(gpa, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Writes one value to `gpa`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub fn write_obj<T: IntoBytes + Immutable>(
        &self,
        gpa: Gpa,
        value: &T,
    ) -> Result<(), MemoryError> {
        self.write(gpa, value.as_bytes())
    }

    /// Sets `len` bytes at `gpa` to `byte`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub fn fill(&self, gpa: Gpa, len: usize, byte: u8) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < len {
            let (to, found) = self
                .locate(gpa.offset(done as u64), len - done)
                .ok_or_else(|| out_of_range(gpa, len))?;
            // SAFETY: `locate` gives `found` bytes inside a mapping that `self` keeps.
            unsafe { ptr::write_bytes(to, byte, found) };
            done += found;
        }
        Ok(())
    }

    /// One `read` of `fd` straight into guest memory, as a bridge from `/dev/fuse` wants it.
    /// Returns the bytes read, 0 at the end.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] if no one region holds the buffer, or
    /// [`MemoryError::Transfer`].
    pub fn read_from(&self, fd: BorrowedFd<'_>, buf: Buf) -> Result<usize, MemoryError> {
        let len = buf.len as usize;
        let to = self.pointer(buf.gpa, len)?;
        let fd = fd.as_raw_fd();
        // SAFETY: `pointer` gives `len` writable bytes inside a mapping that `self` keeps, and the
        // borrowed fd is open.
        transferred(unsafe { libc::read(fd, to.cast(), len) })
    }

    /// One `write` to `fd` straight from guest memory. Returns the bytes written.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] if no one region holds the buffer, or
    /// [`MemoryError::Transfer`].
    pub fn write_to(&self, fd: BorrowedFd<'_>, buf: Buf) -> Result<usize, MemoryError> {
        let len = buf.len as usize;
        let from = self.pointer(buf.gpa, len)?;
        let fd = fd.as_raw_fd();
        // SAFETY: `pointer` gives `len` readable bytes inside a mapping that `self` keeps, and the
        // borrowed fd is open.
        transferred(unsafe { libc::write(fd, from.cast(), len) })
    }

    /// Gives out `len` bytes at a multiple of `align` (a power of two), from the first region that
    /// has them. They are not freed one by one; see [`Memory::reset_to`].
    ///
    /// # Errors
    /// [`MemoryError::Exhausted`].
    pub fn alloc(&self, len: u64, align: u64) -> Result<Gpa, MemoryError> {
        let gpa = self.bump().alloc(len, align);
        gpa.ok_or(MemoryError::Exhausted { len })
    }

    /// The same from region number `region` only.
    ///
    /// # Errors
    /// [`MemoryError::Exhausted`], also where there is no such region.
    pub fn alloc_in(&self, region: usize, len: u64, align: u64) -> Result<Gpa, MemoryError> {
        let gpa = self.bump().alloc_in(region, len, align);
        gpa.ok_or(MemoryError::Exhausted { len })
    }

    /// The state of the allocator, to go back to.
    #[must_use]
    pub fn mark(&self) -> Mark {
        self.bump().mark()
    }

    /// Frees everything that was allocated since `mark`.
    pub fn reset_to(&self, mark: &Mark) {
        self.bump().reset_to(mark);
    }

    /// Frees everything that was ever allocated, rings too.
    pub fn reset(&self) {
        let fresh: Vec<_> = self.regions().iter().map(|mapped| mapped.region).collect();
        *self.bump() = Bump::new(&fresh);
    }

    fn bump(&self) -> MutexGuard<'_, Bump> {
        self.inner
            .bump
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn locate(&self, gpa: Gpa, len: usize) -> Option<(*mut u8, usize)> {
        self.inner.regions.iter().find_map(|r| r.locate(gpa, len))
    }
}

fn out_of_range(gpa: Gpa, len: usize) -> MemoryError {
    MemoryError::OutOfRange {
        gpa: gpa.0,
        len: len as u64,
    }
}

fn transferred(result: isize) -> Result<usize, MemoryError> {
    usize::try_from(result).map_err(|_negative| MemoryError::Transfer(io::Error::last_os_error()))
}

#[cfg(test)]
mod tests;
