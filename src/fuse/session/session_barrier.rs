//! Requests go through a gate that closes where a session ends.
//!
//! INIT, DESTROY and a reset of the device empty the file system's tables. A request that another
//! thread is in the middle of would add to them afterwards what nobody gives back. So each request
//! is in the gate while it is served, and who ends a session closes it first, which waits until
//! all are out. What goes on later, by a future, adds nothing to the tables.
//!
//! Each thread has a way through of its own, as far as they go round, so that threads don't
//! contend for one word at each request. The invariant: while the gate is closed, nobody is in it.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// More than a session has threads, as a rule.
const SHARDS: usize = 8;

/// A cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard(RwLock<()>);

#[derive(Debug, Default)]
pub(super) struct SessionBarrier {
    shards: [Shard; SHARDS],
}

/// Shows that a thread is in the gate.
#[derive(Debug)]
pub(super) struct Inside<'a>(#[allow(dead_code, reason = "held")] RwLockReadGuard<'a, ()>);

/// Shows that nobody is.
#[derive(Debug)]
pub(super) struct Closed<'a>(
    #[allow(dead_code, reason = "held")] [RwLockWriteGuard<'a, ()>; SHARDS],
);

impl SessionBarrier {
    /// Goes in; waits while the gate is closed. Not to be called by a thread that is inside.
    pub(super) fn enter(&self) -> Inside<'_> {
        let way = self.shards.get(own_shard()).unwrap_or(&self.shards[0]);
        Inside(way.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until nobody is inside, and lets nobody in. Not to be called from inside.
    pub(super) fn close(&self) -> Closed<'_> {
        // Always in this order, so that two who close don't wait for each other.
        let shards = self.shards.each_ref();
        Closed(shards.map(|way| way.0.write().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// The calling thread's way.
fn own_shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: Cell<Option<usize>> = const { Cell::new(None) };
    }
    OWN.get().unwrap_or_else(|| {
        // Relaxed: only that numbers differ.
        let own = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
        OWN.set(Some(own));
        own
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn nobody_is_inside_while_the_gate_is_closed() {
        let barrier = SessionBarrier::default();
        let closed = AtomicBool::new(false);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let _inside = barrier.enter();
                        assert!(!closed.load(Ordering::SeqCst));
                        std::thread::yield_now();
                    }
                });
            }
            for _ in 0..50 {
                let _closed = barrier.close();
                closed.store(true, Ordering::SeqCst);
                std::thread::yield_now();
                closed.store(false, Ordering::SeqCst);
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
