//! Composition root: the start-up order, top to bottom, once.
//!
//! The process is split in two on the way, before it has a second thread. Files outside the sandbox
//! are opened before that, and everything that serves a guest is set up after it. `docs/sandbox.md` has the
//! reasons for the order. The invariant: whatever a session took (threads, descriptors, mappings) is
//! released before the next one begins, unless another process continues it.

mod control;
mod control_group;
mod control_socket;
mod controlled;
mod counters;
mod error;
mod file_system;
mod guest_limits;
mod limits;
mod live;
mod log_levels;
mod metrics_socket;
mod mounts;
mod parent_process;
mod pid_file;
mod rehearsal;
mod reporter;
mod service;
mod sources;
mod space;
mod temporary_cache;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use rustix::io::Errno;

use crate::config::{Config, Descriptors, Listen, Source};
use crate::control::Sockets;
use crate::device::Device;
use crate::error_chain;
use crate::fs::FileSystem;
use crate::io::{Chosen, RuntimeError};
use crate::metrics::{Interruption, SharedFile};
use crate::recovery::{
    self, ExecHandover, RecoveryError, Resources, ServiceManager, TableLocation,
};
use crate::sandbox::{self, Filter, ForkResult, ServingProcess};
use crate::state::{Limits, StateError, Table};
use crate::vhost_user::{ListenError, Listener, SessionSnapshot, SocketFile, Stop};

pub use self::controlled::Controlled;
pub use self::error::ServerError;
pub(crate) use self::limits::memory_of_control_group;
pub use self::limits::{LimitError, explain, raise_limits};
pub(crate) use self::parent_process::ParentProcess;
pub(crate) use self::rehearsal::{check_inherited, rehearse};
pub use self::service::{Exit, Service, ServiceOptions};
pub use self::space::SpaceError;
pub(crate) use self::space::check as check_space;

use self::control::{Facts, Handlers};
use self::file_system::{Built, Entered};
use self::log_levels::LogLevels;
use self::metrics_socket::MetricsSocket;
use self::mounts::Mounts;
use self::pid_file::PidFile;
use self::reporter::Reporter;
use self::temporary_cache::TemporaryCache;

/// Which of the two processes this is.
#[derive(Debug)]
pub enum Started {
    /// The process that the launcher has started.
    Guardian(ParentProcess),
    /// The serving process.
    Serving(Box<Server>),
}

/// A server: one shared directory, one session at a time.
#[derive(Debug)]
pub struct Server {
    service: Service,
    listener: Listener,
    filter: Filter,
    /// Another process resumes the session if this one is killed.
    supervised: bool,
    /// No process has served before this one.
    first: bool,
    /// The session that the previous process has left.
    left: Option<SessionSnapshot>,
    /// Where the counters are read.
    metrics_socket: Option<OwnedFd>,
    control: ControlParts,
}

/// What the thread of the control socket is made of.
#[derive(Debug)]
struct ControlParts {
    listener: Option<Listener>,
    /// Readable when a signal asks for a report.
    reports: Option<UnixStream>,
    /// Without a thread: the socket that the server is stopped by, and whether it is to end.
    between: Option<(UnixStream, Arc<AtomicBool>)>,
    facts: Facts,
    mounts: Option<Mounts>,
    lacks_users: bool,
}

