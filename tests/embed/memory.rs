//! Guest memory of a VMM: bitmaps of changed pages, and regions that come and go.

use ringfsd::embed::{Choice, DeviceError, Memory};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm::fuse::{Client, ROOT};

use crate::guest::{Driver, device, mounted};

#[test]
fn changed_pages_are_in_the_bitmaps_of_the_vmm() {
    let share = tempfile::tempdir().unwrap();
    std::fs::write(share.path().join("file"), vec![7; 20_000]).unwrap();
    let mut device = device(share.path(), Choice::Auto);
    let driver = Driver::new();
    let mapped = driver.mapped::<AtomicBitmap>();
    let memory = Memory::of(std::sync::Arc::clone(&mapped)).unwrap();
    let used = driver.queues[1].addresses().used;
    let available = driver.queues[1].addresses().available;
    device
        .activate(memory, device.features(), driver.setups())
        .unwrap();
    let mut client = Client::new(driver);
    client.init().unwrap();
    let entry = client.lookup(ROOT, c"file").unwrap();
    let handle = client.open(entry.nodeid, libc::O_RDONLY).unwrap();
    let is_dirty = |gpa: u64| {
        let region = mapped.find_region(GuestAddress(gpa)).unwrap();
        let offset = usize::try_from(gpa - region.start_addr().0).unwrap();
        region.bitmap().dirty_at(offset)
    };
    reset(&mapped);
    assert!(!is_dirty(used.0));
    // All pages that differ after a READ, and no others but those of its own reply.
    let before = content(&client.guest().memory);
    assert_eq!(
        client.read(entry.nodeid, handle, 0, 20_000).unwrap(),
        [7; 20_000]
    );
    let after = content(&client.guest().memory);
    let mut changed = 0;
    for ((gpa, before), (_, after)) in before.iter().zip(&after) {
        // The driver writes its available ring, descriptors and the request.
        if before != after && *after == [7; 4096] {
            changed += 1;
            assert!(is_dirty(*gpa), "page {gpa:#x}");
        }
    }
    assert!(changed >= 4, "the data has four whole pages, not {changed}");
    assert!(is_dirty(used.0));
    let alone = available.0 / 4096 != used.0 / 4096;
    assert!(!alone || !is_dirty(available.0), "the driver's ring");
}

/// Clears all bitmaps.
fn reset(memory: &GuestMemoryMmap<AtomicBitmap>) {
    memory.iter().for_each(|region| (**region).bitmap().reset());
}

/// All pages of the guest's memory, by address.
fn content(memory: &vmm::Memory) -> Vec<(u64, Vec<u8>)> {
    let mut pages = Vec::new();
    for region in memory.regions() {
        for gpa in (region.gpa()..region.gpa() + region.len()).step_by(4096) {
            pages.push((gpa, memory.read_vec(vmm::Gpa(gpa), 4096).unwrap()));
        }
    }
    pages
}

#[test]
fn memory_is_replaced_under_a_running_guest() {
    let share = tempfile::tempdir().unwrap();
    let (mut device, mut client) = mounted(share.path());
    let (file, handle) = client.create(ROOT, c"file", 0o644).unwrap();
    // The same memory mapped elsewhere, as a VMM has it after it has added a region.
    for _ in 0..3 {
        let memory = Memory::of(client.guest().mapped::<()>()).unwrap();
        device.set_memory(memory).unwrap();
        client
            .write(file.nodeid, handle, 0, b"still there")
            .unwrap();
    }
    // A region in which rings are can't go.
    let small = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    let error = device.set_memory(Memory::of(std::sync::Arc::new(small)).unwrap());
    assert!(
        matches!(error, Err(DeviceError::NotInMemory { .. })),
        "{error:?}"
    );
    device.reset();
    let content = std::fs::read(share.path().join("file")).unwrap();
    assert_eq!(content, b"still there");
}

#[test]
fn memory_stays_mapped_while_the_device_uses_it() {
    let share = tempfile::tempdir().unwrap();
    let mut device = device(share.path(), Choice::Auto);
    let driver = Driver::new();
    let mapped = driver.mapped::<()>();
    let weak = std::sync::Arc::downgrade(&mapped);
    let memory = Memory::of(mapped).unwrap();
    device
        .activate(memory, device.features(), driver.setups())
        .unwrap();
    let mut client = Client::new(driver);
    client.init().unwrap();
    assert!(weak.upgrade().is_some());
    device.reset();
    assert!(weak.upgrade().is_none(), "nothing keeps it after a reset");
}
