//! Serves one file system to the VMMs that connect, one after the other.
//!
//! Owns the file system and how it is served: device, workers, engine. Knows neither where the file
//! system comes from nor which sandbox the process runs in. The invariant: whatever a session took
//! (threads, descriptors, mappings) is released before the next one begins, unless another process
//! continues it.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::counters;
use super::error::ServerError;
use super::limits::explain;
use super::live::Live;
use super::reporter::Reporter;
use crate::device::{BackChannel, Device};
use crate::fs::FileSystem;
use crate::fuse::{FileWatch, Session, SessionOptions, opcode_name};
use crate::io::{Choice, Chosen, Engine};
use crate::limits;
use crate::metrics::{Registry, Server, SessionState, Shape};
use crate::migration::DeviceState;
use crate::sandbox::{self, Serving};
use crate::state::{Limits, Table};
use crate::vhost_user::{self, End, Listener, Runner, SessionError, SessionSnapshot, Stop, Woken};
use crate::virtqueue::{Queue, QueueIndex};
use crate::worker::{Pings, StartingPool, ThreadsError, WorkerPool, WorkerPoolError};

/// How a server's run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It has served.
    Ended,
    /// Another process continues. Everything has to stay open: call [`Server::leave`](super::Server::leave).
    Left,
}

/// How a file system is served.
#[derive(Clone, Debug)]
pub struct ServiceOptions {
    /// The device that the VMM sees.
    pub device: Device,
    /// Threads that serve request queues.
    pub workers: NonZeroUsize,
    /// Which engine performs file operations that may wait.
    pub runtime: Choice,
    /// How long a worker polls its rings before it sleeps; zero disables polling.
    pub poll: Duration,
    /// What INIT offers to the guest.
    pub session: SessionOptions,
    /// Ends when the first VMM has disconnected.
    pub once: bool,
}

/// A file system and how it is served.
#[derive(Debug)]
pub struct Service {
    options: ServiceOptions,
    runtime: Chosen,
    fs: Arc<dyn FileSystem>,
    /// What the session holds, where that outlives the process.
    table: Arc<Table>,
    /// Counts what the server does.
    metrics: Arc<Registry>,
    /// The guest's state is kept for the next server.
    keeps: bool,
    /// To be told once a VMM is served, or can connect.
    serving: Serving,
    /// How often that is repeated while everything runs, if at all.
    heartbeat: Option<Duration>,
    /// This process, or one before it, has logged that a VMM can connect.
    has_waited: bool,
    live: Arc<Live>,
    file_watch: Arc<FileWatch>,
    reporter: Option<Reporter>,
    /// How much the guest may ask for.
    limits: Arc<limits::Limits>,
    /// Of the session of the first VMM, before that has connected.
    first_workers: Mutex<Option<Workers>>,
}

impl Service {
    /// Serves `fs` from memory of this process alone.
    ///
    /// # Errors
    ///
    /// The engine isn't available, or there is no memory for the rings' journals.
    pub fn new(fs: Arc<dyn FileSystem>, options: ServiceOptions) -> Result<Self, ServerError> {
        let runtime = crate::io::choose(options.runtime)?;
        let table = Table::for_this_process(&Limits {
            inodes: 0,
            handles: 0,
            queues: options.device.queues(),
        })?;
        let metrics = Registry::for_this_process(Shape {
            workers: options.workers.get(),
            queues: usize::from(options.device.queues()),
            operation: opcode_name,
        })?;
        Ok(Self::over(fs, options, runtime, table, metrics))
    }

    /// Serves `fs`, whose session is recorded in `table`. Reports to `metrics`.
    pub(super) fn over(
        fs: Arc<dyn FileSystem>,
        options: ServiceOptions,
        runtime: Chosen,
        table: Arc<Table>,
        metrics: Arc<Registry>,
    ) -> Self {
        counters::watch(&metrics, &fs);
        Self {
            metrics,
            options,
            runtime,
            fs,
            table,
            keeps: false,
            serving: Serving::default(),
            heartbeat: None,
            has_waited: false,
            live: Arc::default(),
            file_watch: Arc::default(),
            reporter: None,
            limits: Arc::default(),
            first_workers: Mutex::default(),
        }
    }

    /// The limits of what the guest may ask for.
    pub(super) fn limits(&self) -> &Arc<limits::Limits> {
        &self.limits
    }

    /// Limits how much the guest may ask for.
    pub(super) fn limited(mut self, limits: Arc<limits::Limits>) -> Self {
        self.limits = limits;
        self
    }

    /// Keeps the guest's state for the next server.
    pub(super) fn keeping(mut self, keeps: bool) -> Self {
        self.keeps = keeps;
        self
    }

