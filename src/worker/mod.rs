//! The worker threads, their runtimes, the loop.
//!
//! [`Threads`] is threads and runtimes, and of use without virtio; [`WorkerPool`] serves the queues of
//! one session with them. The invariant: a chain is served by the worker that took it off its
//! ring, unless that one has a backlog and another has nothing to do.

mod batch_size;
mod busy_poll;
mod chain_transport;
mod completion_batch;
mod event_loop;
mod faults;
mod kick_moderation;
mod threads;
mod worker_pool;

pub use threads::{Threads, ThreadsError, Worker};
pub use worker_pool::{WorkerPool, WorkerPoolError};
