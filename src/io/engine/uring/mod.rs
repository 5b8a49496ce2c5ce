//! The io_uring engine: tokio's current-thread runtime with a ring beside it, and file operations
//! on that ring.
//!
//! The runtime sleeps in tokio's epoll instance, which watches the ring's descriptor: that costs no
//! more than sleeping in the ring itself, and leaves timers and readiness to tokio. Everything runs
//! within the future that tokio blocks on, so each of its turns ends with one visit to the ring:
//! entries in, completions out. The invariant: memory that an entry points to is owned by the
//! operation at an address that doesn't change, and is freed only after the kernel has completed
//! the operation, even if its future or the runtime is dropped earlier.

#![allow(
    unsafe_code,
    reason = "ring entries hold raw addresses of guest memory"
)]

mod driver;
mod poll_waker;
pub(in crate::io) mod setup;
mod slots;

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::AsRawFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use io_uring::squeue::{Entry, Flags};
use io_uring::{opcode, types};
use tokio::io::unix::AsyncFd;
use tokio::task::LocalSet;

use self::driver::{Driver, Operation, WatchedFd};
use self::poll_waker::PollWaker;
use self::slots::Resources;
use super::{SetupError, SyncKind, Transferred, transfers};
use crate::io::buffer::{GuestBuffer, IOV_MAX};
use crate::io::descriptor::{Descriptor, Facts, position};

thread_local! {
    /// The ring of the runtime that runs on this thread, if any.
    static CURRENT: RefCell<Option<Rc<Driver>>> = const { RefCell::new(None) };
}

/// A runtime with a ring.
///
/// Fields are dropped in this order: the tasks first, then the operations that they leave to the
/// kernel.
pub(in crate::io) struct EventLoop {
    tasks: LocalSet,
    watched: AsyncFd<WatchedFd>,
    driver: Closing,
    tokio: tokio::runtime::Runtime,
}

