//! Requests that a process has begun which is no more: done once, as the guest sees it.
//!
//! After a crash what was in flight is served again. Most requests can be done twice, and those that
//! count (lookups, handles) are told apart by the numbers in the state table. The others say
//! beforehand what they intend, where that outlives the process ([`Transport::intend`]): enough to tell
//! afterwards, by what is there now, whether they took effect. The invariant: an operation that took
//! effect is answered with what happened, and not done again.

use std::ffi::CStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::Session;
use crate::fs::{Entry, FileSystem, NodeId, Replay, Result, Timestamp};
use crate::fuse::Transport;
use crate::fuse::abi::{Guard, ReplayClass};
use crate::fuse::reply::{Answer, entry_out, open_out};
use crate::fuse::request::{Operation, Request};
use crate::fuse::transport::RecordedIntent;
use crate::io::File;

/// How far the clock that file systems stamp with may be behind.
const BEHIND: Duration = Duration::from_millis(20);

/// An intent's first word: it was said.
pub(super) const SAID: u64 = 1;

/// Now, in nanoseconds since 1970, as an intent has it.
fn stamp() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let since = since.unwrap_or_default().saturating_sub(BEHIND);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Whether the previous process has completed this removal or rename.
fn is_completed(replay: &dyn Replay, request: &Request<'_>) -> bool {
    let Some(number) = replay.recorded_inode(request.unique) else {
        return false;
    };
    match request.operation {
        Operation::Rename { from, to, .. } => replay.was_renamed((request.node, from), to, number),
        Operation::Unlink { name } | Operation::Rmdir { name } => {
            replay.was_removed(request.node, name, number)
        }
        _ => false,
    }
}

/// The name of a new inode.
fn new_name<'a>(operation: &Operation<'a>) -> Option<&'a CStr> {
    match *operation {
        Operation::Mkdir { name, .. }
        | Operation::Mknod { name, .. }
        | Operation::Symlink { name, .. }
        | Operation::Create { name, .. } => Some(name),
        _ => None,
    }
}

