//! Resumes a session from the table that another process left: after a crash, an upgrade, or a
//! migration.
//!
//! Inodes, open files and locks get their descriptors back if this process has those of the
//! previous process under the same numbers ([`Past::inherited_fds`]). Otherwise they are reopened,
//! by file handle or by parent and name: inodes when they are needed, files and locks at once. The
//! lookups counted by requests that were not answered are undone, as these requests are served
//! again. The invariant: a reopened inode is the same inode by device, number and birth time; one
//! that can't be reopened is `ESTALE` or `EBADF` to the guest, never another file.
//!
//! With inherited descriptors, the root is also the directory that was open before: a server in its
//! own mount namespace has other mounts than the previous server, and a name can't be moved between
//! mounts.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::fs::passthrough::Passthrough;
use crate::fs::passthrough::descriptors::lost_inodes::LostInodeSearch;
use crate::fs::passthrough::inode_table::identity::{IDENTITY, Identity, Key, stat_fd};
use crate::fs::passthrough::inode_table::inode::{Inode, RefKind};
use crate::fs::passthrough::inode_table::inode_fd::stat_name;
use crate::fs::passthrough::ops::open::regular_file;
use crate::fs::{NodeId, Result};
use crate::io::{File, Lock, LockKind, RecordLock};
use crate::state::{HandleRecord, InodeRecord, LockRecord, Table};
use crate::sys::file_handle::FileHandle;
use crate::sys::inherit;

/// What is known about the end of the previous server process.
#[derive(Clone, Debug, Default)]
pub struct Past {
    /// This process has the previous one's descriptors, under the same numbers, and no other
    /// process does.
    pub inherited_fds: bool,
    /// The requests that were running and not finished.
    pub under_way: Vec<u64>,
}

/// What was restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Inodes.
    pub inodes: usize,
    /// Open files and directories.
    pub files: usize,
    /// Lock owners.
    pub locks: usize,
    /// Open files and lock owners that could not be restored.
    pub lost: usize,
}

impl std::fmt::Display for Restored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            inodes,
            files,
            locks,
            lost,
        } = self;
        write!(
            f,
            "{inodes} inodes, {files} open files, {locks} lock owners; {lost} lost"
        )
    }
}

/// What earlier server processes recorded about unfinished requests.
#[derive(Debug, Default)]
pub(crate) struct PreviousAttempts {
    seen: HashMap<u64, u64>,
    forgotten: HashSet<(u64, NodeId)>,
    /// The search for inodes whose known name is gone.
    pub(crate) search: LostInodeSearch,
}

impl PreviousAttempts {
    pub(crate) fn seen(&self, unique: u64) -> Option<u64> {
        // The map is nearly always empty.
        self.seen.get(&unique).copied()
    }

    pub(crate) fn has_forgotten(&self, unique: u64, node: NodeId) -> bool {
        self.forgotten.contains(&(unique, node))
    }
}

/// The records in a table.
#[derive(Debug)]
pub(crate) struct Records {
    pub(crate) root: InodeRecord,
    pub(crate) others: Others,
}

/// All records except that of the root.
#[derive(Debug)]
pub(crate) struct Others {
    inodes: Vec<InodeRecord>,
    handles: Vec<HandleRecord>,
    locks: Vec<LockRecord>,
}

impl Records {
    /// Takes the records of `table`. Returns `None` if there is no root.
    pub(crate) fn of(table: &Arc<Table>) -> Option<Self> {
        let (handles, locks) = (table.take_handles(), table.take_locks());
        let mut inodes = table.take_inodes();
        let root = inodes.iter().position(|it| it.node() == NodeId::ROOT.0)?;
        let root = inodes.swap_remove(root);
        let others = Others {
            inodes,
            handles,
            locks,
        };
        Some(Self { root, others })
    }
}

/// The key that the inode had in the previous process.
pub(crate) fn key_of(record: &InodeRecord) -> Key {
    Key {
        number: record.number(),
        device: record.device(),
        mount: record.mount(),
    }
}

