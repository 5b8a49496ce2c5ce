//! Checks a message of the front end, handles it, and makes its reply.
//!
//! `vhost`'s own dispatcher reads from a socket and keeps to itself what was negotiated, so it can
//! neither be given a message that was recorded nor be restored. This one accepts nothing that
//! `vhost`'s refuses. The invariant: a session changes only after a message was found valid: its
//! header, the number of its descriptors, the feature that it belongs to, and its payload.

use std::os::fd::OwnedFd;

use vhost::vhost_user::Error as ProtocolError;
use vhost::vhost_user::message::{
    FrontendReq as Request, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfig,
    VhostUserConfigFlags, VhostUserInflight, VhostUserLog, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserProtocolFeatures as Feature, VhostUserSingleMemoryRegion,
    VhostUserTransferDeviceState, VhostUserU64, VhostUserVringAddr, VhostUserVringState,
};
use vm_memory::ByteValued;

use super::Runner;
use super::message::{FdMessage, payload, payload_prefix};
use super::session::{Session, SessionError, duplicate};
use crate::device;

/// Bit of SET_VRING_KICK, CALL and ERR: no descriptor is sent. Bit of the reply to
/// SET_DEVICE_STATE_FD: likewise.
const NO_FD: u64 = 1 << 8;

/// A reply of SET_DEVICE_STATE_FD or CHECK_DEVICE_STATE: it failed.
const FAILED: u64 = 1;

/// What a message leads to.
#[derive(Debug)]
pub(super) struct Handled {
    /// The reply, if there is one.
    pub(super) reply: Option<FdMessage>,
    /// An error ends the session, after the reply was sent.
    pub(super) outcome: Result<(), SessionError>,
}

/// The answer to a valid message.
enum Answer {
    /// An acknowledgement, if the front end has asked for one.
    Done,
    /// This body.
    Body(Vec<u8>),
    /// This body, with a descriptor.
    WithFd(Vec<u8>, OwnedFd),
}

/// Why a message has no such answer.
enum Failure {
    /// It is invalid. There is no reply.
    Invalid(ProtocolError),
    /// It can't be done. The front end learns this if it has asked for an acknowledgement.
    Refused(SessionError),
}

impl From<ProtocolError> for Failure {
    fn from(error: ProtocolError) -> Self {
        Self::Invalid(error)
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        Self::Refused(error)
    }
}

