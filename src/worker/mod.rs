//! The worker threads, which serve the chains of the queues.
//!
//! [`Threads`] owns threads and their runtimes and knows nothing of virtio. [`WorkerPool`] serves
//! the queues of one session with them. The invariant: the worker that takes a chain off a ring
//! serves it, unless that worker has a backlog and another one is idle.

mod batch_size;
mod busy_poll;
mod chain_transport;
mod command;
mod completion_batch;
mod event_loop;
mod faults;
mod kick_moderation;
mod limited_transport;
mod limiter;
mod lone_waits;
mod observer;
mod queue_report;
mod standby;
mod threads;
mod waiting;
mod worker_pool;

pub(crate) use observer::{Observer, ThreadReport};
pub(crate) use queue_report::QueueReport;
pub use threads::{Threads, ThreadsError, Worker};
pub(crate) use worker_pool::Pings;
pub(crate) use worker_pool::StartingPool;
pub use worker_pool::{WorkerPool, WorkerPoolError};
