//! One face for two single-threaded runtimes: tokio's, and the same with an io_uring beside it.
//!
//! What runs on a [`Runtime`] needs not know which it is: tasks, timers and descriptor
//! readiness are tokio's on both, and a [`File`](super::File) asks [`Runtime::current`]. The
//! invariant: dropping a runtime returns only when the kernel touches no memory of its
//! operations any more, and frees none of that memory before.

use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::io;

use thiserror::Error;
use tokio::task::LocalSet;

pub use tokio::task::JoinHandle;

use super::probe::Unavailable;
use super::ring::{self, Refused, Uring};

/// Operations that a ring hands over at once, unless said otherwise.
pub const DEFAULT_RING_ENTRIES: u32 = 256;

/// Which runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// tokio's current-thread runtime; file operations that wait run on its blocking threads.
    Tokio,
    /// The same with an io_uring of its own.
    Uring,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tokio => "tokio",
            Self::Uring => "uring",
        })
    }
}

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

thread_local! {
    /// What `block_on` runs on this thread, if any does.
    static CURRENT: Cell<Option<Kind>> = const { Cell::new(None) };
}

/// A single-threaded runtime of either kind. It stays on the thread that made it.
pub struct Runtime {
    inner: Inner,
}

enum Inner {
    /// The tasks go before the runtime they are bound to.
    Tokio {
        tasks: LocalSet,
        tokio: tokio::runtime::Runtime,
    },
    Uring(Uring),
}

impl Runtime {
    /// Makes a runtime on this thread; a ring has [`DEFAULT_RING_ENTRIES`].
    ///
    /// # Errors
    ///
    /// The kernel refuses what the runtime needs. Ask [`choose`](super::choose) first for an
    /// explanation that helps.
    pub fn new(kind: Kind) -> Result<Self, RuntimeError> {
        Self::with_ring_entries(kind, DEFAULT_RING_ENTRIES)
    }

    /// Makes a runtime whose ring, if it has one, hands up to `entries` operations to the kernel
    /// at once. More may be in flight.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn with_ring_entries(kind: Kind, entries: u32) -> Result<Self, RuntimeError> {
        let inner = match kind {
            Kind::Tokio => Inner::Tokio {
                tasks: LocalSet::new(),
                tokio: tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .thread_name("ringfsd-blocking")
                    .build()
                    .map_err(RuntimeError::EventLoop)?,
            },
            Kind::Uring => Inner::Uring(Uring::new(entries).map_err(|refused| match refused {
                Refused::EventLoop(source) => RuntimeError::EventLoop(source),
                Refused::Ring(source) => RuntimeError::Ring { entries, source },
            })?),
        };
        Ok(Self { inner })
    }

    /// Which kind this is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self.inner {
            Inner::Tokio { .. } => Kind::Tokio,
            Inner::Uring(_) => Kind::Uring,
        }
    }

    /// The kind of the runtime that the calling code runs on, `None` outside of `block_on`.
    #[must_use]
    pub fn current() -> Option<Kind> {
        CURRENT.get()
    }

    /// Runs `future`, and what it spawns, until `future` ends. Tasks that are left go on at the
    /// next call.
    ///
    /// # Panics
    ///
    /// As `future` does, or when called from within a runtime.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let _restore = Restore(CURRENT.replace(Some(self.kind())));
        match &self.inner {
            Inner::Tokio { tasks, tokio } => tasks.block_on(tokio, future),
            Inner::Uring(uring) => uring.block_on(future),
        }
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime")
            .field("kind", &self.kind())
            .finish_non_exhaustive()
    }
}

/// Whether operations of the runtime that the caller runs on are complete that it hasn't seen yet:
/// something to look at, beside one's own work, before one sleeps.
#[must_use]
pub fn has_completions() -> bool {
    ring::has_completions()
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

/// Puts back what was current before, also when `block_on` unwinds.
struct Restore(Option<Kind>);

impl Drop for Restore {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}
