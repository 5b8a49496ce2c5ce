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
pub(super) struct DirSeqCounts(Box<[AtomicU64]>);

/// What was known of a directory's changes.
#[derive(Clone, Copy, Debug)]
pub(super) struct DirSeq {
    directory: NodeId,
    count: u64,
}

/// A change that is under way until this is dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct DirChange<'a> {
    seqcounts: &'a DirSeqCounts,
    directories: [NodeId; 2],
}

impl DirSeqCounts {
    pub(super) fn new() -> Self {
        Self((0..SHARDS).map(|_| AtomicU64::new(0)).collect())
    }

    pub(super) fn dir_seq(&self, directory: NodeId) -> DirSeq {
        DirSeq {
            directory,
            // Pairs with `begin`: what is looked at after this is not older.
            count: self.of(directory).load(Ordering::SeqCst),
        }
    }

    pub(super) fn begin(&self, directories: [NodeId; 2]) -> DirChange<'_> {
        for directory in directories {
            self.of(directory).fetch_add(BEGUN + 1, Ordering::SeqCst);
        }
        DirChange {
            seqcounts: self,
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
    pub(super) fn is_unchanged(self, seqcounts: &DirSeqCounts) -> bool {
        self.count.is_multiple_of(BEGUN)
            && seqcounts.of(self.directory).load(Ordering::SeqCst) == self.count
    }
}

impl Drop for DirChange<'_> {
    fn drop(&mut self) {
        for directory in self.directories {
            self.seqcounts.of(directory).fetch_sub(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_ends_with_the_next_change_of_its_directory() {
        let seqcounts = DirSeqCounts::new();
        let (here, there) = (NodeId(7), NodeId(8));
        let dir_seq = seqcounts.dir_seq(here);
        drop(seqcounts.begin([there, there]));
        assert!(dir_seq.is_unchanged(&seqcounts));
        drop(seqcounts.begin([here, there]));
        assert!(!dir_seq.is_unchanged(&seqcounts));
        assert_eq!(seqcounts.count(), 4);
    }

    #[test]
    fn a_moment_within_a_change_never_lasts() {
        let seqcounts = DirSeqCounts::new();
        let changing = seqcounts.begin([NodeId(7), NodeId(7)]);
        let dir_seq = seqcounts.dir_seq(NodeId(7));
        assert!(!dir_seq.is_unchanged(&seqcounts));
        drop(changing);
        assert!(!dir_seq.is_unchanged(&seqcounts));
    }
}