/// The inherited descriptor with the recorded number `fd`, if it is open on that inode.
pub(crate) fn inherited_fd(fd: Option<i32>, record: &InodeRecord) -> Option<OwnedFd> {
    let fd = inherit::bequeathed_fd(fd?).ok()?;
    let stat = stat_fd(&fd, IDENTITY).ok()?;
    let key = Identity::of(&stat).key;
    ((key.number, key.device) == (record.number(), record.device())).then_some(fd)
}

/// The guest's state doesn't end with the server. It ends with FORGET, RELEASE, or the guest's
/// session ([`reset`](crate::fs::FileSystem::reset)); otherwise the next server process resumes it.
impl Drop for Passthrough {
    fn drop(&mut self) {
        self.table().close();
    }
}

impl Passthrough {
    /// Restores what `records` describe.
    pub(crate) fn restore(&mut self, mut records: Others, old_root: Key, past: &Past) -> Restored {
        let under_way: HashSet<u64> = past.under_way.iter().copied().collect();
        let mut restored = Restored::default();
        self.load_previous_attempts(&mut records.inodes, &under_way);
        let known: HashSet<u64> = records.inodes.iter().map(InodeRecord::node).collect();
        let inodes: Vec<Inode> = records
            .inodes
            .into_iter()
            .map(|record| self.restored_inode(record, &known, old_root, past))
            .collect();
        // For young inodes number and birth time are sufficient now, but not later, so they are
        // opened now.
        let unsure = |inode: &&Inode| !inode.is_settled() && !inode.slot().is_full();
        let young: Vec<NodeId> = inodes.iter().filter(unsure).map(Inode::node).collect();
        self.inodes.restore_all(inodes);
        restored.inodes = self.inodes.len();
        if !past.inherited_fds {
            self.previous_attempts.search = LostInodeSearch::from(self.table().nodes_given_out());
            let open = records.handles.iter();
            let open = open.map(|record| NodeId(record.fields().node));
            self.search_by_node(young.into_iter().chain(open).collect());
        }
        for record in records.handles {
            match self.restored_file(&record, &under_way, past) {
                Ok(Some(file)) => {
                    let node = NodeId(record.fields().node);
                    if let Some(inode) = self.inodes.any(node)
                        && inode.kind() == FileType::RegularFile
                    {
                        self.share_if_nameless(&inode, &file);
                    }
                    self.handles.put(record, file);
                    restored.files += 1;
                }
                Ok(None) => {}
                Err(error) => {
                    let node = record.fields().node;
                    log::warn!("can't reopen an open file of node {node}: {error}");
                    restored.lost += 1;
                }
            }
        }
        for record in records.locks {
            match self.restored_lock(&record, past) {
                Ok(file) => {
                    self.locks.put(record, file);
                    restored.locks += 1;
                }
                Err(error) => {
                    let node = record.fields().node;
                    log::warn!("can't acquire the locks on node {node} again: {error}");
                    restored.lost += 1;
                }
            }
        }
        self.make_room();
        restored
    }

    /// Reads how far unfinished requests got, and undoes the lookups that they counted, as they
    /// will be served again.
    fn load_previous_attempts(&mut self, inodes: &mut [InodeRecord], under_way: &HashSet<u64>) {
        let table = Arc::clone(self.table());
        let by_node: HashMap<u64, usize> = (0..inodes.len())
            .map(|at| (inodes[at].node(), at))
            .collect();
        let record = |node: u64| by_node.get(&node).and_then(|at| inodes.get(*at));
        for mut done in table.take_journal_entries(|unique| under_way.contains(&unique)) {
            let unique = done.unique;
            if done.seen != 0 {
                self.previous_attempts.seen.insert(unique, done.seen);
            }
            let mut forgotten = std::mem::take(&mut done.dropped);
            if let Some((node, back)) = done.in_doubt
                && let Some(record) = record(node)
                && record.was_counted_by(unique, !back)
            {
                if back {
                    forgotten.push(node);
                } else {
                    record.set_lookups(record.lookups().saturating_sub(1), 0, false);
                }
            }
            let forgotten = forgotten.into_iter().map(|node| (unique, NodeId(node)));
            self.previous_attempts.forgotten.extend(forgotten);
            while let Some(node) = done.added.last().copied() {
                match record(node) {
                    Some(record) => table.undo(&mut done, record),
                    None => drop(done.added.pop()),
                }
            }
        }
    }

