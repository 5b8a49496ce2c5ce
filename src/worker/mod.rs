//! The worker threads and their runtimes.

mod pool;

pub use pool::{Pool, PoolError, Worker};
