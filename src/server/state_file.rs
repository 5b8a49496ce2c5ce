//! Where the guest's state table is stored: in anonymous memory, or in the `--state` file; for this
//! process alone, or for the next ones too.
//!
//! The invariant: a serving process opens the table itself, after the previous process has ended,
//! so the list of free entries that it builds when it opens the table stays true.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::ServerError;
use super::limits::{LimitError, file_size, without_file_size_limit};
use super::predecessor::wait_while;
use crate::config::Config;
use crate::fs::passthrough::PreviousProcess;
use crate::state::{Limits, StateError, Table};
use crate::virtqueue;

/// An open table, and the session in it.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) table: Arc<Table>,
    /// What an earlier process has left in the table, if anything.
    pub(super) past: Option<PreviousProcess>,
}

/// Where the table is stored.
#[derive(Debug)]
pub(super) enum State {
    /// In memory that the serving process allocates.
    Own,
    /// In the state file, which is open.
    File(Kept),
    /// In a file or a memfd that all serving processes share.
    Common(OwnedFd),
}

/// Sets the mode of the state file, which may be an existing file, so that only the server's user
/// can open it.
fn keep_private(file: &OwnedFd, path: &Path) -> Result<(), ServerError> {
    let failed = |source: Errno| ServerError::StateFile {
        path: path.to_owned(),
        source,
    };
    let stat = rustix::fs::fstat(file).map_err(failed)?;
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        return Err(ServerError::StateOwner {
            path: path.to_owned(),
            user: stat.st_uid,
        });
    }
    let private = Mode::RUSR | Mode::WUSR;
    if Mode::from_raw_mode(stat.st_mode) != private {
        rustix::fs::fchmod(file, private).map_err(failed)?;
    }
    Ok(())
}

/// The sizes that the table needs.
pub(super) fn limits(config: &Config) -> Limits {
    let queues = config.request_queues.get().saturating_add(1);
    config.share.file_system.limits(queues)
}

impl State {
    pub(super) fn new(config: &Config) -> Result<Self, ServerError> {
        let size = file_size();
        without_file_size_limit(|| Self::create(config)).map_err(|error| match (error, size) {
            (ServerError::InStateFile { source, .. } | ServerError::State(source), Some(limit))
                if matches!(
                    source,
                    StateError::Grow {
                        source: Errno::FBIG,
                        ..
                    }
                ) =>
            {
                let needed = limits(config).bytes();
                ServerError::Limit(LimitError::FileSize { limit, needed })
            }
            (error, _) => error,
        })
    }

    fn create(config: &Config) -> Result<Self, ServerError> {
        let limits = limits(config);
        let table = match (&config.state, config.supervise) {
            (None, false) => return Ok(Self::Own),
            (Some(path), false) => return Ok(Self::File(Kept::open(path, &limits)?)),
            (Some(path), true) => Kept::open(path, &limits)?.table,
            (None, true) => Table::in_memory(&limits)?,
        };
        // Tables of these kinds have a file.
        let file = table.file().map(OwnedFd::try_clone).transpose();
        let file = file.map_err(ServerError::Keep)?;
        Ok(file.map_or(Self::Own, Self::Common))
    }

    /// The file that every process needs open.
    pub(super) fn file(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Own => None,
            Self::File(kept) => kept.table.file().map(AsFd::as_fd),
            Self::Common(file) => Some(file.as_fd()),
        }
    }

    /// Opens the table in the serving process. With `again`, the process has the descriptors of an
    /// earlier serving process.
    pub(super) fn open(self, limits: &Limits, again: bool) -> Result<Kept, ServerError> {
        match self {
            Self::Own => Ok(Kept {
                table: Table::for_this_process(limits)?,
                past: None,
            }),
            Self::File(kept) => Ok(kept),
            Self::Common(file) => Ok(Kept::of(Table::open(file)?, again)),
        }
    }
}

impl Kept {
    fn of(table: Arc<Table>, inherited_fds: bool) -> Self {
        let past = table.is_in_use().then(|| PreviousProcess {
            inherited_fds,
            in_flight: virtqueue::under_way(&table),
        });
        Self { table, past }
    }

    fn open(path: &Path, limits: &Limits) -> Result<Self, ServerError> {
        let failed = |source: Errno| ServerError::StateFile {
            path: path.to_owned(),
            source,
        };
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        // The lock is held as long as any process has the file open.
        let lock = || match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::AGAIN) => Err(ServerError::StateInUse(path.to_owned())),
            locked => locked.map_err(failed),
        };
        wait_while(lock, |error| matches!(error, ServerError::StateInUse(_)))?;
        keep_private(&file, path)?;
        let in_file = |source| ServerError::InStateFile {
            path: path.to_owned(),
            source,
        };
        if rustix::fs::fstat(&file).map_err(failed)?.st_size == 0 {
            let table = Table::create(file, limits).map_err(in_file)?;
            return Ok(Self { table, past: None });
        }
        let table = Table::open(file).map_err(in_file)?;
        let wanted = usize::from(limits.queues);
        if table.queue_count() < wanted {
            return Err(ServerError::StateQueues {
                path: path.to_owned(),
                queues: table.queue_count().saturating_sub(1),
            });
        }
        Ok(Self::of(table, false))
    }
}
