//! Counts what the server does: requests and their durations, errors, bytes, restarts.
//!
//! Each thread of the workers has a `Recorder` with counters of its own; [`Registry::snapshot`]
//! adds them up. With `--supervise` the counters are in memory that outlives the process
//! (`SharedFile`). This room knows opcodes only as numbers. The invariant: counting takes no lock
//! and no memory, and what reads the counters can't hold up what counts.

mod address;
mod block;
mod buckets;
mod endpoint;
mod errno;
mod http;
mod layout;
mod recorder;
mod registry;
mod shared_file;
mod snapshot;
mod sum;
#[cfg(test)]
mod tests;
mod text;
mod timing;

pub use self::address::{Address, AddressError};
pub(crate) use self::endpoint::serve;
pub(crate) use self::layout::{Count, Process, Server};
pub(crate) use self::recorder::{Ended, Recorder, RequestStart, Row};
pub(crate) use self::registry::Interruption;
pub use self::registry::{Facts, MetricsError, Registry, Shape};
pub(crate) use self::shared_file::SharedFile;
pub use self::snapshot::{
    ErrorCount, GuestFaults, Histogram, MountUsage, OperationStats, QueueStats, Recoveries,
    Restarts, SessionState, Snapshot, ThreadStats, Usage,
};
pub(crate) use crate::sys::clock::Ticks;
