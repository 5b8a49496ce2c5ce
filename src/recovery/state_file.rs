//! Where the guest's state table is stored: in anonymous memory, or in the `--state` file; for this
//! process alone, or for the next ones too.
//!
//! The invariant: a serving process opens the table itself, after the previous process has ended,
//! so the list of free entries that it builds when it opens the table stays true.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Access, AtFlags, CWD, FlockOperation, MemfdFlags, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;

use super::RecoveryError;
use super::predecessor::wait_while;
use crate::state::{Limits, StateError, Table};
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

/// The state file at `path` can't be used.
fn in_file(path: &Path, source: StateError) -> RecoveryError {
    RecoveryError::InStateFile {
        path: path.to_owned(),
        source,
    }
}

/// Refuses a state file that another user could change.
fn is_own(stat: &Stat, path: &Path) -> Result<(), RecoveryError> {
    if stat.st_uid == rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    Err(RecoveryError::StateOwner {
        path: path.to_owned(),
        user: stat.st_uid,
    })
}

/// Checks whether this process may create a file at `path`.
pub(crate) fn may_create(path: &Path) -> Result<(), Errno> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let access = Access::WRITE_OK | Access::EXEC_OK;
    rustix::fs::accessat(CWD, parent, access, AtFlags::EACCESS)
}

/// Copies the first `len` bytes of a file to memory, without its holes.
fn copy_of(file: &OwnedFd, len: u64) -> Result<OwnedFd, Errno> {
    let copy = rustix::fs::memfd_create(c"copy of a state file", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&copy, len)?;
    let mut bytes = vec![0; 1 << 16];
    let mut at = 0;
    while at < len {
        at = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            // The rest is a hole.
            Err(Errno::NXIO) => break,
            found => found?,
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(at))?.min(len);
        while at < end {
            let part = usize::try_from(end - at).map_or(bytes.len(), |left| left.min(bytes.len()));
            let count = rustix::io::pread(file, &mut bytes[..part], at)?;
            if count == 0 {
                return Err(Errno::IO);
            }
            let mut written = 0;
            while written < count {
                let to = at + written as u64;
                written += rustix::io::pwrite(&copy, &bytes[written..count], to)?;
            }
            at += count as u64;
        }
    }
    Ok(copy)
}

/// Sets the mode of the state file, which may be an existing file, so that only the server's user
/// can open it.
fn keep_private(file: &OwnedFd, path: &Path) -> Result<(), RecoveryError> {
    let failed = |source: Errno| RecoveryError::StateFile {
        path: path.to_owned(),
        source,
    };
    let stat = rustix::fs::fstat(file).map_err(failed)?;
    is_own(&stat, path)?;
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

    /// As [`new`](Self::new), with a copy of the state file in memory, if there is one: nothing is
    /// created or changed.
    pub(crate) fn copy(
        path: Option<&Path>,
        supervise: bool,
        limits: &Limits,
    ) -> Result<Self, RecoveryError> {
        let Some(path) = path else {
            return Self::new(None, supervise, limits);
        };
        let failed = |source: Errno| RecoveryError::StateFile {
            path: path.to_owned(),
            source,
        };
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = match rustix::fs::open(path, flags, Mode::empty()) {
            Err(Errno::NOENT) => {
                may_create(path).map_err(failed)?;
                return Self::new(None, true, limits);
            }
            opened => opened.map_err(failed)?,
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
            Err(Errno::AGAIN) => return Err(RecoveryError::StateInUse(path.to_owned())),
            locked => locked.map_err(failed)?,
        }
        let stat = rustix::fs::fstat(&file).map_err(failed)?;
        is_own(&stat, path)?;
        if stat.st_size == 0 {
            return Self::new(None, true, limits);
        }
        let copy = copy_of(&file, stat.st_size.cast_unsigned()).map_err(failed)?;
        let opened = OpenedTable::of_file(copy, path, limits)?;
        if !supervise {
            return Ok(Self::File(opened));
        }
        let file = opened.table.file().map(OwnedFd::try_clone).transpose();
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
        if rustix::fs::fstat(&file).map_err(failed)?.st_size == 0 {
            let table = Table::create(file, limits).map_err(|source| in_file(path, source))?;
            return Ok(Self {
                table,
                previous: None,
            });
        }
        Self::of_file(file, path, limits)
    }

    /// Opens the table in `file`, which is that of `path` or its copy.
    fn of_file(file: OwnedFd, path: &Path, limits: &Limits) -> Result<Self, RecoveryError> {
        let table = Table::open(file).map_err(|source| in_file(path, source))?;
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
