//! Less common operations: STATX, STATFS, TMPFILE, SYNCFS, inode flags, LOOKUP of `.` and `..`.
//!
//! The invariant: `..` never leads out of the shared directory, and only flags that concern the
//! file itself are passed on.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{FileType, IFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::attributes::timestamp;
use crate::fs::passthrough::Passthrough;
use crate::fs::passthrough::inode_table::identity::{IDENTITY, Identity, stat_fd};
use crate::fs::passthrough::inode_table::inode::Inode;
use crate::fs::passthrough::inode_table::inode_fd::reopen_fd;
use crate::fs::{
    Attributes, Caller, Entry, Handle, InodeFlags, NewNode, NodeId, Opened, Result, Statistics,
    Timestamp,
};
use crate::io::File;
use crate::sys::inode_flags::{self, ExtendedFlags};

/// How many levels `..` may be below the shared directory: more than a path of `PATH_MAX` bytes
/// has.
const MAX_DEPTH: usize = 4096;

/// Narrows a value of the host. A larger value becomes the maximum.
fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

impl Passthrough {
    pub(crate) fn attributes_with_birth(
        &self,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Option<Timestamp>, Duration)> {
        let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let stat = match self.explicit(handle) {
            Some(handle) => stat_fd(self.handles.any(node, handle)?, mask),
            None => stat_fd(self.fd(&*self.inode(node)?)?, mask),
        }?;
        let known = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
        let born = known.then(|| timestamp(stat.stx_btime));
        Ok((self.attributes(&stat), born, self.options.attribute_ttl))
    }

    /// STATFS of the file system that `node` is on.
    pub(crate) fn statistics(&self, node: NodeId) -> Result<Statistics> {
        let inode = self.inode(node)?;
        let stat = rustix::fs::fstatvfs(self.fd(&inode)?)?;
        Ok(Statistics {
            blocks: stat.f_blocks,
            blocks_free: stat.f_bfree,
            blocks_available: stat.f_bavail,
            files: stat.f_files,
            files_free: stat.f_ffree,
            block_size: narrow(stat.f_bsize),
            fragment_size: narrow(stat.f_frsize),
            name_length: narrow(stat.f_namemax),
        })
    }

    /// Creates a file without a name. The guest's kernel can link it by LINK.
    pub(crate) fn make_nameless(
        &self,
        caller: &Caller,
        parent: NodeId,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        let parent = self.inode(parent)?;
        let parent = self.fd(&parent)?;
        self.confirm(caller, &parent)?;
        let mode = self.permitted_mode(caller, &parent, new.mode)?;
        let exclusive = OFlags::from_bits_retain(flags) & OFlags::EXCL;
        let flags = self.file_flags(flags).difference(OFlags::TRUNC);
        let making = OFlags::TMPFILE | OFlags::CLOEXEC | exclusive;
        self.room_for_inode()?;
        self.room_for_handle()?;
        let fd = {
            let _as_caller = self.as_caller(caller, Some(new.umask))?;
            rustix::fs::openat(&parent, c".", flags | making, mode)?
        };
        let entry = self.entry_of_nameless(&fd)?;
        if let Some(inode) = self.inodes.get(entry.node) {
            self.inodes.set_nameless(&inode, true);
        }
        self.opened_entry(entry, fd, flags)
    }

    /// An open file on the file system of `node`, for SYNCFS.
    pub(crate) fn file_system_file(&self, node: NodeId) -> Result<File> {
        if let (NodeId::ROOT, Some(file)) = (node, &self.single_file) {
            let file = reopen_fd(file, &self.proc_fds, OFlags::RDONLY)?;
            return Ok(File::from_fd(file));
        }
        let inode = self.inode(node)?;
        match inode.kind() {
            FileType::Directory | FileType::RegularFile => {
                Ok(File::from_fd(self.reopen(&inode, OFlags::RDONLY)?))
            }
            _ => Err(Errno::INVAL),
        }
    }

    pub(crate) fn flags_of(&self, node: NodeId, handle: Handle) -> Result<u32> {
        let file = self.any_of(node, handle)?;
        Ok(rustix::fs::ioctl_getflags(file)?.bits())
    }

    pub(crate) fn extended_flags(&self, node: NodeId, handle: Handle) -> Result<InodeFlags> {
        let flags = inode_flags::get(self.any_of(node, handle)?)?;
        let mut bytes = InodeFlags::default();
        bytes.copy_from_slice(flags.as_bytes());
        Ok(bytes)
    }

    pub(crate) fn change_flags(&self, node: NodeId, handle: Handle, flags: u32) -> Result<()> {
        let file = self.any_to_change(node, handle)?;
        rustix::fs::ioctl_setflags(file, IFlags::from_bits_retain(flags))
    }

    /// The host accounts a file to its project, so the guest may not change the project.
    pub(crate) fn change_extended_flags(
        &self,
        node: NodeId,
        handle: Handle,
        flags: &InodeFlags,
    ) -> Result<()> {
        let file = self.any_to_change(node, handle)?;
        let flags = ExtendedFlags::read_from_bytes(flags).or(Err(Errno::INVAL))?;
        if inode_flags::get(&file)?.project != flags.project {
            return Err(Errno::PERM);
        }
        inode_flags::set(file, &flags)
    }

    /// LOOKUP of `.`: the node itself. The guest's kernel sends it if it has a file handle of an
    /// inode that it has dropped from its cache. A node that the guest has forgotten is `ESTALE`,
    /// unless the store keeps it.
    pub(crate) fn find_self(&self, node: NodeId) -> Result<Entry> {
        let inode = self.inode_or_forgotten(node)?;
        self.entry_of_open(self.fd(&inode)?)
    }

    /// LOOKUP of `..`. The shared directory is its own parent. A directory that was moved out of
    /// the share on the host has no parent that the guest may see. The result is never announced as
    /// a submount: the guest sends the request from within the mount that it created for the
    /// submount, where the flag would create another mount on its root.
    pub(crate) fn find_parent(&self, node: NodeId) -> Result<Entry> {
        if node == NodeId::ROOT {
            return self.find_self(node);
        }
        let inode = self.inode_or_forgotten(node)?;
        let parent = if inode.kind() == FileType::Directory {
            self.parent_of(&inode)
        } else {
            Err(Errno::NOTDIR)
        };
        self.evict_forgotten(&inode);
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
        let root = self.inode(NodeId::ROOT)?.key();
        let parent = up(&self.fd(inode)?)?;
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
