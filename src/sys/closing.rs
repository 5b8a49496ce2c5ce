//! Makes the kernel release certain files first when the process dies.
//!
//! A dying process closes its descriptors in ascending order, but the kernel releases their files
//! after that, beginning with the one that was closed last (`task_work_add` in the kernel's
//! `fput`). Releasing an unlinked file takes as long as freeing its blocks, which is seconds for
//! thousands of files. Until then, locks, sockets and connections that come later in this order are
//! still held. So each of these has a duplicate whose number is higher than those of the guest's
//! files. The invariant: a duplicate is closed together with its [`First`].

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::fcntl_dupfd_cloexec;

/// How many descriptor numbers are reserved for duplicates below each power of two.
const RESERVED: RawFd = 8;

/// The lowest number of a duplicate: just below the size of the kernel's table after it has grown
/// once.
const LOWEST: RawFd = 256 - RESERVED;

/// All duplicates of the process.
static DUPLICATES: Mutex<Vec<(u64, OwnedFd)>> = Mutex::new(Vec::new());

/// When a descriptor with this number or a higher one is opened, the duplicates move up. Changed
/// under the lock only. A thread that reads an old value moves the duplicates with a later
/// descriptor.
static BOUND: AtomicI32 = AtomicI32::new(LOWEST);

/// The next key of a duplicate. Orders nothing.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// A file that is released before others when the process dies.
#[derive(Debug)]
pub(crate) struct First(u64);

impl First {
    /// The file of `fd`. If no descriptor is left for a duplicate, the file is released in the
    /// usual order.
    pub(crate) fn new(fd: impl AsFd) -> Self {
        let key = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut duplicates = lock();
        match fcntl_dupfd_cloexec(fd, BOUND.load(Ordering::Relaxed)) {
            Ok(duplicate) => duplicates.push((key, duplicate)),
            Err(error) => {
                log::debug!("duplicating a descriptor to release its file first: {error}");
            }
        }
        Self(key)
    }
}

impl Drop for First {
    fn drop(&mut self) {
        lock().retain(|(key, _)| *key != self.0);
    }
}

/// To be called for each descriptor that may keep an unlinked file.
#[inline]
pub(crate) fn opened(fd: RawFd) {
    if fd >= BOUND.load(Ordering::Relaxed) {
        move_above(fd);
    }
}

#[cold]
fn move_above(fd: RawFd) {
    let mut duplicates = lock();
    if fd < BOUND.load(Ordering::Relaxed) {
        return;
    }
    let bound = bound_above(fd);
    BOUND.store(bound, Ordering::Relaxed);
    for (_, duplicate) in duplicates.iter_mut() {
        match fcntl_dupfd_cloexec(&*duplicate, bound) {
            Ok(higher) => *duplicate = higher,
            // No higher number is available.
            Err(error) => {
                log::debug!("moving descriptor {} up: {error}", duplicate.as_raw_fd());
            }
        }
    }
}

/// A number just below the next power of two. The size of the kernel's table is a power of two, so
/// it stays at most twice as large as the guest's files need.
fn bound_above(fd: RawFd) -> RawFd {
    let size = fd
        .saturating_add(RESERVED + 1)
        .cast_unsigned()
        .next_power_of_two();
    RawFd::try_from(size).map_or(RawFd::MAX, |size| size - RESERVED)
}

fn lock() -> MutexGuard<'static, Vec<(u64, OwnedFd)>> {
    DUPLICATES.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn duplicate(first: &First) -> RawFd {
        let duplicates = lock();
        let mut all = duplicates.iter();
        let found = all.find(|(key, _)| *key == first.0).unwrap();
        found.1.as_raw_fd()
    }

    #[test]
    fn duplicate_moves_above_each_opened_descriptor() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let first = First::new(&file);
        assert!(duplicate(&first) >= LOWEST);
        opened(LOWEST - 1);
        let before = duplicate(&first);
        opened(before);
        let after = duplicate(&first);
        assert!(after > before, "{before}, {after}");
    }

    #[test]
    fn bound_reserves_numbers_below_a_power_of_two() {
        assert_eq!(bound_above(0), 8);
        assert_eq!([200, 247].map(bound_above), [248, 248]);
        assert_eq!([248, 255, 503].map(bound_above), [504, 504, 504]);
        for fd in 248..5000 {
            assert!(bound_above(fd) > fd, "{fd}");
        }
        assert_eq!(bound_above(RawFd::MAX), RawFd::MAX);
    }
}
