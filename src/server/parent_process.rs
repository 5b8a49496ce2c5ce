//! The process that the launcher has started: it waits for the serving process, and with
//! `--supervise` starts another one when that one is killed.
//!
//! It owns the guardian or the supervisor, and what serving processes are made of. The invariant: a
//! server that never gets as far as serving is not restarted for ever.

mod program_switch;

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use super::exec_handover::{ExecHandover, START_TIMEOUT, UpgradeAttempt, milliseconds};
use super::service_manager::{ServiceManager, Silence};
use super::state_file::State;
use super::upgrade::UpgradeRequest;
use super::{Server, ServerError, ServerResources, Started};
use crate::sandbox::{self, Change, Ending, Event, Guardian, Supervisor};
use crate::vhost_user::SocketFile;

/// The exit status of a serving process that leaves its session to the next one.
pub(super) const LEFT: u8 = 98;

/// A score of serving processes in a row that were killed too early.
#[derive(Clone, Copy, Debug, Default)]
struct Failures(u32);

impl Failures {
    /// A process that serves for this long resets the score.
    const SERVED: Duration = Duration::from_millis(20);
    /// The score of a process that never served; one that served too briefly scores 1.
    const NEVER: u32 = 20;
    /// The limit: five processes that never served, or 100 that served too briefly.
    const MAX: u32 = 5 * Self::NEVER;

    /// Adds a process that served for this long, if it did. Returns whether to give up.
    fn add(&mut self, served: Option<Duration>) -> bool {
        self.0 = match served {
            None => self.0 + Self::NEVER,
            Some(time) if time < Self::SERVED => self.0 + 1,
            Some(_) => 0,
        };
        self.0 >= Self::MAX
    }
}

/// How long the serving process may take to return all requests. The next one replays the rest.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The part that stays outside of the sandbox: the guardian, and the socket's file, which it
/// removes at the end.
#[derive(Debug)]
pub struct ParentProcess(Role);

#[derive(Debug)]
enum Role {
    Waiting {
        guardian: Guardian,
        _socket: Option<SocketFile>,
        manager: ServiceManager,
    },
    Supervising(Box<Supervising>),
}

/// What [`ParentProcess::watch`] returns.
#[derive(Debug)]
pub enum Watched {
    /// The server has ended.
    Ended(Ending),
    /// This is a new serving process.
    Inside(Box<Server>),
}

/// Which of the two processes this is.
enum Forked {
    Guardian(Box<Supervising>),
    Serving(Box<Server>),
}

/// A supervisor, and the resources of each serving process that it makes.
#[derive(Debug)]
pub(super) struct Supervising {
    pub(super) supervisor: Supervisor,
    pub(super) resources: ServerResources,
    /// An upgrade whose outcome isn't known yet.
    pub(super) attempt: Option<UpgradeAttempt>,
    /// The path of the program that runs in this process.
    program: PathBuf,
    failures: Failures,
    /// When the last process stopped serving, if none serves.
    down_since: Option<Duration>,
    /// When the present process began to serve, if one does.
    serving_since: Option<Duration>,
}

impl ParentProcess {
    pub(super) fn waiting(
        guardian: Guardian,
        socket: Option<SocketFile>,
        manager: ServiceManager,
    ) -> Self {
        Self(Role::Waiting {
            guardian,
            _socket: socket,
            manager,
        })
    }

    /// Splits the process into a supervisor and the first serving process.
    pub(super) fn supervise(
        resources: ServerResources,
        log: Option<BorrowedFd<'_>>,
    ) -> Result<Started, ServerError> {
        let keep = resources.keep(log);
        let supervisor = Supervisor::begin(&resources.config.sandbox, &keep, None)?;
        Supervising::new(supervisor, resources, None).start(log)
    }

