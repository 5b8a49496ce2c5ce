//! One vhost-user session: what the messages of one front end do, from connect to disconnect.
//!
//! See the vhost-user specification, "Back-end implementation". The invariant: a queue runs
//! exactly when it is started, enabled and described, and never while one of these changes.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error as ProtocolError, GpuBackend, VhostUserBackendReqHandlerMut};

use super::Runner;
use super::device_state::{Direction, Transfer, TransferError};
use super::vring::Vring;
use crate::device::{self, Device};
use crate::state::Table;
use crate::virtqueue::memory::{DirtyLog, GuestAddress, MemoryLostEvent, Region};
use crate::virtqueue::{
    Features, InflightError, InflightPart, InflightRegion, Journal, Memory, MemoryError, Queue,
    QueueError, QueueIndex, RingAddresses, Setup, Tracking,
};

/// What to do about memory that is not shared.
pub(super) const SHARE: &str = "start QEMU with `-object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem`, \
     Cloud Hypervisor with `--memory size=SIZE,shared=on`, libvirt with `<memoryBacking><source \
     type='memfd'/><access mode='shared'/></memoryBacking>`";

/// What is offered of the protocol. REPLY_ACK is `vhost`'s own work.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::DEVICE_STATE);

/// How a session ended, if well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The front end has gone.
    Disconnected,
    /// The server was asked to stop.
    Stopped,
    /// The server was asked to leave it to another process, for which all has stayed open.
    Left,
}

