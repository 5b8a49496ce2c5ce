//! Tests of regions, snapshots and the dirty log, with memory of this process.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::*;

fn memory_lost() -> Arc<MemoryLostEvent> {
    Arc::new(MemoryLostEvent::new().unwrap())
}

fn region(guest: u64, len: u64) -> Region {
    let fd: OwnedFd = rustix::fs::memfd_create("region", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(len).unwrap();
    let description = RegionDescription {
        file,
        offset: 0,
        guest,
        user: 0x7000_0000 + guest,
        len,
    };
    Region::map(description, &memory_lost()).unwrap()
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
    let description = RegionDescription {
        file,
        offset: 0,
        guest: 0,
        user: 0,
        len: 0x2000,
    };
    let result = Region::map(description, &memory_lost());
    assert!(matches!(result, Err(MemoryError::Map { .. })));
}

#[test]
fn lost_memory_reads_as_zeros_and_is_reported() {
    let fd = rustix::fs::memfd_create("taken", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(0x3000).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 0x3000], 0).unwrap();
    let memory_lost = memory_lost();
    let description = RegionDescription {
        file: file.try_clone().unwrap(),
        offset: 0x1000,
        guest: 0x8000,
        user: 0,
        len: 0x2000,
    };
    let region = Region::map(description, &memory_lost).unwrap();
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

/// Records the ranges that were changed.
#[derive(Debug, Default)]
struct Ranges(std::sync::Mutex<Vec<(u64, u64)>>);

impl ChangeLog for Ranges {
    fn mark(&self, guest: GuestAddress, len: u64) {
        self.0.lock().unwrap().push((guest, len));
    }
}

#[test]
fn raw_regions_are_used_where_they_are_and_keep_their_guard() {
    let mapping = Arc::new(vm_memory::MmapRegion::<()>::new(0x3000).unwrap());
    let start = mapping.as_ptr();
    let guard = Arc::clone(&mapping);
    let regions = [
        (0x8000, start, 0x1000),
        (0x1_0000, start.wrapping_add(0x2000), 0x1000),
    ];
    // SAFETY: both ranges are within the mapping, which the guard keeps, and have no reference.
    let silent = unsafe { Memory::from_raw_regions(regions, guard) }.unwrap();
    let log = Arc::new(Ranges::default());
    let memory = silent.recording_in(Arc::clone(&log) as _);
    drop(silent);
    assert!(memory.slices(0x1_0010, 2, |slice| slice.write(b"ab")));
    memory.mark_dirty(0x1_0010, 2);
    // SAFETY: the byte is within the mapping.
    let written = unsafe { start.wrapping_add(0x2010).read_volatile() };
    assert_eq!(
        (written, log.0.lock().unwrap().as_slice()),
        (b'a', &[(0x1_0010, 2)][..])
    );
    assert!(!memory.read(0x9000, &mut [0]));
    assert_eq!(
        memory.guest_address(0x8000),
        Some(0x8000),
        "the guest's addresses"
    );
    assert_eq!(Arc::strong_count(&mapping), 3);
    drop(memory);
    assert_eq!(Arc::strong_count(&mapping), 1);
}

#[test]
fn memory_of_a_vmm_has_its_regions_and_its_bitmaps() {
    use vm_memory::{GuestAddress as At, GuestMemoryMmap};
    let ranges = [(At(0), 0x2000), (At(0x8000), 0x1000)];
    let vmm = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap());
    let memory = Memory::of(Arc::clone(&vmm)).unwrap();
    let addresses: Vec<_> = memory.regions().iter().map(Region::addresses).collect();
    assert_eq!(addresses, [(0, 0, 0x2000), (0x8000, 0x8000, 0x1000)]);
    assert!(
        memory
            .regions()
            .iter()
            .all(|region| region.file().is_none())
    );
    assert!(!memory.is_logging(), "it has no bitmap");
    vm_memory::Bytes::write_slice(&*vmm, b"guest", At(0x8100)).unwrap();
    let mut read = [0; 5];
    assert!(memory.read(0x8100, &mut read));
    assert_eq!(&read, b"guest");
}
