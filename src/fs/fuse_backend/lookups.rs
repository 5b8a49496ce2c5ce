//! How often the guest has looked up each node.
//!
//! The invariant: no more lookups are taken away from a node than were counted, whatever the guest
//! forgets.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

/// Lookups that the guest holds, by the file system's own number of the node.
#[derive(Debug, Default)]
pub(super) struct Lookups {
    counts: Mutex<FxHashMap<u64, u64>>,
}

impl Lookups {
    /// Counts one lookup of `inode`.
    pub(super) fn add(&self, inode: u64) {
        *self.counts().entry(inode).or_default() += 1;
    }

    /// Takes up to `count` lookups of `inode` away; returns how many there were.
    pub(super) fn take(&self, inode: u64, count: u64) -> u64 {
        let mut counts = self.counts();
        let Some(held) = counts.get_mut(&inode) else {
            return 0;
        };
        let taken = count.min(*held);
        *held -= taken;
        if *held == 0 {
            counts.remove(&inode);
        }
        taken
    }

    /// Takes all lookups of all nodes away.
    pub(super) fn take_all(&self) -> Vec<(u64, u64)> {
        self.counts().drain().collect()
    }

    /// The sum of all counts.
    pub(super) fn total(&self) -> u64 {
        self.counts().values().sum()
    }

    fn counts(&self) -> MutexGuard<'_, FxHashMap<u64, u64>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_taken_than_was_counted() {
        let lookups = Lookups::default();
        (0..3).for_each(|_| lookups.add(7));
        lookups.add(8);
        assert_eq!((lookups.take(7, 1), lookups.take(7, u64::MAX)), (1, 2));
        assert_eq!((lookups.take(7, 1), lookups.take(9, 1)), (0, 0));
        assert_eq!((lookups.total(), lookups.take_all()), (1, vec![(8, 1)]));
    }
}
