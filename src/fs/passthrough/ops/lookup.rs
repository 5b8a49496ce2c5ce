//! Turns names into inodes: LOOKUP, and the entries that creations return.
//!
//! A name is one path component. It is looked up relative to a descriptor, and a symbolic link is
//! never followed, so neither the guest nor a rename on the host can lead out of the shared
//! directory. The invariant: the identity of an inode comes from a `statx` of the descriptor that
//! becomes its own, or from a `statx` that matches a known inode.

use std::cell::Cell;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, Statx, StatxAttributes};
use rustix::io::Errno;

use super::Operations;
use crate::fs::passthrough::inode_table::{
    DirSeq, Directory, IDENTITY, Identity, Inode, Key, NewInode, ReopenMethod, component,
    digest_at, digest_of, reopen_fd, stat_fd, stat_name,
};
use crate::fs::{Caller, Entry, NodeId, Result};
use crate::sys::file_handle::FileHandle;

/// After this many new inodes in a row, the next name is assumed to be new as well, as when a guest
/// walks a tree. A wrong guess costs 1.6 µs, a right one saves 1.2 µs.
const LIKELY_NEW: u32 = 4;

thread_local! {
    /// The number of new inodes in a row that the calling thread has found and that a lookup opens.
    static NEW_IN_A_ROW: Cell<u32> = const { Cell::new(0) };
}

impl Operations {
    /// Serves LOOKUP of a name.
    pub(crate) fn look_up(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<Entry> {
        let parent = self.fds.inode(parent)?;
        let entry = self.find_unopened(self.fds.fd(&parent)?, name, Opens::WhatMayChange)?;
        self.note_lookup(caller, entry.node);
        Ok(self.announced(&parent.key(), entry))
    }

    /// Looks up `name` in `parent` and counts one lookup. It takes one system call for a known
    /// inode, and three for a new one, or two if the last ones were new as well.
    pub(crate) fn find(&self, parent: impl Directory, name: &CStr) -> Result<Entry> {
        if NEW_IN_A_ROW.get() >= LIKELY_NEW {
            return self.find_new(parent, name);
        }
        let dir_seq = self.fds.inodes().dir_seq(parent.inode());
        let stat = stat_name(&parent, name)?;
        match self.fds.inodes().find(&Identity::of(&stat)) {
            Some(inode) => {
                NEW_IN_A_ROW.set(0);
                self.fds
                    .inodes()
                    .record_name(&inode, parent.inode(), name, dir_seq);
                Ok(self.entry(&inode, &stat))
            }
            None => self.find_new(parent, name),
        }
    }

    /// As [`find`](Self::find), for a name whose inode is probably new: two system calls.
    pub(crate) fn find_new(&self, parent: impl Directory, name: &CStr) -> Result<Entry> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let name = component(name)?;
        let seen = self.seen(&parent, name);
        let fd = self
            .fds
            .with_room(|| rustix::fs::openat(&parent, name, flags, Mode::empty()))?;
        self.find_or_insert(Found::Path(fd), Some(&seen))
    }

    /// As [`find`](Self::find), for one of many names, most of which are never used.
    pub(crate) fn find_listed(&self, parent: impl Directory, name: &CStr) -> Result<Entry> {
        self.find_unopened(parent, name, Opens::Nothing)
    }

    /// As [`find`](Self::find), by one system call: a new inode is only recorded, and opened when it
    /// is needed, unless it is one that `opens` says.
    fn find_unopened(&self, parent: impl Directory, name: &CStr, opens: Opens) -> Result<Entry> {
        if !self.fds.reopen_policy().keeps_opened_fds() {
            return self.find(parent, name);
        }
        if opens == Opens::WhatMayChange && NEW_IN_A_ROW.get() >= LIKELY_NEW {
            return self.find_new(parent, name);
        }
        let seen = self.seen(&parent, name);
        let stat = stat_name(&parent, name)?;
        let identity = Identity::of(&stat);
        if let Some(inode) = self.fds.inodes().find(&identity) {
            self.fds
                .inodes()
                .record_name(&inode, seen.parent, name, seen.dir_seq);
            return Ok(self.entry(&inode, &stat));
        }
        if opens == Opens::WhatMayChange && self.may_change(&identity) {
            return self.find_new(parent, name);
        }
        match self.add_unopened(&parent, &seen, &identity) {
            Some(inode) => Ok(self.entry(&inode, &stat)),
            None => self.find_new(parent, name),
        }
    }

