//! The device in the daemon of `vhost-user-backend`.
//!
//! For programs that serve devices of several kinds with that daemon. The server of this crate has a
//! session of its own, which can do more; [`VhostUserDevice`] says what. The invariant: the daemon's
//! threads never serve a request.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserProtocolFeatures,
};
use vhost_user_backend::VhostUserBackend;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::device::{Options, VirtioFs};
use super::error::DeviceError;
use super::vring::{DaemonMemory, DirectVring, lock};
use crate::device::{LOG_ALL, PROTOCOL_FEATURES};
use crate::error_chain;
use crate::fs::FileSystem;
use crate::guest_memory::Memory;
use crate::limits::Limits;
use crate::metrics::Registry;
use crate::migration::{Direction, Transfer};
use crate::virtqueue::Queue;

/// The most queues that the daemon can give to one thread.
const MAX_QUEUES: u16 = 64;

/// The protocol features that daemon and device have together.
const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::DEVICE_STATE);

/// Why a device can't be made for the daemon.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserDeviceError {
    /// The device itself fails.
    #[error("making a virtio-fs device")]
    Device(#[from] DeviceError),
    /// The daemon can't serve that many queues.
    #[error("the daemon of vhost-user-backend serves at most {MAX_QUEUES} queues, not {0}")]
    TooManyQueues(u16),
    /// The host has no eventfd for the daemon.
    #[error("making an eventfd")]
    Event(#[source] io::Error),
}

/// A [`VirtioFs`] for `vhost_user_backend::VhostUserDaemon`. A clone is the same device.
///
/// Kicks go from the guest to the device's own threads, and not through the daemon's; see
/// [`DirectVring`]. The daemon has no INFLIGHT and no back channel for DAX, so a session doesn't
/// survive it, and it ends the process if memory is lost that a VMM has shared.
///
/// ```no_run
/// use std::sync::Arc;
///
/// use ringfsd::embed::{Options, VhostUserDevice};
/// use ringfsd::fs::passthrough::{self, Passthrough};
/// use vhost_user_backend::VhostUserDaemon;
/// use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
///
/// let fs = Passthrough::new("/srv/share".as_ref(), passthrough::Options::default())?;
/// let device = VhostUserDevice::new(Arc::new(fs), Options::default())?;
/// let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
/// let mut daemon = VhostUserDaemon::new("virtio-fs".into(), device.clone(), memory)
///     .map_err(|error| error.to_string())?;
/// daemon.serve("/run/fs.sock").map_err(|error| error.to_string())?;
/// // The VMM has disconnected.
/// device.disconnected();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct VhostUserDevice {
    shared: Arc<Shared>,
}

struct Shared {
    device: Arc<Mutex<VirtioFs>>,
    queues: u16,
    terms: Mutex<Terms>,
    transfer: Mutex<Transfer>,
    /// Ends the daemon's thread.
    exit: (EventConsumer, EventNotifier),
}

/// What the daemon has told, and the device needs when its first queue starts.
#[derive(Debug, Default)]
struct Terms {
    features: u64,
    memory: Option<DaemonMemory>,
}

impl VhostUserDevice {
    /// A device that serves `fs`.
    ///
    /// # Errors
    ///
    /// See [`VhostUserDeviceError`].
    pub fn new(fs: Arc<dyn FileSystem>, options: Options) -> Result<Self, VhostUserDeviceError> {
        let device = VirtioFs::new(fs, options)?;
        let queues = device.queues();
        if queues > MAX_QUEUES {
            return Err(VhostUserDeviceError::TooManyQueues(queues));
        }
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        let exit = new_event_consumer_and_notifier(flags).map_err(VhostUserDeviceError::Event)?;
        let never = super::queue::Kick::new().map_err(VhostUserDeviceError::Event)?;
        Ok(Self {
            shared: Arc::new(Shared {
                device: Arc::new(Mutex::new(device)),
                queues,
                terms: Mutex::default(),
                transfer: Mutex::new(Transfer::new(std::os::fd::AsFd::as_fd(&never.0))),
                exit,
            }),
        })
    }

    /// To be called when the VMM has disconnected: stops the queues, and discards the guest's session.
    /// Another daemon may then use the device.
    pub fn disconnected(&self) {
        self.device().reset();
        *self.terms() = Terms::default();
    }

    /// What the device counts; see [`VirtioFs::metrics`].
    #[must_use]
    pub fn metrics(&self) -> Arc<Registry> {
        Arc::clone(self.device().metrics())
    }

