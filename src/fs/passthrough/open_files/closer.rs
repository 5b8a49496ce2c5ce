//! Closes files in the background if closing takes long: large files without a name.
//!
//! When the last descriptor of such a file is closed, the host frees its space within `close(2)`.
//! That takes milliseconds for a file in memory, and seconds for a large file on a disk. Neither
//! the thread that serves FORGETs nor a worker waits for it: a thread that exists only while there
//! is work does it. The invariant: files are closed in the order in which they were queued, and a
//! waiter returns once all files that were queued before are closed.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::fstat;

/// Files with more bytes than this are closed in the background. Freeing that much costs about as
/// much as starting a thread.
const LARGE: u64 = 1 << 20;

/// The unit of `st_blocks`, in bytes.
const BLOCK: u64 = 512;

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<OwnedFd>,
    /// How many files were queued since the start, and how many of them are closed.
    queued: u64,
    closed: u64,
    /// Whether the thread is running.
    running: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// Notified when a file has been closed.
    progress: Condvar,
    /// The number of descriptors to close. It orders nothing and is used for limits.
    open: AtomicUsize,
}

/// Closes files, in the background if that takes long.
#[derive(Debug, Default)]
pub(crate) struct Closer(Arc<Shared>);

impl Closer {
    /// Closes `fd`, or queues it.
    pub(crate) fn close(&self, fd: OwnedFd) {
        if is_large_and_nameless(&fd) {
            self.close_in_background(fd);
        }
    }

    fn close_in_background(&self, fd: OwnedFd) {
        let mut queue = self.0.queue();
        queue.waiting.push_back(fd);
        self.0.open.fetch_add(1, Ordering::Relaxed);
        queue.queued += 1;
        if queue.running {
            return;
        }
        queue.running = true;
        drop(queue);
        let shared = Arc::clone(&self.0);
        let name = String::from("ringfsd-close");
        let started = std::thread::Builder::new()
            .name(name)
            .spawn(move || shared.close_all());
        if let Err(error) = started {
            log::debug!("can't start a thread, so a large file is closed here: {error}");
            self.0.close_all();
        }
    }

    /// The number of descriptors to close.
    pub(crate) fn count(&self) -> usize {
        self.0.open.load(Ordering::Relaxed)
    }

    /// Returns a function that waits for the queued files, if there are any.
    pub(crate) fn pending(&self) -> Option<Box<dyn FnOnce() + Send>> {
        let queue = self.0.queue();
        if queue.closed == queue.queued {
            return None;
        }
        let queued = queue.queued;
        drop(queue);
        let shared = Arc::clone(&self.0);
        Some(Box::new(move || shared.wait(queued)))
    }
}

impl Drop for Closer {
    fn drop(&mut self) {
        if let Some(wait) = self.pending() {
            wait();
        }
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close_all(&self) {
        let mut queue = self.queue();
        while let Some(fd) = queue.waiting.pop_front() {
            drop(queue);
            drop(fd);
            self.open.fetch_sub(1, Ordering::Relaxed);
            queue = self.queue();
            queue.closed += 1;
            self.progress.notify_all();
        }
        queue.running = false;
    }

    /// Waits until this many files are closed.
    fn wait(&self, queued: u64) {
        let waiting = |queue: &mut Queue| queue.closed < queued;
        let done = self.progress.wait_while(self.queue(), waiting);
        drop(done.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Whether closing `fd` may free much space.
fn is_large_and_nameless(fd: &OwnedFd) -> bool {
    fstat(fd).is_ok_and(|stat| {
        let bytes = u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(BLOCK);
        stat.st_nlink == 0 && bytes > LARGE
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn nameless(bytes: usize) -> OwnedFd {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; bytes]).unwrap();
        file.sync_all().unwrap();
        file.into()
    }

    #[test]
    fn only_large_nameless_files_are_closed_in_background() {
        assert!(is_large_and_nameless(&nameless(2 << 20)));
        assert!(!is_large_and_nameless(&nameless(1000)));
        let mut named = tempfile::NamedTempFile::new().unwrap();
        named.write_all(&vec![1; 2 << 20]).unwrap();
        named.as_file().sync_all().unwrap();
        assert!(!is_large_and_nameless(&named.reopen().unwrap().into()));
    }

    #[test]
    fn wait_returns_after_queued_files_are_closed() {
        let closer = Closer::default();
        assert!(closer.pending().is_none());
        for _ in 0..20 {
            let (read, write) = rustix::pipe::pipe().unwrap();
            closer.close_in_background(write);
            closer.close_in_background(nameless(2 << 20));
            if let Some(wait) = closer.pending() {
                wait();
            }
            assert_eq!(rustix::io::read(&read, &mut [0; 1]), Ok(0), "it is closed");
        }
        assert!(closer.pending().is_none());
    }
}
