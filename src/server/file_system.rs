//! The file system that is served: the one place where it is chosen and built.
//!
//! The invariant: nothing else in the server knows which file system it is.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use super::error::ServerError;
use crate::config::Config;
use crate::fs::FileSystem;
use crate::fs::passthrough::{
    self, InodeFileHandles, MigrationMode, Options, Passthrough, PassthroughError, PreviousProcess,
    Shared,
};
use crate::fuse::Wanted;
use crate::recovery::OpenedTable;
use crate::sandbox::Needs;
use crate::state::Table;

pub(super) use crate::fs::passthrough::{raise_descriptor_limit, set_descriptor_limit};

/// The host's files that the file system gets, opened in the sandbox.
pub(super) struct Entered {
    /// What is shared, `O_PATH`.
    pub(super) root: OwnedFd,
    /// The single file that is shared, `O_PATH`, if the root was made for one.
    pub(super) file: Option<OwnedFd>,
    /// `/proc/self/fd`, `O_PATH`.
    pub(super) proc_fds: OwnedFd,
    /// The server may set security labels.
    pub(super) may_label: bool,
}

/// A file system, and where its session is recorded.
pub(super) struct Built {
    pub(super) fs: Arc<dyn FileSystem>,
    pub(super) table: Arc<Table>,
}

/// Checks that the directory to serve exists, before a launcher or a VMM relies on it.
pub(super) fn check(config: &Config) -> Result<(), ServerError> {
    passthrough::check_shared(&config.shared_dir)
        .map_err(|error| share_error(&config.shared_dir, error))
}

/// What the file system needs of the sandbox.
pub(super) fn needs(config: &Config) -> Needs {
    let options = &config.share.file_system;
    Needs {
        readonly: options.readonly,
        file_handles: options.inode_file_handles != InodeFileHandles::Never
            || options.migration.mode == MigrationMode::FileHandles,
    }
}

/// Builds the file system of what was `entered`, and resumes the session of the `opened` table.
pub(super) fn build(
    config: &Config,
    entered: Entered,
    opened: OpenedTable,
) -> Result<Built, ServerError> {
    let OpenedTable { table, previous } = opened;
    let past = previous.map(|previous| PreviousProcess {
        inherited_fds: previous.inherited_fds,
        in_flight: previous.unanswered,
    });
    let options = Options {
        reserved_descriptors: reserved_descriptors(config),
        ..config.share.file_system.clone()
    };
    let labels = config.share.session.security_label != Wanted::No;
    let unsettable = labels
        .then(|| passthrough::label_that_needs_privilege(options.xattr_map.as_ref()))
        .flatten();
    let failed = |error| share_error(&config.shared_dir, error);
    let shared = Shared {
        root: entered.root,
        proc_fds: entered.proc_fds,
        path: config.shared_dir.clone(),
    };
    let (mut fs, restored) =
        Passthrough::with_table(shared, options, &table, past.as_ref()).map_err(failed)?;
    if past.is_some() {
        log::info!("resuming where another process ended: {restored}");
    }
    if let Some(file) = entered.file {
        fs.set_single_file(file);
    }
    if let Some(name) = unsettable.filter(|_| !entered.may_label) {
        log::warn!(
            "--security-label: the guest can't create files with a security label (EPERM), because the \
             server may not set {name} on the host: as root use --modcaps=+sys_admin, or store the \
             labels under another name with --xattrmap=:map:security.:user.guest.:"
        );
    }
    Ok(Built {
        fs: Arc::new(fs),
        table,
    })
}

fn share_error(path: &Path, error: PassthroughError) -> ServerError {
    ServerError::Share {
        path: path.to_path_buf(),
        source: error.into(),
    }
}

/// How many descriptors a session needs in addition to those that the guest causes: each worker's
/// runtime and the descriptors that one request opens temporarily; the kick and call eventfds of
/// each queue, old and new; the descriptors of a message and their duplicates while it is handled; and
/// all others.
fn reserved_descriptors(config: &Config) -> usize {
    const WORKER: usize = 8;
    const QUEUE: usize = 4;
    const OTHERS: usize = 64;
    let queues = usize::from(config.request_queues.get()) + 1;
    WORKER * config.workers.get() + QUEUE * queues + OTHERS
}
