//! The guest's memory as the front end handed it over, and the log of the pages we change.
//!
//! A [`Memory`] is an immutable snapshot: a change of the memory table makes a new one, and
//! the old mappings go when the last chain that points into them has been returned. The
//! invariant: a pointer that leaves this file lies, with its whole length, in a mapping that
//! the same snapshot keeps alive.
//!
//! Whoever handed the memory over may take it away again, by truncating its file. All mappings
//! are therefore watched: what is gone reads as zeros from then on, and the [`MemoryLostEvent`] tells.
//!
//! This is not `vm-memory`'s `GuestMemoryMmap` because the rings need the addresses once and
//! not at each access, and because the dirty log of `vhost-user-backend`, which would be its
//! bitmap, can't be made from outside that crate; the mapping itself is `vm-memory`'s.

#![allow(
    unsafe_code,
    reason = "the guest's memory is reached through raw pointers"
)]
#![allow(
    clippy::arithmetic_side_effects,
    reason = "no region wraps around, which is checked as it is mapped; all else stays in one"
)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
#[cfg(not(ringfsd_loom))]
use std::sync::atomic::AtomicU16;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use rustix::mm::Advice;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};

use crate::io::GuestBuffer;
pub use crate::sys::sigbus::MemoryLostEvent;
use crate::sys::sigbus::Watch;

/// An address in the guest's physical memory.
pub type GuestAddress = u64;

/// Bytes of guest memory that one bit of the dirty log stands for (`VHOST_LOG_PAGE`,
/// vhost-user specification, "Migration").
pub const LOG_PAGE: u64 = 4096;

/// What can be wrong with a memory table or a log.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The region can't be mapped.
    #[error("mapping {len:#x} bytes of guest memory at {guest:#x} (file offset {offset:#x})")]
    Map {
        /// Guest address of the region.
        guest: GuestAddress,
        /// Length of the region in bytes.
        len: u64,
        /// Where in the file it begins.
        offset: u64,
        /// What `vm-memory` says.
        #[source]
        source: MmapRegionError,
    },
    /// The region has no byte, or runs past the end of the address space.
    #[error("a memory region at {guest:#x} with {len:#x} bytes can't be")]
    Shape {
        /// Guest address of the region.
        guest: GuestAddress,
        /// Length of the region in bytes.
        len: u64,
    },
    /// Two regions claim the same addresses.
    #[error("the memory regions at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Guest address of the lower region.
        first: GuestAddress,
        /// Guest address of the upper region.
        second: GuestAddress,
    },
    /// More regions than there may be.
    #[error("more than {most} memory regions")]
    TooMany {
        /// How many there may be.
        most: usize,
    },
    /// The mapping can't be watched.
    #[error("watching over {len:#x} bytes of memory, in case that its file is truncated")]
    Watch {
        /// Length of the mapping in bytes.
        len: u64,
        /// Why not.
        #[source]
        source: rustix::io::Errno,
    },
    /// A region to remove is not there.
    #[error("there is no memory region at {guest:#x} with {len:#x} bytes to remove")]
    Unknown {
        /// Guest address asked for.
        guest: GuestAddress,
        /// Length asked for.
        len: u64,
    },
    /// What is in flight can't be mapped.
    #[error("mapping what is in flight, {len:#x} bytes at file offset {offset:#x}")]
    MapInflight {
        /// Length in bytes.
        len: u64,
        /// Where in the file it begins.
        offset: u64,
        /// What `vm-memory` says.
        #[source]
        source: MmapRegionError,
    },
    /// The log can't be mapped.
    #[error("mapping the dirty log, {len:#x} bytes at file offset {offset:#x}")]
    MapLog {
        /// Length of the log in bytes.
        len: u64,
        /// Where in the file it begins.
        offset: u64,
        /// What `vm-memory` says.
        #[source]
        source: MmapRegionError,
    },
}

