//! The three areas of a split ring in guest memory, through pointers resolved once.
//!
//! It reads and writes the fields; what they mean is [`super::Queue`]'s. The invariant: every index
//! is reduced to the ring's size before it becomes an address, so that no argument reaches outside
//! the areas, and all of them are in memory that `Areas` keeps mapped.

#![expect(
    unsafe_code,
    reason = "rings are shared with another process and reached through raw pointers"
)]

use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use crate::memory::{Gpa, Memory, MemoryError};

#[cfg(target_endian = "big")]
compile_error!("a virtio 1 ring is little-endian, and nothing is swapped here");

/// A descriptor, as it lies in the table (virtio 1.2, 2.7.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Descriptor {
    /// Guest address of the buffer, or of the indirect table.
    pub addr: u64,
    /// Bytes of the buffer.
    pub len: u32,
    /// [`Descriptor::NEXT`], [`Descriptor::WRITE`], [`Descriptor::INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor, where flags say that there is one.
    pub next: u16,
}

impl Descriptor {
    /// Flag: `next` is meant.
    pub const NEXT: u16 = 1;
    /// Flag: the device writes here.
    pub const WRITE: u16 = 2;
    /// Flag: the buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
    /// Bytes of one descriptor.
    pub const SIZE: u64 = 16;
}

/// Guest addresses of a ring's three areas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Descriptor table, aligned to 16.
    pub descriptors: Gpa,
    /// Available ring, aligned to 2.
    pub available: Gpa,
    /// Used ring, aligned to 4.
    pub used: Gpa,
}

impl Addresses {
    /// Gives out memory for a ring of `size` entries.
    ///
    /// # Errors
    /// [`MemoryError::Exhausted`].
    pub fn alloc(memory: &Memory, size: u16) -> Result<Self, MemoryError> {
        let size = u64::from(size);
        Ok(Self {
            descriptors: memory.alloc(Descriptor::SIZE * size, 4096)?,
            available: memory.alloc(AVAIL_ENTRIES + 2 * size + 2, 64)?,
            used: memory.alloc(USED_ENTRIES + 8 * size + 2, 64)?,
        })
    }
}

/// Bytes before the first entry of the available ring, and of the used ring: flags and index.
const AVAIL_ENTRIES: u64 = 4;
const USED_ENTRIES: u64 = 4;

#[derive(Debug)]
pub(super) struct Areas {
    addresses: Addresses,
    size: u16,
    descriptors: *mut Descriptor,
    available: *mut u16,
    used: *mut u8,
    /// Keeps the three pointers good.
    _memory: Memory,
}

// SAFETY: the pointers go into memory that `_memory` keeps mapped, wherever the owner runs, and
// all access to what the device or another thread may touch at the same time is atomic.
unsafe impl Send for Areas {}

impl Areas {
    /// Resolves the areas of a ring of `size` entries, a power of two.
    pub(super) fn new(
        memory: &Memory,
        addresses: Addresses,
        size: u16,
    ) -> Result<Self, MemoryError> {
        debug_assert!(size.is_power_of_two());
        let entries = usize::from(size);
        let aligned = |gpa: Gpa, len: usize, align: usize| {
            let pointer = memory.pointer(gpa, len)?;
            if pointer.addr().is_multiple_of(align) {
                Ok(pointer)
            } else {
                Err(MemoryError::OutOfRange {
                    gpa: gpa.0,
                    len: len as u64,
                })
            }
        };
        let available = aligned(addresses.available, 6 + 2 * entries, 2)?;
        Ok(Self {
            addresses,
            size,
            descriptors: aligned(addresses.descriptors, 16 * entries, 16)?.cast(),
            available: available.cast(),
            used: aligned(addresses.used, 6 + 8 * entries, 4)?,
            _memory: memory.clone(),
        })
    }

