//! Extended inode flags (`FS_IOC_FSGETXATTR`, uapi `linux/fs.h`). `rustix` has the plain flags.
//!
//! The invariant: the kernel reads and writes one [`ExtendedFlags`], whose size is part of the
//! request's number.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::last_errno;

/// `FS_IOC_FSGETXATTR`: `_IOR('X', 31, struct fsxattr)`.
const GET: libc::Ioctl = 0x801c_581f;
/// `FS_IOC_FSSETXATTR`: `_IOW('X', 32, struct fsxattr)`.
const SET: libc::Ioctl = 0x401c_5820;

/// `struct fsxattr`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub(crate) struct ExtendedFlags {
    pub(crate) flags: u32,
    pub(crate) extent_size: u32,
    pub(crate) extents: u32,
    pub(crate) project: u32,
    pub(crate) copy_extent_size: u32,
    pub(crate) padding: [u8; 8],
}

const _: () = assert!(size_of::<ExtendedFlags>() == 28);

/// Reads the extended flags.
///
/// # Errors
///
/// `ENOTTY` or `EOPNOTSUPP` if the file system has none.
pub(crate) fn get(fd: impl AsFd) -> Result<ExtendedFlags, Errno> {
    let mut flags = ExtendedFlags::default();
    // SAFETY: by the request's number the kernel writes 28 bytes, which are exclusively borrowed
    // during the call; any bytes are valid; `fd` is open as long as it is borrowed.
    match unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), GET, &raw mut flags) } {
        -1 => Err(last_errno()),
        _ => Ok(flags),
    }
}

/// Sets the extended flags.
///
/// # Errors
///
/// As for [`get`]; `EPERM` for flags that the server may not set.
pub(crate) fn set(fd: impl AsFd, flags: &ExtendedFlags) -> Result<(), Errno> {
    // SAFETY: by the request's number the kernel reads 28 bytes, which are borrowed during the
    // call; `fd` is open as long as it is borrowed.
    match unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), SET, std::ptr::from_ref(flags)) } {
        -1 => Err(last_errno()),
        _ => Ok(()),
    }
}
