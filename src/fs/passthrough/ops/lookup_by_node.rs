//! LOOKUP of `.` and `..`, by which a guest finds inodes that it has file handles of.
//!
//! The invariant: `..` never leads out of the shared directory.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::Operations;
use crate::fs::passthrough::inode_table::{IDENTITY, Identity, Inode, stat_fd};
use crate::fs::{Entry, NodeId, Result};

/// How many levels `..` may be below the shared directory: more than a path of `PATH_MAX` bytes
/// has.
const MAX_DEPTH: usize = 4096;

impl Operations {
    /// LOOKUP of `.`: the node itself. The guest's kernel sends it if it has a file handle of an
    /// inode that it has dropped from its cache. A node that the guest has forgotten is `ESTALE`,
    /// unless the table keeps it.
    pub(crate) fn find_self(&self, node: NodeId) -> Result<Entry> {
        let inode = self.fds.inode_or_forgotten(node)?;
        self.entry_of_open(self.fds.fd(&inode)?)
    }

    /// LOOKUP of `..`. The shared directory is its own parent. A directory that was moved out of
    /// the share on the host has no parent that the guest may see. The result is never announced as
    /// a submount: the guest sends the request from within the mount that it created for the
    /// submount, where the flag would create another mount on its root.
    pub(crate) fn find_parent(&self, node: NodeId) -> Result<Entry> {
        if node == NodeId::ROOT {
            return self.find_self(node);
        }
        let inode = self.fds.inode_or_forgotten(node)?;
        let parent = if inode.kind() == FileType::Directory {
            self.parent_of(&inode)
        } else {
            Err(Errno::NOTDIR)
        };
        self.fds.evict_forgotten(&inode);
        self.entry_of_path_fd(parent?)
    }

    /// The parent of `inode`, a directory other than the shared one.
    fn parent_of(&self, inode: &Inode) -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let up = |fd: &dyn AsFd| match rustix::fs::openat(fd.as_fd(), c"..", flags, Mode::empty()) {
            // The parent is outside the mount, which is all that a server in a sandbox can see.
            Err(Errno::NOENT) => Err(Errno::STALE),
            opened => opened,
        };
        let identity = |fd: &dyn AsFd| Ok::<_, Errno>(Identity::of(&stat_fd(fd, IDENTITY)?).key);
        let root = self.fds.inode(NodeId::ROOT)?.key();
        let parent = up(&self.fds.fd(inode)?)?;
        let mut at = rustix::io::fcntl_dupfd_cloexec(&parent, 0)?;
        let mut key = identity(&at)?;
        for _ in 0..MAX_DEPTH {
            if key == root {
                return Ok(parent);
            }
            let above = up(&at)?;
            let above_key = identity(&above)?;
            if above_key == key {
                break;
            }
            (at, key) = (above, above_key);
        }
        Err(Errno::STALE)
    }
}
