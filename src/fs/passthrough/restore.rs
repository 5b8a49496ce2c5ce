//! Going on from a table that another process has left: after a crash, an upgrade, a migration.
//!
//! Inodes, open files and locks come back with their descriptors where these are still there under
//! their numbers, because this process has those of the one before ([`Past::bequeathed`]); else they
//! are opened anew, by file handle or by parent and name, inodes when they are needed, files and locks
//! at once. What was not yet answered when the other process ended is undone as far as it counts,
//! since it is going to be done again. The invariant: whatever is opened is the inode that it was,
//! as device, number and birth say; what can't be had any more is `ESTALE` or `EBADF` to the guest,
//! and never another file.
//!
//! With descriptors bequeathed the shared directory, too, is the one that was open before: a server
//! in a mount namespace of its own has other mounts than the one before it, between which no name can
//! be moved.

mod seek;

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, SeekFrom};
use rustix::io::Errno;

use self::seek::Sought;
use super::Passthrough;
use super::inode::{Inode, RefKind};
use super::inode_ref::{IDENTITY, Identity, Key, stat_fd};
use super::lookup::stat_name;
use super::opening::regular_file;
use crate::fs::{NodeId, Result};
use crate::io::{File, Lock, LockKind, RecordLock};
use crate::state::{HandleRecord, InodeRecord, LockRecord, Table};
use crate::sys::file_handle::FileHandle;
use crate::sys::inherit;

/// What is known of how the process before ended.
#[derive(Clone, Debug, Default)]
pub struct Past {
    /// This process has its descriptors, under the same numbers, and nothing else has.
    pub inherited_fds: bool,
    /// The requests that were under way, and not yet done.
    pub under_way: Vec<u64>,
}

/// What has come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Inodes.
    pub inodes: usize,
    /// Open files and directories.
    pub files: usize,
    /// Lock owners.
    pub locks: usize,
    /// Open files and lock owners that have not.
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

/// What is known of requests that a process before this one had begun.
#[derive(Debug, Default)]
pub(super) struct Begun {
    seen: HashMap<u64, u64>,
    forgotten: HashSet<(u64, NodeId)>,
    /// Of its inodes, those that were looked for.
    sought: Sought,
}

impl Begun {
    pub(super) fn seen(&self, unique: u64) -> Option<u64> {
        // Nearly always there is nothing.
        self.seen.get(&unique).copied()
    }

    pub(super) fn has_forgotten(&self, unique: u64, node: NodeId) -> bool {
        self.forgotten.contains(&(unique, node))
    }
}

/// The records that a table has.
#[derive(Debug)]
pub(super) struct Records {
    pub(super) root: InodeRecord,
    pub(super) others: Others,
}

/// All of them but the root's.
#[derive(Debug)]
pub(super) struct Others {
    inodes: Vec<InodeRecord>,
    handles: Vec<HandleRecord>,
    locks: Vec<LockRecord>,
}

