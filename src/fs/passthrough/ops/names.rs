//! Creates, renames and removes names: CREATE, MKDIR, MKNOD, SYMLINK, LINK, UNLINK, RMDIR, RENAME.
//!
//! The invariant: a new file belongs to the caller, and a creation neither opens nor changes an
//! existing file.

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, StatxFlags};
use rustix::io::Errno;

use super::attributes::{PERMISSIONS, decode_device};
use crate::fs::passthrough::Passthrough;
use crate::fs::passthrough::current_request;
use crate::fs::passthrough::ids::credentials::CredentialsGuard;
use crate::fs::passthrough::inode_table::dir_seqcount::DirChange;
use crate::fs::passthrough::inode_table::identity::{IDENTITY, Identity, stat_fd};
use crate::fs::passthrough::inode_table::inode::{Inode, RefKind};
use crate::fs::passthrough::inode_table::inode_fd::component;
use crate::fs::passthrough::inode_table::inode_fd::{Directory, InodeFd};
use crate::fs::passthrough::inode_table::reopen_method::ReopenMethod;
use crate::fs::{Caller, Entry, NewNode, NodeId, Opened, Result};
use crate::sys::file_handle::FileHandle;

/// How often a CREATE without `O_EXCL` retries while others create and remove the name.
const CREATE_TRIES: usize = 16;

const SET_GROUP_ID: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o0010;

impl Passthrough {
    pub(crate) fn as_caller(
        &self,
        caller: &Caller,
        umask: Option<u32>,
    ) -> Result<CredentialsGuard> {
        self.credential_policy
            .as_caller(&self.proc_fds, &self.on_host(caller)?, umask)
    }

