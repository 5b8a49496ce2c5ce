//! One thread's ring: entries in, completions out, together for all that one turn of the
//! runtime has done.
//!
//! An operation is put on the submission ring when its future is first polled. A few at a time are
//! handed to the kernel ([`TOGETHER`]), and what is left at the end of the turn
//! ([`Driver::turn`]), whether or not the thread is going to sleep. No more are given to the kernel than the completion ring has
//! room for, so it never overflows; the rest waits here. The invariant: what the kernel may
//! still touch is in [`Slots`], which is dropped only when nothing is on the ring.

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
use super::slots::{Held, Key, Leftover, Slots, outcome};

/// Operations that are handed to the kernel by one call, so that the disk begins with the first while
/// those after them are prepared. Measured at 32 O_DIRECT reads in flight, on a disk that takes up
/// all it finds and tells of it together: 50 thousand a second with one call a turn, 56 with 8, 57 with 4.
const TOGETHER: usize = 4;

/// User data of a cancellation, whose own result says nothing.
const CANCELLATION: u64 = u64::MAX;

/// The ring of one thread.
pub(in crate::io) struct Driver {
    /// Never borrowed while others' code runs: wakers, and the ends of what operations own.
    inner: RefCell<Inner>,
    /// An empty list with room, for [`Driver::reap`].
    leftovers: Cell<Vec<Leftover>>,
}

