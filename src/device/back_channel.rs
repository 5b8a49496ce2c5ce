//! What the device may ask of the VMM.
//!
//! A file system gets a [`BackChannel`] and knows no more of the VMM. Nothing here has state.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

/// A request to the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendRequest {
    /// The configuration space has changed: read it again.
    ConfigChanged,
    /// Map the file whose descriptor is sent with the request into a shared-memory region of the
    /// device.
    MapSharedMemory(SharedMapping),
    /// Remove such a mapping.
    UnmapSharedMemory(SharedMapping),
}

/// A mapping within a shared-memory region of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedMapping {
    /// The region's number.
    pub region: u8,
    /// Where the mapping begins in the region.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Where it begins in the file. Without meaning for the removal of a mapping.
    pub file_offset: u64,
    /// The guest may write to it.
    pub writable: bool,
}

/// Why the VMM hasn't done what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum BackChannelError {
    /// No VMM is connected, or it has opened no back channel.
    #[error("the VMM has opened no back channel")]
    NotConnected,
    /// The request belongs to a protocol feature that the VMM hasn't accepted.
    #[error("the VMM hasn't accepted the vhost-user protocol feature {0}")]
    NotNegotiated(&'static str),
    /// The request needs a descriptor and has none, or the reverse; or its range is invalid.
    #[error("the request to the VMM is invalid: {0}")]
    Invalid(&'static str),
    /// The VMM has answered that it can't do it.
    #[error("the VMM has refused the request with {0}")]
    Refused(u64),
    /// The VMM hasn't answered in time. It may still do what it was asked for.
    #[error("the VMM hasn't answered in time")]
    TimedOut,
    /// A queue is being stopped, which doesn't wait for the VMM. The VMM may still do what it was
    /// asked for.
    #[error("the VMM stops a queue of the device and hasn't answered until now")]
    Interrupted,
    /// The VMM has closed the back channel, or an error has made it unusable before.
    #[error("the back channel to the VMM is closed")]
    Closed,
    /// What the VMM has sent is no answer. The back channel can't be used any more.
    #[error("the VMM has sent {0} instead of an answer")]
    Malformed(&'static str),
    /// The host refuses to send or receive.
    #[error("the back channel to the VMM can't be used")]
    Io(#[from] io::Error),
}

/// A way to send requests to the VMM.
pub trait BackChannel: fmt::Debug + Send + Sync {
    /// Sends a request, with a descriptor if it takes one, and waits for the answer. Requests of
    /// several threads are sent one after the other.
    ///
    /// Waits, at most a few seconds: to be called on a thread that may block
    /// ([`FileSystem::may_block`](crate::fs::FileSystem::may_block)). A thread that stops a queue
    /// of the device doesn't wait for it longer than a moment.
    ///
    /// # Errors
    ///
    /// The VMM hasn't done it, or isn't known to have done it: [`BackChannelError::TimedOut`],
    /// [`BackChannelError::Interrupted`], [`BackChannelError::Closed`]. A process that is killed
    /// while it waits leaves the same doubt to the next one, which serves the guest's request
    /// again.
    fn request(
        &self,
        request: BackendRequest,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), BackChannelError>;
}
