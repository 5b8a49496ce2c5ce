//! Parses the arguments of a request, from front to back. The invariant: a name, id or offset that
//! is returned is valid, and nothing is read behind the end.

use std::ffi::CStr;

use zerocopy::{FromBytes, IntoBytes};

use super::Fault;
use crate::fs::{Handle, NodeId, Timestamp};
use crate::fuse::abi::InitIn;

/// Longest name, in bytes without the NUL (`NAME_MAX`).
const NAME_MAX: usize = 255;
/// Longest target of a symbolic link, in bytes without the NUL (`PATH_MAX` less the NUL).
const TARGET_MAX: usize = 4095;
/// Longest name of an extended attribute, in bytes without the NUL (`XATTR_NAME_MAX`).
const XATTR_NAME_MAX: usize = 255;

/// The unparsed rest of a request's arguments.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arguments<'a>(pub(super) &'a [u8]);

impl<'a> Arguments<'a> {
    /// The next structure.
    pub(super) fn take<T: FromBytes>(&mut self) -> Result<T, Fault> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_short| Fault::Truncated)?;
        self.0 = rest;
        Ok(value)
    }

    /// The argument of INIT, which is shorter in older kernels.
    pub(super) fn init(self) -> Result<InitIn, Fault> {
        let mut init = InitIn::default();
        let available = self.0.len().min(size_of::<InitIn>());
        if available < crate::fuse::abi::INIT_IN_SHORT_LEN {
            return Err(Fault::Truncated);
        }
        for (to, from) in init.as_mut_bytes().iter_mut().zip(self.0) {
            *to = *from;
        }
        Ok(init)
    }

    /// The next `len` bytes.
    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(Fault::Truncated)?;
        self.0 = rest;
        Ok(bytes)
    }

    /// The next name of a directory entry.
    pub(super) fn name(&mut self) -> Result<&'a CStr, Fault> {
        let name = self.string()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Fault::Name),
            bytes if bytes.len() > NAME_MAX => Err(Fault::NameLength),
            bytes if bytes.contains(&b'/') => Err(Fault::Name),
            _ => Ok(name),
        }
    }

    /// The next target of a symbolic link.
    pub(super) fn target(&mut self) -> Result<&'a CStr, Fault> {
        let target = self.string()?;
        match target.count_bytes() {
            0 => Err(Fault::EmptyTarget),
            len if len > TARGET_MAX => Err(Fault::NameLength),
            _ => Ok(target),
        }
    }

    /// The next name of an extended attribute.
    pub(super) fn xattr_name(&mut self) -> Result<&'a CStr, Fault> {
        let name = self.string()?;
        match name.count_bytes() {
            1..=XATTR_NAME_MAX => Ok(name),
            _ => Err(Fault::XattrName),
        }
    }

    /// The next string, without checks.
    pub(super) fn string(&mut self) -> Result<&'a CStr, Fault> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_endless| Fault::Unterminated)?;
        self.bytes(string.to_bytes_with_nul().len())?;
        Ok(string)
    }
}

/// A node id; 0 is refused.
pub(super) fn node(id: u64) -> Result<NodeId, Fault> {
    match id {
        0 => Err(Fault::Node),
        id => Ok(NodeId(id)),
    }
}

/// `value` if `valid` has all of `bits`.
pub(super) fn given<T>(valid: u32, bits: u32, value: T) -> Option<T> {
    (valid & bits == bits).then_some(value)
}

/// A handle, if `valid` has `bit`.
pub(super) fn given_handle(valid: u32, bit: u32, fh: u64) -> Option<Handle> {
    given(valid, bit, Handle(fh))
}

/// A user or group id other than the value that system calls take as "unchanged".
pub(super) fn id(id: u32) -> Result<u32, Fault> {
    match id {
        u32::MAX => Err(Fault::Id),
        id => Ok(id),
    }
}

/// An offset in a file, which is signed for system calls.
pub(super) fn offset(offset: u64) -> Result<u64, Fault> {
    match i64::try_from(offset) {
        Ok(_) => Ok(offset),
        Err(_) => Err(Fault::Value("offset")),
    }
}

/// Checks that `len` bytes from `start` on don't exceed the largest offset.
pub(super) fn extent(start: u64, len: u64) -> Result<(), Fault> {
    let end = start.checked_add(len).ok_or(Fault::Value("length"))?;
    offset(start)?;
    offset(end).map(|_| ())
}

/// A point in time; the unsigned field holds signed seconds.
pub(super) fn timestamp(seconds: u64, nanoseconds: u32) -> Result<Timestamp, Fault> {
    if nanoseconds >= 1_000_000_000 {
        return Err(Fault::Value("nanoseconds"));
    }
    Ok(Timestamp {
        seconds: seconds.cast_signed(),
        nanoseconds,
    })
}
