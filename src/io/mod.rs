//! Asynchronous files and guest buffers, over io_uring and tokio.
//!
//! This room knows files, memory and the two runtimes; it knows neither virtio nor FUSE, and
//! is of use without them. Its invariant: whatever the kernel may still read from or write to
//! is owned by the operation, never borrowed.

mod blocking;
mod buffer;
mod event;
mod file;
mod lock;
mod probe;
mod ring;
mod runtime;

pub(crate) use blocking::run as run_blocking;
pub use buffer::{Guard, GuestBuffer};
pub use event::Event;
pub(crate) use event::{takes_writing, writing_blocks};
pub use file::{Attempt, File, Metadata, SyncKind, WriteMode};
pub use lock::{Lock, LockKind, RecordLock};
pub use probe::{Choice, Chosen, Unavailable, choose, probe};
pub use runtime::{
    DEFAULT_RING_ENTRIES, JoinHandle, Kind, Runtime, RuntimeError, has_completions, spawn,
};
