//! `preadv2(2)` and `pwritev2(2)` on guest buffers.
//!
//! The invariant: the memory that a call names stays mapped until it returns, because the buffer is
//! borrowed.

#![allow(unsafe_code, reason = "system calls that take raw guest memory")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::buffer::{GuestBuffer, IOV_MAX};
use super::descriptor::position;

/// Where an operation moves data.
#[derive(Clone, Copy, Debug)]
pub(super) enum Direction {
    /// From the file into the buffer.
    Read,
    /// From the buffer into the file.
    Write,
}

/// Reads no bytes into an `empty` buffer, which never waits: the kernel still checks the open mode.
pub(super) fn read_nothing(
    fd: BorrowedFd<'_>,
    empty: &GuestBuffer,
    offset: u64,
) -> io::Result<usize> {
    transfer(Direction::Read, fd, empty, (0, offset), 0)
}

/// One `preadv2` or `pwritev2` with `flags`, for the buffer from byte `done` on; `offset` is the
/// position of the buffer's start. Retried if a signal interrupts it.
///
/// # Errors
///
/// Those of `preadv2(2)` and `pwritev2(2)`; `EINVAL` for a position above 2⁶³ − 1.
pub(super) fn transfer(
    direction: Direction,
    fd: BorrowedFd<'_>,
    buffer: &GuestBuffer,
    (done, offset): (usize, u64),
    flags: libc::c_int,
) -> io::Result<usize> {
    let call = match direction {
        Direction::Read => libc::preadv2,
        Direction::Write => libc::pwritev2,
    };
    let position = position(offset, done)?;
    let vecs = buffer.io_vecs(done);
    let count = libc::c_int::try_from(vecs.len().min(IOV_MAX)).unwrap_or_default();
    loop {
        // SAFETY: `vecs` holds at least `count` entries that name memory which stays mapped while
        // `buffer` is borrowed; `fd` is open while it is borrowed.
        let moved = unsafe { call(fd.as_raw_fd(), vecs.as_ptr(), count, position, flags) };
        if let Ok(n) = usize::try_from(moved) {
            return Ok(n);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Writes the buffer from byte `done` on by one `pwritev2`, or by the fewest that hold all pieces.
///
/// # Errors
///
/// As for [`transfer`], if nothing was written.
pub(super) fn write_all_pieces(
    fd: BorrowedFd<'_>,
    buffer: &GuestBuffer,
    (mut done, offset): (usize, u64),
    flags: libc::c_int,
) -> io::Result<usize> {
    loop {
        match transfer(Direction::Write, fd, buffer, (done, offset), flags) {
            Ok(n) => {
                done += n;
                if done == buffer.len() || n < one_operation(buffer, done - n) {
                    return Ok(done);
                }
            }
            Err(error) => return ok_if_any(done, error),
        }
    }
}

/// The bytes that one operation transfers from byte `done` of the buffer on, if it is complete.
pub(super) fn one_operation(buffer: &GuestBuffer, done: usize) -> usize {
    let pieces = buffer.io_vecs(done);
    pieces.iter().take(IOV_MAX).map(|piece| piece.iov_len).sum()
}

/// The result of a write that failed after `done` bytes: short if any were written.
pub(super) fn ok_if_any(done: usize, error: io::Error) -> io::Result<usize> {
    if done > 0 { Ok(done) } else { Err(error) }
}
