//! Errors of a request: the file system refuses it, or the server breaks the protocol.

use std::fmt;

use crate::memory::MemoryError;
use crate::ring::RingError;

/// An error number, as the host's kernel counts them.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {self})", self.0)
    }
}

impl PartialEq<i32> for Errno {
    fn eq(&self, other: &i32) -> bool {
        self.0 == *other
    }
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    /// The file system refused.
    #[error("request {opcode} was refused: {errno}")]
    Refused {
        /// The request's number.
        opcode: u32,
        /// The reason.
        errno: Errno,
    },
    /// The chain was returned with nothing written, although it needs a reply.
    #[error("request {opcode} came back empty")]
    Empty {
        /// The request's number.
        opcode: u32,
    },
    /// The reply breaks the protocol.
    #[error("request {opcode} got a wrong reply: {what}")]
    BadReply {
        /// The request's number.
        opcode: u32,
        /// What is wrong.
        what: String,
    },
    /// The server wrote outside of its buffers.
    #[error("request {opcode}: the server wrote outside of the buffers, at {gpa:#x}")]
    Overrun {
        /// The request's number.
        opcode: u32,
        /// The first guard byte that is gone.
        gpa: u64,
    },
    /// A chain came back that no request here waits for.
    #[error("chain with token {0:#x} came back and no request is waiting for it")]
    Stray(u64),
    /// There is no such queue.
    #[error("there is no queue {0}")]
    NoQueue(usize),
    /// The request is not in flight.
    #[error("request {0:#x} is not in flight")]
    NotInFlight(u64),
    /// The ring failed.
    #[error("the request did not come back")]
    Ring(#[from] RingError),
    /// No guest memory for the request's buffers.
    #[error("no buffers for the request")]
    Memory(#[from] MemoryError),
}

impl FuseError {
    /// The file system's error; none if something else failed.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { errno, .. } => Some(errno.0),
            _ => None,
        }
    }
}
