//! Leaving the host's file systems: mount namespace and `pivot_root`, or `chroot`.
//!
//! The invariant: what is answered as the root was opened where the server lives from now on.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::SandboxError;
use super::supervisor::Taken;
use crate::sys::process;

/// Of a mount through which nothing is changed (uapi `linux/mount.h`).
const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY;
/// Of a mount on which nothing is run, no device opened: what the guest makes is its own affair.
const INERT: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// What is left of the host's file systems.
#[derive(Debug)]
pub(super) struct View {
    pub(super) root: OwnedFd,
    pub(super) proc_fds: OwnedFd,
    /// The mount namespace, if it is not the guardian's.
    pub(super) mounts: Option<OwnedFd>,
    /// What is shared, where that is a single file: the root then is a directory with it alone.
    pub(super) file: Option<OwnedFd>,
}

/// A step of one kind of sandbox that fails.
fn namespace_step(act: &'static str) -> impl Fn(Errno) -> SandboxError {
    move |source| SandboxError::Mounts {
        kind: "namespace",
        act,
        other: "chroot",
        source,
    }
}

fn chroot_step(act: &'static str) -> impl Fn(Errno) -> SandboxError {
    move |source| SandboxError::Mounts {
        kind: "chroot",
        act,
        other: "none",
        source,
    }
}

