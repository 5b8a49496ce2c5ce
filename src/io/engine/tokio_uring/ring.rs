//! What is known of the ring of one runtime, which tokio-uring hides.
//!
//! tokio-uring submits operations when its thread is about to sleep, and at no other time. A thread
//! that has always something to do would never submit any, so it is made to sleep for as long as an
//! eventfd takes to wake it. The invariants: no more operations are in flight than the submission
//! ring has entries, so that tokio-uring never finds it full, which it doesn't survive if the kernel
//! refuses to take any; and an operation waits for at most one turn of the runtime before it is
//! submitted.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use rustix::event::{EventfdFlags, eventfd};
use tokio::runtime::{Handle, RuntimeMetrics};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::files::{Files, Unowned};
use crate::io::buffer::GuestBuffer;
use crate::io::descriptor::Descriptor;
use crate::io::event::Event;

/// The largest submission ring (`IORING_MAX_ENTRIES` in the kernel).
const MAX_ENTRIES: u32 = 32768;

/// What an operation uses.
pub(super) struct Resources {
    /// The buffer that it reads into or writes from, if any.
    pub(super) buffer: Option<GuestBuffer>,
    /// Keeps the descriptor open.
    pub(super) _descriptor: Arc<Descriptor>,
    /// Its entry in the submission ring.
    pub(super) _permit: OwnedSemaphorePermit,
}

/// Whether the runtime runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// It is being dropped, and the kernel may still use the memory of dropped operations.
    Closing,
    /// It has been dropped: the kernel has completed all operations.
    Closed,
}

/// The ring of one runtime.
pub(super) struct Ring {
    state: Cell<State>,
    permits: Arc<Semaphore>,
    files: RefCell<Files>,
    /// Resources whose operations have nobody to return them to.
    retired: RefCell<Vec<Resources>>,
    /// The runtime's own waker.
    waker: RefCell<Option<Waker>>,
    metrics: RuntimeMetrics,
    /// How often the thread had slept when an operation was started that may not be submitted yet.
    started_at: Cell<Option<u64>>,
    /// Wakes the thread that is made to sleep. Dropped before the runtime that it is registered with.
    wakeup: RefCell<Option<Wakeup>>,
}

struct Wakeup {
    eventfd: Arc<OwnedFd>,
    readiness: Event,
}

impl Ring {
    /// Must be called within the runtime.
    pub(super) fn new(entries: u32) -> io::Result<Self> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let eventfd = Arc::new(eventfd);
        let wakeup = Wakeup {
            readiness: Event::new(Arc::clone(&eventfd))?,
            eventfd,
        };
        Ok(Self {
            state: Cell::new(State::Open),
            permits: Arc::new(Semaphore::new(entries.clamp(1, MAX_ENTRIES) as usize)),
            files: RefCell::new(Files::take()),
            retired: RefCell::default(),
            waker: RefCell::default(),
            metrics: Handle::current().metrics(),
            started_at: Cell::new(None),
            wakeup: RefCell::new(Some(wakeup)),
        })
    }

    /// Waits until the ring has room for one more operation.
    pub(super) async fn permit(&self) -> OwnedSemaphorePermit {
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        permit.expect("invariant: the semaphore is never closed")
    }

    /// The descriptor as a file of tokio-uring.
    pub(super) fn file(&self, descriptor: &Descriptor) -> Rc<Unowned> {
        self.files.borrow_mut().get(descriptor)
    }

    /// Called before an operation is put on the submission ring.
    pub(super) fn operation_starts(&self) {
        self.started_at.set(Some(self.sleeps()));
    }

    /// Whether the runtime's future is to return at once, so that the thread goes to sleep and
    /// submits what has been started. It is woken immediately.
    pub(super) fn makes_thread_sleep(&self, cx: &mut Context<'_>) -> bool {
        match self.started_at.get() {
            None => return false,
            Some(at) if at != self.sleeps() => {
                self.started_at.set(None);
                return false;
            }
            Some(_) => (),
        }
        let wakeup = self.wakeup.borrow();
        let Some(wakeup) = wakeup.as_ref() else {
            return false;
        };
        while let Poll::Ready(Ok(())) = wakeup.readiness.poll(cx) {}
        rustix::io::write(&wakeup.eventfd, &1u64.to_ne_bytes()).is_ok()
    }

    fn sleeps(&self) -> u64 {
        self.metrics.worker_park_count(0)
    }

    /// Takes resources of an operation that nothing waits for. They are freed in the runtime's next
    /// turn, or once it has been dropped.
    pub(super) fn retire(&self, resources: Resources) {
        self.retired.borrow_mut().push(resources);
        if self.state.get() == State::Open
            && let Some(waker) = &*self.waker.borrow()
        {
            waker.wake_by_ref();
        }
    }

    /// Frees what has been retired; `waker` wakes the runtime for more.
    pub(super) fn free_retired(&self, waker: &Waker) {
        let mut current = self.waker.borrow_mut();
        match &mut *current {
            Some(current) => current.clone_from(waker),
            None => *current = Some(waker.clone()),
        }
        drop(current);
        let retired = std::mem::take(&mut *self.retired.borrow_mut());
        drop(retired);
    }

    /// From now on everything that is retired stays until [`close`](Self::close).
    pub(super) fn begin_closing(&self) {
        self.state.set(State::Closing);
        self.waker.take();
        self.wakeup.take();
    }

    /// Called when the runtime has been dropped. Returns what may be freed now.
    pub(super) fn close(&self) -> Vec<Resources> {
        self.state.set(State::Closed);
        self.files.take().recycle();
        self.retired.take()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state.get() == State::Closed
    }
}