impl<R: Runner> Session<'_, R> {
    /// Handles a message. Its descriptors stay with the caller: what the session keeps are
    /// duplicates.
    pub(super) fn handle(&mut self, message: &FdMessage) -> Handled {
        let (request, header, body) = match message.parse() {
            Ok(parsed) => parsed,
            Err(error) => return Handled::without_reply(error.into()),
        };
        let answer = check_fds(request, &message.fds)
            .map_err(Failure::from)
            .and_then(|()| self.answer(request, body, &message.fds));
        let acknowledge = |session: &Self, code: u64| {
            let wanted = header.needs_reply() && session.acknowledges() && !has_reply(request);
            let body = VhostUserU64::new(code);
            wanted.then(|| FdMessage::reply(request, body.as_slice()))
        };
        match answer {
            Ok(Answer::Done) => Handled {
                reply: acknowledge(self, 0),
                outcome: Ok(()),
            },
            Ok(Answer::Body(body)) => Handled {
                reply: Some(FdMessage::reply(request, &body)),
                outcome: Ok(()),
            },
            Ok(Answer::WithFd(body, fd)) => Handled {
                reply: Some(FdMessage {
                    fds: vec![fd],
                    ..FdMessage::reply(request, &body)
                }),
                outcome: Ok(()),
            },
            Err(Failure::Invalid(error)) => Handled::without_reply(error.into()),
            Err(Failure::Refused(error)) => Handled {
                reply: acknowledge(self, 1),
                outcome: Err(error),
            },
        }
    }

    /// Whether the front end may ask for acknowledgements.
    fn acknowledges(&self) -> bool {
        // GET_FEATURES has offered protocol features.
        self.features_requested && self.agreed(Feature::REPLY_ACK)
    }

    /// Whether the front end has accepted a protocol feature.
    pub(super) fn agreed(&self, feature: Feature) -> bool {
        self.protocol.unwrap_or(0) & feature.bits() != 0
    }

    fn require(&self, feature: Feature) -> Result<(), ProtocolError> {
        if self.agreed(feature) {
            Ok(())
        } else {
            Err(ProtocolError::InactiveOperation(feature))
        }
    }

    fn answer(
        &mut self,
        request: Request,
        body: &[u8],
        fds: &[OwnedFd],
    ) -> Result<Answer, Failure> {
        match request {
            Request::SET_OWNER => empty(body)?,
            Request::RESET_OWNER => {
                empty(body)?;
                self.stop_all();
            }
            Request::RESET_DEVICE => {
                self.require(Feature::RESET_DEVICE)?;
                empty(body)?;
                self.reset();
            }
            Request::GET_FEATURES => {
                empty(body)?;
                self.features_requested = true;
                return Ok(number(device::FEATURES));
            }
            Request::SET_FEATURES => self.set_features(payload::<VhostUserU64>(body)?.value)?,
            Request::GET_PROTOCOL_FEATURES => {
                empty(body)?;
                return Ok(number(self.protocol_features().bits()));
            }
            Request::SET_PROTOCOL_FEATURES => {
                self.set_protocol_features(payload::<VhostUserU64>(body)?.value)?;
            }
            Request::GET_QUEUE_NUM => {
                self.require(Feature::MQ)?;
                empty(body)?;
                return Ok(number(self.device.queues().into()));
            }
            Request::SET_MEM_TABLE => {
                // Sent with an acknowledgement by those that support one.
                let table = memory_table(body, fds).map_err(SessionError::Protocol)?;
                self.set_mem_table(&table, fds)?;
            }
            Request::GET_MAX_MEM_SLOTS => {
                self.require(Feature::CONFIGURE_MEM_SLOTS)?;
                empty(body)?;
                return Ok(number(super::handlers::MAX_MEM_SLOTS));
            }
            Request::ADD_MEM_REG => {
                self.require(Feature::CONFIGURE_MEM_SLOTS)?;
                let fd = one(fds).ok_or(ProtocolError::InvalidParam)?;
                let region: VhostUserSingleMemoryRegion = payload(body)?;
                self.add_mem_region(&region, fd)?;
            }
            Request::REM_MEM_REG => {
                // Some front ends send a descriptor, which the specification doesn't use.
                self.require(Feature::CONFIGURE_MEM_SLOTS)?;
                let region: VhostUserSingleMemoryRegion = payload(body)?;
                self.remove_mem_region(&region)?;
            }
            Request::SET_BACKEND_REQ_FD => {
                self.require(Feature::BACKEND_REQ)?;
                empty(body)?;
                let fd = one(fds).ok_or(ProtocolError::InvalidMessage)?;
                self.set_backend_req_fd(fd)?;
            }
            Request::SET_LOG_BASE => {
                self.require(Feature::LOG_SHMFD)?;
                let fd = one(fds).ok_or(ProtocolError::IncorrectFds)?;
                let log: VhostUserLog = payload(body)?;
                self.set_log_base(&log, fd)?;
                return Ok(Answer::Body(log.as_slice().to_vec()));
            }
            Request::GET_INFLIGHT_FD => {
                self.require(Feature::INFLIGHT_SHMFD)?;
                let wanted: VhostUserInflight = payload(body)?;
                let (region, fd) = self.get_inflight_fd(&wanted)?;
                return Ok(Answer::WithFd(region.as_slice().to_vec(), fd));
            }
            Request::SET_INFLIGHT_FD => {
                self.require(Feature::INFLIGHT_SHMFD)?;
                let fd = one(fds).ok_or(ProtocolError::IncorrectFds)?;
                let given: VhostUserInflight = payload(body)?;
                self.set_inflight_fd(&given, fd)?;
            }
            Request::GET_CONFIG => {
                self.require(Feature::CONFIG)?;
                let (asked, flags, _) = config(body)?;
                return Ok(Answer::Body(self.config_reply(&asked, flags)));
            }
            Request::SET_CONFIG => {
                self.require(Feature::CONFIG)?;
                let (asked, _, bytes) = config(body).map_err(SessionError::Protocol)?;
                self.set_config(asked.offset, bytes);
            }
            Request::SET_DEVICE_STATE_FD => {
                let fd = one(fds).ok_or(ProtocolError::IncorrectFds)?;
                let (direction, phase) = device_state(body)?;
                let VhostTransferStatePhase::STOPPED = phase;
                let fd = duplicate(fd)?.into();
                // The transfer uses the front end's descriptor, so the reply carries none.
                return Ok(number(match self.start_transfer(direction, fd) {
                    Ok(()) => NO_FD,
                    Err(_logged) => NO_FD | FAILED,
                }));
            }
            Request::CHECK_DEVICE_STATE => {
                empty(body)?;
                return Ok(number(match self.finish_transfer() {
                    Ok(()) => 0,
                    Err(_logged) => FAILED,
                }));
            }
            request => return self.answer_vring(request, body, fds),
        }
        Ok(Answer::Done)
    }

    /// Answers a message about one ring.
    fn answer_vring(
        &mut self,
        request: Request,
        body: &[u8],
        fds: &[OwnedFd],
    ) -> Result<Answer, Failure> {
        match request {
            Request::SET_VRING_NUM => {
                let state: VhostUserVringState = payload(body)?;
                self.set_vring_num(state.index, state.num)?;
            }
            Request::SET_VRING_ADDR => {
                self.set_vring_addr(&payload::<VhostUserVringAddr>(body)?)?;
            }
            Request::SET_VRING_BASE => {
                let state: VhostUserVringState = payload(body)?;
                self.set_vring_base(state.index, state.num)?;
            }
            Request::GET_VRING_BASE => {
                let state: VhostUserVringState = payload(body)?;
                let reply = self.get_vring_base(state.index)?;
                return Ok(Answer::Body(reply.as_slice().to_vec()));
            }
            Request::SET_VRING_KICK => {
                let (index, fd) = vring_fd(body, fds)?;
                self.set_vring_kick(index, fd)?;
            }
            Request::SET_VRING_CALL => {
                let (index, fd) = vring_fd(body, fds)?;
                self.set_vring_call(index, fd)?;
            }
            Request::SET_VRING_ERR => {
                let (index, fd) = vring_fd(body, fds)?;
                self.set_vring_err(index, fd)?;
            }
            Request::SET_VRING_ENABLE => {
                let state: VhostUserVringState = payload(body)?;
                if !self.negotiated(device::PROTOCOL_FEATURES) {
                    let feature = vhost::vhost_user::VhostUserVirtioFeatures::PROTOCOL_FEATURES;
                    return Err(ProtocolError::InactiveFeature(feature).into());
                }
                let enable = match state.num {
                    0 => false,
                    1 => true,
                    _ => return Err(ProtocolError::InvalidParam.into()),
                };
                self.set_vring_enable(state.index, enable)?;
            }
            // Not offered, or not for a file system.
            _ => return Err(ProtocolError::InvalidMessage.into()),
        }
        Ok(Answer::Done)
    }

    /// The body of the reply to GET_CONFIG: without bytes if there are none at that offset.
    fn config_reply(&mut self, asked: &VhostUserConfig, flags: VhostUserConfigFlags) -> Vec<u8> {
        let bytes = self.get_config(asked.offset, asked.size);
        let size = if bytes.is_some() { asked.size } else { 0 };
        let head = VhostUserConfig::new(asked.offset, size, flags);
        [head.as_slice(), &bytes.unwrap_or_default()].concat()
    }
}

