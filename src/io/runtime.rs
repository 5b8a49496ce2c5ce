//! A single-threaded runtime with an [`Engine`] for file operations.
//!
//! What runs on a [`Runtime`] needs not know which engine it has: tasks, timers and descriptor
//! readiness are tokio's on all, and a [`File`](super::File) asks for the current one. The
//! invariant: dropping a runtime returns only when the kernel touches no memory of its
//! operations any more, and frees none of that memory before.

use std::fmt;
use std::future::Future;
use std::io;

use thiserror::Error;

pub use tokio::task::JoinHandle;

use super::engine::{self, Engine, EventLoop, SetupError};
use super::unavailable::Unavailable;

/// Operations that a ring hands over at once, unless said otherwise.
pub const DEFAULT_RING_ENTRIES: u32 = 256;

/// Why a runtime can't be had.
#[derive(Debug, Error)]
pub enum RuntimeError {
    /// The kernel refused the epoll instance or eventfd that tokio needs.
    #[error("can't set up tokio's event loop")]
    EventLoop(#[source] io::Error),
    /// The kernel refused a ring, though it may have granted others before.
    #[error("can't set up an io_uring of {entries} entries")]
    Ring {
        /// The size asked for.
        entries: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The ring was asked for by name, and isn't to be had.
    #[error(
        "io_uring was asked for but can't be used; choose `auto` or `tokio`, or mend the cause"
    )]
    Unavailable(#[source] Unavailable),
}

/// A single-threaded runtime with an engine for file operations. It stays on the thread that made it.
pub struct Runtime {
    event_loop: EventLoop,
}

impl Runtime {
    /// Makes a runtime on this thread; a ring has [`DEFAULT_RING_ENTRIES`].
    ///
    /// # Errors
    ///
    /// The kernel refuses what the runtime needs. Ask [`choose`](super::choose) first for an
    /// explanation that helps.
    pub fn new(engine: Engine) -> Result<Self, RuntimeError> {
        Self::with_ring_entries(engine, DEFAULT_RING_ENTRIES)
    }

    /// Makes a runtime whose ring, if it has one, hands up to `entries` operations to the kernel
    /// at once. More may be in flight.
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

    /// Its engine.
    #[must_use]
    pub fn engine(&self) -> Engine {
        self.event_loop.engine()
    }

    /// The engine of the runtime that the calling code runs on, `None` outside of `block_on`.
    #[must_use]
    pub fn current() -> Option<Engine> {
        Engine::current()
    }

    /// Runs `future`, and what it spawns, until `future` ends. Tasks that are left go on at the
    /// next call.
    ///
    /// # Panics
    ///
    /// As `future` does, or when called from within a runtime.
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

/// Whether operations of the runtime that the caller runs on are complete that it hasn't seen yet:
/// something to look at, beside one's own work, before one sleeps.
#[must_use]
pub fn has_completions() -> bool {
    engine::uring::has_completions()
}

/// Starts a task on the runtime that the caller runs on; the task needs not be `Send`. Keep
/// the handle and await it: every task belongs to someone who joins it.
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