    /// Takes over from the previous program in this process.
    pub(super) fn take_over(
        config: crate::config::Config,
        log: Option<BorrowedFd<'_>>,
        past: ExecHandover,
    ) -> Result<Started, ServerError> {
        let runtime = super::choose(&config)?;
        let (past, attempt, fds) = past.open()?;
        let resources = ServerResources {
            config,
            runtime,
            listener: fds.listener,
            state: State::Common(fds.state),
            manager: ServiceManager::from_environment(),
        };
        let keep = resources.keep(log);
        let supervisor = Supervisor::begin(&resources.config.sandbox, &keep, Some(past))?;
        Supervising::new(supervisor, resources, Some(attempt)).start(log)
    }

    /// Waits until the server has ended, and removes its socket. With `--supervise`, returns
    /// [`Watched::Inside`] in each further process that serves.
    ///
    /// # Errors
    ///
    /// A seccomp filter of the launcher forbids a call; in a further process, it can't serve.
    pub fn watch(self, log: Option<BorrowedFd<'_>>) -> Result<Watched, ServerError> {
        sandbox::forget_set_up();
        match self.0 {
            Role::Waiting {
                guardian, manager, ..
            } => {
                let ending = wait(&guardian, manager).map_err(ServerError::Watch)?;
                Ok(Watched::Ended(ending))
            }
            Role::Supervising(supervising) => supervising.watch(log),
        }
    }
}

/// Waits for the serving process to end, and keeps the service manager informed.
fn wait(guardian: &Guardian, mut manager: ServiceManager) -> std::io::Result<Ending> {
    loop {
        match guardian.next_change(manager.timeout())? {
            Some(Change::Ended(ending)) => return Ok(ending),
            Some(Change::Serving) => manager.serves(),
            Some(Change::Stopping) => manager.stops(),
            None => {
                if manager.check(Some(guardian.child())) == Silence::Hang {
                    log::error!("the serving process hangs: leaving it to the service manager");
                }
            }
        }
    }
}

impl Supervising {
    fn new(
        supervisor: Supervisor,
        resources: ServerResources,
        attempt: Option<UpgradeAttempt>,
    ) -> Self {
        Self {
            supervisor,
            resources,
            down_since: attempt.as_ref().map(UpgradeAttempt::since),
            attempt,
            // Read now: once the file is replaced, `/proc/self/exe` no longer has its path.
            program: std::env::current_exe().unwrap_or_default(),
            failures: Failures::default(),
            serving_since: None,
        }
    }

    fn start(self, log: Option<BorrowedFd<'_>>) -> Result<Started, ServerError> {
        match Box::new(self).fork(log)? {
            Forked::Guardian(this) => Ok(Started::Outside(ParentProcess(Role::Supervising(this)))),
            Forked::Serving(server) => Ok(Started::Inside(server)),
        }
    }

    /// Makes a serving process.
    fn fork(mut self: Box<Self>, log: Option<BorrowedFd<'_>>) -> Result<Forked, ServerError> {
        let own = self.attempt.as_ref().map(UpgradeAttempt::descriptors);
        let keep = self.resources.keep(log);
        let started = self.supervisor.start(&keep, &own.unwrap_or_default());
        let Some(inside) = started? else {
            return Ok(Forked::Guardian(self));
        };
        // The guardian owns its descriptors.
        std::mem::forget(self.attempt);
        let server = self.resources.serve(inside)?;
        Ok(Forked::Serving(Box::new(server)))
    }

    fn watch(mut self: Box<Self>, log: Option<BorrowedFd<'_>>) -> Result<Watched, ServerError> {
        loop {
            let event = match &self.attempt {
                None => {
                    let timeout = self.resources.manager.timeout();
                    self.supervisor.next_event(timeout)
                }
                Some(_) => self.supervisor.next_within(START_TIMEOUT),
            };
            let event = event.map_err(ServerError::Watch)?;
            let restart = match event {
                Some(Event::Serving(since)) => {
                    self.served(since);
                    false
                }
                Some(Event::Upgrade(queued)) => match UpgradeRequest::of(queued, &self.program) {
                    Ok(request) => match self.upgrade(request)? {
                        Some(ending) => return Ok(self.end(ending)),
                        None => !self.supervisor.has_child(),
                    },
                    Err(error) => {
                        log::error!("not upgraded: getting the new program: {error}");
                        false
                    }
                },
                Some(Event::Ended(ending)) => match self.ended(ending)? {
                    Some(ending) => return Ok(self.end(ending)),
                    None => true,
                },
                Some(Event::Stopping) => {
                    self.resources.manager.stops();
                    false
                }
                None if self.attempt.is_none() => {
                    self.check_silence().map_err(ServerError::Watch)?;
                    false
                }
                None => {
                    let reason = "the new program did not get as far as serving";
                    self.fall_back(reason).map_err(ServerError::Watch)?;
                    true
                }
            };
            if restart {
                self = match self.fork(log)? {
                    Forked::Guardian(this) => this,
                    Forked::Serving(server) => return Ok(Watched::Inside(server)),
                };
            }
        }
    }

