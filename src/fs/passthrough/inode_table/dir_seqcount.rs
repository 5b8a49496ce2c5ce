//! Sequence counts of directories: detect that a name changed after it was read.
//!
//! Names are read without a lock, so what was read may be outdated when it is recorded. The
//! invariant: a [`DirSeq`] counts as unchanged only if no change of its directory was in progress
//! when it was read, and none has started since.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::fs::NodeId;

/// Directories share counters. A collision only means that a name is not recorded.
const SHARDS: usize = 64;

/// The lower half of a counter is the number of changes in progress, the upper half that of changes
/// ever started.
const STARTED: u64 = 1 << 32;

/// Counts the changes of names in directories.
#[derive(Debug)]
pub(crate) struct DirSeqCounts(Box<[AtomicU64]>);

/// The value of a directory's counter at some moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DirSeq {
    directory: NodeId,
    count: u64,
}

/// A change in progress, until this is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct DirChange<'a> {
    seqcounts: &'a DirSeqCounts,
    directories: [NodeId; 2],
}

impl DirSeqCounts {
    pub(crate) fn new() -> Self {
        Self((0..SHARDS).map(|_| AtomicU64::new(0)).collect())
    }

    pub(crate) fn dir_seq(&self, directory: NodeId) -> DirSeq {
        DirSeq {
            directory,
            // Pairs with `begin`: what is read after this load is not older.
            count: self.of(directory).load(Ordering::SeqCst),
        }
    }

    pub(crate) fn begin(&self, directories: [NodeId; 2]) -> DirChange<'_> {
        for directory in directories {
            self.of(directory).fetch_add(STARTED + 1, Ordering::SeqCst);
        }
        DirChange {
            seqcounts: self,
            directories,
        }
    }

    /// The number of changes ever started, in all directories.
    pub(crate) fn count(&self) -> u64 {
        let started = |counter: &AtomicU64| counter.load(Ordering::SeqCst) / STARTED;
        self.0.iter().map(started).sum()
    }

    fn of(&self, directory: NodeId) -> &AtomicU64 {
        let shard = directory.0 % SHARDS as u64;
        &self.0[usize::try_from(shard).unwrap_or_default()]
    }
}

impl DirSeq {
    /// Whether what was read after this count is still valid.
    pub(crate) fn is_unchanged(self, seqcounts: &DirSeqCounts) -> bool {
        self.count.is_multiple_of(STARTED)
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
    fn seqcount_changes_with_next_change_of_its_directory() {
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
    fn seqcount_read_during_change_is_never_valid() {
        let seqcounts = DirSeqCounts::new();
        let changing = seqcounts.begin([NodeId(7), NodeId(7)]);
        let dir_seq = seqcounts.dir_seq(NodeId(7));
        assert!(!dir_seq.is_unchanged(&seqcounts));
        drop(changing);
        assert!(!dir_seq.is_unchanged(&seqcounts));
    }
}
