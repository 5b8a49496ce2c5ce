//! Requests that a process has begun which is no more: done once, as the guest sees it.
//!
//! After a crash what was in flight is served again. Most requests can be done twice, and those that
//! count (lookups, handles) are told apart by the numbers in the state table. The others say
//! beforehand what they intend, where that outlives the process ([`Exchange::intend`]): enough to tell
//! afterwards, by what is there now, whether they took effect. The invariant: an operation that took
//! effect is answered with what happened, and not done again.

use std::ffi::CStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::Session;
use crate::fs::{Entry, FileSystem, NodeId, Result, Timestamp};
use crate::fuse::Exchange;
use crate::fuse::exchange::Intent;
use crate::fuse::reply::{Answer, entry_out, open_out};
use crate::fuse::request::{Operation, Request};
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

/// What is made with a new name.
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
    /// Says what `request` intends, if it can't be done twice, and it is going to be done at all.
    pub(super) fn intend<E: Exchange>(&self, exchange: &mut E, request: &Request<'_>) {
        let (caller, node) = (&request.caller, request.node);
        let is_there = |name| self.fs.getxattr_len(caller, node, name).is_ok();
        let takes_effect = match request.operation {
            Operation::Link { name, .. } => self.fs.number_at(node, name) == Err(Errno::NOENT),
            Operation::Setxattr { name, flags, .. } => {
                flags.contains(XattrFlags::CREATE) && !is_there(name)
            }
            Operation::Removexattr { name } => is_there(name),
            ref operation => new_name(operation).is_some(),
        };
        if takes_effect {
            exchange.intend([SAID, stamp(), 0, 0]);
        }
    }

    /// Serves a request that a process before this one has begun, and may have done; `intent` is
    /// what it had said.
    pub(super) fn metadata_again(
        &self,
        request: &Request<'_>,
        intent: Intent,
        room: usize,
    ) -> Result<Answer> {
        let node = request.node;
        let done = match (self.fs.had_seen(request.unique), &request.operation) {
            (Some(number), Operation::Rename { from, to, .. }) => {
                self.fs.was_renamed((node, from), *to, number)
            }
            (Some(number), Operation::Unlink { name } | Operation::Rmdir { name }) => {
                self.fs.was_removed(node, name, number)
            }
            _ => false,
        };
        if done {
            return Ok(Answer::Done);
        }
        let known = new_name(&request.operation).is_some_and(|name| self.fs.is_known(node, name));
        let answer = self.metadata(request, room);
        let Err(errno) = answer else {
            return answer;
        };
        let said = intent[0] == SAID;
        match (&request.operation, errno) {
            (Operation::Release { .. } | Operation::Releasedir { .. }, Errno::BADF) => {
                Ok(Answer::Done)
            }
            (Operation::Removexattr { .. }, Errno::NODATA)
            | (Operation::Setxattr { .. }, Errno::EXIST)
                if said =>
            {
                Ok(Answer::Done)
            }
            (Operation::Link { node: old, name }, Errno::EXIST) if said => {
                let entry = self.fs.lookup(&request.caller, node, name)?;
                if entry.node == *old {
                    return Ok(Answer::Entry(entry_out(&entry)));
                }
                self.fs.forget(entry.node, 1);
                Err(errno)
            }
            // What the guest knows was not made by a request that it has no answer to.
            (operation, Errno::EXIST) if said && !known => match new_name(operation) {
                Some(name) => self.made(request, name, intent, errno),
                None => Err(errno),
            },
            _ => Err(errno),
        }
    }

    /// The answer to who makes `name`, if the process before made it; else the error that it is there.
    fn made(
        &self,
        request: &Request<'_>,
        name: &CStr,
        intent: Intent,
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
        intent: Intent,
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
    pub(super) fn forget_again(&self, unique: u64, node: NodeId, count: u64) {
        if !self.fs.was_forgotten(node, unique) {
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
pub(super) fn append_again<E: Exchange>(exchange: &mut E, file: &File) -> Option<u64> {
    if let Some([SAID, before, ..]) = exchange.begun() {
        return Some(before);
    }
    let end = rustix::fs::fstat(file).ok()?.st_size;
    exchange.intend([SAID, u64::try_from(end).ok()?, 0, 0]);
    None
}
