//! The worker threads of one session, and the assignment of queues to them.
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

use super::command::Command;
use super::event_loop::{Backlog, EventLoop, IdlePolicy};
use super::observer::Observer;
use super::standby::Standby;
use super::threads::{StartingThreads, Threads, ThreadsError};
use crate::fs::FileSystem;
use crate::fuse::{Queues, Session, opcode_name};
use crate::io::Engine;
use crate::limits::Limits;
use crate::metrics::{MetricsError, Registry, Shape};
use crate::scheduler::{Placement, channel};
use crate::virtqueue::{Queue, QueueIndex};

/// How long to wait for the workers to serve the chains on their queues. The host may block one of
/// them for longer.
const SERVE_TIMEOUT: Duration = Duration::from_millis(100);

/// What the names of the threads begin with.
const HIGH_PRIORITY: &str = "ringfsd-high";
const WORKER: &str = "ringfsd-work";

/// Why a worker pool can't start.
#[derive(Debug, thiserror::Error)]
pub enum WorkerPoolError {
    /// A thread or its runtime can't be created.
    #[error("starting the worker threads")]
    Threads(#[from] ThreadsError),
    /// The file system can't prepare a thread.
    #[error("preparing a worker thread for the file system")]
    Prepare(#[source] io::Error),
    /// The workers can't wait for each other's queues.
    #[error("creating an epoll instance for the workers")]
    Standby(#[source] io::Error),
    /// There is no memory for the counters.
    #[error("counting what the worker threads do")]
    Metrics(#[from] MetricsError),
    /// A thread ended before it was ready, and has reported why.
    #[error("a worker thread ended while it was starting")]
    Ended,
}

/// The threads of one session and the queues they serve.
pub struct WorkerPool<F: ?Sized> {
    session: Arc<Session<F>>,
    placement: Placement,
    /// The command channels: first that of the high-priority queue's thread, then those of the
    /// workers.
    commands: Vec<UnboundedSender<Command>>,
    pools: Vec<Threads>,
}

impl<F: FileSystem + ?Sized> WorkerPool<F> {
    /// Starts `workers` threads with a runtime of `engine`, and one for the high-priority queue.
    /// Workers busy poll their rings for up to `poll` before they sleep.
    ///
    /// # Errors
    ///
    /// Fails if a thread or its runtime can't be created, or if the file system can't prepare it.
    pub fn start(
        session: Arc<Session<F>>,
        workers: NonZeroUsize,
        engine: Engine,
        poll: Duration,
    ) -> Result<Self, WorkerPoolError> {
        Self::start_limited(session, workers, engine, poll, &Arc::default())
    }

    /// As [`start`](Self::start), with `limits` of what the guest may ask for.
    ///
    /// # Errors
    ///
    /// As for `start`.
    pub fn start_limited(
        session: Arc<Session<F>>,
        workers: NonZeroUsize,
        engine: Engine,
        poll: Duration,
        limits: &Arc<Limits>,
    ) -> Result<Self, WorkerPoolError> {
        Self::begin(session, workers, engine, poll, limits)?.finish()
    }

    /// Creates the threads as [`start_limited`](Self::start_limited) does, and doesn't wait for
    /// them: they prepare themselves meanwhile.
    ///
    /// # Errors
    ///
    /// Fails if a thread can't be created.
    pub(crate) fn begin(
        session: Arc<Session<F>>,
        workers: NonZeroUsize,
        engine: Engine,
        poll: Duration,
        limits: &Arc<Limits>,
    ) -> Result<StartingPool<F>, WorkerPoolError> {
        let placement = Placement::new(workers);
        let metrics = match session.metrics() {
            Some(metrics) => Arc::clone(metrics),
            None => Registry::for_this_process(Shape {
                workers: workers.get(),
                queues: 0,
                operation: opcode_name,
            })?,
        };
        let mut starting = StartingPool {
            groups: Vec::new(),
            commands: Vec::new(),
            session,
            placement,
            limits: Arc::clone(limits),
            metrics,
        };
        // FORGET and INTERRUPT never wait for I/O, so this thread needs no io_uring.
        starting.spawn(
            HIGH_PRIORITY,
            NonZeroUsize::MIN,
            Engine::ThreadPool,
            IdlePolicy::ModerateKicks,
            || None,
        )?;
        let backlog = if workers == NonZeroUsize::MIN {
            None
        } else {
            let (sender, receiver) = channel();
            let standby = Standby::new().map_err(WorkerPoolError::Standby)?;
            Some(Backlog {
                placement,
                sender,
                receiver,
                standby: Arc::new(standby),
            })
        };
        let policy = IdlePolicy::BusyPoll(poll);
        starting.spawn(WORKER, workers, engine, policy, move || backlog.clone())?;
        Ok(starting)
    }

    /// Returns the index of the thread that owns a queue.
    fn owner(&self, index: QueueIndex) -> usize {
        match index.0.checked_sub(1) {
            None => 0,
            Some(request) => 1 + self.placement.owner(usize::from(request)).0,
        }
    }

    /// Starts serving `queue`. The guest announces new chains through `kick`.
    ///
    /// # Errors
    ///
    /// Fails if the thread can't wait for `kick`, or has ended.
    pub fn run(&self, queue: Queue, kick: Arc<OwnedFd>) -> io::Result<()> {
        let (done, outcome) = mpsc::channel();
        let owner = self.owner(queue.index());
        let queue = Box::new(queue);
        let command = Command::Run { queue, kick, done };
        let ended = || io::Error::other("the worker thread has ended");
        self.commands[owner]
            .send(command)
            .map_err(|_unsent| ended())?;
        outcome.recv().map_err(|_closed| ended())?
    }

    /// Stops serving the queue and waits until all chains taken off it have been returned. Returns
    /// the queue, or `None` if it wasn't being served.
    pub fn stop(&self, index: QueueIndex) -> Option<Queue> {
        let (done, stopped) = mpsc::channel();
        let command = Command::Stop { index, done };
        self.commands[self.owner(index)].send(command).ok()?;
        let queue = stopped.recv().ok()??;
        // A request that waits for another process of the guest might wait forever otherwise.
        let _no_waits = self.session.end_waits();
        queue.used().drain();
        log::debug!("queue {index}: {}", queue.used().stats());
        Some(*queue)
    }

    /// Asks every thread to show that its loop runs.
    #[must_use]
    pub fn ping(&self) -> Pings {
        let ping = |thread: &UnboundedSender<Command>| {
            let (done, is_done) = oneshot::channel();
            // A thread that has ended drops the command, which completes `is_done`.
            let _ = thread.send(Command::Ping { done });
            is_done
        };
        Pings(self.commands.iter().map(ping).collect())
    }

    /// Returns what the threads can be asked by while they run.
    #[must_use]
    pub fn observer(&self) -> Observer {
        let name = |thread: usize| match thread.checked_sub(1) {
            None => format!("{HIGH_PRIORITY}-0"),
            Some(worker) => format!("{WORKER}-{worker}"),
        };
        let threads = self.commands.iter().map(UnboundedSender::downgrade);
        let threads = threads.enumerate();
        Observer {
            threads: threads.map(|(at, thread)| (name(at), thread)).collect(),
        }
    }

    /// Returns the FUSE session that these workers serve.
    #[must_use]
    pub fn session(&self) -> &Arc<Session<F>> {
        &self.session
    }

    /// Ends all threads. All queues must have been stopped: requests on a queue that still runs are
    /// never served.
    pub fn shutdown(self) {
        drop(self.commands);
        for pool in self.pools {
            if let Err(error) = pool.join() {
                log::error!("{error}");
            }
        }
    }
}

/// The threads of a pool while they prepare themselves. They end if this is dropped.
pub(crate) struct StartingPool<F: ?Sized> {
    /// The threads by their names, each with where they report that they are prepared.
    groups: Vec<(StartingThreads, mpsc::Receiver<io::Result<()>>)>,
    commands: Vec<UnboundedSender<Command>>,
    session: Arc<Session<F>>,
    placement: Placement,
    limits: Arc<Limits>,
    metrics: Arc<Registry>,
}

impl<F: FileSystem + ?Sized> StartingPool<F> {
    /// Waits until all threads are ready.
    ///
    /// # Errors
    ///
    /// Fails if a runtime can't be created, or if the file system can't prepare a thread.
    pub(crate) fn finish(self) -> Result<WorkerPool<F>, WorkerPoolError> {
        let mut pool = WorkerPool {
            session: self.session,
            placement: self.placement,
            commands: self.commands,
            pools: Vec::new(),
        };
        let mut reports = Vec::new();
        for (starting, prepared) in self.groups {
            let threads = starting.finish()?;
            reports.push((threads.workers(), prepared));
            pool.pools.push(threads);
        }
        for (count, prepared) in reports {
            for _ in 0..count {
                match prepared.recv() {
                    Ok(prepared) => prepared.map_err(WorkerPoolError::Prepare)?,
                    Err(mpsc::RecvError) => return Err(WorkerPoolError::Ended),
                }
            }
        }
        let threads: Arc<[_]> = (pool.commands.iter())
            .map(UnboundedSender::downgrade)
            .collect();
        let watched = WeakThreads(Arc::clone(&threads));
        let clock = self.limits.clock();
        self.limits.watch(move |buckets| {
            watched.send(|| Command::Limit {
                buckets: buckets.clone(),
                clock,
            })
        });
        pool.session.set_queues(Box::new(QueueThreads {
            threads: WeakThreads(threads),
            limits: self.limits,
        }));
        Ok(pool)
    }

    /// Creates `count` threads.
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
        let (session, metrics) = (Arc::clone(&self.session), Arc::clone(&self.metrics));
        // The threads of the first call have the first numbers.
        let first = self.commands.len();
        let (ready, is_ready) = mpsc::channel();
        let threads = Threads::begin(name, count, engine, move |worker| {
            let commands = receivers
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_mut(worker.id.0)
                .and_then(Option::take);
            let prepared = session.file_system().prepare_thread();
            let is_prepared = prepared.is_ok();
            // `finish` waits for this, unless another thread has failed already.
            let _ = ready.send(prepared);
            let event_loop = commands.filter(|_| is_prepared).map(|commands| {
                let recorder = metrics.recorder(first + worker.id.0);
                EventLoop::new(Arc::clone(&session), commands, backlog(), policy, recorder)
            });
            async move {
                if let Some(event_loop) = event_loop {
                    event_loop.run().await;
                }
            }
        })?;
        self.commands.extend(senders);
        self.groups.push((threads, is_ready));
        Ok(())
    }
}

/// The replies that [`WorkerPool::ping`] waits for.
#[derive(Debug, Default)]
pub struct Pings(Vec<oneshot::Receiver<()>>);

impl Pings {
    /// Whether every thread has replied by now.
    pub fn are_answered(&mut self) -> bool {
        self.0.retain_mut(|reply| {
            matches!(reply.try_recv(), Err(oneshot::error::TryRecvError::Empty))
        });
        self.0.is_empty()
    }
}

/// The command channels of a pool's threads, that of the high-priority queue first. They are weak,
/// so they don't keep the threads from ending.
#[derive(Debug)]
struct WeakThreads(Arc<[WeakUnboundedSender<Command>]>);

impl WeakThreads {
    /// Sends a command to each thread. Returns whether there are any left.
    fn send(&self, command: impl Fn() -> Command) -> bool {
        let running = self.0.iter().filter_map(WeakUnboundedSender::upgrade);
        running
            .filter(|thread| thread.send(command()).is_ok())
            .count()
            != 0
    }
}

/// The threads, for what a request asks of them.
#[derive(Debug)]
struct QueueThreads {
    threads: WeakThreads,
    limits: Arc<Limits>,
}

impl Queues for QueueThreads {
    fn serve_waiting(&self) -> Pin<Box<dyn Future<Output = ()>>> {
        let request = |thread: &WeakUnboundedSender<Command>| {
            let (done, is_done) = oneshot::channel();
            if let Some(commands) = thread.upgrade() {
                // A thread that has ended drops the command, which completes `is_done`.
                let _ = commands.send(Command::ServeWaiting { done });
            }
            is_done
        };
        let mut pending: VecDeque<_> = self.threads.0.iter().map(request).collect();
        Box::pin(async move {
            // The high-priority queue's thread never waits for the host, so it needs no timeout.
            if let Some(high_priority) = pending.pop_front() {
                let _ = high_priority.await;
            }
            let others = async {
                for is_done in pending {
                    let _ = is_done.await;
                }
            };
            let _ = tokio::time::timeout(SERVE_TIMEOUT, others).await;
        })
    }

    fn interrupt(&self, unique: u64) {
        // Nothing else is held back.
        if self.limits.is_active() {
            self.threads.send(|| Command::Interrupt { unique });
        }
    }
}

impl<F: ?Sized> fmt::Debug for WorkerPool<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerPool")
            .field("threads", &self.commands.len())
            .finish_non_exhaustive()
    }
}

impl<F: ?Sized> fmt::Debug for StartingPool<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StartingPool")
            .field("threads", &self.commands.len())
            .finish_non_exhaustive()
    }
}
