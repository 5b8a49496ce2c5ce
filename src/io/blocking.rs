//! Operations as plain system calls, and the way to run one on a thread where it may wait.
//!
//! The invariant: a call that may wait runs with everything it needs as its own, so whoever
//! asked for it may go away.

#![allow(unsafe_code, reason = "system calls that take raw guest memory")]

use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::buffer::{GuestBuffer, IOV_MAX};
use super::file::position;

/// One `preadv2` with `flags` into the buffer from its byte `done` on; tried again when a
/// signal comes between.
pub(super) fn read(
    fd: BorrowedFd<'_>,
    buffer: &GuestBuffer,
    done: usize,
    offset: u64,
    flags: libc::c_int,
) -> io::Result<usize> {
    let position = position(offset, done)?;
    let vecs = buffer.io_vecs(done);
    let count = count(vecs.len());
    until_not_interrupted(|| {
        // SAFETY: `vecs` holds at least `count` entries that name memory which stays mapped
        // while `buffer` is borrowed; `fd` is open while it is borrowed.
        unsafe { libc::preadv2(fd.as_raw_fd(), vecs.as_ptr(), count, position, flags) }
    })
}

/// One `pwritev2` with `flags` of the buffer from its byte `done` on; tried again when a signal
/// comes between.
pub(super) fn write(
    fd: BorrowedFd<'_>,
    buffer: &GuestBuffer,
    done: usize,
    offset: u64,
    flags: libc::c_int,
) -> io::Result<usize> {
    let position = position(offset, done)?;
    let vecs = buffer.io_vecs(done);
    let count = count(vecs.len());
    until_not_interrupted(|| {
        // SAFETY: `vecs` holds at least `count` entries that name memory which stays mapped
        // while `buffer` is borrowed; `fd` is open while it is borrowed.
        unsafe { libc::pwritev2(fd.as_raw_fd(), vecs.as_ptr(), count, position, flags) }
    })
}

/// Runs `call` on a thread of the runtime that may wait.
///
/// Dropping the future doesn't stop the call.
///
/// # Errors
///
/// `ECANCELED` when the runtime ends before the call has begun.
pub(crate) async fn run<R, C>(call: C) -> io::Result<R>
where
    R: Send + 'static,
    C: FnOnce() -> R + Send + 'static,
{
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => Ok(result),
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_cancelled) => Err(rustix::io::Errno::CANCELED.into()),
        },
    }
}

/// Runs `call` on `buffer` likewise and hands the buffer back, or an empty one with
/// `ECANCELED` when the runtime ends before.
pub(super) fn run_on_buffer<C>(
    buffer: GuestBuffer,
    call: C,
) -> impl Future<Output = (io::Result<usize>, GuestBuffer)> + Send
where
    C: FnOnce(&GuestBuffer) -> io::Result<usize> + Send + 'static,
{
    let call = run(move || (call(&buffer), buffer));
    async {
        call.await
            .unwrap_or_else(|e| (Err(e), GuestBuffer::from_vec(Vec::new())))
    }
}

/// As many entries as one call takes.
fn count(len: usize) -> libc::c_int {
    libc::c_int::try_from(len.min(IOV_MAX)).unwrap_or_default()
}

fn until_not_interrupted(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(n) = usize::try_from(call()) {
            return Ok(n);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
