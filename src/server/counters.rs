//! The server's counters: where they are, and what they are told about the server.
//!
//! The invariant: with `--supervise` they are in a file that every process of the server has.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::error::ServerError;
use super::limits;
use crate::config::Config;
use crate::fs::FileSystem;
use crate::fuse::opcode_name;
use crate::io::Chosen;
use crate::metrics::{Facts, Registry, Shape, SharedFile};

/// Makes the file, if the counters have to outlive the serving process.
pub(super) fn create(config: &Config) -> Result<Option<SharedFile>, ServerError> {
    let create = || SharedFile::create(&shape(config));
    let file = config
        .supervise
        .then(|| limits::without_file_size_limit(create));
    Ok(file.transpose()?)
}

/// Continues with the file of the previous program, if that had one.
pub(super) fn take_over(
    config: &Config,
    previous: Option<OwnedFd>,
) -> Result<SharedFile, ServerError> {
    let shape = shape(config);
    let file = limits::without_file_size_limit(|| match previous {
        Some(previous) => SharedFile::take_over(&shape, previous),
        None => SharedFile::create(&shape),
    });
    Ok(file?)
}

/// The counters of a serving process. Its descriptors are those of the supervisor, so the file stays
/// open under its number.
pub(super) fn open(
    config: &Config,
    file: Option<SharedFile>,
    runtime: &Chosen,
) -> Result<Arc<Registry>, ServerError> {
    let shape = shape(config);
    let metrics = match file {
        Some(file) => Registry::in_file(file.into_file(), shape)?,
        None => Registry::for_this_process(shape)?,
    };
    metrics.set_facts(Facts {
        share: config.name(),
        runtime: runtime.engine.to_string(),
        workers: config.workers.get(),
    });
    Ok(metrics)
}

/// Lets the counters tell how much of its resources `fs` uses.
pub(super) fn watch(metrics: &Registry, fs: &Arc<dyn FileSystem>) {
    let (all, each) = (Arc::clone(fs), Arc::clone(fs));
    metrics.set_usage(move || all.usage());
    metrics.set_mounts(move || each.usage_by_mount());
}

fn shape(config: &Config) -> Shape {
    Shape {
        workers: config.workers.get(),
        queues: usize::from(config.request_queues.get()) + 1,
        operation: opcode_name,
    }
}