    /// Adds an inode, `seen` under a name, without opening it, and counts one lookup. Returns
    /// `None` if it must be opened: because a later inode of that name could not be told from it,
    /// because it may be known already, or because the name may have changed in the meantime.
    fn add_unopened(
        &self,
        parent: &impl Directory,
        seen: &Seen<'_>,
        identity: &Identity,
    ) -> Option<Arc<Inode>> {
        let digest = if self.fds.inodes().is_settled(identity) {
            0
        } else {
            // Without a birth time too little can be compared when it is opened later.
            identity.birth?;
            digest_at(parent, seen.name).ok()?
        };
        self.fds.room_for_inode().ok()?;
        let inode = self.fds.inodes().add_unopened(identity)?;
        let is_reachable = self.fds.inodes().record_name_of_new(
            &inode,
            seen.parent,
            seen.name,
            digest,
            seen.dir_seq,
        );
        if is_reachable {
            return Some(inode);
        }
        self.fds.forget_lookups(inode.node(), 1);
        None
    }

    /// The entry of a file that was created as `name` in `parent` and is open as `file`. Counts one
    /// lookup.
    pub(crate) fn entry_of_created(
        &self,
        parent: impl Directory,
        name: &CStr,
        file: &OwnedFd,
    ) -> Result<Entry> {
        self.find_or_insert(Found::Open(file), Some(&self.seen(&parent, name)))
    }

    /// The entry of the inode that `fd`, an `O_PATH` descriptor, is open on. Counts one lookup.
    pub(crate) fn entry_of_path_fd(&self, fd: OwnedFd) -> Result<Entry> {
        self.find_or_insert(Found::Path(fd), None)
    }

    /// The entry of a file without a name, open as `file`. Counts one lookup.
    pub(crate) fn entry_of_nameless(&self, file: &OwnedFd) -> Result<Entry> {
        self.find_or_insert(Found::Open(file), None)
    }

    /// The entry of an inode that the guest knows, open as `fd`. Counts one more lookup.
    pub(crate) fn entry_of_open(&self, fd: impl Directory) -> Result<Entry> {
        let stat = stat_fd(&fd, IDENTITY)?;
        let inode = fd.inode();
        if self.fds.inodes().count_lookup(inode) {
            Ok(self.entry(inode, &stat))
        } else {
            Err(Errno::STALE)
        }
    }

    /// Marks `entry`, which was found in `parent`, if it is a mount point that the guest should
    /// treat as a submount.
    pub(crate) fn announced(&self, parent: &Key, mut entry: Entry) -> Entry {
        let kind = FileType::from_raw_mode(entry.attributes.mode);
        if self.options.announce_submounts
            && kind == FileType::Directory
            && let Some(inode) = self.fds.inodes().get(entry.node)
        {
            let key = inode.key();
            entry.submount = (key.device, key.mount) != (parent.device, parent.mount);
        }
        entry
    }

    /// Remembers the state of `parent` before `name` is looked up in it.
    fn seen<'a>(&self, parent: &'a impl Directory, name: &'a CStr) -> Seen<'a> {
        let parent = parent.inode();
        Seen {
            parent,
            name,
            dir_seq: self.fds.inodes().dir_seq(parent),
        }
    }

    /// Finds or adds the inode that was `found`. `seen` is the name that led to it, if there was
    /// one.
    fn find_or_insert(&self, found: Found<'_>, seen: Option<&Seen<'_>>) -> Result<Entry> {
        let stat = stat_fd(&found, IDENTITY)?;
        let identity = Identity::of(&stat);
        let inode = match self.fds.inodes().find(&identity) {
            Some(inode) => {
                NEW_IN_A_ROW.set(0);
                inode
            }
            None => {
                let is_opened =
                    self.may_change(&identity) || !self.fds.reopen_policy().keeps_opened_fds();
                NEW_IN_A_ROW.set(match is_opened {
                    true => NEW_IN_A_ROW.get().saturating_add(1),
                    false => 0,
                });
                self.add(found, &identity, seen)?
            }
        };
        if let Some(seen) = seen {
            self.fds
                .inodes()
                .record_name(&inode, seen.parent, seen.name, seen.dir_seq);
        }
        self.fds.make_room();
        Ok(self.entry(&inode, &stat))
    }

