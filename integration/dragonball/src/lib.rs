//! The device of ringfsd in Dragonball, whose devices implement the trait `VirtioDevice`.
//!
//! Where Dragonball makes its own `VirtioFs`, a fork of it makes a [`RingfsDevice`]; what there
//! follows (registers, resources, interrupts) is the same. Dragonball's `vm-memory` and `virtio-queue`
//! are older than ringfsd's, so memory is passed by its addresses, and queues field by field.
//!
//! It has no DAX window, and rate limits are for the host's control groups.

use std::any::Any;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use dbs_device::resources::ResourceConstraint;
use dbs_virtio_devices::{
    ActivateError, ActivateResult, TYPE_VIRTIO_FS, VirtioDevice, VirtioDeviceConfig,
    VirtioQueueConfig,
};
use ringfsd::embed::{Call, DeviceError, Kick, Memory, QueueSetup, RingState, VirtioFs};
use virtio_queue::QueueT;
use vm_memory::{
    Address, GuestAddressSpace, GuestMemory, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

/// Entries of each queue, as in Dragonball's own device.
const QUEUE_SIZE: u16 = 1024;

/// A virtio-fs device of ringfsd for Dragonball.
pub struct RingfsDevice {
    device: VirtioFs,
    accepted: u64,
    queue_sizes: Vec<u16>,
}

impl RingfsDevice {
    /// A device that is handed over to Dragonball's transport.
    pub fn new(device: VirtioFs) -> Self {
        let queue_sizes = vec![QUEUE_SIZE; device.queues().into()];
        Self {
            device,
            accepted: 0,
            queue_sizes,
        }
    }

    /// Activates the device: what [`VirtioDevice::activate`] does, without a VM.
    pub fn start<T, Q>(
        &mut self,
        memory: T,
        queues: Vec<VirtioQueueConfig<Q>>,
    ) -> Result<(), DeviceError>
    where
        T: Deref + Send + Sync + 'static,
        T::Target: GuestMemory,
        Q: QueueT + Send + 'static,
    {
        let memory = memory_of(Arc::new(memory)).map_err(DeviceError::Memory)?;
        let setups: Result<Vec<_>, _> = queues
            .into_iter()
            .filter(|config| config.queue().ready())
            .map(setup)
            .collect();
        let setups = setups.map_err(|source| DeviceError::Run { index: 0, source })?;
        self.device.activate(memory, self.accepted, setups)
    }
}

/// Guest memory by its addresses; `memory` stays as long as the device uses them.
fn memory_of<T>(memory: Arc<T>) -> Result<Memory, ringfsd::embed::MemoryError>
where
    T: Deref + Send + Sync + 'static,
    T::Target: GuestMemory,
{
    let regions: Vec<_> = memory
        .iter()
        .filter_map(|region| {
            let start = region.get_host_address(MemoryRegionAddress(0)).ok()?;
            let len = usize::try_from(region.len()).ok()?;
            Some((region.start_addr().raw_value(), start, len))
        })
        .collect();
    // SAFETY: the regions are those of `memory`, which keeps them mapped and is the guard; nobody makes
    // a reference to guest memory.
    unsafe { Memory::from_raw_regions(regions, memory) }
}

/// What the driver has set up in the registers of a queue.
fn setup<Q: QueueT + Send + 'static>(
    config: VirtioQueueConfig<Q>,
) -> std::io::Result<(u16, QueueSetup)> {
    let queue = config.queue();
    let ring = RingState {
        size: config.actual_size(),
        descriptors: queue.desc_table(),
        available: queue.avail_ring(),
        used: queue.used_ring(),
        next_available: queue.next_avail(),
        next_used: queue.next_used(),
    };
    let (index, eventfd) = (config.index(), Arc::clone(&config.eventfd));
    let kick = Kick::from(duplicate(&*eventfd)?);
    // The device calls on its threads; the queue's type is `Send` only.
    let config = Mutex::new(config);
    let call = Call::function(move || {
        let config = config.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = config.notify() {
            log::error!("injecting an interrupt: {error}");
        }
    });
    Ok((index, QueueSetup { ring, kick, call }))
}

/// Duplicates an eventfd of Dragonball's version of `vmm-sys-util`.
fn duplicate(eventfd: &impl std::os::fd::AsRawFd) -> std::io::Result<std::os::fd::OwnedFd> {
    // SAFETY: the eventfd is open as long as it is borrowed.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
    fd.as_fd().try_clone_to_owned()
}

