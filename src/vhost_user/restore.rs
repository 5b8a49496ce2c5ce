//! Takes a snapshot of a session, and restores a session from one.
//!
//! The invariant: a session is restored completely, with each descriptor checked to be of the kind
//! that the snapshot says, or not at all.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketType, sockopt};

use super::Runner;
use super::back_channel::Link;
use super::session::{Session, SessionError, eventfd};
use super::session_snapshot::{FileRecord, Pending, RegionRecord, SessionSnapshot, VringRecord};
use super::vring::Vring;
use crate::guest_memory::{DirtyLog, Memory, Region, RegionDescription};
use crate::sys;
use crate::virtqueue::{InflightRegion, QueueIndex};

/// Keeps the descriptors open that a snapshot names.
#[derive(Debug, Default)]
pub(super) struct OpenDescriptors {
    _regions: Memory,
    _log: Option<Arc<DirtyLog>>,
    _inflight: Option<InflightRegion>,
    _link: Option<Arc<Link>>,
    _fds: Vec<Arc<OwnedFd>>,
}

impl<R: Runner> Session<'_, R> {
    /// Returns the state of the session, except for the socket and the message being handled.
    pub(super) fn snapshot(&self) -> (SessionSnapshot, OpenDescriptors) {
        let regions = self.regions.regions().iter().filter_map(|region| {
            let (file, offset) = region.file()?;
            let (guest, user, len) = region.addresses();
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
        let link = self.link.clone();
        let snapshot = SessionSnapshot {
            back_channel: link.as_ref().and_then(|link| link.record()),
            features_requested: self.features_requested,
            features: self.features,
            protocol: self.protocol,
            regions: regions.collect(),
            log,
            inflight,
            vrings: self.vrings.iter().map(Vring::snapshot).collect(),
            // The caller sets these.
            socket: RawFd::default(),
            pending: Pending::default(),
        };
        let fds = self.vrings.iter().flat_map(|vring| {
            let fds = [&vring.kick, &vring.call_fd, &vring.err];
            fds.into_iter().flatten().cloned()
        });
        let open = OpenDescriptors {
            _regions: self.regions.clone(),
            _log: self.log.clone(),
            _inflight: self.inflight.clone(),
            _link: link,
            _fds: fds.collect(),
        };
        (snapshot, open)
    }

    /// Restores the session from `snapshot`, and starts its queues.
    pub(super) fn restore(&mut self, snapshot: &SessionSnapshot) -> Result<(), SessionError> {
        let SessionSnapshot {
            // The caller has adopted the socket, and handles the pending message afterwards.
            socket: _,
            pending: _,
            features_requested,
            features,
            protocol,
            regions: region_records,
            log: log_record,
            inflight: inflight_record,
            back_channel,
            vrings: vring_records,
        } = snapshot;
        // Adopt all descriptors before anything can fail, so that none of them leaks.
        let files = region_records.iter().map(|region| adopt(region.fd));
        let files = files.collect::<Result<Vec<_>, _>>()?;
        let log = log_record.map(|log| adopt(log.fd)).transpose()?;
        let inflight = inflight_record
            .map(|(file, _)| adopt(file.fd))
            .transpose()?;
        let link = back_channel.map(|channel| {
            let fds = (adopt(channel.socket), adopt(channel.counters));
            Ok::<_, SessionError>((fds.0?, fds.1?))
        });
        let link = link.transpose()?;
        let mut vrings = Vec::with_capacity(vring_records.len());
        for (index, vring) in (0..).zip(vring_records) {
            vrings.push(Vring::restored(QueueIndex(index), vring)?);
        }
        let link = link.map(|(socket, counters)| Link::resume(socket, counters));
        let link = link.transpose().map_err(SessionError::BackChannel)?;
        let queues = self.device.queues();
        if vrings.len() != usize::from(queues) {
            let recorded = vrings.len();
            return Err(SessionError::OtherDevice { recorded, queues });
        }
        let regions = region_records.iter().zip(files).map(|(region, file)| {
            let RegionRecord {
                guest,
                user,
                len,
                offset,
                ..
            } = *region;
            let description = RegionDescription {
                file: File::from(file),
                offset,
                guest,
                user,
                len,
            };
            Region::map(description, &self.memory_lost)
        });
        let regions = regions.collect::<Result<Vec<_>, _>>()?;
        let regions = Memory::new(regions, None)?;
        let log = log_record.zip(log).map(|(record, file)| {
            DirtyLog::map(
                File::from(file),
                record.offset,
                record.len,
                &self.memory_lost,
            )
        });
        let log = log.transpose()?.map(Arc::new);
        let inflight = inflight_record
            .zip(inflight)
            .map(|((record, shape), file)| {
                let range = (record.offset, record.len);
                InflightRegion::map(File::from(file), range, shape, &self.memory_lost)
            });
        let inflight = inflight.transpose().map_err(SessionError::Inflight)?;
        self.channel.set_protocol_features(protocol.unwrap_or(0));
        self.link = link.map(Arc::new);
        self.channel.connect(self.link.clone());
        if self.link.is_some() {
            self.runner.channel_opened(true);
        }
        self.change_all(|session| {
            session.features_requested = *features_requested;
            session.features = *features;
            session.protocol = *protocol;
            session.regions = regions;
            session.log = log;
            session.inflight = inflight;
            session.vrings = vrings;
        })
    }
}

impl Vring {
    fn snapshot(&self) -> VringRecord {
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
            // The process that ran it has ended.
            running: false,
            ..Self::default()
        };
        vring.call.set(call_fd);
        Ok(vring)
    }
}

/// Adopts the front end's socket.
pub(super) fn socket(snapshot: &SessionSnapshot) -> Result<UnixStream, SessionError> {
    let fd = adopt(snapshot.socket)?;
    let is_socket = sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(&fd) == Ok(SocketType::STREAM);
    if is_socket {
        return Ok(UnixStream::from(fd));
    }
    Err(SessionError::NotInherited {
        fd: snapshot.socket,
        source: io::Error::other("it is not a Unix stream socket"),
    })
}

/// Takes ownership of a descriptor. The snapshot names it once, and the caller of [`super::resume`]
/// guarantees that nothing else in this process owns it.
fn adopt(fd: RawFd) -> Result<OwnedFd, SessionError> {
    sys::inherit::inherited_fd(fd).map_err(|source| SessionError::NotInherited { fd, source })
}

/// Takes ownership of several descriptors, as [`adopt`] does.
pub(super) fn adopt_all(fds: &[RawFd]) -> Result<Vec<OwnedFd>, SessionError> {
    fds.iter().map(|fd| adopt(*fd)).collect()
}
