//! The migration of a session to another server: the format, and the transfer over a pipe.
//!
//! [`stream`] is the format, plain data and its encoding. A transfer moves bytes between a
//! [`DeviceState`] and a descriptor of the front end. What the bytes say is found and applied where
//! it is known: `fuse` has what INIT negotiated, a file system its inodes, open files and locks. The
//! invariant: nothing of a session changes before all of a stream was received and decoded.

pub(crate) mod stream;
mod transfer;

pub use self::transfer::{Cause, DeviceState};
pub(crate) use self::transfer::{Direction, NoDeviceState, Transfer, TransferError};
