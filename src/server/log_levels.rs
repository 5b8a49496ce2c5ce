//! The log levels over the processes that serve a guest.
//!
//! The invariant: levels that were set while the server ran stay until it ends; the command line
//! and the environment have those that it starts with.

use std::sync::Arc;

use log::LevelFilter;

use crate::logging::{self, LevelError, LevelList};
use crate::state::Table;

/// Why a level isn't set.
#[derive(Debug, thiserror::Error)]
pub(super) enum SetError {
    /// The process logs by another logger.
    #[error("the log of this process has fixed levels")]
    Fixed,
    /// What is asked for doesn't exist.
    #[error(transparent)]
    Level(#[from] LevelError),
}

/// Sets log levels, and records them for the next process.
#[derive(Debug)]
pub(super) struct LogLevels(Arc<Table>);

impl LogLevels {
    /// The levels of a serving process. If it was `restarted`, they are those that the previous
    /// process has had set.
    pub(super) fn in_table(table: &Arc<Table>, restarted: bool) -> Self {
        let kept = Self(Arc::clone(table));
        if !restarted {
            table.set_log_levels(None);
        } else if let Some(changes) = kept.changes()
            && let Some(levels) = logging::levels()
        {
            log::info!("log levels: {changes}, as was set before");
            levels.restore(changes);
        }
        kept
    }

    /// What the previous process has had set, unless the text isn't one that this program
    /// understands.
    fn changes(&self) -> Option<LevelList> {
        let text = self.0.log_levels()?;
        let changes = text.parse();
        changes
            .inspect_err(|error| log::warn!("the log levels that were set are lost: {error}"))
            .ok()
    }

    /// Sets the level of a room, or of all.
    pub(super) fn set(&self, level: LevelFilter, room: Option<&str>) -> Result<(), SetError> {
        let levels = logging::levels().ok_or(SetError::Fixed)?;
        levels.set(level, room)?;
        if !self.0.set_log_levels(Some(&levels.changes().to_string())) {
            log::warn!("the log levels will be lost when the process is replaced");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_that_were_set_outlive_the_process_but_not_the_server() {
        let limits = crate::state::Limits {
            inodes: 0,
            handles: 0,
            queues: 1,
        };
        let table = Table::in_memory(&limits).unwrap();
        let kept = LogLevels::in_table(&table, false);
        assert_eq!(kept.changes(), None);
        for text in ["warn", "warn,fs=debug,io=trace", "fs=off"] {
            assert!(table.set_log_levels(Some(text)));
            assert_eq!(kept.changes().unwrap().to_string(), text);
        }
        // All that there can be.
        let all: Vec<_> = logging::ROOMS
            .iter()
            .map(|room| format!("{room}=error"))
            .collect();
        let all = format!("error,{}", all.join(","));
        assert!(table.set_log_levels(Some(&all)));
        assert_eq!(kept.changes().unwrap().to_string(), all);
        // More than a table holds, and what another program may have written, is no reason to fail.
        assert!(!table.set_log_levels(Some(&"x".repeat(Table::MAX_LOG_LEVELS_LEN + 1))));
        assert_eq!(kept.changes().unwrap().to_string(), all);
        assert!(table.set_log_levels(Some("info,attic=debug")));
        assert_eq!(kept.changes(), None);
        // A server that is started anew with the same state file.
        assert!(table.set_log_levels(Some("warn")));
        LogLevels::in_table(&table, false);
        assert_eq!(table.log_levels(), None);
    }
}
