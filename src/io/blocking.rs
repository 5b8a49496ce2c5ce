//! Operations as plain system calls, and the way to run one on a thread where it may wait.
//!
//! The invariant: a call that may wait runs with everything it needs as its own, so whoever
//! asked for it may go away.

#![allow(unsafe_code, reason = "system calls that take raw guest memory")]

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

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

/// Runs `call` on a thread of the runtime that may wait; on the calling one, which waits then, where the
/// host has no thread to give.
///
/// Dropping the future doesn't stop the call.
///
/// # Errors
///
/// `ECANCELED` when the runtime ends before the call has begun.
pub(super) async fn run<R, C>(call: C) -> io::Result<R>
where
    R: Send + 'static,
    C: FnOnce() -> R + Send + 'static,
{
    if has_no_threads() {
        return Ok(call());
    }
    // Whoever takes the call out runs it: tokio keeps what it has found no thread for, and may find
    // one later.
    let call = Arc::new(Mutex::new(Some(call)));
    let here = Arc::clone(&call);
    let there = move || take(&call).map(|call| call());
    let spawned = catch_unwind(AssertUnwindSafe(|| tokio::task::spawn_blocking(there)));
    let Ok(task) = spawned else {
        NO_THREADS.set(Some(Instant::now()));
        let call = take(&here).ok_or(rustix::io::Errno::CANCELED)?;
        return Ok(call());
    };
    match task.await {
        Ok(result) => result.ok_or_else(|| rustix::io::Errno::CANCELED.into()),
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_cancelled) => Err(rustix::io::Errno::CANCELED.into()),
        },
    }
}

/// How long to do without a thread after there was none. tokio panics then, each time.
const WITHOUT: Duration = Duration::from_secs(1);

thread_local! {
    /// When this thread's runtime last found no thread.
    static NO_THREADS: Cell<Option<Instant>> = const { Cell::new(None) };
}

fn has_no_threads() -> bool {
    NO_THREADS
        .get()
        .is_some_and(|then| then.elapsed() < WITHOUT)
}

fn take<C>(call: &Mutex<Option<C>>) -> Option<C> {
    call.lock().unwrap_or_else(PoisonError::into_inner).take()
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