/// Makes the file system that is served of the one of the shared directory.
pub(crate) type Layer = fn(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>;

/// What is set up before the process is split, and what each serving process is made of.
#[derive(Debug)]
struct ServerResources {
    config: Config,
    runtime: Chosen,
    listener: Listener,
    state: TableLocation,
    pid_file: Option<PidFile>,
    control: Option<Listener>,
    metrics: Option<SharedFile>,
    metrics_socket: Option<MetricsSocket>,
    manager: ServiceManager,
    layer: Layer,
    caches: Vec<TemporaryCache>,
    started: Instant,
    /// The process that the launcher has started, and its user.
    launched: (u32, u32),
}

impl Server {
    /// Sets everything up, and splits the process in two; see [`sandbox::begin`] for when this may be
    /// called. The serving process keeps `log`, the file of its log, unless that is standard error.
    /// `handover` is what the previous program in this process has left.
    ///
    /// # Errors
    ///
    /// This host doesn't have something that the configuration asks for. Either process may return
    /// an error; the other one has ended then, or its exit status shows it.
    pub fn start(
        config: Config,
        log: Option<BorrowedFd<'_>>,
        past: Option<ExecHandover>,
    ) -> Result<Started, ServerError> {
        Self::start_with(|shared| shared, config, log, past)
    }

    /// As [`start`](Self::start), with a file system that `layer` makes of the one of the shared
    /// directory: in each process that serves, in its sandbox.
    ///
    /// # Errors
    ///
    /// As for `start`.
    pub fn start_with(
        layer: Layer,
        mut config: Config,
        log: Option<BorrowedFd<'_>>,
        handover: Option<ExecHandover>,
    ) -> Result<Started, ServerError> {
        limits::fit(&mut config);
        if let Some(handover) = handover {
            return ParentProcess::take_over(layer, config, log, handover);
        }
        let manager = ServiceManager::from_environment();
        config.sandbox.reports = manager.wants_reports();
        Self::split(ServerResources::new(config, layer, manager)?, log)
    }

    /// Splits the process in two.
    fn split(
        resources: ServerResources,
        log: Option<BorrowedFd<'_>>,
    ) -> Result<Started, ServerError> {
        if resources.config.supervise {
            return ParentProcess::supervise(resources, log);
        }
        match sandbox::begin(&resources.config.sandbox, &resources.keep(log))? {
            ForkResult::Guardian(guardian) => Ok(Started::Guardian(ParentProcess::waiting(
                guardian,
                [
                    resources.listener.into_file(),
                    resources.control.and_then(Listener::into_file),
                    resources.metrics_socket.and_then(MetricsSocket::into_file),
                ],
                resources.pid_file,
                resources.manager,
                resources.caches,
            ))),
            ForkResult::Serving(process) => resources
                .serve(process, None)
                .map(Box::new)
                .map(Started::Serving),
        }
    }

    /// Unblocks the signals that end a server, which [`start`](Self::start) has blocked. To be called
    /// once these signals make the descriptor readable that [`run`](Self::run) gets.
    ///
    /// # Errors
    ///
    /// A seccomp filter of the launcher forbids the call.
    pub fn release_signals(&self) -> io::Result<()> {
        if self.is_supervised() {
            sandbox::release_hangup()?;
        }
        sandbox::release_signals()
    }

    /// Whether another process resumes the session if this one is killed. That process sends
    /// `SIGHUP` to ask this one to leave the session to it.
    #[must_use]
    pub fn is_supervised(&self) -> bool {
        self.supervised
    }

    /// Whether a thread serves a control socket.
    #[must_use]
    pub fn is_controlled(&self) -> bool {
        self.control.listener.is_some()
    }

    /// Logs a summary whenever `asked` becomes readable, on the thread of the control socket.
    pub fn reports_on(&mut self, asked: UnixStream) {
        self.control.reports = Some(asked);
    }

    /// Logs a summary whenever `stop`, the socket that [`run`](Self::run) is stopped by, becomes
    /// readable without the server being asked to end or to leave: `ending` is set before that. A
    /// thread for reports alone would take memory of every server.
    pub fn reports_between(&mut self, stop: UnixStream, ending: Arc<AtomicBool>) {
        self.control.between = Some((stop, ending));
    }

    /// Ends the process, after a [`run`](Self::run) that is [`Exit::Left`].
    pub fn leave(self) -> ! {
        sandbox::leave(recovery::LEFT)
    }

    /// Serves one VMM after the other until `stop` becomes readable, or, if so configured, only the
    /// first. Begins with the session that the previous process has left. From here on the calling
    /// thread makes the server's system calls and no others. `leave` says that another process
    /// resumes the session when `stop` becomes readable.
    ///
    /// # Errors
    ///
    /// Connections can't be accepted any more, or the host has no threads for a session. What a VMM
    /// does wrong ends its session and is logged.
    pub fn run(&mut self, stop: BorrowedFd<'_>, leave: &AtomicBool) -> Result<Exit, ServerError> {
        let left = self.prepare()?;
        if let Some(socket) = self.metrics_socket.take() {
            let metrics = Arc::clone(self.service.metrics());
            crate::metrics::serve(socket, metrics).map_err(ServerError::MetricsThread)?;
        }
        let stop = Stop { asked: stop, leave };
        self.start_control()?;
        if let Some(session) = left
            && let Some(exit) = self.service.resume(session, stop)?
        {
            return Ok(exit);
        }
        self.service.run(&self.listener, stop)
    }

    /// Does all that can fail before the server serves. Returns the session that the previous process
    /// has left.
    fn prepare(&mut self) -> Result<Option<SessionSnapshot>, ServerError> {
        limits::save();
        // The next server needs both if this process is killed, and closing the guest's files may
        // take the kernel seconds. Not beside other threads: the kernel waits for all processors
        // before it gives several threads a larger table of descriptors.
        self.listener.close_first();
        if self.service.keeps() {
            self.service.table().close_first();
        }
        // They prepare themselves meanwhile. The filter applies to all threads.
        let workers = match self.left.is_none() && self.first {
            true => Some(self.service.begin_first_workers()?),
            false => None,
        };
        self.filter.install()?;
        if let Some(workers) = workers {
            self.service.finish_first_workers(workers)?;
        }
        Ok(self.left.take())
    }

    /// Starts the thread that serves the control socket and reports, if there is anything for it to
    /// do.
    fn start_control(&mut self) -> Result<(), ServerError> {
        let log_levels = LogLevels::in_table(self.service.table(), !self.first);
        let parts = &mut self.control;
        let sockets = Sockets {
            listener: parts.listener.take().map(Listener::into_socket),
            reports: parts.reports.take(),
            lacks_users: parts.lacks_users,
        };
        let mut facts = parts.facts.clone();
        facts.serving = Instant::now();
        facts.engine = self.service.engine().to_string();
        let handlers = handlers(&self.service, facts, parts.mounts.take(), log_levels);
        if sockets.listener.is_none() {
            if let Some((stop, ending)) = parts.between.take() {
                let reporter = Reporter::new(stop, ending, handlers);
                self.service.report_by(reporter);
            }
            return Ok(());
        }
        crate::control::start(sockets, Box::new(handlers)).map_err(ServerError::ControlThread)
    }
}

impl ServerResources {
    fn new(mut config: Config, layer: Layer, manager: ServiceManager) -> Result<Self, ServerError> {
        let group = config.socket_group.clone();
        let passed = match &config.listen {
            Listen::Path(path) => recovery::passed_listener(path)?,
            Listen::Inherited(_) => None,
        };
        let listen: Box<dyn FnOnce() -> Result<Listener, ListenError>> = match &config.listen {
            Listen::Path(path) => {
                let path = path.clone();
                let replaces = config.replaces_files;
                Box::new(move || {
                    if let Some(listener) = passed {
                        return Ok(listener);
                    }
                    let bind = || match replaces {
                        true => Listener::bind_over(&path),
                        false => Listener::bind(&path),
                    };
                    let busy = |error: &ListenError| matches!(error, ListenError::InUse(_));
                    let listener = recovery::wait_while(bind, busy)?;
                    if let Some(group) = group {
                        listener.admit_group(&group)?;
                    }
                    Ok(listener)
                })
            }
            Listen::Inherited(fd) => {
                // At once, before a file of the server's own could get the number.
                let listener = Listener::inherited(*fd)?;
                Box::new(move || Ok(listener))
            }
        };
        let runtime = choose(&config)?;
        set_descriptor_limit(&config)?;
        // What is known to fail leaves no socket behind.
        file_system::check(&config)?;
        limits::check(&config, table_limits(&config).bytes())?;
        if let (Some(limit), Source::Directory(path)) = (config.space, &config.source) {
            space::limit(path, limit)?;
        }
        let state = locate_table(&config)?;
        let metrics = counters::create(&config)?;
        let listener = listen()?;
        let metrics_socket = config.metrics.as_ref().map(MetricsSocket::bind);
        let metrics_socket = metrics_socket.transpose()?;
        // A launcher that waits for this file expects to be able to connect.
        let pid_file = PidFile::create(&config)?;
        let caches = TemporaryCache::make_for(&mut config.source)?;
        let control = config.control.as_deref().map(control_socket::bind);
        let control = control.transpose()?;
        Ok(Self {
            control,
            started: Instant::now(),
            launched: launched(None),
            listener,
            config,
            runtime,
            state,
            pid_file,
            metrics,
            metrics_socket,
            manager,
            layer,
            caches,
        })
    }
}

impl Resources for ServerResources {
    type Server = Server;
    type Error = ServerError;

    fn serve(
        mut self,
        process: ServingProcess,
        interruption: Option<Interruption>,
    ) -> Result<Server, ServerError> {
        self.listener.leave_file();
        if let Some(control) = &mut self.control {
            control.leave_file();
        }
        self.caches.drain(..).for_each(TemporaryCache::leave);
        let config = self.config;
        let limits = table_limits(&config);
        let (supervised, restarted) = (process.is_supervised(), process.is_restarted());
        // The guardian has it. A supervisor's descriptors are this process's, too.
        match self.pid_file.take() {
            Some(pid_file) if supervised => std::mem::forget(pid_file),
            pid_file => drop(pid_file),
        }
        let place = process.enter(&file_system::reach(&config), file_system::needs(&config))?;
        let opened = self.state.open(&limits, restarted)?;
        check_window(&config, &opened.table)?;
        let has_waited = restarted && opened.table.is_announced();
        let left = if restarted {
            recovery::sort_leftovers(&opened.table, &place.descriptors)?
        } else {
            None
        };
        let entered = Entered {
            root: place.root,
            file: place.file,
            trees: place.trees,
            proc_fds: place.proc_fds,
            file_handles: place.file_handles,
            may_label: place.may_label,
        };
        let Built { fs, table, mounts } = file_system::build(&config, entered, opened)?;
        let facts = facts(&config, &self.runtime, self.listener.name());
        let (pid, user) = self.launched;
        let control = ControlParts {
            listener: self.control,
            reports: None,
            between: None,
            facts: Facts {
                pid,
                user,
                started: self.started,
                restarted,
                supervised,
                ..facts
            },
            mounts,
            lacks_users: place.in_user_namespace,
        };
        let action = config.sandbox.seccomp;
        let filter = Filter::new(
            action,
            self.runtime.engine,
            place.file_handles,
            config.source.has_image(),
        )?;
        let metrics = counters::open(&config, self.metrics.take(), &self.runtime)?;
        metrics.set_interruption(interruption);
        let metrics_socket = self.metrics_socket.take().map(MetricsSocket::into_socket);
        // Only a reader wants to know how long requests take.
        if metrics_socket.is_some() {
            metrics.keep_timed();
        }
        let options = ServiceOptions {
            device: Device {
                tag: config.tag,
                request_queues: config.request_queues,
                dax_window: (config.share.session.dax.as_ref()).map_or(0, |dax| dax.window),
                dax_fs_map: config.dax_fs_map,
            },
            workers: config.workers,
            runtime: config.runtime,
            poll: config.poll,
            session: config.share.session,
            once: config.once,
        };
        let fs = (self.layer)(fs);
        let limits = guest_limits::in_table(config.limits, &table, restarted);
        let service = Service::over(fs, options, self.runtime, table, metrics)
            .limited(limits)
            .keeping(config.state.is_some())
            .reporting(place.serving, self.manager.interval(), has_waited);
        Ok(Server {
            service,
            listener: self.listener,
            filter,
            supervised,
            first: !restarted,
            left,
            metrics_socket,
            control,
        })
    }

    fn keep<'a>(&'a self, log: Option<BorrowedFd<'a>>) -> Vec<BorrowedFd<'a>> {
        let all = [
            log,
            Some(self.listener.as_fd()),
            self.state.file(),
            self.metrics.as_ref().map(AsFd::as_fd),
            self.metrics_socket.as_ref().map(AsFd::as_fd),
            self.pid_file(),
            self.control.as_ref().map(AsFd::as_fd),
        ];
        all.into_iter().flatten().collect()
    }

    fn listener(&self) -> &Listener {
        &self.listener
    }

    fn remove_files(&mut self) {
        drop(self.listener.take_file());
        drop(self.control.as_mut().and_then(Listener::take_file));
        let socket = self.metrics_socket.as_mut();
        drop(socket.and_then(MetricsSocket::take_file));
    }

    fn metrics_socket(&self) -> Option<(BorrowedFd<'_>, Option<&SocketFile>)> {
        let socket = self.metrics_socket.as_ref()?;
        Some((socket.as_fd(), socket.file()))
    }

    fn control(&self) -> Option<&Listener> {
        self.control.as_ref()
    }

    fn user(&self) -> u32 {
        self.launched.1
    }

    fn state(&self) -> Option<BorrowedFd<'_>> {
        self.state.file()
    }

    fn metrics(&self) -> Option<BorrowedFd<'_>> {
        self.metrics.as_ref().map(AsFd::as_fd)
    }

    fn pid_file(&self) -> Option<BorrowedFd<'_>> {
        self.pid_file.as_ref().map(AsFd::as_fd)
    }
}

