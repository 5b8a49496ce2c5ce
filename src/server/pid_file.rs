//! The file that has the server's process id, for launchers that wait for it (`--pid-file`).
//!
//! The file is locked (`flock(2)`) as long as the server runs, and stays when it has ended: its name
//! may be another server's by then. The invariant: a file that another process has locked isn't
//! changed.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::error::ServerError;
use crate::config::Config;
use crate::recovery;

/// The locked file.
#[derive(Debug)]
pub(super) struct PidFile(File);

impl PidFile {
    /// Locks the file that the configuration names, if it names one, and writes this process's id.
    /// If another server has the lock, waits, as that one may be ending.
    pub(super) fn create(config: &Config) -> Result<Option<Self>, ServerError> {
        let Some(path) = &config.pid_file else {
            return Ok(None);
        };
        let fail = |source| ServerError::PidFile {
            path: path.clone(),
            source,
        };
        let is_locked = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
        match recovery::wait_while(|| lock(path), is_locked) {
            Ok(file) => write(&file).map(|()| Some(Self(file))).map_err(fail),
            Err(error) if is_locked(&error) => Err(ServerError::PidFileInUse(path.clone())),
            Err(error) => Err(fail(error)),
        }
    }

    /// Checks whether [`create`](Self::create) would succeed now; creates and changes nothing.
    pub(super) fn check(config: &Config) -> Result<(), ServerError> {
        let Some(path) = &config.pid_file else {
            return Ok(());
        };
        let fail = |source: Errno| ServerError::PidFile {
            path: path.clone(),
            source: source.into(),
        };
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match rustix::fs::open(path, flags, Mode::empty()) {
            Err(Errno::NOENT) => return recovery::may_create(path).map_err(fail),
            opened => opened.map_err(fail)?,
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
            Err(Errno::AGAIN) => Err(ServerError::PidFileInUse(path.clone())),
            locked => locked.map_err(fail),
        }
    }

    /// Takes over the file that the program executed earlier in this process has locked.
    pub(super) fn left(file: OwnedFd) -> Self {
        Self(file.into())
    }
}

impl AsFd for PidFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Opens or creates the file at `path`, and locks it.
fn lock(path: &Path) -> io::Result<File> {
    let no_follow = OFlags::NOFOLLOW.bits().cast_signed();
    loop {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(no_follow)
            .open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        // Whoever had it may have removed or replaced it meanwhile.
        let locked = file.metadata()?;
        match std::fs::symlink_metadata(path) {
            Ok(there) if (there.dev(), there.ino()) == (locked.dev(), locked.ino()) => {
                return Ok(file);
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
}

/// Makes this process's id what the file has.
fn write(mut file: &File) -> io::Result<()> {
    file.set_len(0)?;
    file.write_all(format!("{}\n", std::process::id()).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &Path) -> String {
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn file_of_a_running_server_is_not_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.pid");
        std::fs::write(&path, "1234567890\n").unwrap();
        let file = lock(&path).unwrap();
        write(&file).unwrap();
        let own = format!("{}\n", std::process::id());
        assert_eq!(read(&path), own);
        let error = lock(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(read(&path), own);
        drop(file);
        assert!(lock(&path).is_ok());
    }

    #[test]
    fn file_behind_a_symbolic_link_is_not_changed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("s.pid"), dir.path().join("other"));
        std::fs::write(&other, "precious").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert!(lock(&path).is_err());
        assert_eq!(read(&other), "precious");
    }
}