    /// The identity of the inode with this name. Counts no lookup.
    pub(crate) fn identity_at(&self, parent: NodeId, name: &CStr) -> Result<Identity> {
        let parent = self.inode(parent)?;
        let stat = stat_name(&self.fd(&parent)?, name)?;
        Ok(Identity::of(&stat))
    }

    /// Opens an inode, so that the result of a lookup can be compared with it.
    fn open_to_compare(&self, inode: &Inode) {
        if let Err(error) = self.open_closed(inode) {
            log::debug!("can't open node {}: {error}", inode.node().0);
        }
    }

    fn restored_inode(
        &self,
        record: InodeRecord,
        known: &HashSet<u64>,
        old_root: Key,
        past: &Past,
    ) -> Inode {
        let fd = if past.inherited_fds {
            inherited_fd(record.descriptor(), &record)
        } else {
            None
        };
        let root = self.inodes.root_key();
        if !past.inherited_fds
            && (record.device(), record.mount()) == (old_root.device, old_root.mount)
        {
            record.set_location(root.device, root.mount);
        }
        if fd.is_none() {
            record.set_descriptor(None);
        }
        let parent = record.parent();
        let name = parent.is_some_and(|parent| {
            let is_there = parent == NodeId::ROOT.0 || known.contains(&parent);
            is_there && parent != record.node()
        });
        let handle = || {
            FileHandle::from_bytes(&record.handle()?)?;
            Some(RefKind::Handle(self.reopen_policy.mount(record.mount())?))
        };
        let name = name.then_some(RefKind::Name);
        let ref_kind = match (&fd, name) {
            (Some(_), Some(name)) => Some(name),
            (_, name) => handle().or(name),
        };
        if ref_kind.is_none() {
            // Only a descriptor led to it, and the reason is unknown.
            record.set_nameless(true);
        }
        let inode = Inode::recorded(record, fd, ref_kind.unwrap_or(RefKind::Nothing));
        inode.settle_by_record();
        inode
    }

    /// The file of a handle's record. Returns `None` if its OPEN will be served again.
    fn restored_file(
        &self,
        record: &HandleRecord,
        under_way: &HashSet<u64>,
        past: &Past,
    ) -> Result<Option<File>> {
        let fields = record.fields();
        let inode = self.inodes.any(NodeId(fields.node)).ok_or(Errno::STALE)?;
        let inherited = if past.inherited_fds {
            inherited_fd(Some(fields.fd), inode.record())
        } else {
            None
        };
        if under_way.contains(&record.opened_by()) {
            return Ok(None);
        }
        let flags = OFlags::from_bits_retain(fields.flags).difference(OFlags::TRUNC);
        let (fd, reopened) = match inherited {
            Some(fd) => (fd, false),
            None if fields.directory => (self.open_directory(&inode)?, true),
            None if inode.kind() == FileType::RegularFile => (self.reopen(&inode, flags)?, true),
            None => return Err(Errno::STALE),
        };
        if reopened {
            record.set_descriptor(Some(fd.as_raw_fd()));
        }
        if fields.directory {
            // The new stream assumes this position.
            rustix::fs::seek(&fd, SeekFrom::Start(0))?;
            return Ok(Some(File::from_fd(fd)));
        }
        let file = regular_file(fd, flags);
        let kind = match record.lock() {
            1 => LockKind::Shared,
            2 => LockKind::Exclusive,
            _ => LockKind::Unlock,
        };
        if reopened
            && kind != LockKind::Unlock
            && let Err(error) = file.try_lock(Lock::Whole(kind))
        {
            log::warn!(
                "can't acquire a lock on node {} again: {error}",
                fields.node
            );
        }
        Ok(Some(file))
    }

