//! What is closed first when the process dies, of all that it has open.
//!
//! A dying process closes its descriptors in ascending order, but the kernel releases the files behind
//! them after that, beginning with the one that was closed last (`task_work_add` in the kernel's
//! `fput`). To release a file whose last name is gone takes the time of freeing its blocks: with
//! thousands of them seconds, during which locks, sockets and connections that come later in this
//! order are still held. So each of these has a duplicate whose number is higher than those of the
//! files that a guest has. The invariant: a duplicate is closed with its [`First`].

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::fcntl_dupfd_cloexec;

/// As many numbers are kept free for duplicates below each power of two.
const ROOM: RawFd = 8;

/// Where the first duplicates are: below what the kernel's table has room for after it has grown once.
const LOWEST: RawFd = 256 - ROOM;

/// All duplicates of the process.
static DUPLICATES: Mutex<Vec<(u64, OwnedFd)>> = Mutex::new(Vec::new());

/// A descriptor from this number on is higher than the duplicates are to be: they are moved. Changed
/// under the lock only; who reads it too early or too late has them moved with the next descriptor.
static BOUND: AtomicI32 = AtomicI32::new(LOWEST);

/// By which a duplicate is found. Orders nothing.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// Has a file released before others when the process dies.
#[derive(Debug)]
pub(crate) struct First(u64);

impl First {
    /// The file that `fd` is of. If there is no descriptor left for a duplicate, the file is released
    /// when its turn comes.
    pub(crate) fn new(fd: impl AsFd) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut duplicates = lock();
        match fcntl_dupfd_cloexec(fd, BOUND.load(Ordering::Relaxed)) {
            Ok(duplicate) => duplicates.push((number, duplicate)),
            Err(error) => log::debug!("no descriptor by which a file is released first: {error}"),
        }
        Self(number)
    }
}

impl Drop for First {
    fn drop(&mut self) {
        lock().retain(|(number, _)| *number != self.0);
    }
}

/// To be told of each descriptor that may keep a file without a name.
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
            // As high as can be had.
            Err(error) => {
                log::debug!("descriptor {} stays: {error}", duplicate.as_raw_fd());
            }
        }
    }
}

/// Below the next power of two: the kernel's table has such a size, so it is at most twice as large
/// as the guest's files need.
fn bound_above(fd: RawFd) -> RawFd {
    let size = fd
        .saturating_add(ROOM + 1)
        .cast_unsigned()
        .next_power_of_two();
    RawFd::try_from(size).map_or(RawFd::MAX, |size| size - ROOM)
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
        let found = all.find(|(number, _)| *number == first.0).unwrap();
        found.1.as_raw_fd()
    }

    #[test]
    fn duplicate_stays_above_every_descriptor_that_is_opened() {
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
    fn bound_leaves_room_below_a_power_of_two() {
        assert_eq!(bound_above(0), 8);
        assert_eq!([200, 247].map(bound_above), [248, 248]);
        assert_eq!([248, 255, 503].map(bound_above), [504, 504, 504]);
        for fd in 248..5000 {
            assert!(bound_above(fd) > fd, "{fd}");
        }
        assert_eq!(bound_above(RawFd::MAX), RawFd::MAX);
    }
}
