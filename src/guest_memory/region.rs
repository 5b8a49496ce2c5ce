//! One region of the guest's memory: mapped from a file of the front end, or by someone else.
//!
//! The invariant: neither the guest's nor the front end's addresses of a region wrap around.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::GuestAddress;
use super::borrowed::Borrowed;
use super::error::MemoryError;
use super::mapping::{MapFault, Mapping};
use super::sigbus::MemoryLostEvent;

/// One mapped region of guest memory.
#[derive(Clone, Debug)]
pub struct Region {
    pub(super) guest: GuestAddress,
    pub(super) user: u64,
    pub(super) len: u64,
    mapping: Backing,
}

/// Who has mapped a region.
#[derive(Clone, Debug)]
enum Backing {
    /// This room.
    Own(Arc<Mapping>),
    /// Another part of the process.
    Borrowed(Borrowed),
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
            mapping: Backing::Own(Arc::new(mapping)),
        })
    }

    /// A region at `guest` that another part of the process has mapped. Its addresses in the front
    /// end's address space are those of the guest.
    pub(super) fn borrowed(guest: GuestAddress, memory: Borrowed) -> Result<Self, MemoryError> {
        let len = memory.len() as u64;
        if len == 0 || guest.checked_add(len).is_none() {
            return Err(MemoryError::Shape { guest, len });
        }
        Ok(Self {
            guest,
            user: guest,
            len,
            mapping: Backing::Borrowed(memory),
        })
    }

    /// Returns the guest address, the front end's address and the length in bytes.
    #[must_use]
    pub fn addresses(&self) -> (GuestAddress, u64, u64) {
        (self.guest, self.user, self.len)
    }

    /// Returns the mapped file, which stays open as long as the region exists, and the offset of
    /// the region in it. A region that another part of the process has mapped has none here.
    #[must_use]
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        match &self.mapping {
            Backing::Own(mapping) => mapping.file(),
            Backing::Borrowed(_) => None,
        }
    }

    /// Returns a pointer to the byte at `offset` in the region; `offset` must be below its length.
    pub(super) fn pointer(&self, offset: u64) -> *mut u8 {
        debug_assert!(offset < self.len);
        let offset = usize::try_from(offset).expect("invariant: a mapped length fits usize");
        let start = match &self.mapping {
            Backing::Own(mapping) => mapping.bytes.as_ptr(),
            Backing::Borrowed(memory) => memory.start(),
        };
        start.wrapping_add(offset)
    }
}
