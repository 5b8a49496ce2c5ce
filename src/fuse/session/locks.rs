//! GETLK, SETLK, SETLKW, and `flock`, which is sent as SETLK or SETLKW.
//!
//! A lock is tried at once. If it must be waited for, the wait is a future and blocks no other
//! request. The invariant: a lock is never held for an owner that was told that it is not.

use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use super::blocking_locks::NoWaits;
use super::data::errno;
use super::replay::RECORDED;
use super::{Outcome, Session};
use crate::fs::{FileSystem, Handle, HandleKind, LockOwner, NodeId, OpenFile, Result};
use crate::fuse::Transport;
use crate::fuse::abi::{InitFlags, LkOut};
use crate::fuse::reply::{Answer, file_lock};
use crate::fuse::request::{Locking, Operation, Request};
use crate::io::{File, Lock, LockKind, RecordLock};

impl<F: FileSystem + ?Sized> Session<F> {
    /// Ends all waits for the guest itself, and prevents new ones as long as the returned value
    /// exists. Used while a queue is stopped, so that the requests taken off it complete.
    pub fn end_waits(&self) -> NoWaits {
        NoWaits::new(&self.blocking_locks)
    }

    /// Serves GETLK, SETLK or SETLKW, if locks of this kind were negotiated.
    pub(super) fn lock<E: Transport>(
        self: &Arc<Self>,
        transport: E,
        request: &Request<'_>,
    ) -> Outcome {
        let of_whole_file = |locking: &Locking| matches!(locking.lock, Lock::Whole(_));
        let needed = match &request.operation {
            Operation::Setlk(locking) if of_whole_file(locking) => InitFlags::FLOCK_LOCKS,
            _ => InitFlags::POSIX_LOCKS,
        };
        if !self.has_agreed(needed) {
            return self.reply_now(transport, request.unique, Err(Errno::NOSYS));
        }
        let unique = request.unique;
        let answer = match request.operation {
            Operation::Setlk(locking) => match self.open_file(request.node, locking.handle) {
                Ok(OpenFile::Object(object)) => {
                    return self.setlk_of_object(transport, unique, object, locking);
                }
                Ok(OpenFile::Host(_)) => return self.setlk(transport, request, locking),
                Err(errno) => Err(errno),
            },
            Operation::Getlk {
                handle,
                owner,
                lock,
            } => match self.open_file(request.node, handle) {
                Ok(OpenFile::Object(object)) => {
                    return self.getlk_of_object(transport, unique, object, (owner, lock));
                }
                Ok(OpenFile::Host(open)) => self.getlk(request.node, &open, owner, lock),
                Err(errno) => Err(errno),
            },
            // The opcode table dispatches none of these to this method.
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
            | Operation::Symlink { .. }
            | Operation::Mknod { .. }
            | Operation::Mkdir { .. }
            | Operation::Unlink { .. }
            | Operation::Rmdir { .. }
            | Operation::Rename { .. }
            | Operation::Link { .. }
            | Operation::Open { .. }
            | Operation::Opendir { .. }
            | Operation::Create { .. }
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
            | Operation::Fsync { .. }
            | Operation::Setxattr { .. }
            | Operation::Getxattr { .. }
            | Operation::Listxattr { .. }
            | Operation::Removexattr { .. }
            | Operation::Access { .. }
            | Operation::Fallocate { .. }
            | Operation::Lseek { .. }
            | Operation::CopyFileRange(_)
            | Operation::Unserved => Err(Errno::NOSYS),
        };
        self.reply_now(transport, request.unique, answer)
    }

    fn open_file(&self, node: NodeId, handle: Handle) -> Result<OpenFile> {
        self.fs.file(node, handle, HandleKind::File)
    }

