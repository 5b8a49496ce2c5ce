//! Operations that few programs use: STATX, STATFS, TMPFILE, SYNCFS, inode flags, LOOKUP of `.` and `..`.
//!
//! The invariant: `..` leads to nothing outside of the shared directory, and no flag is passed
//! on that concerns more than the file.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{FileType, IFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::Passthrough;
use super::attributes::timestamp;
use super::inode::Inode;
use super::inode_ref::{IDENTITY, Identity, reopen_fd, stat_fd};
use crate::fs::{
    Attributes, Caller, Entry, Handle, InodeFlags, NewNode, NodeId, Opened, Result, Statistics,
    Timestamp,
};
use crate::io::File;
use crate::sys::inode_flags::{self, ExtendedFlags};

/// How deep below the shared directory a `..` is believed to be: the depth of a path of
/// `PATH_MAX` bytes, and more.
const MAX_DEPTH: usize = 4096;

/// Narrows what the host tells; what is beyond is the largest there is.
fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

impl Passthrough {
    pub(super) fn attributes_with_birth(
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

    /// What the host tells of the file system that `node` is on.
    pub(super) fn statistics(&self, node: NodeId) -> Result<Statistics> {
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

    /// A file without a name. The guest's kernel has it linked by LINK, as any other.
    pub(super) fn make_nameless(
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

    /// A descriptor of the file system that `node` is on.
    pub(super) fn file_system_file(&self, node: NodeId) -> Result<File> {
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

    pub(super) fn flags_of(&self, node: NodeId, handle: Handle) -> Result<u32> {
        let file = self.any_of(node, handle)?;
        Ok(rustix::fs::ioctl_getflags(file)?.bits())
    }

    pub(super) fn extended_flags(&self, node: NodeId, handle: Handle) -> Result<InodeFlags> {
        let flags = inode_flags::get(self.any_of(node, handle)?)?;
        let mut bytes = InodeFlags::default();
        bytes.copy_from_slice(flags.as_bytes());
        Ok(bytes)
    }

    pub(super) fn change_flags(&self, node: NodeId, handle: Handle, flags: u32) -> Result<()> {
        let file = self.any_to_change(node, handle)?;
        rustix::fs::ioctl_setflags(file, IFlags::from_bits_retain(flags))
    }

    /// A project is what the host accounts the file to, so a guest can't choose it.
    pub(super) fn change_extended_flags(
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

    /// `.`: the node itself, which the guest's kernel asks for when it has a file handle whose
    /// inode it has dropped from its cache. One that it has forgotten altogether is `ESTALE`,
    /// unless it is remembered.
    pub(super) fn find_self(&self, node: NodeId) -> Result<Entry> {
        let inode = self.inode_or_forgotten(node)?;
        self.entry_of_open(self.fd(&inode)?)
    }

    /// `..` of a directory. The shared directory is its own parent; a directory that was moved
    /// out of it on the host has none that the guest could see. It is never announced as a
    /// submount: the guest asks from within the mount that it has made of one, where a mark
    /// would make another of its root.
    pub(super) fn find_parent(&self, node: NodeId) -> Result<Entry> {
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

    /// What is above `inode`, a directory other than the shared one.
    fn parent_of(&self, inode: &Inode) -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let up = |fd: &dyn AsFd| match rustix::fs::openat(fd.as_fd(), c"..", flags, Mode::empty()) {
            // Outside of the mount, which is all that a server in a sandbox sees.
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
