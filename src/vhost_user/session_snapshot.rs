//! The snapshot of a vhost-user session, and its encoding as bytes.
//!
//! The encoding consists of little-endian numbers in a fixed order. Descriptors are encoded as
//! numbers, because the process that decodes them has the same descriptors open. The invariant:
//! decoding ends for any input, and a decoded snapshot names each descriptor once. This module
//! doesn't check whether a descriptor is of the expected kind; `restore` does.

use std::os::fd::RawFd;

use crate::guest_memory::Memory;
use crate::virtqueue::RingAddresses;

/// The bytes "RFfr", with which every snapshot begins.
const MAGIC: u32 = 0x7266_4652;

/// Version of the encoding that this program writes.
pub const VERSION: u32 = 2;

/// The oldest version that this program reads. Version 1 has no back channel.
pub(crate) const OLDEST_VERSION: u32 = 1;

/// The most queues that a device can have.
const MAX_VRINGS: usize = 1 + 1024;

/// The most descriptors of one message.
const MAX_FDS: usize = 256;

/// The most bytes of one message.
const MAX_BYTES: usize = 12 + 0x1000;

/// Why bytes can't be decoded as a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// They don't begin as a snapshot does.
    #[error("the data is no snapshot of a session")]
    Magic,
    /// They have another version.
    #[error(
        "the snapshot has version {0}, and this program supports {OLDEST_VERSION} to {VERSION}"
    )]
    Version(u32),
    /// They are too few or too many.
    #[error("the snapshot is damaged: {0} bytes too few or too many")]
    Length(usize),
    /// A count exceeds its limit.
    #[error("the snapshot is damaged: it has {0} {1}")]
    TooMany(usize, &'static str),
    /// A descriptor is invalid, or is named twice.
    #[error("the snapshot is damaged: descriptor {0} is invalid or named twice")]
    Descriptor(RawFd),
    /// A number has no meaning.
    #[error("the snapshot is damaged: there is no {1} {0}")]
    Unknown(u32, &'static str),
}

/// One region of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RegionRecord {
    pub(super) guest: u64,
    pub(super) user: u64,
    pub(super) len: u64,
    pub(super) offset: u64,
    pub(super) fd: RawFd,
}

/// Part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileRecord {
    pub(super) fd: RawFd,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// One queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct VringRecord {
    pub(super) size: u16,
    pub(super) base: u16,
    pub(super) enabled: bool,
    pub(super) addresses: Option<RingAddresses>,
    pub(super) kick: Option<RawFd>,
    pub(super) call: Option<RawFd>,
    pub(super) err: Option<RawFd>,
}

/// The back channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BackChannelRecord {
    pub(super) socket: RawFd,
    /// The memory in which requests and answers are counted.
    pub(super) counters: RawFd,
}

/// The message that was being handled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Pending {
    /// None.
    #[default]
    Nothing,
    /// A message was received and has not been handled.
    Message(Vec<u8>, Vec<RawFd>),
    /// A message was handled, and this is the reply, which may have been sent.
    Reply(Vec<u8>, Vec<RawFd>),
}

/// The state of a session that another process needs to resume it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionSnapshot {
    pub(super) socket: RawFd,
    /// Whether the front end has sent GET_FEATURES, without which nothing is acknowledged.
    pub(super) features_requested: bool,
    pub(super) features: Option<u64>,
    pub(super) protocol: Option<u64>,
    pub(super) regions: Vec<RegionRecord>,
    pub(super) log: Option<FileRecord>,
    /// The front end's in-flight region, with its number of queues and their entries.
    pub(super) inflight: Option<(FileRecord, (u16, u16))>,
    pub(super) back_channel: Option<BackChannelRecord>,
    pub(super) vrings: Vec<VringRecord>,
    pub(super) pending: Pending,
}

/// An encoded snapshot without its end, the pending message.
#[derive(Clone, Debug, Default)]
pub(super) struct EncodedState(Vec<u8>);

/// Flags of a queue.
const ENABLED: u32 = 1;
const ADDRESSES: u32 = 2;
const LOGGED: u32 = 4;

/// Flags of the session.
const FEATURES_REQUESTED: u32 = 1;
const FEATURES: u32 = 2;
const PROTOCOL: u32 = 4;
const LOG: u32 = 8;
const INFLIGHT: u32 = 16;

