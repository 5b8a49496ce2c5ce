//! The whole shared directory, looked through for inodes that no known name leads to: those of which
//! somebody on the host has moved or removed the one that was known.
//!
//! Numbers in the lists of names tell which are worth a look. The invariant: what is found is the
//! inode, as a `statx` says; the search ends, whatever there is.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;

use super::super::Passthrough;
use super::super::inode::Inode;
use super::super::inode_ref::{IDENTITY, Identity, stat_fd};
use crate::fs::{NodeId, Result};

/// Bytes of names that are read at once.
const BUFFER_LEN: usize = 64 * 1024;

/// Bytes that a path may have, as deep as the search goes.
const MAX_PATH_LEN: usize = 64 * 1024;

/// A search that is under way.
pub(in super::super) struct Search<'a> {
    /// What is looked for, by its number: several, where there are several file systems.
    wanted: HashMap<u64, Vec<&'a Arc<Inode>>>,
    found: HashMap<NodeId, Vec<u8>>,
    begun: Instant,
}

impl<'a> Search<'a> {
    /// For names of `wanted`.
    pub(in super::super) fn new(wanted: &'a [Arc<Inode>]) -> Self {
        let mut search = Self {
            wanted: HashMap::new(),
            found: HashMap::new(),
            begun: Instant::now(),
        };
        for inode in wanted {
            let of_number = search.wanted.entry(inode.key().number);
            of_number.or_default().push(inode);
        }
        search
    }

    /// Takes note of the directories in one, and of what is looked for.
    pub(in super::super) fn read_directory(
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

    /// The paths of those that were found.
    pub(in super::super) fn into_found(self) -> HashMap<NodeId, Vec<u8>> {
        self.found
    }
}

impl Passthrough {
    /// Looks for names of `wanted`, for so long at most; answers the paths of those that have one.
    pub(in super::super) fn search(
        &self,
        wanted: &[Arc<Inode>],
        timeout: Duration,
    ) -> HashMap<NodeId, Vec<u8>> {
        let mut search = Search::new(wanted);
        let Some(root) = self.inodes.any(NodeId::ROOT) else {
            return HashMap::new();
        };
        // Paths of directories that are to be read; deep ones are opened from the root again, so
        // that no more than one is open.
        let mut pending = vec![Vec::new()];
        while let Some(path) = pending.pop() {
            if search.found.len() == wanted.len() {
                break;
            }
            if search.begun.elapsed() > timeout {
                log::warn!(
                    "the search for {} inodes has been given up after {} seconds",
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
