//! Closing what takes long to close: large files that have no name any more.
//!
//! With the last descriptor of such a file the host frees its space, in the middle of `close(2)`:
//! milliseconds for what is in memory, seconds for what is large on a disk. Neither the thread that
//! serves FORGETs nor a worker waits for that; a thread does it that is there only while it has
//! something to do. The invariant: what was given here is closed in the order in which it came, and
//! whoever waits finds all of it closed that was given before.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, fstat};

use super::Passthrough;
use super::inode::{Inode, RefKind};
use crate::fs::NodeId;
use crate::io::File;

/// Files that take more than this are closed elsewhere: about what costs as much to free as a
/// thread costs to start.
const LARGE: u64 = 1 << 20;

/// The unit of `st_blocks`.
const BLOCK: u64 = 512;

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<OwnedFd>,
    /// How many were ever given here, and how many of them are closed.
    queued: u64,
    closed: u64,
    /// There is a thread.
    running: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// Something was closed.
    progress: Condvar,
    /// How many descriptors are to be closed. Orders nothing; a budget goes by it.
    open: AtomicUsize,
}

/// Closes files, on a thread of its own where that takes long.
#[derive(Debug, Default)]
pub(super) struct Closer(Arc<Shared>);

impl Closer {
    /// Closes `fd`, or has it closed.
    pub(super) fn close(&self, fd: OwnedFd) {
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
            log::debug!("closing a large file takes this thread's time: {error}");
            self.0.close_all();
        }
    }

    /// How many descriptors are to be closed.
    pub(super) fn count(&self) -> usize {
        self.0.open.load(Ordering::Relaxed)
    }

    /// A wait for what isn't closed yet, if there is anything.
    pub(super) fn pending(&self) -> Option<Box<dyn FnOnce() + Send>> {
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

    /// Waits until so many are closed.
    fn wait(&self, queued: u64) {
        let waiting = |queue: &mut Queue| queue.closed < queued;
        let done = self.progress.wait_while(self.queue(), waiting);
        drop(done.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Whether to close `fd` may free much.
fn is_large_and_nameless(fd: &OwnedFd) -> bool {
    fstat(fd).is_ok_and(|stat| {
        let bytes = u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(BLOCK);
        stat.st_nlink == 0 && bytes > LARGE
    })
}

impl Passthrough {
    /// Whether `inode` may be a file that ends with its descriptor.
    pub(super) fn may_be_nameless(inode: &Inode) -> bool {
        inode.kind() == FileType::RegularFile && matches!(&*inode.ref_kind(), RefKind::Nothing)
    }

    /// Closes the descriptor of an inode that was forgotten, unless somebody still uses it.
    pub(super) fn close_forgotten(&self, inode: Arc<Inode>) {
        if let Some(fd) = Arc::into_inner(inode).and_then(Inode::into_descriptor) {
            self.closer.close(fd);
        }
    }

    /// Closes what was kept open of a node that the guest has forgotten, or whose inode has lost its
    /// last name.
    pub(super) fn close_idle_files(&self, node: NodeId) {
        let kept = self.handleless.forget(node);
        kept.into_iter()
            .flatten()
            .for_each(|file| self.close_file(node, file));
        self.close_cached(node);
    }

    /// Closes what is put by for when the guest opens `node` again.
    pub(super) fn close_cached(&self, node: NodeId) {
        while let Some(file) = self.closed_fds.take(node) {
            self.close_file(node, file);
        }
    }

    /// Closes a file that was open for the guest as `node`.
    pub(super) fn close_file(&self, node: NodeId, file: File) {
        // The inode's own descriptor keeps it.
        let kept = self.inodes.get(node);
        if kept.is_some_and(|inode| inode.slot().is_full()) {
            return;
        }
        if let Some(fd) = file.into_fd() {
            self.closer.close(fd);
        }
    }
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
    fn only_large_files_without_a_name_are_closed_elsewhere() {
        assert!(is_large_and_nameless(&nameless(2 << 20)));
        assert!(!is_large_and_nameless(&nameless(1000)));
        let mut named = tempfile::NamedTempFile::new().unwrap();
        named.write_all(&vec![1; 2 << 20]).unwrap();
        named.as_file().sync_all().unwrap();
        assert!(!is_large_and_nameless(&named.reopen().unwrap().into()));
    }

    #[test]
    fn who_waits_finds_closed_what_was_given_before() {
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
