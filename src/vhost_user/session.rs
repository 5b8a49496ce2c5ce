//! One vhost-user session: handles the messages of one front end, from connect to disconnect.
//!
//! See the vhost-user specification, "Back-end implementation". A [`Session`] owns the memory
//! table, the dirty log, the in-flight region and the state of each vring. The invariant: a queue
//! runs exactly if its ring is started, enabled and completely described, and never while one of
//! these changes.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error as ProtocolError, GpuBackend, VhostUserBackendReqHandlerMut};

use super::Runner;
use super::vring::Vring;
use crate::device::{self, Device};
use crate::guest_memory::{
    DirtyLog, GuestAddress, Memory, MemoryError, MemoryLostEvent, Region, RegionDescription,
};
use crate::migration::{Direction, Transfer, TransferError};
use crate::state::Table;
use crate::virtqueue::{
    Features, InflightError, InflightPart, InflightRegion, Journal, Queue, QueueError, QueueIndex,
    RingAddresses, Setup, Tracking,
};

/// How to make a VMM share its memory.
pub(super) const SHARE_MEMORY_HINT: &str = "start QEMU with `-object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem`, \
     Cloud Hypervisor with `--memory size=SIZE,shared=on`, libvirt with `<memoryBacking><source \
     type='memfd'/><access mode='shared'/></memoryBacking>`";

/// Protocol features that are offered. `vhost` implements REPLY_ACK.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::DEVICE_STATE);

/// How a session ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The front end disconnected.
    Disconnected,
    /// The server was asked to stop.
    Stopped,
    /// The server was asked to leave the session to another process. Its descriptors have stayed
    /// open.
    Left,
}