impl<AS, Q> VirtioDevice<AS, Q, GuestRegionMmap> for RingfsDevice
where
    AS: GuestAddressSpace + Send + Sync + 'static,
    AS::T: Send + Sync + 'static,
    Q: QueueT + Send + 'static,
{
    fn device_type(&self) -> u32 {
        TYPE_VIRTIO_FS
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn get_avail_features(&self, page: u32) -> u32 {
        let half = self.device.features().checked_shr(page * 32).unwrap_or(0);
        half as u32
    }

    fn set_acked_features(&mut self, page: u32, value: u32) {
        let half = u64::from(value).checked_shl(page * 32).unwrap_or(0);
        self.accepted |= half & self.device.features();
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        self.device.read_config(offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // Read-only.
    }

    fn activate(&mut self, config: VirtioDeviceConfig<AS, Q>) -> ActivateResult {
        let memory = config.lock_guest_memory();
        self.start(memory, config.queues).map_err(|error| {
            log::error!("activating virtio-fs: {error}");
            ActivateError::InvalidQueueConfig
        })
    }

    fn reset(&mut self) -> ActivateResult {
        self.device.reset();
        self.accepted = 0;
        Ok(())
    }

    fn remove(&mut self) {
        self.device.reset();
    }

    fn get_resource_requirements(
        &self,
        requests: &mut Vec<ResourceConstraint>,
        use_generic_irq: bool,
    ) {
        requests.push(ResourceConstraint::LegacyIrq { irq: None });
        if use_generic_irq {
            // One for changes of the configuration, and one for each queue.
            requests.push(ResourceConstraint::GenericIrq {
                size: self.queue_sizes.len() as u32 + 1,
            });
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::time::{Duration, Instant};

    use ringfsd::embed::Options;
    use ringfsd::fs::passthrough::{self, Passthrough};
    use virtio_queue::QueueSync;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;

    type Device = dyn VirtioDevice<Arc<GuestMemoryMmap>, QueueSync, GuestRegionMmap>;

    #[test]
    fn request_on_a_queue_of_dragonball_is_answered() {
        let share = tempfile::tempdir().unwrap();
        let options = passthrough::Options::default();
        let fs = Arc::new(Passthrough::new(share.path(), options).unwrap());
        let options = Options {
            tag: Some("shared".parse().unwrap()),
            ..Options::default()
        };
        let mut device = RingfsDevice::new(VirtioFs::new(fs, options).unwrap());
        {
            let device: &mut Device = &mut device;
            assert_eq!(
                (device.device_type(), device.queue_max_sizes().len()),
                (26, 2)
            );
            let mut tag = [0; 6];
            device.read_config(0, &mut tag);
            assert_eq!(&tag, b"shared");
            assert_eq!(device.get_avail_features(1), 1, "VERSION_1");
            device.set_acked_features(1, 1);
        }

        let memory =
            Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let mut config = VirtioQueueConfig::<QueueSync>::create(QUEUE_SIZE, 1).unwrap();
        let queue = config.queue_mut();
        queue.set_size(16);
        queue.set_desc_table_address(Some(0x1000), None);
        queue.set_avail_ring_address(Some(0x2000), None);
        queue.set_used_ring_address(Some(0x3000), None);
        queue.set_ready(true);
        let kick = Arc::clone(&config.eventfd);
        device.start(Arc::clone(&memory), vec![config]).unwrap();

        // INIT of version 7.38: 40 bytes of header and 64 of arguments.
        let mut request = [0_u32; 26];
        (request[0], request[1], request[2]) = (104, 26, 2);
        (request[10], request[11]) = (7, 38);
        let request: Vec<u8> = request.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let write = |bytes: &[u8], at| memory.write_slice(bytes, GuestAddress(at)).unwrap();
        write(&request, 0x8000);
        let descriptor = |address: u64, len: u32, flags: u16, next: u16| {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend([flags.to_le_bytes(), next.to_le_bytes()].concat());
            bytes
        };
        write(&descriptor(0x8000, 104, 1, 1), 0x1000);
        write(&descriptor(0x9000, 4096, 2, 0), 0x1010);
        memory
            .store(1_u16, GuestAddress(0x2002), Ordering::Release)
            .unwrap();
        kick.write(1).unwrap();
        // No VM, so nobody gets the interrupt: the index tells.
        let deadline = Instant::now() + Duration::from_secs(30);
        while memory
            .load::<u16>(GuestAddress(0x3002), Ordering::Acquire)
            .unwrap()
            != 1
        {
            assert!(Instant::now() < deadline, "no answer");
            std::thread::yield_now();
        }
        let mut reply = [0; 24];
        memory.read_slice(&mut reply, GuestAddress(0x9000)).unwrap();
        assert_eq!(reply[4..8], [0; 4], "no error");
        assert_eq!(reply[16..24], [7, 0, 0, 0, 38, 0, 0, 0], "the version");
        let device: &mut Device = &mut device;
        device.reset().unwrap();
    }
}
