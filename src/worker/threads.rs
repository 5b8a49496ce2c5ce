//! The threads: each with a runtime of its own, all running the same body.
//!
//! The invariant: either all workers of a pool have started or none has, and no thread outlives
//! its pool.

use std::future::Future;
use std::num::NonZeroUsize;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use thiserror::Error;

use crate::io::{Engine, Runtime, RuntimeError};
use crate::scheduler::WorkerId;

/// Why a pool could not be started, or how it ended.
#[derive(Debug, Error)]
pub enum ThreadsError {
    /// The system has no thread left for us.
    #[error("can't start the thread of worker {worker}")]
    Spawn {
        /// Which worker.
        worker: WorkerId,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A worker's runtime could not be set up.
    #[error("can't set up the runtime of worker {worker}")]
    Runtime {
        /// Which worker.
        worker: WorkerId,
        /// Why.
        #[source]
        source: RuntimeError,
    },
    /// Workers panicked; each has written its message to standard error.
    #[error("{} of the workers panicked, the first being worker {}", .0.len(), .0[0])]
    Panicked(Vec<WorkerId>),
}

impl ThreadsError {
    /// Whether it is a ring that can't be had.
    #[must_use]
    pub fn is_of_ring(&self) -> bool {
        let source = match self {
            Self::Runtime { source, .. } => source,
            Self::Spawn { .. } | Self::Panicked(_) => return false,
        };
        matches!(source, RuntimeError::Ring { .. })
    }
}

/// What a body is told about the worker it runs on.
#[derive(Clone, Copy, Debug)]
pub struct Worker {
    /// Which one.
    pub id: WorkerId,
    /// How many there are.
    pub workers: NonZeroUsize,
    /// The runtime it runs on.
    pub engine: Engine,
}

/// Worker threads. Dropping the pool waits for them to end, which they do when their bodies do.
#[derive(Debug)]
pub struct Threads {
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    /// Starts `workers` threads called `ringfsd-work-N`, each with a runtime of `engine`, and
    /// runs on each the future that `body` makes there. No body is called before every runtime
    /// is there.
    ///
    /// # Errors
    ///
    /// A thread or a runtime can't be had. No thread is left then, and no body has been called.
    pub fn start<B, F>(workers: NonZeroUsize, engine: Engine, body: B) -> Result<Self, ThreadsError>
    where
        B: Fn(Worker) -> F + Clone + Send + 'static,
        F: Future<Output = ()> + 'static,
    {
        Self::start_named("ringfsd-work", workers, engine, body)
    }

    /// As [`start`](Self::start), the threads called `name-N`.
    ///
    /// # Errors
    ///
    /// As for [`start`](Self::start).
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
        let mut pool = Self {
            threads: Vec::with_capacity(workers.get()),
        };
        // Dropped on the way out of an error, before `pool`, so that the threads end.
        let mut gates = Vec::with_capacity(workers.get());
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
                            // Whoever starts us waits for this.
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
            pool.threads.push(thread);
            gates.push((id, is_ready, gate));
        }
        for (id, is_ready, _) in &gates {
            let id = *id;
            match is_ready.recv() {
                Ok(Ok(())) => {}
                Ok(Err(source)) => return Err(ThreadsError::Runtime { worker: id, source }),
                Err(mpsc::RecvError) => return Err(ThreadsError::Panicked(vec![id])),
            }
        }
        for (_, _, gate) in gates {
            // A worker that is gone already shows when it is joined.
            let _ = gate.send(());
        }
        Ok(pool)
    }

    /// How many workers there are.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.threads.len()
    }

    /// Waits until every body has ended.
    ///
    /// # Errors
    ///
    /// [`ThreadsError::Panicked`], after all have ended, if any did so by a panic.
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
            // A pool that is dropped by one of its own workers can't wait for it.
            if thread.thread().id() != this && thread.join().is_err() {
                panicked.push(WorkerId(id));
            }
        }
        panicked
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.join_all();
    }
}
