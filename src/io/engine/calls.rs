//! The operations as system calls, in which the calling thread waits.
//!
//! A thread that has nothing else to do waits in the call itself ([`wait_here`]): to hand the call to
//! another thread, or to the kernel's, costs two wake-ups. The thread pool makes the calls on threads that
//! may wait. The invariant: within [`wait_here`] a thread waits only for a disk of this host.

use std::cell::Cell;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::FallocateFlags;

use super::SyncKind;
use crate::io::buffer::GuestBuffer;
use crate::io::descriptor::{Descriptor, Facts};
use crate::io::scoped::set_while;
use crate::io::vectored::{self, Direction};

thread_local! {
    /// Whether this thread may wait in a system call.
    static MAY_WAIT: Cell<bool> = const { Cell::new(false) };
}

/// Calls `body`. Operations that it begins on files of this host's own file systems
/// ([`File::local`](crate::io::File::local)) wait in the calling thread.
pub fn wait_here<R>(body: impl FnOnce() -> R) -> R {
    set_while(&MAY_WAIT, true, body)
}

/// Whether operations on `descriptor` wait in this thread now.
pub(super) fn are_waited_for(descriptor: &Descriptor) -> bool {
    MAY_WAIT.get() && descriptor.facts().has(Facts::LOCAL)
}

/// Reads into the buffer after its first `filled` bytes, until it is full or the file ends.
pub(super) fn read(
    file: &Descriptor,
    buffer: &GuestBuffer,
    mut filled: usize,
    offset: u64,
) -> io::Result<usize> {
    while filled < buffer.len() {
        match vectored::transfer(Direction::Read, file.as_fd(), buffer, (filled, offset), 0)? {
            0 => break,
            n => filled += n,
        }
        // Anything other than a file or a disk may wait for more data to arrive.
        let over = filled == buffer.len() || !file.facts().has(Facts::SEEKABLE);
        if over || file.is_direct_at_end(offset.saturating_add(filled as u64)) {
            break;
        }
    }
    Ok(filled)
}

/// Writes the buffer by one `pwritev2` with `flags`; `from` is the first byte to write and the
/// offset of the buffer's start.
pub(super) fn write(
    file: &Descriptor,
    buffer: &GuestBuffer,
    from: (usize, u64),
    flags: libc::c_int,
) -> io::Result<usize> {
    vectored::write_all_pieces(file.as_fd(), buffer, from, flags)
}

/// `fsync` or `fdatasync`.
pub(super) fn sync(file: &Descriptor, kind: SyncKind) -> io::Result<()> {
    let result = match kind {
        SyncKind::All => rustix::fs::fsync(file),
        SyncKind::Data => rustix::fs::fdatasync(file),
    };
    result.map_err(io::Error::from)
}

/// `fallocate`.
pub(super) fn allocate(file: &Descriptor, mode: u32, offset: u64, len: u64) -> io::Result<()> {
    let mode = FallocateFlags::from_bits_retain(mode);
    rustix::fs::fallocate(file, mode, offset, len).map_err(io::Error::from)
}
