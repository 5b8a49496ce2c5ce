//! Closes inodes that processes of the host have removed, as a last resort before `ENFILE`.
//!
//! Such an inode can't be reopened, and a guest's kernel may keep it in its cache for as long as it
//! likes: a host that replaces files all day would use up the descriptors. The guest can be without
//! it, unless one of its programs has it open: a path that leads to it fails with `ESTALE`, and is
//! walked again. The invariant: an inode that the guest has open, or has removed itself, is never
//! closed here without being reachable through the open file.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, StatxFlags};

use super::Descriptors;
use crate::fs::passthrough::inode_table::{Inode, RefKind, stat_fd};

/// All inodes are looked at again after this time, or when the guest knows this many more.
const INTERVAL: Duration = Duration::from_secs(1);
const NEW: usize = 32;

/// When to look for inodes that were removed on the host.
#[derive(Debug, Default)]
pub(crate) struct RemovedInodes {
    /// When it was last done, and how many inodes the guest knew.
    last: Mutex<Option<(Instant, usize)>>,
    /// The guest doesn't report which files it has open, or which directories. They order nothing:
    /// they change only while no request is running.
    files_unreported: AtomicBool,
    directories_unreported: AtomicBool,
}

impl RemovedInodes {
    /// Records what INIT has negotiated.
    pub(crate) fn set_unreported(&self, files: bool, directories: bool) {
        self.files_unreported.store(files, Ordering::Relaxed);
        self.directories_unreported
            .store(directories, Ordering::Relaxed);
    }

    fn is_time(&self, known: usize) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let is_time =
            last.is_none_or(|(at, before)| at.elapsed() >= INTERVAL || known >= before + NEW);
        if is_time {
            *last = Some((Instant::now(), known));
        }
        is_time
    }

    fn may_be_open_unreported(&self, inode: &Inode) -> bool {
        match inode.kind() {
            FileType::Directory => &self.directories_unreported,
            _ => &self.files_unreported,
        }
        .load(Ordering::Relaxed)
    }
}

impl Descriptors {
    /// Closes the inodes that the host has removed and the guest doesn't have open: those that were
    /// not used lately, and all others too if there are still `too_many` descriptors. It looks at
    /// all inodes, so it doesn't run each time that descriptors are short.
    pub(crate) fn close_removed(&self, too_many: impl Fn() -> bool) {
        if !self.removed_inodes.is_time(self.inodes.known()) {
            return;
        }
        let all = self.inodes.all().into_iter();
        let removed: Vec<Arc<Inode>> = all.filter(|inode| self.is_removed(inode)).collect();
        if removed.is_empty() {
            return;
        }
        // Read after the inodes: a file that is opened meanwhile uses its inode's descriptor, which
        // therefore isn't closed.
        let mut open = HashSet::new();
        self.files.handles().each(|handle, _, _| {
            open.insert(handle.node);
        });
        let unused = |inode: &&Arc<Inode>| !open.contains(&inode.node().0);
        let (used, idle): (Vec<_>, Vec<_>) = removed
            .iter()
            .filter(unused)
            .partition(|inode| inode.slot().second_chance());
        let mut closed = HashMap::new();
        let mut close = |inodes: Vec<&Arc<Inode>>| {
            for inode in inodes {
                if self.close_for_good(inode) {
                    closed.insert(inode.node().0, Arc::clone(inode));
                }
            }
        };
        close(idle);
        if too_many() {
            close(used);
        }
        // An OPEN that got its file from the inode's descriptor may have returned it since, with the
        // handle added after the first look.
        self.files.handles().each(|open, _, file| {
            if !open.directory
                && let Some(inode) = closed.get(&open.node)
            {
                self.share_if_nameless(inode, file);
            }
        });
        let closed = closed.len();
        log::debug!("closed {closed} inodes that processes of the host have removed");
    }

    /// Whether a process of the host has removed the last name of `inode`, which has a descriptor
    /// that nothing else can replace.
    fn is_removed(&self, inode: &Inode) -> bool {
        matches!(*inode.ref_kind(), RefKind::Nothing)
            && !inode.record().is_nameless()
            && !self.removed_inodes.may_be_open_unreported(inode)
            && inode.slot().inspect().is_some_and(|fd| {
                stat_fd(fd.as_fd(), StatxFlags::NLINK).is_ok_and(|stat| stat.stx_nlink == 0)
            })
    }

    fn close_for_good(&self, inode: &Inode) -> bool {
        let ref_kind = inode.ref_kind();
        if !matches!(*ref_kind, RefKind::Nothing) {
            return false;
        }
        let fd = inode.slot().inspect();
        let taken = fd.and_then(|fd| self.inodes.uninstall(inode, &ref_kind, fd));
        drop(ref_kind);
        taken.is_some()
    }
}