impl Handled {
    fn without_reply(error: SessionError) -> Self {
        Self {
            reply: None,
            outcome: Err(error),
        }
    }
}

/// Whether a message has a reply of its own, also if the front end hasn't asked for one. It isn't
/// acknowledged.
fn has_reply(request: Request) -> bool {
    matches!(
        request,
        Request::GET_FEATURES
            | Request::GET_PROTOCOL_FEATURES
            | Request::GET_QUEUE_NUM
            | Request::GET_MAX_MEM_SLOTS
            | Request::GET_VRING_BASE
            | Request::GET_CONFIG
            | Request::GET_INFLIGHT_FD
            | Request::SET_LOG_BASE
            | Request::SET_DEVICE_STATE_FD
            | Request::CHECK_DEVICE_STATE
    )
}

/// Refuses descriptors of a message that may have none.
fn check_fds(request: Request, fds: &[OwnedFd]) -> Result<(), ProtocolError> {
    match request {
        Request::SET_MEM_TABLE
        | Request::SET_LOG_BASE
        | Request::SET_VRING_KICK
        | Request::SET_VRING_CALL
        | Request::SET_VRING_ERR
        | Request::SET_BACKEND_REQ_FD
        | Request::SET_INFLIGHT_FD
        | Request::ADD_MEM_REG
        | Request::REM_MEM_REG
        | Request::SET_DEVICE_STATE_FD => Ok(()),
        _ if fds.is_empty() => Ok(()),
        _ => Err(ProtocolError::InvalidMessage),
    }
}

