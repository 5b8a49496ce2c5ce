//! The guardian, the process that stays outside of the sandbox: it passes signals on to the serving
//! process, and ends the way that process has ended.
//!
//! It keeps what the serving process can't: the socket's path, and the process id that the launcher
//! knows. It reads nothing that a guest or a VMM sends, and of the serving process's reports only that
//! there is one. The invariant: neither process outlives the other.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use super::report::Report;
use crate::sys::process;
use crate::sys::supervision::{signal_on_input, take_signal};

/// The guardian.
#[derive(Debug)]
pub struct Guardian {
    child: Pid,
    /// The write end of the [`DeathPipe`], open as long as the guardian lives.
    _write_end: OwnedFd,
    /// The pipe on which the serving process reports, if it is to.
    reports: Option<OwnedFd>,
    /// The last signal that has asked the server to end.
    asked_by: Option<i32>,
}

/// What a guardian waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The serving process reports that it serves.
    Serving,
    /// The server was asked to end, and so was the serving process.
    Stopping,
    /// The serving process has ended.
    Ended(Ending),
}

/// How the serving process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With this status.
    Status(u8),
    /// By this signal.
    Signal(i32),
}

impl Guardian {
    pub(super) fn new(child: Pid, write_end: OwnedFd, reports: Option<OwnedFd>) -> Self {
        Self {
            child,
            _write_end: write_end,
            reports,
            asked_by: None,
        }
    }

    /// The serving process.
    #[must_use]
    pub fn child(&self) -> Pid {
        self.child
    }

    /// Waits for the serving process to end. Returns the signal that asked for it, too.
    ///
    /// # Errors
    ///
    /// As for [`next_change`](Self::next_change).
    pub fn watch(&mut self) -> std::io::Result<(Ending, Option<i32>)> {
        loop {
            if let Some(Change::Ended(ending)) = self.next_change(None)? {
                return Ok((ending, self.asked_by));
            }
        }
    }

    /// The last signal that has asked the server to end.
    #[must_use]
    pub fn asked_by(&self) -> Option<i32> {
        self.asked_by
    }

    /// Waits for the next change; returns `None` after `timeout`. Passes on to the serving process
    /// the signals that ask this process to end or to report.
    ///
    /// # Errors
    ///
    /// A seccomp filter of the launcher forbids a call.
    pub fn next_change(&mut self, timeout: Option<Duration>) -> std::io::Result<Option<Change>> {
        let ending_signals = process::ending_signals()?;
        let mut signals = ending_signals.clone();
        signals.extend([libc::SIGCHLD, libc::SIGUSR1]);
        if self.reports.is_some() {
            signals.push(libc::SIGIO);
        }
        loop {
            if self.reports.as_ref().and_then(Report::read).is_some() {
                return Ok(Some(Change::Serving));
            }
            match rustix::process::waitpid(Some(self.child), WaitOptions::NOHANG) {
                Ok(None) => {}
                Ok(Some((_, status))) => {
                    if let Some(ending) = Ending::of(status) {
                        // Both processes may have got the signal.
                        if let Some(signal) = take_signal(&ending_signals, Some(Duration::ZERO))? {
                            self.asked_by = Some(signal.number);
                        }
                        return Ok(Some(Change::Ended(ending)));
                    }
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            // A signal that has arrived since then is still pending, as all are blocked.
            match take_signal(&signals, timeout)? {
                None => return Ok(None),
                Some(signal) if ending_signals.contains(&signal.number) => {
                    self.asked_by = Some(signal.number);
                    match rustix::process::kill_process(self.child, Signal::TERM) {
                        // It has ended, and its SIGCHLD is pending.
                        Ok(()) | Err(Errno::SRCH) => return Ok(Some(Change::Stopping)),
                        Err(error) => return Err(error.into()),
                    }
                }
                Some(signal) if signal.number == libc::SIGUSR1 => {
                    match rustix::process::kill_process(self.child, Signal::USR1) {
                        Ok(()) | Err(Errno::SRCH) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Some(_) => {}
            }
        }
    }
}

impl Ending {
    /// How a process has ended, if it has.
    pub(crate) fn of(status: WaitStatus) -> Option<Self> {
        if let Some(code) = status.exit_status() {
            return Some(Self::Status(u8::try_from(code).unwrap_or(1)));
        }
        status.terminating_signal().map(Self::Signal)
    }

    /// Ends this process by the same signal, if that is how the serving process was killed.
    /// Otherwise, and if the signal can't end this process, returns the status to exit with. To be
    /// called last.
    #[must_use]
    pub fn pass_on(self) -> u8 {
        match self {
            Self::Status(code) => code,
            Self::Signal(signal) => {
                process::end_by(signal);
                // The convention of shells.
                u8::try_from(128 + signal).unwrap_or(u8::MAX)
            }
        }
    }
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(code) => write!(f, "the serving process has exited with {code}"),
            Self::Signal(libc::SIGSYS) => f.write_str(
                "the serving process was killed (SIGSYS): it made a system call that isn't on its \
                 list; the kernel's log has the number, and --seccomp trap shows it here",
            ),
            Self::Signal(signal) => write!(f, "the serving process was killed by signal {signal}"),
        }
    }
}

/// The serving process's end of a pipe that shows whether its guardian lives.
#[derive(Debug)]
pub(super) struct DeathPipe(OwnedFd);

/// Makes the pipe: the serving process's end and the guardian's.
pub(super) fn death_pipe() -> Result<(DeathPipe, OwnedFd), Errno> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((DeathPipe(read), write))
}

/// Makes the pipe on which the serving process reports: the guardian's end, which announces each
/// report by `SIGIO`, and the serving process's.
pub(super) fn report_pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    process::block_reports()?;
    let (reports, report) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    signal_on_input(&reports)?;
    Ok((reports, report))
}

impl DeathPipe {
    /// Uses a descriptor that becomes readable when the guardian ends.
    pub(super) fn of(end: OwnedFd) -> Self {
        Self(end)
    }

    /// Makes the kernel kill the process when its guardian ends. To be called after the last change
    /// of credentials, which would undo it.
    pub(super) fn arm(&self) -> Result<(), Errno> {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The guardian may have ended before that.
        let mut ends = [PollFd::new(&self.0, PollFlags::IN)];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        if poll(&mut ends, Some(&now))? > 0 {
            process::exit_now(1);
        }
        Ok(())
    }
}

impl AsRawFd for DeathPipe {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
