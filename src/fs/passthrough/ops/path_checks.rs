//! Checks that an inode which the guest wants to change still has the path that the guest knows.
//!
//! A guest's kernel relies on a name as long as its timeout allows. If a host process removes or
//! replaces the file in that time, a write to the inode that the guest knows would be lost: it
//! would go to a file without a name, or to a backup with another name. So a request that changes
//! an inode fails with `ESTALE` if the name leads elsewhere. The guest's kernel then looks the path
//! up again and repeats the request. Reads are not checked.
//!
//! Not refused are: requests on files that the guest has open, as they follow no path; requests on
//! inodes whose last name the guest itself has removed; and a request that is repeated after a
//! refusal (see `retries`), unless its directory has been removed and it uses a path.
//!
//! The invariant: if a request is served without having been refused before, its inode had its
//! name, in its directory, after the request arrived. The next [`MAX_PARENTS`] directories, from
//! that one upwards, had theirs at most two [`PERIOD`]s before.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FileType, StatxFlags};
use rustix::io::Errno;
use rustix::time::ClockId;

use super::Operations;
use super::retries::Retries;
use crate::fs::passthrough::inode_table::stat_name;
use crate::fs::passthrough::inode_table::{
    Directory, IDENTITY, Identity, Inode, InodeFd, RefKind, ReopenMethod, stat_fd,
};
use crate::fs::{Caller, NodeId, Result};
use crate::io::File;

/// How often a name is checked again while the guest itself changes it.
const MAX_TRIES: usize = 2000;

/// How many directories above an inode are checked at most. This limits the cost of a request in a
/// deep tree.
const MAX_PARENTS: usize = 16;

/// How long a checked directory counts as unchanged, in milliseconds. It can be up to twice as
/// long, and as much longer as the clock lags, which is a tick of the host (1 to 10).
const PERIOD: u64 = 8;

/// The number of directories for which the last check is stored.
const DIR_SLOTS: usize = 512;

/// The number of processes for which the last opened inode is stored.
const OPENED_SLOTS: usize = 512;

/// The lower bits of a word in [`ConfirmedDirs`] are the period, the upper bits the node id.
const PERIOD_BITS: u32 = 24;

thread_local! {
    /// Whether the request that this thread serves was let through because it is repeated.
    static LET_THROUGH: Cell<bool> = const { Cell::new(false) };
}

/// Directories that were found, with all directories above them, at their known path, and in which
/// period the first of these checks was made.
#[derive(Debug)]
struct ConfirmedDirs(Box<[AtomicU64]>);

impl ConfirmedDirs {
    fn word(&self, node: NodeId) -> &AtomicU64 {
        &self.0[usize::try_from(node.0 % DIR_SLOTS as u64).unwrap_or_default()]
    }

    /// The period in which `node` was confirmed, if that is still good enough in `period`.
    fn confirmed_in(&self, node: NodeId, period: u64) -> Option<u64> {
        let word = self.word(node).load(Ordering::Relaxed);
        let age = period.wrapping_sub(word) & ((1 << PERIOD_BITS) - 1);
        // Node ids are not reused, so a word with this number is about this node.
        (word >> PERIOD_BITS == node.0 && age <= 1).then(|| period.wrapping_sub(age))
    }

    fn confirm(&self, node: NodeId, period: u64) {
        if node.0 < 1 << (u64::BITS - PERIOD_BITS) {
            let word = node.0 << PERIOD_BITS | period & ((1 << PERIOD_BITS) - 1);
            self.word(node).store(word, Ordering::Relaxed);
        }
    }
}

/// What is known about the paths that the guest uses.
#[derive(Debug)]
pub(crate) struct PathChecks {
    retries: Retries,
    confirmed_dirs: ConfirmedDirs,
    /// The inodes that processes opened last for writing.
    opened: Box<[AtomicU64]>,
}

