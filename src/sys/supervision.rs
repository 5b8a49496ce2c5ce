//! System calls of a supervisor: a child that shares the descriptor table, signals with their data,
//! and `execve`.
//!
//! The invariant: a process is cloned only while it has one thread, and a descriptor survives an
//! `execve` only after [`keep_over_exec`].

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::Pid;

use super::last_errno;
use super::process::{Fork, has_one_thread};

/// Makes a child that shares this process's descriptor table: a descriptor that either process
/// opens or closes is open or closed in both, and stays open until both have ended. With `own_pids`
/// the child is the first process of a PID namespace.
///
/// The C library doesn't know of the new process, and takes its thread for the parent's. With one
/// thread none of the library's locks is held. The only wrong thing that it remembers is the
/// thread's number, which only recursive locks use, and these compare it with itself.
///
/// # Errors
///
/// `EBUSY` if the process has other threads than the calling one; those of `clone(2)`.
pub(crate) fn clone_sharing_descriptors(own_pids: bool) -> Result<Fork, Errno> {
    if !has_one_thread()? {
        return Err(Errno::BUSY);
    }
    let pids = if own_pids { libc::CLONE_NEWPID } else { 0 };
    let flags = libc::c_long::from(libc::CLONE_FILES | libc::SIGCHLD | pids);
    let none: libc::c_long = 0;
    // SAFETY: memory isn't shared (no CLONE_VM), so the child has its own copy of the stack and of
    // all else; the process has one thread, so no lock is held by a thread that doesn't exist in
    // the child. Descriptors are shared, and their owners in the two processes determine which one
    // closes them.
    match unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) } {
        -1 => Err(last_errno()),
        0 => Ok(Fork::Child),
        child => i32::try_from(child)
            .ok()
            .and_then(Pid::from_raw)
            .map(Fork::Parent)
            .ok_or(Errno::SRCH),
    }
}

/// A signal that was pending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    /// Its number.
    pub(crate) number: libc::c_int,
    /// Its data, if it was queued (`sigqueue(3)`).
    pub(crate) queued: Option<Queued>,
}

/// The data of a signal that was queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Queued {
    /// The value that the sender has passed.
    pub(crate) value: usize,
    /// The sender by its own account: a process that may send the signal can put in any ids.
    pub(crate) sender: Peer,
}

/// A process and its user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    /// The process id; 0 for a process that has none in this namespace.
    pub(crate) pid: i32,
    /// The user id.
    pub(crate) uid: u32,
}

/// The process that has connected to, or listens on, the other end of a unix socket
/// (`SO_PEERCRED`).
///
/// # Errors
///
/// Those of `getsockopt(2)`.
pub(crate) fn peer(socket: impl AsFd) -> Result<Peer, Errno> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).unwrap_or(0);
    // SAFETY: the kernel writes at most `len` bytes to `peer`, which has that size, and writes
    // `len`; the descriptor is open as long as it is borrowed.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    match result {
        0 => Ok(Peer {
            pid: peer.pid,
            uid: peer.uid,
        }),
        _ => Err(last_errno()),
    }
}

