//! The faults of a malformed request.

use rustix::io::Errno;
use thiserror::Error;

use crate::fuse::abi::Opcode;

/// A request that can't be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("request {} with opcode {}", known(*unique), known(opcode.map(u64::from)))]
pub struct DecodeError {
    /// The request's number, if that many bytes were there.
    pub unique: Option<u64>,
    /// The opcode, if the header was complete.
    pub opcode: Option<u32>,
    /// The fault.
    #[source]
    pub fault: Fault,
}

impl DecodeError {
    /// The errno for the guest.
    #[must_use]
    pub fn errno(&self) -> Errno {
        self.fault.errno()
    }

    /// Whether the guest expects no reply, not even an error.
    #[must_use]
    pub fn has_no_reply(&self) -> bool {
        self.opcode
            .and_then(Opcode::from_number)
            .is_some_and(Opcode::has_no_reply)
    }
}

fn known(number: Option<u64>) -> String {
    number.map_or_else(|| "unknown".to_owned(), |number| number.to_string())
}

/// What is wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Fault {
    /// The header is truncated.
    #[error("the header has only {0} bytes")]
    Header(usize),
    /// The header's length is wrong.
    #[error("the header says that the request has {0} bytes")]
    Length(u32),
    /// The arguments are truncated.
    #[error("the arguments are truncated")]
    Truncated,
    /// The extensions are longer than the request.
    #[error("the extensions are longer than the request")]
    Extensions,
    /// A name is not terminated.
    #[error("a name has no NUL")]
    Unterminated,
    /// A name is empty, `.` or `..`, or has a slash in it.
    #[error("a name is empty, `.` or `..`, or contains a slash")]
    Name,
    /// A name is longer than any directory takes.
    #[error("a name is too long")]
    NameLength,
    /// The name of an extended attribute is empty or too long.
    #[error("the name of an extended attribute is empty or too long")]
    XattrName,
    /// The value of an extended attribute is longer than any can be.
    #[error("the value of an extended attribute is too long")]
    XattrValue,
    /// The target of a symbolic link is empty.
    #[error("the target of a symbolic link is empty")]
    EmptyTarget,
    /// Node 0, which doesn't exist.
    #[error("the node is 0")]
    Node,
    /// A user or group id that means "none".
    #[error("the user or group id is invalid")]
    Id,
    /// Part of the request or of the space for its reply is in memory that isn't the guest's RAM.
    #[error("a buffer is not in guest memory")]
    Inaccessible,
    /// A value that is invalid for its field.
    #[error("the value of {0} is invalid")]
    Value(&'static str),
}

impl Fault {
    /// The errno for the guest.
    #[must_use]
    pub fn errno(self) -> Errno {
        match self {
            Self::NameLength => Errno::NAMETOOLONG,
            Self::XattrName => Errno::RANGE,
            Self::XattrValue => Errno::TOOBIG,
            Self::EmptyTarget => Errno::NOENT,
            Self::Inaccessible => Errno::FAULT,
            _ => Errno::INVAL,
        }
    }
}
