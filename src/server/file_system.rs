//! The file system that is served: the one place where it is chosen and built.
//!
//! The invariant: nothing else in the server knows which file system it is.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use super::error::ServerError;
use super::mounts::Mounts;
use super::sources::{self, Builder};
use crate::config::{Config, Source};
use crate::control::MAX_CLIENTS;
use crate::fs::FileSystem;
use crate::fs::passthrough::{
    self, InodeFileHandles, MigrationMode, Options, Passthrough, PreviousProcess, Shared,
};
use crate::fuse::Wanted;
use crate::recovery::OpenedTable;
use crate::sandbox::{Kind, Needs, Reach, Reached};
use crate::state::Table;

pub(super) use crate::fs::passthrough::{raise_descriptor_limit, set_descriptor_limit};

/// The host's files that the file system gets, opened in the sandbox.
pub(super) struct Entered {
    /// What is shared, `O_PATH`.
    pub(super) root: OwnedFd,
    /// The single file that is shared, `O_PATH`, if the root was made for one.
    pub(super) file: Option<OwnedFd>,
    /// The directories and files of a source that has several, in their order.
    pub(super) trees: Vec<Vec<Reached>>,
    /// `/proc/self/fd`, `O_PATH`.
    pub(super) proc_fds: OwnedFd,
    /// Files can be opened by file handle.
    pub(super) file_handles: bool,
    /// The server may set security labels.
    pub(super) may_label: bool,
}

/// A file system, and where its session is recorded.
pub(super) struct Built {
    pub(super) fs: Arc<dyn FileSystem>,
    pub(super) table: Arc<Table>,
    /// What can be mounted beside it while it is served.
    pub(super) mounts: Option<Mounts>,
}

/// Checks that what is to be served exists, before a launcher or a VMM relies on it.
pub(super) fn check(config: &Config) -> Result<(), ServerError> {
    match &config.source {
        Source::Directory(path) => {
            passthrough::check_shared(path).map_err(|error| ServerError::share(path, error))
        }
        source => sources::check(source),
    }
}

/// What the server reaches on the host.
pub(super) fn reach(config: &Config) -> Reach {
    match &config.source {
        Source::Directory(path) => Reach::Share(path.clone()),
        source => Reach::Trees(sources::trees(source, config.share.file_system.readonly)),
    }
}

/// Whether directories may be mounted while the server runs.
fn may_add_mounts(config: &Config) -> bool {
    config.control.is_some() && matches!(config.source, Source::Vfs(_))
}

/// What the file system needs of the sandbox.
pub(super) fn needs(config: &Config) -> Needs {
    let options = &config.share.file_system;
    Needs {
        readonly: options.readonly,
        file_handles: options.inode_file_handles != InodeFileHandles::Never
            || options.migration.mode == MigrationMode::FileHandles,
        more_directories: may_add_mounts(config),
    }
}

/// Builds the file system of what was `entered`, and resumes the session of the `opened` table.
pub(super) fn build(
    config: &Config,
    entered: Entered,
    opened: OpenedTable,
) -> Result<Built, ServerError> {
    let options = Options {
        may_open_handles: entered.file_handles,
        reserved_descriptors: reserved_descriptors(config),
        ..config.share.file_system.clone()
    };
    let may_label = entered.may_label;
    let built = match &config.source {
        Source::Directory(path) => build_directory(path, options, entered, opened)?,
        source => {
            log::info!(
                "{}: the session isn't recorded, so the VMM isn't offered live migration",
                source.option()
            );
            let Entered {
                proc_fds, trees, ..
            } = entered;
            let spare = may_add_mounts(config);
            let options = Options {
                // What is mounted later can't ask for it any more.
                descriptor_limit: Some(passthrough::descriptor_limit()),
                ..options
            };
            let mut builder = Builder::new(config, options, proc_fds, trees, spare);
            let table = opened.table;
            let confined = config.sandbox.kind != Kind::None;
            match source {
                Source::Vfs(mounts) if spare => {
                    let vfs = builder.vfs(mounts)?;
                    let mounts = Mounts::new(&vfs, builder, mounts, confined);
                    Built {
                        fs: vfs,
                        table,
                        mounts: Some(mounts),
                    }
                }
                source => Built {
                    fs: builder.build(source)?,
                    table,
                    mounts: None,
                },
            }
        }
    };
    warn_about_labels(config, may_label);
    Ok(built)
}

fn build_directory(
    path: &Path,
    options: Options,
    entered: Entered,
    opened: OpenedTable,
) -> Result<Built, ServerError> {
    let OpenedTable { table, previous } = opened;
    let past = previous.map(|previous| PreviousProcess {
        inherited_fds: previous.inherited_fds,
        in_flight: previous.unanswered,
    });
    let failed = |error| ServerError::share(path, error);
    let shared = Shared {
        root: entered.root,
        proc_fds: entered.proc_fds,
        path: path.to_owned(),
    };
    let (mut fs, restored) =
        Passthrough::with_table(shared, options, &table, past.as_ref()).map_err(failed)?;
    if past.is_some() {
        log::info!("resuming where another process ended: {restored}");
    }
    if let Some(file) = entered.file {
        fs.set_single_file(file);
    }
    Ok(Built {
        fs: Arc::new(fs),
        table,
        mounts: None,
    })
}

/// Logs that the guest can't set labels, if it is to have them and the server may not.
fn warn_about_labels(config: &Config, may_label: bool) {
    if may_label || config.share.session.security_label == Wanted::No {
        return;
    }
    let map = config.share.file_system.xattr_map.as_ref();
    if let Some(name) = passthrough::label_that_needs_privilege(map) {
        log::warn!(
            "--security-label: the guest can't create files with a security label (EPERM), because the \
             server may not set {name} on the host: as root use --modcaps=+sys_admin, or store the \
             labels under another name with --xattrmap=:map:security.:user.guest.:"
        );
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
    // A client's connection, and a descriptor that comes with its request.
    let clients = config.control.iter().count() * 2 * MAX_CLIENTS;
    clients + WORKER * config.workers.get() + QUEUE * queues + OTHERS
}
