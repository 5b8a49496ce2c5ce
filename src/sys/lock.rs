//! Record locks of open file descriptions, and the signal that interrupts a wait for a lock.
//!
//! A wait in `fcntl(F_OFD_SETLKW)` or `flock` ends early only by a signal whose handler returns.
//! The signal is `SIGURG`: nothing here uses urgent data, and without a handler it is ignored. The
//! invariant: a signal is sent to one thread, which the caller knows to be alive.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::thread::Pid;

use super::last_errno;

/// The signal that interrupts a wait.
const SIGNAL: libc::c_int = libc::SIGURG;

/// The operation on a record lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Return a conflicting lock.
    Test,
    /// Acquire or release it, or fail.
    Set,
    /// Acquire it, and wait for it.
    SetWait,
}

/// A record lock as in `struct flock`; `len` 0 extends to the end of the file, also as it grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) kind: libc::c_int,
    pub(crate) start: i64,
    pub(crate) len: i64,
}

/// `fcntl(2)` with one of the `F_OFD_*` commands. Returns the conflicting lock for [`Act::Test`],
/// otherwise `record`.
///
/// # Errors
///
/// `EAGAIN` if another lock conflicts, `EINTR` after a signal, `EBADF` if the descriptor isn't open
/// for the access that the lock needs; otherwise those of the system call.
pub(crate) fn record(fd: impl AsFd, act: Act, record: Record) -> Result<Record, Errno> {
    let command = match act {
        Act::Test => libc::F_OFD_GETLK,
        Act::Set => libc::F_OFD_SETLK,
        Act::SetWait => libc::F_OFD_SETLKW,
    };
    let short = |number: libc::c_int| libc::c_short::try_from(number).or(Err(Errno::INVAL));
    let mut lock = libc::flock64 {
        l_type: short(record.kind)?,
        l_whence: short(libc::SEEK_SET)?,
        l_start: record.start,
        l_len: record.len,
        l_pid: 0,
    };
    // SAFETY: the kernel reads and writes one `flock64`, which is exclusively borrowed during
    // the call; `fd` is open as long as it is borrowed.
    match unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), command, &raw mut lock) } {
        -1 => match last_errno() {
            // POSIX allows either error for a conflict.
            Errno::ACCESS => Err(Errno::AGAIN),
            errno => Err(errno),
        },
        _ => Ok(Record {
            kind: lock.l_type.into(),
            start: lock.l_start,
            len: lock.l_len,
        }),
    }
}

/// Makes waits of the calling thread interruptible by [`interrupt`].
///
/// # Errors
///
/// The error of a seccomp filter.
pub(crate) fn be_interruptible() -> Result<(), Errno> {
    static HANDLER: OnceLock<Result<(), Errno>> = OnceLock::new();
    (*HANDLER.get_or_init(install))?;
    // SAFETY: all zeroes is a valid set of signals.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is exclusively borrowed during the call.
    unsafe { libc::sigemptyset(&raw mut set) };
    // SAFETY: as before; the signal's number is valid.
    unsafe { libc::sigaddset(&raw mut set, SIGNAL) };
    // A thread inherits the signals that its parent blocks.
    // SAFETY: the kernel reads `set`, and the earlier set is not requested.
    match unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut()) }
    {
        0 => Ok(()),
        errno => Err(Errno::from_raw_os_error(errno)),
    }
}

/// Interrupts a system call in which `thread`, a thread of this process, waits. Has no effect on a
/// thread that doesn't wait.
///
/// # Errors
///
/// `ESRCH` if there is no such thread.
pub(crate) fn interrupt(thread: Pid) -> Result<(), Errno> {
    let process = rustix::process::getpid().as_raw_nonzero().get();
    let thread = thread.as_raw_nonzero().get();
    // SAFETY: takes numbers, and names a thread of this process; the signal's handler
    // does nothing.
    match unsafe { libc::syscall(libc::SYS_tgkill, process, thread, SIGNAL) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

extern "C" fn nothing(_: libc::c_int) {}

fn install() -> Result<(), Errno> {
    // SAFETY: all zeroes is a valid `sigaction`: an empty mask and no flags (in particular not
    // `SA_RESTART`, with which the wait would continue).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
    // SAFETY: the handler touches nothing, so it may run at any moment on any thread; the
    // kernel reads `action`, and the earlier one is not requested.
    match unsafe { libc::sigaction(SIGNAL, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}
