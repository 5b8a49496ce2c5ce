//! Locks on files: record locks of an open file description, and locks on the whole file.
//!
//! A blocked lock is waited for by a thread of its own in the host's kernel. Only the kernel knows
//! when a lock held by another process of the host is released, and it keeps the order of the
//! waiters. Two mechanisms, one for locks held through this server and one for others, would have
//! to agree on that order, and polling costs while nothing happens. Waiting for locks is rare, so a
//! thread with a small stack is cheap enough; the caller limits their number.
//!
//! The invariant: a wait ends when it is cancelled, whether the signal arrives before, in or after
//! the system call. A signal that arrives before the call has no effect, so it is sent until the
//! thread has finished.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::thread;
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::thread::Pid;
use tokio::sync::oneshot;

use super::File;
use crate::sys;

/// Stack size of a thread that waits in one system call.
const STACK: usize = 64 * 1024;
/// How long to wait for a thread to stop before it is signalled again.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(1);

/// The last possible byte; a lock that includes it extends to the end of the file.
const LAST_BYTE: u64 = i64::MAX.cast_unsigned();

/// The kind of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// A shared lock.
    Shared,
    /// An exclusive lock.
    Exclusive,
    /// No lock: releases the current one.
    Unlock,
}

/// A lock on a part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordLock {
    /// Its kind.
    pub kind: LockKind,
    /// The first byte.
    pub start: u64,
    /// The last byte, at most 2⁶³ − 1, which means the end of the file wherever that is.
    pub end: u64,
}

/// A lock. The two kinds are independent of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// On a range of bytes, as `fcntl(F_OFD_SETLK)`.
    Record(RecordLock),
    /// On the whole file, as `flock(2)`.
    Whole(LockKind),
}

impl File {
    /// Acquires or releases a lock without waiting.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if another lock conflicts, else those of `fcntl(2)` and `flock(2)`.
    pub fn try_lock(&self, lock: Lock) -> io::Result<()> {
        Ok(set(self, lock, false)?)
    }

    /// A lock that conflicts with `lock`, if there is one.
    ///
    /// # Errors
    ///
    /// Those of `fcntl(F_OFD_GETLK)`.
    pub fn conflicting_lock(&self, lock: RecordLock) -> io::Result<Option<RecordLock>> {
        let found = sys::lock::record(self, sys::lock::Act::Test, to_host(lock)?)?;
        let kind = match found.kind {
            libc::F_RDLCK => LockKind::Shared,
            libc::F_WRLCK => LockKind::Exclusive,
            _ => return Ok(None),
        };
        let start = u64::try_from(found.start).unwrap_or_default();
        let end = match u64::try_from(found.len) {
            Ok(0) | Err(_) => LAST_BYTE,
            Ok(len) => start.saturating_add(len - 1).min(LAST_BYTE),
        };
        Ok(Some(RecordLock { kind, start, end }))
    }

    /// Acquires a lock, waiting for it until `cancelled` completes. The future must run to
    /// completion, or a thread keeps waiting.
    ///
    /// # Errors
    ///
    /// The errno of `cancelled` if it completes first; `ENOLCK` if no thread can be started;
    /// otherwise as [`try_lock`](Self::try_lock).
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn lock(&self, lock: Lock, cancelled: impl Future<Output = Errno>) -> io::Result<()> {
        let waiter = Arc::new(Waiter::default());
        let (done, mut answer) = oneshot::channel();
        let (file, thread_waiter) = (self.clone(), Arc::clone(&waiter));
        let wait = move || {
            let result = thread_waiter.wait(&file, lock);
            // Not before the file is dropped, so that no lock outlives its requester.
            drop(file);
            // The receiver waits for this; see above.
            let _ = done.send(result);
        };
        thread::Builder::new()
            .name("ringfsd-lock".to_owned())
            .stack_size(STACK)
            .spawn(wait)
            .map_err(|_no_thread| Errno::NOLCK)?;
        let mut cancelled = pin!(cancelled);
        let ended = poll_fn(|cx| {
            if let Poll::Ready(result) = pin!(&mut answer).poll(cx) {
                return Poll::Ready(Ok(result));
            }
            cancelled.as_mut().poll(cx).map(Err)
        })
        .await;
        let cancel_errno = match ended {
            Ok(result) => return Ok(result.unwrap_or(Err(Errno::IO))?),
            Err(cancel_errno) => cancel_errno,
        };
        loop {
            waiter.cancel();
            match tokio::time::timeout(SIGNAL_INTERVAL, &mut answer).await {
                Ok(Ok(Err(Errno::INTR))) => return Err(cancel_errno.into()),
                // The lock was acquired after all, or failed by itself.
                Ok(result) => return Ok(result.unwrap_or(Err(Errno::IO))?),
                Err(_not_yet) => {}
            }
        }
    }
}

