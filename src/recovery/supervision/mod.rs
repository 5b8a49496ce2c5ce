//! Keeps a server serving: starts a serving process when the last one was killed, and switches to
//! another program.
//!
//! It owns the supervisor and the [`Resources`] that each serving process is made of. The
//! invariant: a server that never serves isn't restarted forever.

mod program_switch;

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use super::RecoveryError;
use super::exec_handover::PassedOn;
use super::service_manager::{ServiceManager, Silence};
use super::supervisor::{Event, Supervisor};
use super::upgrade::UpgradeRequest;
use super::upgrade_attempt::{START_TIMEOUT, UpgradeAttempt, milliseconds};
use crate::metrics::{Interruption, Process};
use crate::sandbox::{self, Ending, SandboxError, ServingProcess};
use crate::sys::supervision::Queued;
use crate::vhost_user::{Listener, SocketFile};

/// The exit status of a serving process that leaves its session to the next one.
pub(crate) const LEFT: u8 = 98;

/// What every serving process is made of. Each has a copy of it, in memory of its own.
pub(crate) trait Resources: Sized {
    /// A serving process, ready to serve.
    type Server;
    /// Why it can't be made.
    type Error: From<RecoveryError> + From<SandboxError>;

    /// Makes this process, which is the serving one, ready to serve, after the `interruption`.
    fn serve(
        self,
        process: ServingProcess,
        interruption: Option<Interruption>,
    ) -> Result<Self::Server, Self::Error>;

    /// The descriptors that every serving process has from the beginning.
    fn keep<'a>(&'a self, log: Option<BorrowedFd<'a>>) -> Vec<BorrowedFd<'a>>;

    /// The socket that the VMM connects to.
    fn listener(&self) -> &Listener;

    /// Removes the files of the sockets.
    fn remove_files(&mut self);

    /// The socket on which the counters are read, and its file.
    fn metrics_socket(&self) -> Option<(BorrowedFd<'_>, Option<&SocketFile>)>;

    /// The socket that the server is controlled by.
    fn control(&self) -> Option<&Listener>;

    /// The user that the launcher has started the server as.
    fn user(&self) -> u32;

    /// The file of the state table.
    fn state(&self) -> Option<BorrowedFd<'_>>;

    /// The file of the counters.
    fn metrics(&self) -> Option<BorrowedFd<'_>>;

    /// The file that has the server's process id.
    fn pid_file(&self) -> Option<BorrowedFd<'_>>;
}

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

/// What the process that the launcher has started has waited for.
#[derive(Debug)]
pub enum Watched<S> {
    /// The server has ended.
    Ended {
        /// How its serving process has ended.
        ending: Ending,
        /// The signal that has asked for it.
        asked_by: Option<i32>,
    },
    /// This is a new serving process.
    Serving(Box<S>),
}

/// Which of the two processes this is.
pub(crate) enum Forked<R: Resources> {
    /// The guardian.
    Guardian(Box<Supervision<R>>),
    /// A serving process.
    Serving(Box<R::Server>),
}

/// A supervisor, and the resources of each serving process that it makes.
#[derive(Debug)]
pub(crate) struct Supervision<R> {
    supervisor: Supervisor,
    resources: R,
    manager: ServiceManager,
    /// An upgrade whose outcome isn't known yet.
    attempt: Option<UpgradeAttempt>,
    /// The path of the program that runs in this process.
    program: PathBuf,
    failures: Failures,
    /// When the last process stopped serving, if none serves.
    down_since: Option<Duration>,
    /// When the present process began to serve, if one does.
    serving_since: Option<Duration>,
    /// A request for an upgrade that came while no process served, and what its signal carried.
    postponed: Option<Option<Queued>>,
}

impl<R: Resources> Supervision<R> {
    /// Splits the process into a supervisor and the first serving process.
    pub(crate) fn begin(
        resources: R,
        options: &sandbox::Options,
        log: Option<BorrowedFd<'_>>,
    ) -> Result<Forked<R>, R::Error> {
        let supervisor = Supervisor::begin(options, &resources.keep(log), None)?;
        Self::new(supervisor, resources, None).start(log)
    }

    /// Takes over from the previous program in this process, and makes a serving process.
    pub(crate) fn take_over(
        resources: R,
        options: &sandbox::Options,
        log: Option<BorrowedFd<'_>>,
        PassedOn { past, attempt }: PassedOn,
    ) -> Result<Forked<R>, R::Error> {
        let supervisor = Supervisor::begin(options, &resources.keep(log), Some(past))?;
        Self::new(supervisor, resources, Some(attempt)).start(log)
    }

    fn new(supervisor: Supervisor, resources: R, attempt: Option<UpgradeAttempt>) -> Self {
        Self {
            supervisor,
            resources,
            manager: ServiceManager::from_environment(),
            down_since: attempt.as_ref().map(UpgradeAttempt::since),
            attempt,
            // Read now: once the file is replaced, `/proc/self/exe` no longer has its path.
            program: std::env::current_exe().unwrap_or_default(),
            failures: Failures::default(),
            serving_since: None,
            postponed: None,
        }
    }

