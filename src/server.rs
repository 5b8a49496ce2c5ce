//! Composition root: the start-up order, top to bottom, once.
//!
//! The process is split in two on the way, before it has a second thread: what lies outside of the
//! sandbox is had before, and what serves a guest after. `docs/sandbox.md` says why in this order.
//! The invariant: whatever a session took (threads, descriptors, mappings) is given back before
//! the next one begins, unless it is left to another process.

mod control_group;
mod exec_handover;
mod limits;
mod parent_process;
mod predecessor;
mod state_file;
mod upgrade;

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use rustix::io::Errno;

use crate::config::{Config, Descriptors, Listen};
use crate::device::Device;
use crate::fs::passthrough::{self, InodeFileHandles, MigrationMode, Passthrough, Shared};
use crate::fuse::{Session, SessionOptions};
use crate::io::{Choice, Chosen, Engine, RuntimeError};
use crate::sandbox::{self, Filter, FilterError, ForkResult, Inside, Needs, SandboxError, Serving};
use crate::state::{StateError, Table};
use crate::vhost_user::{
    self, DeviceState, End, ListenError, Listener, Runner, SessionError, SessionSnapshot, Stop,
};
use crate::virtqueue::{Queue, QueueIndex};
use crate::worker::{Threads, ThreadsError, WorkerPool, WorkerPoolError};

pub use self::exec_handover::{ExecHandover, ExecHandoverError};
pub use self::limits::{LimitError, explain, raise_limits};
pub use self::parent_process::{ParentProcess, Watched};
pub use self::upgrade::{AskError, ask, check_for_upgrade};

use self::state_file::{Kept, State};

