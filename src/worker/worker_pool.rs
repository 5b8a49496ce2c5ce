//! The workers of one session: who serves which queue.
//!
//! The invariant: the high-priority queue has a thread of its own, so it never waits behind
//! requests.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedSender, WeakUnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use super::event_loop::{Backlog, Command, IdlePolicy, Loop};
use super::threads::{Threads, ThreadsError};
use crate::fs::FileSystem;
use crate::fuse::{Queues, Session};
use crate::io::Engine;
use crate::scheduler::{Placement, channel};
use crate::virtqueue::{Queue, QueueIndex};

/// How long to wait for the workers to serve what is on their queues: one of them may be held up by
/// the host.
const OTHERS: Duration = Duration::from_millis(100);

/// Why a crew can't start.
#[derive(Debug, thiserror::Error)]
pub enum WorkerPoolError {
    /// A thread or its runtime can't be had.
    #[error("starting the worker threads")]
    Threads(#[from] ThreadsError),
    /// The file system can't be used from a thread.
    #[error("preparing a worker thread for the file system")]
    Prepare(#[source] io::Error),
    /// A thread ended before it was ready; it has said why.
    #[error("a worker thread ended as it started")]
    Ended,
}

/// The threads of one session and the queues they serve.
pub struct WorkerPool<F: ?Sized> {
    session: Arc<Session<F>>,
    placement: Placement,
    /// The high-priority queue's thread first, then the workers.
    commands: Vec<UnboundedSender<Command>>,
    pools: Vec<Threads>,
}

impl<F: FileSystem + ?Sized> WorkerPool<F> {
    /// Starts `workers` threads with a runtime of `engine`, and one for the high-priority queue.
    /// Workers look at their rings for up to `poll` before they sleep.
    ///
    /// # Errors
    ///
    /// A thread or its runtime can't be had, or the file system refuses the thread.
    pub fn start(
        session: Arc<Session<F>>,
        workers: NonZeroUsize,
        engine: Engine,
        poll: Duration,
    ) -> Result<Self, WorkerPoolError> {
        let placement = Placement::new(workers);
        let mut pool = Self {
            session,
            placement,
            commands: Vec::new(),
            pools: Vec::new(),
        };
        // FORGET and INTERRUPT wait for nothing, so this thread needs no ring.
        pool.spawn(
            "ringfsd-high",
            NonZeroUsize::MIN,
            Engine::ThreadPool,
            IdlePolicy::ModerateKicks,
            || None,
        )?;
        let (give, take) = channel();
        let alone = workers == NonZeroUsize::MIN;
        let looks = IdlePolicy::BusyPoll(poll);
        pool.spawn("ringfsd-work", workers, engine, looks, move || {
            (!alone).then(|| Backlog {
                placement,
                give: give.clone(),
                take: take.clone(),
            })
        })?;
        let threads = pool.commands.iter().map(UnboundedSender::downgrade);
        let threads = QueueThreads(threads.collect());
        pool.session.set_queues(Box::new(threads));
        Ok(pool)
    }

    fn spawn(
        &mut self,
        name: &str,
        count: NonZeroUsize,
        engine: Engine,
        policy: IdlePolicy,
        backlog: impl Fn() -> Option<Backlog> + Clone + Send + 'static,
    ) -> Result<(), WorkerPoolError> {
        let (senders, receivers): (Vec<_>, Vec<_>) =
            (0..count.get()).map(|_| unbounded_channel()).unzip();
        let receivers: Vec<_> = receivers.into_iter().map(Some).collect();
        let receivers = Arc::new(Mutex::new(receivers));
        let session = Arc::clone(&self.session);
        let (ready, is_ready) = mpsc::channel();
        let pool = Threads::start_named(name, count, engine, move |worker| {
            let commands = receivers
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_mut(worker.id.0)
                .and_then(Option::take);
            let prepared = session.file_system().prepare_thread();
            let go = prepared.is_ok();
            // The starter waits for this, unless another thread has failed already.
            let _ = ready.send(prepared);
            let service = commands
                .filter(|_| go)
                .map(|commands| Loop::new(Arc::clone(&session), commands, backlog(), policy));
            async move {
                if let Some(service) = service {
                    service.run().await;
                }
            }
        })?;
        self.commands.extend(senders);
        self.pools.push(pool);
        for _ in 0..count.get() {
            match is_ready.recv() {
                Ok(prepared) => prepared.map_err(WorkerPoolError::Prepare)?,
                Err(mpsc::RecvError) => return Err(WorkerPoolError::Ended),
            }
        }
        Ok(())
    }

    /// Which thread owns a queue.
    fn owner(&self, index: QueueIndex) -> usize {
        match index.0.checked_sub(1) {
            None => 0,
            Some(request) => 1 + self.placement.owner(usize::from(request)).0,
        }
    }

    /// Serves `queue` from now on; `kick` tells of new chains.
    ///
    /// # Errors
    ///
    /// `kick` can't be waited for, or the thread is gone.
    pub fn run(&self, queue: Queue, kick: Arc<OwnedFd>) -> io::Result<()> {
        let (done, answer) = mpsc::channel();
        let owner = self.owner(queue.index());
        let queue = Box::new(queue);
        let command = Command::Run { queue, kick, done };
        let gone = || io::Error::other("the worker thread has ended");
        self.commands[owner]
            .send(command)
            .map_err(|_unsent| gone())?;
        answer.recv().map_err(|_ended| gone())?
    }

    /// Stops serving the queue and waits until all that was taken off it has been returned.
    /// Answers the queue, `None` if it wasn't being served.
    pub fn stop(&self, index: QueueIndex) -> Option<Queue> {
        let (done, answer) = mpsc::channel();
        let command = Command::Stop { index, done };
        self.commands[self.owner(index)].send(command).ok()?;
        let queue = answer.recv().ok()??;
        // What waits for another process of the guest would wait on.
        let _no_waits = self.session.end_waits();
        queue.used().drain();
        log::debug!("queue {index}: {}", queue.used().totals());
        Some(*queue)
    }

    /// The FUSE session that this crew serves.
    #[must_use]
    pub fn session(&self) -> &Arc<Session<F>> {
        &self.session
    }

    /// Ends all threads. Queues must have been stopped, or their guests wait in vain.
    pub fn shutdown(self) {
        drop(self.commands);
        for pool in self.pools {
            if let Err(error) = pool.join() {
                log::error!("{error}");
            }
        }
    }
}

/// All threads of a crew, the high-priority queue's first. They end though they can be asked.
#[derive(Debug)]
struct QueueThreads(Box<[WeakUnboundedSender<Command>]>);

impl Queues for QueueThreads {
    fn serve_waiting(&self) -> Pin<Box<dyn Future<Output = ()>>> {
        let ask = |thread: &WeakUnboundedSender<Command>| {
            let (done, is_done) = oneshot::channel();
            if let Some(commands) = thread.upgrade() {
                // A thread that has ended drops it, and that ends the wait.
                let _ = commands.send(Command::ServeWaiting { done });
            }
            is_done
        };
        let mut asked: VecDeque<_> = self.0.iter().map(ask).collect();
        Box::pin(async move {
            // The first never waits for the host.
            if let Some(high_priority) = asked.pop_front() {
                let _ = high_priority.await;
            }
            let others = async {
                for done in asked {
                    let _ = done.await;
                }
            };
            let _ = tokio::time::timeout(OTHERS, others).await;
        })
    }
}

impl<F: ?Sized> fmt::Debug for WorkerPool<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerPool")
            .field("threads", &self.commands.len())
            .finish_non_exhaustive()
    }
}
