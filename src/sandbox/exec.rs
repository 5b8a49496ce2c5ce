//! Another program in the place of this one: tried beforehand, and then run in the same process.
//!
//! The invariant: a program that is only tried gets none of this one's descriptors, and can't keep
//! it waiting.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions};

use super::guardian::{Ending, ending};
use super::privileges;
use super::supervisor::{FdIdentity, now};
use crate::sys::process::{self, Fork};
use crate::sys::supervision;
pub use crate::sys::supervision::{Peer, Queued};

/// A program, and how it is called.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The program's file.
    pub file: BorrowedFd<'a>,
    /// Its arguments, its own name being the first.
    pub arguments: &'a [CString],
    /// Its environment.
    pub environment: &'a [CString],
}

/// The file of the program that this process runs.
///
/// # Errors
///
/// There is no `/proc`.
pub fn own_program() -> std::io::Result<FdIdentity> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let file = rustix::fs::open(c"/proc/self/exe", flags, Mode::empty())?;
    Ok(FdIdentity::new(file)?)
}

/// Runs a program beside this one, and answers how it has ended; by a signal, if it takes longer
/// than `patience` allows. What it has to complain of it writes to `complaints`. To be called while
/// signals are held, and the process has one thread.
///
/// # Errors
///
/// There is no process to be had for it.
pub fn try_out(
    call: Call<'_>,
    complaints: Option<BorrowedFd<'_>>,
    patience: Duration,
) -> std::io::Result<Ending> {
    let child = match process::fork()? {
        Fork::Parent(child) => child,
        Fork::Child => {
            let ready = prepare(complaints);
            if ready.is_ok() {
                // What it comes back with, its end tells.
                let _ = supervision::run_instead(call.file, call.arguments, call.environment);
            }
            process::exit_now(126)
        }
    };
    let end = now() + patience;
    loop {
        if let Some(ending) = look(child)? {
            return Ok(ending);
        }
        match end.checked_sub(now()) {
            Some(left) => {
                supervision::take_signal(&[libc::SIGCHLD], Some(left))?;
            }
            None => {
                rustix::process::kill_process(child, Signal::KILL)?;
                supervision::take_signal(&[libc::SIGCHLD], Some(patience))?;
            }
        }
    }
}

fn prepare(complaints: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
    if let Some(complaints) = complaints {
        rustix::stdio::dup2_stderr(complaints)?;
    }
    supervision::close_at_exec()?;
    process::release_signals()?;
    process::release_hangup()?;
    Ok(())
}

fn look(child: Pid) -> std::io::Result<Option<Ending>> {
    match rustix::process::waitpid(Some(child), WaitOptions::NOHANG) {
        Ok(Some((_, status))) => Ok(ending(status)),
        Ok(None) | Err(Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Runs a program in the place of this one, which has everything open that this one has, and its
/// capabilities. Comes back only if it can't be run.
#[must_use]
pub fn run_instead(call: Call<'_>) -> std::io::Error {
    let keep = || -> std::io::Result<()> {
        privileges::keep_over_exec()?;
        supervision::keep_over_exec()
    };
    let error = match keep() {
        Ok(()) => {
            supervision::run_instead(call.file.as_fd(), call.arguments, call.environment).into()
        }
        Err(error) => error,
    };
    // They are none of what a program is to get that is only tried.
    let _ = supervision::close_at_exec();
    error
}

/// Asks a supervisor for an upgrade, with a number that says where to find whoever asks.
///
/// # Errors
///
/// As `sigqueue(3)`.
pub fn ask_for_upgrade(supervisor: i32, value: usize) -> std::io::Result<()> {
    let process = Pid::from_raw(supervisor).ok_or(Errno::SRCH)?;
    Ok(supervision::queue_hangup(process, value)?)
}

/// Who is at the other end of a unix socket: who has connected, or, seen from there, who listens.
///
/// # Errors
///
/// As `getsockopt(2)`.
pub fn peer(socket: impl AsFd) -> std::io::Result<Peer> {
    Ok(supervision::peer(socket)?)
}