impl<F: FileSystem + ?Sized> Session<F> {
    /// Records what `request` intends, if serving it twice differs from serving it once, and if it is
    /// going to take effect at all.
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
            // What these go by is recorded where they take effect.
            (
                Guard::Removal | Guard::Rename | Guard::Release | Guard::Forget | Guard::Append,
                _,
            ) => false,
        };
        if takes_effect {
            transport.record_intent([SAID, stamp(), 0, 0]);
        }
    }

    /// Serves a request that the previous process has begun, and may have completed; `intent` is what
    /// that had recorded.
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
        // The error that a request is answered with which the previous process has completed.
        let completed = match guard {
            Guard::Removal | Guard::Rename => {
                return if is_completed(replay, request) {
                    Ok(Answer::Done)
                } else {
                    self.metadata(request, room)
                };
            }
            Guard::NewInode => {
                let is_known = |name| replay.is_known(request.node, name);
                let known = new_name(&request.operation).is_some_and(is_known);
                return match (self.metadata(request, room), new_name(&request.operation)) {
                    // What the guest knows was not made by a request that it has no answer to.
                    (Err(Errno::EXIST), Some(name)) if intent[0] == SAID && !known => {
                        self.made(request, name, intent, Errno::EXIST)
                    }
                    (answer, _) => answer,
                };
            }
            Guard::NewLink => {
                return match self.metadata(request, room) {
                    Err(Errno::EXIST) if intent[0] == SAID => self.linked(request),
                    answer => answer,
                };
            }
            Guard::NewXattr if intent[0] == SAID => Errno::EXIST,
            Guard::XattrRemoval if intent[0] == SAID => Errno::NODATA,
            Guard::NewXattr | Guard::XattrRemoval => return self.metadata(request, room),
            Guard::Release => Errno::BADF,
            // Not metadata: see `forget_again` and `append_again`.
            Guard::Forget | Guard::Append => return Err(Errno::NOSYS),
        };
        match self.metadata(request, room) {
            Err(errno) if errno == completed => Ok(Answer::Done),
            answer => answer,
        }
    }

    /// The answer to a LINK whose name is there, if it leads to the inode; else that it is there.
    fn linked(&self, request: &Request<'_>) -> Result<Answer> {
        let Operation::Link { node: old, name } = request.operation else {
            return Err(Errno::EXIST);
        };
        let entry = self.fs.lookup(&request.caller, request.node, name)?;
        if entry.node == old {
            return Ok(Answer::Entry(entry_out(&entry)));
        }
        self.fs.forget(entry.node, 1);
        Err(Errno::EXIST)
    }

    /// The answer to who makes `name`, if the process before made it; else the error that it is there.
    fn made(
        &self,
        request: &Request<'_>,
        name: &CStr,
        intent: RecordedIntent,
        errno: Errno,
    ) -> Result<Answer> {
        let entry = self.made_entry(request, name, intent, errno)?;
        let Operation::Create { flags, .. } = request.operation else {
            return Ok(Answer::Entry(entry_out(&entry)));
        };
        match self.fs.open(&request.caller, entry.node, flags & !NEW) {
            Ok(opened) => Ok(Answer::Created(entry_out(&entry), open_out(&opened))),
            Err(errno) => {
                self.fs.forget(entry.node, 1);
                Err(errno)
            }
        }
    }

    /// The entry of `name`, if the process before made it; else the error that it is there.
    fn made_entry(
        &self,
        request: &Request<'_>,
        name: &CStr,
        intent: RecordedIntent,
        errno: Errno,
    ) -> Result<Entry> {
        let [SAID, since, ..] = intent else {
            return Err(errno);
        };
        let entry = self.fs.lookup(&request.caller, request.node, name)?;
        let young = match self.fs.statx(entry.node, None) {
            Ok((attributes, birth, _)) => {
                nanoseconds(birth.unwrap_or(attributes.changed)) >= i128::from(since)
            }
            Err(_) => false,
        };
        let of_kind = entry.attributes.mode & libc::S_IFMT;
        let kind = match request.operation {
            Operation::Mkdir { .. } => libc::S_IFDIR,
            Operation::Symlink { .. } => libc::S_IFLNK,
            Operation::Mknod { new, .. } if new.mode & libc::S_IFMT != 0 => new.mode & libc::S_IFMT,
            _ => libc::S_IFREG,
        };
        if young && of_kind == kind {
            return Ok(entry);
        }
        self.fs.forget(entry.node, 1);
        Err(errno)
    }

    /// FORGET, by a request that a process before this one may have done.
    pub(super) fn replay_forget(&self, unique: u64, node: NodeId, count: u64) {
        let replay = self.fs.replay();
        if !replay.is_some_and(|replay| replay.was_forgotten(node, unique)) {
            self.fs.forget(node, count);
        }
    }
}

/// Flags of `open(2)` that make, or empty, a file: `O_EXCL` and `O_TRUNC`.
const NEW: u32 = (libc::O_EXCL | libc::O_TRUNC).cast_unsigned();

fn nanoseconds(at: Timestamp) -> i128 {
    i128::from(at.seconds)
        .saturating_mul(1_000_000_000)
        .saturating_add(i128::from(at.nanoseconds))
}

/// Where an append begins. Says so; or, if a process before this one has begun it, answers where that
/// began: all of it is to be written there once more, as part of it may be.
pub(super) fn replay_append<E: Transport>(transport: &mut E, file: &File) -> Option<u64> {
    if let Some([SAID, before, ..]) = transport.previous_attempt() {
        return Some(before);
    }
    let end = rustix::fs::fstat(file).ok()?.st_size;
    transport.record_intent([SAID, u64::try_from(end).ok()?, 0, 0]);
    None
}