    /// Reports to `serving`, and does so again every `heartbeat`; `has_waited` says that a process
    /// before this one has logged that a VMM can connect.
    pub(super) fn reporting(
        mut self,
        serving: Serving,
        heartbeat: Option<Duration>,
        has_waited: bool,
    ) -> Self {
        self.serving = serving;
        self.heartbeat = heartbeat;
        self.has_waited = has_waited;
        self
    }

    /// Lets `reporter` log a report when the server isn't stopped but asked for one.
    pub(super) fn report_by(&mut self, reporter: Reporter) {
        self.reporter = Some(reporter);
    }

    fn reports(&self) -> bool {
        self.reporter.as_ref().is_some_and(Reporter::report)
    }

    /// Counts requests by file, if it is switched on.
    pub(super) fn file_watch(&self) -> &Arc<FileWatch> {
        &self.file_watch
    }

    /// What is served at this moment.
    pub(super) fn live(&self) -> &Arc<Live> {
        &self.live
    }

    /// The file system that is served.
    pub(super) fn file_system(&self) -> &Arc<dyn FileSystem> {
        &self.fs
    }

    /// The engine of the workers.
    pub(super) fn engine(&self) -> Engine {
        self.runtime.engine
    }

    /// The table of what the session holds.
    pub(super) fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// What counts what the server does.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Registry> {
        &self.metrics
    }

    /// Whether the guest's state is kept for the next server.
    pub(super) fn keeps(&self) -> bool {
        self.keeps
    }

    /// Serves the VMMs that connect to `listener`, one after the other, until `stop` is readable, or
    /// only the first if so configured.
    ///
    /// # Errors
    ///
    /// Connections can't be accepted any more, or the host has no threads for a session. What a VMM does
    /// wrong ends its session and is logged.
    pub fn run(&mut self, listener: &Listener, stop: Stop<'_>) -> Result<Exit, ServerError> {
        loop {
            self.report();
            let name = listener.name();
            if std::mem::replace(&mut self.has_waited, true) {
                log::info!("ready for the next VMM on {name}");
            } else {
                // Launchers wait for these very words, and some for one line of them alone.
                log::info!("Waiting for vhost-user socket connection on {name}");
                self.table.set_announced();
            }
            let woken = self.wait_for_vmm(listener, stop);
            if woken.map_err(ServerError::Accept)? == Woken::Stop {
                log::info!("asked to stop");
                let workers = self.take_first_workers();
                if stop.leaves() {
                    // They end with the process.
                    std::mem::forget(workers);
                    return Ok(Exit::Left);
                }
                if let Some(workers) = workers {
                    workers.shutdown();
                }
                return Ok(Exit::Ended);
            }
            let stream = listener.accept().map_err(ServerError::Accept)?;
            self.metrics.count(Server::Connections);
            log::info!("a VMM has connected");
            let end = self.serve(stop, |device, runner, table, stop| {
                vhost_user::serve(stream, device, runner, table, stop)
            });
            let end = match end {
                // There may be threads for the next one.
                Err(error @ ServerError::WorkerPool(_)) if !self.options.once => {
                    log::error!("{}", explain(&error));
                    End::Disconnected
                }
                end => end?,
            };
            if let Some(exit) = self.exit_after(end) {
                return Ok(exit);
            }
        }
    }

    fn report(&self) {
        // First, so that whoever learns that it serves finds the restart counted.
        self.metrics.serves(sandbox::now());
        self.serving.report();
    }

    /// Waits for the next VMM to connect.
    fn wait_for_vmm(&self, listener: &Listener, stop: Stop<'_>) -> io::Result<Woken> {
        // Not while a VMM waits: its session does so later.
        let now = Some(Instant::now());
        if vhost_user::wait_readable(listener, stop.asked, now)? == Woken::Time {
            sandbox::forget_set_up();
        }
        loop {
            let time = self.heartbeat.map(|interval| Instant::now() + interval);
            match vhost_user::wait_readable(listener, stop.asked, time)? {
                Woken::Time => self.report(),
                Woken::Stop if self.reports() => {}
                woken => return Ok(woken),
            }
        }
    }

    /// Resumes the session that a previous process has left; returns how the server ends, if it does.
    pub(super) fn resume(
        &self,
        session: SessionSnapshot,
        stop: Stop<'_>,
    ) -> Result<Option<Exit>, ServerError> {
        let end = self.serve(stop, |device, runner, table, stop| {
            vhost_user::resume(session, device, runner, table, stop)
        })?;
        Ok(self.exit_after(end))
    }

    fn exit_after(&self, end: End) -> Option<Exit> {
        match end {
            End::Left => Some(Exit::Left),
            End::Stopped => Some(Exit::Ended),
            End::Disconnected => self.options.once.then_some(Exit::Ended),
        }
    }

    /// Creates the workers of the first session before a VMM has connected: it needn't wait for
    /// them then, and if the host has no threads for them, the error still reaches the launcher.
    /// They prepare themselves until [`finish_first_workers`](Self::finish_first_workers) waits for
    /// them.
    pub(super) fn begin_first_workers(&self) -> Result<StartingWorkers, ServerError> {
        let ServiceOptions { workers, poll, .. } = self.options;
        let session = Arc::new(self.new_session());
        let engine = self.runtime.engine;
        Ok(WorkerPool::begin(
            session,
            workers,
            engine,
            poll,
            &self.limits,
        )?)
    }

    /// Waits for the workers of the first session.
    pub(super) fn finish_first_workers(
        &mut self,
        starting: StartingWorkers,
    ) -> Result<(), ServerError> {
        let pool = match starting.finish() {
            Err(WorkerPoolError::Threads(error)) if self.may_change_engine(&error) => {
                self.metrics.count(Server::EngineFallbacks);
                log::warn!("runtime tokio: {}", explain(&error));
                self.runtime.engine = Engine::ThreadPool;
                self.begin_first_workers()?.finish()
            }
            started => started,
        };
        self.first_workers = Mutex::new(Some(pool?));
        Ok(())
    }

    /// Whether another engine may do what this one can't.
    fn may_change_engine(&self, error: &ThreadsError) -> bool {
        let of_ring = ThreadsError::is_of_ring(error);
        let may_choose = self.options.runtime == Choice::Auto;
        of_ring && may_choose && self.runtime.engine == Engine::Uring
    }

    /// Starts the workers of a session. If a resource is still used by the previous session, or by
    /// other servers of the same user, tries again for a short time.
    fn start_workers(
        &self,
        session: &Arc<Session<dyn FileSystem>>,
    ) -> Result<Workers, ServerError> {
        const TRIES: usize = 5;
        const PAUSE: Duration = Duration::from_millis(20);
        let ServiceOptions { workers, poll, .. } = self.options;
        let start = |engine| {
            WorkerPool::start_limited(Arc::clone(session), workers, engine, poll, &self.limits)
        };
        let mut tries = 1;
        loop {
            let error = match start(self.runtime.engine) {
                Ok(pool) => return Ok(pool),
                Err(error) => error,
            };
            match &error {
                _ if tries < TRIES => {}
                WorkerPoolError::Threads(of_threads) if self.may_change_engine(of_threads) => {
                    self.metrics.count(Server::EngineFallbacks);
                    log::warn!("runtime tokio for this session: {}", explain(&error));
                    return Ok(start(Engine::ThreadPool)?);
                }
                _ => return Err(error.into()),
            }
            tries += 1;
            std::thread::sleep(PAUSE);
        }
    }

    fn new_session(&self) -> Session<dyn FileSystem> {
        Session::new(Arc::clone(&self.fs), self.options.session.clone())
            .watched_by(Arc::clone(&self.file_watch))
            .remembering(Arc::clone(&self.table))
            .reporting_to(Arc::clone(&self.metrics))
    }

    fn take_first_workers(&self) -> Option<Workers> {
        let first = self.first_workers.lock();
        first.unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Serves one VMM until it disconnects, with workers of its own.
    fn serve<'a>(
        &'a self,
        stop: Stop<'a>,
        run: impl FnOnce(
            &'a Device,
            &mut SessionWorkers<'a>,
            &'a Arc<Table>,
            Stop<'a>,
        ) -> Result<End, SessionError>,
    ) -> Result<End, ServerError> {
        let first = self.take_first_workers();
        let pool = match first {
            Some(pool) => pool,
            None => self.start_workers(&Arc::new(self.new_session()))?,
        };
        pool.session().report_state();
        if let Some(negotiated) = pool.session().negotiated() {
            log::info!("the guest's session resumes: {negotiated}");
        }
        let kept = self.keeps && pool.session().negotiated().is_some();
        let mut workers = SessionWorkers {
            fs: &*self.fs,
            pool,
            serving: &self.serving,
            heartbeat: self.heartbeat.map(Heartbeat::new),
            has_taken_over: false,
            has_run: false,
            reporter: self.reporter.as_ref(),
            metrics: &self.metrics,
        };
        self.live.connected(&workers.pool);
        let end = run(&self.options.device, &mut workers, &self.table, stop);
        self.live.disconnected();
        // A connection that started no queue isn't that of the VMM for which the state is kept.
        let is_a_stranger = kept && !workers.has_taken_over;
        let pool = workers.pool;
        if matches!(end, Ok(End::Left)) {
            log::info!("asked to leave; all requests are answered");
            // Its threads end with the process.
            std::mem::forget(pool);
            return Ok(End::Left);
        }
        // A server that is asked to stop leaves the guest's state to the next one.
        let stays = is_a_stranger || self.keeps && matches!(end, Ok(End::Stopped));
        let had = pool.session().negotiated().is_some();
        if !stays {
            pool.session().reset();
        }
        let malformed = pool.session().counters().malformed();
        if malformed != 0 {
            log::warn!("the guest has sent {malformed} malformed requests");
        }
        pool.session().finish_mappings();
        pool.shutdown();
        self.metrics.set_session(SessionState::Waiting);
        match &end {
            Ok(End::Stopped) => log::info!("asked to stop; the session is ended"),
            Ok(_) => log::info!("the VMM has disconnected"),
            Err(error) => log::error!("the session is ended: {}", explain(error)),
        }
        match (self.keeps && had, stays) {
            (false, _) => {}
            (true, true) if matches!(end, Ok(End::Stopped)) => {
                log::info!("keeping the guest's state for the next server");
            }
            (true, true) => {
                log::warn!("no queue was started: keeping the guest's state for its VMM");
            }
            (true, false) => log::warn!("discarding the guest's state: its VMM has disconnected"),
        }
        Ok(end.unwrap_or(End::Disconnected))
    }
}