/// Takes one of `signals`, which are blocked, or waits for one. Returns `None` if none has arrived
/// within `timeout`; without a timeout, waits for as long as it takes.
///
/// # Errors
///
/// The error of a seccomp filter.
pub(crate) fn take_signal(
    signals: &[libc::c_int],
    timeout: Option<Duration>,
) -> Result<Option<Received>, Errno> {
    let set = super::process::signal_set(signals);
    let timeout = timeout.map(|timeout| libc::timespec {
        tv_sec: timeout.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let timeout = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: all zeroes is a valid `siginfo_t`.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: the kernel reads `set` and `timeout`, which is null or points to a value on this
        // stack, and writes `info`.
        match unsafe { libc::sigtimedwait(&raw const set, &raw mut info, timeout) } {
            -1 => match last_errno() {
                Errno::INTR => {}
                Errno::AGAIN => return Ok(None),
                errno => return Err(errno),
            },
            number => {
                let queued = (info.si_code == libc::SI_QUEUE).then(|| Queued {
                    // SAFETY: a queued signal carries a value.
                    value: unsafe { info.si_value() }.sival_ptr.addr(),
                    sender: Peer {
                        // SAFETY: a queued signal carries its sender's process id.
                        pid: unsafe { info.si_pid() },
                        // SAFETY: a queued signal carries its sender's user id.
                        uid: unsafe { info.si_uid() },
                    },
                });
                return Ok(Some(Received { number, queued }));
            }
        }
    }
}

/// Sends `SIGHUP` with a value.
///
/// # Errors
///
/// Those of `sigqueue(3)`: `ESRCH`, `EPERM`.
pub(crate) fn queue_hangup(process: Pid, value: usize) -> Result<(), Errno> {
    let value = libc::sigval {
        sival_ptr: std::ptr::without_provenance_mut(value),
    };
    // SAFETY: takes numbers; no code dereferences the value.
    match unsafe { libc::sigqueue(process.as_raw_nonzero().get(), libc::SIGHUP, value) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

/// Makes the kernel send `SIGIO` to this process whenever there is something to read from `pipe`.
///
/// # Errors
///
/// Those of `fcntl(2)`.
pub(crate) fn signal_on_input(pipe: impl AsFd) -> Result<(), Errno> {
    let fd = pipe.as_fd().as_raw_fd();
    let this = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: takes numbers, of a descriptor that is open as long as it is borrowed.
    if unsafe { libc::fcntl(fd, libc::F_SETOWN, this) } != 0 {
        return Err(last_errno());
    }
    // SAFETY: as above.
    if unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK) } != 0 {
        return Err(last_errno());
    }
    Ok(())
}

/// Keeps all open descriptors open over `execve`.
///
/// # Errors
///
/// The table's size can't be read.
pub(crate) fn keep_over_exec() -> std::io::Result<()> {
    for fd in 0..table_size()? {
        // SAFETY: takes numbers; fails for a number that isn't open.
        unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
    }
    Ok(())
}

/// Makes `execve` close all descriptors except standard input, output and error.
///
/// # Errors
///
/// Before Linux 5.11: the table's size can't be read.
pub(crate) fn close_at_exec() -> std::io::Result<()> {
    let first = libc::STDERR_FILENO + 1;
    // SAFETY: takes numbers, and closes nothing now.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            RawFd::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result == 0 {
        return Ok(());
    }
    for fd in first..table_size()? {
        // SAFETY: takes numbers; fails for a number that isn't open.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

/// An upper bound of the descriptor numbers of this process.
fn table_size() -> std::io::Result<RawFd> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mut lines = status.lines();
    let size = lines.find_map(|line| line.strip_prefix("FDSize:")?.trim().parse().ok());
    size.ok_or_else(|| std::io::Error::other("no FDSize in /proc/self/status"))
}

/// Replaces this program by the one in `file`. Returns only if it can't be run.
pub(crate) fn run_instead(
    file: BorrowedFd<'_>,
    arguments: &[CString],
    environment: &[CString],
) -> Errno {
    let list = |texts: &[CString]| -> Vec<*const libc::c_char> {
        let pointers = texts.iter().map(|text| CStr::as_ptr(text));
        pointers.chain([std::ptr::null()]).collect()
    };
    let (arguments, environment) = (list(arguments), list(environment));
    // SAFETY: both lists end with null and point to strings that outlive the call; the descriptor
    // is open.
    unsafe { libc::fexecve(file.as_raw_fd(), arguments.as_ptr(), environment.as_ptr()) };
    last_errno()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_with_several_threads_is_not_cloned() {
        assert_eq!(clone_sharing_descriptors(false), Err(Errno::BUSY));
    }

    #[test]
    fn file_that_is_no_program_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let name = CString::new("name").unwrap();
        let error = run_instead(file.as_fd(), std::slice::from_ref(&name), &[]);
        assert_eq!(error, Errno::ACCESS);
    }

    #[test]
    fn no_signal_within_timeout_is_none() {
        // No test sends this signal.
        let waited = take_signal(&[libc::SIGRTMAX()], Some(Duration::ZERO));
        assert_eq!(waited, Ok(None));
    }
}