    fn restored_lock(&self, record: &LockRecord, past: &Past) -> Result<File> {
        let fields = record.fields();
        let inode = self.inodes.any(NodeId(fields.node)).ok_or(Errno::STALE)?;
        if past.inherited_fds
            && let Some(fd) = inherited_fd(Some(fields.fd), inode.record())
        {
            return Ok(File::from_fd(fd));
        }
        let fd = self.open_to_lock(&inode)?;
        record.set_descriptor(Some(fd.as_raw_fd()));
        let file = File::from_fd(fd);
        for range in record.ranges() {
            let kind = if range.exclusive {
                LockKind::Exclusive
            } else {
                LockKind::Shared
            };
            let lock = RecordLock {
                kind,
                start: range.start,
                end: range.end,
            };
            let taken = file.try_lock(Lock::Record(lock));
            taken.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        }
        Ok(file)
    }

    /// Whether the inode with this `number` no longer has `name`, as after an UNLINK or RMDIR that
    /// the previous process executed but did not record.
    pub(crate) fn name_was_removed(&self, parent: NodeId, name: &CStr, number: u64) -> bool {
        let there = self.identity_at(parent, name);
        if there.is_ok_and(|there| there.key.number == number) {
            return false;
        }
        if let (Ok(parent), Some(lost)) = (self.inode(parent), self.inodes.by_name(parent, name)) {
            let change = self.inodes.begin_name_change([&parent, &parent]);
            note_other_names(&lost);
            self.inodes.record_removal(&lost, &parent, name, &change);
            self.inodes.set_nameless(&lost, true);
        }
        true
    }

    /// Whether the inode with this `number` has moved from `from` to `to`, as after a RENAME that
    /// the previous process executed but did not record. If so, records its new name.
    pub(crate) fn name_was_moved(
        &self,
        from: (NodeId, &CStr),
        to: (NodeId, &CStr),
        number: u64,
    ) -> bool {
        let left = self.identity_at(from.0, from.1);
        let there = match self.identity_at(to.0, to.1) {
            Ok(there) if there.key.number == number => there,
            _ => return false,
        };
        if left.as_ref().is_ok_and(|left| left.key == there.key) {
            return false;
        }
        if let (Ok(old), Ok(new)) = (self.inode(from.0), self.inode(to.0)) {
            let moved = self.inodes.by_name(from.0, from.1);
            let replaced = self.inodes.by_name(to.0, to.1);
            let change = self.inodes.begin_name_change([&old, &new]);
            let is = |inode: &Arc<Inode>, identity: &Identity| inode.may_be(identity);
            if let Some(moved) = moved.as_ref().filter(|it| is(it, &there)) {
                self.inodes.record_rename(moved, &new, to.1, &change);
            }
            match (&replaced, &left) {
                (Some(other), _) if is(other, &there) => {}
                // The two were exchanged.
                (Some(other), Ok(left)) if is(other, left) => {
                    self.inodes.record_rename(other, &old, from.1, &change);
                }
                (Some(other), _) => {
                    note_other_names(other);
                    self.inodes.record_removal(other, &new, to.1, &change);
                    self.inodes.set_nameless(other, true);
                }
                _ => {}
            }
            drop(change);
            moved
                .iter()
                .chain(&replaced)
                .for_each(|inode| self.open_to_compare(inode));
        }
        true
    }
}

/// Records that an inode whose known name is gone may have another name.
fn note_other_names(inode: &Inode) {
    let _ref_kind = inode.ref_kind();
    if inode.record().handle().is_none() {
        inode.record().set_handle(&[]);
    }
}
