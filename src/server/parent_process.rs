//! The process that the launcher knows: it waits for the one that serves, and, if so asked for,
//! makes another when that one was killed.
//!
//! The invariant: a server that can't be brought to serve is not tried for ever.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use super::exec_handover::ExecHandover;
use super::state_file::State;
use super::upgrade::{UpgradeAttempt, UpgradeRequest};
use super::{Server, ServerError, ServerResources, Started};
use crate::sandbox::{self, Ending, Event, Guardian, Supervisor};
use crate::vhost_user::SocketFile;

/// The status with which a serving process ends that leaves its session to another.
pub(super) const LEFT: u8 = 98;

/// Serving processes one after the other that were killed before they have done much.
#[derive(Clone, Copy, Debug, Default)]
struct Failures(u32);

impl Failures {
    /// One that serves for so long has done enough.
    const SERVED: Duration = Duration::from_millis(20);
    /// Five that never served, or as many as this times that which hardly did, are enough.
    const NEVER: u32 = 20;
    const MOST: u32 = 5 * Self::NEVER;

    /// Counts one that served for so long, if it did. True if another is not worth trying.
    fn add(&mut self, served: Option<Duration>) -> bool {
        self.0 = match served {
            None => self.0 + Self::NEVER,
            Some(time) if time < Self::SERVED => self.0 + 1,
            Some(_) => 0,
        };
        self.0 >= Self::MOST
    }
}

/// How long a program may take to get to serve.
pub(super) const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long giving all requests back may take. What isn't done by then is done again.
pub(super) const DRAIN: Duration = Duration::from_secs(1);

/// What stays outside of the sandbox: the guardian, and the socket's file, which is removed at
/// the end.
#[derive(Debug)]
pub struct ParentProcess(Kind);

#[derive(Debug)]
enum Kind {
    Waiting {
        guardian: Guardian,
        _socket: Option<SocketFile>,
    },
    Supervising(Box<Supervising>),
}

/// What has come of waiting.
#[derive(Debug)]
pub enum Watched {
    /// The server has ended.
    Ended(Ending),
    /// This is a new process, which serves.
    Inside(Box<Server>),
}

/// Which process this is.
enum Either {
    Guardian(Box<Supervising>),
    Serving(Box<Server>),
}

/// A supervisor, and what it makes servers of.
#[derive(Debug)]
pub(super) struct Supervising {
    pub(super) supervisor: Supervisor,
    pub(super) resources: ServerResources,
    /// An upgrade of which it isn't known yet whether it is one.
    pub(super) attempt: Option<UpgradeAttempt>,
    /// Where the program lies that runs here.
    program: PathBuf,
    failures: Failures,
    /// Since when nobody serves.
    down: Option<Duration>,
    serving: Option<Duration>,
}

impl ParentProcess {
    pub(super) fn waiting(guardian: Guardian, socket: Option<SocketFile>) -> Self {
        Self(Kind::Waiting {
            guardian,
            _socket: socket,
        })
    }

    /// Goes on as a supervisor and the first process that serves.
    pub(super) fn supervise(
        resources: ServerResources,
        log: Option<BorrowedFd<'_>>,
    ) -> Result<Started, ServerError> {
        let keep = resources.keep(log);
        let supervisor = Supervisor::begin(&resources.config.sandbox, &keep, None)?;
        Supervising::new(supervisor, resources, None).start(log)
    }

    /// Goes on where another program in this process has been.
    pub(super) fn take_over(
        config: crate::config::Config,
        log: Option<BorrowedFd<'_>>,
        past: ExecHandover,
    ) -> Result<Started, ServerError> {
        let runtime = super::choose(&config)?;
        let (past, attempt, parts) = past.open()?;
        let resources = ServerResources {
            config,
            runtime,
            listener: parts.listener,
            state: State::Common(parts.state),
        };
        let keep = resources.keep(log);
        let supervisor = Supervisor::begin(&resources.config.sandbox, &keep, Some(past))?;
        Supervising::new(supervisor, resources, Some(attempt)).start(log)
    }

    /// Waits until the server has ended, and removes its socket. If so configured, goes on as another
    /// process when the serving one was killed.
    ///
    /// # Errors
    ///
    /// Whatever a seccomp filter of the launcher says; and in the other process, that it can't serve.
    pub fn watch(self, log: Option<BorrowedFd<'_>>) -> Result<Watched, ServerError> {
        sandbox::forget_set_up();
        match self.0 {
            Kind::Waiting { guardian, .. } => {
                let ending = guardian.watch().map_err(ServerError::Watch)?;
                Ok(Watched::Ended(ending))
            }
            Kind::Supervising(supervising) => supervising.watch(log),
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
            down: attempt.as_ref().map(UpgradeAttempt::since),
            attempt,
            // Asked now, as the file may be another later.
            program: std::env::current_exe().unwrap_or_default(),
            failures: Failures::default(),
            serving: None,
        }
    }