    fn start(self, log: Option<BorrowedFd<'_>>) -> Result<Forked<R>, R::Error> {
        Box::new(self).fork(log)
    }

    /// Makes a serving process.
    fn fork(mut self: Box<Self>, log: Option<BorrowedFd<'_>>) -> Result<Forked<R>, R::Error> {
        let own = self.attempt.as_ref().map(UpgradeAttempt::descriptors);
        let keep = self.resources.keep(log);
        let started = self.supervisor.start(&keep, &own.unwrap_or_default());
        let Some(process) = started? else {
            return Ok(Forked::Guardian(self));
        };
        let attempt = self.attempt.as_ref();
        let interruption = self.down_since.map(|since| Interruption {
            process: attempt.map_or(Process::Recovery, UpgradeAttempt::outcome),
            since,
        });
        // The guardian owns its descriptors.
        std::mem::forget(self.attempt);
        let server = self.resources.serve(process, interruption)?;
        Ok(Forked::Serving(Box::new(server)))
    }

    /// Waits until the server has ended, and removes its socket. Returns [`Watched::Serving`] in each
    /// further process that serves.
    pub(crate) fn watch(
        mut self: Box<Self>,
        log: Option<BorrowedFd<'_>>,
    ) -> Result<Watched<R::Server>, R::Error> {
        loop {
            let serves = self.serving_since.is_some();
            let event = match (self.postponed.take_if(|_| serves), &self.attempt) {
                (Some(queued), _) => Ok(Some(Event::Upgrade(queued))),
                (None, None) => self.supervisor.next_event(self.manager.timeout()),
                (None, Some(_)) => self.supervisor.next_within(START_TIMEOUT),
            };
            let event = event.map_err(RecoveryError::Watch)?;
            let restart = match event {
                Some(Event::Serving(since)) => {
                    self.served(since);
                    false
                }
                // A process that is starting closes the descriptors that it doesn't know, and a
                // request has some.
                Some(Event::Upgrade(queued)) if !serves => {
                    self.postponed = Some(queued);
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
                    self.manager.stops();
                    false
                }
                None if self.attempt.is_none() => {
                    self.check_silence().map_err(RecoveryError::Watch)?;
                    false
                }
                None => {
                    let reason = "the new program did not get as far as serving";
                    self.fall_back(reason).map_err(RecoveryError::Watch)?;
                    true
                }
            };
            if restart {
                self = match self.fork(log)? {
                    Forked::Guardian(this) => this,
                    Forked::Serving(server) => return Ok(Watched::Serving(server)),
                };
            }
        }
    }

    /// Ends supervision.
    fn end(mut self: Box<Self>, ending: Ending) -> Watched<R::Server> {
        self.resources.remove_files();
        // A signal that a seccomp filter keeps from being seen has asked for nothing.
        let _ = self.supervisor.is_to_stop();
        let asked_by = self.supervisor.asked_by();
        // The serving process may have closed the descriptors, or opened others in their places.
        std::mem::forget(self);
        Watched::Ended { ending, asked_by }
    }

    /// Looks at a serving process that has not reported for long, and kills it if it hangs: the next
    /// one resumes the session.
    fn check_silence(&mut self) -> std::io::Result<()> {
        if self.manager.check(self.supervisor.child()) == Silence::Hang {
            log::error!("the serving process hangs: killing it");
            self.supervisor.kill()?;
        }
        Ok(())
    }

    /// Handles the report of a process that serves since `since`.
    fn served(&mut self, since: Duration) {
        self.manager.serves();
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
    fn ended(&mut self, ending: Ending) -> Result<Option<Ending>, RecoveryError> {
        let now = sandbox::now();
        let served = self.serving_since.take();
        if self.attempt.is_some() {
            self.fall_back(&ending.to_string())
                .map_err(RecoveryError::Watch)?;
        }
        match ending {
            Ending::Signal(libc::SIGSYS) => return Ok(Some(ending)),
            // `LEFT`: another process than the guardian has sent SIGHUP.
            Ending::Status(LEFT) | Ending::Signal(_) => {}
            Ending::Status(_) => return Ok(Some(ending)),
        }
        if self.supervisor.is_to_stop().map_err(RecoveryError::Watch)? {
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
        let given_up_after = |uptimes: &[Option<Duration>]| {
            let mut failures = Failures::default();
            let uptimes = uptimes.iter().cycle().take(1000);
            uptimes
                .map(|uptime| failures.add(*uptime))
                .position(|over| over)
        };
        assert_eq!(given_up_after(&[None]), Some(4));
        assert_eq!(given_up_after(&[short]), Some(99));
        assert_eq!(given_up_after(&[None, None, None, None, long]), None);
        assert_eq!(given_up_after(&[short, long]), None);
    }
}
