//! The process that stays outside: it passes signals on, and tells how the server has ended.
//!
//! It keeps what the server has left behind: the path of the socket, and the number by which the
//! launcher knows the server. It reads nothing of what a guest or a VMM says. The invariant:
//! neither process outlives the other.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use crate::sys::process;

/// The guardian's side.
#[derive(Debug)]
pub struct Guardian {
    child: Pid,
    /// Held as long as the guardian lives.
    _hand: OwnedFd,
}

/// How the server has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With this status.
    Status(u8),
    /// By this signal.
    Signal(i32),
}

impl Guardian {
    pub(super) fn new(child: Pid, hand: OwnedFd) -> Self {
        Self { child, _hand: hand }
    }

    /// Waits for the server's end, and passes on to it what asks this process to end.
    ///
    /// # Errors
    ///
    /// Whatever a seccomp filter of the launcher says.
    pub fn watch(&self) -> std::io::Result<Ending> {
        loop {
            match rustix::process::waitpid(Some(self.child), WaitOptions::NOHANG) {
                Ok(None) => {}
                Ok(Some((_, status))) => {
                    if let Some(ending) = ending(status) {
                        return Ok(ending);
                    }
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            // A signal that came since is still there, as all are held.
            if process::next_signal()? != libc::SIGCHLD {
                match rustix::process::kill_process(self.child, Signal::TERM) {
                    // It has ended, and its SIGCHLD is under way.
                    Ok(()) | Err(Errno::SRCH) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
}

/// How a process has ended, if it has.
pub(super) fn ending(status: WaitStatus) -> Option<Ending> {
    if let Some(code) = status.exit_status() {
        return Some(Ending::Status(u8::try_from(code).unwrap_or(1)));
    }
    status.terminating_signal().map(Ending::Signal)
}

impl Ending {
    /// The status to end with, after the launcher has been told, as well as the system lets one,
    /// by which signal the server was ended. To be called last.
    #[must_use]
    pub fn pass_on(self) -> u8 {
        match self {
            Self::Status(code) => code,
            Self::Signal(signal) => {
                process::end_by(signal);
                // As shells have it.
                u8::try_from(128 + signal).unwrap_or(u8::MAX)
            }
        }
    }
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(code) => write!(f, "the serving process has ended with {code}"),
            Self::Signal(libc::SIGSYS) => f.write_str(
                "the serving process was killed (SIGSYS): it made a system call that it never \
                 makes; the kernel's log has its number, and --seccomp trap tells it here",
            ),
            Self::Signal(signal) => write!(f, "the serving process was killed by signal {signal}"),
        }
    }
}

/// The server's side: tells it whether its guardian lives.
#[derive(Debug)]
pub(super) struct DeathPipe(OwnedFd);

/// Both ends, the guardian's second.
pub(super) fn death_pipe() -> Result<(DeathPipe, OwnedFd), Errno> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((DeathPipe(read), write))
}

impl DeathPipe {
    /// One that becomes readable when the guardian ends.
    pub(super) fn of(end: OwnedFd) -> Self {
        Self(end)
    }

    /// Has the process killed when its guardian ends. To be called after the last change of
    /// credentials, which would undo it.
    pub(super) fn fasten(&self) -> Result<(), Errno> {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The guardian may have ended before.
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
