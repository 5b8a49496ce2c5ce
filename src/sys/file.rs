//! File operations that `rustix` lacks or answers less of.
//!
//! The invariant: a buffer that the kernel fills is borrowed exclusively for the whole call.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};

use rustix::io::Errno;

use super::last_errno;

/// Reads raw directory entries (`getdents64(2)`) into `buffer`; answers how many bytes, 0 at
/// the end. Unlike `rustix::fs::RawDir` it leaves the buffer to the caller between calls.
///
/// # Errors
///
/// As the system call.
pub(crate) fn read_directory(directory: impl AsFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    let fd = directory.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `buffer.len()` bytes to `buffer`, which is exclusively
    // borrowed until the call returns; `fd` is open as long as `directory` is borrowed.
    let read =
        unsafe { libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), buffer.len()) };
    let Ok(read) = usize::try_from(read) else {
        return Err(last_errno());
    };
    Ok(read)
}

/// Closes a descriptor and tells what the file system had left to say, which a drop does not.
///
/// # Errors
///
/// Deferred errors of earlier writes (`EIO`, `ENOSPC`, `EDQUOT`). The descriptor is closed all
/// the same.
pub(crate) fn close(fd: OwnedFd) -> Result<(), Errno> {
    // SAFETY: `into_raw_fd` gives up ownership, so nobody else closes or uses the number.
    match unsafe { libc::close(fd.into_raw_fd()) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

/// Sets the size of the file that `path` leads to, following links (`truncate(2)`).
///
/// # Errors
///
/// As the system call; `EFBIG` for a size beyond what an offset can say.
pub(crate) fn truncate(path: &CStr, size: u64) -> Result<(), Errno> {
    let size = libc::off64_t::try_from(size).or(Err(Errno::FBIG))?;
    // SAFETY: `path` is NUL-terminated and borrowed until the call returns.
    match unsafe { libc::truncate64(path.as_ptr(), size) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}
