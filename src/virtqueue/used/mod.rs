//! The used ring, to which any thread returns chains.
//!
//! An element is written when its chain completes. [`UsedRing::publish`] stores the index, which
//! makes the elements visible to the guest, once for each batch, and calls the guest if it wants
//! that. The invariant: the index never passes an element that is not written yet.
//!
//! If the queue is tracked, the same lock protects the marks of the heads in flight: a head is
//! marked when its chain is taken, linked to the batch when its element is written, and unmarked
//! after the index was published.

#[cfg(all(test, ringfsd_loom))]
mod loom_tests;

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::QueueIndex;
use super::bad_chain::{BadChain, MAX_SEGMENTS_IN_FLIGHT};
use super::inflight::Inflight;
use super::journal::Journal;
use super::layout;
use super::sync::{Condvar, Mutex, MutexGuard, Window, fence};
use crate::guest_memory::{GuestAddress, Memory};

/// What notifies the guest of used chains: an eventfd or a function. The front end may replace it at
/// any time, also while the queue runs.
#[derive(Debug, Default)]
pub struct Call(Mutex<Option<Notifier>>);

enum Notifier {
    Eventfd {
        fd: Arc<std::os::fd::OwnedFd>,
        /// Whether a write may block; it blocks forever if the front end has filled the counter.
        blocks: bool,
    },
    Function(Arc<dyn Fn() + Send + Sync>),
}

impl std::fmt::Debug for Notifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Eventfd { fd, blocks } => f
                .debug_struct("Eventfd")
                .field("fd", fd)
                .field("blocks", blocks)
                .finish(),
            Self::Function(_) => f.write_str("Function"),
        }
    }
}

impl Call {
    /// Calls by a write to `eventfd`.
    #[must_use]
    pub fn eventfd(eventfd: Arc<std::os::fd::OwnedFd>) -> Arc<Self> {
        let call = Self::default();
        call.set(Some(eventfd));
        Arc::new(call)
    }

    /// Calls by running `function` on the thread that has returned chains: it must not block, and
    /// must not panic.
    #[must_use]
    pub fn function(function: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        let call = Self::default();
        *call.lock() = Some(Notifier::Function(Arc::new(function)));
        Arc::new(call)
    }

    /// Replaces the eventfd. Without one the guest polls.
    pub fn set(&self, eventfd: Option<Arc<std::os::fd::OwnedFd>>) {
        *self.lock() = eventfd.map(|fd| Notifier::Eventfd {
            blocks: crate::io::writing_blocks(&fd),
            fd,
        });
    }

    /// Calls the guest.
    pub fn signal(&self) {
        let notifier = self.lock();
        let (fd, blocks) = match notifier.as_ref() {
            None => return,
            Some(Notifier::Eventfd { fd, blocks }) => (fd, blocks),
            Some(Notifier::Function(function)) => {
                let function = Arc::clone(function);
                // The function may set another notifier.
                drop(notifier);
                function();
                return;
            }
        };
        if *blocks && !crate::io::takes_writing(fd) {
            return;
        }
        if let Err(error) = rustix::io::write(fd, &1u64.to_ne_bytes()) {
            // EAGAIN says that the counter is at its limit, so the guest has calls pending anyway.
            log::debug!("calling the guest: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Notifier>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Display for QueueStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            chains,
            dropped,
            refused,
            copied,
        } = self;
        write!(
            f,
            "{chains} chains returned, {dropped} of them dropped, {refused} faulty, {copied} bytes \
             copied"
        )
    }
}

/// The device's side of a queue's used ring, shared by all its chains.
#[derive(Debug)]
pub struct UsedRing {
    index: QueueIndex,
    size: u16,
    event_idx: bool,
    used: Window,
    available: Arc<Window>,
    /// Memory and guest address with which changes of the ring are logged, if the front end asked
    /// for that.
    log: Option<(Arc<Memory>, GuestAddress)>,
    call: Arc<Call>,
    /// Records the progress of each request in flight.
    journal: Option<Journal>,
    state: Mutex<State>,
    drained: Condvar,
}

/// Statistics of a queue since it was set up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Chains returned.
    pub chains: u64,
    /// Chains that were dropped without a reply.
    pub dropped: u64,
    /// Chains that were returned empty for a fault.
    pub refused: u64,
    /// Bytes copied between guest memory and the server's memory: headers, arguments and replies,
    /// but not the payload of READ and WRITE.
    pub copied: u64,
}

/// What one store of the index has published.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Published {
    /// Chains.
    pub(crate) chains: u16,
    /// Whether the guest was called.
    pub(crate) called: bool,
}

