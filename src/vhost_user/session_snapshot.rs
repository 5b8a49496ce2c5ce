//! What a front end has said, as bytes.
//!
//! Plain numbers, little-endian, in a fixed order; descriptors by number, as the process that reads
//! has them open too. The invariant: whatever the bytes are, decoding ends, and what it answers
//! names each descriptor once. Whether a number is what it is said to be is for others to see.

use std::os::fd::RawFd;

use crate::virtqueue::{Memory, RingAddresses};

/// "RFfr": a session of the front.
const MAGIC: u32 = 0x7266_4652;

/// Of this form. A process refuses any that it doesn't know.
pub const VERSION: u32 = 1;

/// As many queues as there can be.
const MOST_VRINGS: usize = 1 + 1024;

/// As many descriptors as come with one message.
const MOST_FDS: usize = 256;

/// As long as a message is.
const MOST_BYTES: usize = 12 + 0x1000;

/// Why bytes are no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// They are something else.
    #[error("it is no session's record")]
    Magic,
    /// They are of another time.
    #[error("it has version {0}, and this program knows {VERSION}")]
    Version(u32),
    /// They end too early, or too late.
    #[error("it is damaged: {0} bytes too few or too many")]
    Length(usize),
    /// More of something than there can be.
    #[error("it is damaged: it has {0} {1}")]
    TooMany(usize, &'static str),
    /// A descriptor that can't be, or that stands there twice.
    #[error("it is damaged: descriptor {0} can't be there, or is there twice")]
    Descriptor(RawFd),
    /// Something that is neither.
    #[error("it is damaged: there is no {1} {0}")]
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

/// What was under way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Pending {
    /// Nothing.
    #[default]
    Nothing,
    /// A message that has come, and has not been dealt with.
    Message(Vec<u8>, Vec<RawFd>),
    /// A message has been dealt with, and this is the answer, which may have been sent.
    Reply(Vec<u8>, Vec<RawFd>),
}

/// All that a session goes by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionSnapshot {
    pub(super) socket: RawFd,
    /// The front end has asked what is offered: `vhost` acknowledges only then.
    pub(super) asked: bool,
    pub(super) features: Option<u64>,
    pub(super) protocol: Option<u64>,
    pub(super) regions: Vec<RegionRecord>,
    pub(super) log: Option<FileRecord>,
    /// Where the front end keeps what is in flight: for so many queues, of so many entries.
    pub(super) inflight: Option<(FileRecord, (u16, u16))>,
    pub(super) vrings: Vec<VringRecord>,
    pub(super) pending: Pending,
}

/// Bits of a queue's flags.
const ENABLED: u32 = 1;
const ADDRESSES: u32 = 2;
const LOGGED: u32 = 4;

/// Bits of the session's flags.
const ASKED: u32 = 1;
const FEATURES: u32 = 2;
const PROTOCOL: u32 = 4;
const LOG: u32 = 8;
const INFLIGHT: u32 = 16;

