//! The used ring: where chains go back, from whatever thread.
//!
//! Elements are written as chains complete; the index that shows them to the guest is stored
//! once for each batch, by [`UsedRing::publish`], which also calls the guest if it wants that.
//! The invariant: the index never passes an element that is not written yet.
//!
//! Where the queue is tracked, what is in flight is marked under the same lock: a head is marked as
//! its chain is taken, linked to the batch as its element is written, and unmarked once the guest
//! has been shown the index.

#[cfg(all(test, ringfsd_loom))]
mod loom_tests;

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::QueueIndex;
use super::bad_chain::{BadChain, MOST_IN_FLIGHT};
use super::inflight::Inflight;
use super::journal::Journal;
use super::layout;
use super::memory::{GuestAddress, Memory};
use super::sync::{Condvar, Mutex, MutexGuard, Window, fence};

/// The eventfd by which the guest is told of used chains; the front end may change it at any
/// time, also while the queue runs.
#[derive(Debug, Default)]
pub struct Call(Mutex<Option<Eventfd>>);

#[derive(Debug)]
struct Eventfd {
    fd: Arc<std::os::fd::OwnedFd>,
    /// Writing may wait: where the front end has filled the counter up, for ever.
    blocks: bool,
}

impl Call {
    /// Takes another eventfd, or none: then the guest polls.
    pub fn set(&self, eventfd: Option<Arc<std::os::fd::OwnedFd>>) {
        *self.lock() = eventfd.map(|fd| Eventfd {
            blocks: crate::io::writing_blocks(&fd),
            fd,
        });
    }