    /// Ends supervision.
    fn end(mut self: Box<Self>, ending: Ending) -> Watched {
        drop(self.resources.listener.take_file());
        // The serving process may have closed the descriptors, or opened others in their places.
        std::mem::forget(self);
        Watched::Ended(ending)
    }

    /// Looks at a serving process that has not reported for long, and kills it if it hangs: the next
    /// one resumes the session.
    fn check_silence(&mut self) -> std::io::Result<()> {
        let child = self.supervisor.child();
        if self.resources.manager.check(child) == Silence::Hang {
            log::error!("the serving process hangs: killing it");
            self.supervisor.kill()?;
        }
        Ok(())
    }

    /// Handles the report of a process that serves since `since`.
    fn served(&mut self, since: Duration) {
        self.resources.manager.serves();
        let pause = self
            .down_since
            .take()
            .map(|down| since.saturating_sub(down));
        if let Some(attempt) = self.attempt.take() {
            attempt.report(pause.unwrap_or_default());
        } else if let Some(pause) = pause {
            log::warn!("serving again, after {:.1} ms", milliseconds(pause));
        }
        // A report is repeated as a heartbeat.
        self.serving_since.get_or_insert(since);
    }

    /// Handles the end of the serving process. Returns an ending if the server ends with it.
    fn ended(&mut self, ending: Ending) -> Result<Option<Ending>, ServerError> {
        let now = sandbox::now();
        let served = self.serving_since.take();
        if self.attempt.is_some() {
            self.fall_back(&ending.to_string())
                .map_err(ServerError::Watch)?;
        }
        match ending {
            Ending::Signal(libc::SIGSYS) => return Ok(Some(ending)),
            // `LEFT`: another process than the guardian has sent SIGHUP.
            Ending::Status(LEFT) | Ending::Signal(_) => {}
            Ending::Status(_) => return Ok(Some(ending)),
        }
        if self.supervisor.is_to_stop().map_err(ServerError::Watch)? {
            return Ok(Some(ending));
        }
        let served = served.map(|since| now.saturating_sub(since));
        if self.failures.add(served) {
            log::error!("{ending}; too many have ended before they could serve: giving up");
            return Ok(Some(ending));
        }
        if self.supervisor.sandbox_refs().is_none() {
            // The first one has never served.
            return Ok(Some(ending));
        }
        log::error!("{ending}; starting another one");
        self.down_since.get_or_insert(now);
        Ok(None)
    }

    /// Records that no process serves from then on.
    fn is_down(&mut self, since: Duration) {
        self.serving_since = None;
        self.down_since.get_or_insert(since);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_that_never_serves_is_given_up_and_one_that_serves_is_not() {
        let (short, long) = (Some(Duration::ZERO), Some(Failures::SERVED));
        let given_up_after = |lives: &[Option<Duration>]| {
            let mut failures = Failures::default();
            let lives = lives.iter().cycle().take(1000);
            lives.map(|life| failures.add(*life)).position(|over| over)
        };
        assert_eq!(given_up_after(&[None]), Some(4));
        assert_eq!(given_up_after(&[short]), Some(99));
        assert_eq!(given_up_after(&[None, None, None, None, long]), None);
        assert_eq!(given_up_after(&[short, long]), None);
    }
}