impl PathChecks {
    pub(crate) fn new() -> Self {
        Self {
            retries: Retries::new(),
            confirmed_dirs: ConfirmedDirs((0..DIR_SLOTS).map(|_| AtomicU64::new(0)).collect()),
            opened: (0..OPENED_SLOTS).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn opened(&self, caller: &Caller) -> &AtomicU64 {
        &self.opened[usize::try_from(caller.pid).unwrap_or_default() % OPENED_SLOTS]
    }
}

impl Operations {
    /// Records that `caller` has looked up `node`.
    pub(crate) fn note_lookup(&self, caller: &Caller, node: NodeId) {
        self.path_checks.retries.found(caller.pid, node);
    }

    /// Refuses a request that changes the inode `named`, or names in it, if its path leads
    /// elsewhere now.
    ///
    /// # Errors
    ///
    /// `ESTALE`.
    pub(crate) fn confirm(&self, caller: &Caller, named: &InodeFd<'_>) -> Result<()> {
        self.confirm_both(caller, named, named)
    }

    /// As [`confirm`](Self::confirm), for two inodes.
    pub(crate) fn confirm_both(
        &self,
        caller: &Caller,
        one: &InodeFd<'_>,
        other: &InodeFd<'_>,
    ) -> Result<()> {
        LET_THROUGH.set(false);
        let one_is_current = self.is_current(one);
        let same = std::ptr::eq(one.inode(), other.inode());
        let other_is_current = if same {
            one_is_current
        } else {
            self.is_current(other)
        };
        if one_is_current && other_is_current {
            self.path_checks.retries.served(caller.pid);
            return Ok(());
        }
        let stale = [(one, one_is_current), (other, other_is_current)];
        let stale = stale.into_iter().filter(|(_, is_current)| !is_current);
        if let Some((removed, _)) = stale.clone().find(|(fd, _)| is_removed_directory(fd)) {
            // Even a repeated request has no effect there. Without a path, as by a working
            // directory, the program gets the error of the host's kernel.
            let node = removed.inode().node();
            let retries = &self.path_checks.retries;
            if retries.is_repeated_without_path(caller.pid, node) {
                LET_THROUGH.set(true);
                return Ok(());
            }
            retries.refuse(caller.pid, node);
            return Err(Errno::STALE);
        }
        self.refuse(caller, stale.map(|(fd, _)| fd.inode().node()))
    }

    /// As [`confirm`](Self::confirm), for a request that may refer to an open file without saying
    /// so, as `fchmod(2)` and `fsetxattr(2)` do.
    pub(crate) fn confirm_unless_open(&self, caller: &Caller, named: &InodeFd<'_>) -> Result<()> {
        let node = named.inode().node();
        let directory = named.inode().kind() == FileType::Directory;
        let implicit = match directory {
            true => self.terms.no_opendir(),
            false => self.terms.no_open(),
        };
        if implicit {
            // The guest may have it open, and then it may have been renamed.
            return self.confirm_not_removed(named.inode(), named.as_fd());
        }
        if self.is_current(named) {
            self.path_checks.retries.served(caller.pid);
            return Ok(());
        }
        if self.fds.files().handles().has(node) {
            return Ok(());
        }
        self.refuse(caller, [node].into_iter())
    }

    /// Refuses a request that changes the open `file` if a host process has removed its last name.
    /// For files that the guest opens without OPEN.
    pub(crate) fn confirm_implicit(&self, node: NodeId, file: &File) -> Result<()> {
        if has_any_name(file) {
            return Ok(());
        }
        match self.fds.inodes().get(node) {
            Some(inode) => self.confirm_not_removed(&inode, file.as_fd()),
            None => Err(Errno::STALE),
        }
    }

    /// As [`confirm`](Self::confirm), for an inode with a file handle that is now open as `file`.
    pub(crate) fn confirm_opened(
        &self,
        caller: &Caller,
        named: &Inode,
        file: impl AsFd,
    ) -> Result<()> {
        let is_current = named.record().is_nameless()
            || has_any_name(&file)
            || is_reopened_by_name(named) && self.has_current_name(named, None);
        if is_current {
            self.path_checks.retries.served(caller.pid);
            return Ok(());
        }
        self.refuse(caller, [named.node()].into_iter())
    }

    /// Records that `caller` has opened `node` for writing. With `O_TRUNC`, a SETATTR without a
    /// handle follows.
    pub(crate) fn note_opened(&self, caller: &Caller, node: NodeId) {
        self.path_checks
            .opened(caller)
            .store(node.0, Ordering::Relaxed);
    }

    /// As [`confirm`](Self::confirm), for SETATTR without an explicit handle. `implicit` says that
    /// the request comes from a file opened without OPEN. `size` says that it changes the size;
    /// such a request has a handle if it comes from a descriptor.
    pub(crate) fn confirm_attributes(
        &self,
        caller: &Caller,
        named: &InodeFd<'_>,
        implicit: bool,
        size: bool,
    ) -> Result<()> {
        if implicit {
            return self.confirm_not_removed(named.inode(), named.as_fd());
        }
        if !size {
            return self.confirm_unless_open(caller, named);
        }
        let node = named.inode().node();
        if self.is_current(named) {
            self.path_checks.retries.served(caller.pid);
            return Ok(());
        }
        if self.path_checks.opened(caller).swap(0, Ordering::Relaxed) == node.0
            && self.fds.files().handles().has(node)
        {
            return Ok(());
        }
        self.refuse(caller, [node].into_iter())
    }

    fn confirm_not_removed(&self, named: &Inode, fd: BorrowedFd<'_>) -> Result<()> {
        let has_name = named.record().is_nameless()
            || has_any_name(fd)
            || is_reopened_by_name(named) && self.has_current_name(named, None);
        if has_name { Ok(()) } else { Err(Errno::STALE) }
    }

    /// A descriptor of an inode that `caller` wants to change.
    pub(crate) fn fd_to_change<'a>(
        &self,
        caller: &Caller,
        inode: &'a Inode,
    ) -> Result<InodeFd<'a>> {
        self.fds.fd(inode).inspect_err(|error| {
            if *error == Errno::STALE {
                self.path_checks.retries.refuse(caller.pid, inode.node());
            }
        })
    }

