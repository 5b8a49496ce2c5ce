//! Requests that were refused with `ESTALE` so that the guest looks the path up again.
//!
//! After `ESTALE` Linux repeats a system call once, and looks up each name of the path again. If
//! the repeated request failed as well, the program would get the error. So the second request is
//! served. It names either an inode that the process has just looked up, which a host process has
//! replaced since, or the same inode again. In the second case the process doesn't use a path at
//! all (a working directory, `/proc/self/fd`, an `O_PATH` descriptor).
//!
//! The invariant: one refusal lets at most one request through, and only of the process that was
//! refused.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::fs::NodeId;

/// Processes share slots. If two processes with the same slot are refused at the same time, one may
/// get an error.
const SLOTS: usize = 256;

/// How many looked-up inodes are stored since a refusal: the last names of the longest path that
/// matters, twice, as a rename has two paths.
const FOUND: usize = 8;

/// How long a process may take to repeat its request.
const RETRY_WINDOW: Duration = Duration::from_secs(2);

#[derive(Debug)]
struct Refused {
    pid: u32,
    at: Instant,
    node: NodeId,
    found: [NodeId; FOUND],
    /// How many inodes it has looked up.
    count: usize,
}

#[derive(Debug, Default)]
struct Slot {
    /// The id of the refused process plus one; 0 for none. It lets other processes pass without the
    /// lock. It changes under the lock and orders nothing.
    pid: AtomicU64,
    /// In a box, as few processes are ever refused.
    refused: Mutex<Option<Box<Refused>>>,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Box<Refused>>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    fn is_of(&self, pid: u32) -> bool {
        self.pid.load(Ordering::Relaxed) == u64::from(pid) + 1
    }
}

/// The guest's processes that were refused recently.
#[derive(Debug)]
pub(crate) struct Retries(Box<[Slot]>);

impl Retries {
    pub(crate) fn new() -> Self {
        Self((0..SLOTS).map(|_| Slot::default()).collect())
    }

    fn slot(&self, pid: u32) -> &Slot {
        &self.0[usize::try_from(pid).unwrap_or_default() % SLOTS]
    }

    /// Records that a request of `pid` on `node` was refused.
    pub(crate) fn refuse(&self, pid: u32, node: NodeId) {
        let slot = self.slot(pid);
        let mut refused = slot.lock();
        *refused = Some(Box::new(Refused {
            pid,
            at: Instant::now(),
            node,
            found: [NodeId(0); FOUND],
            count: 0,
        }));
        slot.pid.store(u64::from(pid) + 1, Ordering::Relaxed);
    }

    /// Records that `pid` has looked up `node`.
    #[inline]
    pub(crate) fn found(&self, pid: u32, node: NodeId) {
        let slot = self.slot(pid);
        if slot.is_of(pid)
            && let Some(refused) = &mut *slot.lock()
            && refused.pid == pid
        {
            refused.found[refused.count % FOUND] = node;
            refused.count += 1;
        }
    }

    /// Records that a request of `pid` passed the check.
    #[inline]
    pub(crate) fn served(&self, pid: u32) {
        if self.slot(pid).is_of(pid) {
            let _ = self.take(pid);
        }
    }

    /// Whether a request of `pid` on `node` repeats a refused one without having looked up anything
    /// since, so it uses no path.
    pub(crate) fn is_repeated_without_path(&self, pid: u32, node: NodeId) -> bool {
        self.take(pid).is_some_and(|refused| {
            refused.node == node && refused.count == 0 && refused.at.elapsed() < RETRY_WINDOW
        })
    }

    /// Whether a request of `pid` on `nodes` repeats a refused one.
    pub(crate) fn is_repeated(&self, pid: u32, mut nodes: impl Iterator<Item = NodeId>) -> bool {
        self.take(pid).is_some_and(|refused| {
            let found = &refused.found[..refused.count.min(FOUND)];
            let is_known = |node| refused.node == node || found.contains(&node);
            refused.at.elapsed() < RETRY_WINDOW && nodes.all(is_known)
        })
    }

    fn take(&self, pid: u32) -> Option<Box<Refused>> {
        let slot = self.slot(pid);
        let mut refused = slot.lock();
        let own = refused.take_if(|refused| refused.pid == pid)?;
        slot.pid.store(0, Ordering::Relaxed);
        Some(own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: NodeId = NodeId(7);
    const OTHER: NodeId = NodeId(8);

    fn is_repeated(retries: &Retries, pid: u32, node: NodeId) -> bool {
        retries.is_repeated(pid, [node].into_iter())
    }

    #[test]
    fn refused_process_is_let_through_once() {
        let retries = Retries::new();
        assert!(!is_repeated(&retries, 1, ONE));
        retries.refuse(1, ONE);
        assert!(!is_repeated(&retries, 2, ONE));
        assert!(is_repeated(&retries, 1, ONE));
        assert!(!is_repeated(&retries, 1, ONE));
    }

    #[test]
    fn refused_process_is_let_through_to_what_it_looked_up_since() {
        let retries = Retries::new();
        retries.found(1, OTHER);
        retries.refuse(1, ONE);
        assert!(!is_repeated(&retries, 1, OTHER));
        retries.refuse(1, ONE);
        retries.found(2, OTHER);
        assert!(!is_repeated(&retries, 1, OTHER));
        retries.refuse(1, ONE);
        for node in 100..200 {
            retries.found(1, NodeId(node));
        }
        retries.found(1, OTHER);
        assert!(is_repeated(&retries, 1, OTHER));
    }

    #[test]
    fn served_process_is_refused_again() {
        let retries = Retries::new();
        retries.refuse(1, ONE);
        retries.served(2);
        retries.served(1);
        assert!(!is_repeated(&retries, 1, ONE));
    }

    #[test]
    fn processes_that_share_a_slot_are_told_apart() {
        let retries = Retries::new();
        let other = 1 + u32::try_from(SLOTS).unwrap();
        retries.refuse(1, ONE);
        assert!(!is_repeated(&retries, other, ONE));
        retries.served(other);
        assert!(is_repeated(&retries, 1, ONE));
        retries.refuse(1, ONE);
        retries.refuse(other, ONE);
        assert!(!is_repeated(&retries, 1, ONE));
        assert!(is_repeated(&retries, other, ONE));
    }
}
