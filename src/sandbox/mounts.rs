//! Leaves the host's file systems: mount namespace and `pivot_root`, or `chroot`.
//!
//! The invariant: the root that is returned was opened in the mount namespace in which the process
//! serves.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};
use rustix::path::Arg;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::SandboxError;
use super::respawn::OpenRefs;
use crate::sys::process;

/// The attribute of a read-only mount (uapi `linux/mount.h`).
const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY;
/// The attributes of a mount on which no program is run and no device opened, whatever a guest
/// creates.
const INERT: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// What the process can reach of the host's file systems.
#[derive(Debug)]
pub(super) struct View {
    pub(super) root: OwnedFd,
    pub(super) proc_fds: OwnedFd,
    /// The mount namespace, if it is not the guardian's.
    pub(super) mounts: Option<OwnedFd>,
    /// The share if it is a single file: the root is then a directory that contains only this file.
    pub(super) file: Option<OwnedFd>,
}

/// The error of a step of `--sandbox namespace`.
pub(super) fn namespace_step(step: &'static str) -> impl Fn(Errno) -> SandboxError {
    failed_step("namespace", "chroot", step)
}

/// The error of a step of `--sandbox chroot`.
fn chroot_step(step: &'static str) -> impl Fn(Errno) -> SandboxError {
    failed_step("chroot", "none", step)
}

fn failed_step(
    kind: &'static str,
    other: &'static str,
    step: &'static str,
) -> impl Fn(Errno) -> SandboxError {
    move |source| SandboxError::Mounts {
        kind,
        step,
        other,
        source,
    }
}

/// Enters new mount, network and IPC namespaces, with the share as root. The PID namespace has
/// begun with the process.
pub(super) fn namespace(share: &Path, readonly: bool) -> Result<View, SandboxError> {
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC;
    process::unshare_namespaces(flags).map_err(SandboxError::Privilege)?;
    make_mounts_slaves()?;
    let proc_fds = keep_proc_fds()?;
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
    let unusable = namespace_step("can't make the shared directory the root");
    // Any directory would do: it is unmounted with the rest.
    let file = if kind_of(&tree).map_err(&unusable)? == FileType::Directory {
        move_to(&tree, CWD, "/proc").map_err(&unusable)?;
        enter(&tree, share)?.map_err(&unusable)?;
        None
    } else {
        mount_single_file(c"/proc", share, &tree).map_err(&unusable)?;
        rustix::process::chdir(c"/proc").map_err(&unusable)?;
        Some(tree)
    };
    Ok(View {
        root: leave_root()?,
        proc_fds,
        mounts: Some(mounts),
        file,
    })
}

/// Keeps mounts that are made from here on in this namespace. Mounts that the host makes in what is
/// shared appear here.
pub(super) fn make_mounts_slaves() -> Result<(), SandboxError> {
    let slaves = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", slaves)
        .map_err(namespace_step("can't make the mounts private"))
}

/// `/proc/self/fd`, before `/proc` is given up.
pub(super) fn keep_proc_fds() -> Result<OwnedFd, SandboxError> {
    clone_proc_fds().map_err(namespace_step(
        "can't keep /proc/self/fd (is /proc mounted?)",
    ))
}

/// Makes the working directory the root, and unmounts everything else. Returns the root.
pub(super) fn leave_root() -> Result<OwnedFd, SandboxError> {
    let leave =
        namespace_step("can't leave the host's root (pivot_root fails where that is an initramfs)");
    // This mounts the old root on top of the new one, from where it is unmounted.
    rustix::process::pivot_root(c".", c".").map_err(&leave)?;
    rustix::mount::unmount(c".", UnmountFlags::DETACH).map_err(&leave)?;
    rustix::process::chdir(c"/").map_err(&leave)?;
    open(Path::new("/"), OFlags::DIRECTORY).map_err(&leave)
}

