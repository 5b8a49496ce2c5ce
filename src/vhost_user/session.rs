//! One vhost-user session: handles the messages of one front end, from connect to disconnect.
//!
//! See the vhost-user specification, "Back-end implementation"; `handlers` has what each message
//! does. A [`Session`] owns the memory
//! table, the dirty log, the in-flight region and the state of each vring. The invariant: a queue
//! runs exactly if its ring is started, enabled and completely described, and never while one of
//! these changes.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use vhost::vhost_user::Error as ProtocolError;

use super::Runner;
use super::back_channel::{Link, VmmChannel};
use super::vring::Vring;
use crate::device::{self, Device};
use crate::guest_memory::{DirtyLog, GuestAddress, Memory, MemoryError, MemoryLostEvent};
use crate::migration::Transfer;
use crate::state::Table;
use crate::virtqueue::{
    Features, InflightError, InflightPart, InflightRegion, Journal, Queue, QueueError, QueueIndex,
    Setup, Tracking,
};

/// How to make a VMM share its memory.
pub(super) const SHARE_MEMORY_HINT: &str = "start QEMU with `-object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem`, \
     Cloud Hypervisor with `--memory size=SIZE,shared=on`, libvirt with `<memoryBacking><source \
     type='memfd'/><access mode='shared'/></memoryBacking>`";

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
    /// The descriptor of SET_BACKEND_REQ_FD can't be used.
    #[error("the front end's back channel can't be used")]
    BackChannel(#[source] io::Error),
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

impl From<ProtocolError> for SessionError {
    fn from(error: ProtocolError) -> Self {
        Self::Protocol(error)
    }
}

/// The state of a session.
#[derive(Debug)]
pub(super) struct Session<'a, R> {
    pub(super) device: &'a Device,
    pub(super) runner: &'a mut R,
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
    /// Requests to the VMM.
    pub(super) channel: Arc<VmmChannel>,
    /// What they are sent on, if the front end has opened it.
    pub(super) link: Option<Arc<Link>>,
    /// `link` is to be used once it is recorded.
    pub(super) opens_channel: bool,
    pub(super) transfer: Transfer,
    /// Whether the warning that the VMM reads a missing tag was logged.
    pub(super) warned_of_missing_tag: bool,
}

impl<'a, R: Runner> Session<'a, R> {
    pub(super) fn new(
        device: &'a Device,
        runner: &'a mut R,
        (table, memory_lost): (&Arc<Table>, &Arc<MemoryLostEvent>),
        stop: BorrowedFd<'_>,
    ) -> Result<Self, SessionError> {
        let channel = VmmChannel::new(device.dax_fs_map).map_err(SessionError::socket)?;
        let channel = Arc::new(channel);
        runner.connected(Arc::clone(&channel) as _);
        Ok(Self {
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
            channel,
            link: None,
            opens_channel: false,
            transfer: Transfer::new(stop),
            warned_of_missing_tag: false,
        })
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

    pub(super) fn negotiated(&self, feature: u64) -> bool {
        self.features.unwrap_or(0) & feature != 0
    }

    pub(super) fn vring(&mut self, index: u32) -> Result<(QueueIndex, &mut Vring), SessionError> {
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
    pub(super) fn change(
        &mut self,
        index: u32,
        change: impl FnOnce(&mut Vring),
    ) -> Result<(), SessionError> {
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
            let _limit = self.channel.limit_waits();
            if let Some(next) = self.runner.stop(index) {
                vring.base = next;
            }
            log::debug!("queue {index} stopped at available index {}", vring.base);
        }
    }

    pub(super) fn stop_all(&mut self) {
        let channel = Arc::clone(&self.channel);
        let _limit = channel.limit_waits();
        for index in 0..self.device.queues() {
            self.stop(QueueIndex(index));
        }
    }

    pub(super) fn reports(&mut self) -> bool {
        self.runner.reports()
    }

    pub(super) fn heartbeat(&mut self) -> Option<Instant> {
        self.runner.heartbeat()
    }

    /// To be called when a snapshot was saved: uses a back channel that the front end has opened. If
    /// a request were sent on it before, the next process wouldn't know.
    pub(super) fn saved(&mut self) {
        if std::mem::take(&mut self.opens_channel) {
            self.channel.connect(self.link.clone());
            self.runner.channel_opened(false);
        }
    }

    /// Ends the session: nothing can be sent to the VMM any more.
    pub(super) fn end(&mut self) {
        self.channel.connect(None);
    }

    pub(super) fn resumed(&mut self) {
        self.runner.resumed();
    }

    pub(super) fn reset(&mut self) {
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

/// Duplicates a descriptor of a message, which the session keeps.
pub(super) fn duplicate(fd: &OwnedFd) -> Result<OwnedFd, SessionError> {
    fd.try_clone().map_err(SessionError::Descriptors)
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
