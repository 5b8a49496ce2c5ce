//! Replays requests that a previous server process left unanswered, so that the guest sees each
//! executed once.
//!
//! After a crash the requests in flight are served again. Most can be repeated. Those that change
//! counts (lookups, handles) are told apart by the request numbers in the state table. For the
//! others an intent is recorded before they take effect, where it outlives the process
//! ([`Transport::record_intent`]): enough to tell from the present state of the file system whether
//! they took effect. The invariant: an operation that took effect is answered with its result, and
//! not executed again.

use std::ffi::CStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::Session;
use crate::fs::{Entry, FileSystem, NodeId, Replay, Result, Timestamp};
use crate::fuse::Transport;
use crate::fuse::abi::{Guard, ReplayClass};
use crate::fuse::reply::{Answer, entry_out};
use crate::fuse::request::{Operation, Request};
use crate::fuse::transport::RecordedIntent;
use crate::io::File;

/// How far the clock of file system timestamps may lag behind.
const TIMESTAMP_LAG: Duration = Duration::from_millis(20);

/// First word of an intent: an intent was recorded.
pub(super) const RECORDED: u64 = 1;

/// The current time in nanoseconds since 1970, as an intent records it.
fn intent_timestamp() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let since = since.unwrap_or_default().saturating_sub(TIMESTAMP_LAG);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// What an operation changes of a directory, as far as a replay has to recognize it.
enum NameChange<'a> {
    /// A name of a new inode, whose type is `kind` (`S_IFMT`).
    NewInode { name: &'a CStr, kind: u32 },
    /// A name is gone.
    Removal { name: &'a CStr },
    /// An inode has a new name instead of the old one.
    Rename {
        from: &'a CStr,
        to: (NodeId, &'a CStr),
    },
    /// Nothing, or a replay doesn't need it.
    None,
}

impl<'a> NameChange<'a> {
    fn of(operation: &Operation<'a>) -> Self {
        match *operation {
            Operation::Mkdir { name, .. } => Self::NewInode {
                name,
                kind: libc::S_IFDIR,
            },
            Operation::Symlink { name, .. } => Self::NewInode {
                name,
                kind: libc::S_IFLNK,
            },
            Operation::Mknod { name, new } => Self::NewInode {
                name,
                kind: match new.mode & libc::S_IFMT {
                    0 => libc::S_IFREG,
                    kind => kind,
                },
            },
            Operation::Create { name, .. } => Self::NewInode {
                name,
                kind: libc::S_IFREG,
            },
            Operation::Unlink { name } | Operation::Rmdir { name } => Self::Removal { name },
            Operation::Rename { from, to, .. } => Self::Rename { from, to },
            Operation::Init(_)
            | Operation::Destroy
            | Operation::Interrupt { .. }
            | Operation::Lookup { .. }
            | Operation::LookupSelf
            | Operation::LookupParent
            | Operation::Forget { .. }
            | Operation::BatchForget(_)
            | Operation::Getattr { .. }
            | Operation::Statx { .. }
            | Operation::Setattr { .. }
            | Operation::Readlink
            | Operation::Link { .. }
            | Operation::Open { .. }
            | Operation::Opendir { .. }
            | Operation::Tmpfile { .. }
            | Operation::Syncfs
            | Operation::Ioctl { .. }
            | Operation::Read(_)
            | Operation::Write { .. }
            | Operation::Readdir { .. }
            | Operation::Statfs
            | Operation::Release { .. }
            | Operation::Releasedir { .. }
            | Operation::Flush { .. }
            | Operation::Getlk { .. }
            | Operation::Setlk(_)
            | Operation::Fsync { .. }
            | Operation::Setxattr { .. }
            | Operation::Getxattr { .. }
            | Operation::Listxattr { .. }
            | Operation::Removexattr { .. }
            | Operation::Access { .. }
            | Operation::Fallocate { .. }
            | Operation::Lseek { .. }
            | Operation::CopyFileRange(_)
            | Operation::Setupmapping(_)
            | Operation::Removemapping(_)
            | Operation::Unserved => Self::None,
        }
    }
}

/// Whether the previous process has completed this removal or rename.
fn is_completed(replay: &dyn Replay, request: &Request<'_>) -> bool {
    let Some(number) = replay.recorded_inode(request.unique) else {
        return false;
    };
    match NameChange::of(&request.operation) {
        NameChange::Rename { from, to } => replay.was_renamed((request.node, from), to, number),
        NameChange::Removal { name } => replay.was_removed(request.node, name, number),
        NameChange::NewInode { .. } | NameChange::None => false,
    }
}

impl<F: FileSystem + ?Sized> Session<F> {
    /// Records the intent of `request`, if repeating it makes a difference and if it is going to
    /// take effect at all.
    pub(super) fn record_intent<E: Transport>(&self, transport: &mut E, request: &Request<'_>) {
        let (ReplayClass::Guarded(guard), Some(replay)) = (request.row.replay, self.fs.replay())
        else {
            return;
        };
        let (caller, node) = (&request.caller, request.node);
        let is_there = |name| self.fs.getxattr_len(caller, node, name).is_ok();
        let takes_effect = match (guard, request.operation) {
            (Guard::NewInode, _) => true,
            (Guard::NewLink, Operation::Link { name, .. }) => {
                replay.inode_at(node, name) == Err(Errno::NOENT)
            }
            (Guard::NewXattr, Operation::Setxattr { name, flags, .. }) => {
                flags.contains(XattrFlags::CREATE) && !is_there(name)
            }
            (Guard::XattrRemoval, Operation::Removexattr { name }) => is_there(name),
            (Guard::NewLink | Guard::NewXattr | Guard::XattrRemoval, _) => false,
            // The information that these depend on is recorded where they take effect.
            (
                Guard::Removal | Guard::Rename | Guard::Release | Guard::Forget | Guard::Append,
                _,
            ) => false,
        };
        if takes_effect {
            transport.record_intent([RECORDED, intent_timestamp(), 0, 0]);
        }
    }

    /// Serves a request that the previous process began and may have completed; `intent` is what
    /// that process recorded.
    pub(super) fn replay_metadata(
        &self,
        request: &Request<'_>,
        intent: RecordedIntent,
        room: usize,
    ) -> Result<Answer> {
        let (ReplayClass::Guarded(guard), Some(replay)) = (request.row.replay, self.fs.replay())
        else {
            return self.metadata(request, room);
        };
        // The error that the request fails with if the previous process completed it.
        let completed = match guard {
            Guard::Removal | Guard::Rename => {
                return if is_completed(replay, request) {
                    Ok(Answer::Done)
                } else {
                    self.metadata(request, room)
                };
            }
            Guard::NewInode => {
                let NameChange::NewInode { name, kind } = NameChange::of(&request.operation) else {
                    return self.metadata(request, room);
                };
                let known = replay.is_known(request.node, name);
                return match self.metadata(request, room) {
                    // An inode that the guest knows wasn't created by a request that it has no
                    // reply to.
                    Err(Errno::EXIST) if intent[0] == RECORDED && !known => {
                        self.created(request, (name, kind), intent, Errno::EXIST)
                    }
                    answer => answer,
                };
            }
            Guard::NewLink => {
                return match self.metadata(request, room) {
                    Err(Errno::EXIST) if intent[0] == RECORDED => self.replay_link(request),
                    answer => answer,
                };
            }
            Guard::NewXattr if intent[0] == RECORDED => Errno::EXIST,
            Guard::XattrRemoval if intent[0] == RECORDED => Errno::NODATA,
            Guard::NewXattr | Guard::XattrRemoval => return self.metadata(request, room),
            Guard::Release => Errno::BADF,
            // Not metadata: see `replay_forget` and `replay_append`.
            Guard::Forget | Guard::Append => return Err(Errno::NOSYS),
        };
        match self.metadata(request, room) {
            Err(errno) if errno == completed => Ok(Answer::Done),
            answer => answer,
        }
    }

    /// The reply to a LINK whose name exists: success if the name leads to the inode, else
    /// `EEXIST`.
    fn replay_link(&self, request: &Request<'_>) -> Result<Answer> {
        let Operation::Link { node: old, name } = request.operation else {
            return Err(Errno::EXIST);
        };
        let entry = self.fs.lookup(&request.caller, request.node, name)?;
        if entry.node == old {
            let dax = self.dax_marks().of_entry(&entry, name);
            return Ok(Answer::Entry(entry_out(&entry, dax)));
        }
        self.fs.forget(entry.node, 1);
        Err(Errno::EXIST)
    }

    /// The reply to a request that creates an inode of a type under a name, which exists: success if
    /// the previous process created it, else `errno`.
    fn created(
        &self,
        request: &Request<'_>,
        new: (&CStr, u32),
        intent: RecordedIntent,
        errno: Errno,
    ) -> Result<Answer> {
        let entry = self.created_entry(request, new, intent, errno)?;
        let Operation::Create { flags, .. } = request.operation else {
            let dax = self.dax_marks().of_entry(&entry, new.0);
            return Ok(Answer::Entry(entry_out(&entry, dax)));
        };
        match self
            .fs
            .open(&request.caller, entry.node, flags & !CREATION_FLAGS)
        {
            Ok(opened) => Ok(Answer::Created(
                entry_out(&entry, self.dax_marks().of_entry(&entry, new.0)),
                self.open_out(&opened),
            )),
            Err(errno) => {
                self.fs.forget(entry.node, 1);
                Err(errno)
            }
        }
    }

    /// The entry of `name`, if the previous process created it, else `errno`.
    fn created_entry(
        &self,
        request: &Request<'_>,
        (name, kind): (&CStr, u32),
        intent: RecordedIntent,
        errno: Errno,
    ) -> Result<Entry> {
        let [RECORDED, since, ..] = intent else {
            return Err(errno);
        };
        let entry = self.fs.lookup(&request.caller, request.node, name)?;
        let is_recent = match self.fs.statx(entry.node, None) {
            Ok((attributes, birth, _)) => {
                nanoseconds(birth.unwrap_or(attributes.changed)) >= i128::from(since)
            }
            Err(_) => false,
        };
        let entry_kind = entry.attributes.mode & libc::S_IFMT;
        if is_recent && entry_kind == kind {
            return Ok(entry);
        }
        self.fs.forget(entry.node, 1);
        Err(errno)
    }

    /// FORGET, in a request that the previous process may have completed.
    pub(super) fn replay_forget(&self, unique: u64, node: NodeId, count: u64) {
        let replay = self.fs.replay();
        if !replay.is_some_and(|replay| replay.was_forgotten(node, unique)) {
            self.fs.forget(node, count);
        }
    }
}

/// Flags of `open(2)` that apply only to creating the file, or empty it: `O_EXCL` and `O_TRUNC`.
const CREATION_FLAGS: u32 = (libc::O_EXCL | libc::O_TRUNC).cast_unsigned();

fn nanoseconds(at: Timestamp) -> i128 {
    i128::from(at.seconds)
        .saturating_mul(1_000_000_000)
        .saturating_add(i128::from(at.nanoseconds))
}

/// Records the offset where an append begins. If a previous process has recorded one, returns it:
/// the data must be written there again as a whole, because part of them may have been.
pub(super) fn replay_append<E: Transport>(transport: &mut E, file: &File) -> Option<u64> {
    if let Some([RECORDED, before, ..]) = transport.previous_attempt() {
        return Some(before);
    }
    let end = rustix::fs::fstat(file).ok()?.st_size;
    transport.record_intent([RECORDED, u64::try_from(end).ok()?, 0, 0]);
    None
}
