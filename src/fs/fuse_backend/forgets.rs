//! Applies FORGETs in the background, in batches.
//!
//! FORGET has no reply, and the thread that serves it must not wait, so a thread of its own calls
//! the file system. It ends when there has been no FORGET for a second. Until the file system is
//! told, a node counts as looked up more often than the guest knows it, which does no harm. The
//! invariant: FORGETs are applied in order, and a waiter returns once all that were queued before
//! are applied.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long the thread waits for more before it ends.
const IDLE: Duration = Duration::from_secs(1);

/// Lookups to forget: nodes, by the file system's numbers, and how many of each.
pub(super) type Batch = Vec<(u64, u64)>;

/// Tells the file system.
type Apply = Box<dyn Fn(Batch) + Send>;

#[derive(Default)]
struct Queue {
    waiting: Batch,
    /// How many FORGETs were queued since the start, and how many of them are applied.
    queued: u64,
    applied: u64,
    thread: Option<JoinHandle<()>>,
    running: bool,
    finishing: bool,
}

/// FORGETs that are to be applied.
#[derive(Default)]
pub(super) struct Forgets {
    queue: Mutex<Queue>,
    /// Notified when there is work.
    work: Condvar,
    /// Notified when work is done.
    progress: Condvar,
}

impl Forgets {
    /// Queues a FORGET. The thread, if it has to be started, uses what `apply` returns.
    pub(super) fn push(self: &Arc<Self>, forget: (u64, u64), apply: impl FnOnce() -> Apply) {
        let mut queue = self.queue();
        queue.waiting.push(forget);
        queue.queued += 1;
        if queue.running {
            self.work.notify_one();
            return;
        }
        queue.running = true;
        queue.finishing = false;
        let (forgets, apply) = (Arc::clone(self), apply());
        let ended = queue.thread.take();
        let started = std::thread::Builder::new()
            .name(String::from("ringfsd-forget"))
            .spawn(move || forgets.run(&apply));
        match started {
            Ok(thread) => queue.thread = Some(thread),
            Err(error) => {
                // The next FORGET tries again, and so does whoever waits.
                log::debug!("can't start a thread for FORGETs: {error}");
                queue.running = false;
            }
        }
        drop(queue);
        join(ended);
    }

    /// Returns a function that waits for what is queued, if there is anything.
    pub(super) fn pending(self: &Arc<Self>) -> Option<Box<dyn FnOnce() + Send>> {
        let queue = self.queue();
        if queue.applied == queue.queued {
            return None;
        }
        let queued = queue.queued;
        drop(queue);
        let forgets = Arc::clone(self);
        Some(Box::new(move || forgets.wait(queued)))
    }

    /// Takes what is queued and not yet taken by the thread, after waiting for what it has taken.
    pub(super) fn take_rest(&self) -> Batch {
        let mut queue = self.queue();
        let rest = std::mem::take(&mut queue.waiting);
        queue.queued -= u64::try_from(rest.len()).unwrap_or(0);
        let queued = queue.queued;
        drop(queue);
        self.wait(queued);
        rest
    }

    /// Ends the thread, after all FORGETs.
    pub(super) fn finish(&self) {
        let mut queue = self.queue();
        queue.finishing = true;
        let thread = queue.thread.take();
        self.work.notify_one();
        drop(queue);
        join(thread);
    }

    fn run(&self, apply: &Apply) {
        let mut queue = self.queue();
        loop {
            let batch = std::mem::take(&mut queue.waiting);
            if !batch.is_empty() {
                drop(queue);
                let count = u64::try_from(batch.len()).unwrap_or(0);
                apply(batch);
                queue = self.queue();
                queue.applied += count;
                self.progress.notify_all();
                continue;
            }
            if queue.finishing {
                break;
            }
            let (again, timed_out) = self
                .work
                .wait_timeout(queue, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            queue = again;
            if timed_out.timed_out() && queue.waiting.is_empty() {
                break;
            }
        }
        queue.running = false;
        self.progress.notify_all();
    }

    /// Waits until this many FORGETs are applied, or nobody applies them.
    fn wait(&self, queued: u64) {
        let waiting = |queue: &mut Queue| queue.applied < queued && queue.running;
        let done = self.progress.wait_while(self.queue(), waiting);
        drop(done.unwrap_or_else(PoisonError::into_inner));
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for a thread that has ended, or is about to. It can't have panicked: what it calls of a
/// file system is guarded.
fn join(thread: Option<JoinHandle<()>>) {
    if let Some(thread) = thread {
        let _ = thread.join();
    }
}

impl fmt::Debug for Forgets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queue = self.queue();
        f.debug_struct("Forgets")
            .field("queued", &(queue.queued - queue.applied))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn waiter_returns_after_all_that_was_queued_before() {
        let forgets = Arc::new(Forgets::default());
        assert!(forgets.pending().is_none());
        let applied = Arc::new(Mutex::new(Vec::new()));
        let (begin, begun) = mpsc::channel::<()>();
        let begun = Arc::new(Mutex::new(begun));
        for node in 0..100 {
            let (applied, begun) = (Arc::clone(&applied), Arc::clone(&begun));
            forgets.push((node, 1), move || {
                Box::new(move |batch| {
                    // Each batch waits for the test.
                    let _ = begun.lock().unwrap().recv();
                    applied.lock().unwrap().extend(batch);
                })
            });
        }
        let wait = forgets.pending().unwrap();
        assert!(applied.lock().unwrap().is_empty());
        drop(begin);
        wait();
        let expected: Batch = (0..100).map(|node| (node, 1)).collect();
        assert_eq!(*applied.lock().unwrap(), expected);
        forgets.finish();
        assert_eq!(Arc::strong_count(&applied), 1, "the thread has ended");
    }

    #[test]
    fn rest_is_taken_once() {
        let forgets = Arc::new(Forgets::default());
        let applied = Arc::new(Mutex::new(Vec::new()));
        for node in 0..1000 {
            let applied = Arc::clone(&applied);
            forgets.push((node, 1), move || {
                Box::new(move |batch| applied.lock().unwrap().extend(batch))
            });
        }
        let rest = forgets.take_rest();
        assert!(forgets.pending().is_none());
        let all = [applied.lock().unwrap().clone(), rest].concat();
        assert_eq!(all, (0..1000).map(|node| (node, 1)).collect::<Batch>());
        forgets.finish();
    }
}