#[derive(Debug)]
struct State {
    /// Elements written, modulo 2¹⁶.
    next: u16,
    /// Elements published to the guest, modulo 2¹⁶.
    published: u16,
    /// The index at the last decision about a call; `None` before the first.
    signalled: Option<u16>,
    /// Chains taken off the ring and not returned yet.
    in_flight: u16,
    /// Memory segments of these chains.
    segments: usize,
    /// Whether a thread waits for `in_flight` to become 0.
    draining: bool,
    stats: QueueStats,
    /// The marks of the heads in flight, if the queue is tracked.
    inflight: Option<Inflight>,
}

/// A chain to be returned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Return {
    pub(super) head: u16,
    /// Bytes of the reply.
    pub(super) len: u32,
    /// Segments that [`UsedRing::begin`] has counted.
    pub(super) segments: usize,
    /// Whether the head is marked as in flight for this chain.
    pub(super) marked: bool,
}

impl UsedRing {
    pub(super) fn new(
        index: QueueIndex,
        size: u16,
        event_idx: bool,
        used: Window,
        available: Arc<Window>,
        log: Option<(Arc<Memory>, GuestAddress)>,
        call: Arc<Call>,
    ) -> Self {
        // Relaxed: the session has drained and joined the threads that ran this ring before.
        let next = used.load_u16(layout::INDEX, Ordering::Relaxed);
        Self {
            index,
            size,
            event_idx,
            used,
            available,
            log,
            call,
            journal: None,
            state: Mutex::new(State {
                next,
                published: next,
                signalled: None,
                in_flight: 0,
                segments: 0,
                draining: false,
                stats: QueueStats::default(),
                inflight: None,
            }),
            drained: Condvar::new(),
        }
    }

    /// Starts to mark heads in flight, and to record the requests in `journal`.
    pub(super) fn track(&mut self, inflight: Inflight, journal: Option<Journal>) {
        self.lock().inflight = Some(inflight);
        self.journal = journal;
    }

    /// Returns the index of the used ring: the number of chains published so far, modulo 2¹⁶.
    pub(crate) fn published_index(&self) -> u16 {
        self.lock().published
    }

    /// Calls the guest, whether it wants that or not.
    pub(super) fn signal_call(&self) {
        self.call.signal();
    }

    /// Returns the journal, if there is one.
    pub(super) fn journal(&self) -> Option<&Journal> {
        self.journal.as_ref()
    }

    /// Returns the index of the queue.
    #[must_use]
    pub fn index(&self) -> QueueIndex {
        self.index
    }

    /// Counts a chain of `segments` as in flight, and marks its head unless it is marked already,
    /// as `resumed` says. Returns whether the head is marked for this chain, and the outcome.
    ///
    /// # Errors
    ///
    /// Fails if the queue has too much in flight, or if the head is in flight already, which no
    /// correct driver causes. Then the segments are not counted, and the caller must return the
    /// chain at once.
    pub(super) fn begin(
        &self,
        head: u16,
        segments: usize,
        resumed: bool,
    ) -> (bool, Result<(), BadChain>) {
        let mut state = self.lock();
        let before = state.in_flight;
        state.in_flight = before.saturating_add(1);
        let mut marked = resumed;
        if !resumed && let Some(inflight) = &mut state.inflight {
            // A head without an entry is refused when the chain is walked.
            if head < self.size && !inflight.is_free(head) {
                return (false, Err(BadChain::Twice));
            }
            if head < self.size {
                if let Some(journal) = &self.journal {
                    journal.begin(head, inflight.counter());
                }
                inflight.mark(head);
                marked = true;
            }
        }
        if before >= self.size {
            return (marked, Err(BadChain::TooMany));
        }
        let all = state.segments.saturating_add(segments);
        if all > MAX_SEGMENTS_IN_FLIGHT {
            return (marked, Err(BadChain::TooManySegmentsInFlight));
        }
        state.segments = all;
        (marked, Ok(()))
    }

    /// Writes the element that returns a chain, and adds `more` to the statistics. The guest sees
    /// the element after the next [`publish`](Self::publish).
    pub(super) fn push(&self, chain: Return, more: QueueStats) {
        let mut state = self.lock();
        state.segments = state.segments.saturating_sub(chain.segments);
        state.stats.chains = state.stats.chains.wrapping_add(more.chains);
        state.stats.dropped = state.stats.dropped.wrapping_add(more.dropped);
        state.stats.refused = state.stats.refused.wrapping_add(more.refused);
        state.stats.copied = state.stats.copied.wrapping_add(more.copied);
        if !chain.marked && state.inflight.is_some() && state.next != state.published {
            self.store_index(&mut state);
        }
        if let Some(inflight) = &mut state.inflight {
            if chain.marked {
                inflight.link(chain.head);
            } else {
                inflight.end_list();
            }
        }
        let at = layout::used_element(state.next, self.size);
        let mut element = [0; 8];
        let (id, length) = element.split_at_mut(4);
        id.copy_from_slice(&u32::from(chain.head).to_le_bytes());
        length.copy_from_slice(&chain.len.to_le_bytes());
        self.used.write(at, &element);
        self.log_change(at, element.len());
        state.next = state.next.wrapping_add(1);
        state.in_flight = state.in_flight.saturating_sub(1);
        // Notifying is a system call even if no thread waits.
        if state.in_flight == 0 && state.draining {
            self.drained.notify_all();
        }
    }