    pub(crate) fn make_symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        target: &CStr,
    ) -> Result<Entry> {
        let parent = self.inode(parent)?;
        let parent = self.fd(&parent)?;
        self.confirm(caller, &parent)?;
        self.room_for_inode()?;
        self.make_and_find(&parent, name, || {
            let _as_caller = self.as_caller(caller, None)?;
            rustix::fs::symlinkat(target, &parent, component(name)?)
        })
    }

    pub(crate) fn make_node(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        let parent = self.inode(parent)?;
        let parent = self.fd(&parent)?;
        self.confirm(caller, &parent)?;
        // No file type means a regular file, as in mknod(2).
        let kind = match FileType::from_raw_mode(new.mode) {
            FileType::Unknown if new.mode & !PERMISSIONS == 0 => FileType::RegularFile,
            FileType::Unknown | FileType::Directory | FileType::Symlink => {
                return Err(Errno::INVAL);
            }
            kind => kind,
        };
        let mode = self.permitted_mode(caller, &parent, new.mode)?;
        self.room_for_inode()?;
        let (major, minor) = decode_device(new.rdev);
        let device = rustix::fs::makedev(major, minor);
        self.make_and_find(&parent, name, || {
            let _as_caller = self.as_caller(caller, Some(new.umask))?;
            rustix::fs::mknodat(&parent, component(name)?, kind, mode, device)
        })
    }

    pub(crate) fn make_directory(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        let parent = self.inode(parent)?;
        let parent = self.fd(&parent)?;
        self.confirm(caller, &parent)?;
        let mode = Mode::from_raw_mode(new.mode & PERMISSIONS);
        self.room_for_inode()?;
        self.make_and_find(&parent, name, || {
            let _as_caller = self.as_caller(caller, Some(new.umask))?;
            rustix::fs::mkdirat(&parent, component(name)?, mode)
        })
    }

    /// Creates an inode by `make` and finds it. Does so again if a host process has removed it before
    /// it was found, so that the guest gets an inode and not an error of a call that has succeeded.
    fn make_and_find(
        &self,
        parent: &InodeFd<'_>,
        name: &CStr,
        make: impl Fn() -> Result<()>,
    ) -> Result<Entry> {
        let mut tries = 1;
        loop {
            make()?;
            match self.find_new(parent, name) {
                Err(Errno::NOENT) if tries < CREATE_TRIES => tries += 1,
                found => return found,
            }
        }
    }

    /// Creates and opens a file.
    ///
    /// The host always gets `O_EXCL`. With it the kernel neither follows a symbolic link nor
    /// applies `fs.protected_regular`, and a new file, which belongs to the caller, can be told
    /// from an existing one, which is opened as by OPEN.
    pub(crate) fn create_file(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        let parent = self.inode(parent)?;
        let parent = self.fd(&parent)?;
        let exclusive = flags & OFlags::EXCL.bits() != 0;
        if self.options.readonly {
            // An existing file can be opened for reading, as on any read-only file system.
            if exclusive {
                return Err(Errno::ROFS);
            }
            let opened = self.open_existing(caller, &parent, name, flags);
            return opened.map_err(|error| match error {
                Errno::NOENT => Errno::ROFS,
                error => error,
            });
        }
        self.confirm(caller, &parent)?;
        let mode = self.permitted_mode(caller, &parent, new.mode)?;
        for _ in 0..CREATE_TRIES {
            let create = || self.create_new(caller, &parent, name, flags, new.umask, mode);
            match self.labelled(new.label, Some((parent.inode().node(), name)), create) {
                Err(Errno::EXIST) if !exclusive => {}
                done => return done,
            }
            match self.open_existing(caller, &parent, name, flags) {
                Err(Errno::NOENT) => {}
                done => return done,
            }
        }
        Err(Errno::NOENT)
    }

    fn create_new(
        &self,
        caller: &Caller,
        parent: &impl Directory,
        name: &CStr,
        flags: u32,
        umask: u32,
        mode: Mode,
    ) -> Result<(Entry, Opened)> {
        let flags = self.file_flags(flags).difference(OFlags::TRUNC);
        let creating = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.room_for_inode()?;
        self.room_for_handle()?;
        let fd = {
            let _as_caller = self.as_caller(caller, Some(umask))?;
            let name = component(name)?;
            self.with_room(|| rustix::fs::openat(parent, name, flags | creating, mode))?
        };
        let entry = self.entry_of_created(parent, name, &fd)?;
        self.opened_entry(entry, fd, flags)
    }

    fn open_existing(
        &self,
        caller: &Caller,
        parent: &impl Directory,
        name: &CStr,
        flags: u32,
    ) -> Result<(Entry, Opened)> {
        let entry = self.find(parent, name)?;
        match self.open_file(caller, entry.node, flags) {
            Ok(opened) => Ok((entry, opened)),
            Err(error) => {
                self.forget_lookups(entry.node, 1);
                // The inode was removed in the meantime. The name may now belong to another inode.
                Err(if error == Errno::STALE {
                    Errno::NOENT
                } else {
                    error
                })
            }
        }
    }

    /// Creates another name for an inode through its link in `/proc/self/fd`, which needs no
    /// privilege, unlike `AT_EMPTY_PATH`.
    pub(crate) fn make_link(
        &self,
        caller: &Caller,
        node: NodeId,
        parent: NodeId,
        name: &CStr,
    ) -> Result<Entry> {
        let inode = self.inode(node)?;
        let parent = self.inode(parent)?;
        let fd = self.fd(&inode)?;
        let parent_fd = self.fd(&parent)?;
        self.confirm_both(caller, &fd, &parent_fd)?;
        let dir_seq = self.inodes.dir_seq(&parent);
        rustix::fs::linkat(
            &self.proc_fds,
            fd.proc_name().as_c_str(),
            parent_fd,
            component(name)?,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.inodes.record_name(&inode, &parent, name, dir_seq);
        self.entry_of_open(fd)
    }

    pub(crate) fn remove(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: AtFlags,
    ) -> Result<()> {
        let parent = self.inode(parent)?;
        let parent = self.fd(&parent)?;
        self.confirm(caller, &parent)?;
        self.remove_name(&parent, name, flags)
    }

    pub(crate) fn remove_name(
        &self,
        parent: &InodeFd<'_>,
        name: &CStr,
        flags: AtFlags,
    ) -> Result<()> {
        let named = self.known(parent, component(name)?, true);
        if named.is_some() {
            self.room_for_descriptor()?;
        }
        let removed = self.remove_known(named.as_ref(), parent, name, flags);
        if let Some(known) = &named {
            self.evict_forgotten(&known.inode);
        }
        removed
    }

    fn remove_known(
        &self,
        named: Option<&KnownInode>,
        fd: &InodeFd<'_>,
        name: &CStr,
        flags: AtFlags,
    ) -> Result<()> {
        let parent = fd.inode();
        if let Some(known) = named.filter(|known| known.links == 1) {
            let dir_seq = self.inodes.dir_seq(parent);
            self.inodes.record_name(&known.inode, parent, name, dir_seq);
        }
        let change = self.inodes.begin_name_change([parent, parent]);
        let new = self.known_if_by_handle(named, fd, name);
        let victim = named.or(new.as_ref()).map(|known| self.victim(known));
        let victim = victim.transpose()?;
        let removed = rustix::fs::unlinkat(fd, name, flags);
        if let Some(victim) = victim {
            self.finish_unlink(victim, removed.is_ok(), (parent, name), &change);
        }
        removed
    }

    /// A descriptor of an inode whose name is about to change, if it can be opened.
    ///
    /// # Errors
    ///
    /// No descriptor is left. The name must not change then, as the inode could not be reopened.
    fn pin<'a>(&self, known: Option<&'a KnownInode>) -> Result<Option<Result<InodeFd<'a>>>> {
        match known.map(|known| self.fd(&known.inode)) {
            Some(Err(Errno::MFILE | Errno::NFILE)) => Err(Errno::NFILE),
            opened => Ok(opened),
        }
    }

    /// The inode with `name` in `parent`, if inodes have file handles and it was not `known` before
    /// the name change was announced. A lookup that adds the inode in between sees the
    /// announcement.
    fn known_if_by_handle(
        &self,
        known: Option<&KnownInode>,
        parent: &InodeFd<'_>,
        name: &CStr,
    ) -> Option<KnownInode> {
        if known.is_some() || self.reopen_policy.keeps_opened_fds() {
            return None;
        }
        self.known(parent, name, false)
    }

    /// Prepares an inode for the loss of a name. A descriptor in use is not closed before the store
    /// has recorded the loss. An inode that is about to lose its last name keeps a descriptor from
    /// here on, as its file handle will not open it.
    ///
    /// # Errors
    ///
    /// As [`pin`](Self::pin).
    fn victim<'a>(&self, known: &'a KnownInode) -> Result<Victim<'a>> {
        let inode = &*known.inode;
        self.inodes.set_nameless(inode, true);
        let by_handle = matches!(&*inode.ref_kind(), RefKind::Handle(_));
        let mut fd = None;
        if !by_handle || known.is_last() {
            fd = match self.pin(Some(known)) {
                Ok(opened) => opened.and_then(Result::ok),
                Err(error) => {
                    self.inodes.set_nameless(inode, false);
                    return Err(error);
                }
            };
            if let Some(opened) = fd
                .take_if(|fd| fd.is_opened())
                .and_then(InodeFd::into_opened)
            {
                fd = match self.inodes.install(inode, opened) {
                    Ok(fd) => Some(InodeFd::installed(inode, fd)),
                    Err(opened) => Some(InodeFd::opened(inode, opened)),
                };
            }
        }
        Ok(Victim {
            known,
            by_handle,
            fd,
        })
    }

    /// Records whether `victim` lost a name.
    fn finish_unlink(
        &self,
        victim: Victim<'_>,
        lost: bool,
        (parent, name): (&Inode, &CStr),
        change: &DirChange<'_>,
    ) {
        let Victim {
            known,
            by_handle,
            fd,
        } = victim;
        let inode = &*known.inode;
        if lost && let Some(fd) = &fd {
            self.inodes.record_removal(inode, parent, name, change);
            if known.is_last() {
                self.close_cached(inode.node());
            } else {
                // It has other names, none of them known. A server process that doesn't inherit the
                // descriptor can only find it by searching the share; recording the handle says
                // that it has a name. Without file handles the record is empty, which says the
                // same.
                let handle = FileHandle::of(fd);
                let bytes = handle.as_ref().map_or(&[][..], FileHandle::bytes);
                let ref_kind = inode.ref_kind();
                if !matches!(*ref_kind, RefKind::Handle(_)) {
                    inode.record().set_handle(bytes);
                }
            }
            let ref_kind = inode.ref_kind();
            if known.is_last() && inode.slot().is_full() && matches!(*ref_kind, RefKind::Handle(_))
            {
                self.inodes
                    .change_reopen_method(inode, ref_kind, ReopenMethod::None);
            }
        }
        let is_nameless = lost
            && (known.is_last() || {
                let links = fd.as_ref().map(|fd| stat_fd(fd, StatxFlags::NLINK));
                matches!(links, Some(Ok(stat)) if stat.stx_nlink == 0)
            });
        if !is_nameless {
            self.inodes.set_nameless(inode, false);
        }
        drop(fd);
        if by_handle && !lost && !self.reopen_policy.keeps_opened_fds() {
            // Evict it even if it was used recently.
            inode.slot().second_chance();
            self.close_now(inode);
        }
    }

    /// The inode that the guest knows under `name` in `parent`. If `loses` is set, the inode number
    /// is recorded in the journal for the next server process.
    fn known(&self, parent: &InodeFd<'_>, name: &CStr, loses: bool) -> Option<KnownInode> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = rustix::fs::statx(parent, name, flags, IDENTITY).ok()?;
        if loses && let Some(entry) = self.table().own_journal_entry(current_request::unique()) {
            entry.seen(stat.stx_ino);
        }
        let inode = self.inodes.peek(&Identity::of(&stat))?;
        Some(KnownInode {
            inode,
            links: stat.stx_nlink,
        })
    }

    pub(crate) fn move_name(
        &self,
        caller: &Caller,
        from: (NodeId, &CStr),
        to: (NodeId, &CStr),
        flags: u32,
    ) -> Result<()> {
        let flags = RenameFlags::from_bits_retain(flags);
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        if !(flags - known).is_empty() {
            return Err(Errno::INVAL);
        }
        let old_parent = self.inode(from.0)?;
        let new_parent = self.inode(to.0)?;
        // A whiteout is a new file, so it needs an owner.
        let _as_caller = flags
            .contains(RenameFlags::WHITEOUT)
            .then(|| self.as_caller(caller, None))
            .transpose()?;
        let old_fd = self.fd(&old_parent)?;
        let new_fd = self.fd(&new_parent)?;
        self.confirm_both(caller, &old_fd, &new_fd)?;
        let moved = self.known(&old_fd, component(from.1)?, true);
        let replaced = self.known(&new_fd, component(to.1)?, false);
        if replaced.is_some() && !flags.contains(RenameFlags::EXCHANGE) {
            self.room_for_descriptor()?;
        }
        let known = (moved.as_ref(), replaced.as_ref());
        let renamed = self.move_known(known, (&old_fd, from.1), (&new_fd, to.1), flags);
        for known in moved.iter().chain(&replaced) {
            self.evict_forgotten(&known.inode);
        }
        renamed
    }

    /// The permission bits of a new file, without a set-group-ID bit that the caller may not set.
    ///
    /// In a set-group-ID directory a file gets the directory's group. The kernel clears the bit of
    /// an executable file if the creator isn't in that group, but it would not for the server,
    /// which has `CAP_FSETID`. Guest kernels since 6.0 clear the bit themselves. Guest kernels
    /// since 6.3 report a caller that is in the group by a supplementary group as a member; with
    /// older ones such a caller can set the bit afterwards. If ids are mapped, only the guest's
    /// kernel knows which callers are privileged.
    pub(crate) fn permitted_mode(
        &self,
        caller: &Caller,
        parent: &impl AsFd,
        mode: u32,
    ) -> Result<Mode> {
        let caller = self.on_host(caller)?;
        let mut mode = mode & PERMISSIONS;
        let group_program = SET_GROUP_ID | GROUP_EXECUTE;
        let doubtful = caller.uid != Some(0) && !self.terms.idmapped();
        if doubtful && mode & group_program == group_program {
            let stat = stat_fd(parent, StatxFlags::BASIC_STATS)?;
            let inherits = u32::from(stat.stx_mode) & SET_GROUP_ID != 0;
            let is_member = [caller.gid, caller.group].contains(&Some(stat.stx_gid));
            if inherits && !is_member {
                mode &= !SET_GROUP_ID;
            }
        }
        Ok(Mode::from_raw_mode(mode))
    }

    fn move_known(
        &self,
        (moved, replaced): (Option<&KnownInode>, Option<&KnownInode>),
        (old_fd, old_name): (&InodeFd<'_>, &CStr),
        (new_fd, new_name): (&InodeFd<'_>, &CStr),
        flags: RenameFlags,
    ) -> Result<()> {
        let (old_parent, new_parent) = (old_fd.inode(), new_fd.inode());
        if let Some(known) = moved {
            let dir_seq = self.inodes.dir_seq(old_parent);
            self.inodes
                .record_name(&known.inode, old_parent, old_name, dir_seq);
        }
        // A descriptor in use is not closed before the store has recorded the rename.
        let by_name = |known: &&KnownInode| !matches!(&*known.inode.ref_kind(), RefKind::Handle(_));
        let in_use = [
            self.pin(moved.filter(by_name))?,
            self.pin(replaced.filter(by_name))?,
        ];
        let change = self.inodes.begin_name_change([old_parent, new_parent]);
        let new = self.known_if_by_handle(replaced, new_fd, new_name);
        let replaced = replaced.or(new.as_ref());
        let node = |known: &KnownInode| known.inode.node();
        // Both names are links of one inode. rename(2) does nothing then.
        let same = moved.is_some() && moved.map(node) == replaced.map(node);
        let exchanged = flags.contains(RenameFlags::EXCHANGE);
        let victim = replaced.filter(|_| !same && !exchanged);
        let victim = victim.map(|known| self.victim(known)).transpose()?;
        let renamed = rustix::fs::renameat_with(old_fd, old_name, new_fd, new_name, flags);
        if let Some(victim) = victim {
            self.finish_unlink(victim, renamed.is_ok(), (new_parent, new_name), &change);
        }
        renamed?;
        if same {
            return Ok(());
        }
        if let Some(known) = replaced.filter(|_| exchanged) {
            let (parent, name) = (old_parent, old_name);
            self.inodes
                .record_rename(&known.inode, parent, name, &change);
        }
        if let Some(known) = moved {
            let (parent, name) = (new_parent, new_name);
            self.inodes
                .record_rename(&known.inode, parent, name, &change);
        }
        drop(change);
        drop(in_use);
        Ok(())
    }
}

/// An inode whose name is about to change.
struct KnownInode {
    inode: Arc<Inode>,
    links: u32,
}

impl KnownInode {
    /// Whether this is its last name.
    fn is_last(&self) -> bool {
        self.links == 1 || self.inode.kind() == FileType::Directory
    }
}

/// An inode that is about to lose a name.
struct Victim<'a> {
    known: &'a KnownInode,
    by_handle: bool,
    /// A descriptor that keeps the inode alive, if it could be opened.
    fd: Option<InodeFd<'a>>,
}
