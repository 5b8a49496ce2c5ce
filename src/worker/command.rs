//! What a session asks of the thread that serves a queue.
//!
//! The invariant: a command whose thread has ended is dropped, which its sender notices.

use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};

use tokio::sync::oneshot;

use super::queue_report::QueueReport;
use crate::limits::{Buckets, Clock};
use crate::virtqueue::{Queue, QueueIndex};

/// A command of the session to a worker.
#[derive(Debug)]
pub(super) enum Command {
    /// Start serving this queue.
    Run {
        queue: Box<Queue>,
        kick: Arc<OwnedFd>,
        done: mpsc::Sender<std::io::Result<()>>,
    },
    /// Serve the chains that are on this thread's queues now.
    ServeWaiting {
        /// Dropped once they were served.
        done: oneshot::Sender<()>,
    },
    /// Show that the loop runs.
    Ping {
        /// Dropped in reply.
        done: oneshot::Sender<()>,
    },
    /// Describe this thread's queues.
    Describe {
        done: mpsc::Sender<Vec<QueueReport>>,
    },
    /// Take tokens for requests from these buckets from now on; `None` lifts all limits.
    Limit {
        buckets: Option<Arc<Buckets>>,
        clock: Clock,
    },
    /// The guest no longer wants to wait for this request, which may be held back.
    Interrupt { unique: u64 },
    /// Take no more chains off this queue. Chains in flight continue, and those that are held back
    /// are served.
    Stop {
        index: QueueIndex,
        done: mpsc::Sender<Option<Box<Queue>>>,
    },
}