    /// Makes all elements written so far visible to the guest, with one store of the index. Calls
    /// the guest if it wants that.
    pub fn publish(&self) {
        self.publish_counted();
    }

    /// As [`publish`](Self::publish); returns what was published.
    pub(crate) fn publish_counted(&self) -> Published {
        let published = self.publish_index();
        if published.called {
            self.call.signal();
        }
        published
    }

    /// Stores the index if elements were added. Returns how many, and whether the guest wants a call
    /// for that.
    fn publish_index(&self) -> Published {
        let mut state = self.lock();
        let chains = state.next.wrapping_sub(state.published);
        if chains == 0 {
            return Published::default();
        }
        self.store_index(&mut state);
        Published {
            chains,
            called: self.wants_call(&mut state),
        }
    }

    fn store_index(&self, state: &mut State) {
        let next = state.next;
        state.published = next;
        // Release: pairs with the driver's acquire load of the index, and orders elements and
        // replies before it.
        self.used.store_u16(layout::INDEX, next, Ordering::Release);
        self.log_change(layout::INDEX, 2);
        // After the index, which tells the next process that these marks are obsolete.
        if let Some(inflight) = &mut state.inflight {
            inflight.published(next);
        }
    }

    /// Whether the guest wants a call for the elements published since the last decision (virtio
    /// 1.2, section 2.7.7).
    fn wants_call(&self, state: &mut State) -> bool {
        let new = state.published;
        let old = state.signalled.replace(new);
        // SeqCst: pairs with the driver's full barrier between its store of `used_event` (or
        // its flags) and its last load of the index: at least one side sees the other's store.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self
                .available
                .load_u16(layout::used_event(self.size), Ordering::Relaxed);
            old.is_none_or(|old| layout::passes(event, new, old))
        } else {
            let flags = self.available.load_u16(layout::FLAGS, Ordering::Relaxed);
            flags & layout::NO_INTERRUPT == 0
        }
    }

    /// Waits until all chains that were taken have been returned, and publishes them. The caller
    /// must ensure that no further chain is taken.
    pub fn drain(&self) {
        self.wait_until_drained();
        self.publish();
    }

    fn wait_until_drained(&self) {
        let mut state = self.lock();
        state.draining = true;
        while state.in_flight != 0 {
            state = self
                .drained
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.draining = false;
    }

    /// Returns the number of chains that were taken and not returned yet.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.lock().in_flight
    }

    /// Returns the statistics of the queue so far.
    #[must_use]
    pub fn stats(&self) -> QueueStats {
        self.lock().stats
    }

    /// Asks the driver for a kick when its available index passes `next`, or for no kick if `None`.
    /// After asking for one the caller must check the ring again: chains that were added before may
    /// come without a kick.
    pub(super) fn request_kick(&self, next: Option<u16>) {
        // Relaxed: the fence below orders these stores before that check.
        if self.event_idx {
            if let Some(next) = next {
                self.request_kick_at(next);
            }
            return;
        }
        let flags = if next.is_some() { 0 } else { layout::NO_NOTIFY };
        self.used.store_u16(layout::FLAGS, flags, Ordering::Relaxed);
        self.log_change(layout::FLAGS, 2);
        if next.is_some() {
            // SeqCst: pairs with the driver's full barrier between its store of the index and its
            // load of these flags: at least one side sees the other's store.
            fence(Ordering::SeqCst);
        }
    }

    /// Asks the driver for a kick when its available index passes `next`. Does nothing without
    /// EVENT_IDX.
    pub(super) fn request_kick_at(&self, next: u16) {
        if !self.event_idx {
            return;
        }
        let at = layout::avail_event(self.size);
        self.used.store_u16(at, next, Ordering::Relaxed);
        self.log_change(at, 2);
        // SeqCst: pairs with the driver's full barrier between its store of the index and its
        // load of `avail_event`: at least one side sees the other's store.
        fence(Ordering::SeqCst);
    }

    fn log_change(&self, offset: usize, len: usize) {
        if let Some((memory, start)) = &self.log {
            memory.mark_dirty(start.saturating_add(offset as u64), len as u64);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
