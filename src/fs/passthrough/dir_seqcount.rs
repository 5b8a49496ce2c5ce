//! When names change: so that nobody goes by a name that he looked at too early.
//!
//! Names are looked at without a lock, and so what was seen may be outdated when it is written
//! down. The invariant: a [`DirSeq`] lasts only if no change in its directory was under way
//! when it began, and none has begun since.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::fs::NodeId;

/// Directories share counters; sharing one costs a name that is not written down.
const SHARDS: usize = 64;

/// Changes under way stand in the lower half of a counter, those that have begun in the upper.
const BEGUN: u64 = 1 << 32;

/// Counts the changes of names.
#[derive(Debug)]
pub(super) struct Changes(Box<[AtomicU64]>);

/// What was known of a directory's changes.
#[derive(Clone, Copy, Debug)]
pub(super) struct DirSeq {
    directory: NodeId,
    count: u64,
}

/// A change that is under way until this is dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct Changing<'a> {
    changes: &'a Changes,
    directories: [NodeId; 2],
}

impl Changes {
    pub(super) fn new() -> Self {
        Self((0..SHARDS).map(|_| AtomicU64::new(0)).collect())
    }

    pub(super) fn moment(&self, directory: NodeId) -> DirSeq {
        DirSeq {
            directory,
            // Pairs with `begin`: what is looked at after this is not older.
            count: self.of(directory).load(Ordering::SeqCst),
        }
    }

    pub(super) fn begin(&self, directories: [NodeId; 2]) -> Changing<'_> {
        for directory in directories {
            self.of(directory).fetch_add(BEGUN + 1, Ordering::SeqCst);
        }
        Changing {
            changes: self,
            directories,
        }
    }

    /// How many have begun in all directories.
    pub(super) fn count(&self) -> u64 {
        let begun = |counter: &AtomicU64| counter.load(Ordering::SeqCst) / BEGUN;
        self.0.iter().map(begun).sum()
    }

    fn of(&self, directory: NodeId) -> &AtomicU64 {
        let shard = directory.0 % SHARDS as u64;
        &self.0[usize::try_from(shard).unwrap_or_default()]
    }
}

impl DirSeq {
    /// Whether what was looked at since is still so.
    pub(super) fn lasts(self, changes: &Changes) -> bool {
        self.count.is_multiple_of(BEGUN)
            && changes.of(self.directory).load(Ordering::SeqCst) == self.count
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        for directory in self.directories {
            self.changes.of(directory).fetch_sub(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_ends_with_the_next_change_of_its_directory() {
        let changes = Changes::new();
        let (here, there) = (NodeId(7), NodeId(8));
        let moment = changes.moment(here);
        drop(changes.begin([there, there]));
        assert!(moment.lasts(&changes));
        drop(changes.begin([here, there]));
        assert!(!moment.lasts(&changes));
        assert_eq!(changes.count(), 4);
    }

    #[test]
    fn a_moment_within_a_change_never_lasts() {
        let changes = Changes::new();
        let changing = changes.begin([NodeId(7), NodeId(7)]);
        let moment = changes.moment(NodeId(7));
        assert!(!moment.lasts(&changes));
        drop(changing);
        assert!(!moment.lasts(&changes));
    }
}
