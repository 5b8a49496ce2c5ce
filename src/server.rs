//! Composition root: the start-up order, top to bottom, once.
//!
//! The process is split in two on the way, before it has a second thread: what lies outside of the
//! sandbox is had before, and what serves a guest after. `docs/sandbox.md` says why in this order.
//! The invariant: whatever a session took (threads, descriptors, mappings) is given back before
//! the next one begins, unless it is left to another process.

mod control_group;
mod error;
mod exec_handover;
mod file_system;
mod limits;
mod parent_process;
mod predecessor;
mod service;
mod service_manager;
mod state_file;
mod upgrade;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::sync::atomic::AtomicBool;

use crate::config::{Config, Descriptors, Listen};
use crate::device::Device;
use crate::io::{Chosen, RuntimeError};
use crate::sandbox::{self, Filter, ForkResult, Inside};
use crate::state::Table;
use crate::vhost_user::{ListenError, Listener, SessionSnapshot, Stop};

pub use self::error::ServerError;
pub use self::exec_handover::{ExecHandover, ExecHandoverError};
pub use self::limits::{LimitError, explain, raise_limits};
pub use self::parent_process::{ParentProcess, Watched};
pub use self::service::{Exit, Service, ServiceOptions};
pub use self::upgrade::{AskError, ask, check_for_upgrade};

use self::file_system::{Built, Entered};
use self::service_manager::ServiceManager;
use self::state_file::State;

/// Which of the two processes this is from now on.
#[derive(Debug)]
pub enum Started {
    /// The one that the launcher knows.
    Outside(ParentProcess),
    /// The one that serves.
    Inside(Box<Server>),
}

/// A server: one shared directory, one session at a time.
#[derive(Debug)]
pub struct Server {
    service: Service,
    listener: Listener,
    filter: Filter,
    /// Another process resumes the session should this one be killed.
    supervised: bool,
    /// No other process has served before.
    first: bool,
    /// The session that the previous process has left.
    left: Option<SessionSnapshot>,
}

/// What is had before the process is split: for each process that serves, if one follows the other.
#[derive(Debug)]
struct ServerResources {
    config: Config,
    runtime: Chosen,
    listener: Listener,
    state: State,
    manager: ServiceManager,
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
        let manager = ServiceManager::from_environment();
        config.sandbox.reports = manager.wants_reports();
        let resources = ServerResources::new(config, manager)?;
        if resources.config.supervise {
            return ParentProcess::supervise(resources, log);
        }
        match sandbox::begin(&resources.config.sandbox, &resources.keep(log))? {
            ForkResult::Outside(guardian) => Ok(Started::Outside(ParentProcess::waiting(
                guardian,
                resources.listener.into_file(),
                resources.manager,
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
        if self.service.keeps() {
            self.service.table().close_first();
        }
        let stop = Stop { asked: stop, leave };
        if let Some(session) = self.left.take() {
            if let Some(exit) = self.service.resume(session, stop)? {
                return Ok(exit);
            }
        } else if self.first {
            self.service.try_threads()?;
        }
        self.service.run(&self.listener, stop)
    }
}

impl ServerResources {
    fn new(config: Config, manager: ServiceManager) -> Result<Self, ServerError> {
        let group = config.socket_group.clone();
        let passed = match &config.listen {
            Listen::Path(path) => service_manager::passed_listener(path)?,
            Listen::Inherited(_) => None,
        };
        let listen: Box<dyn FnOnce() -> Result<Listener, ListenError>> = match &config.listen {
            Listen::Path(path) => {
                let path = path.clone();
                Box::new(move || {
                    if let Some(listener) = passed {
                        return Ok(listener);
                    }
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
                file_system::raise_descriptor_limit();
            }
            Descriptors::Limit(limit) => file_system::set_descriptor_limit(limit)
                .map_err(|source| ServerError::Descriptors { limit, source })?,
        }
        // What can be known beforehand to fail leaves no socket.
        file_system::check(&config)?;
        limits::check(&config, state_file::limits(&config).bytes())?;
        let state = State::new(&config)?;
        Ok(Self {
            listener: listen()?,
            config,
            runtime,
            state,
            manager,
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
        let (supervised, again) = (inside.is_supervised(), inside.is_again());
        let place = inside.enter(&config.shared_dir, file_system::needs(&config))?;
        let kept = self.state.open(&limits, again)?;
        let has_waited = again && kept.table.is_announced();
        let left = if again {
            sort_leftovers(&kept.table, &place.descriptors)?
        } else {
            None
        };
        let entered = Entered {
            root: place.root,
            file: place.file,
            proc_fds: place.proc_fds,
            may_label: place.may_label,
        };
        let Built { fs, table } = file_system::build(&config, entered, kept)?;
        let action = config.sandbox.seccomp;
        let filter = Filter::new(action, self.runtime.engine, place.file_handles)?;
        let options = ServiceOptions {
            device: Device {
                tag: config.tag,
                request_queues: config.request_queues,
            },
            workers: config.workers,
            runtime: config.runtime,
            poll: config.poll,
            session: config.share.session,
            once: config.once,
        };
        let service = Service::over(fs, options, self.runtime, table)
            .keeping(config.state.is_some())
            .reporting(place.serving, self.manager.interval(), has_waited);
        Ok(Server {
            service,
            listener: self.listener,
            filter,
            supervised,
            first: !again,
            left,
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