/// A ring that is closed with its runtime.
struct Closing(Rc<Driver>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl EventLoop {
    /// Sets up a runtime with a ring of `entries`.
    pub(super) fn new(entries: u32) -> Result<Self, SetupError> {
        let driver = Rc::new(Driver::new(entries).map_err(SetupError::Ring)?);
        let tokio = super::tokio_builder()
            // A completion may wake the thread without waking any task.
            .on_thread_unpark(|| {
                if let Some(driver) = current() {
                    driver.reap();
                }
            })
            .build()
            .map_err(SetupError::EventLoop)?;
        let entered = tokio.enter();
        // SAFETY: the field precedes the driver's, so it is dropped before the driver is closed.
        let watched = unsafe { driver.watch() }.map_err(SetupError::EventLoop)?;
        drop(entered);
        Ok(Self {
            tasks: LocalSet::new(),
            watched,
            driver: Closing(driver),
            tokio,
        })
    }

    /// Runs `future`, and the tasks it spawns, until `future` completes.
    pub(super) fn block_on<F: Future>(&self, future: F) -> F::Output {
        let driver = &self.driver.0;
        let _restore = Restore(CURRENT.replace(Some(Rc::clone(driver))));
        let mut work = pin!(self.tasks.run_until(future));
        let mut cached = None;
        self.tokio.block_on(poll_fn(|cx| {
            // tokio's `block_on` uses the same waker for each poll.
            let (poll_waker, waker) = cached.get_or_insert_with(|| {
                let poll_waker = PollWaker::new(cx.waker().clone());
                let waker = Waker::from(Arc::clone(&poll_waker));
                (poll_waker, waker)
            });
            let mut cx = Context::from_waker(waker);
            poll_waker.run(|| {
                let polled = work.as_mut().poll(&mut cx);
                driver.turn(&self.watched, &mut cx);
                polled
            })
        }))
    }
}

/// Restores the previous value, also when `block_on` unwinds.
struct Restore(Option<Rc<Driver>>);

impl Drop for Restore {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

fn current() -> Option<Rc<Driver>> {
    CURRENT.with_borrow(Clone::clone)
}

/// Whether operations of the current runtime have completed that it hasn't processed yet.
pub(in crate::io) fn has_completions() -> bool {
    CURRENT.with_borrow(|driver| {
        driver
            .as_ref()
            .is_some_and(|driver| driver.has_completions())
    })
}

/// Reads into the buffer after its first `filled` bytes, until it is full or the file ends.
pub(super) fn read(
    descriptor: &Arc<Descriptor>,
    buffer: GuestBuffer,
    filled: usize,
    offset: u64,
) -> impl Future<Output = Transferred> {
    let read = |descriptor, buffer, filled, offset| {
        transfer(Transfer::Read, descriptor, buffer, filled, offset)
    };
    transfers::read(read, descriptor, buffer, filled, offset)
}

/// Writes the buffer by one operation, or by the fewest that hold all pieces.
pub(super) fn write(
    descriptor: &Arc<Descriptor>,
    buffer: GuestBuffer,
    offset: u64,
) -> impl Future<Output = Transferred> {
    let kind = if descriptor.facts().has(Facts::DIRECT) {
        Transfer::Write
    } else {
        Transfer::WriteBuffered
    };
    let write =
        move |descriptor, buffer, done, offset| transfer(kind, descriptor, buffer, done, offset);
    transfers::write(write, descriptor, buffer, offset)
}

/// The direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transfer {
    /// From the file into the buffer.
    Read,
    /// From the buffer into the file, past the page cache.
    Write,
    /// From the buffer into the page cache, by the kernel's own threads from the start. Tried
    /// inline, such a write may stop where it would wait and continue later, and so become two
    /// writes.
    WriteBuffered,
}

/// A transfer that has been started. It is a future by itself, as one that is made by the compiler
/// would have room for the buffer and the entry besides the operation that owns them.
enum Started {
    Operation(Operation),
    /// It can't be started. `None` when it has returned this.
    Failed(Option<Transferred>),
}

impl Future for Started {
    type Output = Transferred;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Transferred> {
        match self.get_mut() {
            Self::Operation(operation) => {
                Pin::new(operation)
                    .poll(context)
                    .map(|(result, resources)| {
                        let buffer = resources.buffer.expect("invariant: `transfer` has set it");
                        (result, buffer)
                    })
            }
            Self::Failed(failed) => {
                Poll::Ready(failed.take().expect("a future is polled until it is ready"))
            }
        }
    }
}

/// Starts one operation on the buffer from byte `done` on; the buffer begins at `offset`.
fn transfer(
    kind: Transfer,
    descriptor: &Arc<Descriptor>,
    buffer: GuestBuffer,
    done: usize,
    offset: u64,
) -> Started {
    let at = match position(offset, done) {
        Ok(position) => position.cast_unsigned(),
        Err(e) => return Started::Failed(Some((Err(e), buffer))),
    };
    let fd = types::Fd(descriptor.as_raw_fd());
    let vecs = buffer.io_vecs(done);
    let (entry, vecs) = if let [one] = vecs[..] {
        let len = u32::try_from(one.iov_len).unwrap_or(u32::MAX);
        let base = one.iov_base.cast();
        let entry = match kind {
            Transfer::Read => opcode::Read::new(fd, base, len).offset(at).build(),
            _ => opcode::Write::new(fd, base, len).offset(at).build(),
        };
        (entry, Vec::new())
    } else {
        let vecs = vecs.into_vec();
        let count = u32::try_from(vecs.len().min(IOV_MAX)).unwrap_or_default();
        let entry = match kind {
            Transfer::Read => opcode::Readv::new(fd, vecs.as_ptr(), count)
                .offset(at)
                .build(),
            _ => opcode::Writev::new(fd, vecs.as_ptr(), count)
                .offset(at)
                .build(),
        };
        (entry, vecs)
    };
    let entry = match kind {
        Transfer::WriteBuffered => entry.flags(Flags::ASYNC),
        Transfer::Read | Transfer::Write => entry,
    };
    let resources = Resources {
        buffer: Some(buffer),
        _vecs: vecs,
        _descriptor: Arc::clone(descriptor),
    };
    // SAFETY: the entry names the descriptor, the vector's heap memory and the buffer's pieces, all
    // of which `resources` owns and none of which moves with it.
    Started::Operation(unsafe { start(entry, resources) })
}

/// `fsync` or `fdatasync`.
pub(super) async fn sync(descriptor: &Arc<Descriptor>, kind: SyncKind) -> io::Result<()> {
    let flags = match kind {
        SyncKind::All => types::FsyncFlags::empty(),
        SyncKind::Data => types::FsyncFlags::DATASYNC,
    };
    let entry = opcode::Fsync::new(types::Fd(descriptor.as_raw_fd()))
        .flags(flags)
        .build();
    on_descriptor(entry, descriptor).await
}

/// `fallocate`.
pub(super) async fn allocate(
    descriptor: &Arc<Descriptor>,
    mode: u32,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let entry = opcode::Fallocate::new(types::Fd(descriptor.as_raw_fd()), len)
        .offset(offset)
        .mode(mode.cast_signed())
        .build();
    on_descriptor(entry, descriptor).await
}

/// An operation that needs only the descriptor.
async fn on_descriptor(entry: Entry, descriptor: &Arc<Descriptor>) -> io::Result<()> {
    let resources = Resources {
        buffer: None,
        _vecs: Vec::new(),
        _descriptor: Arc::clone(descriptor),
    };
    // SAFETY: the entry names only the descriptor, which `resources` keeps open.
    let (result, _) = unsafe { start(entry, resources) }.await;
    result.map(drop)
}

/// Puts `entry` on the ring. The operation completes with the result and `resources`.
///
/// # Safety
///
/// Everything that the entry points to must be owned by `resources`, at an address that stays the
/// same when `resources` moves.
///
/// # Panics
///
/// When the caller doesn't run on a runtime with a ring.
unsafe fn start(entry: Entry, resources: Resources) -> Operation {
    let driver = current().expect("an operation on the ring takes a runtime with a ring");
    // SAFETY: the caller guarantees it.
    unsafe { driver.start(entry, resources) }
}
