//! The worker threads, their runtimes, the loop.
//!
//! [`Pool`] is threads and runtimes, and of use without virtio; [`Crew`] serves the queues of
//! one session with them. The invariant: a chain is served by the worker that took it off its
//! ring, unless that one has a backlog and another has nothing to do.

mod crew;
mod exchange;
mod faults;
mod later;
mod nap;
mod pool;
mod portions;
mod serve;
mod spin;

pub use crew::{Crew, CrewError};
pub use pool::{Pool, PoolError, Worker};
