//! A guest's memory with one ring in it, and the driver's side of that ring.
//!
//! Two adjacent regions, a hole, and a third region. The driver writes through the memfd, so
//! nothing here accesses memory by a pointer.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ringfsd::internals::guest_memory::{
    Memory, MemoryLostEvent, Region, RegionDescription, of_regions,
};
use ringfsd::internals::virtqueue::{Call, Features, Queue, QueueIndex, RingAddresses};

/// Guest address and length of each region; each lies at its own address in the file.
pub const REGIONS: [(u64, u64); 3] = [(0, 0x8000), (0x8000, 0x38000), (0x50000, 0x8000)];

/// What a front end's address has on top of the guest's.
const USER: u64 = 0x7000_0000;

/// Where the ring lies.
pub const DESCRIPTORS: u64 = 0;
/// The available ring.
pub const AVAILABLE: u64 = 0x2000;
/// The used ring.
pub const USED: u64 = 0x4000;

/// Bytes of a descriptor.
pub const DESCRIPTOR_LEN: usize = 16;
/// Descriptor flag: there is a next one.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: a table lies there.
pub const INDIRECT: u16 = 4;

/// A guest with one ring.
#[derive(Debug)]
pub struct Guest {
    file: File,
    memory: Arc<Memory>,
    size: u16,
    available: u16,
}

impl Guest {
    /// A guest whose ring has `size` entries, a power of two up to 256.
    #[must_use]
    pub fn new(size: u16) -> Self {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("guest", flags).expect("a memfd"));
        file.set_len(0x58000).expect("its length");
        let alarm = Arc::new(MemoryLostEvent::new().expect("an eventfd"));
        let regions = REGIONS
            .iter()
            .map(|&(guest, len)| {
                let file = file.try_clone().expect("a descriptor");
                let description = RegionDescription {
                    file,
                    offset: guest,
                    guest,
                    user: USER + guest,
                    len,
                };
                Region::map(description, &alarm).expect("a region")
            })
            .collect();
        let memory = Arc::new(of_regions(regions).expect("a memory"));
        Self {
            file,
            memory,
            size,
            available: 0,
        }
    }

    /// Entries of the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The device's side, as new; the ring is zeroed.
    pub fn queue(&mut self, features: Features) -> Queue {
        self.available = 0;
        self.write(AVAILABLE, &[0; 4]);
        self.write(USED, &[0; 4]);
        let addresses = RingAddresses {
            descriptors: USER + DESCRIPTORS,
            available: USER + AVAILABLE,
            used: USER + USED,
            log: None,
        };
        let (index, call) = (QueueIndex(1), Arc::new(Call::default()));
        Queue::new(index, self.size, features, addresses, &self.memory, 0, call).expect("a queue")
    }

    /// Writes to the guest's memory.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).expect("guest memory");
    }

    /// Reads from the guest's memory.
    pub fn read(&self, at: u64, bytes: &mut [u8]) {
        self.file.read_exact_at(bytes, at).expect("guest memory");
    }

    /// Makes these heads available, no more than the ring has entries.
    pub fn make_available(&mut self, heads: &[u16]) {
        let bytes: Vec<u8> = heads.iter().flat_map(|head| head.to_le_bytes()).collect();
        let first = self.available & (self.size - 1);
        let (now, around) = bytes.split_at(bytes.len().min(2 * usize::from(self.size - first)));
        self.write(AVAILABLE + 4 + 2 * u64::from(first), now);
        self.write(AVAILABLE + 4, around);
        let more = u16::try_from(heads.len()).unwrap_or_default();
        self.set_available(self.available.wrapping_add(more));
        self.available = self.available.wrapping_add(more);
    }

    /// Says that this many are available.
    pub fn set_available(&self, index: u16) {
        self.write(AVAILABLE + 2, &index.to_le_bytes());
    }

    /// What is made available next comes at `index`.
    pub fn go_on_at(&mut self, index: u16) {
        self.available = index;
        self.set_available(index);
    }

    /// How many were made available.
    #[must_use]
    pub fn available(&self) -> u16 {
        self.available
    }

    /// How many came back.
    #[must_use]
    pub fn used(&self) -> u16 {
        let mut index = [0; 2];
        self.read(USED + 2, &mut index);
        u16::from_le_bytes(index)
    }

    /// Head and length of each used element from `index` on, up to what came back last.
    #[must_use]
    pub fn used_elements(&self, index: u16) -> Vec<(u32, u32)> {
        let mut ring = vec![0; 8 * usize::from(self.size)];
        self.read(USED + 4, &mut ring);
        let (elements, _) = ring.as_chunks::<8>();
        let at = |at: u16| elements[usize::from(index.wrapping_add(at) & (self.size - 1))];
        let pairs = (0..self.used().wrapping_sub(index)).map(at);
        let numbers = pairs.map(|[a, b, c, d, e, f, g, h]| {
            (
                u32::from_le_bytes([a, b, c, d]),
                u32::from_le_bytes([e, f, g, h]),
            )
        });
        numbers.collect()
    }
}

/// A descriptor's bytes.
#[must_use]
pub fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> [u8; DESCRIPTOR_LEN] {
    let mut bytes = [0; DESCRIPTOR_LEN];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