/// The workers of a session of any file system.
type Workers = WorkerPool<dyn FileSystem>;

/// The same while they prepare themselves.
pub(super) type StartingWorkers = StartingPool<dyn FileSystem>;

/// The workers of a session, as its vhost-user side sees them.
struct SessionWorkers<'a> {
    fs: &'a dyn FileSystem,
    pool: Workers,
    serving: &'a Serving,
    heartbeat: Option<Heartbeat>,
    metrics: &'a Registry,
    /// The connection has started a queue, or has decided what happens to the guest's state.
    has_taken_over: bool,
    /// The connection has started a queue.
    has_run: bool,
    reporter: Option<&'a Reporter>,
}

/// Checks periodically that the session's threads run.
#[derive(Debug)]
struct Heartbeat {
    interval: Duration,
    due: Instant,
    pings: Pings,
}

impl Heartbeat {
    fn new(interval: Duration) -> Self {
        Self {
            interval,
            due: Instant::now(),
            pings: Pings::default(),
        }
    }

    /// Once it is due: whether all threads have replied to the last pings. Those that haven't are
    /// given until the next time.
    fn beat(&mut self, workers: &Workers) -> bool {
        let now = Instant::now();
        if now < self.due {
            return false;
        }
        self.due = now + self.interval;
        let alive = self.pings.are_answered();
        if alive {
            self.pings = workers.ping();
        }
        alive
    }
}