    fn add(
        &self,
        found: Found<'_>,
        identity: &Identity,
        seen: Option<&Seen<'_>>,
    ) -> Result<Arc<Inode>> {
        self.fds.room_for_inode()?;
        let handle = self.fds.reopen_policy().method_for_new(
            found.as_fd(),
            identity,
            self.fds.proc_fds(),
        )?;
        let (new, unused) = match (handle, found) {
            (Some(method), found) => (NewInode { fd: None, method }, Some(found)),
            (None, Found::Path(fd)) => (NewInode::open(fd), None),
            (None, Found::Open(file)) => {
                let open = || reopen_fd(file, self.fds.proc_fds(), OFlags::PATH);
                (NewInode::open(self.fds.with_room(open)?), None)
            }
        };
        let admitted = self
            .fds
            .inodes()
            .find_or_insert(identity, new, |known, new| {
                let fd = new.fd.as_ref().map(AsFd::as_fd);
                fd.or(unused.as_ref().map(AsFd::as_fd))
                    .is_some_and(|fd| same(known, fd, &new.method))
            });
        let inode = admitted.ok_or(Errno::NFILE)?;
        // Another request may be removing the name; it didn't find the inode in the table, and the
        // file handle doesn't keep the inode alive. The descriptor does.
        if let (Some(Found::Path(fd)), Some(seen)) = (unused, seen)
            && !self.fds.inodes().is_unchanged(seen.dir_seq)
        {
            drop(self.fds.inodes().install(&inode, fd));
        }
        Ok(inode)
    }

    /// The generation of an inode. Node ids are not reused within a session, so the generation
    /// never changes. Linux gives generation 0 to the root of a mount, including the submounts that
    /// it creates itself, and takes a reply with another generation for another inode with the same
    /// node id.
    fn generation_of(&self, inode: &Inode, stat: &Statx) -> u64 {
        let root = StatxAttributes::MOUNT_ROOT.bits();
        if inode.node() == NodeId::ROOT || stat.stx_attributes.bits() & root != 0 {
            0
        } else {
            self.fds.inodes().table().generation()
        }
    }

    /// Whether [`Opens::WhatMayChange`] opens a new inode.
    fn may_change(&self, identity: &Identity) -> bool {
        identity.kind == FileType::Directory || !self.fds.inodes().is_settled(identity)
    }

    fn entry(&self, inode: &Inode, stat: &Statx) -> Entry {
        Entry {
            node: inode.node(),
            generation: self.generation_of(inode, stat),
            attributes: self.attributes(stat),
            attribute_ttl: self.options.attribute_ttl,
            entry_ttl: self.options.entry_ttl,
            submount: false,
        }
    }
}

/// Which new inodes are opened when they are found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Opens {
    /// Directories, as what is in them is about to be looked up, and a program that works in one
    /// keeps it when the host moves it; and what is so young that its identity says little, as it
    /// costs another call to identify it later.
    WhatMayChange,
    Nothing,
}

/// A name under which an inode was seen.
struct Seen<'a> {
    parent: &'a Inode,
    name: &'a CStr,
    dir_seq: DirSeq,
}

/// An inode that is about to be added to the table.
enum Found<'a> {
    /// Open as an `O_PATH` descriptor, which can become the inode's own.
    Path(OwnedFd),
    /// Open as a file. Its descriptor can't become the inode's own: it would count as a writer of
    /// the file as long as the guest knows the inode.
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

/// Whether `known` is the inode that `fd` is open on and that `method` opens. Both have the same
/// device, mount and inode number. Called only if the birth time leaves a doubt.
fn same(known: &Inode, fd: BorrowedFd<'_>, method: &ReopenMethod) -> bool {
    if let Some(installed) = known.slot().inspect() {
        // Both exist at this moment, so the same number means the same inode, unless the file
        // system has duplicate numbers. Such inodes differ in birth time.
        let birth = |fd: BorrowedFd<'_>| stat_fd(fd, IDENTITY).map(|it| Identity::of(&it).birth);
        return matches!((birth(installed.as_fd()), birth(fd)), (Ok(known), Ok(new)) if known == new);
    }
    match (known.reopen_method(), method) {
        (ReopenMethod::Handle { handle: known, .. }, ReopenMethod::Handle { handle: new, .. }) => {
            known == *new
        }
        (ReopenMethod::Handle { handle, .. }, _) => {
            FileHandle::of(fd).is_ok_and(|new| new == handle)
        }
        (ReopenMethod::Open(file), _) => {
            let birth =
                |fd: BorrowedFd<'_>| stat_fd(fd, IDENTITY).map(|it| Identity::of(&it).birth);
            matches!((birth(file.as_fd()), birth(fd)), (Ok(known), Ok(new)) if known == new)
        }
        (ReopenMethod::Name(link), _) if link.digest != 0 => {
            digest_of(fd).is_ok_and(|digest| digest == link.digest)
        }
        _ => false,
    }
}
