//! Threads that each have a runtime of their own and run the same future.
//!
//! The invariant: either all threads of a pool have started or none has, and no thread outlives its
//! pool.

use std::future::Future;
use std::num::NonZeroUsize;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use thiserror::Error;

use crate::io::{Engine, Runtime, RuntimeError};
use crate::scheduler::WorkerId;

/// Why the threads couldn't be started, or how they ended.
#[derive(Debug, Error)]
pub enum ThreadsError {
    /// The system can't create another thread.
    #[error("can't start the thread of worker {worker}")]
    Spawn {
        /// The worker.
        worker: WorkerId,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A worker's runtime could not be set up.
    #[error("can't set up the runtime of worker {worker}")]
    Runtime {
        /// The worker.
        worker: WorkerId,
        /// The cause.
        #[source]
        source: RuntimeError,
    },
    /// Workers panicked; each has written its message to standard error.
    #[error("{} workers panicked, the first of them worker {}", .0.len(), .0[0])]
    Panicked(Vec<WorkerId>),
}

impl ThreadsError {
    /// Whether the cause is that no io_uring is available.
    #[must_use]
    pub fn is_of_ring(&self) -> bool {
        let source = match self {
            Self::Runtime { source, .. } => source,
            Self::Spawn { .. } | Self::Panicked(_) => return false,
        };
        matches!(source, RuntimeError::Ring { .. })
    }
}

/// Describes a worker to the body that runs on it.
#[derive(Clone, Copy, Debug)]
pub struct Worker {
    /// The worker's number.
    pub id: WorkerId,
    /// The number of workers.
    pub workers: NonZeroUsize,
    /// The engine of its runtime.
    pub engine: Engine,
}

/// A pool of worker threads. A thread ends when its body does; dropping the pool waits for all of
/// them.
#[derive(Debug)]
pub struct Threads {
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    /// Starts `workers` threads named `ringfsd-work-N`, each with a runtime of `engine`. Each calls
    /// `body` and runs the future that it returns. No body is called before all runtimes are set
    /// up.
    ///
    /// # Errors
    ///
    /// Fails if a thread or a runtime can't be created. Then no thread is left running, and no body
    /// was called.
    pub fn start<B, F>(workers: NonZeroUsize, engine: Engine, body: B) -> Result<Self, ThreadsError>
    where
        B: Fn(Worker) -> F + Clone + Send + 'static,
        F: Future<Output = ()> + 'static,
    {
        Self::start_named("ringfsd-work", workers, engine, body)
    }

    /// Starts threads as [`start`](Self::start) does, but names them `name-N`.
    ///
    /// # Errors
    ///
    /// Fails as [`start`](Self::start) does.
    pub fn start_named<B, F>(
        name: &str,
        workers: NonZeroUsize,
        engine: Engine,
        body: B,
    ) -> Result<Self, ThreadsError>
    where
        B: Fn(Worker) -> F + Clone + Send + 'static,
        F: Future<Output = ()> + 'static,
    {
        Self::begin(name, workers, engine, body)?.finish()
    }

    /// Creates threads as [`start_named`](Self::start_named) does, and doesn't wait for them: each
    /// sets up its runtime meanwhile.
    pub(super) fn begin<B, F>(
        name: &str,
        workers: NonZeroUsize,
        engine: Engine,
        body: B,
    ) -> Result<StartingThreads, ThreadsError>
    where
        B: Fn(Worker) -> F + Clone + Send + 'static,
        F: Future<Output = ()> + 'static,
    {
        let mut starting = StartingThreads {
            gates: Vec::with_capacity(workers.get()),
            threads: Self {
                threads: Vec::with_capacity(workers.get()),
            },
        };
        for id in (0..workers.get()).map(WorkerId) {
            let (ready, is_ready) = mpsc::channel();
            let (gate, is_open) = mpsc::channel();
            let worker = Worker {
                id,
                workers,
                engine,
            };
            let body = body.clone();
            let thread = thread::Builder::new()
                .name(format!("{name}-{id}"))
                .spawn(move || {
                    let runtime = match Runtime::new(engine) {
                        Ok(runtime) => runtime,
                        Err(e) => {
                            // `finish` waits for this.
                            let _ = ready.send(Err(e));
                            return;
                        }
                    };
                    let _ = ready.send(Ok(()));
                    if is_open.recv().is_ok() {
                        runtime.block_on(body(worker));
                    }
                })
                .map_err(|source| ThreadsError::Spawn { worker: id, source })?;
            starting.threads.threads.push(thread);
            starting.gates.push(Gate { id, is_ready, gate });
        }
        Ok(starting)
    }

    /// Returns the number of workers.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.threads.len()
    }

    /// Waits until all bodies have ended.
    ///
    /// # Errors
    ///
    /// Returns [`ThreadsError::Panicked`], after all have ended, if any of them panicked.
    pub fn join(mut self) -> Result<(), ThreadsError> {
        match self.join_all() {
            panicked if panicked.is_empty() => Ok(()),
            panicked => Err(ThreadsError::Panicked(panicked)),
        }
    }

    fn join_all(&mut self) -> Vec<WorkerId> {
        let this = thread::current().id();
        let mut panicked = Vec::new();
        for (id, thread) in self.threads.drain(..).enumerate() {
            // A worker that drops its own pool can't wait for itself.
            if thread.thread().id() != this && thread.join().is_err() {
                panicked.push(WorkerId(id));
            }
        }
        panicked
    }
}

/// Threads that set up their runtimes. They end if this is dropped.
#[derive(Debug)]
pub(super) struct StartingThreads {
    // Dropped before `threads`, which waits for the threads: they end when their gates do.
    gates: Vec<Gate>,
    threads: Threads,
}

/// What a thread waits for before its body is called.
#[derive(Debug)]
struct Gate {
    id: WorkerId,
    is_ready: mpsc::Receiver<Result<(), RuntimeError>>,
    gate: mpsc::Sender<()>,
}

impl StartingThreads {
    /// Waits for all runtimes, and then lets each thread call its body.
    pub(super) fn finish(self) -> Result<Threads, ThreadsError> {
        let Self { gates, threads } = self;
        for Gate { id, is_ready, .. } in &gates {
            let id = *id;
            let error = match is_ready.recv() {
                Ok(Ok(())) => continue,
                Ok(Err(source)) => ThreadsError::Runtime { worker: id, source },
                Err(mpsc::RecvError) => ThreadsError::Panicked(vec![id]),
            };
            // `threads` waits for the other threads, which wait for these.
            drop(gates);
            return Err(error);
        }
        for Gate { gate, .. } in gates {
            // If the worker has ended already, joining it reports that.
            let _ = gate.send(());
        }
        Ok(threads)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.join_all();
    }
}
