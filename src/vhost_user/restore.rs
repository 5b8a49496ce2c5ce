//! From a session to its record, and back.
//!
//! The invariant: a session is restored as a whole, each descriptor being what it is said to be, or
//! not at all.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketType, sockopt};

use super::Runner;
use super::session::{Session, SessionError, eventfd};
use super::session_snapshot::{FileRecord, RegionRecord, SessionSnapshot, VringRecord};
use super::vring::Vring;
use crate::sys;
use crate::virtqueue::memory::{DirtyLog, Region};
use crate::virtqueue::{InflightRegion, Memory, QueueIndex};

/// What keeps the descriptors open that a record names.
#[derive(Debug, Default)]
pub(super) struct OpenDescriptors {
    _regions: Memory,
    _log: Option<Arc<DirtyLog>>,
    _inflight: Option<InflightRegion>,
    _fds: Vec<Arc<OwnedFd>>,
}

impl<R: Runner> Session<'_, R> {
    /// All that the session goes by, but the socket and what is under way there.
    pub(super) fn record(&self) -> (SessionSnapshot, OpenDescriptors) {
        let regions = self.regions.regions().iter().filter_map(|region| {
            let (file, offset) = region.file()?;
            let (guest, user, len) = region.place();
            Some(RegionRecord {
                guest,
                user,
                len,
                offset,
                fd: file.as_raw_fd(),
            })
        });
        let log = self.log.as_ref().and_then(|log| {
            let (file, offset, len) = log.file()?;
            let fd = file.as_raw_fd();
            Some(FileRecord { fd, offset, len })
        });
        let inflight = self.inflight.as_ref().and_then(|region| {
            let (file, offset, len) = region.file()?;
            let fd = file.as_raw_fd();
            let file = FileRecord { fd, offset, len };
            Some((file, region.shape()))
        });
        let record = SessionSnapshot {
            asked: self.asked,
            features: self.features,
            protocol: self.protocol,
            regions: regions.collect(),
            log,
            inflight,
            vrings: self.vrings.iter().map(Vring::record).collect(),
            ..SessionSnapshot::default()
        };
        let fds = self.vrings.iter().flat_map(|vring| {
            let fds = [&vring.kick, &vring.call_fd, &vring.err];
            fds.into_iter().flatten().cloned()
        });
        let held = OpenDescriptors {
            _regions: self.regions.clone(),
            _log: self.log.clone(),
            _inflight: self.inflight.clone(),
            _fds: fds.collect(),
        };
        (record, held)
    }

    /// Makes the session what the record says, and runs its queues.
    pub(super) fn restore(&mut self, record: &SessionSnapshot) -> Result<(), SessionError> {
        // All first, so that none of them is left open.
        let files = record.regions.iter().map(|region| adopt(region.fd));
        let files = files.collect::<Result<Vec<_>, _>>()?;
        let log = record.log.map(|log| adopt(log.fd)).transpose()?;
        let inflight = record
            .inflight
            .map(|(file, _)| adopt(file.fd))
            .transpose()?;
        let mut vrings = Vec::with_capacity(record.vrings.len());
        for (index, vring) in (0..).zip(&record.vrings) {
            vrings.push(Vring::restored(QueueIndex(index), vring)?);
        }
        let queues = self.device.queues();
        if vrings.len() != usize::from(queues) {
            let there = vrings.len();
            return Err(SessionError::OtherDevice { there, queues });
        }
        let regions = record.regions.iter().zip(files).map(|(region, file)| {
            let RegionRecord {
                guest,
                user,
                len,
                offset,
                ..
            } = *region;
            Region::map(File::from(file), offset, guest, user, len, &self.alarm)
        });
        let regions = regions.collect::<Result<Vec<_>, _>>()?;
        let regions = Memory::new(regions, None)?;
        let log = record.log.zip(log).map(|(record, file)| {
            DirtyLog::map(File::from(file), record.offset, record.len, &self.alarm)
        });
        let log = log.transpose()?.map(Arc::new);
        let inflight = record
            .inflight
            .zip(inflight)
            .map(|((record, shape), file)| {
                let part = (record.offset, record.len);
                InflightRegion::map(File::from(file), part, shape, &self.alarm)
            });
        let inflight = inflight.transpose().map_err(SessionError::Inflight)?;
        self.change_all(|session| {
            session.asked = record.asked;
            session.features = record.features;
            session.protocol = record.protocol;
            session.regions = regions;
            session.log = log;
            session.inflight = inflight;
            session.vrings = vrings;
        })
    }
}

impl Vring {
    fn record(&self) -> VringRecord {
        let number = |fd: &Option<Arc<OwnedFd>>| fd.as_ref().map(|fd| fd.as_raw_fd());
        VringRecord {
            size: self.size,
            base: self.base,
            enabled: self.enabled,
            addresses: self.addresses,
            kick: number(&self.kick),
            call: number(&self.call_fd),
            err: number(&self.err),
        }
    }

    fn restored(index: QueueIndex, record: &VringRecord) -> Result<Self, SessionError> {
        let event = |fd: Option<RawFd>| fd.map(|fd| eventfd(index, adopt(fd)?)).transpose();
        let call_fd = event(record.call)?;
        let vring = Self {
            size: record.size,
            addresses: record.addresses,
            base: record.base,
            kick: event(record.kick)?,
            call_fd: call_fd.clone(),
            err: record.err.map(adopt).transpose()?.map(Arc::new),
            enabled: record.enabled,
            // Nobody runs it any more.
            running: false,
            ..Self::default()
        };
        vring.call.set(call_fd);
        Ok(vring)
    }
}

/// The front end's socket.
pub(super) fn socket(record: &SessionSnapshot) -> Result<UnixStream, SessionError> {
    let fd = adopt(record.socket)?;
    let is_socket = sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(&fd) == Ok(SocketType::STREAM);
    if is_socket {
        return Ok(UnixStream::from(fd));
    }
    Err(SessionError::NotLeft {
        fd: record.socket,
        source: io::Error::other("it is no unix stream socket"),
    })
}

/// The messages by which front end and `vhost` came to agree.
pub(super) fn agreement(record: &SessionSnapshot) -> Vec<Vec<u8>> {
    const GET_FEATURES: u32 = 1;
    const SET_FEATURES: u32 = 2;
    const SET_PROTOCOL_FEATURES: u32 = 16;
    const VERSION: u32 = 1;
    let message = |request: u32, value: Option<u64>| {
        let body = value.map(u64::to_ne_bytes);
        let size = body.map_or(0, |_| 8_u32);
        let head = [request, VERSION, size].map(u32::to_ne_bytes).concat();
        [&head[..], body.as_ref().map_or(&[], <[u8; 8]>::as_slice)].concat()
    };
    let asked = record.asked.then(|| message(GET_FEATURES, None));
    let taken = record
        .features
        .map(|_| message(SET_FEATURES, record.features));
    let protocol = record
        .protocol
        .map(|_| message(SET_PROTOCOL_FEATURES, record.protocol));
    [asked, taken, protocol].into_iter().flatten().collect()
}

/// Takes a descriptor over. The record names it once, and by [`super::resume`]'s promise nobody else
/// here owns it.
fn adopt(fd: RawFd) -> Result<OwnedFd, SessionError> {
    sys::inherit::inherited_fd(fd).map_err(|source| SessionError::NotLeft { fd, source })
}

/// As [`adopt`], all of them.
pub(super) fn adopt_all(fds: &[RawFd]) -> Result<Vec<OwnedFd>, SessionError> {
    fds.iter().map(|fd| adopt(*fd)).collect()
}
