//! Receives bytes and the descriptors that are sent with them (`SCM_RIGHTS`).
//!
//! The invariant: no descriptor that has arrived is lost without an error, unless the
//! caller takes one alone, and none is inherited by another program.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

/// The most descriptors that the kernel allows in a message (`SCM_MAX_FD`).
pub(crate) const MAX_FDS: usize = 253;

/// What one call has received.
#[derive(Debug)]
pub(crate) struct Received {
    /// How many bytes; 0 at the end of the stream.
    pub(crate) len: usize,
    /// The descriptors that came with them.
    pub(crate) fds: Vec<OwnedFd>,
}

/// Receives into `bytes`, by one call that is repeated if a signal interrupts it.
///
/// # Errors
///
/// Those of `recvmsg(2)`; `EMFILE` if this process has no free descriptor for one that has arrived.
pub(crate) fn receive(
    socket: impl AsFd,
    bytes: &mut [u8],
    flags: RecvFlags,
) -> Result<Received, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let (received, truncated) = receive_with(socket, bytes, flags, &mut space)?;
    // The buffer has room for the most descriptors a message can carry, so truncation means that
    // this process has no free descriptor.
    match truncated {
        true => Err(Errno::MFILE),
        false => Ok(received),
    }
}

/// As [`receive`], with the first descriptor alone. The kernel closes all others.
///
/// # Errors
///
/// Those of `recvmsg(2)`.
pub(crate) fn receive_one(
    socket: impl AsFd,
    bytes: &mut [u8],
    flags: RecvFlags,
) -> Result<Received, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let (mut received, _) = receive_with(socket, bytes, flags, &mut space)?;
    // Padding of the buffer may have room for another.
    received.fds.truncate(1);
    Ok(received)
}

/// Receives with `space` for descriptors, and returns whether some are missing.
fn receive_with(
    socket: impl AsFd,
    bytes: &mut [u8],
    flags: RecvFlags,
    space: &mut [MaybeUninit<u8>],
) -> Result<(Received, bool), Errno> {
    let mut control = RecvAncillaryBuffer::new(space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let got = rustix::io::retry_on_intr(|| {
        let mut slices = [IoSliceMut::new(bytes)];
        recvmsg(&socket, &mut slices, &mut control, flags)
    })?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let received = Received {
        len: got.bytes,
        fds,
    };
    Ok((received, got.flags.contains(ReturnFlags::CTRUNC)))
}
