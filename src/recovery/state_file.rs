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

use super::RecoveryError;
use super::predecessor::wait_while;
use crate::state::{Limits, Table};
use crate::virtqueue;

/// An open table, and the session in it.
#[derive(Debug)]
pub(crate) struct OpenedTable {
    pub(crate) table: Arc<Table>,
    /// What the previous process has left in the table, if anything.
    pub(crate) previous: Option<PreviousServer>,
}

/// What a process that resumes a session has to know of the previous one.
#[derive(Debug)]
pub(crate) struct PreviousServer {
    /// The descriptors that it recorded are open in this process, under the same numbers.
    pub(crate) inherited_fds: bool,
    /// The requests that it left unanswered.
    pub(crate) unanswered: Vec<u64>,
}

/// Where the table is stored.
#[derive(Debug)]
pub(crate) enum TableLocation {
    /// In memory that the serving process allocates.
    Own,
    /// In the state file, which is open.
    File(OpenedTable),
    /// In a file or a memfd that all serving processes share.
    Shared(OwnedFd),
}

/// Sets the mode of the state file, which may be an existing file, so that only the server's user
/// can open it.
fn keep_private(file: &OwnedFd, path: &Path) -> Result<(), RecoveryError> {
    let failed = |source: Errno| RecoveryError::StateFile {
        path: path.to_owned(),
        source,
    };
    let stat = rustix::fs::fstat(file).map_err(failed)?;
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        return Err(RecoveryError::StateOwner {
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

impl TableLocation {
    /// Opens or creates the state file at `path`, or a memfd, as far as this process has to.
    pub(crate) fn new(
        path: Option<&Path>,
        supervise: bool,
        limits: &Limits,
    ) -> Result<Self, RecoveryError> {
        let table = match (path, supervise) {
            (None, false) => return Ok(Self::Own),
            (Some(path), false) => return Ok(Self::File(OpenedTable::open(path, limits)?)),
            (Some(path), true) => OpenedTable::open(path, limits)?.table,
            (None, true) => Table::in_memory(limits)?,
        };
        // Tables of these kinds have a file.
        let file = table.file().map(OwnedFd::try_clone).transpose();
        let file = file.map_err(RecoveryError::Keep)?;
        Ok(file.map_or(Self::Own, Self::Shared))
    }

    /// The file that every process needs open.
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Own => None,
            Self::File(opened) => opened.table.file().map(AsFd::as_fd),
            Self::Shared(file) => Some(file.as_fd()),
        }
    }

    /// Opens the table in the serving process. With `again`, the process has the descriptors of an
    /// earlier serving process.
    pub(crate) fn open(self, limits: &Limits, again: bool) -> Result<OpenedTable, RecoveryError> {
        match self {
            Self::Own => Ok(OpenedTable {
                table: Table::for_this_process(limits)?,
                previous: None,
            }),
            Self::File(opened) => Ok(opened),
            Self::Shared(file) => Ok(OpenedTable::of(Table::open(file)?, again)),
        }
    }
}

impl OpenedTable {
    fn of(table: Arc<Table>, inherited_fds: bool) -> Self {
        let previous = table.is_in_use().then(|| PreviousServer {
            inherited_fds,
            unanswered: virtqueue::unanswered_requests(&table),
        });
        Self { table, previous }
    }

    fn open(path: &Path, limits: &Limits) -> Result<Self, RecoveryError> {
        let failed = |source: Errno| RecoveryError::StateFile {
            path: path.to_owned(),
            source,
        };
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        // The lock is held as long as any process has the file open.
        let lock = || match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::AGAIN) => Err(RecoveryError::StateInUse(path.to_owned())),
            locked => locked.map_err(failed),
        };
        wait_while(lock, |error| matches!(error, RecoveryError::StateInUse(_)))?;
        keep_private(&file, path)?;
        let in_file = |source| RecoveryError::InStateFile {
            path: path.to_owned(),
            source,
        };
        if rustix::fs::fstat(&file).map_err(failed)?.st_size == 0 {
            let table = Table::create(file, limits).map_err(in_file)?;
            return Ok(Self {
                table,
                previous: None,
            });
        }
        let table = Table::open(file).map_err(in_file)?;
        let wanted = usize::from(limits.queues);
        if table.queue_count() < wanted {
            return Err(RecoveryError::StateQueues {
                path: path.to_owned(),
                queues: table.queue_count().saturating_sub(1),
            });
        }
        Ok(Self::of(table, false))
    }
}
