//! From names to inodes: LOOKUP, and the entries that creations answer.
//!
//! A name is one component, found relative to a held descriptor and never followed if it is a
//! symbolic link, so nothing that the guest says, and no rename on the host, leads out of the
//! shared directory. The invariant: who an inode is comes from a `statx` of the descriptor
//! that it is then held by, or from a `statx` that matches an inode already held.

use std::cell::Cell;
use std::ffi::CStr;
use std::hash::BuildHasher;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxAttributes};
use rustix::io::Errno;

use super::Passthrough;
use super::dir_seqcount::DirSeq;
use super::inode::Inode;
use super::inode_ref::{
    Directory, IDENTITY, Identity, Key, ReopenMethod, digest_at, digest_of, reopen_fd, stat_fd,
};
use super::inodes::NewInode;
use crate::fs::{Caller, Entry, NodeId, Result};
use crate::sys::file_handle::FileHandle;

/// The longest name of a directory entry, bytes.
const NAME_MAX: usize = 255;

/// After so many new inodes in a row the next is taken for new, too: a guest that goes through a tree
/// finds nothing else. To be wrong costs 1.6 µs, to be right saves 1.2.
const LIKELY_NEW: u32 = 4;

thread_local! {
    /// How many new inodes the calling thread has found since it last found a known one.
    static NEW_IN_A_ROW: Cell<u32> = const { Cell::new(0) };
}

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

    /// LOOKUP of a name.
    pub(super) fn look_up_for(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
    ) -> Result<Entry> {
        let parent = self.inode(parent)?;
        let entry = self.find(self.fd(&parent)?, name)?;
        self.note_lookup(caller, entry.node);
        Ok(self.announced(&parent.key(), entry))
    }

    /// Finds `name` in `parent` and counts one lookup. One system call for what is known
    /// already; three for what is not, or two where what was looked up lately was not known either.
    pub(super) fn find(&self, parent: impl Directory, name: &CStr) -> Result<Entry> {
        if NEW_IN_A_ROW.get() >= LIKELY_NEW {
            return self.find_new(parent, name);
        }
        let dir_seq = self.inodes.dir_seq(parent.inode());
        let stat = stat_name(&parent, name)?;
        match self.inodes.find(&Identity::of(&stat)) {
            Some(inode) => {
                NEW_IN_A_ROW.set(0);
                self.inodes
                    .record_name(&inode, parent.inode(), name, dir_seq);
                Ok(self.entry(&inode, &stat))
            }
            None => self.find_new(parent, name),
        }
    }

    /// As [`find`](Self::find), for a name whose inode is likely not known: two system calls.
    pub(super) fn find_new(&self, parent: impl Directory, name: &CStr) -> Result<Entry> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let name = component(name)?;
        let seen = self.seen(&parent, name);
        let fd = self.with_room(|| rustix::fs::openat(&parent, name, flags, Mode::empty()))?;
        self.find_or_insert(Found::Path(fd), Some(&seen))
    }

    /// As [`find`](Self::find), for a name that is one of many and may never be used: an inode
    /// that is not known yet is only noted, and opened when it is needed.
    pub(super) fn find_listed(&self, parent: impl Directory, name: &CStr) -> Result<Entry> {
        if !self.reopen_policy.keeps_opened_fds() {
            return self.find(parent, name);
        }
        let seen = self.seen(&parent, name);
        let stat = stat_name(&parent, name)?;
        let identity = Identity::of(&stat);
        if let Some(inode) = self.inodes.find(&identity) {
            self.inodes
                .record_name(&inode, seen.parent, name, seen.dir_seq);
            return Ok(self.entry(&inode, &stat));
        }
        match self.add_unopened(&parent, &seen, &identity) {
            Some(inode) => Ok(self.entry(&inode, &stat)),
            None => self.find_new(parent, name),
        }
    }

    /// Adds an inode that is reached by the name under which it was `seen`, without opening it;
    /// counts one lookup. `None` where it has to be opened: nothing would tell it from another of
    /// its name later, or it may be known, or the name may have changed meanwhile.
    fn add_unopened(
        &self,
        parent: &impl Directory,
        seen: &Seen<'_>,
        identity: &Identity,
    ) -> Option<Arc<Inode>> {
        let digest = if identity.is_settled() {
            0
        } else {
            // Without a birth there is too little to compare when it is opened later.
            identity.birth?;
            digest_at(parent, seen.name).ok()?
        };
        self.room_for_inode().ok()?;
        let inode = self.inodes.add_unopened(identity)?;
        let is_reachable =
            self.inodes
                .record_name_of_new(&inode, seen.parent, seen.name, digest, seen.dir_seq);
        if is_reachable {
            return Some(inode);
        }
        self.forget_lookups(inode.node(), 1);
        None
    }

    /// The entry of what was created as `name` in `parent`, and is open as `file`; counts one
    /// lookup.
    pub(super) fn entry_of_created(
        &self,
        parent: impl Directory,
        name: &CStr,
        file: &OwnedFd,
    ) -> Result<Entry> {
        self.find_or_insert(Found::Open(file), Some(&self.seen(&parent, name)))
    }

    /// The entry of what `fd`, an `O_PATH` descriptor, is of; counts one lookup.
    pub(super) fn entry_of_path_fd(&self, fd: OwnedFd) -> Result<Entry> {
        self.find_or_insert(Found::Path(fd), None)
    }

    /// The entry of a file without a name, open as `file`; counts one lookup.
    pub(super) fn entry_of_nameless(&self, file: &OwnedFd) -> Result<Entry> {
        self.find_or_insert(Found::Open(file), None)
    }

    /// The entry of an inode that the guest has, open as `fd`; counts one lookup more.
    pub(super) fn entry_of_open(&self, fd: impl Directory) -> Result<Entry> {
        let stat = stat_fd(&fd, IDENTITY)?;
        let inode = fd.inode();
        if self.inodes.count_lookup(inode) {
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

    /// What is about to be found as `name` in `parent`.
    fn seen<'a>(&self, parent: &'a impl Directory, name: &'a CStr) -> Seen<'a> {
        let parent = parent.inode();
        Seen {
            parent,
            name,
            dir_seq: self.inodes.dir_seq(parent),
        }
    }

    /// Finds or adds the inode that is `found` where it was `seen`; `None` where no name led to
    /// it.
    fn find_or_insert(&self, found: Found<'_>, seen: Option<&Seen<'_>>) -> Result<Entry> {
        let stat = stat_fd(&found, IDENTITY)?;
        let identity = Identity::of(&stat);
        let inode = match self.inodes.find(&identity) {
            Some(inode) => {
                NEW_IN_A_ROW.set(0);
                inode
            }
            None => {
                NEW_IN_A_ROW.set(NEW_IN_A_ROW.get().saturating_add(1));
                self.add(found, &identity, seen)?
            }
        };
        if let Some(seen) = seen {
            self.inodes
                .record_name(&inode, seen.parent, seen.name, seen.dir_seq);
        }
        self.make_room();
        Ok(self.entry(&inode, &stat))
    }

    fn add(
        &self,
        found: Found<'_>,
        identity: &Identity,
        seen: Option<&Seen<'_>>,
    ) -> Result<Arc<Inode>> {
        self.room_for_inode()?;
        let handle = self
            .reopen_policy
            .method_for_new(found.as_fd(), identity, &self.proc_fds)?;
        let (new, unused) = match (handle, found) {
            (Some(method), found) => (NewInode { fd: None, method }, Some(found)),
            (None, Found::Path(fd)) => (NewInode::open(fd), None),
            (None, Found::Open(file)) => {
                let open = || reopen_fd(file, &self.proc_fds, OFlags::PATH);
                (NewInode::open(self.with_room(open)?), None)
            }
        };
        let admitted = self.inodes.find_or_insert(identity, new, |known, new| {
            let fd = new.fd.as_ref().map(AsFd::as_fd);
            fd.or(unused.as_ref().map(AsFd::as_fd))
                .is_some_and(|fd| same(known, fd, &new.method))
        });
        let inode = admitted.ok_or(Errno::NFILE)?;
        // Its name may just be taken away by a request that did not find it here, and a file handle
        // does not keep it.
        if let (Some(Found::Path(fd)), Some(seen)) = (unused, seen)
            && !self.inodes.is_unchanged(seen.dir_seq)
        {
            drop(self.inodes.install(&inode, fd));
        }
        Ok(inode)
    }

    /// Within a run node ids are never reused, and so an inode's generation never changes. Linux
    /// gives the root of a mount, a submount of its own making included, generation 0, and
    /// takes an answer that says otherwise for another inode with the same node id.
    fn generation_of(&self, inode: &Inode, stat: &Statx) -> u64 {
        let root = StatxAttributes::MOUNT_ROOT.bits();
        if inode.node() == NodeId::ROOT || stat.stx_attributes.bits() & root != 0 {
            0
        } else {
            self.generation()
        }
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

/// `statx` of what goes by `name` in `parent`.
pub(super) fn stat_name(parent: &impl Directory, name: &CStr) -> Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(parent, component(name)?, flags, IDENTITY)
}

/// What makes node ids of this run other inodes than those of another: a number that no run has
/// twice. Linux takes 32 bits of it.
pub(super) fn new_generation() -> u64 {
    // Nothing else of the standard library is random.
    let random = std::hash::RandomState::new().hash_one(std::process::id());
    (random & u64::from(u32::MAX)).max(1)
}

/// A name under which an inode was seen.
struct Seen<'a> {
    parent: &'a Inode,
    name: &'a CStr,
    dir_seq: DirSeq,
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

/// Whether `known` is what `fd` is open on and `way` leads to, both having the same device,
/// mount and inode number. Asked only where birth leaves a doubt.
fn same(known: &Inode, fd: BorrowedFd<'_>, method: &ReopenMethod) -> bool {
    if let Some(installed) = known.slot().inspect() {
        // Both exist at this moment, so one number is one inode, unless the file system has
        // numbers that aren't unique; those differ in birth.
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