/// Sets the limit of open descriptors as configured.
fn set_descriptor_limit(config: &Config) -> Result<(), ServerError> {
    match config.descriptors {
        Descriptors::Inherited => {}
        Descriptors::Most => {
            file_system::raise_descriptor_limit();
        }
        Descriptors::AtLeast(limit) => {
            let raised = file_system::raise_descriptor_limit();
            if raised.is_some_and(|raised| raised < limit) {
                // Needs a privilege.
                let _ = file_system::set_descriptor_limit(limit);
            }
        }
        Descriptors::Limit(limit) => file_system::set_descriptor_limit(limit)
            .map_err(|source| ServerError::Descriptors { limit, source })?,
    }
    Ok(())
}

/// This process, and the user that it was started as: by its own account, unless it is in a user
/// namespace already.
fn launched(user: Option<u32>) -> (u32, u32) {
    let own = || rustix::process::geteuid().as_raw();
    (std::process::id(), user.unwrap_or_else(own))
}

/// What looks at `service`, and changes it, for clients of the control socket.
fn handlers(
    service: &Service,
    facts: Facts,
    mounts: Option<Mounts>,
    log_levels: LogLevels,
) -> Handlers {
    Handlers {
        facts,
        live: Arc::clone(service.live()),
        fs: Arc::downgrade(service.file_system()),
        metrics: Arc::downgrade(service.metrics()),
        measured_until: None,
        file_watch: Arc::clone(service.file_watch()),
        watched_until: None,
        limits: Arc::clone(service.limits()),
        mounts,
        log_levels,
    }
}