/// One stretch of guest memory, mapped.
#[derive(Clone, Debug)]
pub struct Region {
    guest: GuestAddress,
    user: u64,
    len: u64,
    mapping: Arc<Mapping>,
}

/// A mapping that is watched. The watch ends before it is unmapped.
#[derive(Debug)]
pub(super) struct Mapping {
    _watch: Watch,
    bytes: MmapRegion<()>,
}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` on; `base` is what `alarm` calls the first.
    fn new(
        file: File,
        (offset, len): (u64, usize),
        base: u64,
        alarm: &Arc<MemoryLostEvent>,
    ) -> Result<Self, MapFault> {
        let unit = check_file(&file, offset, len)?;
        let bytes = MmapRegion::from_file(FileOffset::new(file, offset), len)?;
        // SAFETY: the bytes are one mapping, which was made just now and is unmapped when the
        // watch has ended (fields are dropped in order); all access to it is by raw pointers;
        // and a mapping begins at a multiple of the size of its pages.
        let watch = unsafe { Watch::new((bytes.as_ptr(), len), unit, base, alarm) };
        let watch = watch.map_err(MapFault::Watch)?;
        // SAFETY: the range is the mapping just made, whose contents the advice doesn't touch.
        let kept_out =
            unsafe { rustix::mm::madvise(bytes.as_ptr().cast(), len, Advice::LinuxDontDump) };
        if let Err(error) = kept_out {
            log::debug!("a core would have the guest's memory in it: {error}");
        }
        Ok(Self {
            _watch: watch,
            bytes,
        })
    }

    /// Maps words of 64 bits: `len` bytes of `file` from `offset` on.
    pub(super) fn of_words(
        file: File,
        offset: u64,
        len: usize,
        base: u64,
        alarm: &Arc<MemoryLostEvent>,
    ) -> Result<Self, MemoryError> {
        let wide = len as u64;
        Self::new(file, (offset, len), base, alarm).map_err(|fault| match fault {
            MapFault::Map(source) => MemoryError::MapInflight {
                len: wide,
                offset,
                source,
            },
            MapFault::Watch(source) => MemoryError::Watch { len: wide, source },
        })
    }

    /// The little-endian word at `index`, of which there must be as many.
    #[inline]
    pub(super) fn load(&self, index: usize, order: Ordering) -> u64 {
        u64::from_le(self.word(index).load(order))
    }

    /// Sets the little-endian word at `index`, of which there must be as many.
    #[inline]
    pub(super) fn store(&self, index: usize, value: u64, order: Ordering) {
        self.word(index).store(value.to_le(), order);
    }

    #[inline]
    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.bytes.size() / 8);
        let pointer = self.bytes.as_ptr().wrapping_add(8 * index).cast::<u64>();
        // SAFETY: within the mapping by the assertion, which lives as long as `self`, and aligned
        // as a mapping begins at a page.
        unsafe { AtomicU64::from_ptr(pointer) }
    }
}

impl Mapping {
    pub(super) fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        let offset = self.bytes.file_offset()?;
        Some((offset.file().as_fd(), offset.start()))
    }
}

/// Why a file can't be mapped.
enum MapFault {
    Map(MmapRegionError),
    Watch(rustix::io::Errno),
}

impl From<MmapRegionError> for MapFault {
    fn from(error: MmapRegionError) -> Self {
        Self::Map(error)
    }
}

impl Region {
    /// Maps `len` bytes of `file` from `offset` on as the guest's memory at `guest`; `user` is
    /// the address by which the front end names the same memory in ring addresses. `alarm` tells
    /// the guest address that was found gone, should the file be truncated later.
    ///
    /// # Errors
    ///
    /// The region is empty or runs over the end of the address space; the file is too short
    /// or can't be mapped.
    pub fn map(
        file: File,
        offset: u64,
        guest: GuestAddress,
        user: u64,
        len: u64,
        alarm: &Arc<MemoryLostEvent>,
    ) -> Result<Self, MemoryError> {
        let shape = MemoryError::Shape { guest, len };
        let Ok(size) = usize::try_from(len) else {
            return Err(shape);
        };
        if size == 0 || guest.checked_add(len).is_none() || user.checked_add(len).is_none() {
            return Err(shape);
        }
        let mapping =
            Mapping::new(file, (offset, size), guest, alarm).map_err(|fault| match fault {
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

    /// Where it was said to be: guest address, front end's address, bytes.
    #[must_use]
    pub fn place(&self) -> (GuestAddress, u64, u64) {
        (self.guest, self.user, self.len)
    }

    /// What is mapped: the file, which stays open as long as the region is there, and where in it
    /// the region begins.
    #[must_use]
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.mapping.file()
    }

    /// The pointer to the byte `offset` into the region; `offset` must be below the length.
    fn pointer(&self, offset: u64) -> *mut u8 {
        debug_assert!(offset < self.len);
        let offset = usize::try_from(offset).expect("invariant: a mapped length fits usize");
        self.mapping.bytes.as_ptr().wrapping_add(offset)
    }
}

/// A snapshot of the guest's memory, with the dirty log if one is kept.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// In order of guest addresses, none overlapping.
    regions: Vec<Region>,
    log: Option<Arc<DirtyLog>>,
}

/// A stretch of guest memory within one region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slice {
    pub(crate) pointer: *mut u8,
    pub(crate) len: usize,
    pub(crate) guest: GuestAddress,
}

// SAFETY: a slice is an address; whoever goes through it holds the snapshot it came from, and
// the memory is shared with the guest anyway.
unsafe impl Send for Slice {}

impl Memory {
    /// The most regions that there may be; QEMU never has more. Each costs a mapping and a
    /// descriptor.
    pub const MOST_REGIONS: usize = 512;

    /// A snapshot of `regions`, in any order.
    ///
    /// # Errors
    ///
    /// Two of them overlap, or they are too many.
    pub fn new(mut regions: Vec<Region>, log: Option<Arc<DirtyLog>>) -> Result<Self, MemoryError> {
        if regions.len() > Self::MOST_REGIONS {
            return Err(MemoryError::TooMany {
                most: Self::MOST_REGIONS,
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

    /// The same memory with `region` added.
    ///
    /// # Errors
    ///
    /// It overlaps one that is there.
    pub fn with_region(&self, region: Region) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(region);
        Self::new(regions, self.log.clone())
    }

    /// The same memory without the region at `guest`, `user` of `len` bytes.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn without_region(
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
        Self::new(regions, self.log.clone())
    }

    /// The same memory with another log, or none.
    #[must_use]
    pub fn with_log(&self, log: Option<Arc<DirtyLog>>) -> Self {
        Self {
            regions: self.regions.clone(),
            log,
        }
    }

    /// The regions, by guest addresses.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The guest address of what the front end calls `user`.
    #[must_use]
    pub fn guest_address(&self, user: u64) -> Option<GuestAddress> {
        self.regions
            .iter()
            .find(|r| user >= r.user && user - r.user < r.len)
            .map(|r| r.guest + (user - r.user))
    }

    /// The longest part of `guest..guest + len` that lies in one region, from its start.
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

    /// Gives `take` the parts of `guest..guest + len`, in order. False where one of them is not
    /// there; `take` may have had some by then.
    pub(crate) fn slices(
        &self,
        mut guest: GuestAddress,
        len: u64,
        mut take: impl FnMut(Slice),
    ) -> bool {
        let Some(end) = guest.checked_add(len) else {
            return false;
        };
        while guest < end {
            let Some(slice) = self.slice(guest, end - guest) else {
                return false;
            };
            guest += slice.len as u64;
            take(slice);
        }
        true
    }

    /// Copies from guest memory; false, and `into` undefined, where some of it is not there.
    pub(crate) fn read(&self, guest: GuestAddress, into: &mut [u8]) -> bool {
        let mut done = 0;
        self.slices(guest, into.len() as u64, |slice| {
            if let Some(part) = into.get_mut(done..done + slice.len) {
                slice.read(part);
            }
            done += slice.len;
        })
    }

    /// Notes that `guest..guest + len` was changed, if a log is kept.
    pub(crate) fn mark_dirty(&self, guest: GuestAddress, len: u64) {
        if let Some(log) = &self.log {
            log.mark(guest, len);
        }
    }

    /// Whether changes are to be logged.
    pub(crate) fn is_logging(&self) -> bool {
        self.log.is_some()
    }
}

impl Slice {
    /// Copies the first `into.len()` bytes out; `into` must not be longer than the slice.
    pub(crate) fn read(&self, into: &mut [u8]) {
        assert!(into.len() <= self.len);
        // SAFETY: the slice's holder keeps its snapshot, so `pointer..+len` is mapped, and the
        // assertion keeps within; `into` is the server's own memory, so they don't overlap.
        unsafe { std::ptr::copy_nonoverlapping(self.pointer, into.as_mut_ptr(), into.len()) };
    }

    /// Copies `from` over the first bytes; `from` must not be longer than the slice.
    pub(crate) fn write(&self, from: &[u8]) {
        assert!(from.len() <= self.len);
        #[cfg(test)]
        if !super::crash_injection::is_alive() {
            return;
        }
        // SAFETY: the slice's holder keeps its snapshot, so `pointer..+len` is mapped, and the
        // assertion keeps within; `from` is the server's own memory, so they don't overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.pointer, from.len()) };
    }

    /// The slice without its first `count` bytes, of which it must have that many.
    pub(crate) fn skip(self, count: usize) -> Self {
        assert!(count <= self.len);
        Self {
            pointer: self.pointer.wrapping_add(count),
            len: self.len - count,
            guest: self.guest + count as u64,
        }
    }

    /// The first `count` bytes of the slice, of which it must have that many.
    pub(crate) fn first(self, count: usize) -> Self {
        assert!(count <= self.len);
        Self { len: count, ..self }
    }
}

/// Memory that holds one part of a ring, resolved once: typed accesses at an offset. The models have
/// one of their own, in `sync`.
#[cfg(not(ringfsd_loom))]
#[derive(Debug)]
pub(crate) struct Window {
    slice: Slice,
    _memory: Arc<Memory>,
}

// SAFETY: all accesses through a shared window are atomic or plain copies of shared memory,
// and the snapshot it holds keeps them mapped on whatever thread.
#[cfg(not(ringfsd_loom))]
unsafe impl Sync for Window {}

#[cfg(not(ringfsd_loom))]
impl Window {
    /// The memory that the front end calls `user..user + len`, if it lies in one region and
    /// `user` is a multiple of `align`.
    pub(crate) fn new(memory: &Arc<Memory>, user: u64, len: u64, align: u64) -> Option<Self> {
        let guest = memory.guest_address(user)?;
        let slice = memory.slice(guest, len)?;
        if slice.len as u64 != len || !(slice.pointer.addr() as u64).is_multiple_of(align) {
            return None;
        }
        Some(Self {
            slice,
            _memory: Arc::clone(memory),
        })
    }

    /// Copies `into.len()` bytes at `offset` out.
    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) {
        self.slice.skip(offset).read(into);
    }

    /// Copies `from` to `offset`.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        self.slice.skip(offset).write(from);
    }

    /// The 16-bit little-endian number at `offset`.
    pub(crate) fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        u16::from_le(self.atomic_u16(offset).load(order))
    }

    /// Sets the 16-bit little-endian number at `offset`.
    pub(crate) fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        #[cfg(test)]
        if !super::crash_injection::is_alive() {
            return;
        }
        self.atomic_u16(offset).store(value.to_le(), order);
    }

    fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        assert!(offset.is_multiple_of(2) && offset + 2 <= self.slice.len);
        let pointer = self.slice.pointer.wrapping_add(offset).cast::<u16>();
        // SAFETY: within the window by the assertion, mapped by the snapshot it holds, and
        // aligned as `new` checked the start and the assertion the offset.
        unsafe { AtomicU16::from_ptr(pointer) }
    }
}

/// Refuses a file that ends before the mapping would: touching the rest is a SIGBUS. Answers the
/// size of the pages that it is mapped in.
fn check_file(file: &File, offset: u64, len: usize) -> Result<usize, MapFault> {
    let metadata = file.metadata().map_err(MmapRegionError::Mmap)?;
    let wide = len as u64;
    let end = offset
        .checked_add(wide)
        .ok_or(MmapRegionError::InvalidOffsetLength)?;
    if !metadata.is_file() {
        // A device has no length to check, and tells nobody how large its pages are.
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
    // The kernel maps whole pages, and unmaps nothing else.
    if unit == 0 || !len.is_multiple_of(unit) {
        return Err(MmapRegionError::InvalidOffsetLength.into());
    }
    Ok(unit)
}

/// Makes a buffer for the kernel of slices of one snapshot, which `guard` keeps mapped.
pub(super) fn buffer(slices: impl Iterator<Item = Slice>, guard: Arc<Memory>) -> GuestBuffer {
    let pieces = slices.map(|slice| (slice.pointer, slice.len));
    // SAFETY: slices come from the snapshot that `guard` holds (the callers in this room have
    // no other), so they stay mapped as long as it; no reference to guest memory is ever made.
    unsafe { GuestBuffer::from_raw_pieces(pieces, guard) }
}

/// The bitmap in which the front end wants to see what we changed (vhost-user specification,
/// "Migration").
#[derive(Debug)]
pub struct DirtyLog {
    mapping: Mapping,
}

impl DirtyLog {
    /// What an [`MemoryLostEvent`] calls a log that is gone.
    pub const GONE: u64 = u64::MAX - 1;

    /// Maps the log: `len` bytes of `file` from `offset` on, a bit for each [`LOG_PAGE`].
    /// `alarm` tells [`GONE`](Self::GONE) should the file be truncated later.
    ///
    /// # Errors
    ///
    /// The file is too short or can't be mapped.
    pub fn map(
        file: File,
        offset: u64,
        len: u64,
        alarm: &Arc<MemoryLostEvent>,
    ) -> Result<Self, MemoryError> {
        let fail = |fault| match fault {
            MapFault::Map(source) => MemoryError::MapLog {
                len,
                offset,
                source,
            },
            MapFault::Watch(source) => MemoryError::Watch { len, source },
        };
        let size = usize::try_from(len)
            .map_err(|_too_large| fail(MmapRegionError::InvalidOffsetLength.into()))?;
        log::debug!("dirty log of {len} bytes on fd {}", file.as_raw_fd());
        let mapping = Mapping::new(file, (offset, size), Self::GONE, alarm).map_err(fail)?;
        Ok(Self { mapping })
    }

    /// What is mapped: the file, where in it the log begins, and how long it is.
    #[must_use]
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64, u64)> {
        let (file, offset) = self.mapping.file()?;
        Some((file, offset, self.mapping.bytes.size() as u64))
    }

    /// Sets the bits of all pages that `guest..guest + len` touches; what lies past the end of
    /// the log is left out.
    pub fn mark(&self, guest: GuestAddress, len: u64) {
        let Some(last) = len.checked_sub(1).map(|more| guest.saturating_add(more)) else {
            return;
        };
        for page in guest / LOG_PAGE..=last / LOG_PAGE {
            let Some(byte) = usize::try_from(page / 8)
                .ok()
                .filter(|b| *b < self.mapping.bytes.size())
            else {
                return;
            };
            // SAFETY: `byte` is below the mapping's size, and bytes need no alignment; the
            // mapping lives as long as `self`.
            let byte =
                unsafe { AtomicU8::from_ptr(self.mapping.bytes.as_ptr().wrapping_add(byte)) };
            // Release: pairs with the front end's atomic exchange when it collects the log;
            // the page's new contents come before its bit.
            byte.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    fn alarm() -> Arc<MemoryLostEvent> {
        Arc::new(MemoryLostEvent::new().unwrap())
    }

    fn region(guest: u64, len: u64) -> Region {
        let fd: OwnedFd =
            rustix::fs::memfd_create("region", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(len).unwrap();
        Region::map(file, 0, guest, 0x7000_0000 + guest, len, &alarm()).unwrap()
    }

    #[test]
    fn overlapping_regions_are_refused() {
        let result = Memory::new(vec![region(0x2000, 0x1000), region(0x0, 0x2001)], None);
        assert!(matches!(result, Err(MemoryError::Overlap { first: 0, .. })));
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let fd = rustix::fs::memfd_create("short", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(0x1000).unwrap();
        assert!(matches!(
            Region::map(file, 0, 0, 0, 0x2000, &alarm()),
            Err(MemoryError::Map { .. })
        ));
    }

    #[test]
    fn memory_that_is_taken_away_reads_as_zeros_and_is_told() {
        let fd = rustix::fs::memfd_create("taken", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(0x3000).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 0x3000], 0).unwrap();
        let alarm = alarm();
        let again = file.try_clone().unwrap();
        let region = Region::map(again, 0x1000, 0x8000, 0, 0x2000, &alarm).unwrap();
        let memory = Memory::new(vec![region], None).unwrap();
        let mut byte = [0];
        assert!(memory.read(0x9123, &mut byte));
        assert_eq!((byte, alarm.place()), ([7], None));
        file.set_len(0x2000).unwrap();
        assert!(memory.read(0x9123, &mut byte));
        assert_eq!((byte, alarm.place()), ([0], Some(0x9123)));
        assert!(memory.read(0x8fff, &mut byte));
        assert_eq!(byte, [7], "what is still there is not touched");
    }

    #[test]
    fn there_are_only_so_many_regions() {
        let regions = |count| (0..count).map(|i| region(i * 0x1000, 0x1000)).collect();
        let most = Memory::MOST_REGIONS as u64;
        assert!(Memory::new(regions(most), None).is_ok());
        let error = Memory::new(regions(most + 1), None);
        assert!(matches!(error, Err(MemoryError::TooMany { most: 512 })));
    }

    #[test]
    fn slices_cross_adjacent_regions_but_not_holes() {
        let memory = Memory::new(
            vec![
                region(0, 0x1000),
                region(0x1000, 0x1000),
                region(0x3000, 0x1000),
            ],
            None,
        )
        .unwrap();
        let mut parts = Vec::new();
        assert!(memory.slices(0xff0, 0x20, |s| parts.push((s.guest, s.len))));
        assert_eq!(parts, [(0xff0, 0x10), (0x1000, 0x10)]);
        assert!(!memory.slices(0x1ff0, 0x20, |_| ()));
        assert!(!memory.slices(u64::MAX, 2, |_| ()));
    }

    #[test]
    fn what_is_written_across_regions_is_read_back() {
        let memory = Memory::new(vec![region(0, 0x1000), region(0x1000, 0x1000)], None).unwrap();
        let mut from = &b"across the border"[..];
        memory.slices(0xff8, from.len() as u64, |slice| {
            let (now, later) = from.split_at(slice.len);
            slice.write(now);
            from = later;
        });
        let mut back = [0; 17];
        assert!(memory.read(0xff8, &mut back));
        assert_eq!(&back, b"across the border");
    }

    #[test]
    fn the_log_marks_every_page_touched_and_nothing_past_its_end() {
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(4096).unwrap();
        let log = DirtyLog::map(file.try_clone().unwrap(), 0, 2, &alarm()).unwrap();
        log.mark(0xfff, 2);
        log.mark(0xf000, 0x10_0000);
        log.mark(0x5000, 0);
        let mut bytes = [0u8; 4096];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        assert_eq!(bytes[..3], [0b11, 0b1000_0000, 0]);
    }
}
