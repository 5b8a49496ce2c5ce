//! A snapshot of the guest's memory: all regions, and the dirty log if changes are logged.
//!
//! The invariant: a snapshot never changes. A change of the memory table makes another one.

use std::sync::Arc;

use super::GuestAddress;
use super::change_log::ChangeLog;
use super::dirty_log::DirtyLog;
use super::error::MemoryError;
use super::region::Region;
use super::slice::Slice;
use crate::io::GuestBuffer;

/// A snapshot of the guest's memory, with the dirty log if changes are logged.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Sorted by guest address, without overlaps.
    regions: Vec<Region>,
    log: Option<Arc<dyn ChangeLog>>,
}

impl Memory {
    /// The most regions of a snapshot; QEMU never uses more. Each takes a mapping and a descriptor.
    pub const MAX_REGIONS: usize = 512;

    /// Makes a snapshot of `regions`, which may be in any order.
    ///
    /// # Errors
    ///
    /// Fails if two of them overlap, or if there are too many.
    pub(crate) fn new(
        regions: Vec<Region>,
        log: Option<Arc<DirtyLog>>,
    ) -> Result<Self, MemoryError> {
        Self::with_regions(regions, log.map(|log| log as _))
    }

    fn with_regions(
        mut regions: Vec<Region>,
        log: Option<Arc<dyn ChangeLog>>,
    ) -> Result<Self, MemoryError> {
        if regions.len() > Self::MAX_REGIONS {
            return Err(MemoryError::TooMany {
                max: Self::MAX_REGIONS,
            });
        }
        regions.sort_by_key(|region| region.guest);
        for pair in regions.windows(2) {
            if let [lower, upper] = pair
                && lower.guest + lower.len > upper.guest
            {
                return Err(MemoryError::Overlap {
                    first: lower.guest,
                    second: upper.guest,
                });
            }
        }
        Ok(Self { regions, log })
    }

    /// Returns the same memory with `region` added.
    ///
    /// # Errors
    ///
    /// Fails if `region` overlaps another one, or if there are too many.
    pub(crate) fn with_region(&self, region: Region) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(region);
        Self::with_regions(regions, self.log.clone())
    }

    /// Returns the same memory without the region of `len` bytes at `guest` and `user`.
    ///
    /// # Errors
    ///
    /// Fails if there is no such region.
    pub(crate) fn without_region(
        &self,
        guest: GuestAddress,
        user: u64,
        len: u64,
    ) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        let at = regions
            .iter()
            .position(|r| r.guest == guest && r.user == user && r.len == len)
            .ok_or(MemoryError::Unknown { guest, len })?;
        regions.remove(at);
        Self::with_regions(regions, self.log.clone())
    }

    /// Returns the same memory with another log, or without one.
    #[must_use]
    pub(crate) fn with_log(&self, log: Option<Arc<DirtyLog>>) -> Self {
        self.with_change_log(log.map(|log| log as _))
    }

    pub(super) fn with_change_log(&self, log: Option<Arc<dyn ChangeLog>>) -> Self {
        Self {
            regions: self.regions.clone(),
            log,
        }
    }

    /// Returns the regions, sorted by guest address.
    #[must_use]
    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Returns the guest address of the memory at the front end's address `user`.
    #[must_use]
    pub fn guest_address(&self, user: u64) -> Option<GuestAddress> {
        self.regions
            .iter()
            .find(|r| user >= r.user && user - r.user < r.len)
            .map(|r| r.guest + (user - r.user))
    }

    /// Returns the longest prefix of `guest..guest + len` that is within one region.
    pub(crate) fn slice(&self, guest: GuestAddress, len: u64) -> Option<Slice> {
        let after = self.regions.partition_point(|r| r.guest <= guest);
        let region = self.regions.get(after.checked_sub(1)?)?;
        let offset = guest - region.guest;
        if offset >= region.len {
            return None;
        }
        let len = len.min(region.len - offset);
        Some(Slice {
            pointer: region.pointer(offset),
            len: usize::try_from(len).ok()?,
            guest,
        })
    }

    /// Calls `each` with the slices of `guest..guest + len`, in order. Returns false if part of the
    /// range is not mapped, in which case `each` may have been called for the slices before it.
    pub(crate) fn slices(
        &self,
        mut guest: GuestAddress,
        len: u64,
        mut each: impl FnMut(Slice),
    ) -> bool {
        let Some(end) = guest.checked_add(len) else {
            return false;
        };
        while guest < end {
            let Some(slice) = self.slice(guest, end - guest) else {
                return false;
            };
            guest += slice.len as u64;
            each(slice);
        }
        true
    }

    /// Copies from guest memory. Returns false, with the content of `into` unspecified, if part of
    /// the range is not mapped.
    pub(crate) fn read(&self, guest: GuestAddress, into: &mut [u8]) -> bool {
        let mut done = 0;
        self.slices(guest, into.len() as u64, |slice| {
            if let Some(part) = into.get_mut(done..done + slice.len) {
                slice.read(part);
            }
            done += slice.len;
        })
    }

    /// Marks `guest..guest + len` as changed, if changes are logged.
    pub(crate) fn mark_dirty(&self, guest: GuestAddress, len: u64) {
        if let Some(log) = &self.log {
            log.mark(guest, len);
        }
    }

    /// Whether changes are logged.
    pub(crate) fn is_logging(&self) -> bool {
        self.log.is_some()
    }
}

/// Makes a buffer for I/O from slices of one snapshot, which `guard` keeps mapped.
pub(crate) fn buffer(slices: impl Iterator<Item = Slice>, guard: Arc<Memory>) -> GuestBuffer {
    let pieces = slices.map(|slice| (slice.pointer, slice.len));
    // SAFETY: the slices come from the snapshot that `guard` holds (callers have no other
    // one), so they stay mapped as long as `guard` lives; no reference to guest memory is
    // ever made.
    unsafe { GuestBuffer::from_raw_pieces(pieces, guard) }
}