    /// GETLK. The process that holds the conflicting lock has no id in the guest, so the reply has
    /// pid 0.
    fn getlk(
        &self,
        node: NodeId,
        open: &File,
        owner: LockOwner,
        lock: RecordLock,
    ) -> Result<Answer> {
        let found = match self.fs.lock_file_if_any(node, owner) {
            Some(owner_file) => owner_file.conflicting_lock(lock),
            None => open.conflicting_lock(lock),
        };
        let found = found.map_err(|error| errno(&error))?;
        let unlocked = RecordLock {
            kind: LockKind::Unlock,
            ..lock
        };
        Ok(Answer::Lock(LkOut {
            lk: file_lock(&found.unwrap_or(unlocked)),
        }))
    }

    /// SETLK, SETLKW and `flock`.
    fn setlk<E: Transport>(
        self: &Arc<Self>,
        mut transport: E,
        request: &Request<'_>,
        locking: Locking,
    ) -> Outcome {
        let unique = request.unique;
        let waits = match self.lock_or_wait(request, &locking) {
            Ok(None) => return self.reply_now(transport, unique, Ok(Answer::Done)),
            Ok(Some(file)) => {
                let limit = self.wait_limit(&mut transport);
                self.blocking_locks
                    .begin(unique, limit)
                    .map(|wait| (file, wait))
            }
            Err(errno) => Err(errno),
        };
        let (file, mut wait) = match waits {
            Ok(registered) => registered,
            Err(errno) => return self.reply_now(transport, unique, Err(errno)),
        };
        let session = Arc::clone(self);
        let node = request.node;
        self.defer(async move {
            let result = file.lock(locking.lock, wait.ended()).await;
            if result.is_ok() {
                let Locking { handle, owner, .. } = locking;
                session.record_lock(node, handle, owner, locking.lock);
            }
            // Both before the reply, after which the guest may reuse the number and close the file.
            drop((wait, file));
            let answer = result.map(|()| Answer::Done).map_err(|error| errno(&error));
            session.finish(transport, unique, answer);
        })
    }

    fn record_lock(&self, node: NodeId, handle: Handle, owner: LockOwner, lock: Lock) {
        if let Some(replay) = self.fs.replay() {
            replay.record_lock(node, handle, owner, lock);
        }
    }

    /// How long a request may still wait, counted from when it began to wait in whichever process:
    /// a process that replays the request finds that time in the recorded intent.
    pub(super) fn wait_limit<E: Transport>(&self, transport: &mut E) -> Option<Duration> {
        let limit = self.options.lock_wait_limit;
        if limit.is_zero() {
            return None;
        }
        let now = since_boot();
        let began = match transport.previous_attempt() {
            Some([RECORDED, nanoseconds, ..]) => Duration::from_nanos(nanoseconds),
            _ => {
                let nanoseconds = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
                transport.record_intent([RECORDED, nanoseconds, 0, 0]);
                now
            }
        };
        Some(limit.saturating_sub(now.saturating_sub(began)))
    }

    /// Sets a lock at once, or returns the file to wait with.
    fn lock_or_wait(&self, request: &Request<'_>, locking: &Locking) -> Result<Option<Arc<File>>> {
        let (node, handle) = (request.node, locking.handle);
        let file = match locking.lock {
            Lock::Whole(_) => Arc::new(self.fs.file(node, handle, HandleKind::File)?.host()?),
            Lock::Record(RecordLock {
                kind: LockKind::Unlock,
                ..
            }) => match self.fs.lock_file_if_any(node, locking.owner) {
                Some(file) => file,
                // An owner without locks has none to release.
                None => return Ok(None),
            },
            Lock::Record(_) => self.fs.lock_file(node, handle, locking.owner)?,
        };
        match file.try_lock(locking.lock).map_err(|error| errno(&error)) {
            Ok(()) => {
                self.record_lock(node, handle, locking.owner, locking.lock);
                Ok(None)
            }
            Err(Errno::AGAIN) if locking.wait => Ok(Some(file)),
            Err(errno) => Err(errno),
        }
    }
}

/// A clock that all processes of the host share and that is never set.
fn since_boot() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default()
}