/// Why the server can't start, or can't go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The runtime asked for can't be had.
    #[error("choosing the runtime")]
    Runtime(#[from] RuntimeError),
    /// The directory can't be shared.
    #[error("sharing {path}")]
    Share {
        /// Which directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: passthrough::PassthroughError,
    },
    /// The limit of open descriptors can't be set.
    #[error(
        "setting the limit of open descriptors to {limit}: beyond the hard limit (`ulimit -Hn`) \
         it needs CAP_SYS_RESOURCE, and never goes beyond /proc/sys/fs/nr_open"
    )]
    Descriptors {
        /// To what.
        limit: u64,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// A limit of the launcher's that the server would die of.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// There is nothing to listen on.
    #[error("listening for the VMM")]
    Listen(#[from] ListenError),
    /// The server can't be kept in.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The server can't be kept to its system calls.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The state file can't be used.
    #[error("--state: can't open {path}")]
    StateFile {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: Errno,
    },
    /// Another user could change it.
    #[error(
        "--state: {path} belongs to user {user}, who could change what it says: give it to the \
         server's user, or remove it"
    )]
    StateOwner {
        /// Which file.
        path: PathBuf,
        /// Whose.
        user: u32,
    },
    /// Another process uses it.
    #[error("--state: {0} is another server's, which is still running: give each its own")]
    StateInUse(PathBuf),
    /// It is no table, or a damaged one.
    #[error(
        "--state: can't go on from {path}; where no guest is to go on from it, remove it and start \
         again"
    )]
    InStateFile {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: StateError,
    },
    /// It was made for another device.
    #[error("--state: {path} was made with --request-queues {queues}: give that, or remove it")]
    StateQueues {
        /// Which file.
        path: PathBuf,
        /// For how many.
        queues: usize,
    },
    /// What the guest holds can't be written down.
    #[error(transparent)]
    State(#[from] StateError),
    /// The table has no second descriptor.
    #[error("keeping the table of what a session holds for the next process")]
    Keep(#[source] io::Error),
    /// What an earlier process has left can't be sorted.
    #[error("closing what the process that served before has left open")]
    Leftovers(#[source] io::Error),
    /// What an earlier program in this process has left is not there.
    #[error("taking over from the program that ran before")]
    ExecHandover(#[from] ExecHandoverError),
    /// The guardian can't wait.
    #[error("waiting for the process that serves")]
    Watch(#[source] io::Error),
    /// Waiting for connections failed.
    #[error("waiting for the VMM to connect")]
    Accept(#[source] io::Error),
    /// A session's threads can't be had.
    #[error("starting to serve the VMM that has connected")]
    WorkerPool(#[from] WorkerPoolError),
    /// No session's threads could be had.
    #[error("trying whether the threads that serve a VMM can be had")]
    UpgradeAttempt(#[from] ThreadsError),
}

/// Which of the two processes this is from now on.
#[derive(Debug)]
pub enum Started {
    /// The one that the launcher knows.
    Outside(ParentProcess),
    /// The one that serves.
    Inside(Box<Server>),
}

/// How a server's run is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It has served.
    Ended,
    /// Another process goes on. All has to stay open: [`Server::leave`] is what is to be done.
    Left,
}

/// A server: one shared directory, one session at a time.
#[derive(Debug)]
pub struct Server {
    device: Device,
    workers: NonZeroUsize,
    runtime: Chosen,
    /// Whether the runtime may be another one where that can't be had.
    any_runtime: bool,
    fs: Arc<Passthrough>,
    listener: Listener,
    poll: Duration,
    session: SessionOptions,
    once: bool,
    /// What the guest holds outlives this process.
    keeps: bool,
    filter: Filter,
    /// Another process goes on should this one be killed.
    supervised: bool,
    /// No other process has served before.
    first: bool,
    /// This process, or one before it, has told that a VMM can connect.
    has_waited: bool,
    /// The session that the process before has left.
    left: Option<SessionSnapshot>,
    serving: Serving,
}

/// What is had before the process is split: for each process that serves, if one follows the other.
#[derive(Debug)]
struct ServerResources {
    config: Config,
    runtime: Chosen,
    listener: Listener,
    state: State,
}

impl Server {
    /// Gets everything ready, and splits the process in two; see [`sandbox::begin`] for when this
    /// may be called. The one that serves keeps `log`, which its log is written to, if that is
    /// not standard error. `past` is what an earlier program in this process has left.
    ///
    /// # Errors
    ///
    /// Something that the configuration asks for is not to be had on this host. Either process
    /// may get one; the other has ended then, or tells so by the way it ends.
    pub fn start(
        mut config: Config,
        log: Option<BorrowedFd<'_>>,
        past: Option<ExecHandover>,
    ) -> Result<Started, ServerError> {
        limits::fit(&mut config);
        if let Some(past) = past {
            return ParentProcess::take_over(config, log, past);
        }
        let resources = ServerResources::new(config)?;
        if resources.config.supervise {
            return ParentProcess::supervise(resources, log);
        }
        match sandbox::begin(&resources.config.sandbox, &resources.keep(log))? {
            ForkResult::Outside(guardian) => Ok(Started::Outside(ParentProcess::waiting(
                guardian,
                resources.listener.into_file(),
            ))),
            ForkResult::Inside(inside) => {
                resources.serve(inside).map(Box::new).map(Started::Inside)
            }
        }
    }

    /// Lets the signals come that end a server, which [`start`](Self::start) holds: to be called
    /// once they make the descriptor readable that [`run`](Self::run) is given.
    ///
    /// # Errors
    ///
    /// Whatever a seccomp filter of the launcher says.
    pub fn release_signals(&self) -> io::Result<()> {
        if self.is_supervised() {
            sandbox::release_hangup()?;
        }
        sandbox::release_signals()
    }

    /// Whether another process goes on should this one be killed. It asks this one to leave by
    /// `SIGHUP`.
    #[must_use]
    pub fn is_supervised(&self) -> bool {
        self.supervised
    }

    /// Ends the process, after a [`run`](Self::run) that is [`Exit::Left`].
    pub fn leave(self) -> ! {
        sandbox::leave(parent_process::LEFT)
    }

    /// Serves one VMM after the other until `stop` becomes readable, or, if so configured, only
    /// the first; beginning with the one that an earlier process has left. From here on the calling
    /// thread makes the server's system calls and no others. `leave` says that, when `stop` becomes
    /// readable, another process is to go on.
    ///
    /// # Errors
    ///
    /// Connections can't be taken any more, or the host has no threads for a session. What a
    /// VMM does wrong ends its session and is logged.
    pub fn run(&mut self, stop: BorrowedFd<'_>, leave: &AtomicBool) -> Result<Exit, ServerError> {
        limits::remember();
        self.filter.install()?;
        sandbox::forget_set_up();
        // Should this process be killed, the next server needs both, and the guest's files may take
        // the kernel seconds.
        self.listener.close_first();
        if self.keeps {
            self.fs.table().close_first();
        }
        let stop = Stop { asked: stop, leave };
        if let Some(record) = self.left.take() {
            let end = self.serve(stop, |device, service, table, stop| {
                vhost_user::resume(record, device, service, table, stop)
            })?;
            if let Some(over) = self.exit_after(end) {
                return Ok(over);
            }
        } else if self.first {
            self.try_threads()?;
        }
        loop {
            self.serving.tell();
            let name = self.listener.name();
            if std::mem::replace(&mut self.has_waited, true) {
                log::info!("ready for the next VMM on {name}");
            } else {
                // Launchers wait for these very words, and some for one line of them alone.
                log::info!("Waiting for vhost-user socket connection on {name}");
                self.fs.table().set_announced();
            }
            if vhost_user::wait_readable(&self.listener, stop.asked).map_err(ServerError::Accept)? {
                log::info!("asked to stop");
                let leaves = leave.load(std::sync::atomic::Ordering::Acquire);
                return Ok(if leaves { Exit::Left } else { Exit::Ended });
            }
            let stream = self.listener.accept().map_err(ServerError::Accept)?;
            log::info!("a VMM has connected");
            let end = self.serve(stop, |device, service, table, stop| {
                vhost_user::serve(stream, device, service, table, stop)
            });
            let end = match end {
                // There may be threads for the next one.
                Err(error @ ServerError::WorkerPool(_)) if !self.once => {
                    log::error!("{}", explain(&error));
                    End::Disconnected
                }
                end => end?,
            };
            if let Some(over) = self.exit_after(end) {
                return Ok(over);
            }
        }
    }

    fn exit_after(&self, end: End) -> Option<Exit> {
        match end {
            End::Left => Some(Exit::Left),
            End::Stopped => Some(Exit::Ended),
            End::Disconnected => self.once.then_some(Exit::Ended),
        }
    }

    /// Finds out now, when it can still be told to whoever starts the server, whether there are threads
    /// for a session.
    fn try_threads(&mut self) -> Result<(), ServerError> {
        // One for the high-priority queue.
        let count = self.workers.saturating_add(1);
        let try_out = |engine| Threads::start(count, engine, |_| async {}).and_then(Threads::join);
        match try_out(self.runtime.engine) {
            Err(error) if self.may_change_runtime(&error) => {
                log::warn!("runtime tokio: {}", explain(&error));
                self.runtime.engine = Engine::ThreadPool;
                Ok(try_out(Engine::ThreadPool)?)
            }
            tried => Ok(tried?),
        }
    }

    /// Whether another runtime may do what this one can't.
    fn may_change_runtime(&self, error: &ThreadsError) -> bool {
        let of_ring = ThreadsError::is_of_ring(error);
        of_ring && self.any_runtime && self.runtime.engine == Engine::Uring
    }

    /// A crew for a session. What the one before had, or other servers of the same user, may be in
    /// the way for a moment.
    fn pool(
        &self,
        session: &Arc<Session<Passthrough>>,
    ) -> Result<WorkerPool<Passthrough>, ServerError> {
        const TRIES: usize = 5;
        const PAUSE: Duration = Duration::from_millis(20);
        let start =
            |engine| WorkerPool::start(Arc::clone(session), self.workers, engine, self.poll);
        let mut tries = 1;
        loop {
            let error = match start(self.runtime.engine) {
                Ok(pool) => return Ok(pool),
                Err(error) => error,
            };
            match &error {
                _ if tries < TRIES => {}
                WorkerPoolError::Threads(of_threads) if self.may_change_runtime(of_threads) => {
                    log::warn!("runtime tokio for this session: {}", explain(&error));
                    return Ok(start(Engine::ThreadPool)?);
                }
                _ => return Err(error.into()),
            }
            tries += 1;
            std::thread::sleep(PAUSE);
        }
    }

    /// Serves one VMM until it disconnects, with a crew of its own.
    fn serve<'a>(
        &'a self,
        stop: Stop<'a>,
        talk: impl FnOnce(
            &'a Device,
            &mut Service<'a, Passthrough>,
            &'a Arc<Table>,
            Stop<'a>,
        ) -> Result<End, SessionError>,
    ) -> Result<End, ServerError> {
        let session = Session::new(Arc::clone(&self.fs), self.session.clone())
            .remembering(Arc::clone(self.fs.table()));
        if let Some(negotiated) = session.negotiated() {
            log::info!("the guest's session goes on: {negotiated}");
        }
        let pool = self.pool(&Arc::new(session))?;
        let kept = self.keeps && pool.session().negotiated().is_some();
        let mut service = Service {
            pool,
            serving: &self.serving,
            has_taken_over: false,
        };
        let end = talk(&self.device, &mut service, self.fs.table(), stop);
        // A connection that came to nothing is not that of the VMM for which the state is kept.
        let is_a_stranger = kept && !service.has_taken_over;
        let pool = service.pool;
        if matches!(end, Ok(End::Left)) {
            log::info!("asked to leave; all requests are answered");
            // Its threads end with the process.
            std::mem::forget(pool);
            return Ok(End::Left);
        }
        // A server that is asked to stop leaves to the next one what the guest holds.
        let stays = is_a_stranger || self.keeps && matches!(end, Ok(End::Stopped));
        let had = pool.session().negotiated().is_some();
        if !stays {
            pool.session().reset();
        }
        let malformed = pool.session().counters().malformed();
        if malformed != 0 {
            log::warn!("the guest has sent {malformed} malformed requests");
        }
        pool.shutdown();
        match &end {
            Ok(End::Stopped) => log::info!("asked to stop; the session is ended"),
            Ok(_) => log::info!("the VMM has disconnected"),
            Err(error) => log::error!("the session is ended: {}", explain(error)),
        }
        match (self.keeps && had, stays) {
            (false, _) => {}
            (true, true) if matches!(end, Ok(End::Stopped)) => {
                log::info!("what the guest holds is kept for the next server");
            }
            (true, true) => {
                log::warn!("no queue was started: what the guest holds is kept for its VMM");
            }
            (true, false) => log::warn!("what the guest held is given up, as its VMM has gone"),
        }
        Ok(end.unwrap_or(End::Disconnected))
    }
}

impl ServerResources {
    fn new(config: Config) -> Result<Self, ServerError> {
        let group = config.socket_group.clone();
        let listen: Box<dyn FnOnce() -> Result<Listener, ListenError>> = match &config.listen {
            Listen::Path(path) => {
                let path = path.clone();
                Box::new(move || {
                    let bind = || Listener::bind(&path);
                    let busy = |error: &ListenError| matches!(error, ListenError::InUse(_));
                    let listener = predecessor::wait_while(bind, busy)?;
                    if let Some(group) = group {
                        listener.admit_group(&group)?;
                    }
                    Ok(listener)
                })
            }
            Listen::Inherited(fd) => {
                // At once, before something of ours could get the number.
                let listener = Listener::inherited(*fd)?;
                Box::new(move || Ok(listener))
            }
        };
        let runtime = choose(&config)?;
        match config.descriptors {
            Descriptors::Inherited => {}
            Descriptors::Most => {
                passthrough::raise_descriptor_limit();
            }
            Descriptors::Limit(limit) => passthrough::set_descriptor_limit(limit)
                .map_err(|source| ServerError::Descriptors { limit, source })?,
        }
        // What can be known beforehand to fail leaves no socket.
        passthrough::check_shared(&config.shared_dir).map_err(|source| ServerError::Share {
            path: config.shared_dir.clone(),
            source,
        })?;
        limits::check(&config, state_file::limits(&config).bytes())?;
        let state = State::new(&config)?;
        Ok(Self {
            listener: listen()?,
            config,
            runtime,
            state,
        })
    }

    /// What every serving process has from the beginning.
    fn keep<'a>(&'a self, log: Option<BorrowedFd<'a>>) -> Vec<BorrowedFd<'a>> {
        let all = [log, Some(self.listener.as_fd()), self.state.file()];
        all.into_iter().flatten().collect()
    }

    /// What follows in the process that serves.
    fn serve(mut self, inside: Inside) -> Result<Server, ServerError> {
        self.listener.leave_file();
        let config = self.config;
        let limits = state_file::limits(&config);
        let unsettable = config
            .share
            .session
            .security_label
            .then(|| {
                let map = config.share.file_system.xattr_map.as_ref();
                passthrough::label_that_needs_privilege(map)
            })
            .flatten();
        let reserved_descriptors = reserved_descriptors(&config);
        let options = passthrough::Options {
            reserved_descriptors,
            ..config.share.file_system
        };
        let needs = Needs {
            readonly: options.readonly,
            file_handles: options.inode_file_handles != InodeFileHandles::Never
                || options.migration.mode == MigrationMode::FileHandles,
        };
        let (supervised, again) = (inside.is_supervised(), inside.is_again());
        let place = inside.enter(&config.shared_dir, needs)?;
        let Kept { table, past } = self.state.open(&limits, again)?;
        let has_waited = again && table.is_announced();
        let left = if again {
            sort_leftovers(&table, &place.descriptors)?
        } else {
            None
        };
        let shared = Shared {
            root: place.root,
            proc_fds: place.proc_fds,
            path: config.shared_dir.clone(),
        };
        let (mut fs, restored) =
            Passthrough::of(shared, options, &table, past.as_ref()).map_err(|source| {
                ServerError::Share {
                    path: config.shared_dir.clone(),
                    source,
                }
            })?;
        if past.is_some() {
            log::info!("going on from where another process ended: {restored}");
        }
        if let Some(file) = place.file {
            fs.is_for(file);
        }
        if let Some(name) = unsettable.filter(|_| !place.may_label) {
            log::warn!(
                "--security-label: the guest can make nothing that it has a label for (EPERM), as the \
                 server may not set {name} on the host: as root give --modcaps=+sys_admin, or keep the \
                 labels under another name with --xattrmap=:map:security.:user.guest.:"
            );
        }
        let action = config.sandbox.seccomp;
        let filter = Filter::new(action, self.runtime.engine, place.file_handles)?;
        Ok(Server {
            device: Device {
                tag: config.tag,
                request_queues: config.request_queues,
            },
            workers: config.workers,
            runtime: self.runtime,
            any_runtime: config.runtime == Choice::Auto,
            fs: Arc::new(fs),
            listener: self.listener,
            poll: config.poll,
            session: config.share.session,
            once: config.once,
            keeps: config.state.is_some(),
            filter,
            supervised,
            first: !again,
            has_waited,
            left,
            serving: place.serving,
        })
    }
}

fn choose(config: &Config) -> Result<Chosen, RuntimeError> {
    let runtime = crate::io::choose(config.runtime)?;
    log::info!("runtime {}: {}", runtime.engine, runtime.reason);
    Ok(runtime)
}

/// What the process before has left of its session, if it had one; everything else that it has left,
/// but `own` and what the table tells of, is closed. Done here, where the process has nothing any
/// more that it could be tricked out of: what it reads may have been written by a guest that had
/// taken the other one over.
fn sort_leftovers(table: &Table, own: &[RawFd]) -> Result<Option<SessionSnapshot>, ServerError> {
    let record = table
        .front()
        .and_then(|block| match SessionSnapshot::decode(&block) {
            Ok(record) if record.descriptors().iter().any(|fd| own.contains(fd)) => {
                log::error!("the session can't go on: it names a descriptor of the server's own");
                None
            }
            Ok(record) => Some(record),
            Err(error) => {
                log::error!("the session can't go on: {error}");
                None
            }
        });
    let mut keep = own.to_vec();
    keep.extend(table.descriptors());
    keep.extend(record.iter().flat_map(SessionSnapshot::descriptors));
    sandbox::close_all_but(&keep).map_err(ServerError::Leftovers)?;
    Ok(record)
}

/// How many descriptors a session needs however much its guest holds: a worker's runtime, and what a
/// request opens for a moment; what each queue is kicked and called by, the old and the new; and
/// what a message brings, of which there are copies while it is dealt with, beside all else.
fn reserved_descriptors(config: &Config) -> usize {
    const WORKER: usize = 8;
    const QUEUE: usize = 4;
    const OTHERS: usize = 64;
    let queues = usize::from(config.request_queues.get()) + 1;
    WORKER * config.workers.get() + QUEUE * queues + OTHERS
}

/// The workers, seen from the front.
struct Service<'a, F> {
    pool: WorkerPool<F>,
    serving: &'a Serving,
    /// The connection has started a queue, or has said what is to become of what the guest holds.
    has_taken_over: bool,
}

impl<F: crate::fs::FileSystem + std::fmt::Debug> Runner for Service<'_, F> {
    fn run(&mut self, queue: Queue, kick: Arc<OwnedFd>) -> io::Result<()> {
        // The guest goes on here, perhaps after all.
        self.pool.session().reacquire();
        self.pool.run(queue, kick)?;
        self.has_taken_over = true;
        Ok(())
    }

    fn stop(&mut self, index: QueueIndex) -> Option<u16> {
        self.pool.stop(index).map(|queue| queue.next_available())
    }

    fn reset(&mut self) {
        self.has_taken_over = true;
        if self.pool.session().negotiated().is_some() {
            log::info!("the VMM has reset the device: what the guest held is given up");
        }
        self.pool.session().reset();
    }

    fn resumed(&mut self) {
        log::info!("the session goes on");
        self.serving.tell();
    }

    fn device_state(&mut self) -> Arc<dyn DeviceState> {
        self.has_taken_over = true;
        Arc::new(Movable(Arc::clone(self.pool.session())))
    }
}

/// A guest's session, as `front` saves and loads it.
#[derive(Debug)]
struct Movable<F>(Arc<Session<F>>);

impl<F: crate::fs::FileSystem + std::fmt::Debug> DeviceState for Movable<F> {
    fn save(&self) -> Result<Vec<u8>, vhost_user::Cause> {
        Ok(self.0.save()?)
    }

    fn saved(&self) {
        self.0.release_for_migration();
    }

    fn load(&self, bytes: &[u8]) -> Result<(), vhost_user::Cause> {
        Ok(self.0.load(bytes)?)
    }
}

/// An error with its causes, in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
