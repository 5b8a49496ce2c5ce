//! The file system ids and groups of a thread, and a file system context of its own.
//!
//! The ids are set by raw system calls, which change the calling thread alone. The invariant:
//! nothing here changes another thread.

use rustix::fs::Gid;
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

use super::last_errno;

/// Gives the calling thread a root, a working directory and a umask of its own
/// (`unshare(CLONE_FS)`); needs no privilege.
///
/// # Errors
///
/// `ENOMEM`, or whatever a seccomp filter says.
pub(crate) fn unshare_fs_context() -> Result<(), Errno> {
    // SAFETY: `CLONE_FS` leaves the descriptor table shared, so no other thread's descriptors
    // change their meaning (the one danger `unshare_unsafe` names).
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }
}

/// Sets the file system user id of the calling thread, and reads back whether that was done.
///
/// # Errors
///
/// `EPERM` if the thread may not, or if the id has no mapping in its user namespace: the kernel
/// doesn't tell them apart.
pub(crate) fn set_fs_uid(uid: u32) -> Result<(), Errno> {
    // SAFETY: takes a number; changes nothing but the calling thread's credentials.
    let _previous = unsafe { libc::syscall(libc::SYS_setfsuid, uid) };
    verify(fs_uid()?, uid)
}

/// Sets the supplementary groups of the calling thread alone.
///
/// # Errors
///
/// `EPERM` if the thread may not.
pub(crate) fn set_groups(groups: &[Gid]) -> Result<(), Errno> {
    let ids: Vec<u32> = groups.iter().map(|group| group.as_raw()).collect();
    // SAFETY: the kernel reads as many ids as are told from `ids`, which is borrowed during
    // the call; the system call, unlike libc's function, concerns the calling thread alone.
    match unsafe { libc::syscall(libc::SYS_setgroups, ids.len(), ids.as_ptr()) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

/// Sets the file system group id of the calling thread, and reads back whether that was done.
///
/// # Errors
///
/// As [`set_fs_uid`].
pub(crate) fn set_fs_gid(gid: u32) -> Result<(), Errno> {
    // SAFETY: takes a number; changes nothing but the calling thread's credentials.
    let _previous = unsafe { libc::syscall(libc::SYS_setfsgid, gid) };
    verify(fs_gid()?, gid)
}

/// The file system user id of the calling thread.
///
/// # Errors
///
/// Whatever a seccomp filter says.
pub(crate) fn fs_uid() -> Result<u32, Errno> {
    // SAFETY: -1 is no valid id, so the call changes nothing and answers the present one.
    id(unsafe { libc::syscall(libc::SYS_setfsuid, u32::MAX) })
}

/// The file system group id of the calling thread.
///
/// # Errors
///
/// Whatever a seccomp filter says.
pub(crate) fn fs_gid() -> Result<u32, Errno> {
    // SAFETY: -1 is no valid id, so the call changes nothing and answers the present one.
    id(unsafe { libc::syscall(libc::SYS_setfsgid, u32::MAX) })
}

/// The id that a `setfs*id` call answered.
fn id(answer: libc::c_long) -> Result<u32, Errno> {
    match answer {
        -1 => Err(last_errno()),
        // Ids from 2^31 on come back sign-extended on a 32-bit host.
        id => u32::try_from(id & 0xffff_ffff).or(Err(Errno::RANGE)),
    }
}

fn verify(is: u32, should_be: u32) -> Result<(), Errno> {
    if is == should_be && should_be != u32::MAX {
        Ok(())
    } else {
        Err(Errno::PERM)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_cannot_be_is_refused() {
        assert_eq!(set_fs_uid(u32::MAX), Err(Errno::PERM));
        assert_eq!(set_fs_gid(u32::MAX), Err(Errno::PERM));
    }

    #[test]
    fn the_present_id_can_always_be_set() {
        set_fs_uid(fs_uid().unwrap()).unwrap();
        set_fs_gid(fs_gid().unwrap()).unwrap();
    }
}
