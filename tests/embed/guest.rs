//! A guest in this process: its memory as a VMM has it, its queues, and the device that serves them.

use std::num::{NonZeroU16, NonZeroUsize};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use ringfsd::embed::{Call, Choice, Kick, Memory, Options, QueueSetup, RingState, VirtioFs};
use ringfsd::fs::passthrough::{self, Passthrough};
use ringfsd::io::probe;
use vm_memory::mmap::NewBitmap;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm::fuse::{Client, Guest};
use vmm::ring::QueueOptions;
use vmm::{Queue, Region};

/// Guest memory and queues, of which the first is the high-priority queue.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) memory: vmm::Memory,
    pub(crate) queues: Vec<Queue>,
}

impl Driver {
    /// A driver with two request queues.
    pub(crate) fn new() -> Self {
        let memory = vmm::Memory::new(&[
            Region::new(0, 8 << 20),
            Region::new(1 << 32, 8 << 20).file_offset(0x5000),
        ])
        .unwrap();
        let options = QueueOptions {
            size: 64,
            event_idx: true,
            indirect: true,
            indirect_capacity: 64,
            addresses: None,
        };
        let queues = (0..3).map(|_| Queue::new(&memory, &options).unwrap());
        Self {
            queues: queues.collect(),
            memory,
        }
    }

    /// The memory as a VMM has mapped it.
    pub(crate) fn mapped<B: NewBitmap>(&self) -> Arc<GuestMemoryMmap<B>> {
        let regions = self.memory.regions().iter().map(|region| {
            let file = region.fd().try_clone_to_owned().unwrap().into();
            let file = FileOffset::new(file, region.file_offset());
            let len = usize::try_from(region.len()).unwrap();
            let mapping = MmapRegion::from_file(file, len).unwrap();
            GuestRegionMmap::new(mapping, GuestAddress(region.gpa())).unwrap()
        });
        Arc::new(GuestMemoryMmap::from_regions(regions.collect()).unwrap())
    }

    /// What the driver tells a device of its queues.
    pub(crate) fn setups(&self) -> Vec<(u16, QueueSetup)> {
        (0..).zip(self.queues.iter().map(setup)).collect()
    }

    /// Activates `device` for this driver.
    pub(crate) fn activate(&self, device: &mut VirtioFs) {
        let memory = Memory::of(self.mapped::<()>()).unwrap();
        let features = device.features();
        device.activate(memory, features, self.setups()).unwrap();
    }
}

impl Guest for Driver {
    fn memory(&self) -> &vmm::Memory {
        &self.memory
    }

    fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }
}

/// A queue that was just set up, which notifies by eventfds.
pub(crate) fn setup(queue: &Queue) -> QueueSetup {
    let addresses = queue.addresses();
    let eventfd = |event: &vmm::Event| event.as_fd().try_clone_to_owned().unwrap();
    QueueSetup {
        ring: RingState {
            size: queue.size(),
            descriptors: addresses.descriptors.0,
            available: addresses.available.0,
            used: addresses.used.0,
            next_available: 0,
            next_used: 0,
        },
        kick: Kick::from(eventfd(queue.kick_event())),
        call: Call::eventfd(Arc::new(eventfd(queue.call_event()))),
    }
}

/// A device that shares `directory`, with two request queues.
pub(crate) fn device(directory: &Path, runtime: Choice) -> VirtioFs {
    VirtioFs::new(passthrough(directory), options(runtime)).unwrap()
}

pub(crate) fn passthrough(directory: &Path) -> Arc<Passthrough> {
    let options = passthrough::Options::default();
    Arc::new(Passthrough::new(directory, options).unwrap())
}

pub(crate) fn options(runtime: Choice) -> Options {
    Options {
        tag: Some("shared".parse().unwrap()),
        request_queues: NonZeroU16::new(2).unwrap(),
        workers: NonZeroUsize::new(2).unwrap(),
        runtime,
        ..Options::default()
    }
}

/// A guest that has mounted `directory`, and the device that serves it.
pub(crate) fn mounted(directory: &Path) -> (VirtioFs, Client<Driver>) {
    let mut device = device(directory, Choice::Auto);
    let driver = Driver::new();
    driver.activate(&mut device);
    let mut client = Client::new(driver);
    client.init().unwrap();
    (device, client)
}

/// The engines of this machine.
pub(crate) fn engines() -> Vec<Choice> {
    match probe() {
        Ok(()) => vec![Choice::Tokio, Choice::Uring],
        Err(reason) => {
            println!("SKIPPED in part: {reason}");
            vec![Choice::Tokio]
        }
    }
}
