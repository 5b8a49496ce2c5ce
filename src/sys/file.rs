//! File operations that `rustix` lacks, or whose results it hides.
//!
//! The invariant: a buffer that the kernel fills is exclusively borrowed for the whole call.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};

use rustix::io::Errno;

use super::last_errno;

/// Reads raw directory entries (`getdents64(2)`) into `buffer`; returns the number of bytes, 0 at
/// the end. Unlike with `rustix::fs::RawDir`, the caller owns the buffer between calls.
///
/// # Errors
///
/// Those of the system call.
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

/// Closes a descriptor and returns the error of `close(2)`, which a drop ignores.
///
/// # Errors
///
/// Deferred errors of earlier writes (`EIO`, `ENOSPC`, `EDQUOT`). The descriptor is closed in any
/// case.
pub(crate) fn close(fd: OwnedFd) -> Result<(), Errno> {
    // SAFETY: `into_raw_fd` gives up ownership, so no other code closes or uses the number.
    match unsafe { libc::close(fd.into_raw_fd()) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

/// Sets the size of the file that `path` leads to, following links (`truncate(2)`).
///
/// # Errors
///
/// Those of the system call; `EFBIG` for a size beyond the largest offset.
pub(crate) fn truncate(path: &CStr, size: u64) -> Result<(), Errno> {
    let size = libc::off64_t::try_from(size).or(Err(Errno::FBIG))?;
    // SAFETY: `path` is NUL-terminated and borrowed until the call returns.
    match unsafe { libc::truncate64(path.as_ptr(), size) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}
