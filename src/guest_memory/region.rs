//! One region of the guest's memory, mapped from a file of the front end.
//!
//! The invariant: neither the guest's nor the front end's addresses of a region wrap around.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::GuestAddress;
use super::error::MemoryError;
use super::mapping::{MapFault, Mapping};
use super::sigbus::MemoryLostEvent;

/// One mapped region of guest memory.
#[derive(Clone, Debug)]
pub struct Region {
    pub(super) guest: GuestAddress,
    pub(super) user: u64,
    pub(super) len: u64,
    mapping: Arc<Mapping>,
}

/// A region as the front end describes it.
#[derive(Debug)]
pub struct RegionDescription {
    /// The file that has the memory.
    pub file: File,
    /// Offset of the region in the file, bytes.
    pub offset: u64,
    /// The guest's address of the region.
    pub guest: GuestAddress,
    /// The front end's own address of the region, which ring addresses use.
    pub user: u64,
    /// Length, bytes.
    pub len: u64,
}

impl Region {
    /// Maps the region. If the file is truncated later, `memory_lost` reports the lost guest
    /// address.
    ///
    /// # Errors
    ///
    /// Fails if the region is empty or exceeds the end of the address space, or if the file is too
    /// short or can't be mapped.
    pub fn map(
        description: RegionDescription,
        memory_lost: &Arc<MemoryLostEvent>,
    ) -> Result<Self, MemoryError> {
        let RegionDescription {
            file,
            offset,
            guest,
            user,
            len,
        } = description;
        let shape = MemoryError::Shape { guest, len };
        let Ok(size) = usize::try_from(len) else {
            return Err(shape);
        };
        if size == 0 || guest.checked_add(len).is_none() || user.checked_add(len).is_none() {
            return Err(shape);
        }
        let mapping = Mapping::new(file, (offset, size), guest, memory_lost);
        let mapping = mapping.map_err(|fault| match fault {
            MapFault::Map(source) => MemoryError::Map {
                guest,
                len,
                offset,
                source,
            },
            MapFault::Watch(source) => MemoryError::Watch { len, source },
        })?;
        Ok(Self {
            guest,
            user,
            len,
            mapping: Arc::new(mapping),
        })
    }

    /// Returns the guest address, the front end's address and the length in bytes.
    #[must_use]
    pub fn addresses(&self) -> (GuestAddress, u64, u64) {
        (self.guest, self.user, self.len)
    }

    /// Returns the mapped file, which stays open as long as the region exists, and the offset of
    /// the region in it.
    #[must_use]
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.mapping.file()
    }

    /// Returns a pointer to the byte at `offset` in the region; `offset` must be below its length.
    pub(super) fn pointer(&self, offset: u64) -> *mut u8 {
        debug_assert!(offset < self.len);
        let offset = usize::try_from(offset).expect("invariant: a mapped length fits usize");
        self.mapping.bytes.as_ptr().wrapping_add(offset)
    }
}
