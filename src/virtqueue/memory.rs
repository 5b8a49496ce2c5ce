//! The guest's memory, mapped from the front end's files, and the log of the pages changed there.
//!
//! A [`Memory`] is an immutable snapshot of the memory table. A change of the table makes a new
//! snapshot, and the old mappings are removed when the last chain that points into them has been
//! returned. The invariant: the memory behind a pointer that this module returns is completely
//! within a mapping that the snapshot keeps alive.
//!
//! The front end can truncate the files at any time, so all mappings are watched: lost memory reads
//! as zeros, and is reported through the [`MemoryLostEvent`].
//!
//! `vm-memory`'s `GuestMemoryMmap` isn't used, for two reasons: the rings resolve addresses once
//! instead of at each access, and the dirty log of `vhost-user-backend`, which would be its bitmap,
//! can't be constructed outside that crate. The mapping itself is `vm-memory`'s.

#![allow(unsafe_code, reason = "guest memory is accessed through raw pointers")]
#![allow(
    clippy::arithmetic_side_effects,
    reason = "no region wraps around, as mapping it checks; all other addresses are within one"
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

/// Why a memory table, an in-flight region or a dirty log can't be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The region can't be mapped.
    #[error("mapping {len:#x} bytes of guest memory at {guest:#x} (file offset {offset:#x})")]
    Map {
        /// Guest address of the region.
        guest: GuestAddress,
        /// Length of the region in bytes.
        len: u64,
        /// Offset of the region in the file.
        offset: u64,
        /// The cause.
        #[source]
        source: MmapRegionError,
    },
    /// The region is empty, or exceeds the end of the address space.
    #[error(
        "a memory region at {guest:#x} with {len:#x} bytes can't be mapped: it is empty or too large"
    )]
    Shape {
        /// Guest address of the region.
        guest: GuestAddress,
        /// Length of the region in bytes.
        len: u64,
    },
    /// Two regions have addresses in common.
    #[error("the memory regions at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Guest address of the lower region.
        first: GuestAddress,
        /// Guest address of the upper region.
        second: GuestAddress,
    },
    /// There are too many regions.
    #[error("more than {max} memory regions")]
    TooMany {
        /// The limit.
        max: usize,
    },
    /// The mapping can't be watched.
    #[error("watching {len:#x} bytes of memory for a truncation of its file")]
    Watch {
        /// Length of the mapping in bytes.
        len: u64,
        /// The cause.
        #[source]
        source: rustix::io::Errno,
    },
    /// The region to remove doesn't exist.
    #[error("there is no memory region at {guest:#x} with {len:#x} bytes to remove")]
    Unknown {
        /// Guest address of the request.
        guest: GuestAddress,
        /// Length of the request.
        len: u64,
    },
    /// The in-flight region can't be mapped.
    #[error("mapping the in-flight region, {len:#x} bytes at file offset {offset:#x}")]
    MapInflight {
        /// Length of the region in bytes.
        len: u64,
        /// Offset of the region in the file.
        offset: u64,
        /// The cause.
        #[source]
        source: MmapRegionError,
    },
    /// The dirty log can't be mapped.
    #[error("mapping the dirty log, {len:#x} bytes at file offset {offset:#x}")]
    MapLog {
        /// Length of the log in bytes.
        len: u64,
        /// Offset of the log in the file.
        offset: u64,
        /// The cause.
        #[source]
        source: MmapRegionError,
    },
}

/// One mapped region of guest memory.
#[derive(Clone, Debug)]
pub struct Region {
    guest: GuestAddress,
    user: u64,
    len: u64,
    mapping: Arc<Mapping>,
}

