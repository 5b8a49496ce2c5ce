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
use crate::fuse::reply::{Answer, entry_out};
use crate::fuse::request::{Operation, Request};
use crate::io::File;

/// How far the clock that file systems stamp with may be behind.
const BEHIND: Duration = Duration::from_millis(20);

/// An intent's first word: it was said.
const SAID: u64 = 1;

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
    /// Says what `request` intends, if it can't be done twice.
    pub(super) fn intend<E: Exchange>(&self, exchange: &mut E, request: &Request<'_>) {
        if new_name(&request.operation).is_some() {
            exchange.intend([SAID, stamp(), 0, 0]);
        }
    }

    /// Serves a request that a process before this one has begun, and may have done; `intent` is
    /// what it had said. `None` where it is to be served as any other.
    pub(super) fn metadata_again(
        &self,
        request: &Request<'_>,
        intent: Intent,
        room: usize,
    ) -> Result<Answer> {
        let done = |_gone| Ok(Answer::Done);
        let (caller, node) = (&request.caller, request.node);
        match request.operation {
            Operation::Rename { from, to, .. } if self.fs.was_renamed((node, from), to) => {
                return Ok(Answer::Done);
            }
            _ => {}
        }
        let answer = self.metadata(request, room);
        let Err(errno) = answer else {
            return answer;
        };
        match (&request.operation, errno) {
            (Operation::Unlink { .. } | Operation::Rmdir { .. }, Errno::NOENT)
            | (Operation::Release { .. } | Operation::Releasedir { .. }, Errno::BADF)
            | (Operation::Removexattr { .. }, Errno::NODATA) => done(errno),
            (Operation::Setxattr { name, value, flags }, Errno::EXIST)
                if flags.contains(XattrFlags::CREATE) =>
            {
                match self.fs.getxattr(caller, node, name, value.len()) {
                    Ok(there) if there == *value => done(errno),
                    _ => Err(errno),
                }
            }
            (Operation::Link { node: old, name }, Errno::EXIST) => {
                let entry = self.fs.lookup(caller, node, name)?;
                self.entry_if(entry.node == *old, &entry, errno)
            }
            (Operation::Create { name, flags, .. }, Errno::EXIST) => {
                let entry = self.made(request, name, intent, errno)?;
                let opened = self.fs.open(caller, entry.node, *flags & !NEW);
                match opened {
                    Ok(opened) => Ok(Answer::Created(
                        entry_out(&entry),
                        crate::fuse::reply::open_out(&opened),
                    )),
                    Err(errno) => {
                        self.fs.forget(entry.node, 1);
                        Err(errno)
                    }
                }
            }
            (operation, Errno::EXIST) => match new_name(operation) {
                Some(name) => self
                    .made(request, name, intent, errno)
                    .map(|entry| Answer::Entry(entry_out(&entry))),
                None => Err(errno),
            },
            _ => Err(errno),
        }
    }

    /// The entry of `name`, if the process before made it; else the error that it is there.
    fn made(
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

    fn entry_if(&self, same: bool, entry: &Entry, errno: Errno) -> Result<Answer> {
        if same {
            return Ok(Answer::Entry(entry_out(entry)));
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

/// An append of `len` bytes: says where the file ends, or answers how much of it is there already,
/// where a process before this one has begun it.
pub(super) fn appended<E: Exchange>(exchange: &mut E, file: &File, len: usize) -> Option<usize> {
    let end = rustix::fs::fstat(file).ok()?.st_size;
    let end = u64::try_from(end).ok()?;
    match exchange.begun() {
        Some([SAID, before, ..]) => {
            let more = end.checked_sub(before).filter(|more| *more != 0)?;
            Some(usize::try_from(more).unwrap_or(usize::MAX).min(len))
        }
        _ => {
            exchange.intend([SAID, end, 0, 0]);
            None
        }
    }
}
