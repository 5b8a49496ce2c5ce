//! Runs another program: in a child, to try it, or in this process, to replace this program.
//!
//! The invariant: a program that is only tried gets none of this process's descriptors, and is
//! killed after a timeout.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions};

use crate::sandbox::{self, Ending, FdIdentity, now};
use crate::sys::process::{self, Fork};
use crate::sys::supervision;
use crate::sys::supervision::Peer;
pub(super) use crate::sys::supervision::Queued;

/// A program to run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call<'a> {
    /// The program's file.
    pub(super) file: BorrowedFd<'a>,
    /// Its arguments; the first one is its name.
    pub(super) arguments: &'a [CString],
    /// Its environment.
    pub(super) environment: &'a [CString],
}

/// The file of the program that this process runs.
///
/// # Errors
///
/// `/proc` isn't mounted.
pub(super) fn own_program() -> std::io::Result<FdIdentity> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let file = rustix::fs::open(c"/proc/self/exe", flags, Mode::empty())?;
    Ok(FdIdentity::new(file)?)
}

/// Runs a program in a child and returns how it has ended. It is killed after `timeout`. Its
/// standard error is `stderr`. To be called while signals are blocked, and the process has one
/// thread.
///
/// # Errors
///
/// The child can't be made or waited for.
pub(super) fn try_out(
    call: Call<'_>,
    stderr: Option<BorrowedFd<'_>>,
    timeout: Duration,
) -> std::io::Result<Ending> {
    let child = match process::fork()? {
        Fork::Parent(child) => child,
        Fork::Child => {
            let ready = prepare(stderr);
            if ready.is_ok() {
                // The exit status says that it failed.
                let _ = supervision::run_instead(call.file, call.arguments, call.environment);
            }
            process::exit_now(126)
        }
    };
    let end = now() + timeout;
    loop {
        if let Some(ending) = reap(child)? {
            return Ok(ending);
        }
        match end.checked_sub(now()) {
            Some(left) => {
                supervision::take_signal(&[libc::SIGCHLD], Some(left))?;
            }
            None => {
                rustix::process::kill_process(child, Signal::KILL)?;
                supervision::take_signal(&[libc::SIGCHLD], Some(timeout))?;
            }
        }
    }
}

/// Prepares the child: its standard error, descriptors and signals.
fn prepare(stderr: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
    if let Some(stderr) = stderr {
        rustix::stdio::dup2_stderr(stderr)?;
    }
    supervision::close_at_exec()?;
    process::unblock_signals()?;
    process::unblock_hangup()?;
    Ok(())
}

/// How the child has ended, if it has.
fn reap(child: Pid) -> std::io::Result<Option<Ending>> {
    match rustix::process::waitpid(Some(child), WaitOptions::NOHANG) {
        Ok(Some((_, status))) => Ok(Ending::of(status)),
        Ok(None) | Err(Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Replaces this program by another one, which keeps all descriptors and capabilities. Returns only
/// if it can't be run.
#[must_use]
pub(super) fn run_instead(call: Call<'_>) -> std::io::Error {
    let keep = || -> std::io::Result<()> {
        sandbox::keep_over_exec()?;
        supervision::keep_over_exec()
    };
    let error = match keep() {
        Ok(()) => {
            supervision::run_instead(call.file.as_fd(), call.arguments, call.environment).into()
        }
        Err(error) => error,
    };
    // This program runs on, and a program that is tried must not get its descriptors.
    let _ = supervision::close_at_exec();
    error
}

/// Asks a supervisor for an upgrade, with a number that names the client's socket.
///
/// # Errors
///
/// Those of `sigqueue(3)`.
pub fn ask_for_upgrade(supervisor: i32, value: usize) -> std::io::Result<()> {
    let process = Pid::from_raw(supervisor).ok_or(Errno::SRCH)?;
    Ok(supervision::queue_hangup(process, value)?)
}

/// The process at the other end of a unix socket: the one that has connected, or the one that
/// listens.
///
/// # Errors
///
/// Those of `getsockopt(2)`.
pub(super) fn peer(socket: impl AsFd) -> std::io::Result<Peer> {
    Ok(supervision::peer(socket)?)
}