    /// How much the guest may ask for; see [`VirtioFs::limits`].
    #[must_use]
    pub fn limits(&self) -> Arc<Limits> {
        Arc::clone(self.device().limits())
    }

    fn device(&self) -> MutexGuard<'_, VirtioFs> {
        lock(&self.shared.device)
    }

    fn terms(&self) -> MutexGuard<'_, Terms> {
        self.shared
            .terms
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the queue of a ring that is ready and enabled, unless it runs.
    fn start(&self, index: u16, vring: &DirectVring) -> Result<(), DeviceError> {
        vring.belongs_to(&self.shared.device, index);
        let mut device = self.device();
        let Some(setup) = vring.setup() else {
            return Ok(());
        };
        if !device.is_active() {
            let terms = self.terms();
            let memory = terms.memory.as_ref().map(snapshot).transpose();
            let memory = memory.map_err(DeviceError::Memory)?.unwrap_or_default();
            device.activate(memory, terms.features, [])?;
        }
        match device.start_queue(index, setup) {
            Err(DeviceError::Runs(_)) => Ok(()),
            started => started,
        }
    }
}

/// The memory of the daemon as it is now.
fn snapshot(memory: &DaemonMemory) -> Result<Memory, crate::guest_memory::MemoryError> {
    Memory::of(memory.memory().into_inner())
}

/// An error for the daemon, which logs it, with its causes.
fn refuse(error: &(dyn std::error::Error + 'static)) -> io::Error {
    io::Error::other(error_chain::one_line(error))
}

impl fmt::Debug for VhostUserDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostUserDevice")
            .field("device", &self.shared.device)
            .finish_non_exhaustive()
    }
}

impl VhostUserBackend for VhostUserDevice {
    type Bitmap = BitmapMmapRegion;
    type Vring = DirectVring;

    fn num_queues(&self) -> usize {
        self.shared.queues.into()
    }

    fn max_queue_size(&self) -> usize {
        Queue::MAX_SIZE.into()
    }

    fn features(&self) -> u64 {
        self.device().features() | LOG_ALL | PROTOCOL_FEATURES
    }

    fn acked_features(&self, features: u64) {
        let features = features & self.device().features();
        self.terms().features = features;
        let changed = self.device().set_features(features);
        if let Err(error) = changed {
            log::error!("{}", error_chain::one_line(&error));
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        PROTOCOL
    }

    fn reset_device(&self) {
        self.device().reset();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // One of the features.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let space = self.device().config_space();
        let part = usize::try_from(offset).ok().and_then(|start| {
            let end = start.checked_add(usize::try_from(size).ok()?)?;
            space.get(start..end)
        });
        part.unwrap_or_default().to_vec()
    }

    fn update_memory(&self, memory: DaemonMemory) -> io::Result<()> {
        let mut device = self.device();
        if device.is_active() {
            let memory = snapshot(&memory).map_err(|error| refuse(&error))?;
            device.set_memory(memory).map_err(|error| refuse(&error))?;
        }
        self.terms().memory = Some(memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        // One thread for all: it does nothing but start queues.
        vec![u64::MAX]
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) = &self.shared.exit;
        Some((consumer.try_clone().ok()?, notifier.try_clone().ok()?))
    }

    fn handle_event(
        &self,
        device_event: u16,
        _evset: EventSet,
        vrings: &[DirectVring],
        _thread_id: usize,
    ) -> io::Result<()> {
        // The daemon calls this when a ring is enabled. An error would end its thread, and with it all
        // queues.
        if let Some(vring) = vrings.get(usize::from(device_event))
            && let Err(error) = self.start(device_event, vring)
        {
            log::error!(
                "queue {device_event} doesn't start: {}",
                error_chain::one_line(&error)
            );
        }
        Ok(())
    }

    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        file: File,
    ) -> io::Result<Option<File>> {
        let direction = match direction {
            VhostTransferStateDirection::SAVE => Direction::Save,
            VhostTransferStateDirection::LOAD => Direction::Load,
        };
        let state = self.device().device_state();
        let state = state.map_err(|error| refuse(&error))?;
        self.transfer()
            .start(direction, file, state)
            .map_err(|error| refuse(&error))?;
        Ok(None)
    }

    fn check_device_state(&self) -> io::Result<()> {
        self.transfer().finish().map_err(|error| refuse(&error))
    }
}

impl VhostUserDevice {
    fn transfer(&self) -> MutexGuard<'_, Transfer> {
        self.shared
            .transfer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
