//! How much one guest may hold: inodes, open files, locks, and the descriptors of all these.
//!
//! Each costs the host memory or a descriptor, and a guest's kernel that goes wild, or is told
//! to, would take all there is. Part of the process's descriptors is reserved: for the front end's
//! messages, the guest's memory, queues, workers, and a process that recovers the session. The
//! invariant: what is over a bound is refused before anything takes effect. Threads that ask at
//! the same moment may go over by one each.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::Passthrough;
use super::options::{Options, descriptor_limit, guest_descriptors};
use super::reopen::MIN_FDS;
use crate::fs::Result;

/// DirentCache of directories that are kept from one READDIR to the next, each of 64 KiB; a further
/// directory is read on at the place where it stopped, which costs a call more.
pub(super) const MAX_DIRENT_BUFFERS: usize = 1024;

/// Descriptors beyond the guest's that operations may take for a moment.
const TRANSIENT_FDS: usize = 2 * MIN_FDS;

/// How often the log tells of a shortage at most.
const WARN_INTERVAL: Duration = Duration::from_secs(60);

/// The bounds on descriptors.
#[derive(Debug)]
pub(super) struct FdLimits {
    /// What the process may have open, as it was at the start: a sandbox doesn't let it be asked.
    limit: usize,
    /// Beyond so many, those that can be opened again are closed.
    pub(super) soft: usize,
    /// Beyond so many, none is opened that can't be closed before the guest gives it back.
    hard: usize,
    /// How many of them open files, directories and locks may have.
    pub(super) handles: usize,
    /// When the log last told of a shortage.
    last_warning: Mutex<Option<Instant>>,
}

impl FdLimits {
    pub(super) fn new(options: &Options) -> Self {
        let hard = guest_descriptors(options.reserved_descriptors);
        Self {
            limit: descriptor_limit(),
            soft: options.max_open_inodes.unwrap_or(hard).min(hard),
            hard,
            handles: options.max_handles.unwrap_or(hard).min(hard),
            last_warning: Mutex::default(),
        }
    }
}

impl Passthrough {
    /// How many descriptors the server has open for the guest.
    pub(super) fn descriptors(&self) -> usize {
        self.inodes.descriptors()
            + self.handles.count()
            + self.locks.count()
            + self.handleless.count()
            + self.closed_fds.count()
            + self.closer.count()
            + self.reopen_policy.anchors()
    }

    /// Asked before the guest gets to know a further inode. What it has given back makes room.
    pub(super) fn room_for_inode(&self) -> Result<()> {
        while self.inodes.known() > self.options.max_inodes {
            if !self.inodes.drop_oldest_forgotten() {
                return Err(Errno::NFILE);
            }
        }
        self.inodes.make_room_in_table();
        // Nearly always its descriptor can be closed again.
        self.room_below(self.fd_limits.hard.saturating_add(TRANSIENT_FDS))
    }

    /// Asked before a further file or directory is opened for the guest.
    pub(super) fn room_for_handle(&self) -> Result<()> {
        self.sharing.opens();
        if self.handles.count().saturating_add(self.locks.count()) >= self.fd_limits.handles {
            return Err(Errno::NFILE);
        }
        self.room_for_descriptor()
    }

    /// Asked before a further descriptor is opened that can't be closed until the guest gives it
    /// back, and before an inode loses the name by which its descriptor could be opened again.
    pub(super) fn room_for_descriptor(&self) -> Result<()> {
        self.room_below(self.fd_limits.hard)
    }

    /// Makes sure that there are fewer descriptors than `bound`.
    fn room_below(&self, bound: usize) -> Result<()> {
        if self.descriptors() < bound {
            return Ok(());
        }
        let too_many = || self.descriptors() >= bound;
        self.closed_fds.clear();
        self.close_some(|| too_many() && self.inodes.descriptors() > MIN_FDS);
        self.handleless.close_some(too_many);
        if too_many() {
            self.share_descriptors();
        }
        if too_many() {
            Err(Errno::NFILE)
        } else {
            Ok(())
        }
    }

    /// Tells the operator, now and then, why the guest gets `ENFILE`.
    pub(super) fn warn_of_shortage(&self) {
        {
            let mut last_warning = self
                .fd_limits
                .last_warning
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if last_warning.is_some_and(|last_warning| last_warning.elapsed() < WARN_INTERVAL) {
                return;
            }
            *last_warning = Some(Instant::now());
        }
        let FdLimits {
            limit,
            hard,
            handles,
            ..
        } = self.fd_limits;
        let known = self.inodes.known();
        let open = self.handles.count() + self.locks.count();
        let inodes = self.inodes.descriptors();
        let advice =
            "raise --rlimit-nofile, or the limit that the server is started with (ulimit -n)";
        if known > self.options.max_inodes {
            log::warn!("the guest gets ENFILE: it knows {known} inodes; raise --max-inodes");
        } else if open >= handles && handles < hard {
            log::warn!(
                "the guest gets ENFILE: it has {open} files, directories and locks open; raise \
                 --max-handles"
            );
        } else if self.descriptors() >= hard {
            log::warn!(
                "the guest gets ENFILE: it may use {hard} of the server's {limit} file \
                 descriptors, and has {open} for open files, directories and locks, and {inodes} \
                 for inodes, of which those without a name can't be closed; {advice}"
            );
        } else {
            log::warn!("the guest gets ENFILE: the host has no file descriptor left; {advice}");
        }
    }
}