    /// The result of a request on names in the directories `parents`. `ENOENT` becomes `ESTALE` if
    /// the path of one of them leads elsewhere since it was checked: a host process may have
    /// removed what is in it, or the directory itself, while the path leads to another one.
    pub(crate) fn unless_outdated<T>(
        &self,
        caller: &Caller,
        parents: &[NodeId],
        result: Result<T>,
    ) -> Result<T> {
        if !matches!(result, Err(Errno::NOENT)) || LET_THROUGH.get() {
            return result;
        }
        let is_outdated = |node: &&NodeId| {
            self.fds.inodes().any(**node).is_some_and(|directory| {
                let fd = self.fds.fd(&directory);
                fd.is_ok_and(|fd| !self.is_current(&fd))
            })
        };
        match parents.iter().find(is_outdated) {
            Some(node) => {
                self.path_checks.retries.refuse(caller.pid, *node);
                Err(Errno::STALE)
            }
            None => result,
        }
    }

    fn refuse(
        &self,
        caller: &Caller,
        mut nodes: impl Iterator<Item = NodeId> + Clone,
    ) -> Result<()> {
        let retries = &self.path_checks.retries;
        if retries.is_repeated(caller.pid, nodes.clone()) {
            LET_THROUGH.set(true);
            return Ok(());
        }
        if let Some(node) = nodes.next() {
            retries.refuse(caller.pid, node);
        }
        Err(Errno::STALE)
    }

    /// Whether the path by which the guest knows the inode, open as `fd`, still leads to it.
    fn is_current(&self, fd: &InodeFd<'_>) -> bool {
        let inode = fd.inode();
        inode.node() == NodeId::ROOT
            || inode.record().is_nameless()
            || self.has_current_name(inode, Some(fd.as_fd()))
                && self.has_current_parents(inode, now())
    }

