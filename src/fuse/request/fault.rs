//! What can be wrong with the bytes of a request.

use rustix::io::Errno;
use thiserror::Error;

use crate::fuse::abi::Opcode;

/// A request that can't be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("request {} with opcode {}", known(*unique), known(opcode.map(u64::from)))]
pub struct DecodeError {
    /// What the guest calls the request, if that many bytes were there.
    pub unique: Option<u64>,
    /// The operation's number, if the header was there.
    pub opcode: Option<u32>,
    /// What is wrong with it.
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
    /// The header is cut short.
    #[error("the header has only {0} bytes")]
    Header(usize),
    /// The header's length can't be true.
    #[error("the header says that the request has {0} bytes")]
    Length(u32),
    /// The arguments are cut short.
    #[error("the arguments are cut short")]
    Truncated,
    /// The extensions are longer than the request.
    #[error("the extensions are longer than the request")]
    Extensions,
    /// A name does not end.
    #[error("a name has no NUL")]
    Unterminated,
    /// A name is empty, `.` or `..`, or has a slash in it.
    #[error("a name is empty, a dot or two, or has a slash in it")]
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
    /// A symbolic link is to point nowhere.
    #[error("the target of a symbolic link is empty")]
    EmptyTarget,
    /// Node 0, which there is not.
    #[error("the node is 0")]
    Node,
    /// A user or group id that stands for none.
    #[error("the user or group id stands for none")]
    Id,
    /// A value that the field can't have.
    #[error("{0} can't have this value")]
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
            _ => Errno::INVAL,
        }
    }
}