impl Records {
    /// Those of `table`; `None` if it knows of no root.
    pub(super) fn of(table: &Arc<Table>) -> Option<Self> {
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

/// Who the inode of a record was to the process before.
pub(super) fn key_of(record: &InodeRecord) -> Key {
    Key {
        number: record.number(),
        device: record.device(),
        mount: record.mount(),
    }
}

/// The descriptor that was written down as `fd`, if it is open on that inode.
pub(super) fn inherited_fds(fd: Option<i32>, record: &InodeRecord) -> Option<OwnedFd> {
    let fd = inherit::bequeathed_fd(fd?).ok()?;
    let stat = stat_fd(&fd, IDENTITY).ok()?;
    let key = Identity::of(&stat).key;
    ((key.number, key.device) == (record.number(), record.device())).then_some(fd)
}

/// A server's end is not the end of what its guest holds: that ends by FORGET, RELEASE, or with the
/// guest's session ([`reset`](crate::fs::FileSystem::reset)), and otherwise is the next process's.
impl Drop for Passthrough {
    fn drop(&mut self) {
        self.table().close();
    }
}

impl Passthrough {
    /// Takes in what `records` tell of.
    pub(super) fn restore(&mut self, mut records: Others, old_root: Key, past: &Past) -> Restored {
        let under_way: HashSet<u64> = past.under_way.iter().copied().collect();
        let mut restored = Restored::default();
        self.find_begun(&mut records.inodes, &under_way);
        let known: HashSet<u64> = records.inodes.iter().map(InodeRecord::node).collect();
        let inodes: Vec<Inode> = records
            .inodes
            .into_iter()
            .map(|record| self.restored_inode(record, &known, old_root, past))
            .collect();
        // Of young ones number and birth tell too little later on; at this moment they do.
        let unsure = |inode: &&Inode| !inode.is_settled() && !inode.slot().is_full();
        let young: Vec<NodeId> = inodes.iter().filter(unsure).map(Inode::node).collect();
        self.inodes.take_in(inodes);
        restored.inodes = self.inodes.len();
        if !past.inherited_fds {
            self.begun.sought = Sought::from(self.table().nodes_given_out());
            let open = records.handles.iter();
            let open = open.map(|record| NodeId(record.fields().node));
            self.find_all(young.into_iter().chain(open).collect());
        }
        for record in records.handles {
            match self.restored_file(&record, &under_way, past) {
                Ok(Some(file)) => {
                    let node = NodeId(record.fields().node);
                    if let Some(inode) = self.inodes.any(node)
                        && inode.kind() == FileType::RegularFile
                    {
                        self.share_restored(&inode, &file);
                    }
                    self.handles.put(record, file);
                    restored.files += 1;
                }
                Ok(None) => {}
                Err(error) => {
                    let node = record.fields().node;
                    log::warn!("an open file of node {node} can't be opened again: {error}");
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
                    log::warn!("locks on node {node} can't be taken again: {error}");
                    restored.lost += 1;
                }
            }
        }
        self.make_room();
        restored
    }

    /// Finds out how far requests came that were under way, and takes back the lookups that they have
    /// added: they will be served again.
    fn find_begun(&mut self, inodes: &mut [InodeRecord], under_way: &HashSet<u64>) {
        let table = Arc::clone(self.table());
        let by_node: HashMap<u64, usize> = (0..inodes.len())
            .map(|at| (inodes[at].node(), at))
            .collect();
        let record = |node: u64| by_node.get(&node).and_then(|at| inodes.get(*at));
        for mut done in table.take_journal_entries(|unique| under_way.contains(&unique)) {
            let unique = done.unique;
            if done.seen != 0 {
                self.begun.seen.insert(unique, done.seen);
            }
            let mut given_back = std::mem::take(&mut done.dropped);
            if let Some((node, back)) = done.in_doubt
                && let Some(record) = record(node)
                && record.was_counted_by(unique, !back)
            {
                if back {
                    given_back.push(node);
                } else {
                    record.set_lookups(record.lookups().saturating_sub(1), 0, false);
                }
            }
            let forgotten = given_back.into_iter().map(|node| (unique, NodeId(node)));
            self.begun.forgotten.extend(forgotten);
            while let Some(node) = done.added.last().copied() {
                match record(node) {
                    Some(record) => table.undo(&mut done, record),
                    None => drop(done.added.pop()),
                }
            }
        }
    }

    /// Who goes by a name; counts nothing.
    pub(super) fn key_at(&self, parent: NodeId, name: &CStr) -> Result<Identity> {
        let parent = self.inode(parent)?;
        let stat = stat_name(&self.fd(&parent)?, name)?;
        Ok(Identity::of(&stat))
    }

    /// Opens an inode, so that what a lookup finds can be compared with it.
    fn make_sure(&self, inode: &Inode) {
        if let Err(error) = self.open_closed(inode) {
            log::debug!("node {} can't be reached: {error}", inode.node().0);
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
            inherited_fds(record.descriptor(), &record)
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
            Some(RefKind::Handle(self.holder.mount(record.mount())?))
        };
        let name = name.then_some(RefKind::Name);
        let held = match (&fd, name) {
            (Some(_), Some(name)) => Some(name),
            (_, name) => handle().or(name),
        };
        if held.is_none() {
            // Nothing but its descriptor leads there, and nobody can tell why.
            record.set_nameless(true);
        }
        let inode = Inode::recorded(record, fd, held.unwrap_or(RefKind::Nothing));
        inode.settle_by_record();
        inode
    }

    /// The file that a record tells of; `None` if its OPEN is going to be done again.
    fn restored_file(
        &self,
        record: &HandleRecord,
        under_way: &HashSet<u64>,
        past: &Past,
    ) -> Result<Option<File>> {
        let fields = record.fields();
        let inode = self.inodes.any(NodeId(fields.node)).ok_or(Errno::STALE)?;
        let had = if past.inherited_fds {
            inherited_fds(Some(fields.fd), inode.record())
        } else {
            None
        };
        if under_way.contains(&record.opened_by()) {
            return Ok(None);
        }
        let flags = OFlags::from_bits_retain(fields.flags).difference(OFlags::TRUNC);
        let (fd, anew) = match had {
            Some(fd) => (fd, false),
            None if fields.directory => (self.open_directory(&inode)?, true),
            None if inode.kind() == FileType::RegularFile => (self.reopen(&inode, flags)?, true),
            None => return Err(Errno::STALE),
        };
        if anew {
            record.set_descriptor(Some(fd.as_raw_fd()));
        }
        if fields.directory {
            // Where its stream, which is new, believes it to stand.
            rustix::fs::seek(&fd, SeekFrom::Start(0))?;
            return Ok(Some(File::from_fd(fd)));
        }
        let file = regular_file(fd, flags);
        let kind = match record.lock() {
            1 => LockKind::Shared,
            2 => LockKind::Exclusive,
            _ => LockKind::Unlock,
        };
        if anew
            && kind != LockKind::Unlock
            && let Err(error) = file.try_lock(Lock::Whole(kind))
        {
            log::warn!(
                "a lock on node {} can't be taken again: {error}",
                fields.node
            );
        }
        Ok(Some(file))
    }

    fn restored_lock(&self, record: &LockRecord, past: &Past) -> Result<File> {
        let fields = record.fields();
        let inode = self.inodes.any(NodeId(fields.node)).ok_or(Errno::STALE)?;
        if past.inherited_fds
            && let Some(fd) = inherited_fds(Some(fields.fd), inode.record())
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

    /// Whether the inode with this `number` goes by `name` no more, as after an UNLINK or RMDIR by the
    /// process before, which did not come to write it down.
    pub(super) fn has_lost(&self, parent: NodeId, name: &CStr, number: u64) -> bool {
        let there = self.key_at(parent, name);
        if there.is_ok_and(|there| there.key.number == number) {
            return false;
        }
        if let (Ok(parent), Some(lost)) = (self.inode(parent), self.inodes.by_name(parent, name)) {
            let changing = self.inodes.changing([&parent, &parent]);
            may_have_others(&lost);
            self.inodes.lose(&lost, &parent, name, &changing);
            self.inodes.set_nameless(&lost, true);
        }
        true
    }

    /// Whether the inode with this `number`, which went by `from`, goes by `to` now, as after a RENAME
    /// by the process before, which did not come to write it down. It is known by its new name from
    /// here on.
    pub(super) fn has_moved(
        &self,
        from: (NodeId, &CStr),
        to: (NodeId, &CStr),
        number: u64,
    ) -> bool {
        let left = self.key_at(from.0, from.1);
        let there = match self.key_at(to.0, to.1) {
            Ok(there) if there.key.number == number => there,
            _ => return false,
        };
        if left.as_ref().is_ok_and(|left| left.key == there.key) {
            return false;
        }
        if let (Ok(old), Ok(new)) = (self.inode(from.0), self.inode(to.0)) {
            let moved = self.inodes.by_name(from.0, from.1);
            let replaced = self.inodes.by_name(to.0, to.1);
            let changing = self.inodes.changing([&old, &new]);
            let is = |inode: &Arc<Inode>, identity: &Identity| inode.may_be(identity);
            if let Some(moved) = moved.as_ref().filter(|it| is(it, &there)) {
                self.inodes.rename(moved, &new, to.1, &changing);
            }
            match (&replaced, &left) {
                (Some(other), _) if is(other, &there) => {}
                // They have changed places.
                (Some(other), Ok(left)) if is(other, left) => {
                    self.inodes.rename(other, &old, from.1, &changing);
                }
                (Some(other), _) => {
                    may_have_others(other);
                    self.inodes.lose(other, &new, to.1, &changing);
                    self.inodes.set_nameless(other, true);
                }
                _ => {}
            }
            drop(changing);
            moved
                .iter()
                .chain(&replaced)
                .for_each(|inode| self.make_sure(inode));
        }
        true
    }
}

/// Takes note that an inode whose known name is gone may have another one.
fn may_have_others(inode: &Inode) {
    let _held = inode.held();
    if inode.record().handle().is_none() {
        inode.record().set_handle(&[]);
    }
}
