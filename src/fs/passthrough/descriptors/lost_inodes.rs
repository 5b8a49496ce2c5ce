//! Finds inodes of the previous server process whose known name is gone.
//!
//! The previous process had them open. A file with several names may have lost the one that was
//! known, or a host process may have renamed it. As it still has a name, it can be found: in the
//! directories that the guest knows, or else anywhere in the share. The invariant: each inode is
//! searched for once, and all searches together delay the guest by at most [`SEARCH_TIMEOUT`].

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::Descriptors;
use super::search::Search;
use crate::fs::passthrough::inode_table::stat_name;
use crate::fs::passthrough::inode_table::{
    IDENTITY, Identity, Inode, InodeFd, RefKind, ReopenMethod, reopen_fd, stat_fd,
};
use crate::fs::{NodeId, Result};

/// How long searches delay the guest at most.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(5);

/// The state of the search for lost inodes.
#[derive(Debug, Default)]
pub(crate) struct LostInodes {
    /// Smaller node ids belong to the previous process. 0 if its descriptors were inherited.
    below: u64,
    spent: Mutex<Spent>,
}

#[derive(Debug, Default)]
struct Spent {
    time: Duration,
    nodes: HashSet<NodeId>,
    /// The first search looked for all lost inodes.
    all_searched: bool,
}

impl LostInodes {
    /// For inodes with smaller node ids than `below`.
    pub(crate) fn from(below: u64) -> Self {
        Self {
            below,
            spent: Mutex::default(),
        }
    }
}

impl Descriptors {
    /// A descriptor of `inode`, which can't be opened because of `error`, if a search finds it.
    pub(crate) fn search_lost<'a>(&self, inode: &'a Inode, error: Errno) -> Result<InodeFd<'a>> {
        let search = &self.lost_inodes;
        if error != Errno::STALE || inode.node().0 >= search.below || !has_name(inode) {
            return Err(error);
        }
        let mut spent = search.spent.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut spent.all_searched, true) {
            // A search takes as long for many inodes as for one.
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
        // This or another thread has found it.
        self.open_closed(inode)
    }

    /// Whether the name of an inode is gone, as opposed to that of a directory above it.
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
        // `fd` would search for the directory in turn.
        let Ok(parent) = self.open_closed(&parent) else {
            return false;
        };
        let there = stat_name(&parent, &link.name).map(|stat| Identity::of(&stat));
        !there.is_ok_and(|identity| inode.may_be(&identity))
    }

    /// Opens inodes of the previous process, wherever their names are now.
    pub(crate) fn search_by_node(&self, nodes: HashSet<NodeId>) {
        let nodes = nodes.into_iter().filter_map(|node| self.inodes.any(node));
        let missing = nodes
            .filter(|inode| self.open_closed(inode).is_err() && has_name(inode))
            .collect();
        let spent = &self.lost_inodes.spent;
        let mut spent = spent.lock().unwrap_or_else(PoisonError::into_inner);
        self.search_for(missing, &mut spent);
    }

    #[cfg(test)]
    pub(crate) fn has_searched_for(&self, node: NodeId) -> bool {
        let spent = &self.lost_inodes.spent;
        let spent = spent.lock().unwrap_or_else(PoisonError::into_inner);
        spent.nodes.contains(&node)
    }

    fn search_for(&self, mut missing: Vec<Arc<Inode>>, spent: &mut Spent) {
        missing.retain(|inode| spent.nodes.insert(inode.node()));
        let left = SEARCH_TIMEOUT.saturating_sub(spent.time);
        if missing.is_empty() || left.is_zero() {
            return;
        }
        let started = Instant::now();
        let count = missing.len();
        self.search_known_directories(&mut missing, left);
        if !missing.is_empty() {
            self.search_share(&mut missing, left.saturating_sub(started.elapsed()));
        }
        // One line for each inode would let a guest fill the log.
        let level = if spent.time.is_zero() {
            log::Level::Info
        } else {
            log::Level::Debug
        };
        spent.time += started.elapsed();
        log::log!(
            level,
            "{count} inodes were not found by their known names; a search found {} of them in {:.1} ms",
            count - missing.len(),
            started.elapsed().as_secs_f64() * 1000.0
        );
    }

    /// Searches the directories that the guest knows and records the names it finds. Leaves in
    /// `missing` what is not found.
    fn search_known_directories(&self, missing: &mut Vec<Arc<Inode>>, timeout: Duration) {
        let started = Instant::now();
        let root = self.inodes.any(NodeId::ROOT);
        let is_directory = |inode: &Arc<Inode>| inode.kind() == FileType::Directory;
        let known = self.inodes.all().into_iter().filter(is_directory);
        for directory in root.into_iter().chain(known) {
            if missing.is_empty() || started.elapsed() > timeout {
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
                log::debug!("can't read directory node {}: {error}", directory.node().0);
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
                // A young inode can be told from others now, but hardly later.
                self.open_closed(inode).is_err()
            });
        }
    }

    /// Searches the whole share. What is found keeps its descriptor until a lookup sees it.
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
                    // The guest may have forgotten it in the meantime.
                    drop(self.inodes.install(inode, fd));
                    self.inodes.set_nameless(inode, false);
                    false
                }
                Err(error) => {
                    log::debug!("can't open node {}: {error}", inode.node().0);
                    true
                }
            }
        });
    }
}

/// Whether the inode had a name when it was last seen: a known name, or, if a file handle is
/// recorded for it, another one.
fn has_name(inode: &Inode) -> bool {
    match &*inode.ref_kind() {
        RefKind::Name => true,
        RefKind::Nothing => inode.record().handle().is_some(),
        RefKind::Open(_) | RefKind::Handle(_) | RefKind::Removed => false,
    }
}
