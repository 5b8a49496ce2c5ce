//! Project quotas (`quotactl_fd(2)`, uapi `linux/quota.h` and `linux/dqblk_xfs.h`).
//!
//! The invariant: the kernel reads and writes structures of the size that belongs to the command.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

use super::last_errno;

/// `PRJQUOTA`.
const PROJECT: u32 = 2;
/// `Q_GETQUOTA`.
const GET: u32 = 0x80_0007;
/// `Q_SETQUOTA`.
const SET: u32 = 0x80_0008;
/// `Q_XGETQSTAT`, which all file systems with quotas know.
const STATUS: u32 = 0x5805;
/// `FS_QUOTA_PDQ_ENFD`: limits of projects are enforced.
const ENFORCED: u16 = 1 << 5;
/// `QIF_BLIMITS` and `QIF_ILIMITS`.
const LIMITS: u32 = 1 | 4;

/// What a project uses, and how much it may use. `struct if_dqblk`; space is in units of 1 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Quota {
    /// Maximum space, KiB; 0 for no limit.
    pub(crate) space_limit: u64,
    soft_space_limit: u64,
    /// Bytes in use.
    pub(crate) space: u64,
    /// Maximum inodes; 0 for no limit.
    pub(crate) inode_limit: u64,
    soft_inode_limit: u64,
    /// Inodes in use.
    pub(crate) inodes: u64,
    space_time: u64,
    inode_time: u64,
    valid: u32,
    padding: u32,
}

const _: () = assert!(size_of::<Quota>() == 72);

impl Quota {
    /// Whether the project has neither files nor limits.
    pub(crate) fn is_unused(&self) -> bool {
        let numbers = [
            self.space_limit,
            self.soft_space_limit,
            self.space,
            self.inode_limit,
            self.soft_inode_limit,
            self.inodes,
        ];
        numbers == [0; 6]
    }
}

/// `struct fs_quota_stat`, of which only the flags matter.
#[repr(C)]
struct Status {
    version: i8,
    flags: u16,
    rest: [u64; 16],
}

/// `command` and the type of quota as one number.
fn command(command: u32) -> u32 {
    command << 8 | PROJECT
}

/// Calls `quotactl_fd` for a project.
///
/// # Safety
///
/// What `argument` points to must be valid for what `command` reads and writes, during the call.
unsafe fn call<T>(
    fd: impl AsFd,
    command: u32,
    project: u32,
    argument: *mut T,
) -> Result<(), Errno> {
    let fd = fd.as_fd();
    // SAFETY: the caller vouches for `argument`; `fd` is open as long as it is borrowed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_quotactl_fd,
            fd.as_raw_fd(),
            command,
            project,
            argument,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(last_errno())
    }
}

/// Whether the file system of `fd` enforces limits of projects.
///
/// # Errors
///
/// `ENOSYS` before Linux 5.14 or if the file system has no quotas, `ESRCH` if they are off.
pub(crate) fn is_enforced(fd: impl AsFd) -> Result<bool, Errno> {
    let mut status = Status {
        version: 1,
        flags: 0,
        rest: [0; 16],
    };
    // SAFETY: the kernel writes `struct fs_quota_stat`, 80 bytes, which are less than `status`
    // has; any bytes are valid, and they are exclusively borrowed during the call.
    unsafe { call(fd, command(STATUS), 0, &raw mut status) }?;
    let _unused = (status.version, status.rest);
    Ok(status.flags & ENFORCED != 0)
}

/// Reads the quota of a project on the file system of `fd`.
///
/// # Errors
///
/// `ESRCH` if there are no quotas of projects; `EPERM` without `CAP_SYS_ADMIN`.
pub(crate) fn get(fd: impl AsFd, project: u32) -> Result<Quota, Errno> {
    let mut quota = Quota::default();
    // SAFETY: the kernel writes `struct if_dqblk`, which `Quota` is; any bytes are valid, and they
    // are exclusively borrowed during the call.
    unsafe { call(fd, command(GET), project, &raw mut quota) }?;
    Ok(quota)
}

/// Sets both limits of a project on the file system of `fd`; 0 is no limit.
///
/// # Errors
///
/// As for [`get`]; `ERANGE` if the file system can't store a limit as large.
pub(crate) fn set_limits(
    fd: impl AsFd,
    project: u32,
    (space_limit, inode_limit): (u64, u64),
) -> Result<(), Errno> {
    let mut quota = Quota {
        space_limit,
        inode_limit,
        valid: LIMITS,
        ..Quota::default()
    };
    // SAFETY: the kernel reads `struct if_dqblk`, which `Quota` is; it is borrowed during the call.
    unsafe { call(fd, command(SET), project, &raw mut quota) }
}