    pub(super) fn addresses(&self) -> Addresses {
        self.addresses
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    pub(super) fn mask(&self, index: u16) -> u16 {
        index & (self.size - 1)
    }

    pub(super) fn write_descriptor(&mut self, index: u16, descriptor: Descriptor) {
        let at = self.descriptors.wrapping_add(usize::from(self.mask(index)));
        // SAFETY: `new` resolved `size` aligned descriptors there, `mask` keeps the index below
        // `size`, and `_memory` keeps them mapped. `&mut self` is the only writer in this process;
        // the device reads what it is told of by the Release store of the available index only.
        unsafe { at.write(descriptor) };
    }

    pub(super) fn descriptor(&self, index: u16) -> Descriptor {
        let at = self.descriptors.wrapping_add(usize::from(self.mask(index)));
        // SAFETY: as in `write_descriptor`; every bit pattern is a valid `Descriptor`.
        unsafe { at.read_volatile() }
    }

    pub(super) fn avail_flags(&self) -> &AtomicU16 {
        self.avail(0)
    }

    pub(super) fn avail_idx(&self) -> &AtomicU16 {
        self.avail(1)
    }

    pub(super) fn avail_entry(&self, index: u16) -> &AtomicU16 {
        self.avail(2 + usize::from(self.mask(index)))
    }

    pub(super) fn used_event(&self) -> &AtomicU16 {
        self.avail(2 + usize::from(self.size))
    }

    pub(super) fn used_flags(&self) -> &AtomicU16 {
        self.used_u16(0)
    }

    pub(super) fn used_idx(&self) -> &AtomicU16 {
        self.used_u16(2)
    }

    pub(super) fn avail_event(&self) -> &AtomicU16 {
        self.used_u16(4 + 8 * usize::from(self.size))
    }

    /// The used element in the slot of `index`: the chain's head and the bytes written.
    pub(super) fn used_elem(&self, index: u16) -> (u32, u32) {
        let at = 4 + 8 * usize::from(self.mask(index));
        // Relaxed: the Acquire load of the used index came before, and orders these after it.
        let id = self.used_u32(at).load(Ordering::Relaxed);
        let len = self.used_u32(at + 4).load(Ordering::Relaxed);
        (id, len)
    }

    /// Writes a used element, as a device does.
    #[cfg(test)]
    pub(super) fn write_used_elem(&self, index: u16, id: u32, len: u32) {
        let at = 4 + 8 * usize::from(self.mask(index));
        // Relaxed: the Release store of the used index comes after and orders these before it.
        self.used_u32(at).store(id, Ordering::Relaxed);
        self.used_u32(at + 4).store(len, Ordering::Relaxed);
    }

    /// A field of the available ring, counted in 16-bit words; below `3 + size`.
    fn avail(&self, word: usize) -> &AtomicU16 {
        let at = self.available.wrapping_add(word);
        // SAFETY: `new` resolved `3 + size` aligned words there, the callers above stay below
        // that, `_memory` keeps them mapped as long as `self`, and this process and the device
        // only ever touch them atomically.
        unsafe { AtomicU16::from_ptr(at) }
    }

    /// A 16-bit field of the used ring, at an even byte offset below `6 + 8 * size`.
    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        let at = self.used.wrapping_add(offset).cast();
        // SAFETY: as in `avail`, for the `6 + 8 * size` bytes that `new` resolved.
        unsafe { AtomicU16::from_ptr(at) }
    }

    /// A 32-bit field of the used ring, at a multiple of 4 below `4 + 8 * size`.
    fn used_u32(&self, offset: usize) -> &AtomicU32 {
        let at = self.used.wrapping_add(offset).cast();
        // SAFETY: as in `used_u16`; the area is aligned to 4 and so is the offset.
        unsafe { AtomicU32::from_ptr(at) }
    }
}

/// Indirect tables, one of `capacity` descriptors for each slot of a ring. `slots` is a power of
/// two, and neither is 0.
#[derive(Debug)]
pub(super) struct Tables {
    gpa: Gpa,
    capacity: u16,
    slots: u16,
    first: *mut Descriptor,
    _memory: Memory,
}

// SAFETY: as for `Areas`: `_memory` keeps what `first` points to mapped.
unsafe impl Send for Tables {}

impl Tables {
    pub(super) fn alloc(memory: &Memory, slots: u16, capacity: u16) -> Result<Self, MemoryError> {
        debug_assert!(slots.is_power_of_two() && capacity > 0);
        let entries = u64::from(slots) * u64::from(capacity);
        let bytes = entries * Descriptor::SIZE;
        let gpa = memory.alloc(bytes, 16)?;
        let exhausted = |_too_big| MemoryError::Exhausted { len: bytes };
        let first = memory.pointer(gpa, usize::try_from(bytes).map_err(exhausted)?)?;
        if !first.addr().is_multiple_of(16) {
            return Err(MemoryError::OutOfRange {
                gpa: gpa.0,
                len: bytes,
            });
        }
        Ok(Self {
            gpa,
            capacity,
            slots,
            first: first.cast(),
            _memory: memory.clone(),
        })
    }

    pub(super) fn capacity(&self) -> u16 {
        self.capacity
    }

    pub(super) fn table(&self, slot: u16) -> Gpa {
        let slot = slot & (self.slots - 1);
        let entries = u64::from(slot) * u64::from(self.capacity);
        self.gpa.offset(entries * Descriptor::SIZE)
    }

    pub(super) fn write(&mut self, slot: u16, index: u16, descriptor: Descriptor) {
        let slot = usize::from(slot & (self.slots - 1));
        let index = usize::from(index.min(self.capacity - 1));
        let at = self
            .first
            .wrapping_add(slot * usize::from(self.capacity) + index);
        // SAFETY: `alloc` resolved `slots * capacity` aligned descriptors, both indexes are
        // kept within that, and `_memory` keeps them mapped. `&mut self` is the only writer in
        // this process, and the device reads a table only once it is available.
        unsafe { at.write(descriptor) };
    }
}
