//! A single-threaded runtime with an [`Engine`] for file operations.
//!
//! Code on a [`Runtime`] needn't know its engine: tasks, timers and descriptor readiness are
//! tokio's with every engine, and a [`File`](super::File) uses the current one. The invariant:
//! dropping a runtime returns only when the kernel no longer accesses memory of its operations, and
//! frees none of that memory earlier.

use std::fmt;
use std::future::Future;
use std::io;

use thiserror::Error;

pub use tokio::task::JoinHandle;

use super::engine::{self, Engine, EventLoop, SetupError};
use super::unavailable::Unavailable;

/// Default size of a ring: operations that it submits at once.
pub const DEFAULT_RING_ENTRIES: u32 = 256;

/// Why a runtime can't be created.
#[derive(Debug, Error)]
pub enum RuntimeError {
    /// The kernel refused the epoll instance or eventfd that tokio needs.
    #[error("can't set up tokio's event loop")]
    EventLoop(#[source] io::Error),
    /// The kernel refused a ring, although it may have granted others before.
    #[error("can't set up an io_uring of {entries} entries")]
    Ring {
        /// The requested size.
        entries: u32,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// io_uring was requested explicitly and can't be used.
    #[error("io_uring was requested but can't be used; choose `auto` or `tokio`, or fix the cause")]
    Unavailable(#[source] Unavailable),
    /// tokio-uring was requested, which this program is built without.
    #[error(
        "this program is built without tokio-uring; choose `auto`, `uring` or `tokio`, or build it \
         with `--features tokio-uring`"
    )]
    NotBuilt,
}

/// A single-threaded runtime with an engine for file operations. It stays on the thread that
/// created it.
pub struct Runtime {
    event_loop: EventLoop,
}

impl Runtime {
    /// Creates a runtime on this thread; a ring has [`DEFAULT_RING_ENTRIES`].
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses what the runtime needs. Call [`choose`](super::choose) first for
    /// a helpful explanation.
    pub fn new(engine: Engine) -> Result<Self, RuntimeError> {
        Self::with_ring_entries(engine, DEFAULT_RING_ENTRIES)
    }

    /// Creates a runtime whose ring, if it has one, submits up to `entries` operations at once.
    /// More may be in flight.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn with_ring_entries(engine: Engine, entries: u32) -> Result<Self, RuntimeError> {
        let event_loop = EventLoop::new(engine, entries).map_err(|refused| match refused {
            SetupError::EventLoop(source) => RuntimeError::EventLoop(source),
            SetupError::Ring(source) => RuntimeError::Ring { entries, source },
        })?;
        Ok(Self { event_loop })
    }

    /// The runtime's engine.
    #[must_use]
    pub fn engine(&self) -> Engine {
        self.event_loop.engine()
    }

    /// The engine of the runtime that the caller runs on; `None` outside of `block_on`.
    #[must_use]
    pub fn current() -> Option<Engine> {
        Engine::current()
    }

    /// Runs `future`, and the tasks it spawns, until `future` completes. Remaining tasks continue
    /// at the next call.
    ///
    /// # Panics
    ///
    /// If `future` does, or when called from within a runtime.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.event_loop.block_on(future)
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime")
            .field("engine", &self.engine())
            .finish_non_exhaustive()
    }
}

/// Whether operations of the caller's runtime have completed that it hasn't processed yet. Worth
/// checking, beside one's own work, before going to sleep.
#[must_use]
pub fn has_completions() -> bool {
    engine::uring::has_completions()
}

/// Starts a task on the caller's runtime; the task need not be `Send`. Keep the handle and await
/// it: every task belongs to an owner that joins it.
///
/// # Panics
///
/// When called outside of [`Runtime::block_on`].
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    tokio::task::spawn_local(future)
}
