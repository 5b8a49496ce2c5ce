//! `preadv2(2)` and `pwritev2(2)` on guest buffers.
//!
//! The invariant: the memory that a call names stays mapped until it returns, because the buffer is
//! borrowed.

#![allow(unsafe_code, reason = "system calls that take raw guest memory")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::buffer::{GuestBuffer, IOV_MAX};
use super::descriptor::position;

type Call = unsafe extern "C" fn(
    libc::c_int,
    *const libc::iovec,
    libc::c_int,
    libc::off_t,
    libc::c_int,
) -> libc::ssize_t;

/// One `preadv2` with `flags` into the buffer from byte `done` on; retried if a signal interrupts
/// it.
///
/// # Errors
///
/// Those of `preadv2(2)`; `EINVAL` for a position above 2⁶³ − 1.
pub(super) fn read(
    fd: BorrowedFd<'_>,
    buffer: &GuestBuffer,
    done: usize,
    offset: u64,
    flags: libc::c_int,
) -> io::Result<usize> {
    transfer(libc::preadv2, fd, buffer, done, (offset, flags))
}

/// One `pwritev2` with `flags` of the buffer from byte `done` on; retried if a signal interrupts
/// it.
///
/// # Errors
///
/// Those of `pwritev2(2)`; `EINVAL` for a position above 2⁶³ − 1.
pub(super) fn write(
    fd: BorrowedFd<'_>,
    buffer: &GuestBuffer,
    done: usize,
    offset: u64,
    flags: libc::c_int,
) -> io::Result<usize> {
    transfer(libc::pwritev2, fd, buffer, done, (offset, flags))
}

/// Writes the buffer from byte `done` on by one `pwritev2`, or by the fewest that hold all pieces.
///
/// # Errors
///
/// As for [`write`], if nothing was written.
pub(super) fn write_all_pieces(
    fd: BorrowedFd<'_>,
    buffer: &GuestBuffer,
    (mut done, offset): (usize, u64),
    flags: libc::c_int,
) -> io::Result<usize> {
    loop {
        match write(fd, buffer, done, offset, flags) {
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

fn transfer(
    call: Call,
    fd: BorrowedFd<'_>,
    buffer: &GuestBuffer,
    done: usize,
    (offset, flags): (u64, libc::c_int),
) -> io::Result<usize> {
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