/// Namespaces for mounts, network and IPC; the PID namespace has begun with the process.
pub(super) fn namespace(share: &Path, readonly: bool) -> Result<View, SandboxError> {
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC;
    process::unshare_namespaces(flags).map_err(SandboxError::Privilege)?;
    // What is mounted here stays here; what the host mounts in the shared directory comes along.
    let slaves = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", slaves)
        .map_err(namespace_step("can't make the mounts its own"))?;
    let proc_fds = clone_proc_fds().map_err(namespace_step(
        "can't keep /proc/self/fd (is /proc mounted?)",
    ))?;
    let mounts = rustix::fs::open(
        c"/proc/self/ns/mnt",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(namespace_step(
        "can't keep its mount namespace (is /proc mounted?)",
    ))?;
    let tree = clone_share(share, readonly).map_err(|source| SandboxError::Share {
        path: share.to_owned(),
        source,
    })?;
    let unusable = namespace_step("can't make the shared directory the root of mounts");
    // Any directory would do: it is gone with the rest.
    let file = if kind_of(&tree).map_err(&unusable)? == FileType::Directory {
        move_to(&tree, c"/proc").map_err(&unusable)?;
        enter(&tree, share)?.map_err(&unusable)?;
        None
    } else {
        furnish(c"/proc", share, &tree).map_err(&unusable)?;
        rustix::process::chdir(c"/proc").map_err(&unusable)?;
        Some(tree)
    };
    let leave =
        namespace_step("can't leave the host's root (pivot_root fails where that is an initramfs)");
    // The old root comes to lie on the new one, and is taken away from there.
    rustix::process::pivot_root(c".", c".").map_err(&leave)?;
    rustix::mount::unmount(c".", UnmountFlags::DETACH).map_err(&leave)?;
    rustix::process::chdir(c"/").map_err(&leave)?;
    Ok(View {
        root: open(Path::new("/"), OFlags::DIRECTORY).map_err(&leave)?,
        proc_fds,
        mounts: Some(mounts),
        file,
    })
}

fn back(act: &'static str) -> impl Fn(Errno) -> SandboxError {
    move |source| SandboxError::Back { act, source }
}

/// Back into the mount namespace that an earlier process has made: what it has opened there can be
/// linked and renamed with what is opened now only if the mounts are the same. Network and IPC are
/// new.
pub(super) fn namespace_again(taken: Taken) -> Result<View, SandboxError> {
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC;
    process::unshare_namespaces(flags).map_err(SandboxError::Privilege)?;
    // There is no /proc where it goes.
    let proc_fds =
        clone_proc_fds().map_err(back("can't keep /proc/self/fd (is /proc mounted?)"))?;
    let lost = back("can't enter its mount namespace")(Errno::BADF);
    let mounts = taken.mounts.ok_or(lost)?;
    rustix::thread::move_into_link_name_space(mounts.as_fd(), Some(LinkNameSpaceType::Mount))
        .map_err(back("can't enter its mount namespace"))?;
    Ok(View {
        root: taken.root,
        proc_fds,
        mounts: Some(mounts),
        file: None,
    })
}

/// Mounts a directory at `place` that nothing can be changed in, and in it, under the name that
/// it has as `share`, the single file that `tree` is.
fn furnish(place: &CStr, share: &Path, tree: &OwnedFd) -> Result<(), Errno> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount(c"none", place, c"tmpfs", flags, c"size=4k,mode=755")?;
    let directory = rustix::fs::open(place, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let name = CString::new(share.file_name().ok_or(Errno::INVAL)?.as_bytes())
        .map_err(|_nul| Errno::INVAL)?;
    let new = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(&directory, &name, new, Mode::empty())?;
    let onto = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(tree, c"", &directory, &name, onto)?;
    rustix::mount::mount_remount(place, flags | MountFlags::RDONLY, c"")
}

fn move_to(tree: &OwnedFd, place: &CStr) -> Result<(), Errno> {
    let from_itself = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(tree, c"", CWD, place, from_itself)
}

/// Another root, and nothing else.
pub(super) fn chroot(share: &Path, readonly: bool) -> Result<View, SandboxError> {
    let place = open_in_place(share, readonly)?;
    let change = chroot_step("can't change the root, which takes CAP_SYS_CHROOT");
    enter(&place.root, share)?.map_err(&change)?;
    change_root(&place.root).map_err(&change)?;
    Ok(place)
}

/// Makes the directory the working one; tells whose fault it is if it may not be searched.
fn enter(directory: &OwnedFd, share: &Path) -> Result<Result<(), Errno>, SandboxError> {
    match rustix::process::fchdir(directory) {
        Err(Errno::ACCESS) => Err(SandboxError::NoEntry {
            path: share.to_owned(),
            user: rustix::process::geteuid().as_raw(),
        }),
        entered => Ok(entered),
    }
}

/// To the root that an earlier process has had.
pub(super) fn chroot_again(taken: Taken) -> Result<View, SandboxError> {
    let place = none_again(taken)?;
    change_root(&place.root).map_err(chroot_step(
        "can't change the root, which takes CAP_SYS_CHROOT",
    ))?;
    Ok(place)
}

fn change_root(root: &OwnedFd) -> Result<(), Errno> {
    rustix::process::fchdir(root)?;
    rustix::process::chroot(c".")?;
    rustix::process::chdir(c"/")
}

/// The host's own mounts; a read-only copy of the share's where the server has the privilege.
pub(super) fn none(share: &Path, readonly: bool) -> Result<View, SandboxError> {
    let view = open_in_place(share, readonly)?;
    // The working directory stays the launcher's.
    let search = rustix::fs::accessat(&view.root, c".", Access::EXEC_OK, AtFlags::EACCESS);
    if search == Err(Errno::ACCESS) {
        return Err(SandboxError::NoEntry {
            path: share.to_owned(),
            user: rustix::process::geteuid().as_raw(),
        });
    }
    Ok(view)
}

fn open_in_place(share: &Path, readonly: bool) -> Result<View, SandboxError> {
    let failed = |source| SandboxError::Share {
        path: share.to_owned(),
        source,
    };
    let proc_fds = any_proc_fds().map_err(failed)?;
    let root = if readonly {
        clone_share(share, true).or_else(|error| {
            if matches!(error, Errno::PERM | Errno::NOSYS | Errno::INVAL) {
                log::info!(
                    "--readonly: kept by the server alone, as mounts can't be made ({error})"
                );
                open(share, OFlags::empty())
            } else {
                Err(error)
            }
        })
    } else {
        open(share, OFlags::empty())
    };
    let root = root.map_err(failed)?;
    if kind_of(&root).map_err(failed)? != FileType::Directory {
        return Err(SandboxError::NotADirectory(share.to_owned()));
    }
    Ok(View {
        root,
        proc_fds,
        mounts: None,
        file: None,
    })
}

/// The same, with the root that an earlier process has had.
pub(super) fn none_again(taken: Taken) -> Result<View, SandboxError> {
    let proc_fds = any_proc_fds().map_err(back("can't keep /proc/self/fd (is /proc mounted?)"))?;
    Ok(View {
        root: taken.root,
        proc_fds,
        mounts: None,
        file: None,
    })
}

/// Without the privilege there is a way up from it, to what the host lets the server see.
fn any_proc_fds() -> Result<OwnedFd, Errno> {
    clone_proc_fds().or_else(|_without| open(Path::new("/proc/self/fd"), OFlags::DIRECTORY))
}

/// `/proc/self/fd` as a mount without a parent, from which no `..` leads up.
fn clone_proc_fds() -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(CWD, c"/proc/self/fd", flags)
}

/// A copy of what is mounted at and below the shared directory.
fn clone_share(share: &Path, readonly: bool) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(CWD, share, flags)?;
    let wanted = if readonly { INERT | READ_ONLY } else { INERT };
    let set = |attributes| process::add_mount_attributes(&tree, attributes);
    match set(wanted | libc::MOUNT_ATTR_NOSYMFOLLOW) {
        // The last one is younger than the rest.
        Err(Errno::INVAL) => set(wanted)?,
        // What they refuse the server itself refuses too.
        Err(Errno::NOSYS) => {
            log::info!("the flags of the share's mount stay as they are: Linux 5.12 can set them");
        }
        done => done?,
    }
    Ok(tree)
}

fn open(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, flags | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

fn kind_of(fd: impl AsFd) -> Result<FileType, Errno> {
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::TYPE)?;
    Ok(FileType::from_raw_mode(u32::from(stat.stx_mode)))
}