/// Why a session ended: the front end's fault, or the host's.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A message that can't be, or that comes at the wrong time.
    #[error("the front end broke the vhost-user protocol")]
    Protocol(#[source] ProtocolError),
    /// Part of a message, and nothing more.
    #[error("the front end stopped within a message, of which {have} bytes have come")]
    Stalled {
        /// Bytes that have come.
        have: usize,
    },
    /// Features that were not offered.
    #[error("the front end took features {taken:#x} of which {extra:#x} were not offered")]
    Features {
        /// What it took.
        taken: u64,
        /// What of that was not offered.
        extra: u64,
    },
    /// A queue that the device doesn't have.
    #[error("the front end set up queue {index}, but there are {queues}; see --request-queues")]
    NoSuchQueue {
        /// Asked for.
        index: u32,
        /// How many there are.
        queues: u16,
    },
    /// A kick without an eventfd asks for polling.
    #[error("queue {0} has no kick eventfd; polling rings is not supported")]
    NoKick(QueueIndex),
    /// Something else than an eventfd, to which a write might wait or do who knows what.
    #[error("what queue {0} was given to be called or kicked by is not an eventfd")]
    NotAnEventfd(QueueIndex),
    /// The memory table can't be.
    #[error("the front end's memory can't be used")]
    Memory(#[from] MemoryError),
    /// The VMM has kept the guest's memory to itself.
    #[error(
        "the VMM has not shared the VM's memory ({regions} regions with {fds} descriptors): {SHARE}"
    )]
    NotShared {
        /// Regions that were told of.
        regions: u32,
        /// Descriptors that came with them.
        fds: usize,
    },
    /// Memory that was handed over is no longer there.
    #[error(
        "the guest's memory at {0:#x} is gone: the file behind it was truncated, or the hardware \
         has lost it"
    )]
    MemoryGone(GuestAddress),
    /// What is in flight can't be kept where the front end wants it.
    #[error("the front end's memory of what is in flight can't be used")]
    Inflight(#[from] InflightError),
    /// It is no longer there.
    #[error("the memory of what is in flight is gone: the file behind it was truncated")]
    InflightGone,
    /// The log that was handed over is no longer there.
    #[error("the dirty log is gone: the file behind it was truncated")]
    LogGone,
    /// There is nothing to notice that with.
    #[error("watching over the guest's memory")]
    Watch(#[source] io::Error),
    /// A ring can't be.
    #[error("the front end's queue can't be used")]
    Queue(#[from] QueueError),
    /// The worker can't take the queue.
    #[error("starting queue {index}")]
    Run {
        /// Which queue.
        index: QueueIndex,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The device is another than it was.
    #[error("the session has {there} queues, and this server {queues}; see --request-queues")]
    OtherDevice {
        /// That the session has.
        there: usize,
        /// That there are.
        queues: u16,
    },
    /// Something that an earlier process should have left.
    #[error("going on with descriptor {fd} of the session")]
    NotLeft {
        /// Its number.
        fd: std::os::fd::RawFd,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The server has no descriptor left for what it must open or be given.
    #[error(
        "the server has no file descriptor left: raise --rlimit-nofile, or the limit that it is \
         started with (ulimit -n)"
    )]
    Descriptors(#[source] io::Error),
    /// The socket can't be used.
    #[error("waiting for messages of the front end")]
    Socket(#[source] io::Error),
}

impl SessionError {
    /// What went wrong with the front end's socket.
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
    /// What outlives this process.
    table: Arc<Table>,
    /// Raised when memory that was handed over is gone.
    pub(super) alarm: Arc<MemoryLostEvent>,
    /// GET_FEATURES has come.
    pub(super) asked: bool,
    pub(super) features: Option<u64>,
    pub(super) protocol: Option<u64>,
    pub(super) regions: Memory,
    pub(super) log: Option<Arc<DirtyLog>>,
    /// Where the front end keeps what is in flight.
    pub(super) inflight: Option<InflightRegion>,
    /// `regions` with the log that is due.
    memory: Arc<Memory>,
    pub(super) vrings: Vec<Vring>,
    transfer: Transfer,
    /// The log has told that the VMM takes a tag that there is not.
    told_of_tag: bool,
}

impl<'a, R: Runner> Session<'a, R> {
    pub(super) fn new(
        device: &'a Device,
        runner: &'a mut R,
        (table, alarm): (&Arc<Table>, &Arc<MemoryLostEvent>),
        stop: BorrowedFd<'_>,
    ) -> Self {
        Self {
            table: Arc::clone(table),
            device,
            runner,
            alarm: Arc::clone(alarm),
            asked: false,
            features: None,
            protocol: None,
            regions: Memory::default(),
            log: None,
            inflight: None,
            memory: Arc::default(),
            vrings: (0..device.queues()).map(|_| Vring::default()).collect(),
            transfer: Transfer::new(stop),
            told_of_tag: false,
        }
    }

    /// A front end that has just connected: what was in flight before the guest's session is none of
    /// its.
    pub(super) fn begin(&self) {
        if self.table.agreement().is_none() {
            forget_in_flight(&self.table);
        }
    }

    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    fn has(&self, feature: u64) -> bool {
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

    /// Changes one queue's description, the queue being stopped meanwhile.
    fn change(&mut self, index: u32, change: impl FnOnce(&mut Vring)) -> Result<(), SessionError> {
        let (index, _) = self.vring(index)?;
        self.stop(index);
        change(&mut self.vrings[usize::from(index.0)]);
        self.settle(index)
    }

    /// Changes what all queues rely on, all being stopped meanwhile.
    pub(super) fn change_all(
        &mut self,
        change: impl FnOnce(&mut Self),
    ) -> Result<(), SessionError> {
        self.stop_all();
        change(self);
        let log = self.has(device::LOG_ALL).then(|| self.log.clone());
        let log = log.flatten();
        self.memory = Arc::new(self.regions.with_log(log));
        for index in 0..self.device.queues() {
            self.settle(QueueIndex(index))?;
        }
        Ok(())
    }

    /// Runs the queue if it is to run and doesn't.
    fn settle(&mut self, index: QueueIndex) -> Result<(), SessionError> {
        let implicit = !self.has(device::PROTOCOL_FEATURES);
        let features = Features {
            event_idx: self.has(device::EVENT_IDX),
            indirect: self.has(device::INDIRECT_DESC),
        };
        let vring = &mut self.vrings[usize::from(index.0)];
        if vring.running {
            return Ok(());
        }
        let Some((addresses, kick)) = vring.ready(implicit) else {
            return Ok(());
        };
        let setup = Setup {
            index,
            size: vring.size,
            features,
            addresses,
            next: vring.base,
        };
        let kept = self.table.queue(index.0);
        let handed = self.inflight.as_ref().and_then(|region| region.part(index));
        let part = handed.or_else(|| kept.clone().map(InflightPart::kept));
        let tracking = part.map(|inflight| Tracking {
            inflight,
            journal: kept.map(Journal::new),
        });
        let call = Arc::clone(&vring.call);
        let queue = Queue::tracked(&setup, &self.memory, call, tracking)?;
        self.runner
            .run(queue, kick)
            .map_err(|source| SessionError::Run { index, source })?;
        vring.running = true;
        log::debug!("queue {index} runs: {} entries, {features:?}", vring.size);
        Ok(())
    }

    fn stop(&mut self, index: QueueIndex) {
        let vring = &mut self.vrings[usize::from(index.0)];
        if vring.running {
            vring.running = false;
            if let Some(next) = self.runner.stop(index) {
                vring.base = next;
            }
            log::debug!("queue {index} stopped at {}", vring.base);
        }
    }

    pub(super) fn stop_all(&mut self) {
        for index in 0..self.device.queues() {
            self.stop(QueueIndex(index));
        }
    }

    pub(super) fn resumed(&mut self) {
        self.runner.resumed();
    }

    fn reset(&mut self) {
        self.stop_all();
        for vring in &mut self.vrings {
            vring.reset();
        }
        // Nothing is in flight any more; the front end hands over another, or this one again.
        self.inflight = None;
        forget_in_flight(&self.table);
        self.runner.reset();
    }
}

/// Nothing is in flight, as far as the table says.
fn forget_in_flight(table: &Arc<Table>) {
    let parts = (0..=u16::MAX).map_while(|index| table.queue(index));
    parts.for_each(|part| InflightPart::kept(part).clear());
}

/// `fd`, if it may be an eventfd. The kernel tells files, pipes, sockets and devices from what
/// has no place in any file system; nothing else of that kind takes a write and lets it wait.
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

type Answer<T> = Result<T, ProtocolError>;

/// What the front end is told by a number, and an operator by the log.
fn refused(error: TransferError) -> ProtocolError {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    log::error!("migration: {text}");
    ProtocolError::ReqHandlerError(io::Error::other(error))
}

/// For requests that belong to features which are not offered.
fn not_offered<T>(what: &'static str) -> Answer<T> {
    Err(ProtocolError::InvalidOperation(what))
}

impl<R: Runner> VhostUserBackendReqHandlerMut for Session<'_, R> {
    fn set_owner(&mut self) -> Answer<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Answer<()> {
        self.stop_all();
        Ok(())
    }

    fn reset_device(&mut self) -> Answer<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Answer<u64> {
        self.asked = true;
        Ok(device::FEATURES)
    }

    fn set_features(&mut self, taken: u64) -> Answer<()> {
        let extra = taken & !device::FEATURES;
        if extra != 0 {
            return Err(SessionError::Features { taken, extra }.into());
        }
        if Some(taken) == self.features {
            return Ok(());
        }
        Ok(self.change_all(|session| session.features = Some(taken))?)
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Answer<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions = table
            .iter()
            .zip(files)
            .map(|(region, file)| {
                Region::map(
                    file,
                    region.mmap_offset,
                    region.guest_phys_addr,
                    region.user_addr,
                    region.memory_size,
                    &self.alarm,
                )
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
    ) -> Answer<Option<VhostUserMemoryRegionBase>> {
        let regions = Region::map(
            file,
            region.mmap_offset,
            region.guest_phys_addr,
            region.user_addr,
            region.memory_size,
            &self.alarm,
        )
        .and_then(|region| self.regions.with_region(region))
        .map_err(SessionError::Memory)?;
        self.change_all(|session| session.regions = regions)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Answer<()> {
        let regions = self
            .regions
            .without_region(region.guest_phys_addr, region.user_addr, region.memory_size)
            .map_err(SessionError::Memory)?;
        Ok(self.change_all(|session| session.regions = regions)?)
    }

    fn get_max_mem_slots(&mut self) -> Answer<u64> {
        Ok(Memory::MOST_REGIONS as u64)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Answer<()> {
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
    ) -> Answer<()> {
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

    fn set_vring_base(&mut self, index: u32, base: u32) -> Answer<()> {
        // A split ring has its index in the low half (vhost-user specification, "A vring
        // state description").
        let base = u16::try_from(base & 0xffff).map_err(|_masked| ProtocolError::InvalidParam)?;
        Ok(self.change(index, |vring| vring.base = base)?)
    }

    fn get_vring_base(&mut self, index: u32) -> Answer<VhostUserVringState> {
        self.change(index, |vring| vring.kick = None)?;
        let (_, vring) = self.vring(index)?;
        Ok(VhostUserVringState::new(index, u32::from(vring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Answer<()> {
        let (queue, _) = self.vring(u32::from(index))?;
        let kick = fd.ok_or(SessionError::NoKick(queue))?;
        let kick = eventfd(queue, kick)?;
        Ok(self.change(u32::from(index), |vring| vring.kick = Some(kick))?)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Answer<()> {
        let (queue, vring) = self.vring(u32::from(index))?;
        let fd = fd.map(|fd| eventfd(queue, fd)).transpose()?;
        vring.call.set(fd.clone());
        vring.call_fd = fd;
        if vring.running {
            // What completed between the two eventfds may have called the old one.
            vring.call.signal();
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Answer<()> {
        let (_, vring) = self.vring(u32::from(index))?;
        vring.err = fd.map(|fd| Arc::new(fd.into()));
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Answer<()> {
        let (_, vring) = self.vring(index)?;
        if vring.enabled == enable {
            return Ok(());
        }
        Ok(self.change(index, |vring| vring.enabled = enable)?)
    }

    fn get_protocol_features(&mut self) -> Answer<VhostUserProtocolFeatures> {
        Ok(PROTOCOL_FEATURES)
    }

    fn set_protocol_features(&mut self, taken: u64) -> Answer<()> {
        let extra = taken & !PROTOCOL_FEATURES.bits();
        if extra != 0 {
            return Err(SessionError::Features { taken, extra }.into());
        }
        self.protocol = Some(taken);
        Ok(())
    }

    fn get_queue_num(&mut self) -> Answer<u64> {
        Ok(u64::from(self.device.queues()))
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Answer<Vec<u8>> {
        if self.device.tag.is_none()
            && offset == 0
            && !std::mem::replace(&mut self.told_of_tag, true)
        {
            log::warn!(
                "the VMM takes the tag, by which the guest mounts, from this server, and there is none: \
                 give --tag NAME, unless the VMM has a setting of its own"
            );
        }
        let space = self.device.config_space();
        let part = usize::try_from(offset)
            .ok()
            .zip(usize::try_from(size).ok())
            .and_then(|(offset, size)| space.get(offset..offset.checked_add(size)?));
        part.map(<[u8]>::to_vec).ok_or(ProtocolError::InvalidParam)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Answer<()> {
        // A guest can cause this and must not end its session by it.
        log::debug!(
            "{} bytes written to the configuration space at {offset}, which is read-only: ignored",
            buf.len()
        );
        Ok(())
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Answer<()> {
        log::debug!("dirty log on descriptor {}", file.as_raw_fd());
        let log = DirtyLog::map(file, log.mmap_offset, log.mmap_size, &self.alarm)
            .map_err(SessionError::Memory)?;
        Ok(self.change_all(|session| session.log = Some(Arc::new(log)))?)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Answer<()> {
        not_offered("a GPU socket for a file system")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Answer<File> {
        not_offered("SHARED_OBJECT was not offered")
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Answer<(VhostUserInflight, File)> {
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        let most = self.device.queues();
        if queues > most {
            let index = u32::from(queues.saturating_sub(1));
            return Err(SessionError::NoSuchQueue {
                index,
                queues: most,
            }
            .into());
        }
        let (file, len) = InflightRegion::create(queues, size).map_err(SessionError::Inflight)?;
        Ok((VhostUserInflight::new(len, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Answer<()> {
        let region = InflightRegion::map(
            file,
            (given.mmap_offset, given.mmap_size),
            (given.num_queues, given.queue_size),
            &self.alarm,
        )
        .map_err(SessionError::Inflight)?;
        let (queues, size) = (given.num_queues, given.queue_size);
        log::debug!("in flight: {queues} queues of {size} entries");
        Ok(self.change_all(|session| session.inflight = Some(region))?)
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        phase: VhostTransferStatePhase,
        fd: File,
    ) -> Answer<Option<File>> {
        let VhostTransferStatePhase::STOPPED = phase;
        let direction = match direction {
            VhostTransferStateDirection::SAVE => Direction::Save,
            VhostTransferStateDirection::LOAD => Direction::Load,
        };
        if self.vrings.iter().any(|vring| vring.running) {
            return Err(refused(TransferError::Running));
        }
        let state = self.runner.device_state();
        self.transfer.begin(direction, fd, state).map_err(refused)?;
        // Its own pipe is good enough.
        Ok(None)
    }

    fn check_device_state(&mut self) -> Answer<()> {
        self.transfer.end().map_err(refused)
    }

    fn get_shmem_config(&mut self) -> Answer<VhostUserShMemConfig> {
        not_offered("SHMEM was not offered")
    }
}
