//! Locks on open files that are no files of the host: the file system itself keeps them.
//!
//! A file system can't be asked to wait in a way that could be ended, so a request that waits is
//! tried again, ever more rarely. The invariant: no attempt is dropped half-way, so a lock that was
//! acquired is reported as such.

use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use tokio::time::timeout;

use super::blocking_locks::Wait;
use super::data::errno;
use super::{Outcome, Session};
use crate::fs::{FileObject, FileSystem, LockOwner, Result};
use crate::fuse::Transport;
use crate::fuse::abi::LkOut;
use crate::fuse::reply::{Answer, file_lock};
use crate::fuse::request::Locking;
use crate::io::{LockKind, RecordLock};

/// How long to wait before a lock is tried again: at first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(64));

impl<F: FileSystem + ?Sized> Session<F> {
    /// GETLK.
    pub(super) fn getlk_of_object<E: Transport>(
        self: &Arc<Self>,
        transport: E,
        unique: u64,
        object: Arc<dyn FileObject>,
        (owner, lock): (LockOwner, RecordLock),
    ) -> Outcome {
        let session = Arc::clone(self);
        self.defer(async move {
            let found = object.conflicting_lock(owner, lock).await;
            let unlocked = RecordLock {
                kind: LockKind::Unlock,
                ..lock
            };
            let answer = found.map(|found| {
                Answer::Lock(LkOut {
                    lk: file_lock(&found.unwrap_or(unlocked)),
                })
            });
            session.finish(transport, unique, answer.map_err(|error| errno(&error)));
        })
    }

    /// SETLK, SETLKW and `flock`.
    pub(super) fn setlk_of_object<E: Transport>(
        self: &Arc<Self>,
        mut transport: E,
        unique: u64,
        object: Arc<dyn FileObject>,
        locking: Locking,
    ) -> Outcome {
        let wait = if locking.wait {
            let limit = self.wait_limit(&mut transport);
            match self.blocking_locks.begin(unique, limit) {
                Ok(wait) => Some(wait),
                Err(errno) => return self.reply_now(transport, unique, Err(errno)),
            }
        } else {
            None
        };
        let session = Arc::clone(self);
        self.defer(async move {
            let result = acquire(&object, &locking, wait).await;
            // Before the reply, after which the guest may close the file.
            drop(object);
            session.finish(transport, unique, result.map(|()| Answer::Done));
        })
    }
}

/// Tries to acquire a lock, until that succeeds or `wait` ends.
async fn acquire(
    object: &Arc<dyn FileObject>,
    locking: &Locking,
    mut wait: Option<Wait>,
) -> Result<()> {
    let (mut pause, longest) = PAUSES;
    loop {
        let tried = Arc::clone(object).try_lock(locking.owner, locking.lock);
        let failed = match tried.await.map_err(|error| errno(&error)) {
            Ok(()) => return Ok(()),
            Err(failed) => failed,
        };
        let Some(wait) = wait.as_mut().filter(|_| failed == Errno::AGAIN) else {
            return Err(failed);
        };
        if let Ok(ended) = timeout(pause, wait.ended()).await {
            return Err(ended);
        }
        pause = pause.saturating_mul(2).min(longest);
    }
}