/// What a configuration says of a server.
fn facts(config: &Config, runtime: &Chosen, socket: &str) -> Facts {
    let now = Instant::now();
    Facts {
        pid: 0,
        user: 0,
        started: now,
        serving: now,
        restarted: false,
        supervised: config.supervise,
        socket: socket.to_owned(),
        source: config.source.to_string(),
        source_option: config.source.option(),
        engine: runtime.engine.to_string(),
        engine_reason: runtime.reason.clone(),
        workers: config.workers.get(),
        request_queues: config.request_queues.get(),
        options: control::options(config),
    }
}

/// Checks that the mappings which a guest has are within the window.
fn check_window(config: &Config, table: &Arc<Table>) -> Result<(), ServerError> {
    let window = (config.share.session.dax.as_ref()).map_or(0, |dax| dax.window);
    let ends = table.mappings().into_iter().map(|record| {
        let mapping = record.fields();
        mapping.offset.saturating_add(mapping.len)
    });
    match ends.max() {
        Some(needed) if needed > window => Err(ServerError::Window { needed, window }),
        _ => Ok(()),
    }
}

fn choose(config: &Config) -> Result<Chosen, RuntimeError> {
    let runtime = crate::io::choose(config.runtime)?;
    log::info!("runtime {}: {}", runtime.engine, runtime.reason);
    Ok(runtime)
}