impl SessionSnapshot {
    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut to = Writer(Vec::with_capacity(256 + 64 * self.vrings.len()));
        let mut flags = if self.asked { ASKED } else { 0 };
        flags |= self.features.map_or(0, |_| FEATURES);
        flags |= self.protocol.map_or(0, |_| PROTOCOL);
        flags |= self.log.map_or(0, |_| LOG);
        flags |= self.inflight.map_or(0, |_| INFLIGHT);
        to.number(MAGIC);
        to.number(VERSION);
        to.fd(Some(self.socket));
        to.number(flags);
        to.long(self.features.unwrap_or(0));
        to.long(self.protocol.unwrap_or(0));
        to.file(self.log);
        to.file(self.inflight.map(|(file, _)| file));
        let (queues, size) = self.inflight.map_or((0, 0), |(_, shape)| shape);
        to.number(u32::from(queues));
        to.number(u32::from(size));
        to.count(self.regions.len());
        for region in &self.regions {
            to.long(region.guest);
            to.long(region.user);
            to.long(region.len);
            to.long(region.offset);
            to.fd(Some(region.fd));
        }
        to.count(self.vrings.len());
        for vring in &self.vrings {
            vring.encode(&mut to);
        }
        let (kind, bytes, fds) = match &self.pending {
            Pending::Nothing => (0, &[][..], &[][..]),
            Pending::Message(bytes, fds) => (1, &bytes[..], &fds[..]),
            Pending::Reply(bytes, fds) => (2, &bytes[..], &fds[..]),
        };
        to.number(kind);
        to.count(bytes.len());
        to.count(fds.len());
        for fd in fds {
            to.fd(Some(*fd));
        }
        to.0.extend_from_slice(bytes);
        to.0
    }

    /// The record that the bytes are.
    ///
    /// # Errors
    ///
    /// They are none.
    pub fn decode(bytes: &[u8]) -> Result<Self, SnapshotError> {
        let mut from = Reader(bytes);
        if from.number()? != MAGIC {
            return Err(SnapshotError::Magic);
        }
        let version = from.number()?;
        if version != VERSION {
            return Err(SnapshotError::Version(version));
        }
        let socket = from.some_fd()?;
        let flags = from.number()?;
        let features = from.long()?;
        let protocol = from.long()?;
        let log = from.file()?;
        let inflight = from.file()?;
        let shape = (from.short("number of queues")?, from.short("queue's size")?);
        let has = |flag| flags & flag != 0;
        let count = from.count(Memory::MOST_REGIONS, "memory regions")?;
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
        let count = from.count(MOST_VRINGS, "queues")?;
        let vrings = (0..count).map(|_| VringRecord::decode(&mut from));
        let vrings = vrings.collect::<Result<_, SnapshotError>>()?;
        let kind = from.number()?;
        let len = from.count(MOST_BYTES, "bytes of a message")?;
        let fds = from.count(MOST_FDS, "descriptors of a message")?;
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
        let record = Self {
            socket,
            asked: has(ASKED),
            features: has(FEATURES).then_some(features),
            protocol: has(PROTOCOL).then_some(protocol),
            regions,
            log: has(LOG).then_some(log),
            inflight: has(INFLIGHT).then_some((inflight, shape)),
            vrings,
            pending,
        };
        record.check()?;
        Ok(record)
    }

    /// The numbers of all descriptors that belong to the session.
    #[must_use]
    pub fn descriptors(&self) -> Vec<RawFd> {
        let mut fds = vec![self.socket];
        fds.extend(self.regions.iter().map(|region| region.fd));
        fds.extend(self.log.map(|log| log.fd));
        fds.extend(self.inflight.map(|(file, _)| file.fd));
        for vring in &self.vrings {
            fds.extend([vring.kick, vring.call, vring.err].into_iter().flatten());
        }
        if let Pending::Message(_, more) | Pending::Reply(_, more) = &self.pending {
            fds.extend(more);
        }
        fds
    }

    /// Each descriptor has one owner.
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

    /// How many follow, of what takes at least a byte each.
    fn count(&mut self, most: usize, what: &'static str) -> Result<usize, SnapshotError> {
        let count = usize::try_from(self.number()?).unwrap_or(usize::MAX);
        if count > most {
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

    fn some_fd(&mut self) -> Result<RawFd, SnapshotError> {
        self.fd()?.ok_or(SnapshotError::Descriptor(-1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> SessionSnapshot {
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
            asked: true,
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
            vrings: vec![vring, VringRecord::default()],
            pending: Pending::Message(b"message".to_vec(), vec![20, 21]),
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let mut record = record();
        assert_eq!(
            SessionSnapshot::decode(&record.encode()),
            Ok(record.clone())
        );
        assert_eq!(record.descriptors(), [5, 7, 8, 9, 10, 11, 20, 21]);
        record.pending = Pending::Reply(vec![1; 20], vec![]);
        record.log = None;
        record.inflight = None;
        record.features = None;
        assert_eq!(SessionSnapshot::decode(&record.encode()), Ok(record));
    }

    #[test]
    fn a_record_that_was_cut_or_has_grown_is_refused() {
        let bytes = record().encode();
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
    fn no_damage_does_harm() {
        let bytes = record().encode();
        for at in 0..bytes.len() {
            for change in [1, 0x7f, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] ^= change;
                if let Ok(record) = SessionSnapshot::decode(&damaged) {
                    assert!(record.check().is_ok());
                    assert_eq!(SessionSnapshot::decode(&record.encode()), Ok(record));
                }
            }
        }
    }

    #[test]
    fn other_versions_and_shared_descriptors_are_refused() {
        let mut bytes = record().encode();
        bytes[4] = 9;
        assert_eq!(
            SessionSnapshot::decode(&bytes),
            Err(SnapshotError::Version(9))
        );
        bytes[0] = 0;
        assert_eq!(SessionSnapshot::decode(&bytes), Err(SnapshotError::Magic));
        for fd in [7, 2, 0, -5] {
            let mut record = record();
            record.vrings[0].err = Some(fd);
            let refused = SessionSnapshot::decode(&record.encode());
            assert_eq!(refused, Err(SnapshotError::Descriptor(fd)));
        }
    }
}
