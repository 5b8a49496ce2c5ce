//! Looks for inodes that another process has left, and that no known name leads to.
//!
//! The process before had them open. A file with several names may have lost the one that it was known
//! by, and somebody on the host may have renamed it since; it still has a name, and so it is found:
//! in the directories that the guest knows, else anywhere in the share. The invariant: an inode is
//! looked for once, and the guest waits for all of that no longer than [`SEARCH_TIMEOUT`].

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::super::Passthrough;
use super::super::inode::{Inode, RefKind};
use super::super::inode_ref::{IDENTITY, Identity, InodeFd, ReopenMethod, reopen_fd, stat_fd};
use super::super::lookup::stat_name;
use super::super::migration::Search;
use crate::fs::{NodeId, Result};

/// How long the guest is kept waiting for what no known name leads to.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(5);

/// What has been looked for.
#[derive(Debug, Default)]
pub(in super::super) struct LostInodeSearch {
    /// Node ids below are of the process before. 0 if it has left its descriptors too.
    below: u64,
    spent: Mutex<Spent>,
}

#[derive(Debug, Default)]
struct Spent {
    time: Duration,
    nodes: HashSet<NodeId>,
    /// All that were lost were looked for when the first was.
    all_searched: bool,
}

impl LostInodeSearch {
    /// Nothing yet, of the inodes with node ids below.
    pub(super) fn from(below: u64) -> Self {
        Self {
            below,
            spent: Mutex::default(),
        }
    }
}

