//! Where it lies what a guest holds: in memory, or in a file that the operator names; for this process
//! alone, or for those that follow it.
//!
//! The invariant: a table that a process serves from was opened by it, after the one before has
//! ended: what it remembers of the free places in it is its own.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::ServerError;
use super::limits::{LimitError, file_size, without_file_size_limit};
use super::predecessor::wait_while;
use crate::config::Config;
use crate::fs::passthrough::Past;
use crate::state::{Limits, StateError, Table};
use crate::virtqueue;

/// A table, and what it tells of.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) table: Arc<Table>,
    /// If there is something to go on from.
    pub(super) past: Option<Past>,
}

/// Where it lies.
#[derive(Debug)]
pub(super) enum State {
    /// In memory that the process makes itself.
    Own,
    /// In a file that was opened.
    File(Kept),
    /// In a file, or memory, that outlives the process.
    Common(OwnedFd),
}

/// Lets nobody but the server's user open a state file, which may have been there before.
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

/// How large a table has to be.
pub(super) fn limits(config: &Config) -> Limits {
    let queues = config.request_queues.get().saturating_add(1);
    config.share.file_system.limits(queues)
}

impl State {
    pub(super) fn new(config: &Config) -> Result<Self, ServerError> {
        let size = file_size();
        without_file_size_limit(|| Self::made(config)).map_err(|error| match (error, size) {
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

    fn made(config: &Config) -> Result<Self, ServerError> {
        let limits = limits(config);
        let table = match (&config.state, config.supervise) {
            (None, false) => return Ok(Self::Own),
            (Some(path), false) => return Ok(Self::File(Kept::open(path, &limits)?)),
            (Some(path), true) => Kept::open(path, &limits)?.table,
            (None, true) => Table::in_memory(&limits)?,
        };
        // It has one, as it was made with one.
        let file = table.file().map(OwnedFd::try_clone).transpose();
        let file = file.map_err(ServerError::Keep)?;
        Ok(file.map_or(Self::Own, Self::Common))
    }

    /// What has to be open in each process.
    pub(super) fn file(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Own => None,
            Self::File(kept) => kept.table.file().map(AsFd::as_fd),
            Self::Common(file) => Some(file.as_fd()),
        }
    }

    /// The table of the process that serves, which has the descriptors of the one before where it
    /// comes `again`.
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
        let past = table.is_in_use().then(|| Past {
            inherited_fds,
            under_way: virtqueue::under_way(&table),
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
        // As long as the file is open, in whichever process.
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
