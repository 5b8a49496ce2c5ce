//! Resumes a session from the table that another process left: after a crash, an upgrade, or a
//! migration.
//!
//! Inodes, open files and locks get their descriptors back if this process has those of the
//! previous process under the same numbers ([`PreviousProcess::inherited_fds`]). Otherwise they are
//! reopened, by file handle or by parent and name: inodes when they are needed, files and locks at
//! once. The lookups counted by requests that were not answered are undone, as these requests are
//! served again. The invariant: a reopened inode is the same inode by device, number and birth
//! time; one that can't be reopened is `ESTALE` or `EBADF` to the guest, never another file.
//!
//! With inherited descriptors, the root is also the directory that was open before: a server in its
//! own mount namespace has other mounts than the previous server, and a name can't be moved between
//! mounts.

use std::collections::HashSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, SeekFrom};
use rustix::io::Errno;

use super::attempts::PreviousAttempts;
use crate::fs::passthrough::descriptors::Descriptors;
use crate::fs::passthrough::descriptors::regular_file;
use crate::fs::passthrough::inode_table::{IDENTITY, Identity, Inode, Key, RefKind, stat_fd};
use crate::fs::{NodeId, Result};
use crate::io::{File, Lock, LockKind, RecordLock};
use crate::state::{HandleRecord, InodeRecord, LockRecord, Table};
use crate::sys::file_handle::FileHandle;
use crate::sys::inherit;

/// What is known about the end of the previous server process.
#[derive(Clone, Debug, Default)]
pub struct PreviousProcess {
    /// This process has the previous one's descriptors, under the same numbers, and no other
    /// process does.
    pub inherited_fds: bool,
    /// The requests that were running and not finished.
    pub in_flight: Vec<u64>,
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

/// The records in a table.
#[derive(Debug)]
pub(crate) struct Records {
    pub(crate) root: InodeRecord,
    pub(crate) others: OtherRecords,
}

/// All records except that of the root.
#[derive(Debug)]
pub(crate) struct OtherRecords {
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
        let others = OtherRecords {
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
    let fd = inherit::recorded_fd(fd?).ok()?;
    let stat = stat_fd(&fd, IDENTITY).ok()?;
    let key = Identity::of(&stat).key;
    ((key.number, key.device) == (record.number(), record.device())).then_some(fd)
}

/// Restores what `records` describe. `old_root` is the key that the root had in the previous
/// process.
pub(super) fn resume(
    fds: &mut Descriptors,
    mut records: OtherRecords,
    old_root: Key,
    past: &PreviousProcess,
) -> (PreviousAttempts, Restored) {
    let in_flight: HashSet<u64> = past.in_flight.iter().copied().collect();
    let mut restored = Restored::default();
    if !past.inherited_fds {
        let below = fds.inodes().table().nodes_given_out();
        fds.search_below(below);
    }
    let attempts = PreviousAttempts::load(fds.inodes().table(), &mut records.inodes, &in_flight);
    let resumption = Resumption {
        fds,
        past,
        in_flight: &in_flight,
    };
    restored.inodes = resumption.inodes(records.inodes, &records.handles, old_root);
    resumption.files(records.handles, &mut restored);
    resumption.locks(records.locks, &mut restored);
    fds.make_room();
    (attempts, restored)
}

/// A session that is being resumed.
struct Resumption<'a> {
    fds: &'a Descriptors,
    past: &'a PreviousProcess,
    in_flight: &'a HashSet<u64>,
}

impl Resumption<'_> {
    /// Restores the inodes. Returns how many there are.
    fn inodes(&self, records: Vec<InodeRecord>, handles: &[HandleRecord], old_root: Key) -> usize {
        let known: HashSet<u64> = records.iter().map(InodeRecord::node).collect();
        let inodes: Vec<Inode> = records
            .into_iter()
            .map(|record| self.inode(record, &known, old_root))
            .collect();
        // For young inodes number and birth time are sufficient now, but not later, so they are
        // opened now.
        let unsure = |inode: &&Inode| !inode.is_settled() && !inode.slot().is_full();
        let young: Vec<NodeId> = inodes.iter().filter(unsure).map(Inode::node).collect();
        self.fds.inodes().restore_all(inodes);
        let count = self.fds.inodes().len();
        if !self.past.inherited_fds {
            let open = handles.iter();
            let open = open.map(|record| NodeId(record.fields().node));
            self.fds
                .search_by_node(young.into_iter().chain(open).collect());
        }
        count
    }

    fn files(&self, records: Vec<HandleRecord>, restored: &mut Restored) {
        for record in records {
            let node = NodeId(record.fields().node);
            match self.file(&record) {
                Ok(Some(file)) => {
                    if let Some(inode) = self.fds.inodes().any(node)
                        && inode.kind() == FileType::RegularFile
                    {
                        self.fds.share_if_nameless(&inode, &file);
                    }
                    self.fds.files().handles().put(record, file);
                    restored.files += 1;
                }
                Ok(None) => {}
                Err(error) => {
                    log::warn!("can't reopen an open file of node {}: {error}", node.0);
                    restored.lost += 1;
                }
            }
        }
    }

    fn locks(&self, records: Vec<LockRecord>, restored: &mut Restored) {
        for record in records {
            match self.lock(&record) {
                Ok(file) => {
                    self.fds.files().record_locks().put(record, file);
                    restored.locks += 1;
                }
                Err(error) => {
                    let node = record.fields().node;
                    log::warn!("can't acquire the locks on node {node} again: {error}");
                    restored.lost += 1;
                }
            }
        }
    }

    fn inode(&self, record: InodeRecord, known: &HashSet<u64>, old_root: Key) -> Inode {
        let fd = if self.past.inherited_fds {
            inherited_fd(record.descriptor(), &record)
        } else {
            None
        };
        let root = self.fds.inodes().root_key();
        if !self.past.inherited_fds
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
            Some(RefKind::Handle(
                self.fds.reopen_policy().mount(record.mount())?,
            ))
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
        self.fds.inodes().settle_by_record(&inode);
        inode
    }

    /// The inode of another record, which names it by its node id.
    fn inode_of(&self, node: u64) -> Result<Arc<Inode>> {
        let inode = self.fds.inodes().any(NodeId(node));
        inode.ok_or(Errno::STALE)
    }

    /// The file of a handle's record. Returns `None` if its OPEN will be served again.
    fn file(&self, record: &HandleRecord) -> Result<Option<File>> {
        let fields = record.fields();
        let inode = self.inode_of(fields.node)?;
        let inherited = if self.past.inherited_fds {
            inherited_fd(Some(fields.fd), inode.record())
        } else {
            None
        };
        if self.in_flight.contains(&record.opened_by()) {
            return Ok(None);
        }
        let flags = OFlags::from_bits_retain(fields.flags).difference(OFlags::TRUNC);
        let (fd, reopened) = match inherited {
            Some(fd) => (fd, false),
            None if fields.directory => (self.fds.open_directory(&inode)?, true),
            None if inode.kind() == FileType::RegularFile => {
                (self.fds.reopen(&inode, flags)?, true)
            }
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

    fn lock(&self, record: &LockRecord) -> Result<File> {
        let fields = record.fields();
        let inode = self.inode_of(fields.node)?;
        if self.past.inherited_fds
            && let Some(fd) = inherited_fd(Some(fields.fd), inode.record())
        {
            return Ok(File::from_fd(fd));
        }
        let fd = self.fds.open_to_lock(&inode)?;
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
}