/// The sizes that the state table needs.
fn table_limits(config: &Config) -> Limits {
    let queues = config.request_queues.get().saturating_add(1);
    match &config.source {
        Source::Directory(_) => config.share.file_system.limits(queues),
        // Nothing of their sessions is recorded but requests.
        Source::Vfs(_) | Source::Overlay(_) | Source::Rafs(_) => Limits {
            inodes: 0,
            handles: 0,
            queues,
        },
    }
}

/// Opens or creates the state file, or a memfd, if a table has to outlive the serving process.
fn locate_table(config: &Config) -> Result<TableLocation, ServerError> {
    locate(config, TableLocation::new)
}

/// As [`locate_table`], by `open`.
fn locate(
    config: &Config,
    open: fn(Option<&Path>, bool, &Limits) -> Result<TableLocation, RecoveryError>,
) -> Result<TableLocation, ServerError> {
    let needed = table_limits(config);
    let size = limits::file_size();
    let located = limits::without_file_size_limit(|| {
        open(config.state.as_deref(), config.supervise, &needed)
    });
    located.map_err(|error| match (error, size) {
        (RecoveryError::InStateFile { source, .. } | RecoveryError::State(source), Some(limit))
            if matches!(
                source,
                StateError::Grow {
                    source: Errno::FBIG,
                    ..
                }
            ) =>
        {
            let needed = needed.bytes();
            ServerError::Limit(LimitError::FileSize { limit, needed })
        }
        (error, _) => error.into(),
    })
}

/// Whether this program can take over from the running one with the same arguments; `None` if it
/// isn't being tried for an upgrade, else the status to exit with.
#[must_use]
pub fn check_for_upgrade(config: &Config) -> Option<Result<u8, String>> {
    recovery::check_for_upgrade(config.supervise, || {
        let runtime = crate::io::choose(config.runtime);
        runtime.map_or_else(|error| Err(error_chain::one_line(&error)), |_| Ok(()))
    })
}
