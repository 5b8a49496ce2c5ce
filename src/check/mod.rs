//! `ringfsd check`: what this host can do for a server, and whether a server would start.
//!
//! The verdict is that of the start itself, which is rehearsed in a process of its own; whether a
//! variant of the configuration would work is found out in the same way. `host` and `directory` test
//! what the start doesn't need to know. The invariant: nothing is changed on the host.

mod directory;
mod host;
mod rehearsal;
mod report;

use std::path::PathBuf;

use crate::config::{Config, Source};
use crate::server;

use self::rehearsal::Outcome;
pub use self::report::Report;
use self::report::{Directory, Record};

/// Goes through the start of a server with this configuration, and tests the host. With `writes`, files
/// without a name may be created in the shared directories.
///
/// To be called while the process has one thread.
#[must_use]
pub fn run(config: Config, writes: bool) -> Report {
    let outcome = match server::check_inherited(&config) {
        Ok(notice) => {
            let mut outcome = rehearsal::rehearse(config.clone());
            let notice = notice.map(|text| Record {
                level: "info".to_owned(),
                text,
            });
            outcome.log.splice(..0, notice);
            outcome
        }
        Err(error) => Outcome {
            failure: Some(server::explain(&error)),
            log: Vec::new(),
        },
    };
    let mut paths = Vec::new();
    add_directories(&config.source, &mut paths);
    let directories = paths
        .into_iter()
        .map(|path| Directory {
            findings: directory::test(&path, writes),
            path,
        })
        .collect();
    Report {
        would_start: outcome.failure.is_none(),
        failure: outcome.failure,
        log: outcome.log,
        host: host::test(config),
        directories,
    }
}

/// Adds the directories of the host that are served.
fn add_directories(source: &Source, paths: &mut Vec<PathBuf>) {
    match source {
        Source::Directory(path) => paths.push(path.clone()),
        Source::Vfs(mounts) => {
            for (_, source) in mounts {
                add_directories(source, paths);
            }
        }
        Source::Overlay(overlay) => {
            paths.extend(overlay.upper.clone());
            for lower in &overlay.lower {
                add_directories(lower, paths);
            }
        }
        Source::Rafs(image) => paths.push(image.blobs.clone()),
    }
}
