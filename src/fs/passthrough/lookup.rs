//! From names to inodes: LOOKUP, and the entries that creations answer.
//!
//! A name is one component, found relative to a held descriptor and never followed if it is a
//! symbolic link, so nothing that the guest says, and no rename on the host, leads out of the
//! shared directory. The invariant: who an inode is comes from a `statx` of the descriptor
//! that it is then held by, or from a `statx` that matches an inode already held.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx};
use rustix::io::Errno;

use super::Passthrough;
use super::holds::{Hold, IDENTITY, Identity, InodeFd, Key, reopen_fd, stat_fd};
use super::inodes::Inode;
use crate::fs::{Entry, NodeId, Result};
use crate::sys::file_handle::FileHandle;

/// The longest name of a directory entry, bytes.
const NAME_MAX: usize = 255;

/// Makes sure that `name` is one component. The dispatch has done so; that nothing leaves the
/// shared directory shall not hang on somebody else's check.
pub(super) fn component(name: &CStr) -> Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(Errno::INVAL),
        long if long.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
        bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
        _ => Ok(name),
    }
}

impl Passthrough {
    /// The inode that the guest calls `node`.
    pub(super) fn inode(&self, node: NodeId) -> Result<Arc<Inode>> {
        self.inodes.get(node).ok_or(Errno::STALE)
    }

    /// An `O_PATH` descriptor of `inode`.
    pub(super) fn fd<'a>(&self, inode: &'a Inode) -> Result<InodeFd<'a>> {
        inode
            .hold()
            .fd()
            .inspect_err(|error| self.note_stale(inode, *error))
    }

    /// A descriptor of `inode` for use; see [`Hold::reopen`] for what the caller must know.
    pub(super) fn reopen(&self, inode: &Inode, flags: OFlags) -> Result<OwnedFd> {
        inode
            .hold()
            .reopen(&self.proc_fds, flags)
            .inspect_err(|error| self.note_stale(inode, *error))
    }

    /// What a file handle leads to no more shall not be found by a lookup again: the guest
    /// answers `ESTALE` with another lookup of the name.
    fn note_stale(&self, inode: &Inode, error: Errno) {
        if error == Errno::STALE {
            self.inodes.disown(inode);
        }
    }

    /// Finds `name` in `parent` and counts one lookup. One system call for what is known
    /// already; three for what is not.
    pub(super) fn find(&self, parent: impl AsFd, name: &CStr) -> Result<Entry> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = rustix::fs::statx(&parent, component(name)?, flags, IDENTITY)?;
        match self.inodes.find(&Identity::of(&stat)) {
            Some(inode) => Ok(self.entry(&inode, &stat)),
            None => self.find_new(parent, name),
        }
    }

    /// As [`find`](Self::find), for a name whose inode is likely not known: two system calls.
    pub(super) fn find_new(&self, parent: impl AsFd, name: &CStr) -> Result<Entry> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(parent, component(name)?, flags, Mode::empty())?;
        self.admit(Found::Path(fd))
    }

    /// As [`find`](Self::find), for a name of which READDIR said the inode number.
    pub(super) fn find_listed(
        &self,
        parent: impl AsFd,
        directory: &Key,
        number: u64,
        name: &CStr,
    ) -> Result<Entry> {
        // A guess only (a mount point's number is another), and both ways lead to the same end.
        if self.inodes.has(&Key {
            number,
            ..*directory
        }) {
            self.find(parent, name)
        } else {
            self.find_new(parent, name)
        }
    }

    /// The entry of what `fd`, an `O_PATH` descriptor, is of; counts one lookup.
    pub(super) fn find_held(&self, fd: OwnedFd) -> Result<Entry> {
        self.admit(Found::Path(fd))
    }

    /// The entry of what is open as `file`; counts one lookup.
    pub(super) fn find_opened(&self, file: &OwnedFd) -> Result<Entry> {
        self.admit(Found::Open(file))
    }

    /// The entry of an inode that the guest has, open as `fd`; counts one lookup more.
    pub(super) fn find_again(&self, inode: &Inode, fd: impl AsFd) -> Result<Entry> {
        let stat = stat_fd(fd, IDENTITY)?;
        if self.inodes.count(inode) {
            Ok(self.entry(inode, &stat))
        } else {
            Err(Errno::STALE)
        }
    }

    /// `entry`, which was found in `parent`, with the word on whether something is mounted there.
    pub(super) fn announced(&self, parent: &Key, mut entry: Entry) -> Entry {
        let kind = FileType::from_raw_mode(entry.attributes.mode);
        if self.options.announce_submounts
            && kind == FileType::Directory
            && let Some(inode) = self.inodes.get(entry.node)
        {
            let key = inode.key();
            entry.submount = (key.device, key.mount) != (parent.device, parent.mount);
        }
        entry
    }

    fn admit(&self, found: Found<'_>) -> Result<Entry> {
        let stat = stat_fd(&found, IDENTITY)?;
        let identity = Identity::of(&stat);
        if let Some(inode) = self.inodes.find(&identity) {
            return Ok(self.entry(&inode, &stat));
        }
        let held = self.inodes.descriptors();
        let by_handle = self
            .holder
            .handle_hold(found.as_fd(), &identity, &self.proc_fds, held)?;
        let hold = match (by_handle, found) {
            (Some(hold), _) => hold,
            (None, Found::Path(fd)) => Hold::Descriptor(fd),
            (None, Found::Open(fd)) => {
                Hold::Descriptor(reopen_fd(fd, &self.proc_fds, OFlags::PATH)?)
            }
        };
        let inode = self
            .inodes
            .admit(&identity, hold, |known, new| same(known.hold(), new));
        Ok(self.entry(&inode, &stat))
    }

    fn entry(&self, inode: &Inode, stat: &Statx) -> Entry {
        Entry {
            node: inode.node(),
            // Node ids are never reused.
            generation: 0,
            attributes: self.attributes(stat),
            attribute_ttl: self.options.attribute_ttl,
            entry_ttl: self.options.entry_ttl,
            submount: false,
        }
    }
}

/// An inode on its way into the store.
enum Found<'a> {
    /// By an `O_PATH` descriptor, which may become its hold.
    Path(OwnedFd),
    /// By an open file, which must not: it would keep a writer on the file as long as the
    /// guest knows it.
    Open(&'a OwnedFd),
}

impl AsFd for Found<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Path(fd) => fd.as_fd(),
            Self::Open(fd) => fd.as_fd(),
        }
    }
}

/// Whether `known` holds what the new `hold` was made for, both having the same device, mount
/// and inode number. Asked only where birth leaves a doubt.
fn same(known: &Hold, hold: &Hold) -> bool {
    match (known, hold) {
        (Hold::FileHandle { handle: known, .. }, Hold::FileHandle { handle: new, .. }) => {
            known == new
        }
        (Hold::FileHandle { handle, .. }, Hold::Descriptor(fd))
        | (Hold::Descriptor(fd), Hold::FileHandle { handle, .. }) => {
            FileHandle::of(fd).is_ok_and(|of_fd| of_fd == *handle)
        }
        // Both exist at this moment, so one number is one inode, unless the file system has
        // numbers that aren't unique; those differ in birth.
        (Hold::Descriptor(known), Hold::Descriptor(new)) => {
            let birth = |fd: &OwnedFd| stat_fd(fd, IDENTITY).map(|stat| Identity::of(&stat).birth);
            matches!((birth(known), birth(new)), (Ok(known), Ok(new)) if known == new)
        }
    }
}
