//! The file system ids, groups and file system context of one thread.
//!
//! Raw system calls set the ids: they change the calling thread alone, unlike libc's functions. The
//! invariant: no function here changes another thread.

use rustix::fs::Gid;
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

use super::last_errno;

/// Gives the calling thread its own root, working directory and umask (`unshare(CLONE_FS)`); needs
/// no privilege.
///
/// # Errors
///
/// `ENOMEM`, or the error of a seccomp filter.
pub(crate) fn unshare_fs_context() -> Result<(), Errno> {
    // SAFETY: `CLONE_FS` leaves the descriptor table shared, so no other thread's descriptors
    // change their meaning (the one danger that `unshare_unsafe` names).
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }
}

/// Sets the file system user id of the calling thread, and checks that it is set.
///
/// # Errors
///
/// `EPERM` if the thread may not set it, or if the id isn't mapped in its user namespace: the
/// kernel doesn't distinguish the two.
pub(crate) fn set_fs_uid(uid: u32) -> Result<(), Errno> {
    // SAFETY: takes a number; changes nothing but the calling thread's credentials.
    let _previous = unsafe { libc::syscall(libc::SYS_setfsuid, uid) };
    verify(fs_uid()?, uid)
}

/// Sets the supplementary groups of the calling thread alone.
///
/// # Errors
///
/// `EPERM` if the thread may not set them.
pub(crate) fn set_groups(groups: &[Gid]) -> Result<(), Errno> {
    let ids: Vec<u32> = groups.iter().map(|group| group.as_raw()).collect();
    // SAFETY: the kernel reads `ids.len()` ids from `ids`, which is borrowed during the call; the
    // system call, unlike libc's function, changes the calling thread alone.
    match unsafe { libc::syscall(libc::SYS_setgroups, ids.len(), ids.as_ptr()) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

/// Sets the file system group id of the calling thread, and checks that it is set.
///
/// # Errors
///
/// As for [`set_fs_uid`].
pub(crate) fn set_fs_gid(gid: u32) -> Result<(), Errno> {
    // SAFETY: takes a number; changes nothing but the calling thread's credentials.
    let _previous = unsafe { libc::syscall(libc::SYS_setfsgid, gid) };
    verify(fs_gid()?, gid)
}

/// The file system user id of the calling thread.
///
/// # Errors
///
/// The error of a seccomp filter.
pub(crate) fn fs_uid() -> Result<u32, Errno> {
    // SAFETY: -1 is no valid id, so the call changes nothing and returns the present one.
    id(unsafe { libc::syscall(libc::SYS_setfsuid, u32::MAX) })
}

/// The file system group id of the calling thread.
///
/// # Errors
///
/// The error of a seccomp filter.
pub(crate) fn fs_gid() -> Result<u32, Errno> {
    // SAFETY: -1 is no valid id, so the call changes nothing and returns the present one.
    id(unsafe { libc::syscall(libc::SYS_setfsgid, u32::MAX) })
}

/// The id that a `setfs*id` call has returned.
fn id(returned: libc::c_long) -> Result<u32, Errno> {
    match returned {
        -1 => Err(last_errno()),
        // Ids from 2^31 on are returned sign-extended on a 32-bit host.
        id => u32::try_from(id & 0xffff_ffff).or(Err(Errno::RANGE)),
    }
}

fn verify(actual: u32, wanted: u32) -> Result<(), Errno> {
    if actual == wanted && wanted != u32::MAX {
        Ok(())
    } else {
        Err(Errno::PERM)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_id_is_refused() {
        assert_eq!(set_fs_uid(u32::MAX), Err(Errno::PERM));
        assert_eq!(set_fs_gid(u32::MAX), Err(Errno::PERM));
    }

    #[test]
    fn present_id_can_be_set_again() {
        set_fs_uid(fs_uid().unwrap()).unwrap();
        set_fs_gid(fs_gid().unwrap()).unwrap();
    }
}