    fn start(self, log: Option<BorrowedFd<'_>>) -> Result<Started, ServerError> {
        match Box::new(self).another(log)? {
            Either::Guardian(this) => Ok(Started::Outside(ParentProcess(Kind::Supervising(this)))),
            Either::Serving(server) => Ok(Started::Inside(server)),
        }
    }

    /// Makes a process that serves.
    fn another(mut self: Box<Self>, log: Option<BorrowedFd<'_>>) -> Result<Either, ServerError> {
        let own = self.attempt.as_ref().map(UpgradeAttempt::descriptors);
        let keep = self.resources.keep(log);
        let started = self.supervisor.start(&keep, &own.unwrap_or_default());
        let Some(inside) = started? else {
            return Ok(Either::Guardian(self));
        };
        // The guardian's.
        std::mem::forget(self.attempt);
        let server = self.resources.serve(inside)?;
        Ok(Either::Serving(Box::new(server)))
    }

    fn watch(mut self: Box<Self>, log: Option<BorrowedFd<'_>>) -> Result<Watched, ServerError> {
        loop {
            let event = match &self.attempt {
                None => Some(self.supervisor.next_event().map_err(ServerError::Watch)?),
                Some(_) => {
                    let event = self.supervisor.next_within(START_TIMEOUT);
                    event.map_err(ServerError::Watch)?
                }
            };
            let again = match event {
                Some(Event::Serving(since)) => {
                    self.served(since);
                    false
                }
                Some(Event::Upgrade(queued)) => match UpgradeRequest::of(queued, &self.program) {
                    Ok(wish) => match self.upgrade(wish)? {
                        Some(ending) => return Ok(self.end(ending)),
                        None => !self.supervisor.has_child(),
                    },
                    Err(error) => {
                        log::error!("not upgraded: finding the new program: {error}");
                        false
                    }
                },
                Some(Event::Ended(ending)) => match self.ended(ending)? {
                    Some(ending) => return Ok(self.end(ending)),
                    None => true,
                },
                None => {
                    let reason = "the new program did not get as far as serving";
                    self.fall_back(reason).map_err(ServerError::Watch)?;
                    true
                }
            };
            if again {
                self = match self.another(log)? {
                    Either::Guardian(this) => this,
                    Either::Serving(server) => return Ok(Watched::Inside(server)),
                };
            }
        }
    }

    /// The server's end.
    fn end(mut self: Box<Self>, ending: Ending) -> Watched {
        drop(self.resources.listener.take_file());
        // Numbers of descriptors, which the process that served may have closed.
        std::mem::forget(self);
        Watched::Ended(ending)
    }

    /// A process serves, since then.
    fn served(&mut self, since: Duration) {
        let pause = self.down.take().map(|down| since.saturating_sub(down));
        if let Some(attempt) = self.attempt.take() {
            attempt.tell(pause.unwrap_or_default());
        } else if let Some(pause) = pause {
            log::warn!("serving again, after {:.1} ms", milliseconds(pause));
        }
        self.serving = Some(since);
    }

    /// What to end with, if the end of the serving process is the server's.
    fn ended(&mut self, ending: Ending) -> Result<Option<Ending>, ServerError> {
        let now = sandbox::now();
        let served = self.serving.take();
        if self.attempt.is_some() {
            self.fall_back(&ending.to_string())
                .map_err(ServerError::Watch)?;
        }
        match ending {
            Ending::Signal(libc::SIGSYS) => return Ok(Some(ending)),
            // It was asked to leave, by somebody else than its guardian.
            Ending::Status(LEFT) | Ending::Signal(_) => {}
            Ending::Status(_) => return Ok(Some(ending)),
        }
        if self.supervisor.is_to_stop().map_err(ServerError::Watch)? {
            return Ok(Some(ending));
        }
        let served = served.map(|since| now.saturating_sub(since));
        if self.failures.add(served) {
            log::error!("{ending}; so have all of late, before they could serve: giving up");
            return Ok(Some(ending));
        }
        if self.supervisor.sandbox_refs().is_none() {
            // The first has never served.
            return Ok(Some(ending));
        }
        log::error!("{ending}; another one takes its place");
        self.down.get_or_insert(now);
        Ok(None)
    }

    /// From now on nobody serves.
    pub(super) fn is_down(&mut self, since: Duration) {
        self.serving = None;
        self.down.get_or_insert(since);
    }
}

pub(super) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_serves_is_given_up_and_what_serves_is_not() {
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
