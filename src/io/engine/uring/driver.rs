//! The driver of one thread's ring: submits and reaps operations in batches, once for each turn of
//! the runtime.
//!
//! An operation is put on the submission ring when its future is first polled. Every
//! [`SUBMIT_BATCH`] entries are submitted to the kernel at once, and the rest at the end of the
//! turn ([`Driver::turn`]), whether or not the thread is about to sleep. The kernel never gets more
//! than the completion ring can hold, so that never overflows; further entries wait here. The
//! invariant: everything that the kernel may still access is in [`Slots`], which is dropped only
//! when nothing is on the ring.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use io_uring::squeue::Entry;
use io_uring::{EnterFlags, IoUring, opcode};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::setup;
use super::slots::{Key, Leftover, Resources, Slots, outcome};

/// Operations that are submitted by one call, so that the disk starts on the first while later ones
/// are prepared. Measured at 32 O_DIRECT reads in flight, on a disk that takes all it finds and
/// reports it together: 50 thousand a second with one call a turn, 56 with 8, 57 with 4.
const SUBMIT_BATCH: usize = 4;

/// User data of a cancellation, whose own result is ignored.
const CANCELLATION: u64 = u64::MAX;

/// The ring of one thread.
pub(in crate::io) struct Driver {
    /// Never borrowed while foreign code runs: wakers, and the destructors of resources.
    inner: RefCell<Inner>,
    /// An empty list with capacity, for [`Driver::reap`].
    leftovers: Cell<Vec<Leftover>>,
}

struct Inner {
    /// `None` when it has been closed.
    ring: Option<IoUring>,
    /// Entries that were put on the ring and whose completions haven't been reaped.
    on_ring: usize,
    /// The maximum of `on_ring`.
    limit: usize,
    /// Entries that don't fit on the ring.
    queued: VecDeque<Entry>,
    slots: ManuallyDrop<Slots>,
}

impl Driver {
    /// Sets up a ring of `entries`.
    pub(super) fn new(entries: u32) -> io::Result<Self> {
        let ring = setup::ring(entries)?;
        let limit = ring.params().cq_entries() as usize;
        Ok(Self {
            inner: RefCell::new(Inner {
                ring: Some(ring),
                on_ring: 0,
                limit,
                queued: VecDeque::new(),
                slots: ManuallyDrop::default(),
            }),
            leftovers: Cell::default(),
        })
    }

    /// Registers the ring with the current runtime.
    ///
    /// # Safety
    ///
    /// The returned value must be dropped before the driver is closed.
    pub(super) unsafe fn watch(&self) -> io::Result<AsyncFd<WatchedFd>> {
        let inner = self.inner.borrow();
        let fd = inner.ring.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: the caller drops this before the ring's descriptor is closed.
        let watched = unsafe { AsyncFd::register_with_interest(WatchedFd(fd), Interest::READABLE) };
        watched.map_err(|error| error.into_parts().1)
    }

    /// Ends a turn: submits the collected entries and reaps completions. `watched` wakes the
    /// runtime for later ones.
    pub(super) fn turn(&self, watched: &AsyncFd<WatchedFd>, cx: &mut Context<'_>) {
        self.inner.borrow_mut().submit();
        self.reap();
        if self.inner.borrow().on_ring == 0 {
            return;
        }
        while let Poll::Ready(Ok(mut ready)) = watched.poll_read_ready(cx) {
            ready.clear_ready();
            self.reap();
        }
        if self.inner.borrow_mut().entries() != 0 {
            // The kernel is short of memory for now.
            cx.waker().wake_by_ref();
        }
    }

    /// Reaps completions, without a system call unless the kernel wants one.
    pub(super) fn reap(&self) {
        let mut leftovers = self.leftovers.take();
        self.inner.borrow_mut().reap(&mut leftovers);
        finish(&mut leftovers);
        self.leftovers.set(leftovers);
    }

    /// Whether there are completions to reap; for busy polling.
    pub(super) fn has_completions(&self) -> bool {
        self.inner.borrow_mut().has_completions()
    }

    /// Puts an operation on the ring.
    ///
    /// # Safety
    ///
    /// Everything that the entry points to must be owned by `resources`, at an address that stays
    /// the same when `resources` moves.
    pub(super) unsafe fn start(self: &Rc<Self>, entry: Entry, resources: Resources) -> Operation {
        let mut inner = self.inner.borrow_mut();
        let key = inner.slots.insert(resources);
        let entry = entry.user_data(key.data());
        let leftover = if inner.ring.is_some() {
            inner.enqueue(entry);
            None
        } else {
            inner.slots.complete(key, -libc::ECANCELED)
        };
        drop(inner);
        drop(leftover);
        Operation {
            driver: Rc::clone(self),
            key: Some(key),
        }
    }