/// A watched mapping. Its watch ends before it is unmapped.
#[derive(Debug)]
pub(super) struct Mapping {
    _watch: Watch,
    bytes: MmapRegion<()>,
}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` on; `base` is the address by which `memory_lost`
    /// reports the first of them.
    fn new(
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
    pub(super) fn map_words(
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
    pub(super) fn load(&self, index: usize, order: Ordering) -> u64 {
        u64::from_le(self.word(index).load(order))
    }

    /// Stores the little-endian word at `index`, which must be within the mapping.
    #[inline]
    pub(super) fn store(&self, index: usize, value: u64, order: Ordering) {
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
}

impl Mapping {
    /// Returns the mapped file, and the offset of the mapping in it.
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
    /// Maps `len` bytes of `file` from `offset` on as the guest's memory at `guest`. `user` is the
    /// address of the same memory in the front end, which ring addresses use. If the file is
    /// truncated later, `memory_lost` reports the lost guest address.
    ///
    /// # Errors
    ///
    /// Fails if the region is empty or exceeds the end of the address space, or if the file is too
    /// short or can't be mapped.
    pub fn map(
        file: File,
        offset: u64,
        guest: GuestAddress,
        user: u64,
        len: u64,
        memory_lost: &Arc<MemoryLostEvent>,
    ) -> Result<Self, MemoryError> {
        let shape = MemoryError::Shape { guest, len };
        let Ok(size) = usize::try_from(len) else {
            return Err(shape);
        };
        if size == 0 || guest.checked_add(len).is_none() || user.checked_add(len).is_none() {
            return Err(shape);
        }
        let mapping =
            Mapping::new(file, (offset, size), guest, memory_lost).map_err(
                |fault| match fault {
                    MapFault::Map(source) => MemoryError::Map {
                        guest,
                        len,
                        offset,
                        source,
                    },
                    MapFault::Watch(source) => MemoryError::Watch { len, source },
                },
            )?;
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
    fn pointer(&self, offset: u64) -> *mut u8 {
        debug_assert!(offset < self.len);
        let offset = usize::try_from(offset).expect("invariant: a mapped length fits usize");
        self.mapping.bytes.as_ptr().wrapping_add(offset)
    }
}

/// A snapshot of the guest's memory, with the dirty log if changes are logged.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Sorted by guest address, without overlaps.
    regions: Vec<Region>,
    log: Option<Arc<DirtyLog>>,
}

/// A contiguous part of guest memory within one region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slice {
    pub(crate) pointer: *mut u8,
    pub(crate) len: usize,
    pub(crate) guest: GuestAddress,
}

// SAFETY: a slice is an address. Code that accesses memory through it holds the snapshot that it
// came from, on any thread, and the memory is shared with the guest in any case.
unsafe impl Send for Slice {}

impl Memory {
    /// The most regions of a snapshot; QEMU never uses more. Each takes a mapping and a descriptor.
    pub const MAX_REGIONS: usize = 512;

    /// Makes a snapshot of `regions`, which may be in any order.
    ///
    /// # Errors
    ///
    /// Fails if two of them overlap, or if there are too many.
    pub fn new(mut regions: Vec<Region>, log: Option<Arc<DirtyLog>>) -> Result<Self, MemoryError> {
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
    pub fn with_region(&self, region: Region) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(region);
        Self::new(regions, self.log.clone())
    }

    /// Returns the same memory without the region of `len` bytes at `guest` and `user`.
    ///
    /// # Errors
    ///
    /// Fails if there is no such region.
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

    /// Returns the same memory with another log, or without one.
    #[must_use]
    pub fn with_log(&self, log: Option<Arc<DirtyLog>>) -> Self {
        Self {
            regions: self.regions.clone(),
            log,
        }
    }

    /// Returns the regions, sorted by guest address.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
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

impl Slice {
    /// Copies the first `into.len()` bytes to `into`, which must not be longer than the slice.
    pub(crate) fn read(&self, into: &mut [u8]) {
        assert!(into.len() <= self.len);
        // SAFETY: the slice's holder keeps its snapshot, so `pointer..+len` is mapped, and the
        // assertion keeps within; `into` is the server's own memory, so they don't overlap.
        unsafe { std::ptr::copy_nonoverlapping(self.pointer, into.as_mut_ptr(), into.len()) };
    }

    /// Copies `from`, which must not be longer than the slice, to its first bytes.
    pub(crate) fn write(&self, from: &[u8]) {
        assert!(from.len() <= self.len);
        #[cfg(test)]
        if !super::crash_injection::store_takes_effect() {
            return;
        }
        // SAFETY: the slice's holder keeps its snapshot, so `pointer..+len` is mapped, and the
        // assertion keeps within; `from` is the server's own memory, so they don't overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.pointer, from.len()) };
    }

    /// Returns the slice without its first `count` bytes; `count` must not exceed its length.
    pub(crate) fn skip(self, count: usize) -> Self {
        assert!(count <= self.len);
        Self {
            pointer: self.pointer.wrapping_add(count),
            len: self.len - count,
            guest: self.guest + count as u64,
        }
    }

    /// Returns the first `count` bytes of the slice; `count` must not exceed its length.
    pub(crate) fn first(self, count: usize) -> Self {
        assert!(count <= self.len);
        Self { len: count, ..self }
    }
}

/// The memory of one part of a ring, resolved once, with typed accesses at an offset. Loom models
/// use the `Window` of `sync` instead.
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
    /// Resolves `user..user + len` in the front end's addresses. Returns `None` if it isn't within
    /// one region, or isn't mapped at a multiple of `align`.
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

    /// Copies `into.len()` bytes from `offset` to `into`.
    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) {
        self.slice.skip(offset).read(into);
    }

    /// Copies `from` to `offset`.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        self.slice.skip(offset).write(from);
    }

    /// Loads the 16-bit little-endian number at `offset`.
    pub(crate) fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        u16::from_le(self.atomic_u16(offset).load(order))
    }

    /// Stores the 16-bit little-endian number at `offset`.
    pub(crate) fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        #[cfg(test)]
        if !super::crash_injection::store_takes_effect() {
            return;
        }
        self.atomic_u16(offset).store(value.to_le(), order);
    }

    fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        assert!(offset.is_multiple_of(2) && offset + 2 <= self.slice.len);
        let pointer = self.slice.pointer.wrapping_add(offset).cast::<u16>();
        // SAFETY: the number is within the window by the assertion, the snapshot that the window
        // holds keeps it mapped, and it is aligned: `new` checked the start of the window (the
        // callers pass an even alignment), and the assertion checked the offset.
        unsafe { AtomicU16::from_ptr(pointer) }
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

/// Makes a buffer for I/O from slices of one snapshot, which `guard` keeps mapped.
pub(super) fn buffer(slices: impl Iterator<Item = Slice>, guard: Arc<Memory>) -> GuestBuffer {
    let pieces = slices.map(|slice| (slice.pointer, slice.len));
    // SAFETY: the slices come from the snapshot that `guard` holds (callers in this module have no
    // other one), so they stay mapped as long as `guard` lives; no reference to guest memory is
    // ever made.
    unsafe { GuestBuffer::from_raw_pieces(pieces, guard) }
}

/// The front end's bitmap of changed pages (vhost-user specification, "Migration").
#[derive(Debug)]
pub struct DirtyLog {
    mapping: Mapping,
}

impl DirtyLog {
    /// The address by which a [`MemoryLostEvent`] reports a lost log.
    pub const GONE: u64 = u64::MAX - 1;

    /// Maps the log: `len` bytes of `file` from `offset` on, with a bit for each [`LOG_PAGE`]. If
    /// the file is truncated later, `memory_lost` reports [`GONE`](Self::GONE).
    ///
    /// # Errors
    ///
    /// Fails if the file is too short or can't be mapped.
    pub fn map(
        file: File,
        offset: u64,
        len: u64,
        memory_lost: &Arc<MemoryLostEvent>,
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
        let mapping = Mapping::new(file, (offset, size), Self::GONE, memory_lost).map_err(fail)?;
        Ok(Self { mapping })
    }

    /// Returns the mapped file, the offset of the log in it, and the log's length in bytes.
    #[must_use]
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64, u64)> {
        let (file, offset) = self.mapping.file()?;
        Some((file, offset, self.mapping.bytes.size() as u64))
    }

    /// Sets the bits of all pages that overlap `guest..guest + len`. Ignores pages beyond the end
    /// of the log.
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
            // Release: pairs with the front end's atomic exchange when it collects the log. It
            // orders the page's new contents before its bit.
            byte.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    fn memory_lost() -> Arc<MemoryLostEvent> {
        Arc::new(MemoryLostEvent::new().unwrap())
    }

    fn region(guest: u64, len: u64) -> Region {
        let fd: OwnedFd =
            rustix::fs::memfd_create("region", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(len).unwrap();
        Region::map(file, 0, guest, 0x7000_0000 + guest, len, &memory_lost()).unwrap()
    }

    #[test]
    fn memory_with_overlapping_regions_is_refused() {
        let result = Memory::new(vec![region(0x2000, 0x1000), region(0x0, 0x2001)], None);
        assert!(matches!(result, Err(MemoryError::Overlap { first: 0, .. })));
    }

    #[test]
    fn map_of_too_short_file_is_refused() {
        let fd = rustix::fs::memfd_create("short", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(0x1000).unwrap();
        assert!(matches!(
            Region::map(file, 0, 0, 0, 0x2000, &memory_lost()),
            Err(MemoryError::Map { .. })
        ));
    }

    #[test]
    fn lost_memory_reads_as_zeros_and_is_reported() {
        let fd = rustix::fs::memfd_create("taken", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(0x3000).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 0x3000], 0).unwrap();
        let memory_lost = memory_lost();
        let map = file.try_clone().unwrap();
        let region = Region::map(map, 0x1000, 0x8000, 0, 0x2000, &memory_lost).unwrap();
        let memory = Memory::new(vec![region], None).unwrap();
        let mut byte = [0];
        assert!(memory.read(0x9123, &mut byte));
        assert_eq!((byte, memory_lost.place()), ([7], None));
        file.set_len(0x2000).unwrap();
        assert!(memory.read(0x9123, &mut byte));
        assert_eq!((byte, memory_lost.place()), ([0], Some(0x9123)));
        assert!(memory.read(0x8fff, &mut byte));
        assert_eq!(byte, [7], "the rest keeps its content");
    }

    #[test]
    fn memory_with_too_many_regions_is_refused() {
        let regions = |count| (0..count).map(|i| region(i * 0x1000, 0x1000)).collect();
        let max = Memory::MAX_REGIONS as u64;
        assert!(Memory::new(regions(max), None).is_ok());
        let error = Memory::new(regions(max + 1), None);
        assert!(matches!(error, Err(MemoryError::TooMany { max: 512 })));
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
    fn write_across_regions_is_read_back() {
        let memory = Memory::new(vec![region(0, 0x1000), region(0x1000, 0x1000)], None).unwrap();
        let mut from = &b"across the border"[..];
        memory.slices(0xff8, from.len() as u64, |slice| {
            let (part, rest) = from.split_at(slice.len);
            slice.write(part);
            from = rest;
        });
        let mut back = [0; 17];
        assert!(memory.read(0xff8, &mut back));
        assert_eq!(&back, b"across the border");
    }

    #[test]
    fn log_marks_every_changed_page_within_its_length() {
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(4096).unwrap();
        let log = DirtyLog::map(file.try_clone().unwrap(), 0, 2, &memory_lost()).unwrap();
        log.mark(0xfff, 2);
        log.mark(0xf000, 0x10_0000);
        log.mark(0x5000, 0);
        let mut bytes = [0u8; 4096];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        assert_eq!(bytes[..3], [0b11, 0b1000_0000, 0]);
    }
}
