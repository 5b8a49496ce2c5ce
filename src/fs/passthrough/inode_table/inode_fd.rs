//! Descriptors of inodes during one operation, and names in directories.
//!
//! The invariant: a name is one path component, and a symbolic link is never followed.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, Mode, OFlags, Statx};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;
use rustix::path::DecInt;

use super::identity::IDENTITY;
use super::inode::Inode;
use crate::fs::Result;
use crate::sys::fd_slot::Borrowed;

/// The longest name of a directory entry, in bytes.
const NAME_MAX: usize = 255;

/// An `O_PATH` descriptor of an inode, for the duration of one operation.
#[derive(Debug)]
pub(crate) struct InodeFd<'a> {
    inode: &'a Inode,
    fd: Source<'a>,
}

#[derive(Debug)]
enum Source<'a> {
    /// The inode's own descriptor.
    Installed(Borrowed<'a>),
    /// A descriptor for this operation only.
    Opened(OwnedFd),
}

impl<'a> InodeFd<'a> {
    pub(crate) fn installed(inode: &'a Inode, fd: Borrowed<'a>) -> Self {
        let fd = Source::Installed(fd);
        Self { inode, fd }
    }

    pub(crate) fn opened(inode: &'a Inode, fd: OwnedFd) -> Self {
        let fd = Source::Opened(fd);
        Self { inode, fd }
    }

    /// Whether it was opened for this operation only.
    pub(crate) fn is_opened(&self) -> bool {
        matches!(self.fd, Source::Opened(_))
    }

    /// Returns the descriptor if it was opened for this operation only.
    pub(crate) fn into_opened(self) -> Option<OwnedFd> {
        match self.fd {
            Source::Installed(_) => None,
            Source::Opened(fd) => Some(fd),
        }
    }

    /// The descriptor's name in `/proc/self/fd`.
    pub(crate) fn proc_name(&self) -> DecInt {
        DecInt::from_fd(self)
    }
}

impl AsFd for InodeFd<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.fd {
            Source::Installed(fd) => fd.as_fd(),
            Source::Opened(fd) => fd.as_fd(),
        }
    }
}

/// A directory in which names are looked up: an inode and a descriptor of it.
pub(crate) trait Directory: AsFd {
    fn inode(&self) -> &Inode;
}

impl Directory for InodeFd<'_> {
    fn inode(&self) -> &Inode {
        self.inode
    }
}

impl<D: Directory> Directory for &D {
    fn inode(&self) -> &Inode {
        (**self).inode()
    }
}

/// Opens the file that `fd` is open on once more, through its link in `/proc/self/fd`. An `O_PATH`
/// descriptor costs half as much by `open_tree(2)`, where that is available.
pub(crate) fn reopen_fd(fd: impl AsFd, proc_fds: &OwnedFd, flags: OFlags) -> Result<OwnedFd> {
    /// Whether `open_tree` has failed: it is newer than the kernel, or a filter doesn't allow it.
    /// Orders nothing.
    static NO_OPEN_TREE: AtomicBool = AtomicBool::new(false);
    if flags == OFlags::PATH && !NO_OPEN_TREE.load(Ordering::Relaxed) {
        match open_tree(&fd) {
            Err(Errno::NOSYS | Errno::PERM | Errno::ACCESS) => {
                NO_OPEN_TREE.store(true, Ordering::Relaxed);
            }
            opened => return opened,
        }
    }
    reopen_by_proc(fd, proc_fds, flags)
}

fn open_tree(fd: impl AsFd) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(fd, c"", flags)
}

fn reopen_by_proc(fd: impl AsFd, proc_fds: &OwnedFd, flags: OFlags) -> Result<OwnedFd> {
    let name = DecInt::from_fd(fd);
    let flags = flags | OFlags::CLOEXEC;
    rustix::fs::openat(proc_fds, name.as_c_str(), flags, Mode::empty())
}

/// Checks that `name` is one path component. The dispatcher has checked this already, but the
/// confinement to the shared directory must not depend on a check elsewhere.
pub(crate) fn component(name: &CStr) -> Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(Errno::INVAL),
        long if long.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
        bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
        _ => Ok(name),
    }
}

/// Calls `statx` on `name` in `parent`.
pub(crate) fn stat_name(parent: &impl Directory, name: &CStr) -> Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(parent, component(name)?, flags, IDENTITY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::passthrough::inode_table::{Identity, stat_fd};

    #[test]
    fn both_ways_reopen_the_same_inode_as_a_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let file = OwnedFd::from(std::fs::File::create_new(&path).unwrap());
        // The name leads elsewhere now.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "another").unwrap();
        let proc_fds = OwnedFd::from(std::fs::File::open("/proc/self/fd").unwrap());
        let key = |fd: &OwnedFd| Identity::of(&stat_fd(fd, IDENTITY).unwrap()).key;
        let by_proc = reopen_by_proc(&file, &proc_fds, OFlags::PATH).unwrap();
        let reopened = reopen_fd(&file, &proc_fds, OFlags::PATH).unwrap();
        for fd in [by_proc, reopened].iter().chain(&open_tree(&file).ok()) {
            assert_eq!(key(fd), key(&file));
            let flags = rustix::fs::fcntl_getfl(fd).unwrap();
            assert!(flags.contains(OFlags::PATH), "{flags:?}");
            let is_closed_on_exec = rustix::io::fcntl_getfd(fd).unwrap();
            assert_eq!(is_closed_on_exec, rustix::io::FdFlags::CLOEXEC);
            let empty = reopen_fd(fd, &proc_fds, OFlags::RDONLY).unwrap();
            assert_eq!(rustix::fs::fstat(empty).unwrap().st_size, 0);
        }
    }
}