impl Runner for SessionWorkers<'_> {
    fn run(&mut self, queue: Queue, kick: Arc<OwnedFd>) -> io::Result<()> {
        // The guest may continue here after a migration that failed.
        self.pool.session().reacquire();
        self.pool.run(queue, kick)?;
        if !self.has_run {
            self.has_run = true;
            sandbox::forget_set_up();
        }
        self.has_taken_over = true;
        Ok(())
    }

    fn stop(&mut self, index: QueueIndex) -> Option<u16> {
        self.pool.stop(index).map(|queue| queue.next_available())
    }

    fn reset(&mut self) {
        self.has_taken_over = true;
        if self.pool.session().negotiated().is_some() {
            log::info!("the VMM has reset the device: discarding the guest's state");
        }
        self.pool.session().reset();
    }

    fn connected(&mut self, channel: Arc<dyn BackChannel>) {
        self.fs.connected(&channel);
        self.pool.session().connected(&channel);
    }

    fn channel_opened(&mut self, resumed: bool) {
        self.pool.session().channel_opened(!resumed);
    }

    fn resumed(&mut self) {
        self.metrics.count(Server::Resumed);
        log::info!("the session has resumed");
        self.metrics.serves(sandbox::now());
        self.serving.report();
    }

    fn heartbeat(&mut self) -> Option<Instant> {
        let heartbeat = self.heartbeat.as_mut()?;
        if heartbeat.beat(&self.pool) {
            self.serving.report();
        }
        Some(heartbeat.due)
    }

    fn reports(&mut self) -> bool {
        self.reporter.is_some_and(Reporter::report)
    }

    fn can_migrate(&self) -> bool {
        self.fs.migrate().is_some()
    }

    fn device_state(&mut self) -> Arc<dyn DeviceState> {
        self.has_taken_over = true;
        Arc::clone(self.pool.session()) as _
    }
}