struct Inner {
    /// Gone when it has been closed.
    ring: Option<IoUring>,
    /// Entries that have been put on the ring and whose completions haven't been taken off it.
    on_ring: usize,
    /// How many of them there may be.
    limit: usize,
    /// Entries that don't fit any more.
    waiting: VecDeque<Entry>,
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
                waiting: VecDeque::new(),
                slots: ManuallyDrop::default(),
            }),
            leftovers: Cell::default(),
        })
    }

    /// Lets the current runtime watch the ring.
    ///
    /// # Safety
    ///
    /// The answer must be dropped before the driver is closed.
    pub(super) unsafe fn watch(&self) -> io::Result<AsyncFd<Watched>> {
        let inner = self.inner.borrow();
        let fd = inner.ring.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: the caller drops this before the ring's descriptor is closed.
        let watched = unsafe { AsyncFd::register_with_interest(Watched(fd), Interest::READABLE) };
        watched.map_err(|error| error.into_parts().1)
    }

    /// Ends a turn: hands what has come together to the kernel, and takes what is complete.
    /// `watched` wakes the runtime for what comes later.
    pub(super) fn turn(&self, watched: &AsyncFd<Watched>, cx: &mut Context<'_>) {
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

    /// Takes what is complete off the ring, without a system call unless the kernel wants one.
    pub(super) fn reap(&self) {
        let mut leftovers = self.leftovers.take();
        self.inner.borrow_mut().reap(&mut leftovers);
        finish(&mut leftovers);
        self.leftovers.set(leftovers);
    }

    /// Whether something is complete; for who looks again and again.
    pub(super) fn has_completions(&self) -> bool {
        self.inner.borrow_mut().has_completions()
    }

    /// Puts an operation on the ring.
    ///
    /// # Safety
    ///
    /// Whatever the entry points to must be owned by `held`, at an address that stays the same
    /// when `held` moves.
    pub(super) unsafe fn start(self: &Rc<Self>, entry: Entry, held: Held) -> Operation {
        let mut inner = self.inner.borrow_mut();
        let key = inner.slots.insert(held);
        let entry = entry.user_data(key.data());
        let leftover = if inner.ring.is_some() {
            inner.give(entry);
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

    /// Cancels what can be cancelled, waits for the kernel to be done with everything, and
    /// closes the ring.
    pub(super) fn close(&self) {
        let mut leftovers = Vec::new();
        self.inner.borrow_mut().cancel_all(&mut leftovers);
        finish(&mut leftovers);
        loop {
            let mut inner = self.inner.borrow_mut();
            let done = inner.on_ring == 0 && inner.waiting.is_empty();
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

/// Runs others' code: wakes, and frees.
fn finish(leftovers: &mut Vec<Leftover>) {
    for leftover in leftovers.drain(..) {
        match leftover {
            Leftover::Waiter(waker) => waker.wake(),
            Leftover::Memory(held) => drop(held),
        }
    }
}

impl Inner {
    /// Puts an entry on the ring, or keeps it until there is room.
    fn give(&mut self, entry: Entry) {
        if self.on_ring < self.limit && self.waiting.is_empty() && self.push(&entry) {
            if self.entries() >= TOGETHER {
                self.submit();
            }
            return;
        }
        self.waiting.push_back(entry);
    }

    /// False if there is no room.
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

    /// Hands all entries to the kernel, as far as it takes them now.
    fn submit(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        while !ring.submission().is_empty() {
            match ring.submit() {
                Ok(0) => return,
                Ok(_) => (),
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => (),
                Err(e) => {
                    log::debug!("handing operations to the kernel: {e}");
                    return;
                }
            }
        }
    }

    fn reap(&mut self, leftovers: &mut Vec<Leftover>) {
        let Some(ring) = &mut self.ring else { return };
        if ring.submission().taskrun() {
            let flags = EnterFlags::GETEVENTS.bits();
            // SAFETY: nothing is submitted, waited for or passed. What it could say (EINTR) means
            // that there is more to come, which the flag shows the next time.
            let _ = unsafe { ring.submitter().enter::<libc::sigset_t>(0, 0, flags, None) };
        }
        for completion in ring.completion() {
            self.on_ring -= 1;
            if let Some(key) = Key::from_data(completion.user_data()) {
                leftovers.extend(self.slots.complete(key, completion.result()));
            }
        }
        if self.waiting.is_empty() {
            return;
        }
        while self.on_ring < self.limit {
            let Some(entry) = self.waiting.pop_front() else {
                break;
            };
            if !self.push(&entry) {
                self.waiting.push_front(entry);
                break;
            }
        }
        self.submit();
    }

    /// How many the kernel hasn't taken.
    fn entries(&mut self) -> usize {
        self.ring.as_mut().map_or(0, |ring| ring.submission().len())
    }

    fn has_completions(&mut self) -> bool {
        self.ring
            .as_mut()
            .is_some_and(|ring| !ring.completion().is_empty() || ring.submission().taskrun())
    }

    /// Gives up what the kernel hasn't been told of, and asks it to give up what it hasn't begun.
    fn cancel_all(&mut self, leftovers: &mut Vec<Leftover>) {
        for entry in std::mem::take(&mut self.waiting) {
            if let Some(key) = Key::from_data(entry.get_user_data()) {
                leftovers.extend(self.slots.complete(key, -libc::ECANCELED));
            }
        }
        for key in self.slots.under_way() {
            let cancel = opcode::AsyncCancel::new(key.data()).build();
            self.give(cancel.user_data(CANCELLATION));
        }
    }

    /// Sleeps until something is complete.
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
            // SAFETY: dropped here only. The kernel has nothing of theirs any more.
            unsafe { ManuallyDrop::drop(&mut self.slots) };
        }
        // Else the memory is lost: that is better than to free what the kernel writes to.
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

/// The descriptor of a ring that somebody else closes.
#[derive(Debug)]
pub(super) struct Watched(RawFd);

impl AsRawFd for Watched {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// One operation under way. Dropped before its end, it goes on all the same.
pub(super) struct Operation {
    driver: Rc<Driver>,
    /// None when it has given its result.
    key: Option<Key>,
}

impl Future for Operation {
    type Output = (io::Result<usize>, Held);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let key = self.key.expect("invariant: not polled after its end");
        let polled = self.driver.inner.borrow_mut().slots.poll(key, cx.waker());
        match polled {
            Ok((result, held)) => {
                self.key = None;
                Poll::Ready((outcome(result), held))
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