/// The error of a step of entering an earlier process's mounts.
fn reenter_step(step: &'static str) -> impl Fn(Errno) -> SandboxError {
    move |source| SandboxError::Reenter { step, source }
}

/// Enters the mount namespace of an earlier serving process: files that it has opened there can be
/// linked and renamed together with files that are opened now only if the mounts are the same. The
/// network and IPC namespaces are new.
pub(super) fn reenter_namespace(previous: OpenRefs) -> Result<View, SandboxError> {
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC;
    process::unshare_namespaces(flags).map_err(SandboxError::Privilege)?;
    // There is no /proc in that namespace.
    let proc_fds =
        clone_proc_fds().map_err(reenter_step("can't keep /proc/self/fd (is /proc mounted?)"))?;
    let missing = reenter_step("can't enter its mount namespace")(Errno::BADF);
    let mounts = previous.mounts.ok_or(missing)?;
    rustix::thread::move_into_link_name_space(mounts.as_fd(), Some(LinkNameSpaceType::Mount))
        .map_err(reenter_step("can't enter its mount namespace"))?;
    Ok(View {
        root: previous.root,
        proc_fds,
        mounts: Some(mounts),
        file: None,
    })
}

/// Mounts a read-only directory at `target` and in it the single file `tree`, under its name in
/// `share`.
fn mount_single_file(target: &CStr, share: &Path, tree: &OwnedFd) -> Result<(), Errno> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount(c"none", target, c"tmpfs", flags, c"size=4k,mode=755")?;
    let directory = rustix::fs::open(target, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let name = CString::new(share.file_name().ok_or(Errno::INVAL)?.as_bytes())
        .map_err(|_nul| Errno::INVAL)?;
    let new = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(&directory, &name, new, Mode::empty())?;
    move_to(tree, &directory, &name)?;
    rustix::mount::mount_remount(target, flags | MountFlags::RDONLY, c"")
}

/// Mounts `tree` at `target` in `directory`.
pub(super) fn move_to(tree: &OwnedFd, directory: impl AsFd, target: impl Arg) -> Result<(), Errno> {
    let empty_path = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(tree, c"", directory, target, empty_path)
}

/// Changes the root, and nothing else.
pub(super) fn chroot(share: &Path, readonly: bool) -> Result<View, SandboxError> {
    let view = open_on_host(share, readonly)?;
    let change = chroot_step("can't change the root, which needs CAP_SYS_CHROOT");
    enter(&view.root, share)?.map_err(&change)?;
    change_root(&view.root).map_err(&change)?;
    Ok(view)
}

/// Makes `directory` the working directory. The error says so if the server's user may not search
/// it.
fn enter(directory: &OwnedFd, share: &Path) -> Result<Result<(), Errno>, SandboxError> {
    match rustix::process::fchdir(directory) {
        Err(Errno::ACCESS) => Err(SandboxError::NoEntry {
            path: share.to_owned(),
            user: rustix::process::geteuid().as_raw(),
        }),
        entered => Ok(entered),
    }
}

/// Changes to the root of an earlier serving process.
pub(super) fn reenter_chroot(previous: OpenRefs) -> Result<View, SandboxError> {
    let view = reenter_none(previous)?;
    change_root(&view.root).map_err(chroot_step(
        "can't change the root, which needs CAP_SYS_CHROOT",
    ))?;
    Ok(view)
}

fn change_root(root: &OwnedFd) -> Result<(), Errno> {
    rustix::process::fchdir(root)?;
    rustix::process::chroot(c".")?;
    rustix::process::chdir(c"/")
}

/// Uses the host's mounts; with `readonly`, a read-only clone of the share's mount if the server
/// has the privilege to make one.
pub(super) fn none(share: &Path, readonly: bool) -> Result<View, SandboxError> {
    let view = open_on_host(share, readonly)?;
    // Check only: the working directory stays the launcher's.
    let search = rustix::fs::accessat(&view.root, c".", Access::EXEC_OK, AtFlags::EACCESS);
    if search == Err(Errno::ACCESS) {
        return Err(SandboxError::NoEntry {
            path: share.to_owned(),
            user: rustix::process::geteuid().as_raw(),
        });
    }
    Ok(view)
}

