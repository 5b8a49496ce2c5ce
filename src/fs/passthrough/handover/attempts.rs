//! What earlier server processes recorded about requests that are replayed.
//!
//! The invariant: lookups that an unfinished request counted are undone, as they will be counted
//! again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::fs::NodeId;
use crate::state::{InodeRecord, Table};

/// What earlier server processes recorded about unfinished requests.
#[derive(Debug, Default)]
pub(crate) struct PreviousAttempts {
    seen: HashMap<u64, u64>,
    forgotten: HashSet<(u64, NodeId)>,
}

impl PreviousAttempts {
    /// Reads how far unfinished requests got, and undoes the lookups that they counted, as they
    /// will be served again.
    pub(super) fn load(
        table: &Arc<Table>,
        inodes: &mut [InodeRecord],
        in_flight: &HashSet<u64>,
    ) -> Self {
        let mut attempts = Self::default();
        let by_node: HashMap<u64, usize> = (0..inodes.len())
            .map(|at| (inodes[at].node(), at))
            .collect();
        let record = |node: u64| by_node.get(&node).and_then(|at| inodes.get(*at));
        for mut done in table.take_journal_entries(|unique| in_flight.contains(&unique)) {
            let unique = done.unique;
            if done.seen != 0 {
                attempts.seen.insert(unique, done.seen);
            }
            let mut forgotten = std::mem::take(&mut done.dropped);
            if let Some((node, back)) = done.in_doubt
                && let Some(record) = record(node)
                && record.was_counted_by(unique, !back)
            {
                if back {
                    forgotten.push(node);
                } else {
                    record.set_lookups(record.lookups().saturating_sub(1), 0, false);
                }
            }
            let forgotten = forgotten.into_iter().map(|node| (unique, NodeId(node)));
            attempts.forgotten.extend(forgotten);
            while let Some(node) = done.added.last().copied() {
                match record(node) {
                    Some(record) => table.undo(&mut done, record),
                    None => drop(done.added.pop()),
                }
            }
        }
        attempts
    }

    pub(crate) fn seen(&self, unique: u64) -> Option<u64> {
        // The map is nearly always empty.
        self.seen.get(&unique).copied()
    }

    pub(crate) fn has_forgotten(&self, unique: u64, node: NodeId) -> bool {
        self.forgotten.contains(&(unique, node))
    }
}
