//! Guest memory that a VMM in this process has mapped.
//!
//! Changes are recorded in the bitmap that the memory has. The invariant: the regions of a [`Memory`]
//! are those that the VMM's memory had when it was made.

use std::fmt;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Address, GuestAddress as VmAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion,
};

use super::GuestAddress;
use super::borrowed::Borrowed;
use super::change_log::ChangeLog;
use super::error::MemoryError;
use super::region::Region;
use super::table::Memory;

impl Memory {
    /// Guest memory that the caller has mapped, from files or anonymously, with the guest's physical
    /// addresses. Nothing is mapped anew. The memory stays mapped until the last request that uses it
    /// has ended. If it has a bitmap of changed pages, all changes are recorded there.
    ///
    /// From a `GuestMemoryAtomic` it is `atomic.memory().into_inner()`. A later change of the memory
    /// map needs another `Memory`.
    ///
    /// # Errors
    ///
    /// Fails if the memory is only reachable through an IOMMU, if a region has no address in this
    /// process, or if there are too many regions.
    pub fn of<M>(memory: Arc<M>) -> Result<Self, MemoryError>
    where
        M: GuestMemory + Send + Sync + 'static,
    {
        let physical = memory.physical_memory().ok_or(MemoryError::Iommu)?;
        let mut regions = Vec::new();
        for region in physical.iter() {
            let guest = region.start_addr().raw_value();
            let len = region.len();
            let slice = region
                .as_volatile_slice()
                .map_err(|source| MemoryError::NoHostAddress { guest, len, source })?;
            // SAFETY: the slice is valid as long as `memory` is borrowed, and the guard shares ownership
            // of it.
            let memory = unsafe { Borrowed::new(&slice, Arc::clone(&memory) as _) };
            regions.push(Region::borrowed(guest, memory)?);
        }
        let whole = Self::new(regions, None)?;
        // A bitmap without a size records nothing.
        if size_of::<<PhysicalRegion<M> as GuestMemoryRegion>::B>() == 0 {
            return Ok(whole);
        }
        Ok(whole.with_change_log(Some(Arc::new(Bitmaps(memory)))))
    }
}

impl Memory {
    /// Guest memory that the caller has mapped, from its addresses: each region is the guest's address,
    /// the address in this process, and the length in bytes. For a VMM whose `vm-memory` is another
    /// version than [`of`](Self::of) takes, or that has none. `guard` is kept until the last request
    /// that uses the memory has ended.
    ///
    /// # Errors
    ///
    /// Fails if a region is empty or wraps around, if two overlap, or if there are too many.
    ///
    /// # Safety
    ///
    /// As long as `guard` exists, all regions are mapped for reading and writing, and no Rust reference
    /// to them exists.
    pub unsafe fn from_raw_regions(
        regions: impl IntoIterator<Item = (GuestAddress, *mut u8, usize)>,
        guard: Arc<dyn Send + Sync>,
    ) -> Result<Self, MemoryError> {
        let regions = regions.into_iter().map(move |(guest, start, len)| {
            // SAFETY: the caller's promise is the same.
            let memory = unsafe { Borrowed::from_raw(start, len, Arc::clone(&guard)) };
            Region::borrowed(guest, memory)
        });
        Self::new(regions.collect::<Result<_, _>>()?, None)
    }

    /// The same memory, of which all changes are recorded in `log`.
    #[must_use]
    pub fn recording_in(&self, log: Arc<dyn ChangeLog>) -> Self {
        self.with_change_log(Some(log))
    }
}

type PhysicalRegion<M> = <<M as GuestMemory>::PhysicalMemory as GuestMemoryBackend>::R;

/// The bitmaps of changed pages that the regions of a memory have.
struct Bitmaps<M>(Arc<M>);

impl<M> fmt::Debug for Bitmaps<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bitmaps")
    }
}

impl<M: GuestMemory + Send + Sync> ChangeLog for Bitmaps<M> {
    fn mark(&self, mut guest: GuestAddress, mut len: u64) {
        let Some(physical) = self.0.physical_memory() else {
            return;
        };
        while len != 0 {
            let Some(region) = physical.find_region(VmAddress(guest)) else {
                return;
            };
            let offset = guest - region.start_addr().raw_value();
            let part = len.min(region.len() - offset);
            if let (Ok(offset), Ok(part)) = (usize::try_from(offset), usize::try_from(part)) {
                region.bitmap().mark_dirty(offset, part);
            }
            guest = guest.saturating_add(part);
            len -= part;
        }
    }
}
