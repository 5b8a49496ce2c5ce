//! Receives bytes and the descriptors that are sent with them (`SCM_RIGHTS`).
//!
//! The invariant: no descriptor that has arrived is lost without an error, and none is inherited by
//! another program.

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
    let mut control = RecvAncillaryBuffer::new(&mut space);
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
    // The buffer has room for the most descriptors a message can carry, so truncation means that
    // this process has no free descriptor.
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(Errno::MFILE);
    }
    Ok(Received {
        len: got.bytes,
        fds,
    })
}
