//! Several directories and files of the host, each reachable by a path of its own.
//!
//! With `--sandbox namespace` the root is an empty directory, in which each [`Tree`] is mounted. The
//! invariant: a tree's descriptors and paths were opened in the mount namespace in which the process
//! serves, and all paths of one tree are on one mount.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::thread::UnshareFlags;

use super::SandboxError;
use super::mounts::{
    View, any_proc_fds, clone_share, clone_share_or_open, keep_proc_fds, kind_of, leave_root,
    make_mounts_slaves, move_to, namespace_step, open,
};
use crate::sys::process;

/// Files of the host that the server reaches under one mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// A directory or file, or several between which files are renamed and linked.
    pub paths: Vec<PathBuf>,
    /// The server changes nothing there.
    pub readonly: bool,
}

impl Tree {
    /// A tree of one path.
    #[must_use]
    pub fn of(path: &Path, readonly: bool) -> Self {
        Self {
            paths: vec![path.to_owned()],
            readonly,
        }
    }
}

/// A path of a [`Tree`], as the serving process reaches it.
#[derive(Debug)]
pub struct Reached {
    /// The directory or file, `O_PATH`.
    pub fd: OwnedFd,
    /// The path by which the serving process can open it.
    pub path: PathBuf,
    /// It may not be changed.
    pub readonly: bool,
}

/// What is mounted for a tree: its only path, or the directory that contains all of them.
struct Top {
    path: PathBuf,
    /// The tree's paths, relative to it.
    within: Vec<PathBuf>,
}

/// Enters new mount, network and IPC namespaces, in whose root each tree is mounted.
pub(super) fn namespace(trees: &[Tree]) -> Result<(View, Vec<Vec<Reached>>), SandboxError> {
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC;
    process::unshare_namespaces(flags).map_err(SandboxError::Privilege)?;
    make_mounts_slaves()?;
    let proc_fds = keep_proc_fds()?;
    let mut clones = Vec::new();
    for tree in trees {
        let top = top_of(tree)?;
        let clone = clone_share(&top.path, tree.readonly).map_err(failed(&top.path))?;
        clones.push((top, clone, tree.readonly));
    }
    let unusable = namespace_step("can't mount what is shared in a root directory of its own");
    // Any directory would do: it is unmounted with the rest.
    mount_all(&clones).map_err(&unusable)?;
    rustix::process::chdir(c"/proc").map_err(&unusable)?;
    let root = leave_root()?;
    let mut reached = Vec::new();
    for (number, (top, clone, readonly)) in clones.into_iter().enumerate() {
        let mounted = Path::new("/").join(number.to_string());
        let paths = top.within.iter().map(|within| {
            let path = mounted.join(within);
            let fd = match within.as_os_str().is_empty() {
                true => clone.try_clone().map_err(SandboxError::Descriptors)?,
                false => open(&path, OFlags::NOFOLLOW).map_err(failed(&top.path))?,
            };
            enterable(&fd, &top.path)?;
            // `join` leaves a slash behind an empty path.
            let path = path.components().collect();
            Ok(Reached { fd, path, readonly })
        });
        reached.push(paths.collect::<Result<_, SandboxError>>()?);
    }
    let view = View {
        root,
        proc_fds,
        mounts: None,
        file: None,
    };
    Ok((view, reached))
}

/// Mounts a read-only directory at `/proc`, and in it the tree number N under the name N.
fn mount_all(clones: &[(Top, OwnedFd, bool)]) -> Result<(), Errno> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount(c"none", c"/proc", c"tmpfs", flags, c"size=4k,mode=755")?;
    let directory = open(Path::new("/proc"), OFlags::DIRECTORY)?;
    for (number, (_, clone, _)) in clones.iter().enumerate() {
        let name = number.to_string();
        if kind_of(clone)? == FileType::Directory {
            let search = Mode::RWXU | Mode::XGRP | Mode::XOTH;
            rustix::fs::mkdirat(&directory, &name, search)?;
        } else {
            let new = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&directory, &name, new, Mode::empty())?;
        }
        move_to(clone, &directory, &name)?;
    }
    rustix::mount::mount_remount(c"/proc", flags | MountFlags::RDONLY, c"")
}

/// Uses the host's mounts; with read-only clones where the server has the privilege to make them.
pub(super) fn none(trees: &[Tree]) -> Result<(View, Vec<Vec<Reached>>), SandboxError> {
    let root = Path::new("/");
    let proc_fds = any_proc_fds().map_err(failed(root))?;
    let mut reached = Vec::new();
    for tree in trees {
        let paths = tree.paths.iter().map(|path| {
            let fd = clone_share_or_open(path, tree.readonly).map_err(failed(path))?;
            enterable(&fd, path)?;
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            let readonly = tree.readonly;
            Ok(Reached { fd, path, readonly })
        });
        reached.push(paths.collect::<Result<_, SandboxError>>()?);
    }
    let view = View {
        root: open(root, OFlags::DIRECTORY).map_err(failed(root))?,
        proc_fds,
        mounts: None,
        file: None,
    };
    Ok((view, reached))
}

fn failed(path: &Path) -> impl Fn(Errno) -> SandboxError {
    move |source| SandboxError::Share {
        path: path.to_owned(),
        source,
    }
}

/// The path to mount. Several paths of one tree must have another directory than `/` in common.
fn top_of(tree: &Tree) -> Result<Top, SandboxError> {
    if let [path] = &*tree.paths {
        return Ok(Top {
            path: path.clone(),
            within: vec![PathBuf::new()],
        });
    }
    let mut paths = Vec::new();
    for path in &tree.paths {
        let canonical = path.canonicalize();
        paths.push(canonical.map_err(|error| {
            let errno = error
                .raw_os_error()
                .map_or(Errno::IO, Errno::from_raw_os_error);
            failed(path)(errno)
        })?);
    }
    let common = common_directory(&paths).filter(|common| *common != Path::new("/"));
    let common = common.ok_or_else(|| SandboxError::NothingInCommon(tree.paths.clone()))?;
    let within = paths
        .iter()
        .map(|path| path.strip_prefix(common).unwrap_or(path).to_owned());
    Ok(Top {
        path: common.to_owned(),
        within: within.collect(),
    })
}

/// The deepest directory that all `paths` are in or are.
fn common_directory(paths: &[PathBuf]) -> Option<&Path> {
    let (first, others) = paths.split_first()?;
    first
        .ancestors()
        .find(|ancestor| others.iter().all(|path| path.starts_with(ancestor)))
}

/// Checks that the server's user may search a directory.
fn enterable(fd: &OwnedFd, path: &Path) -> Result<(), SandboxError> {
    if kind_of(fd.as_fd()).map_err(failed(path))? != FileType::Directory {
        return Ok(());
    }
    match rustix::fs::accessat(fd, c".", Access::EXEC_OK, AtFlags::EACCESS) {
        Err(Errno::ACCESS) => Err(SandboxError::NoEntry {
            path: path.to_owned(),
            user: rustix::process::geteuid().as_raw(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_directory_is_the_deepest_one() {
        let common = |paths: &[&str]| {
            let paths: Vec<_> = paths.iter().map(PathBuf::from).collect();
            common_directory(&paths).map(Path::to_owned)
        };
        assert_eq!(common(&["/a/b/u", "/a/b/w"]), Some("/a/b".into()));
        assert_eq!(common(&["/a/bc", "/a/b/w"]), Some("/a".into()));
        assert_eq!(common(&["/a", "/a/w"]), Some("/a".into()));
        assert_eq!(common(&["/a/u", "/b/w"]), Some("/".into()));
        assert_eq!(common(&[]), None);
    }
}
