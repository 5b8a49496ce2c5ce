//! Takes over and closes descriptors that the launcher or an earlier process has left open.
//!
//! The invariant: a descriptor that is taken over has one owner, and is closed on `execve`.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use rustix::io::Errno;

use super::last_errno;

/// Takes over the descriptor `fd`, which the launcher has named on the command line.
///
/// Must be called at the start, before other descriptors are made: a number that the launcher
/// didn't leave open could later be a descriptor of this program.
///
/// # Errors
///
/// `EBADF` if it isn't open.
pub(crate) fn inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: F_GETFD on any number only returns flags, or an error if it isn't open.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, the caller says that it was left for this program to own, and no other
    // code takes it over.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// Takes over the descriptor `fd`, which the previous process has recorded as its own. This process
/// has inherited the descriptors of that process.
///
/// Must be called once for a number, before other descriptors are made that could get it.
///
/// # Errors
///
/// `EBADF` if it isn't open, or is one of the standard three.
pub(crate) fn recorded_fd(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= libc::STDERR_FILENO {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    inherited_fd(fd)
}

/// Closes all descriptors of the process except standard input, output and error and `keep`: one
/// that a launcher has left open by mistake may lead out of the sandbox.
///
/// Must be called at the start, when each descriptor that has an owner is named in `keep`.
///
/// # Errors
///
/// Before Linux 5.9: the descriptors can't be listed.
pub(crate) fn close_all_but(keep: &[RawFd]) -> io::Result<()> {
    let mut keep = keep.to_vec();
    keep.retain(|fd| *fd > libc::STDERR_FILENO);
    keep.sort_unstable();
    let mut first = libc::STDERR_FILENO + 1;
    for fd in keep {
        close_range(first, fd - 1)?;
        first = fd + 1;
    }
    close_range(first, RawFd::MAX)
}

/// Closes the descriptors from `first` to `last`.
fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: takes numbers; by the caller's promise none of these descriptors has an owner.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } {
        0 => return Ok(()),
        _ if last_errno() == Errno::NOSYS => {}
        _ => return Err(io::Error::last_os_error()),
    }
    // The listing contains its own descriptor, which is closed once the listing is complete.
    let open: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| (first..=last).contains(fd))
        .collect();
    for fd in open {
        // SAFETY: as above.
        unsafe { libc::close(fd) };
    }
    Ok(())
}
