//! Locks on files: record locks of an open file description, and locks of the whole file.
//!
//! A lock that has to be waited for is waited for by a thread of its own, in the host's kernel:
//! only that knows when a lock held by another process of the host is given up, and it keeps
//! the order of those who wait. Two mechanisms, one for locks held through this server and one
//! for the others', would have to agree on that order; polling costs while nothing happens. A
//! lock is rarely waited for, so a thread with a small stack is cheap enough; how many there
//! may be is the caller's to say.
//!
//! The invariant: a wait ends when it is cancelled, whether the signal comes before, in or
//! after the system call. A signal is lost that comes before it, so it is sent until the thread
//! has answered.

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

/// Stack of a thread that waits in one system call.
const STACK: usize = 64 * 1024;
/// How long a thread that was told to stop waiting may take before it is told again.
const AGAIN: Duration = Duration::from_millis(1);

/// The last byte there can be; a lock that reaches there reaches to the end of the file.
const LAST: u64 = i64::MAX.cast_unsigned();

/// What a lock is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Shared with others of its kind.
    Shared,
    /// For one alone.
    Exclusive,
    /// None: what was held is given up.
    Unlock,
}

/// A lock on a part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordLock {
    /// What it is for.
    pub kind: LockKind,
    /// The first byte.
    pub start: u64,
    /// The last byte, at most 2⁶³ − 1, which is the end of the file wherever that is.
    pub end: u64,
}

/// A lock. The two sorts know nothing of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// On a part, as `fcntl(F_OFD_SETLK)`.
    Record(RecordLock),
    /// On the whole file, as `flock(2)`.
    Whole(LockKind),
}

impl File {
    /// Takes a lock, or gives it up, at once.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if another lock is in the way, else those of `fcntl(2)` and `flock(2)`.
    pub fn try_lock(&self, lock: Lock) -> io::Result<()> {
        Ok(set(self, lock, false)?)
    }

    /// A lock that is in the way of `lock`, if there is one.
    ///
    /// # Errors
    ///
    /// Those of `fcntl(F_OFD_GETLK)`.
    pub fn lock_in_the_way(&self, lock: RecordLock) -> io::Result<Option<RecordLock>> {
        let found = sys::lock::record(self, sys::lock::Act::Test, to_host(lock)?)?;
        let kind = match found.kind {
            libc::F_RDLCK => LockKind::Shared,
            libc::F_WRLCK => LockKind::Exclusive,
            _ => return Ok(None),
        };
        let start = u64::try_from(found.start).unwrap_or_default();
        let end = match u64::try_from(found.len) {
            Ok(0) | Err(_) => LAST,
            Ok(len) => start.saturating_add(len - 1).min(LAST),
        };
        Ok(Some(RecordLock { kind, start, end }))
    }

    /// Takes a lock, waiting for it until `cancelled` ends. The future must be run to its end,
    /// or a thread waits on.
    ///
    /// # Errors
    ///
    /// What `cancelled` says if it ends first; `ENOLCK` if there is no thread to be had; as
    /// [`try_lock`](Self::try_lock) else.
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn lock(&self, lock: Lock, cancelled: impl Future<Output = Errno>) -> io::Result<()> {
        let waiter = Arc::new(Waiter::default());
        let (done, mut answer) = oneshot::channel();
        let (file, of_thread) = (self.clone(), Arc::clone(&waiter));
        let wait = move || {
            let result = of_thread.wait(&file, lock);
            // Not before the file is let go of, so that no lock outlives who asked for it.
            drop(file);
            // Who asks waits for this; see above.
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
        let why = match ended {
            Ok(result) => return Ok(result.unwrap_or(Err(Errno::IO))?),
            Err(why) => why,
        };
        loop {
            waiter.cancel();
            match tokio::time::timeout(AGAIN, &mut answer).await {
                Ok(Ok(Err(Errno::INTR))) => return Err(why.into()),
                // It was given after all, or failed by itself.
                Ok(result) => return Ok(result.unwrap_or(Err(Errno::IO))?),
                Err(_not_yet) => {}
            }
        }
    }
}

/// A thread that waits.
#[derive(Debug, Default)]
struct Waiter {
    /// Set before the signal is sent. Orders nothing else: `Relaxed`.
    cancelled: AtomicBool,
    /// The thread, as long as it is alive for certain.
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
                // Somebody else's signal, unless it is ours.
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
        LAST => 0,
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
    fn a_lock_to_the_last_byte_reaches_to_the_end() {
        let lock = |start, end| RecordLock {
            kind: LockKind::Shared,
            start,
            end,
        };
        assert_eq!(to_host(lock(5, 5)).unwrap().len, 1);
        assert_eq!(to_host(lock(0, LAST - 1)).unwrap().len, i64::MAX);
        assert_eq!(to_host(lock(7, LAST)).unwrap().len, 0);
        assert_eq!(to_host(lock(7, 6)), Err(Errno::INVAL));
        assert_eq!(to_host(lock(u64::MAX, LAST)), Err(Errno::INVAL));
    }
}
