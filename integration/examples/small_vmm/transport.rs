//! The registers of the device, as a VMM has them: a queue of `virtio-queue` for each of the device's,
//! and the eventfds that KVM connects with the guest's doorbells and interrupts.
//!
//! The invariant: the device is active exactly if the driver has set `DRIVER_OK`.

use std::error::Error;
use std::sync::Arc;

use ringfsd::embed::{Call, Kick, Memory, QueueSetup, RingState, VirtioFs};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The largest queue that the device offers.
const MAX_SIZE: u16 = 256;

/// A queue's registers.
pub(crate) struct QueueRegisters {
    /// What the driver has written.
    pub(crate) queue: Queue,
    /// Signalled when the guest writes to the doorbell (KVM: an ioeventfd).
    pub(crate) doorbell: EventFd,
    /// Signalled by the device (KVM: an irqfd).
    pub(crate) interrupt: EventFd,
}

/// The device and its registers.
pub(crate) struct Transport {
    device: VirtioFs,
    memory: Arc<GuestMemoryMmap>,
    /// The features that the driver has accepted.
    pub(crate) features: u64,
    /// The registers of each queue.
    pub(crate) queues: Vec<QueueRegisters>,
}

/// What a VMM stores of the device.
pub(crate) struct Snapshot {
    features: u64,
    queues: Vec<(QueueState, EventFd, EventFd)>,
    session: Vec<u8>,
    memory: Arc<GuestMemoryMmap>,
}

impl Transport {
    pub(crate) fn new(
        device: VirtioFs,
        memory: Arc<GuestMemoryMmap>,
    ) -> Result<Self, Box<dyn Error>> {
        let mut queues = Vec::new();
        for _ in 0..device.queues() {
            queues.push(QueueRegisters {
                queue: Queue::new(MAX_SIZE)?,
                doorbell: EventFd::new(EFD_NONBLOCK)?,
                interrupt: EventFd::new(0)?,
            });
        }
        Ok(Self {
            device,
            memory,
            features: 0,
            queues,
        })
    }

    /// The features that the driver reads.
    pub(crate) fn device_features(&self) -> u64 {
        self.device.features()
    }

    /// The configuration space, which the driver reads.
    pub(crate) fn read_config(&self, offset: usize, into: &mut [u8]) {
        self.device.read_config(offset, into);
    }

    /// The driver has written `DRIVER_OK`.
    pub(crate) fn driver_ok(&mut self) -> Result<(), Box<dyn Error>> {
        let mut setups = Vec::new();
        for (index, registers) in (0..).zip(&self.queues) {
            if registers.queue.ready() {
                let setup = QueueSetup {
                    ring: RingState::from(&registers.queue.state()),
                    kick: Kick::try_from(&registers.doorbell)?,
                    call: Call::by_eventfd(&registers.interrupt)?,
                };
                setups.push((index, setup));
            }
        }
        let memory = Memory::of(Arc::clone(&self.memory))?;
        self.device.activate(memory, self.features, setups)?;
        Ok(())
    }

    /// The driver has reset the device.
    pub(crate) fn reset(&mut self) {
        self.device.reset();
        for registers in &mut self.queues {
            registers.queue.reset();
        }
    }

    /// Pauses the device, and returns all of its state.
    pub(crate) fn snapshot(&mut self) -> Result<Snapshot, Box<dyn Error>> {
        self.device.pause();
        let mut queues = Vec::new();
        for (index, registers) in (0..).zip(&self.queues) {
            // A queue that the driver has not set up has the state of its registers.
            let stopped = self.device.queue_state(index, MAX_SIZE);
            queues.push((
                stopped.unwrap_or_else(|| registers.queue.state()),
                registers.doorbell.try_clone()?,
                registers.interrupt.try_clone()?,
            ));
        }
        Ok(Snapshot {
            features: self.features,
            queues,
            session: self.device.save()?,
            memory: Arc::clone(&self.memory),
        })
    }

    /// Continues from a snapshot with another device.
    pub(crate) fn restore(
        mut device: VirtioFs,
        snapshot: Snapshot,
    ) -> Result<Self, Box<dyn Error>> {
        device.load(&snapshot.session)?;
        let mut queues = Vec::new();
        for (state, doorbell, interrupt) in snapshot.queues {
            queues.push(QueueRegisters {
                queue: Queue::try_from(state)?,
                doorbell,
                interrupt,
            });
        }
        let mut restored = Self {
            device,
            memory: snapshot.memory,
            features: snapshot.features,
            queues,
        };
        restored.driver_ok()?;
        Ok(restored)
    }
}
