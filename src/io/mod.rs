//! Asynchronous files and guest buffers, on io_uring, tokio's thread pool or tokio-uring.
//!
//! This module owns files, buffers and the runtimes. It depends on neither virtio nor FUSE and can
//! be used without them. The invariant: memory that the kernel may still read or write is owned by
//! the operation, never borrowed.

mod buffer;
#[cfg(feature = "nydus")]
mod collector;
mod descriptor;
mod engine;
mod event;
mod file;
mod lock;
mod probe;
mod runtime;
mod scoped;
mod unavailable;
mod vectored;
mod volatile_bufs;

pub use buffer::{Guard, GuestBuffer};
#[cfg(feature = "nydus")]
pub(crate) use collector::Collector;
pub use engine::calls::wait_here;
pub use engine::thread_pool::run as blocking;
pub use engine::{Engine, SyncKind, Transferred};
pub use event::Event;
#[cfg(feature = "rust-vmm")]
pub(crate) use event::duplicate_eventfd;
pub(crate) use event::{takes_writing, writing_blocks};
pub use file::{Attempt, File, Metadata, WriteMode};
pub use lock::{Lock, LockKind, RecordLock};
pub use probe::{Choice, Chosen, choose, probe};
pub use runtime::{
    DEFAULT_RING_ENTRIES, JoinHandle, Runtime, RuntimeError, has_completions, spawn,
};
pub(crate) use scoped::set_while;
pub use unavailable::Unavailable;
