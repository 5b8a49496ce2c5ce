//! Engines: what performs the file operations that may wait.
//!
//! Each [`Engine`] is one module with its event loop and its operations. Another engine needs
//! another module and one more arm here. The invariant: every engine gives the same results.

pub(super) mod calls;
pub(super) mod thread_pool;
#[cfg(feature = "tokio-uring")]
pub(super) mod tokio_uring;
mod transfers;
pub(super) mod uring;

use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::buffer::GuestBuffer;
use super::descriptor::{Descriptor, Facts};
use super::scoped::set_while;
use super::vectored;

/// What performs the file operations that may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Engine {
    /// tokio's current-thread runtime; operations that may wait run on its blocking threads.
    ThreadPool,
    /// The same runtime with an io_uring of its own.
    Uring,
    /// tokio-uring's runtime.
    #[cfg(feature = "tokio-uring")]
    TokioUring,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ThreadPool => "tokio",
            Self::Uring => "uring",
            #[cfg(feature = "tokio-uring")]
            Self::TokioUring => "tokio-uring",
        })
    }
}

/// How much `sync` makes durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncKind {
    /// Data and metadata, as `fsync(2)`.
    All,
    /// Data and what is needed to read it back, as `fdatasync(2)`.
    Data,
}

/// The result of an operation on a buffer, and the buffer.
pub type Transferred = (io::Result<usize>, GuestBuffer);

thread_local! {
    /// The engine of the runtime that runs on this thread in `block_on`.
    static CURRENT: Cell<Option<Engine>> = const { Cell::new(None) };
}

impl Engine {
    /// The engines that the program is built with.
    pub const ALL: &[Self] = &[
        Self::ThreadPool,
        Self::Uring,
        #[cfg(feature = "tokio-uring")]
        Self::TokioUring,
    ];

    /// The engine of the runtime that the calling code runs on.
    pub(super) fn current() -> Option<Self> {
        CURRENT.get()
    }

    /// The engine for operations on `descriptor`: a ring gets none that may wait forever.
    fn of(descriptor: &Descriptor) -> Self {
        match Self::current() {
            Some(engine) if descriptor.facts().has(Facts::SEEKABLE) => engine,
            _ => Self::ThreadPool,
        }
    }
}

/// Reads into `buffer` after its first `filled` bytes, until it is full or the file ends; `offset`
/// is the position of the buffer's start.
pub(super) async fn read(
    descriptor: &Arc<Descriptor>,
    buffer: GuestBuffer,
    filled: usize,
    offset: u64,
) -> Transferred {
    if buffer.is_empty() {
        return (
            vectored::read_nothing(descriptor.as_fd(), &buffer, offset),
            buffer,
        );
    }
    if calls::are_waited_for(descriptor) {
        return (calls::read(descriptor, &buffer, filled, offset), buffer);
    }
    match Engine::of(descriptor) {
        Engine::ThreadPool => thread_pool::read(descriptor, buffer, filled, offset).await,
        Engine::Uring => uring::read(descriptor, buffer, filled, offset).await,
        #[cfg(feature = "tokio-uring")]
        Engine::TokioUring => tokio_uring::read(descriptor, buffer, filled, offset).await,
    }
}

/// Writes `buffer` at `offset` by one operation, with `flags` of `pwritev2(2)`.
pub(super) async fn write(
    descriptor: &Arc<Descriptor>,
    buffer: GuestBuffer,
    offset: u64,
    flags: libc::c_int,
) -> Transferred {
    if calls::are_waited_for(descriptor) {
        return (
            calls::write(descriptor, &buffer, (0, offset), flags),
            buffer,
        );
    }
    match Engine::of(descriptor) {
        Engine::Uring if flags == 0 => uring::write(descriptor, buffer, offset).await,
        #[cfg(feature = "tokio-uring")]
        Engine::TokioUring if flags == 0 => tokio_uring::write(descriptor, buffer, offset).await,
        _ => thread_pool::write(descriptor, buffer, (0, offset), flags).await,
    }
}

/// `fsync(2)` or `fdatasync(2)`.
pub(super) async fn sync(descriptor: &Arc<Descriptor>, kind: SyncKind) -> io::Result<()> {
    if calls::are_waited_for(descriptor) {
        return calls::sync(descriptor, kind);
    }
    match Engine::current() {
        Some(Engine::Uring) => uring::sync(descriptor, kind).await,
        #[cfg(feature = "tokio-uring")]
        Some(Engine::TokioUring) => tokio_uring::sync(descriptor, kind).await,
        Some(Engine::ThreadPool) | None => thread_pool::sync(descriptor, kind).await,
    }
}

/// `fallocate(2)`.
pub(super) async fn allocate(
    descriptor: &Arc<Descriptor>,
    mode: u32,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    if calls::are_waited_for(descriptor) {
        return calls::allocate(descriptor, mode, offset, len);
    }
    match Engine::current() {
        Some(Engine::Uring) => uring::allocate(descriptor, mode, offset, len).await,
        #[cfg(feature = "tokio-uring")]
        Some(Engine::TokioUring) => tokio_uring::allocate(descriptor, mode, offset, len).await,
        Some(Engine::ThreadPool) | None => {
            thread_pool::allocate(descriptor, mode, offset, len).await
        }
    }
}

/// The single-threaded event loop of an engine.
pub(super) enum EventLoop {
    ThreadPool(thread_pool::EventLoop),
    Uring(uring::EventLoop),
    #[cfg(feature = "tokio-uring")]
    TokioUring(tokio_uring::EventLoop),
}

/// The part of an event loop that the kernel refused.
pub(super) enum SetupError {
    EventLoop(io::Error),
    Ring(io::Error),
}

impl EventLoop {
    /// Sets up the event loop of `engine`, with a ring of `entries` if it has one.
    pub(super) fn new(engine: Engine, entries: u32) -> Result<Self, SetupError> {
        Ok(match engine {
            Engine::ThreadPool => Self::ThreadPool(thread_pool::EventLoop::new()?),
            Engine::Uring => Self::Uring(uring::EventLoop::new(entries)?),
            #[cfg(feature = "tokio-uring")]
            Engine::TokioUring => Self::TokioUring(tokio_uring::EventLoop::new(entries)?),
        })
    }

    pub(super) fn engine(&self) -> Engine {
        match self {
            Self::ThreadPool(_) => Engine::ThreadPool,
            Self::Uring(_) => Engine::Uring,
            #[cfg(feature = "tokio-uring")]
            Self::TokioUring(_) => Engine::TokioUring,
        }
    }

    /// Runs `future`, and the tasks it spawns, until `future` completes.
    pub(super) fn block_on<F: Future>(&self, future: F) -> F::Output {
        set_while(&CURRENT, Some(self.engine()), || match self {
            Self::ThreadPool(event_loop) => event_loop.block_on(future),
            Self::Uring(event_loop) => event_loop.block_on(future),
            #[cfg(feature = "tokio-uring")]
            Self::TokioUring(event_loop) => event_loop.block_on(future),
        })
    }
}

/// The settings that the event loops of all engines share.
fn tokio_builder() -> tokio::runtime::Builder {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder
        .enable_all()
        .thread_name("ringfsd-blocking")
        // A worker waits for a few descriptors, and the buffer for 1,024 events takes 12 KiB.
        .max_io_events_per_tick(64);
    builder
}
