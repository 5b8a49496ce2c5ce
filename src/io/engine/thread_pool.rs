//! The thread pool engine: operations that may wait run on tokio's blocking threads.
//!
//! The other engines use it for operations that they can't perform themselves. The invariant: a
//! call that may wait owns everything it needs, so its caller may be dropped.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::LocalSet;

use super::{SetupError, SyncKind, Transferred, calls};
use crate::io::buffer::GuestBuffer;
use crate::io::descriptor::Descriptor;

/// tokio's current-thread runtime. The tasks are dropped before the runtime that they are bound to.
pub(in crate::io) struct EventLoop {
    tasks: LocalSet,
    tokio: tokio::runtime::Runtime,
}

impl EventLoop {
    /// Sets up the runtime.
    pub(super) fn new() -> Result<Self, SetupError> {
        Ok(Self {
            tasks: LocalSet::new(),
            tokio: super::tokio_builder()
                .build()
                .map_err(SetupError::EventLoop)?,
        })
    }

    /// Runs `future`, and the tasks it spawns, until `future` completes.
    pub(super) fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.tasks.block_on(&self.tokio, future)
    }
}

/// Reads into the buffer after its first `filled` bytes, until it is full or the file ends.
pub(in crate::io) fn read(
    descriptor: &Arc<Descriptor>,
    buffer: GuestBuffer,
    filled: usize,
    offset: u64,
) -> impl Future<Output = Transferred> + Send + use<> {
    let file = Arc::clone(descriptor);
    run_on_buffer(buffer, move |buffer| {
        calls::read(&file, buffer, filled, offset)
    })
}

/// Writes the buffer by one `pwritev2` with `flags`; `from` is the first byte to write and the
/// offset of the buffer's start.
pub(in crate::io) fn write(
    descriptor: &Arc<Descriptor>,
    buffer: GuestBuffer,
    from: (usize, u64),
    flags: libc::c_int,
) -> impl Future<Output = Transferred> + Send + use<> {
    let file = Arc::clone(descriptor);
    run_on_buffer(buffer, move |buffer| {
        calls::write(&file, buffer, from, flags)
    })
}

/// `fsync` or `fdatasync`.
pub(super) async fn sync(descriptor: &Arc<Descriptor>, kind: SyncKind) -> io::Result<()> {
    let file = Arc::clone(descriptor);
    run(move || calls::sync(&file, kind)).await?
}

/// `fallocate`.
pub(super) async fn allocate(
    descriptor: &Arc<Descriptor>,
    mode: u32,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let file = Arc::clone(descriptor);
    run(move || calls::allocate(&file, mode, offset, len)).await?
}

/// Runs `call`, which may block, on a blocking thread of the current runtime. If the host has no
/// thread to give, it runs on the calling thread, which then waits.
///
/// Dropping the future doesn't stop the call.
///
/// # Errors
///
/// `ECANCELED` when the runtime ends before the call has begun.
///
/// # Panics
///
/// Outside of a runtime, and as `call` does.
pub async fn run<R, C>(call: C) -> io::Result<R>
where
    R: Send + 'static,
    C: FnOnce() -> R + Send + 'static,
{
    if has_no_threads() {
        return Ok(call());
    }
    // Whoever takes the call out of the mutex runs it: tokio keeps a call that it found no thread
    // for, and may find one later.
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

/// How long not to ask for a thread after there was none, because tokio panics each time.
const RETRY_THREADS_AFTER: Duration = Duration::from_secs(1);

thread_local! {
    /// When this thread's runtime last found no thread.
    static NO_THREADS: Cell<Option<Instant>> = const { Cell::new(None) };
}

fn has_no_threads() -> bool {
    NO_THREADS
        .get()
        .is_some_and(|failed_at| failed_at.elapsed() < RETRY_THREADS_AFTER)
}

fn take<C>(call: &Mutex<Option<C>>) -> Option<C> {
    call.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Runs `call` on `buffer` with [`run`] and returns the buffer, or an empty one with `ECANCELED` if
/// the runtime ends first.
fn run_on_buffer<C>(
    buffer: GuestBuffer,
    call: C,
) -> impl Future<Output = Transferred> + Send + use<C>
where
    C: FnOnce(&GuestBuffer) -> io::Result<usize> + Send + 'static,
{
    let call = run(move || (call(&buffer), buffer));
    // In a box, so that the ring's futures, which fall back on this one, have no room for it.
    Box::pin(async {
        call.await
            .unwrap_or_else(|e| (Err(e), GuestBuffer::from_vec(Vec::new())))
    })
}
