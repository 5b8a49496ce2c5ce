//! What the threads of a pool are doing, for whoever looks from outside.
//!
//! The invariant: a thread is asked between two requests, and one that doesn't answer is reported as
//! such instead of being waited for.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::WeakUnboundedSender;

use super::command::Command;
use super::queue_report::QueueReport;

/// How long all threads together may take to answer. One that waits for the host takes longer.
const TIMEOUT: Duration = Duration::from_millis(250);

/// A thread of a pool.
#[derive(Clone, Debug)]
pub struct ThreadReport {
    /// Its name, as the host shows it.
    pub name: String,
    /// Its queues; `None` if it hasn't answered.
    pub queues: Option<Vec<QueueReport>>,
}

/// Asks the threads of a pool. It doesn't keep them from ending.
#[derive(Clone, Debug)]
pub struct Observer {
    pub(super) threads: Vec<(String, WeakUnboundedSender<Command>)>,
}

impl Observer {
    /// Asks all threads, and waits up to a quarter of a second for their answers.
    #[must_use]
    pub fn threads(&self) -> Vec<ThreadReport> {
        let ask = |thread: &WeakUnboundedSender<Command>| {
            let (done, reports) = mpsc::channel();
            // A thread that has ended drops the command, and with it the channel.
            let _ = thread.upgrade()?.send(Command::Describe { done });
            Some(reports)
        };
        let asked: Vec<_> = (self.threads.iter())
            .map(|(name, thread)| (name, ask(thread)))
            .collect();
        let end = Instant::now() + TIMEOUT;
        asked
            .into_iter()
            .map(|(name, reports)| ThreadReport {
                name: name.clone(),
                queues: reports.and_then(|reports| {
                    let left = end.saturating_duration_since(Instant::now());
                    reports.recv_timeout(left).ok()
                }),
            })
            .collect()
    }
}