    /// Whether the directories above `inode` are at their known paths in `period`.
    pub(crate) fn has_current_parents(&self, inode: &Inode, period: u64) -> bool {
        let is_above = |node: &NodeId| *node != NodeId::ROOT;
        let Some(mut at) = inode.parent().filter(is_above) else {
            return true;
        };
        let confirmed_dirs = &self.path_checks.confirmed_dirs;
        let mut confirmed = [at; MAX_PARENTS];
        let mut count = 0;
        let mut earliest = period;
        while count < MAX_PARENTS {
            if let Some(confirmed_in) = confirmed_dirs.confirmed_in(at, period) {
                // What is below counts as no younger: else its age would be added to this one's.
                earliest = confirmed_in;
                break;
            }
            let Some(directory) = self.fds.inodes().any(at) else {
                break;
            };
            if !self.is_near_open(&directory) {
                break;
            }
            if !directory.record().is_nameless() && !self.has_current_name(&directory, None) {
                return false;
            }
            confirmed[count] = at;
            count += 1;
            match directory.parent().filter(is_above) {
                Some(parent) => at = parent,
                None => break,
            }
        }
        for node in &confirmed[..count] {
            confirmed_dirs.confirm(*node, earliest);
        }
        true
    }

    /// Whether a directory not far above `inode` is open, so that few calls open those in between.
    fn is_near_open(&self, inode: &Inode) -> bool {
        let mut next = inode.parent();
        for _ in 0..MAX_PARENTS {
            let Some(above) = next.and_then(|node| self.fds.inodes().any(node)) else {
                return false;
            };
            if above.slot().is_full() {
                return true;
            }
            next = above.parent();
        }
        false
    }

    /// Whether the known name of `inode` leads to it. If no name is known, whether it has a name at
    /// all, as far as `fd` tells.
    fn has_current_name(&self, inode: &Inode, fd: Option<BorrowedFd<'_>>) -> bool {
        for _ in 0..MAX_TRIES {
            let Some(parent) = inode.parent().and_then(|node| self.fds.inodes().any(node)) else {
                return fd.is_none_or(has_any_name);
            };
            let dir_seq = self.fds.inodes().dir_seq(&parent);
            let ReopenMethod::Name(link) = inode.reopen_method() else {
                continue;
            };
            if link.parent != parent.node() {
                continue;
            }
            let found = self
                .fds
                .fd(&parent)
                .and_then(|fd| stat_name(&fd, &link.name))
                .map(|stat| Identity::of(&stat));
            match found {
                Ok(found) if inode.may_be(&found) => return true,
                _ if !self.fds.inodes().is_unchanged(dir_seq) => std::thread::yield_now(),
                Ok(found) => return self.has_become(inode, &found),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::STALE) => {
                    // The guest may have removed it a moment ago.
                    return inode.record().is_nameless();
                }
                // This error says nothing about the inode.
                Err(_) => return true,
            }
        }
        // The guest itself keeps changing names in the directory.
        true
    }

    /// Whether `inode` has the new identity `identity`, as after a copy-up on overlayfs.
    fn has_become(&self, inode: &Inode, identity: &Identity) -> bool {
        let stat = self.fds.fd(inode).and_then(|fd| stat_fd(fd, IDENTITY));
        stat.is_ok_and(|stat| Identity::of(&stat).key == identity.key)
    }
}

/// Whether `fd` is a directory that a host process has removed.
fn is_removed_directory(fd: &InodeFd<'_>) -> bool {
    let inode = fd.inode();
    inode.kind() == FileType::Directory && !inode.record().is_nameless() && !has_any_name(fd)
}

/// Whether an open file has a name. Returns true if that is unknown.
fn has_any_name(fd: impl AsFd) -> bool {
    stat_fd(fd, StatxFlags::NLINK).map_or(true, |stat| stat.stx_nlink > 0)
}

/// The number of the current period, by a clock that is cheap to read.
fn now() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::MonotonicCoarse);
    let milliseconds = now
        .tv_sec
        .wrapping_mul(1000)
        .wrapping_add(now.tv_nsec / 1_000_000);
    milliseconds.cast_unsigned() / PERIOD
}

/// Whether `inode` is reopened by a name.
pub(crate) fn is_reopened_by_name(inode: &Inode) -> bool {
    matches!(&*inode.ref_kind(), RefKind::Name)
}
