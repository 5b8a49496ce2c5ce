//! Makes serving processes, and reports what becomes of them.
//!
//! It decides neither when to make one nor when to upgrade. The invariant: signals are blocked
//! except while they are waited for, so no event is lost; and of what a process reports after a
//! guest could have compromised it, only the time is used.

use std::mem::ManuallyDrop;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions};

use crate::sandbox::{
    Ending, Ids, InheritedSandbox, Options, Report, Respawn, Respawned, SandboxError, SandboxRefs,
    ServingProcess, now,
};
use crate::sys::process::{self, SUPERVISED};
use crate::sys::supervision::{self, Queued};

/// What a supervisor waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The serving process serves, since this time ([`now`]).
    Serving(Duration),
    /// The serving process has ended.
    Ended(Ending),
    /// A client asks for an upgrade; with what its signal carried.
    Upgrade(Option<Queued>),
    /// The server was asked to end, and so was the serving process.
    Stopping,
}

/// The serving process.
#[derive(Debug)]
struct Child {
    pid: Pid,
    /// Never closed here, like the other descriptors that were made for the process: the number may
    /// refer to another file by then. The next serving process closes those that it doesn't need.
    reports: ManuallyDrop<OwnedFd>,
}

/// The guardian's side.
#[derive(Debug)]
pub(super) struct Supervisor {
    respawn: Respawn,
    child: Option<Child>,
    /// The signal that asked the server to end.
    asked_by: Option<i32>,
    /// An upgrade was requested before the report of a serving process was read.
    requested: Option<Event>,
}

impl Supervisor {
    /// Prepares to make serving processes: see [`Respawn::begin`].
    pub(super) fn begin(
        options: &Options,
        keep: &[BorrowedFd<'_>],
        past: Option<InheritedSandbox>,
    ) -> Result<Self, SandboxError> {
        Ok(Self {
            respawn: Respawn::begin(options, keep, past)?,
            child: None,
            asked_by: None,
            requested: None,
        })
    }

    /// Makes a serving process: see [`Respawn::fork`]. Returns `Some` in it, and `None` in the
    /// guardian.
    pub(super) fn start(
        &mut self,
        keep: &[BorrowedFd<'_>],
        own: &[RawFd],
    ) -> Result<Option<ServingProcess>, SandboxError> {
        match self.respawn.fork(keep, own)? {
            Respawned::Guardian {
                child: pid,
                reports,
            } => {
                let reports = ManuallyDrop::new(reports);
                self.child = Some(Child { pid, reports });
                Ok(None)
            }
            Respawned::Serving(process) => Ok(Some(process)),
        }
    }

    /// Waits for the next event. Signals that ask this process to end or to report are passed
    /// on to the serving process. Returns `None` after `timeout`.
    ///
    /// # Errors
    ///
    /// A seccomp filter of the launcher forbids a call.
    pub(super) fn next_event(
        &mut self,
        timeout: Option<Duration>,
    ) -> std::io::Result<Option<Event>> {
        loop {
            if let Some(event) = self.poll()? {
                return Ok(Some(event));
            }
            if let Some(requested) = self.requested.take() {
                return Ok(Some(requested));
            }
            // A signal that has arrived since then is still pending, as all are blocked.
            match supervision::take_signal(&SUPERVISED, timeout)? {
                None => return Ok(None),
                // The kernel delivers the lowest number first, so the report of a process that has
                // started to serve may be waiting too, and must be read first.
                Some(signal) if signal.number == libc::SIGHUP => {
                    self.requested = Some(Event::Upgrade(signal.queued));
                }
                Some(signal) if process::ENDING.contains(&signal.number) => {
                    self.asked_by = Some(signal.number);
                    self.signal(Signal::TERM)?;
                    return Ok(Some(Event::Stopping));
                }
                Some(signal) if signal.number == libc::SIGUSR1 => self.signal(Signal::USR1)?,
                Some(_) => {}
            }
        }
    }

    /// Like [`next_event`](Self::next_event), but returns `None` after `timeout`. Signals but those
    /// of a child's end and of its reports stay pending.
    ///
    /// # Errors
    ///
    /// As for [`next_event`](Self::next_event).
    pub(super) fn next_within(&mut self, timeout: Duration) -> std::io::Result<Option<Event>> {
        let end = now() + timeout;
        loop {
            if let Some(event) = self.poll()? {
                return Ok(Some(event));
            }
            let Some(left) = end.checked_sub(now()) else {
                return Ok(None);
            };
            supervision::take_signal(&[libc::SIGCHLD, libc::SIGIO], Some(left))?;
        }
    }

    fn poll(&mut self) -> std::io::Result<Option<Event>> {
        let Some(child) = &self.child else {
            return Ok(None);
        };
        if let Some(report) = Report::read(&child.reports) {
            self.respawn.record_refs(report)?;
            return Ok(Some(Event::Serving(report.since)));
        }
        match rustix::process::waitpid(Some(child.pid), WaitOptions::NOHANG) {
            Ok(Some((_, status))) => {
                let Some(ending) = Ending::of(status) else {
                    return Ok(None);
                };
                self.child = None;
                Ok(Some(Event::Ended(ending)))
            }
            Ok(None) | Err(Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the server was asked to end.
    ///
    /// # Errors
    ///
    /// A seccomp filter of the launcher forbids a call.
    pub(super) fn is_to_stop(&mut self) -> std::io::Result<bool> {
        if let Some(signal) = supervision::take_signal(&process::ENDING, Some(Duration::ZERO))? {
            self.asked_by = Some(signal.number);
        }
        Ok(self.asked_by.is_some())
    }

    /// The signal that has asked the server to end, as far as [`is_to_stop`](Self::is_to_stop) and
    /// [`next_event`](Self::next_event) have seen one.
    pub(super) fn asked_by(&self) -> Option<i32> {
        self.asked_by
    }

    /// The serving process, if there is one.
    pub(super) fn child(&self) -> Option<Pid> {
        self.child.as_ref().map(|child| child.pid)
    }

    /// Whether there is a serving process.
    pub(super) fn has_child(&self) -> bool {
        self.child.is_some()
    }

    /// Asks the serving process to return all requests and to end, leaving everything open.
    ///
    /// # Errors
    ///
    /// A seccomp filter of the launcher forbids a call.
    pub(super) fn drain(&self) -> std::io::Result<()> {
        self.signal(Signal::HUP)
    }

    /// Kills the serving process.
    ///
    /// # Errors
    ///
    /// A seccomp filter of the launcher forbids a call.
    pub(super) fn kill(&self) -> std::io::Result<()> {
        self.signal(Signal::KILL)
    }

    fn signal(&self, signal: Signal) -> std::io::Result<()> {
        let Some(child) = &self.child else {
            return Ok(());
        };
        match rustix::process::kill_process(child.pid, signal) {
            // It has ended, and its SIGCHLD is pending.
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The ids of the serving process.
    pub(super) fn ids(&self) -> Ids {
        self.respawn.ids()
    }

    /// The root and the mount namespace of the serving process, once the first one has served.
    pub(super) fn sandbox_refs(&self) -> Option<&SandboxRefs> {
        self.respawn.sandbox_refs()
    }
}