impl SessionSnapshot {
    /// Encodes the snapshot as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.encode_state().with(&self.pending)
    }

    /// Encodes all but the pending message.
    pub(super) fn encode_state(&self) -> EncodedState {
        let Self {
            socket,
            features_requested,
            features,
            protocol,
            regions,
            log,
            inflight,
            back_channel,
            vrings,
            pending: _,
        } = self;
        let mut to = Writer(Vec::with_capacity(256 + 64 * vrings.len()));
        let mut flags = if *features_requested {
            FEATURES_REQUESTED
        } else {
            0
        };
        flags |= features.map_or(0, |_| FEATURES);
        flags |= protocol.map_or(0, |_| PROTOCOL);
        flags |= log.map_or(0, |_| LOG);
        flags |= inflight.map_or(0, |_| INFLIGHT);
        to.number(MAGIC);
        to.number(VERSION);
        to.fd(Some(*socket));
        to.number(flags);
        to.long(features.unwrap_or(0));
        to.long(protocol.unwrap_or(0));
        to.file(*log);
        to.file(inflight.map(|(file, _)| file));
        let (queues, size) = inflight.map_or((0, 0), |(_, shape)| shape);
        to.number(u32::from(queues));
        to.number(u32::from(size));
        to.fd(back_channel.map(|channel| channel.socket));
        to.fd(back_channel.map(|channel| channel.counters));
        to.count(regions.len());
        for region in regions {
            to.long(region.guest);
            to.long(region.user);
            to.long(region.len);
            to.long(region.offset);
            to.fd(Some(region.fd));
        }
        to.count(vrings.len());
        for vring in vrings {
            vring.encode(&mut to);
        }
        EncodedState(to.0)
    }
}

impl EncodedState {
    /// The whole snapshot.
    pub(super) fn with(&self, pending: &Pending) -> Vec<u8> {
        let (kind, bytes, fds) = match pending {
            Pending::Nothing => (0, &[][..], &[][..]),
            Pending::Message(bytes, fds) => (1, &bytes[..], &fds[..]),
            Pending::Reply(bytes, fds) => (2, &bytes[..], &fds[..]),
        };
        let len = self.0.len() + 12 + 4 * fds.len() + bytes.len();
        let mut to = Writer(Vec::with_capacity(len));
        to.0.extend_from_slice(&self.0);
        to.number(kind);
        to.count(bytes.len());
        to.count(fds.len());
        for fd in fds {
            to.fd(Some(*fd));
        }
        to.0.extend_from_slice(bytes);
        to.0
    }
}

impl SessionSnapshot {
    /// Decodes a snapshot.
    ///
    /// # Errors
    ///
    /// Fails if the bytes are no valid snapshot.
    pub fn decode(bytes: &[u8]) -> Result<Self, SnapshotError> {
        let mut from = Reader(bytes);
        if from.number()? != MAGIC {
            return Err(SnapshotError::Magic);
        }
        let version = from.number()?;
        if !(OLDEST_VERSION..=VERSION).contains(&version) {
            return Err(SnapshotError::Version(version));
        }
        let socket = from.some_fd()?;
        let flags = from.number()?;
        let features = from.long()?;
        let protocol = from.long()?;
        let log = from.file()?;
        let inflight = from.file()?;
        let shape = (from.short("number of queues")?, from.short("queue's size")?);
        let back_channel = if version < 2 {
            None
        } else {
            from.back_channel()?
        };
        let has = |flag| flags & flag != 0;
        let count = from.count(Memory::MAX_REGIONS, "memory regions")?;
        let regions = (0..count).map(|_| {
            Ok(RegionRecord {
                guest: from.long()?,
                user: from.long()?,
                len: from.long()?,
                offset: from.long()?,
                fd: from.some_fd()?,
            })
        });
        let regions = regions.collect::<Result<_, SnapshotError>>()?;
        let count = from.count(MAX_VRINGS, "queues")?;
        let vrings = (0..count).map(|_| VringRecord::decode(&mut from));
        let vrings = vrings.collect::<Result<_, SnapshotError>>()?;
        let kind = from.number()?;
        let len = from.count(MAX_BYTES, "bytes of a message")?;
        let fds = from.count(MAX_FDS, "descriptors of a message")?;
        let fds = (0..fds).map(|_| from.some_fd()).collect::<Result<_, _>>()?;
        let rest = from.0;
        if rest.len() != len {
            return Err(SnapshotError::Length(rest.len().abs_diff(len)));
        }
        let pending = match kind {
            0 => Pending::Nothing,
            1 => Pending::Message(rest.to_vec(), fds),
            2 => Pending::Reply(rest.to_vec(), fds),
            kind => return Err(SnapshotError::Unknown(kind, "state of a message")),
        };
        let snapshot = Self {
            socket,
            features_requested: has(FEATURES_REQUESTED),
            features: has(FEATURES).then_some(features),
            protocol: has(PROTOCOL).then_some(protocol),
            regions,
            log: has(LOG).then_some(log),
            inflight: has(INFLIGHT).then_some((inflight, shape)),
            back_channel,
            vrings,
            pending,
        };
        snapshot.check()?;
        Ok(snapshot)
    }

