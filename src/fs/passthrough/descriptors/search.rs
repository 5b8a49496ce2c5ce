//! Searches the whole shared directory for inodes whose known name a host process has moved or
//! removed.
//!
//! The inode numbers in directory entries show which entries to look at. The invariant: what is
//! found is the inode, as a `statx` confirms, and the search always ends.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;

use super::Descriptors;
use crate::fs::passthrough::inode_table::{IDENTITY, Identity, Inode, stat_fd};
use crate::fs::{NodeId, Result};

/// How many bytes of directory entries are read at once.
const BUFFER_LEN: usize = 64 * 1024;

/// The longest path that the search follows, in bytes.
const MAX_PATH_LEN: usize = 64 * 1024;

/// A search in progress.
pub(crate) struct Search<'a> {
    /// The wanted inodes by number. Several file systems can have the same number.
    wanted: HashMap<u64, Vec<&'a Arc<Inode>>>,
    found: HashMap<NodeId, Vec<u8>>,
    started: Instant,
}

impl<'a> Search<'a> {
    /// Searches for names of `wanted`.
    pub(crate) fn new(wanted: &'a [Arc<Inode>]) -> Self {
        let mut search = Self {
            wanted: HashMap::new(),
            found: HashMap::new(),
            started: Instant::now(),
        };
        for inode in wanted {
            let of_number = search.wanted.entry(inode.key().number);
            of_number.or_default().push(inode);
        }
        search
    }

    /// Reads a directory. Adds its subdirectories to `pending`, and records the wanted inodes.
    pub(crate) fn read_directory(
        &mut self,
        directory: BorrowedFd<'_>,
        path: &[u8],
        pending: &mut Vec<Vec<u8>>,
    ) -> Result<()> {
        let mut buffer = Vec::with_capacity(BUFFER_LEN);
        let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let longer = || {
                let mut longer = path.to_vec();
                if !longer.is_empty() {
                    longer.push(b'/');
                }
                longer.extend(name.to_bytes());
                longer
            };
            if let Some(wanted) = self.wanted.get(&entry.ino())
                && let Ok(identity) = identity_of(directory, name)
                && let Some(inode) = wanted.iter().find(|inode| inode.may_be(&identity))
            {
                self.found.entry(inode.node()).or_insert_with(longer);
            }
            let may_be_directory =
                matches!(entry.file_type(), FileType::Directory | FileType::Unknown);
            if may_be_directory && path.len() + name.count_bytes() < MAX_PATH_LEN {
                pending.push(longer());
            }
        }
        Ok(())
    }

    /// The paths of the inodes that were found.
    pub(crate) fn into_found(self) -> HashMap<NodeId, Vec<u8>> {
        self.found
    }
}

impl Descriptors {
    /// Searches for names of `wanted` until `timeout`. Returns the paths that it found.
    pub(crate) fn search(
        &self,
        wanted: &[Arc<Inode>],
        timeout: Duration,
    ) -> HashMap<NodeId, Vec<u8>> {
        let mut search = Search::new(wanted);
        let Some(root) = self.inodes.any(NodeId::ROOT) else {
            return HashMap::new();
        };
        // Paths of directories to read. Each is opened from the root, so that only one is open at a
        // time.
        let mut pending = vec![Vec::new()];
        while let Some(path) = pending.pop() {
            if search.found.len() == wanted.len() {
                break;
            }
            if search.started.elapsed() > timeout {
                log::warn!(
                    "gave up the search for {} inodes after {} seconds",
                    wanted.len() - search.found.len(),
                    timeout.as_secs()
                );
                break;
            }
            let read = self.fd(&root).and_then(|root| {
                let directory = self.directory_at(root.as_fd(), &path)?;
                search.read_directory(directory.as_fd(), &path, &mut pending)
            });
            if let Err(error) = read {
                log::debug!("search: {}: {error}", path.escape_ascii());
            }
        }
        search.found
    }

    fn directory_at(&self, root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = |at: BorrowedFd<'_>| {
            self.with_room(|| rustix::fs::openat(at, c".", flags, Mode::empty()))
        };
        if path.is_empty() {
            return open(root);
        }
        open(self.follow(root, path)?.as_fd())
    }
}

fn identity_of(directory: BorrowedFd<'_>, name: &CStr) -> std::result::Result<Identity, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    Ok(Identity::of(&stat_fd(&fd, IDENTITY)?))
}
