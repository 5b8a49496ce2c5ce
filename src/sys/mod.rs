//! Thin typed wrappers over system calls that `rustix` does not have.
//!
//! There is no policy here. A function makes one system call, takes owned or borrowed descriptors
//! instead of numbers, and returns [`Errno`]. `fd_slot` shares the ownership of a descriptor. The
//! invariant: no code outside of this module needs `unsafe` to make a system call.

#![allow(
    unsafe_code,
    reason = "raw system calls are made here and nowhere else"
)]

pub(crate) mod clock;
pub(crate) mod closing;
pub(crate) mod credentials;
pub(crate) mod fd_slot;
pub(crate) mod file;
pub(crate) mod file_handle;
pub(crate) mod group;
pub(crate) mod heap;
pub(crate) mod inherit;
pub(crate) mod inode_flags;
pub(crate) mod landlock;
pub(crate) mod lock;
pub(crate) mod process;
pub(crate) mod project_quota;
pub(crate) mod receipt;
pub(crate) mod rights;
pub(crate) mod shared;
pub(crate) mod supervision;
pub(crate) mod text_pages;

use rustix::io::Errno;

/// The `errno` of the last libc call of this thread that failed.
pub(crate) fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
