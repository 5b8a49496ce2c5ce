//! Locks of byte ranges (`fcntl`), of a process and of an open file. Invariant: none.

#![expect(unsafe_code, reason = "fcntl's locks have no safe wrapper for ranges")]

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// Whose the lock is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The process's: POSIX's own kind.
    Process,
    /// The open file's.
    OpenFile,
}

impl Owner {
    /// The command of `fcntl(2)` that sets a lock of this owner.
    fn command(self, wait: bool) -> i32 {
        match (self, wait) {
            (Self::Process, false) => libc::F_SETLK,
            (Self::Process, true) => libc::F_SETLKW,
            (Self::OpenFile, false) => libc::F_OFD_SETLK,
            (Self::OpenFile, true) => libc::F_OFD_SETLKW,
        }
    }
}

/// What to set a range to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Unlock,
}

/// A range of bytes: where it starts, and how many.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range(pub(crate) i64, pub(crate) i64);

fn description(kind: Kind, Range(start, length): Range) -> libc::flock {
    let kind = match kind {
        Kind::Read => libc::F_RDLCK,
        Kind::Write => libc::F_WRLCK,
        Kind::Unlock => libc::F_UNLCK,
    };
    libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: start,
        l_len: length,
        l_pid: 0,
    }
}

fn call(file: BorrowedFd<'_>, command: i32, lock: &mut libc::flock) -> Result<(), Errno> {
    // SAFETY: every command used here takes a pointer to this structure, which outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) } {
        -1 => Err(Errno::from_raw_os_error(
            std::io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO),
        )),
        _ => Ok(()),
    }
}

/// Sets a range without waiting; `EAGAIN` or `EACCES` where another holds it.
pub(crate) fn set(
    file: BorrowedFd<'_>,
    owner: Owner,
    kind: Kind,
    range: Range,
) -> Result<(), Errno> {
    call(file, owner.command(false), &mut description(kind, range))
}

/// Locks a range, waits for its holder.
pub(crate) fn set_waiting(
    file: BorrowedFd<'_>,
    owner: Owner,
    kind: Kind,
    range: Range,
) -> Result<(), Errno> {
    call(file, owner.command(true), &mut description(kind, range))
}

/// The process that would keep this one from locking the range, if any.
pub(crate) fn holder(file: BorrowedFd<'_>, kind: Kind, range: Range) -> Result<Option<i32>, Errno> {
    let mut lock = description(kind, range);
    call(file, libc::F_GETLK, &mut lock)?;
    Ok((i32::from(lock.l_type) != libc::F_UNLCK).then_some(lock.l_pid))
}
