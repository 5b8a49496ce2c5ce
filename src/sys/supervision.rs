//! One process in the place of another: a child that shares its parent's descriptors, signals with
//! what they tell, another program in the same process.
//!
//! The invariant: a process is cloned only while it has one thread, and a descriptor outlives an
//! `execve` only where [`keep_over_exec`] was asked for it.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::Pid;

use super::last_errno;
use super::process::{Fork, has_one_thread};

/// Makes another process of this one that shares its table of descriptors: what either opens or
/// closes, the other has open or not, and all stays open until both have ended. With `own_pids`
/// the new process is the first of a PID namespace.
///
/// The C library isn't told of it: it goes on taking the thread for the one it has known. With one
/// thread no lock of its is held; of what it remembers of a thread only its number is wrong in the
/// new process, which nothing there goes by but recursive locks, and these compare it with itself.
///
/// # Errors
///
/// `EBUSY` if the process has more threads than the calling one; as `clone(2)`.
pub(crate) fn clone_sharing_descriptors(own_pids: bool) -> Result<Fork, Errno> {
    if !has_one_thread()? {
        return Err(Errno::BUSY);
    }
    let pids = if own_pids { libc::CLONE_NEWPID } else { 0 };
    let flags = libc::c_long::from(libc::CLONE_FILES | libc::SIGCHLD | pids);
    let none: libc::c_long = 0;
    // SAFETY: memory isn't shared (no CLONE_VM), so the new process goes on with a stack and all
    // else of its own; the process has one thread, so no lock is held by a thread that the new one
    // hasn't got. Descriptors are shared, and what owns them in either process says who closes them.
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

/// A signal that was held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    /// Which.
    pub(crate) signal: libc::c_int,
    /// What came with it, where it was queued (`sigqueue(3)`).
    pub(crate) queued: Option<Queued>,
}

/// What comes with a signal that is queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queued {
    /// The sender's number.
    pub value: usize,
    /// Who the sender says it is. Whoever may send the signal may say what it likes.
    pub sender: Peer,
}

/// A process and its user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its number; 0 for one that has none here.
    pub pid: i32,
    /// The user's number.
    pub uid: u32,
}

/// Who has connected, or listened, at the other end of a unix socket (`SO_PEERCRED`).
///
/// # Errors
///
/// As `getsockopt(2)`.
pub(crate) fn peer(socket: impl AsFd) -> Result<Peer, Errno> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).unwrap_or(0);
    // SAFETY: the kernel writes as many bytes of `peer` as `len` says it has, and `len`; the descriptor
    // is open as long as it is borrowed.
    let done = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    match done {
        0 => Ok(Peer {
            pid: peer.pid,
            uid: peer.uid,
        }),
        _ => Err(last_errno()),
    }
}

/// Of `signals`, which are held, takes one that has come, or waits for one; for as long as `patience`
/// says, or without end. `None` if none has come.
///
/// # Errors
///
/// Whatever a seccomp filter says.
pub(crate) fn take_signal(
    signals: &[libc::c_int],
    patience: Option<Duration>,
) -> Result<Option<Told>, Errno> {
    let set = super::process::signal_set(signals);
    let timeout = patience.map(|patience| libc::timespec {
        tv_sec: patience.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_nsec: patience.subsec_nanos().into(),
    });
    let timeout = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: all zeroes is a valid `siginfo_t`.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: the kernel reads `set` and `timeout`, which is null or points to what lives on this
        // stack, and writes `info`.
        match unsafe { libc::sigtimedwait(&raw const set, &raw mut info, timeout) } {
            -1 => match last_errno() {
                Errno::INTR => {}
                Errno::AGAIN => return Ok(None),
                errno => return Err(errno),
            },
            signal => {
                let queued = (info.si_code == libc::SI_QUEUE).then(|| Queued {
                    // SAFETY: a signal that was queued carries a value.
                    value: unsafe { info.si_value() }.sival_ptr.addr(),
                    sender: Peer {
                        // SAFETY: and its sender.
                        pid: unsafe { info.si_pid() },
                        // SAFETY: and that one's user.
                        uid: unsafe { info.si_uid() },
                    },
                });
                return Ok(Some(Told { signal, queued }));
            }
        }
    }
}

/// Sends `SIGHUP` with a number.
///
/// # Errors
///
/// As `sigqueue(3)`: `ESRCH`, `EPERM`.
pub(crate) fn queue_hangup(process: Pid, value: usize) -> Result<(), Errno> {
    let value = libc::sigval {
        sival_ptr: std::ptr::without_provenance_mut(value),
    };
    // SAFETY: takes numbers; nobody takes the value for an address.
    match unsafe { libc::sigqueue(process.as_raw_nonzero().get(), libc::SIGHUP, value) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

/// Has `SIGIO` come whenever there is something to read from `pipe`.
///
/// # Errors
///
/// As `fcntl(2)`.
pub(crate) fn tell_by_signal(pipe: impl AsFd) -> Result<(), Errno> {
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

/// Lets all descriptors that are open stay so when another program is run.
///
/// # Errors
///
/// The table's size can't be read.
pub(crate) fn keep_over_exec() -> std::io::Result<()> {
    for fd in 0..table_size()? {
        // SAFETY: takes numbers; of a number that isn't open it says so.
        unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
    }
    Ok(())
}

/// Has all descriptors but standard input, output and error closed when another program is run.
///
/// # Errors
///
/// Before Linux 5.11: the table's size can't be read.
pub(crate) fn close_at_exec() -> std::io::Result<()> {
    let first = libc::STDERR_FILENO + 1;
    // SAFETY: takes numbers, and closes nothing now.
    let done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            RawFd::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if done == 0 {
        return Ok(());
    }
    for fd in first..table_size()? {
        // SAFETY: takes numbers; of a number that isn't open it says so.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

/// No descriptor of this process has a number as high as this.
fn table_size() -> std::io::Result<RawFd> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mut lines = status.lines();
    let size = lines.find_map(|line| line.strip_prefix("FDSize:")?.trim().parse().ok());
    size.ok_or_else(|| std::io::Error::other("no FDSize in /proc/self/status"))
}

/// Runs the program that `file` is in the place of this one; comes back only if it can't be run.
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
    // SAFETY: both lists end with null and point to strings that live on; the descriptor is open.
    unsafe { libc::fexecve(file.as_raw_fd(), arguments.as_ptr(), environment.as_ptr()) };
    last_errno()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_of_several_threads_is_not_cloned() {
        assert_eq!(clone_sharing_descriptors(false), Err(Errno::BUSY));
    }

    #[test]
    fn what_is_no_program_can_not_be_run_instead() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let name = CString::new("name").unwrap();
        let error = run_instead(file.as_fd(), std::slice::from_ref(&name), &[]);
        assert_eq!(error, Errno::ACCESS);
    }

    #[test]
    fn no_signal_comes_of_itself() {
        // Of all signals the one that nobody sends: no thread of the tests holds it.
        let waited = take_signal(&[libc::SIGRTMAX()], Some(Duration::ZERO));
        assert_eq!(waited, Ok(None));
    }
}
