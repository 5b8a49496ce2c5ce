//! A barrier that keeps requests apart from the beginning and end of a session.
//!
//! INIT, DESTROY and a reset of the device empty the file system's tables. A request that another
//! thread is serving at that moment would then add entries that the guest never releases. So each
//! request is inside the barrier while it is served, and whoever ends a session closes the barrier
//! first, which waits until all requests have left. A future that continues later adds nothing to
//! the tables.
//!
//! Each thread has a shard of its own, as far as there are enough, so threads don't contend for one
//! word on each request. The invariant: while the barrier is closed, no request is inside.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Usually more than a session has threads.
const SHARDS: usize = 8;

/// A lock in a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard(RwLock<()>);

#[derive(Debug, Default)]
pub(super) struct SessionBarrier {
    shards: [Shard; SHARDS],
}

/// Proves that the thread is inside the barrier.
#[derive(Debug)]
pub(super) struct InsideBarrier<'a>(#[allow(dead_code, reason = "held")] RwLockReadGuard<'a, ()>);

/// Proves that no thread is inside the barrier.
#[derive(Debug)]
pub(super) struct ClosedBarrier<'a>(
    #[allow(dead_code, reason = "held")] [RwLockWriteGuard<'a, ()>; SHARDS],
);

impl SessionBarrier {
    /// Enters the barrier; waits while it is closed. A thread that is inside must not call this.
    pub(super) fn enter(&self) -> InsideBarrier<'_> {
        let shard = self.shards.get(own_shard()).unwrap_or(&self.shards[0]);
        InsideBarrier(shard.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until no thread is inside, and lets none in. A thread that is inside must not call
    /// this.
    pub(super) fn close(&self) -> ClosedBarrier<'_> {
        // Always in this order, so that two threads that close don't deadlock.
        let shards = self.shards.each_ref();
        ClosedBarrier(shards.map(|shard| shard.0.write().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// The index of the calling thread's shard.
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
    fn closed_barrier_has_no_thread_inside() {
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