    /// Cancels what can be cancelled, waits until the kernel is done with everything, and closes
    /// the ring.
    pub(super) fn close(&self) {
        let mut leftovers = Vec::new();
        self.inner.borrow_mut().cancel_all(&mut leftovers);
        finish(&mut leftovers);
        loop {
            let mut inner = self.inner.borrow_mut();
            let done = inner.on_ring == 0 && inner.queued.is_empty();
            if done {
                inner.ring = None;
            }
            let waited = if done { Ok(()) } else { inner.wait() };
            drop(inner);
            // Frees and wakes, with nothing borrowed.
            self.reap();
            match waited {
                Ok(()) if done => return,
                Ok(()) => (),
                Err(error) => {
                    log::error!("waiting for the last operations of a ring: {error}");
                    return;
                }
            }
        }
    }
}

/// Runs foreign code: wakes tasks and frees resources.
fn finish(leftovers: &mut Vec<Leftover>) {
    for leftover in leftovers.drain(..) {
        match leftover {
            Leftover::Waiter(waker) => waker.wake(),
            Leftover::Memory(resources) => drop(resources),
        }
    }
}

impl Inner {
    /// Puts an entry on the ring, or queues it until there is space.
    fn enqueue(&mut self, entry: Entry) {
        if self.on_ring < self.limit && self.queued.is_empty() && self.push(&entry) {
            if self.entries() >= SUBMIT_BATCH {
                self.submit();
            }
            return;
        }
        self.queued.push_back(entry);
    }

    /// Returns false if there is no space.
    fn push(&mut self, entry: &Entry) -> bool {
        for _ in 0..2 {
            let Some(ring) = &mut self.ring else {
                return false;
            };
            // SAFETY: what the entry points to is owned by a slot until its completion.
            if unsafe { ring.submission().push(entry) }.is_ok() {
                self.on_ring += 1;
                return true;
            }
            self.submit();
        }
        false
    }

    /// Submits all entries, as far as the kernel takes them now.
    fn submit(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        while !ring.submission().is_empty() {
            match ring.submit() {
                Ok(0) => return,
                Ok(_) => (),
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => (),
                Err(e) => {
                    log::debug!("submitting operations to the kernel: {e}");
                    return;
                }
            }
        }
    }

    fn reap(&mut self, leftovers: &mut Vec<Leftover>) {
        let Some(ring) = &mut self.ring else { return };
        if ring.submission().taskrun() {
            let flags = EnterFlags::GETEVENTS.bits();
            // SAFETY: nothing is submitted, waited for or passed. The only error (EINTR) means that
            // there is more to come, which the flag shows the next time.
            let _ = unsafe { ring.submitter().enter::<libc::sigset_t>(0, 0, flags, None) };
        }
        for completion in ring.completion() {
            self.on_ring -= 1;
            if let Some(key) = Key::from_data(completion.user_data()) {
                leftovers.extend(self.slots.complete(key, completion.result()));
            }
        }
        if self.queued.is_empty() {
            return;
        }
        while self.on_ring < self.limit {
            let Some(entry) = self.queued.pop_front() else {
                break;
            };
            if !self.push(&entry) {
                self.queued.push_front(entry);
                break;
            }
        }
        self.submit();
    }

    /// Number of entries that the kernel hasn't taken.
    fn entries(&mut self) -> usize {
        self.ring.as_mut().map_or(0, |ring| ring.submission().len())
    }

    fn has_completions(&mut self) -> bool {
        self.ring
            .as_mut()
            .is_some_and(|ring| !ring.completion().is_empty() || ring.submission().taskrun())
    }

    /// Completes the queued entries as cancelled, and asks the kernel to cancel what it hasn't
    /// started.
    fn cancel_all(&mut self, leftovers: &mut Vec<Leftover>) {
        for entry in std::mem::take(&mut self.queued) {
            if let Some(key) = Key::from_data(entry.get_user_data()) {
                leftovers.extend(self.slots.complete(key, -libc::ECANCELED));
            }
        }
        for key in self.slots.in_flight() {
            let cancel = opcode::AsyncCancel::new(key.data()).build();
            self.enqueue(cancel.user_data(CANCELLATION));
        }
    }

    /// Sleeps until an operation completes.
    fn wait(&mut self) -> io::Result<()> {
        let Some(ring) = &self.ring else {
            return Ok(());
        };
        match ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(e) => match e.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(e),
            },
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.on_ring == 0 {
            // SAFETY: dropped only here. The kernel has no operation any more.
            unsafe { ManuallyDrop::drop(&mut self.slots) };
        }
        // Otherwise the memory is leaked, which is better than freeing memory that the kernel
        // writes to.
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

/// The descriptor of a ring, not owned.
#[derive(Debug)]
pub(super) struct WatchedFd(RawFd);

impl AsRawFd for WatchedFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// One operation in flight. If it is dropped early, the operation still runs to completion.
pub(super) struct Operation {
    driver: Rc<Driver>,
    /// `None` when it has returned its result.
    key: Option<Key>,
}

impl Future for Operation {
    type Output = (io::Result<usize>, Resources);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let key = self.key.expect("invariant: not polled after its end");
        let polled = self.driver.inner.borrow_mut().slots.poll(key, cx.waker());
        match polled {
            Ok((result, resources)) => {
                self.key = None;
                Poll::Ready((outcome(result), resources))
            }
            Err(_old_waker) => Poll::Pending,
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            let leftover = self.driver.inner.borrow_mut().slots.abandon(key);
            drop(leftover);
        }
    }
}