/// The only descriptor, if there is exactly one.
fn one(fds: &[OwnedFd]) -> Option<&OwnedFd> {
    match fds {
        [fd] => Some(fd),
        _ => None,
    }
}

fn empty(body: &[u8]) -> Result<(), ProtocolError> {
    if body.is_empty() {
        Ok(())
    } else {
        Err(ProtocolError::InvalidMessage)
    }
}

fn number(value: u64) -> Answer {
    Answer::Body(VhostUserU64::new(value).as_slice().to_vec())
}

/// The regions of SET_MEM_TABLE, each of which has a descriptor.
fn memory_table(body: &[u8], fds: &[OwnedFd]) -> Result<Vec<VhostUserMemoryRegion>, ProtocolError> {
    const REGION: usize = size_of::<VhostUserMemoryRegion>();
    let (table, regions) = payload_prefix::<VhostUserMemory>(body)?;
    let count = usize::try_from(table.num_regions).unwrap_or(usize::MAX);
    if count.checked_mul(REGION) != Some(regions.len()) || fds.len() != count {
        return Err(ProtocolError::InvalidMessage);
    }
    regions.chunks_exact(REGION).map(payload).collect()
}

/// Offset, size and flags of GET_CONFIG or SET_CONFIG, and the bytes that follow.
fn config(body: &[u8]) -> Result<(VhostUserConfig, VhostUserConfigFlags, &[u8]), ProtocolError> {
    let (asked, bytes) = payload_prefix::<VhostUserConfig>(body)?;
    let size = usize::try_from(asked.size).unwrap_or(usize::MAX);
    match VhostUserConfigFlags::from_bits(asked.flags) {
        Some(flags) if bytes.len() == size => Ok((asked, flags, bytes)),
        _ => Err(ProtocolError::InvalidMessage),
    }
}

/// The ring of SET_VRING_KICK, CALL or ERR, and its descriptor, if the message says that it has
/// one.
fn vring_fd<'a>(
    body: &[u8],
    fds: &'a [OwnedFd],
) -> Result<(u8, Option<&'a OwnedFd>), ProtocolError> {
    let value = payload::<VhostUserU64>(body)?.value;
    let [index, ..] = value.to_le_bytes();
    match fds {
        [] if value & NO_FD != 0 => Ok((index, None)),
        [fd] if value & NO_FD == 0 => Ok((index, Some(fd))),
        _ => Err(ProtocolError::InvalidMessage),
    }
}

fn device_state(
    body: &[u8],
) -> Result<(VhostTransferStateDirection, VhostTransferStatePhase), ProtocolError> {
    let asked: VhostUserTransferDeviceState = payload(body)?;
    let direction = VhostTransferStateDirection::try_from(asked.direction);
    let phase = VhostTransferStatePhase::try_from(asked.phase);
    direction
        .ok()
        .zip(phase.ok())
        .ok_or(ProtocolError::InvalidMessage)
}
