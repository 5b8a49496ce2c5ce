//! A vhost-user message: header, body and descriptors.
//!
//! The payloads are those of `vhost`, which keeps its type of the header and the code that reads a
//! payload to itself; both are here. The invariant: nothing is read from bytes that were not
//! received, and a payload is returned only if `vhost` calls it valid.

use std::os::fd::OwnedFd;

use vhost::vhost_user::Error as ProtocolError;
use vhost::vhost_user::message::{
    FrontendReq, MAX_MSG_SIZE, VhostUserHeaderFlag, VhostUserMsgValidator,
};

/// Bytes, and the descriptors sent with them.
#[derive(Debug, Default)]
pub(super) struct FdMessage {
    pub(super) bytes: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// The header of a message, in the byte order of the machine (vhost-user specification, "Header").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The message's number.
    pub(super) request: u32,
    pub(super) flags: u32,
    /// Bytes of the body.
    pub(super) size: u32,
}

impl Header {
    /// Its length in bytes.
    pub(super) const LEN: usize = 12;

    /// The version of the protocol, in a header's flags.
    pub(super) const VERSION: u32 = 1;

    /// The header of a reply to `request` whose body has `len` bytes.
    pub(super) fn reply(request: u32, len: usize) -> Self {
        Self {
            request,
            flags: Self::VERSION | VhostUserHeaderFlag::REPLY.bits(),
            size: u32::try_from(len).unwrap_or(u32::MAX),
        }
    }

    /// Reads a header from the beginning of `bytes`. `None` if there are too few.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| {
            let word = bytes.get(at..)?.first_chunk()?;
            Some(u32::from_ne_bytes(*word))
        };
        Some(Self {
            request: word(0)?,
            flags: word(4)?,
            size: word(8)?,
        })
    }

    /// Its bytes.
    pub(super) fn bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let words = [self.request, self.flags, self.size];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    pub(super) fn needs_reply(self) -> bool {
        self.has(&VhostUserHeaderFlag::NEED_REPLY)
    }

    pub(super) fn is_reply(self) -> bool {
        self.has(&VhostUserHeaderFlag::REPLY)
    }

    /// Whether its version is the one that there is.
    pub(super) fn has_version(self) -> bool {
        self.flags & VhostUserHeaderFlag::VERSION.bits() == Self::VERSION
    }

    /// The length of the message in bytes. `None` if no message is that long.
    pub(super) fn message_len(self) -> Option<usize> {
        let body = usize::try_from(self.size).ok()?;
        (body <= MAX_MSG_SIZE).then_some(Self::LEN + body)
    }

    fn has(self, flag: &VhostUserHeaderFlag) -> bool {
        self.flags & flag.bits() != 0
    }
}

impl FdMessage {
    /// A reply to `request` with this body.
    pub(super) fn reply(request: FrontendReq, body: &[u8]) -> Self {
        let header = Header::reply(request.into(), body.len());
        Self {
            bytes: [&header.bytes(), body].concat(),
            fds: Vec::new(),
        }
    }

    /// Checks header and length of a message of the front end. Returns its number, header and body.
    pub(super) fn parse(&self) -> Result<(FrontendReq, Header, &[u8]), ProtocolError> {
        let (header, body) = Header::read(&self.bytes)
            .zip(self.bytes.get(Header::LEN..))
            .ok_or(ProtocolError::PartialMessage)?;
        let reserved = header.has(&VhostUserHeaderFlag::RESERVED_BITS);
        let whole = header.message_len() == Some(self.bytes.len());
        if !header.has_version() || header.is_reply() || reserved || !whole {
            return Err(ProtocolError::InvalidMessage);
        }
        let request =
            FrontendReq::try_from(header.request).map_err(|()| ProtocolError::InvalidMessage)?;
        Ok((request, header, body))
    }
}

/// Reads a payload that is all of `bytes`.
pub(super) fn payload<T: VhostUserMsgValidator + Default>(
    bytes: &[u8],
) -> Result<T, ProtocolError> {
    let mut value = T::default();
    if bytes.len() != size_of::<T>() {
        return Err(ProtocolError::InvalidMessage);
    }
    value.as_mut_slice().copy_from_slice(bytes);
    if value.is_valid() {
        Ok(value)
    } else {
        Err(ProtocolError::InvalidMessage)
    }
}

/// Reads a payload at the beginning of `bytes`, and returns what follows it.
pub(super) fn payload_prefix<T: VhostUserMsgValidator + Default>(
    bytes: &[u8],
) -> Result<(T, &[u8]), ProtocolError> {
    let (first, rest) = bytes
        .split_at_checked(size_of::<T>())
        .ok_or(ProtocolError::InvalidMessage)?;
    Ok((payload(first)?, rest))
}

#[cfg(test)]
mod tests {
    use vhost::vhost_user::message::{VhostUserMemory, VhostUserU64, VhostUserVringAddr};

    use super::*;

    fn message(request: u32, flags: u32, size: u32, body: &[u8]) -> FdMessage {
        let header = Header {
            request,
            flags,
            size,
        };
        FdMessage {
            bytes: [&header.bytes(), body].concat(),
            fds: Vec::new(),
        }
    }

    #[test]
    fn valid_message_is_taken_apart() {
        let message = message(8, 9, 8, &[7; 8]);
        let (request, header, body) = message.parse().unwrap();
        assert_eq!(request, FrontendReq::SET_VRING_NUM);
        assert!(header.needs_reply());
        assert_eq!(body, [7; 8]);
    }

    #[test]
    fn invalid_headers_are_refused() {
        for (what, message) in [
            ("no such message", message(45, 1, 0, &[])),
            ("message 0", message(0, 1, 0, &[])),
            ("a reply", message(1, 5, 0, &[])),
            ("version 0", message(1, 0, 0, &[])),
            ("version 3", message(1, 3, 0, &[])),
            ("a reserved bit", message(1, 0x11, 0, &[])),
            ("a short body", message(2, 1, 8, &[0; 7])),
            ("a long body", message(2, 1, 8, &[0; 9])),
            (
                "a size beyond the limit",
                message(2, 1, 0x1001, &[0; 0x1001]),
            ),
        ] {
            assert!(message.parse().is_err(), "{what}");
        }
        let cut = FdMessage {
            bytes: vec![1, 0, 0],
            fds: Vec::new(),
        };
        assert!(matches!(cut.parse(), Err(ProtocolError::PartialMessage)));
    }

    #[test]
    fn payload_has_its_length_and_is_valid() {
        assert_eq!(payload::<VhostUserU64>(&[1; 8]).unwrap().value, !0 / 255);
        assert!(payload::<VhostUserU64>(&[1; 7]).is_err());
        assert!(payload::<VhostUserU64>(&[1; 9]).is_err());
        // An unknown flag, and addresses that are not aligned.
        assert!(payload::<VhostUserVringAddr>(&[1; 40]).is_err());
        let table = [1, 0, 0, 0, 0, 0, 0, 0, 5];
        let (_, rest) = payload_prefix::<VhostUserMemory>(&table).unwrap();
        assert_eq!(rest, [5]);
        assert!(payload_prefix::<VhostUserMemory>(&table[..7]).is_err());
    }
}