    /// Returns the numbers of all descriptors of the session.
    #[must_use]
    pub fn descriptors(&self) -> Vec<RawFd> {
        let mut fds = vec![self.socket];
        fds.extend(self.regions.iter().map(|region| region.fd));
        fds.extend(self.log.map(|log| log.fd));
        fds.extend(self.inflight.map(|(file, _)| file.fd));
        let channel = self.back_channel.iter();
        fds.extend(channel.flat_map(|channel| [channel.socket, channel.counters]));
        for vring in &self.vrings {
            fds.extend([vring.kick, vring.call, vring.err].into_iter().flatten());
        }
        if let Pending::Message(_, more) | Pending::Reply(_, more) = &self.pending {
            fds.extend(more);
        }
        fds
    }

    /// Checks that each descriptor is valid and named once.
    fn check(&self) -> Result<(), SnapshotError> {
        let mut fds = self.descriptors();
        fds.sort_unstable();
        if let Some(bad) = fds.iter().find(|fd| **fd <= libc::STDERR_FILENO) {
            return Err(SnapshotError::Descriptor(*bad));
        }
        match fds.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(SnapshotError::Descriptor(pair[0])),
            None => Ok(()),
        }
    }
}

impl VringRecord {
    fn encode(&self, to: &mut Writer) {
        let mut flags = if self.enabled { ENABLED } else { 0 };
        flags |= self.addresses.map_or(0, |_| ADDRESSES);
        let log = self.addresses.and_then(|addresses| addresses.log);
        flags |= log.map_or(0, |_| LOGGED);
        to.number(u32::from(self.size));
        to.number(u32::from(self.base));
        to.number(flags);
        let at = |part: fn(&RingAddresses) -> u64| self.addresses.as_ref().map_or(0, part);
        to.long(at(|addresses| addresses.descriptors));
        to.long(at(|addresses| addresses.available));
        to.long(at(|addresses| addresses.used));
        to.long(log.unwrap_or(0));
        for fd in [self.kick, self.call, self.err] {
            to.fd(fd);
        }
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self, SnapshotError> {
        let size = from.short("queue's size")?;
        let base = from.short("queue's base")?;
        let flags = from.number()?;
        let has = |flag| flags & flag != 0;
        let addresses = RingAddresses {
            descriptors: from.long()?,
            available: from.long()?,
            used: from.long()?,
            log: Some(from.long()?).filter(|_| has(LOGGED)),
        };
        Ok(Self {
            size,
            base,
            enabled: has(ENABLED),
            addresses: has(ADDRESSES).then_some(addresses),
            kick: from.fd()?,
            call: from.fd()?,
            err: from.fd()?,
        })
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn number(&mut self, number: u32) {
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn long(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn count(&mut self, count: usize) {
        self.number(u32::try_from(count).unwrap_or(u32::MAX));
    }

    fn file(&mut self, file: Option<FileRecord>) {
        self.fd(file.map(|file| file.fd));
        self.long(file.map_or(0, |file| file.offset));
        self.long(file.map_or(0, |file| file.len));
    }

    fn fd(&mut self, fd: Option<RawFd>) {
        self.number(fd.unwrap_or(-1).cast_unsigned());
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const LEN: usize>(&mut self) -> Result<[u8; LEN], SnapshotError> {
        match self.0.split_first_chunk() {
            Some((bytes, rest)) => {
                self.0 = rest;
                Ok(*bytes)
            }
            None => Err(SnapshotError::Length(LEN - self.0.len())),
        }
    }

    fn number(&mut self) -> Result<u32, SnapshotError> {
        self.take().map(u32::from_le_bytes)
    }

    fn long(&mut self) -> Result<u64, SnapshotError> {
        self.take().map(u64::from_le_bytes)
    }

    fn short(&mut self, what: &'static str) -> Result<u16, SnapshotError> {
        let number = self.number()?;
        u16::try_from(number).map_err(|_too_large| SnapshotError::Unknown(number, what))
    }

    /// Reads the number of elements that follow, at most `max`.
    fn count(&mut self, max: usize, what: &'static str) -> Result<usize, SnapshotError> {
        let count = usize::try_from(self.number()?).unwrap_or(usize::MAX);
        if count > max {
            return Err(SnapshotError::TooMany(count, what));
        }
        Ok(count)
    }

    fn file(&mut self) -> Result<FileRecord, SnapshotError> {
        Ok(FileRecord {
            fd: self.number()?.cast_signed(),
            offset: self.long()?,
            len: self.long()?,
        })
    }

    fn fd(&mut self) -> Result<Option<RawFd>, SnapshotError> {
        let fd = self.number()?.cast_signed();
        Ok(Some(fd).filter(|fd| *fd != -1))
    }

    fn back_channel(&mut self) -> Result<Option<BackChannelRecord>, SnapshotError> {
        match (self.fd()?, self.fd()?) {
            (Some(socket), Some(counters)) => Ok(Some(BackChannelRecord { socket, counters })),
            (None, None) => Ok(None),
            _ => Err(SnapshotError::Descriptor(-1)),
        }
    }

    fn some_fd(&mut self) -> Result<RawFd, SnapshotError> {
        self.fd()?.ok_or(SnapshotError::Descriptor(-1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> SessionSnapshot {
        let addresses = RingAddresses {
            descriptors: 0x1000,
            available: 0x2000,
            used: 0x3000,
            log: Some(0x3000),
        };
        let vring = VringRecord {
            size: 128,
            base: 0xfffe,
            enabled: true,
            addresses: Some(addresses),
            kick: Some(10),
            call: Some(11),
            err: None,
        };
        let region = RegionRecord {
            guest: 0,
            user: 0x7f00_0000_0000,
            len: 1 << 30,
            offset: 0,
            fd: 7,
        };
        SessionSnapshot {
            socket: 5,
            features_requested: true,
            features: Some(1 << 32),
            protocol: Some(0),
            regions: vec![region],
            log: Some(FileRecord {
                fd: 8,
                offset: 4096,
                len: 1 << 15,
            }),
            inflight: Some((
                FileRecord {
                    fd: 9,
                    offset: 0,
                    len: 1 << 12,
                },
                (2, 128),
            )),
            back_channel: Some(BackChannelRecord {
                socket: 12,
                counters: 13,
            }),
            vrings: vec![vring, VringRecord::default()],
            pending: Pending::Message(b"message".to_vec(), vec![20, 21]),
        }
    }

    #[test]
    fn decode_of_encoded_snapshot_returns_it() {
        let mut snapshot = snapshot();
        assert_eq!(
            SessionSnapshot::decode(&snapshot.encode()),
            Ok(snapshot.clone())
        );
        assert_eq!(snapshot.descriptors(), [5, 7, 8, 9, 12, 13, 10, 11, 20, 21]);
        snapshot.pending = Pending::Reply(vec![1; 20], vec![]);
        snapshot.log = None;
        snapshot.inflight = None;
        snapshot.back_channel = None;
        snapshot.features = None;
        assert_eq!(SessionSnapshot::decode(&snapshot.encode()), Ok(snapshot));
    }

    #[test]
    fn decode_reads_what_the_previous_version_has_written() {
        // Version 1 ends the session's own part before the back channel: after four numbers, two
        // long ones, two files and the shape of the in-flight region.
        const BACK_CHANNEL: usize = 4 * 4 + 2 * 8 + 2 * 20 + 2 * 4;
        let mut bytes = snapshot().encode();
        bytes[4] = 1;
        bytes.drain(BACK_CHANNEL..BACK_CHANNEL + 8);
        let older = SessionSnapshot {
            back_channel: None,
            ..snapshot()
        };
        assert_eq!(SessionSnapshot::decode(&bytes), Ok(older));
    }

    #[test]
    fn decode_of_truncated_or_extended_snapshot_fails() {
        let bytes = snapshot().encode();
        for len in 0..bytes.len() {
            assert!(SessionSnapshot::decode(&bytes[..len]).is_err(), "{len}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(
            SessionSnapshot::decode(&longer),
            Err(SnapshotError::Length(1))
        );
    }

    #[test]
    fn decode_of_damaged_snapshot_fails_or_yields_valid_one() {
        let bytes = snapshot().encode();
        for at in 0..bytes.len() {
            for change in [1, 0x7f, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] ^= change;
                if let Ok(snapshot) = SessionSnapshot::decode(&damaged) {
                    assert!(snapshot.check().is_ok());
                    assert_eq!(SessionSnapshot::decode(&snapshot.encode()), Ok(snapshot));
                }
            }
        }
    }

    #[test]
    fn decode_refuses_other_versions_and_repeated_descriptors() {
        let mut bytes = snapshot().encode();
        bytes[4] = 9;
        assert_eq!(
            SessionSnapshot::decode(&bytes),
            Err(SnapshotError::Version(9))
        );
        bytes[0] = 0;
        assert_eq!(SessionSnapshot::decode(&bytes), Err(SnapshotError::Magic));
        for fd in [7, 2, 0, -5] {
            let mut snapshot = snapshot();
            snapshot.vrings[0].err = Some(fd);
            let refused = SessionSnapshot::decode(&snapshot.encode());
            assert_eq!(refused, Err(SnapshotError::Descriptor(fd)));
        }
    }
}
