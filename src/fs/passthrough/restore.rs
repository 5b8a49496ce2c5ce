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

use std::collections::HashSet;
use std::ffi::CStr;
use std::ops::Not;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, SeekFrom};
use rustix::io::Errno;

use super::Passthrough;
use super::holds::{IDENTITY, Identity, Key, stat_fd};
use super::inode::{Held, Inode};
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
    pub bequeathed: bool,
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
pub(super) fn bequeathed(fd: Option<i32>, record: &InodeRecord) -> Option<OwnedFd> {
    let fd = inherit::bequeathed_fd(fd?).ok()?;
    let stat = stat_fd(&fd, IDENTITY).ok()?;
    let key = Identity::of(&stat).key;
    ((key.number, key.device) == (record.number(), record.device())).then_some(fd)
}

impl Passthrough {
    /// Takes in what `records` tell of.
    pub(super) fn restore(&self, records: Others, old_root: Key, past: &Past) -> Restored {
        let under_way: HashSet<u64> = past.under_way.iter().copied().collect();
        let mut restored = Restored::default();
        let known: HashSet<u64> = records.inodes.iter().map(InodeRecord::node).collect();
        let inodes: Vec<Inode> = records
            .inodes
            .into_iter()
            .map(|record| self.restored_inode(record, (&known, &under_way), old_root, past))
            .collect();
        // Of young ones number and birth tell too little later on; at this moment they do.
        let unsure = |inode: &&Inode| !inode.is_settled() && !inode.slot().is_full();
        let young: Vec<NodeId> = inodes.iter().filter(unsure).map(Inode::node).collect();
        self.inodes.take_in(inodes);
        restored.inodes = self.inodes.len();
        for inode in young.into_iter().filter_map(|node| self.inodes.any(node)) {
            self.make_sure(&inode);
        }
        for record in records.handles {
            match self.restored_file(&record, &under_way, past) {
                Ok(Some(file)) => {
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

    /// Opens an inode, so that what a lookup finds can be compared with it.
    fn make_sure(&self, inode: &Inode) {
        if let Err(error) = self.fd(inode) {
            log::debug!("node {} can't be reached: {error}", inode.node().0);
        }
    }

    fn restored_inode(
        &self,
        record: InodeRecord,
        (known, under_way): (&HashSet<u64>, &HashSet<u64>),
        old_root: Key,
        past: &Past,
    ) -> Inode {
        // It will be looked up again.
        if under_way
            .iter()
            .any(|unique| record.was_counted_by(*unique, true))
        {
            record.set_lookups(record.lookups().saturating_sub(1), 0, false);
        }
        let fd = if past.bequeathed {
            bequeathed(record.descriptor(), &record)
        } else {
            None
        };
        let root = self.inodes.root_key();
        if !past.bequeathed
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
            Some(Held::Handle(self.holder.mount(record.mount())?))
        };
        let name = name.then_some(Held::Name);
        let held = match (&fd, name) {
            (Some(_), Some(name)) => Some(name),
            (_, name) => handle().or(name),
        };
        let inode = Inode::recorded(record, fd, held.unwrap_or(Held::Nothing));
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
        let had = if past.bequeathed {
            bequeathed(Some(fields.fd), inode.record())
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
        if past.bequeathed
            && let Some(fd) = bequeathed(Some(fields.fd), inode.record())
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

    /// Whether what the guest knew as `from` goes by `to` now, as after a RENAME by the process
    /// before, which did not come to write it down. It is known by its new name from here on.
    pub(super) fn has_moved(&self, from: (NodeId, &CStr), to: (NodeId, &CStr)) -> bool {
        let key_at = |(parent, name): (NodeId, &CStr)| {
            let parent = self.inode(parent)?;
            let stat = stat_name(&self.fd(&parent)?, name)?;
            Ok::<_, Errno>(Identity::of(&stat))
        };
        let Ok(there) = key_at(to) else {
            return false;
        };
        let left = key_at(from);
        match self.inodes.by_name(from.0, from.1) {
            Some(moved) => {
                let has_moved = moved.may_be(&there)
                    && left.as_ref().is_ok_and(|left| left.key == there.key).not();
                if has_moved && let (Ok(old), Ok(new)) = (self.inode(from.0), self.inode(to.0)) {
                    let replaced = self.inodes.by_name(to.0, to.1);
                    let changing = self.inodes.changing([&old, &new]);
                    self.inodes.rename(&moved, &new, to.1, &changing);
                    match (replaced, left) {
                        // They have changed places.
                        (Some(other), Ok(left)) if other.may_be(&left) => {
                            self.inodes.rename(&other, &old, from.1, &changing);
                        }
                        (Some(other), _) => {
                            self.inodes.lose(&other, &new, to.1, &changing);
                        }
                        _ => {}
                    }
                    drop(changing);
                    self.make_sure(&moved);
                }
                has_moved
            }
            // Of what is reached by file handle no name is known, nor of what has been told already.
            None => matches!(left, Err(Errno::NOENT)),
        }
    }
}