impl Passthrough {
    /// A descriptor of `inode`, which can't be opened because of `error`, if it can be found again.
    pub(in super::super) fn search_lost<'a>(
        &self,
        inode: &'a Inode,
        error: Errno,
    ) -> Result<InodeFd<'a>> {
        let search = &self.previous_attempts.search;
        if error != Errno::STALE || inode.node().0 >= search.below || !has_name(inode) {
            return Err(error);
        }
        let mut spent = search.spent.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut spent.all_searched, true) {
            // All at once: a search takes as long for many as for one.
            let all = self.inodes.all().into_iter();
            let lost =
                |other: &Arc<Inode>| other.node().0 < search.below && self.own_name_is_lost(other);
            self.search_for(all.filter(lost).collect(), &mut spent);
        }
        if !spent.nodes.contains(&inode.node())
            && self.open_closed(inode).is_err()
            && let Some(inode) = self.inodes.any(inode.node())
        {
            self.search_for(vec![inode], &mut spent);
        }
        drop(spent);
        // Found just now, or by another thread.
        self.open_closed(inode)
    }

    /// Whether the inode, which may have a name, is not to be reached, and not for a directory's sake that
    /// its name is in.
    fn own_name_is_lost(&self, inode: &Inode) -> bool {
        if inode.slot().is_full() || !has_name(inode) {
            return false;
        }
        let ReopenMethod::Name(link) = inode.reopen_method() else {
            return true;
        };
        let Some(parent) = self.inodes.any(link.parent) else {
            return true;
        };
        // Not by way of `fd`, which would look for the directory in turn.
        let Ok(parent) = self.open_closed(&parent) else {
            return false;
        };
        let there = stat_name(&parent, &link.name).map(|stat| Identity::of(&stat));
        !there.is_ok_and(|identity| inode.may_be(&identity))
    }

    /// Opens inodes of the process before, wherever their names are by now.
    pub(super) fn search_by_node(&self, nodes: HashSet<NodeId>) {
        let nodes = nodes.into_iter().filter_map(|node| self.inodes.any(node));
        let missing = nodes
            .filter(|inode| self.open_closed(inode).is_err() && has_name(inode))
            .collect();
        let spent = &self.previous_attempts.search.spent;
        let mut spent = spent.lock().unwrap_or_else(PoisonError::into_inner);
        self.search_for(missing, &mut spent);
    }

    #[cfg(test)]
    pub(in super::super) fn has_searched_for(&self, node: NodeId) -> bool {
        let spent = &self.previous_attempts.search.spent;
        let spent = spent.lock().unwrap_or_else(PoisonError::into_inner);
        spent.nodes.contains(&node)
    }

    fn search_for(&self, mut missing: Vec<Arc<Inode>>, spent: &mut Spent) {
        missing.retain(|inode| spent.nodes.insert(inode.node()));
        let left = SEARCH_TIMEOUT.saturating_sub(spent.time);
        if missing.is_empty() || left.is_zero() {
            return;
        }
        let begun = Instant::now();
        let count = missing.len();
        self.search_known_directories(&mut missing, left);
        if !missing.is_empty() {
            self.search_share(&mut missing, left.saturating_sub(begun.elapsed()));
        }
        // A line for each inode would be a guest's to fill the log with.
        let level = if spent.time.is_zero() {
            log::Level::Info
        } else {
            log::Level::Debug
        };
        spent.time += begun.elapsed();
        log::log!(
            level,
            "{count} inodes were not where they were known to be; {} of them are found, in {:.1} ms",
            count - missing.len(),
            begun.elapsed().as_secs_f64() * 1000.0
        );
    }

    /// In the directories that the guest knows, by which what is found is known from then on. Leaves
    /// of `missing` those that are not found.
    fn search_known_directories(&self, missing: &mut Vec<Arc<Inode>>, timeout: Duration) {
        let begun = Instant::now();
        let root = self.inodes.any(NodeId::ROOT);
        let is_directory = |inode: &Arc<Inode>| inode.kind() == FileType::Directory;
        let known = self.inodes.all().into_iter().filter(is_directory);
        for directory in root.into_iter().chain(known) {
            if missing.is_empty() || begun.elapsed() > timeout {
                return;
            }
            let mut search = Search::new(missing);
            let dir_seq = self.inodes.dir_seq(&directory);
            let read = self.open_closed(&directory).and_then(|fd| {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                let fd = self.with_room(|| reopen_fd(&fd, &self.proc_fds, flags))?;
                search.read_directory(fd.as_fd(), &[], &mut Vec::new())
            });
            if let Err(error) = read {
                log::debug!("node {} can't be read: {error}", directory.node().0);
            }
            let found = search.into_found();
            if found.is_empty() {
                continue;
            }
            missing.retain(|inode| {
                let name = found.get(&inode.node()).cloned();
                let Some(Ok(name)) = name.map(std::ffi::CString::new) else {
                    return true;
                };
                self.inodes.record_name(inode, &directory, &name, dir_seq);
                // One that is young can be told from others now, and hardly later.
                self.open_closed(inode).is_err()
            });
        }
    }

    /// In the whole share. What is found keeps its descriptor until a lookup sees it.
    fn search_share(&self, missing: &mut Vec<Arc<Inode>>, timeout: Duration) {
        let mut paths = self.search(missing, timeout);
        let Some(root) = self.inodes.any(NodeId::ROOT) else {
            return;
        };
        missing.retain(|inode| {
            let found = paths.remove(&inode.node()).ok_or(Errno::STALE);
            let opened = found.and_then(|path| {
                let fd = self.follow(self.fd(&root)?.as_fd(), &path)?;
                let identity = Identity::of(&stat_fd(&fd, IDENTITY)?);
                inode.may_be(&identity).then_some(fd).ok_or(Errno::STALE)
            });
            match opened {
                Ok(fd) => {
                    self.inodes
                        .change_reopen_method(inode, inode.ref_kind(), ReopenMethod::None);
                    // It may have been forgotten meanwhile.
                    drop(self.inodes.install(inode, fd));
                    self.inodes.set_nameless(inode, false);
                    false
                }
                Err(error) => {
                    log::debug!("node {} can't be reached: {error}", inode.node().0);
                    true
                }
            }
        });
    }
}

/// Whether the inode had a name when it was seen last: one that is known, or, as its file handle tells
/// which was written down for that, another one.
fn has_name(inode: &Inode) -> bool {
    match &*inode.ref_kind() {
        RefKind::Name => true,
        RefKind::Nothing => inode.record().handle().is_some(),
        RefKind::Open(_) | RefKind::Handle(_) | RefKind::Removed => false,
    }
}