    /// Calls the guest.
    pub fn signal(&self) {
        let eventfd = self.lock();
        let Some(Eventfd { fd, blocks }) = eventfd.as_ref() else {
            return;
        };
        if *blocks && !crate::io::takes_writing(fd) {
            return;
        }
        if let Err(error) = rustix::io::write(fd, &1u64.to_ne_bytes()) {
            // EAGAIN is a counter at its limit: the guest has been called more than enough.
            log::debug!("calling the guest: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Eventfd>> {
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
    /// Where the ring's own changes are logged, if the front end asked for that.
    log: Option<(Arc<Memory>, GuestAddress)>,
    call: Arc<Call>,
    /// What became of each head in flight.
    journal: Option<Journal>,
    state: Mutex<State>,
    drained: Condvar,
}

/// What went through a queue since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Chains returned.
    pub chains: u64,
    /// Chains returned without an answer, by being dropped.
    pub dropped: u64,
    /// Chains returned empty because of a fault in them.
    pub refused: u64,
    /// Bytes that were copied between guest memory and the server's: headers, arguments and
    /// replies, but no payload of READ and WRITE.
    pub copied: u64,
}

#[derive(Debug)]
struct State {
    /// Elements written, modulo 2¹⁶.
    next: u16,
    /// Elements the guest has been shown.
    published: u16,
    /// The index at the last decision about a call; none before the first.
    signalled: Option<u16>,
    /// Chains taken off the ring and not yet written back.
    in_flight: u16,
    /// Pieces of memory that they are made of.
    pieces: usize,
    /// Somebody waits for `in_flight` to become 0.
    draining: bool,
    totals: QueueStats,
    /// Where heads in flight are marked, if the queue is tracked.
    inflight: Option<Inflight>,
}

/// A chain's way back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Return {
    pub(super) head: u16,
    /// Bytes written.
    pub(super) len: u32,
    /// Pieces that [`UsedRing::take`] has counted.
    pub(super) pieces: usize,
    /// The head is marked as in flight for this chain.
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
        // Relaxed: whoever ran this ring before has been drained and joined by the front.
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
                pieces: 0,
                draining: false,
                totals: QueueStats::default(),
                inflight: None,
            }),
            drained: Condvar::new(),
        }
    }

    /// Marks what is in flight from now on, and keeps a journal of it.
    pub(super) fn track(&mut self, inflight: Inflight, journal: Option<Journal>) {
        self.lock().inflight = Some(inflight);
        self.journal = journal;
    }

    /// The used ring's index: how many chains were ever returned, modulo 2¹⁶.
    pub(super) fn returned(&self) -> u16 {
        self.lock().published
    }

    /// Calls the guest for what it may have been shown before, without having been called.
    pub(super) fn call_again(&self) {
        self.call.signal();
    }

    /// What became of each head in flight, if that is kept.
    pub(super) fn journal(&self) -> Option<&Journal> {
        self.journal.as_ref()
    }

    /// Which queue this is.
    #[must_use]
    pub fn index(&self) -> QueueIndex {
        self.index
    }

    /// Counts a chain of `pieces` as taken, and marks its head as in flight unless it is so
    /// from before: `again`. Answers whether it is marked now, for this chain.
    ///
    /// # Errors
    ///
    /// More than the queue may have in flight, or a head that is in flight, which a right driver
    /// never has: the pieces are not counted then, and the chain is to be returned at once.
    pub(super) fn take(
        &self,
        head: u16,
        pieces: usize,
        again: bool,
    ) -> (bool, Result<(), BadChain>) {
        let mut state = self.lock();
        let before = state.in_flight;
        state.in_flight = before.saturating_add(1);
        let mut marked = again;
        if !again && let Some(inflight) = &mut state.inflight {
            // What has no entry is refused by who walks the chain.
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
        let all = state.pieces.saturating_add(pieces);
        if all > MOST_IN_FLIGHT {
            return (marked, Err(BadChain::PiecesInFlight));
        }
        state.pieces = all;
        (marked, Ok(()))
    }

    /// Writes the element that returns a chain; `more` is what that adds to the totals. The guest
    /// sees it with the next [`publish`](Self::publish).
    pub(super) fn push(&self, chain: Return, more: QueueStats) {
        let mut state = self.lock();
        state.pieces = state.pieces.saturating_sub(chain.pieces);
        state.totals.chains = state.totals.chains.wrapping_add(more.chains);
        state.totals.dropped = state.totals.dropped.wrapping_add(more.dropped);
        state.totals.refused = state.totals.refused.wrapping_add(more.refused);
        state.totals.copied = state.totals.copied.wrapping_add(more.copied);
        if !chain.marked && state.inflight.is_some() && state.next != state.published {
            self.store_index(&mut state);
        }
        if let Some(inflight) = &mut state.inflight {
            if chain.marked {
                inflight.link(chain.head);
            } else {
                inflight.cut();
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
        // To notify is a system call, also where nobody waits.
        if state.in_flight == 0 && state.draining {
            self.drained.notify_all();
        }
    }

    /// Shows the guest all elements written so far: one store of the index, and at most one
    /// call, where the guest wants it.
    pub fn publish(&self) {
        if self.show() {
            self.call.signal();
        }
    }

    /// Stores the index; answers whether the guest wants to be called for that.
    fn show(&self) -> bool {
        let mut state = self.lock();
        if state.next == state.published {
            return false;
        }
        self.store_index(&mut state);
        self.wants_call(&mut state)
    }

    fn store_index(&self, state: &mut State) {
        let next = state.next;
        state.published = next;
        // Release: pairs with the driver's acquire load of the index; elements and replies
        // come before it.
        self.used.store_u16(layout::INDEX, next, Ordering::Release);
        self.log_change(layout::INDEX, 2);
        // Behind the index, which says that the marks are out of date.
        if let Some(inflight) = &mut state.inflight {
            inflight.shown(next);
        }
    }

    /// Whether the guest wants to be called for what was published since last asked (virtio
    /// 1.2, section 2.7.7).
    fn wants_call(&self, state: &mut State) -> bool {
        let new = state.published;
        let old = state.signalled.replace(new);
        // SeqCst: pairs with the driver's full barrier between its store of `used_event` (or
        // its flags) and its last look at the index: one of the two sees the other.
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

    /// Waits until every chain taken has come back, and publishes them. Whoever calls this has
    /// made sure that no further chain is taken.
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

    /// How many chains have been taken and not yet come back.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.lock().in_flight
    }

    /// What went through the queue so far.
    #[must_use]
    pub fn totals(&self) -> QueueStats {
        self.lock().totals
    }

    /// Asks the driver for a kick when its available index passes `next`, or for none. Who asks
    /// for one looks at the ring afterwards: there may be no kick for what came before.
    pub(super) fn want_kick(&self, next: Option<u16>) {
        // Relaxed: the fence below orders these before that look.
        if self.event_idx {
            if let Some(next) = next {
                self.want_kick_at(next);
            }
            return;
        }
        let flags = if next.is_some() { 0 } else { layout::NO_NOTIFY };
        self.used.store_u16(layout::FLAGS, flags, Ordering::Relaxed);
        self.log_change(layout::FLAGS, 2);
        if next.is_some() {
            // SeqCst: pairs with the driver's full barrier between its store of the index and its
            // look at our flags: one of the two sees the other.
            fence(Ordering::SeqCst);
        }
    }

    /// Asks the driver for a kick when its available index passes `next`, if it can be asked for that.
    pub(super) fn want_kick_at(&self, next: u16) {
        if !self.event_idx {
            return;
        }
        let at = layout::avail_event(self.size);
        self.used.store_u16(at, next, Ordering::Relaxed);
        self.log_change(at, 2);
        // SeqCst: pairs with the driver's full barrier between its store of the index and its
        // look at `avail_event`: one of the two sees the other.
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
