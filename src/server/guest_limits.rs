//! The limits of a guest over the processes that serve it.
//!
//! The invariant: limits that were set while the guest was served stay until the server ends; the
//! command line has those that it starts with.

use std::sync::Arc;

use crate::limits::{Limits, Record, Settings, SettingsWords};
use crate::state::Table;

/// Records limits in the state table.
#[derive(Debug)]
struct InTable(Arc<Table>);

impl Record for InTable {
    fn record(&self, words: &SettingsWords) {
        self.0.set_guest_limits(Some(words));
    }
}

/// The limits of a serving process. If it was `restarted`, they are those that the previous process
/// has had set.
pub(super) fn in_table(settings: Settings, table: &Arc<Table>, restarted: bool) -> Arc<Limits> {
    let settings = match table.guest_limits() {
        Some(words) if restarted => Settings::from_words(&words),
        _ => {
            table.set_guest_limits(None);
            settings
        }
    };
    if !settings.is_empty() {
        log::info!("limits: {settings}");
    }
    let limits = Limits::new(settings);
    limits.recording(Arc::new(InTable(Arc::clone(table))));
    limits
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;
    use crate::limits::Rate;

    #[test]
    fn limits_that_were_set_outlive_the_process_but_not_the_server() {
        let limits = crate::state::Limits {
            inodes: 0,
            handles: 0,
            queues: 1,
        };
        let table = Table::in_memory(&limits).unwrap();
        let operations = |per_second| Settings {
            operations: NonZeroU64::new(per_second).map(Rate::of),
            ..Settings::default()
        };
        let first = in_table(operations(1), &table, false);
        assert_eq!(first.settings(), operations(1));
        assert_eq!(
            in_table(operations(1), &table, true).settings(),
            operations(1)
        );
        first.set(operations(2));
        first.set(operations(3));
        assert_eq!(
            in_table(operations(1), &table, true).settings(),
            operations(3)
        );
        first.set(Settings::default());
        assert!(in_table(operations(1), &table, true).settings().is_empty());
        // A server that is started anew with the same state file.
        let next = in_table(operations(4), &table, false);
        assert_eq!(next.settings(), operations(4));
        assert_eq!(table.guest_limits(), None);
    }
}
