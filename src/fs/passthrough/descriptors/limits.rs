//! Limits how many inodes, open files, locks and descriptors one guest can have.
//!
//! Each of them costs the host memory or a descriptor, and a faulty or malicious guest kernel would
//! use up all there is. Some of the process's descriptors are reserved for the front end's
//! messages, guest memory, queues, workers, and a process that recovers the session. The invariant:
//! a request that exceeds a limit is refused before it takes effect. Threads that check at the same
//! moment can each exceed a limit by one.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::Descriptors;
use super::eviction::MIN_FDS;
use crate::fs::passthrough::options::Options;
use crate::fs::{Result, Usage};

/// Descriptors beyond the guest's limit that operations may use for a moment.
const TRANSIENT_FDS: usize = 2 * MIN_FDS;

/// The shortest time between two warnings in the log.
const WARN_INTERVAL: Duration = Duration::from_secs(60);

/// The limits.
#[derive(Debug)]
pub(crate) struct GuestLimits {
    /// The limit of the process at the start. A sandbox may not be able to read it later.
    limit: usize,
    /// Above this number, descriptors that can be reopened are closed.
    pub(crate) soft: usize,
    /// Above this number, no descriptor is opened that can't be closed before the guest releases
    /// it.
    hard: usize,
    /// How many inodes the guest may know.
    pub(crate) inodes: usize,
    /// How many descriptors open files, directories and locks can have.
    pub(crate) handles: usize,
    /// When the last warning was logged.
    last_warning: Mutex<Option<Instant>>,
}

impl GuestLimits {
    pub(crate) fn new(options: &Options) -> Self {
        let hard = options.guest_descriptors();
        Self {
            limit: options.process_descriptors(),
            soft: options.max_open_inodes.unwrap_or(hard).min(hard),
            hard,
            inodes: options.max_inodes,
            handles: options.max_handles.unwrap_or(hard).min(hard),
            last_warning: Mutex::default(),
        }
    }
}

impl Descriptors {
    /// The number of descriptors that the server has open for the guest.
    pub(crate) fn count(&self) -> usize {
        self.inodes.descriptors() + self.files.descriptors() + self.reopen_policy.anchors()
    }

    /// How much of the limits is in use.
    pub(crate) fn usage(&self) -> Usage {
        let number = |count: usize| Some(count as u64);
        Usage {
            inodes: number(self.inodes.known()),
            max_inodes: number(self.limits.inodes),
            handles: number(self.files.until_released()),
            max_handles: number(self.limits.handles),
            descriptors: number(self.count()),
            max_descriptors: number(self.limits.hard),
            evictions: self.inodes.evictor().evicted(),
        }
    }

    /// Checks the limits before the guest gets to know another inode. Forgotten inodes make room.
    pub(crate) fn room_for_inode(&self) -> Result<()> {
        while self.inodes.known() > self.limits.inodes {
            if !self.inodes.drop_oldest_forgotten() {
                return Err(Errno::NFILE);
            }
        }
        self.inodes.make_room_in_table();
        // Its descriptor can nearly always be closed again.
        self.room_below(self.limits.hard.saturating_add(TRANSIENT_FDS))
    }

    /// Whether inodes can be opened only to be faster, with no fear that others are closed for
    /// that.
    pub(super) fn has_room_for_inodes(&self) -> bool {
        let soft = self.limits.soft;
        self.count() < soft - soft / 4
    }

    /// Checks the limits before another file or directory is opened for the guest.
    pub(crate) fn room_for_handle(&self) -> Result<()> {
        self.sharing.note_open();
        if self.files.until_released() >= self.limits.handles {
            return Err(Errno::NFILE);
        }
        self.room_for_descriptor()
    }

    /// Checks the limit before opening a descriptor that can't be closed until the guest releases
    /// it, and before an inode loses the name by which it could be reopened.
    pub(crate) fn room_for_descriptor(&self) -> Result<()> {
        self.room_below(self.limits.hard)
    }

    /// Ensures that there are fewer than `bound` descriptors.
    fn room_below(&self, bound: usize) -> Result<()> {
        if self.count() < bound {
            return Ok(());
        }
        let too_many = || self.count() >= bound;
        self.files.closed().clear();
        self.close_some(|| too_many() && self.inodes.descriptors() > MIN_FDS);
        self.files.handleless().close_some(too_many);
        if too_many() {
            self.share_descriptors();
        }
        if too_many() {
            self.close_removed(too_many);
        }
        if too_many() {
            Err(Errno::NFILE)
        } else {
            Ok(())
        }
    }

    /// Logs, at most once in each interval, why the guest gets `ENFILE`.
    pub(crate) fn warn_of_shortage(&self) {
        {
            let mut last_warning = self
                .limits
                .last_warning
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if last_warning.is_some_and(|last_warning| last_warning.elapsed() < WARN_INTERVAL) {
                return;
            }
            *last_warning = Some(Instant::now());
        }
        let GuestLimits {
            limit,
            hard,
            handles,
            ..
        } = self.limits;
        let known = self.inodes.known();
        let open = self.files.until_released();
        let inodes = self.inodes.descriptors();
        let advice =
            "raise --rlimit-nofile, or the limit that the server is started with (ulimit -n)";
        if known > self.limits.inodes {
            log::warn!("the guest gets ENFILE: it knows {known} inodes; raise --max-inodes");
        } else if open >= handles && handles < hard {
            log::warn!(
                "the guest gets ENFILE: it has {open} files, directories and locks open; raise \
                 --max-handles"
            );
        } else if self.count() >= hard {
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
