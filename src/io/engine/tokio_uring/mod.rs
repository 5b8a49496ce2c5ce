//! The tokio-uring engine: that crate's runtime, and file operations on its ring by `readv_at` and
//! `writev_at`.
//!
//! The crate hides its ring. So what `io/engine/uring` does to its own ring is done around this one
//! or not at all: operations wait here until the submission ring has room for them, and a runtime
//! that never sleeps is made to, because that is when operations are submitted. Writes into the
//! page cache run on the thread pool: tried inline by a ring they may become two writes. The
//! invariant: as in `io/engine/uring`, memory that an operation uses is freed only after the kernel
//! has completed the operation, even if its future or the runtime is dropped earlier.

#![allow(
    unsafe_code,
    reason = "the crate's buffer traits promise that addresses of guest memory are stable"
)]

mod files;
mod operation;
mod ring;
pub(in crate::io) mod setup;

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use self::operation::{Operation, Owner, pieces};
use self::ring::{Resources, Ring};
use super::{SetupError, SyncKind, Transferred, thread_pool, transfers};
use crate::io::buffer::GuestBuffer;
use crate::io::descriptor::{Descriptor, Facts, position};
use crate::io::vectored::Direction;

thread_local! {
    /// The ring of the runtime that runs on this thread, if any.
    static CURRENT: RefCell<Option<Rc<Ring>>> = const { RefCell::new(None) };
}

/// tokio-uring's runtime.
pub(in crate::io) struct EventLoop {
    /// `None` only while it is being dropped.
    runtime: Option<::tokio_uring::Runtime>,
    ring: Rc<Ring>,
}

impl EventLoop {
    /// Sets up a runtime with a ring of `entries`.
    pub(super) fn new(entries: u32) -> Result<Self, SetupError> {
        let runtime = setup::runtime(entries)?;
        let ring = runtime.block_on(async { Ring::new(entries) });
        Ok(Self {
            runtime: Some(runtime),
            ring: Rc::new(ring.map_err(SetupError::EventLoop)?),
        })
    }

    /// Runs `future`, and the tasks it spawns, until `future` completes.
    pub(super) fn block_on<F: Future>(&self, future: F) -> F::Output {
        let ring = &self.ring;
        let runtime = self.runtime.as_ref();
        let runtime = runtime.expect("invariant: there is one until the drop");
        let _restore = Restore(CURRENT.replace(Some(Rc::clone(ring))));
        let mut future = pin!(future);
        runtime.block_on(poll_fn(|cx| {
            ring.free_retired(cx.waker());
            if ring.makes_thread_sleep(cx) {
                return Poll::Pending;
            }
            future.as_mut().poll(cx)
        }))
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.ring.begin_closing();
        let runtime = self.runtime.take();
        // Cancels what can be cancelled and waits for all operations.
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(runtime)));
        let retired = self.ring.close();
        if dropped.is_err() {
            log::error!(
                "dropping a tokio-uring runtime panicked; the memory of its operations is leaked"
            );
            std::mem::forget(retired);
        }
    }
}

/// Restores the previous value, also when `block_on` unwinds.
struct Restore(Option<Rc<Ring>>);

impl Drop for Restore {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

/// # Panics
///
/// When the caller doesn't run on a runtime of this engine.
fn current() -> Rc<Ring> {
    CURRENT
        .with_borrow(Clone::clone)
        .expect("an operation takes a runtime of this engine")
}

/// Reads into the buffer after its first `filled` bytes, until it is full or the file ends.
pub(super) fn read(
    descriptor: &Arc<Descriptor>,
    buffer: GuestBuffer,
    filled: usize,
    offset: u64,
) -> impl Future<Output = Transferred> {
    let read = |descriptor, buffer, filled, offset| {
        transfer(Direction::Read, descriptor, buffer, filled, offset)
    };
    transfers::read(read, descriptor, buffer, filled, offset)
}

/// Writes the buffer by one operation, or by the fewest that hold all pieces.
pub(super) async fn write(
    descriptor: &Arc<Descriptor>,
    buffer: GuestBuffer,
    offset: u64,
) -> Transferred {
    if !descriptor.facts().has(Facts::DIRECT) {
        return thread_pool::write(descriptor, buffer, (0, offset), 0).await;
    }
    let write = |descriptor, buffer, done, offset| {
        transfer(Direction::Write, descriptor, buffer, done, offset)
    };
    transfers::write(write, descriptor, buffer, offset).await
}

/// One operation on the buffer from byte `done` on; the buffer begins at `offset`.
async fn transfer(
    direction: Direction,
    descriptor: &Arc<Descriptor>,
    buffer: GuestBuffer,
    done: usize,
    offset: u64,
) -> Transferred {
    let at = match position(offset, done) {
        Ok(position) => position.cast_unsigned(),
        Err(e) => return (Err(e), buffer),
    };
    let ring = current();
    let permit = ring.permit().await;
    let file = ring.file(descriptor);
    let vecs = buffer.io_vecs(done);
    let owner = Owner::new(
        &ring,
        Resources {
            buffer: Some(buffer),
            _descriptor: Arc::clone(descriptor),
            _permit: permit,
        },
    );
    // SAFETY: the buffer of `owner` keeps these pieces mapped.
    let pieces = unsafe { pieces(&vecs, direction, &owner) };
    let operation = async move {
        match direction {
            Direction::Read => file.readv_at(pieces, at).await.0,
            Direction::Write => file.writev_at(pieces, at).await.0,
        }
    };
    let (result, resources) = Operation::new(Box::pin(operation), owner).await;
    let buffer = resources.buffer.expect("invariant: set above");
    (result, buffer)
}

/// `fsync` or `fdatasync`.
pub(super) async fn sync(descriptor: &Arc<Descriptor>, kind: SyncKind) -> io::Result<()> {
    let (ring, owner) = on_descriptor(descriptor).await;
    let file = ring.file(descriptor);
    let operation = async move {
        match kind {
            SyncKind::All => file.sync_all().await,
            SyncKind::Data => file.sync_data().await,
        }
    };
    Operation::new(Box::pin(operation), owner).await.0
}

/// `fallocate`.
pub(super) async fn allocate(
    descriptor: &Arc<Descriptor>,
    mode: u32,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let (ring, owner) = on_descriptor(descriptor).await;
    let file = ring.file(descriptor);
    let operation = async move { file.fallocate(offset, len, mode.cast_signed()).await };
    Operation::new(Box::pin(operation), owner).await.0
}

/// What an operation without a buffer owns.
async fn on_descriptor(descriptor: &Arc<Descriptor>) -> (Rc<Ring>, Rc<Owner>) {
    let ring = current();
    let resources = Resources {
        buffer: None,
        _descriptor: Arc::clone(descriptor),
        _permit: ring.permit().await,
    };
    let owner = Owner::new(&ring, resources);
    (ring, owner)
}