fn open_on_host(share: &Path, readonly: bool) -> Result<View, SandboxError> {
    let failed = |source| SandboxError::Share {
        path: share.to_owned(),
        source,
    };
    let proc_fds = any_proc_fds().map_err(failed)?;
    let root = clone_share_or_open(share, readonly).map_err(failed)?;
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

/// Opens `share`; with `readonly`, a read-only clone of its mount if the server has the privilege to
/// make one.
pub(super) fn clone_share_or_open(share: &Path, readonly: bool) -> Result<OwnedFd, Errno> {
    if !readonly {
        return open(share, OFlags::empty());
    }
    clone_share(share, true).or_else(|error| {
        if matches!(error, Errno::PERM | Errno::NOSYS | Errno::INVAL) {
            log::info!(
                "--readonly: enforced by the server alone, as it can't make mounts ({error})"
            );
            open(share, OFlags::empty())
        } else {
            Err(error)
        }
    })
}

/// Uses the host's mounts, with the root of an earlier serving process.
pub(super) fn reenter_none(previous: OpenRefs) -> Result<View, SandboxError> {
    let proc_fds =
        any_proc_fds().map_err(reenter_step("can't keep /proc/self/fd (is /proc mounted?)"))?;
    Ok(View {
        root: previous.root,
        proc_fds,
        mounts: None,
        file: None,
    })
}

/// `/proc/self/fd`: as a mount of its own, or without that privilege the host's, from which `..`
/// leads to the rest of `/proc`.
pub(super) fn any_proc_fds() -> Result<OwnedFd, Errno> {
    clone_proc_fds().or_else(|_without| open(Path::new("/proc/self/fd"), OFlags::DIRECTORY))
}

/// `/proc/self/fd` as a mount without a parent, from which `..` leads nowhere.
fn clone_proc_fds() -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(CWD, c"/proc/self/fd", flags)
}

/// Clones the mounts at and below the shared directory.
pub(super) fn clone_share(share: &Path, readonly: bool) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(CWD, share, flags)?;
    let wanted = if readonly { INERT | READ_ONLY } else { INERT };
    let set = |attributes| process::add_mount_attributes(&tree, attributes);
    match set(wanted | libc::MOUNT_ATTR_NOSYMFOLLOW) {
        // NOSYMFOLLOW is newer than the rest.
        Err(Errno::INVAL) => set(wanted)?,
        // The server refuses the same operations itself.
        Err(Errno::NOSYS) => {
            log::info!(
                "the flags of the share's mount are unchanged: setting them needs Linux 5.12"
            );
        }
        result => result?,
    }
    Ok(tree)
}

/// Opens a directory for a server in a sandbox, which can't open it itself: as a mount without a
/// parent, from which `..` leads nowhere, or without the privilege for that just as it is. To be
/// called while the process has one thread: it may end up in namespaces of its own.
///
/// # Errors
///
/// The directory can't be opened.
pub(crate) fn detached(path: &Path, readonly: bool) -> Result<OwnedFd, Errno> {
    let as_it_is = || open(path, OFlags::DIRECTORY);
    match clone_share(path, readonly) {
        Err(Errno::PERM) => {}
        Err(Errno::NOSYS) => return as_it_is(),
        cloned => return cloned,
    }
    let namespaces = UnshareFlags::NEWUSER | UnshareFlags::NEWNS;
    match process::unshare_namespaces(namespaces) {
        Ok(()) => clone_share(path, readonly).or_else(|_refused| as_it_is()),
        Err(_) => as_it_is(),
    }
}

pub(super) fn open(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, flags | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

pub(super) fn kind_of(fd: impl AsFd) -> Result<FileType, Errno> {
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::TYPE)?;
    Ok(FileType::from_raw_mode(u32::from(stat.stx_mode)))
}