/// Why a session failed: through a fault of the front end or of the host.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A message was malformed, or came at the wrong time.
    #[error("the front end broke the vhost-user protocol")]
    Protocol(#[source] ProtocolError),
    /// The front end stopped sending within a message.
    #[error("the front end stopped within a message, of which {have} bytes have arrived")]
    Stalled {
        /// Bytes that have arrived.
        have: usize,
    },
    /// The front end accepted features that were not offered.
    #[error("the front end accepted features {accepted:#x}, of which {extra:#x} were not offered")]
    Features {
        /// The features that it accepted.
        accepted: u64,
        /// Those of them that were not offered.
        extra: u64,
    },
    /// The front end named a queue that the device doesn't have.
    #[error("the front end set up queue {index}, but there are {queues}; see --request-queues")]
    NoSuchQueue {
        /// The queue that it named.
        index: u32,
        /// The number of queues.
        queues: u16,
    },
    /// The kick came without an eventfd, which asks the back end to poll the ring.
    #[error("queue {0} has no kick eventfd; polling rings is not supported")]
    NoKick(QueueIndex),
    /// The descriptor for a call or a kick is no eventfd. A write to it might block or have any
    /// effect.
    #[error("the descriptor for the call or kick of queue {0} is not an eventfd")]
    NotAnEventfd(QueueIndex),
    /// The memory table is invalid.
    #[error("the front end's memory can't be used")]
    Memory(#[from] MemoryError),
    /// The VMM has not shared the guest's memory.
    #[error(
        "the VMM has not shared the VM's memory ({regions} regions with {fds} descriptors): \
         {SHARE_MEMORY_HINT}"
    )]
    NotShared {
        /// Regions that the message describes.
        regions: u32,
        /// Descriptors that came with it.
        fds: usize,
    },
    /// Part of the guest's memory is no longer accessible.
    #[error(
        "the guest's memory at {0:#x} is gone: its file was truncated, or the hardware lost the page"
    )]
    MemoryGone(GuestAddress),
    /// The front end's in-flight region can't be used.
    #[error("the front end's in-flight region can't be used")]
    Inflight(#[from] InflightError),
    /// The front end's in-flight region is no longer accessible.
    #[error("the front end's in-flight region is gone: its file was truncated")]
    InflightGone,
    /// The dirty log is no longer accessible.
    #[error("the dirty log is gone: its file was truncated")]
    LogGone,
    /// The event that reports lost memory can't be created.
    #[error("watching the guest's memory")]
    Watch(#[source] io::Error),
    /// A queue's description is invalid.
    #[error("the front end's queue can't be used")]
    Queue(#[from] QueueError),
    /// The worker can't run the queue.
    #[error("starting queue {index}")]
    Run {
        /// The queue.
        index: QueueIndex,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The session of the previous process has another number of queues than this device.
    #[error("the session has {recorded} queues, and this server {queues}; see --request-queues")]
    OtherDevice {
        /// Queues of the session.
        recorded: usize,
        /// Queues of this device.
        queues: u16,
    },
    /// A descriptor that the previous process should have left open can't be used.
    #[error("taking over descriptor {fd} of the session")]
    NotInherited {
        /// The descriptor's number.
        fd: std::os::fd::RawFd,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The process has no free descriptor.
    #[error(
        "the server has no file descriptor left: raise --rlimit-nofile, or the limit under which it \
         is started (ulimit -n)"
    )]
    Descriptors(#[source] io::Error),
    /// The socket can't be used.
    #[error("waiting for messages of the front end")]
    Socket(#[source] io::Error),
}

impl SessionError {
    /// Converts an error of the front end's socket.
    pub(super) fn socket(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => Self::Descriptors(error),
            _ => Self::Socket(error),
        }
    }
}

impl From<SessionError> for ProtocolError {
    fn from(error: SessionError) -> Self {
        Self::ReqHandlerError(io::Error::other(error))
    }
}

/// The state of a session.
#[derive(Debug)]
pub(super) struct Session<'a, R> {
    pub(super) device: &'a Device,
    runner: &'a mut R,
    /// State that outlives this process.
    table: Arc<Table>,
    /// Reports that memory of the front end is no longer accessible.
    pub(super) memory_lost: Arc<MemoryLostEvent>,
    /// Whether the front end has sent GET_FEATURES.
    pub(super) features_requested: bool,
    pub(super) features: Option<u64>,
    pub(super) protocol: Option<u64>,
    pub(super) regions: Memory,
    pub(super) log: Option<Arc<DirtyLog>>,
    /// The front end's in-flight region.
    pub(super) inflight: Option<InflightRegion>,
    /// `regions`, with `log` if LOG_ALL was negotiated.
    memory: Arc<Memory>,
    pub(super) vrings: Vec<Vring>,
    transfer: Transfer,
    /// Whether the warning that the VMM reads a missing tag was logged.
    warned_of_missing_tag: bool,
}

impl<'a, R: Runner> Session<'a, R> {
    pub(super) fn new(
        device: &'a Device,
        runner: &'a mut R,
        (table, memory_lost): (&Arc<Table>, &Arc<MemoryLostEvent>),
        stop: BorrowedFd<'_>,
    ) -> Self {
        Self {
            table: Arc::clone(table),
            device,
            runner,
            memory_lost: Arc::clone(memory_lost),
            features_requested: false,
            features: None,
            protocol: None,
            regions: Memory::default(),
            log: None,
            inflight: None,
            memory: Arc::default(),
            vrings: (0..device.queues()).map(|_| Vring::default()).collect(),
            transfer: Transfer::new(stop),
            warned_of_missing_tag: false,
        }
    }

    /// Prepares for a front end that has just connected. If no guest's session is in the table, the
    /// requests in flight there belong to an earlier front end.
    pub(super) fn begin(&self) {
        if self.table.agreement().is_none() {
            clear_in_flight(&self.table);
        }
    }

    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    fn negotiated(&self, feature: u64) -> bool {
        self.features.unwrap_or(0) & feature != 0
    }

    fn vring(&mut self, index: u32) -> Result<(QueueIndex, &mut Vring), SessionError> {
        let queues = self.device.queues();
        let missing = SessionError::NoSuchQueue { index, queues };
        let Ok(short) = u16::try_from(index) else {
            return Err(missing);
        };
        match self.vrings.get_mut(usize::from(short)) {
            Some(vring) => Ok((QueueIndex(short), vring)),
            None => Err(missing),
        }
    }

    /// Changes one queue's description. The queue is stopped meanwhile.
    fn change(&mut self, index: u32, change: impl FnOnce(&mut Vring)) -> Result<(), SessionError> {
        let (index, _) = self.vring(index)?;
        self.stop(index);
        change(&mut self.vrings[usize::from(index.0)]);
        self.start_if_ready(index)
    }

    /// Changes what all queues rely on. All queues are stopped meanwhile.
    pub(super) fn change_all(
        &mut self,
        change: impl FnOnce(&mut Self),
    ) -> Result<(), SessionError> {
        self.stop_all();
        change(self);
        let log = self.negotiated(device::LOG_ALL).then(|| self.log.clone());
        let log = log.flatten();
        self.memory = Arc::new(self.regions.with_log(log));
        for index in 0..self.device.queues() {
            self.start_if_ready(QueueIndex(index))?;
        }
        Ok(())
    }

    /// Starts the queue if it is ready and doesn't run.
    fn start_if_ready(&mut self, index: QueueIndex) -> Result<(), SessionError> {
        let enabled_at_start = !self.negotiated(device::PROTOCOL_FEATURES);
        let features = Features {
            event_idx: self.negotiated(device::EVENT_IDX),
            indirect: self.negotiated(device::INDIRECT_DESC),
        };
        let vring = &mut self.vrings[usize::from(index.0)];
        if vring.running {
            return Ok(());
        }
        let Some((addresses, kick)) = vring.ready(enabled_at_start) else {
            return Ok(());
        };
        let setup = Setup {
            index,
            size: vring.size,
            features,
            addresses,
            next: vring.base,
        };
        let in_table = self.table.queue(index.0);
        let from_front_end = self.inflight.as_ref().and_then(|region| region.part(index));
        let part = from_front_end.or_else(|| in_table.clone().map(InflightPart::in_table));
        let tracking = part.map(|inflight| Tracking {
            inflight,
            journal: in_table.map(Journal::new),
        });
        let call = Arc::clone(&vring.call);
        let queue = Queue::tracked(&setup, &self.memory, call, tracking)?;
        self.runner
            .run(queue, kick)
            .map_err(|source| SessionError::Run { index, source })?;
        vring.running = true;
        log::debug!(
            "queue {index} started: {} entries, {features:?}",
            vring.size
        );
        Ok(())
    }

    fn stop(&mut self, index: QueueIndex) {
        let vring = &mut self.vrings[usize::from(index.0)];
        if vring.running {
            vring.running = false;
            if let Some(next) = self.runner.stop(index) {
                vring.base = next;
            }
            log::debug!("queue {index} stopped at available index {}", vring.base);
        }
    }

    pub(super) fn stop_all(&mut self) {
        for index in 0..self.device.queues() {
            self.stop(QueueIndex(index));
        }
    }

    pub(super) fn heartbeat(&mut self) -> Option<Instant> {
        self.runner.heartbeat()
    }

    pub(super) fn resumed(&mut self) {
        self.runner.resumed();
    }

    fn reset(&mut self) {
        self.stop_all();
        for vring in &mut self.vrings {
            vring.reset();
        }
        // The reset ends all requests. The front end hands over a region again, this one or
        // another.
        self.inflight = None;
        clear_in_flight(&self.table);
        self.runner.reset();
    }
}

/// Clears the requests in flight in the table.
fn clear_in_flight(table: &Arc<Table>) {
    let parts = (0..=u16::MAX).map_while(|index| table.queue(index));
    parts.for_each(|part| InflightPart::in_table(part).clear());
}

/// Returns `fd` if it may be an eventfd. `fstat` reports no file type for an anonymous inode, as an
/// eventfd has, but one for files, pipes, sockets and devices. No other anonymous inode blocks a
/// write.
pub(super) fn eventfd(
    queue: QueueIndex,
    fd: impl Into<OwnedFd>,
) -> Result<Arc<OwnedFd>, SessionError> {
    let fd = fd.into();
    match rustix::fs::fstat(&fd) {
        Ok(stat) if stat.st_mode & libc::S_IFMT == 0 => Ok(Arc::new(fd)),
        _ => Err(SessionError::NotAnEventfd(queue)),
    }
}

type HandlerResult<T> = Result<T, ProtocolError>;

/// Logs the cause of a failed transfer, as the front end gets only a number.
fn transfer_failed(error: TransferError) -> ProtocolError {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    log::error!("migration failed: {text}");
    ProtocolError::ReqHandlerError(io::Error::other(error))
}

/// Refuses a request that belongs to a feature which was not offered.
fn not_offered<T>(what: &'static str) -> HandlerResult<T> {
    Err(ProtocolError::InvalidOperation(what))
}

impl<R: Runner> VhostUserBackendReqHandlerMut for Session<'_, R> {
    fn set_owner(&mut self) -> HandlerResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> HandlerResult<()> {
        self.stop_all();
        Ok(())
    }

    fn reset_device(&mut self) -> HandlerResult<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> HandlerResult<u64> {
        self.features_requested = true;
        Ok(device::FEATURES)
    }

    fn set_features(&mut self, accepted: u64) -> HandlerResult<()> {
        let extra = accepted & !device::FEATURES;
        if extra != 0 {
            return Err(SessionError::Features { accepted, extra }.into());
        }
        if Some(accepted) == self.features {
            return Ok(());
        }
        Ok(self.change_all(|session| session.features = Some(accepted))?)
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> HandlerResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions = table
            .iter()
            .zip(files)
            .map(|(region, file)| {
                let description = RegionDescription {
                    file,
                    offset: region.mmap_offset,
                    guest: region.guest_phys_addr,
                    user: region.user_addr,
                    len: region.memory_size,
                };
                Region::map(description, &self.memory_lost)
            })
            .collect::<Result<Vec<_>, _>>()
            .and_then(|regions| Memory::new(regions, None))
            .map_err(SessionError::Memory)?;
        self.change_all(|session| session.regions = regions)?;
        log::debug!("memory table of {} regions", self.regions.regions().len());
        Ok(None)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> HandlerResult<Option<VhostUserMemoryRegionBase>> {
        let description = RegionDescription {
            file,
            offset: region.mmap_offset,
            guest: region.guest_phys_addr,
            user: region.user_addr,
            len: region.memory_size,
        };
        let regions = Region::map(description, &self.memory_lost)
            .and_then(|region| self.regions.with_region(region))
            .map_err(SessionError::Memory)?;
        self.change_all(|session| session.regions = regions)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> HandlerResult<()> {
        let regions = self
            .regions
            .without_region(region.guest_phys_addr, region.user_addr, region.memory_size)
            .map_err(SessionError::Memory)?;
        Ok(self.change_all(|session| session.regions = regions)?)
    }

    fn get_max_mem_slots(&mut self) -> HandlerResult<u64> {
        Ok(Memory::MAX_REGIONS as u64)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> HandlerResult<()> {
        let (queue, _) = self.vring(index)?;
        Queue::check_size(queue, num).map_err(SessionError::Queue)?;
        let size = u16::try_from(num).map_err(|_checked| ProtocolError::InvalidParam)?;
        Ok(self.change(index, |vring| vring.size = size)?)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> HandlerResult<()> {
        let addresses = RingAddresses {
            descriptors: descriptor,
            available,
            used,
            log: flags
                .contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG)
                .then_some(log),
        };
        Ok(self.change(index, |vring| vring.addresses = Some(addresses))?)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> HandlerResult<()> {
        // A split ring has its index in the low half (vhost-user specification, "A vring
        // state description").
        let base = u16::try_from(base & 0xffff).map_err(|_masked| ProtocolError::InvalidParam)?;
        Ok(self.change(index, |vring| vring.base = base)?)
    }

    fn get_vring_base(&mut self, index: u32) -> HandlerResult<VhostUserVringState> {
        self.change(index, |vring| vring.kick = None)?;
        let (_, vring) = self.vring(index)?;
        Ok(VhostUserVringState::new(index, u32::from(vring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> HandlerResult<()> {
        let (queue, _) = self.vring(u32::from(index))?;
        let kick = fd.ok_or(SessionError::NoKick(queue))?;
        let kick = eventfd(queue, kick)?;
        Ok(self.change(u32::from(index), |vring| vring.kick = Some(kick))?)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> HandlerResult<()> {
        let (queue, vring) = self.vring(u32::from(index))?;
        let fd = fd.map(|fd| eventfd(queue, fd)).transpose()?;
        vring.call.set(fd.clone());
        vring.call_fd = fd;
        if vring.running {
            // A completion during the exchange may have signalled the old eventfd.
            vring.call.signal();
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> HandlerResult<()> {
        let (_, vring) = self.vring(u32::from(index))?;
        vring.err = fd.map(|fd| Arc::new(fd.into()));
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> HandlerResult<()> {
        let (_, vring) = self.vring(index)?;
        if vring.enabled == enable {
            return Ok(());
        }
        Ok(self.change(index, |vring| vring.enabled = enable)?)
    }

    fn get_protocol_features(&mut self) -> HandlerResult<VhostUserProtocolFeatures> {
        Ok(PROTOCOL_FEATURES)
    }

    fn set_protocol_features(&mut self, accepted: u64) -> HandlerResult<()> {
        let extra = accepted & !PROTOCOL_FEATURES.bits();
        if extra != 0 {
            return Err(SessionError::Features { accepted, extra }.into());
        }
        self.protocol = Some(accepted);
        Ok(())
    }

    fn get_queue_num(&mut self) -> HandlerResult<u64> {
        Ok(u64::from(self.device.queues()))
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> HandlerResult<Vec<u8>> {
        if self.device.tag.is_none()
            && offset == 0
            && !std::mem::replace(&mut self.warned_of_missing_tag, true)
        {
            log::warn!(
                "the VMM reads the mount tag from this server, which has none: set --tag NAME, \
                 unless the VMM has a setting of its own"
            );
        }
        let space = self.device.config_space();
        let part = usize::try_from(offset)
            .ok()
            .zip(usize::try_from(size).ok())
            .and_then(|(offset, size)| space.get(offset..offset.checked_add(size)?));
        part.map(<[u8]>::to_vec).ok_or(ProtocolError::InvalidParam)
    }

    fn set_config(
        &mut self,
        offset: u32,
        buf: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> HandlerResult<()> {
        // A guest can cause this, so it must not end the session.
        log::debug!(
            "ignoring a write of {} bytes at {offset} to the read-only configuration space",
            buf.len()
        );
        Ok(())
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> HandlerResult<()> {
        log::debug!("dirty log on descriptor {}", file.as_raw_fd());
        let log = DirtyLog::map(file, log.mmap_offset, log.mmap_size, &self.memory_lost)
            .map_err(SessionError::Memory)?;
        Ok(self.change_all(|session| session.log = Some(Arc::new(log)))?)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> HandlerResult<()> {
        not_offered("a file system has no use for a GPU socket")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> HandlerResult<File> {
        not_offered("SHARED_OBJECT was not offered")
    }

    fn get_inflight_fd(
        &mut self,
        wanted: &VhostUserInflight,
    ) -> HandlerResult<(VhostUserInflight, File)> {
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        let max = self.device.queues();
        if queues > max {
            let index = u32::from(queues.saturating_sub(1));
            return Err(SessionError::NoSuchQueue { index, queues: max }.into());
        }
        let (file, len) = InflightRegion::create(queues, size).map_err(SessionError::Inflight)?;
        Ok((VhostUserInflight::new(len, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> HandlerResult<()> {
        let region = InflightRegion::map(
            file,
            (given.mmap_offset, given.mmap_size),
            (given.num_queues, given.queue_size),
            &self.memory_lost,
        )
        .map_err(SessionError::Inflight)?;
        let (queues, size) = (given.num_queues, given.queue_size);
        log::debug!("in-flight region for {queues} queues of {size} entries");
        Ok(self.change_all(|session| session.inflight = Some(region))?)
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        phase: VhostTransferStatePhase,
        fd: File,
    ) -> HandlerResult<Option<File>> {
        let VhostTransferStatePhase::STOPPED = phase;
        let direction = match direction {
            VhostTransferStateDirection::SAVE => Direction::Save,
            VhostTransferStateDirection::LOAD => Direction::Load,
        };
        if self.vrings.iter().any(|vring| vring.running) {
            return Err(transfer_failed(TransferError::QueuesRunning));
        }
        let state = self.runner.device_state();
        self.transfer
            .start(direction, fd, state)
            .map_err(transfer_failed)?;
        // The transfer uses the front end's descriptor, so the reply carries none.
        Ok(None)
    }

    fn check_device_state(&mut self) -> HandlerResult<()> {
        self.transfer.finish().map_err(transfer_failed)
    }

    fn get_shmem_config(&mut self) -> HandlerResult<VhostUserShMemConfig> {
        not_offered("SHMEM was not offered")
    }
}