/// A waiting thread.
#[derive(Debug, Default)]
struct Waiter {
    /// Set before the signal is sent. Orders nothing else: `Relaxed`.
    cancelled: AtomicBool,
    /// The thread, while it is certainly alive.
    thread: Mutex<Option<Pid>>,
}

impl Waiter {
    fn wait(&self, file: &File, lock: Lock) -> Result<(), Errno> {
        sys::lock::be_interruptible()?;
        self.set_thread(Some(rustix::thread::gettid()));
        let result = loop {
            if self.cancelled.load(Ordering::Relaxed) {
                break Err(Errno::INTR);
            }
            match set(file, lock, true) {
                // Another signal, unless it is ours: check again.
                Err(Errno::INTR) => {}
                result => break result,
            }
        };
        self.set_thread(None);
        result
    }

    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = *thread
            && let Err(error) = sys::lock::interrupt(thread)
        {
            log::debug!("ending the wait for a lock: {error}");
        }
    }

    fn set_thread(&self, thread: Option<Pid>) {
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = thread;
    }
}

fn set(file: &File, lock: Lock, wait: bool) -> Result<(), Errno> {
    match lock {
        Lock::Record(record) => {
            let act = if wait {
                sys::lock::Act::SetWait
            } else {
                sys::lock::Act::Set
            };
            sys::lock::record(file, act, to_host(record)?).map(|_| ())
        }
        Lock::Whole(kind) => rustix::fs::flock(
            file,
            match (kind, wait) {
                (LockKind::Shared, true) => FlockOperation::LockShared,
                (LockKind::Shared, false) => FlockOperation::NonBlockingLockShared,
                (LockKind::Exclusive, true) => FlockOperation::LockExclusive,
                (LockKind::Exclusive, false) => FlockOperation::NonBlockingLockExclusive,
                (LockKind::Unlock, _) => FlockOperation::Unlock,
            },
        ),
    }
}

fn to_host(lock: RecordLock) -> Result<sys::lock::Record, Errno> {
    let signed = |offset: u64| i64::try_from(offset).or(Err(Errno::INVAL));
    let len = match lock.end {
        LAST_BYTE => 0,
        end => end
            .checked_sub(lock.start)
            .and_then(|len| len.checked_add(1))
            .ok_or(Errno::INVAL)?,
    };
    Ok(sys::lock::Record {
        kind: match lock.kind {
            LockKind::Shared => libc::F_RDLCK,
            LockKind::Exclusive => libc::F_WRLCK,
            LockKind::Unlock => libc::F_UNLCK,
        },
        start: signed(lock.start)?,
        len: signed(len)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_to_last_byte_reaches_end_of_file() {
        let lock = |start, end| RecordLock {
            kind: LockKind::Shared,
            start,
            end,
        };
        assert_eq!(to_host(lock(5, 5)).unwrap().len, 1);
        assert_eq!(to_host(lock(0, LAST_BYTE - 1)).unwrap().len, i64::MAX);
        assert_eq!(to_host(lock(7, LAST_BYTE)).unwrap().len, 0);
        assert_eq!(to_host(lock(7, 6)), Err(Errno::INVAL));
        assert_eq!(to_host(lock(u64::MAX, LAST_BYTE)), Err(Errno::INVAL));
    }
}
