//! An asynchronous channel that many send to and many receive from.
//!
//! First in, first out, for items and for waiting receivers. A receiver that waits sleeps in its
//! own runtime and is woken by at most one item each. The invariants: U receivers waiting and
//! not woken means that at least as many have been woken, and not looked yet, as there are items
//! queued; and a woken receiver that goes away instead of looking wakes another.
//!
//! One lock, held for a few instructions and never while a waker runs; wakers may therefore do
//! what they like, also use the channel.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::PoisonError;
use std::task::{Context, Poll, Waker};

use smallvec::SmallVec;
use thiserror::Error;

use super::sync::{Arc, AtomicUsize, Mutex, MutexGuard, Ordering};

/// Makes a channel without a limit to its length.
#[must_use]
pub fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            items: VecDeque::new(),
            waiters: VecDeque::new(),
            next_ticket: 0,
            closed: false,
            senders: 1,
            receivers: 1,
        }),
        queued: AtomicUsize::new(0),
        idle: AtomicUsize::new(0),
    });
    let sender = Sender {
        shared: Arc::clone(&shared),
    };
    (sender, Receiver { shared })
}

/// The channel is closed; what couldn't be sent.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the channel is closed")]
pub struct SendError<T>(pub T);

/// The end that items are put in. The channel closes when the last of its clones is dropped.
pub struct Sender<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Sender<T> {
    /// Puts one item in and wakes a receiver, if one waits.
    ///
    /// # Errors
    ///
    /// The channel is closed; the item comes back.
    pub fn send(&self, item: T) -> Result<(), SendError<T>> {
        let mut state = self.shared.lock();
        if state.closed {
            return Err(SendError(item));
        }
        state.items.push_back(item);
        let waker = state.wake_one();
        self.shared.publish(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }

    /// Puts several items in at once, in order, and wakes as many receivers as there are items,
    /// if so many wait.
    ///
    /// # Errors
    ///
    /// The channel is closed; all items come back.
    pub fn send_batch<I>(&self, items: I) -> Result<(), SendError<Vec<T>>>
    where
        I: IntoIterator<Item = T>,
    {
        // The iterator is the caller's code and doesn't run under the lock.
        let items: SmallVec<[T; 32]> = items.into_iter().collect();
        let mut wakers: SmallVec<[Waker; 16]> = SmallVec::new();
        let mut state = self.shared.lock();
        if state.closed {
            drop(state);
            return Err(SendError(items.into_vec()));
        }
        for item in items {
            state.items.push_back(item);
            wakers.extend(state.wake_one());
        }
        self.shared.publish(state);
        wakers.into_iter().for_each(Waker::wake);
        Ok(())
    }

    /// Receivers that wait for an item and have not been woken. A hint: it may have changed
    /// when the caller acts on it. Takes no lock.
    #[must_use]
    pub fn idle(&self) -> usize {
        self.shared.idle()
    }

    /// Closes the channel: nothing more can be sent, and receivers get what is left, then
    /// `None`.
    pub fn close(&self) {
        self.shared.close();
    }
}

/// The end that items are taken from. The channel closes when the last of its clones is
/// dropped, and what is in it then is dropped too.
pub struct Receiver<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Receiver<T> {
    /// Takes the oldest item if there is one. Without an item this takes no lock.
    #[must_use]
    pub fn try_recv(&self) -> Option<T> {
        // Relaxed: a hint. It publishes nothing (the lock does), and an item that was sent
        // before this call in the order of events is counted by then.
        if self.shared.queued.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut state = self.shared.lock();
        let item = state.items.pop_front();
        self.shared.publish(state);
        item
    }

    /// Waits for an item; `None` once the channel is closed and empty.
    ///
    /// The future may be dropped at any time without an item being lost.
    pub fn recv(&self) -> Recv<'_, T> {
        Recv {
            shared: &self.shared,
            ticket: None,
        }
    }

    /// Receivers that wait, as [`Sender::idle`].
    #[must_use]
    pub fn idle(&self) -> usize {
        self.shared.idle()
    }

    /// Closes the channel, as [`Sender::close`].
    pub fn close(&self) {
        self.shared.close();
    }
}

/// The future of [`Receiver::recv`].
#[must_use = "futures do nothing unless awaited"]
pub struct Recv<'a, T> {
    shared: &'a Shared<T>,
    /// Set while this is among the waiters, or has been woken and has not looked yet.
    ticket: Option<u64>,
}

impl<T> Future for Recv<'_, T> {
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut state = self.shared.lock();
        if let Some(item) = state.items.pop_front() {
            let waiting = self.ticket.take().and_then(|ticket| state.leave(ticket));
            self.shared.publish(state);
            drop(waiting);
            return Poll::Ready(Some(item));
        }
        if state.closed {
            // Closing has woken, and thereby removed, all waiters.
            drop(state);
            self.ticket = None;
            return Poll::Ready(None);
        }
        let waker = cx.waker();
        let replaced = match self.ticket.and_then(|ticket| state.waiter(ticket)) {
            Some(waiter) if waiter.waker.will_wake(waker) => None,
            Some(waiter) => Some(std::mem::replace(&mut waiter.waker, waker.clone())),
            None => {
                self.ticket = Some(state.join(waker.clone()));
                None
            }
        };
        self.shared.publish(state);
        drop(replaced);
        Poll::Pending
    }
}

impl<T> Drop for Recv<'_, T> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let mut state = self.shared.lock();
        let waiting = state.leave(ticket);
        // Not among the waiters: it was woken for an item, which somebody else must look for.
        let next = if waiting.is_none() && !state.items.is_empty() {
            state.wake_one()
        } else {
            None
        };
        self.shared.publish(state);
        drop(waiting);
        if let Some(next) = next {
            next.wake();
        }
    }
}

struct Shared<T> {
    state: Mutex<State<T>>,
    /// How many items there are; changes under the lock, read without.
    queued: AtomicUsize,
    /// How many waiters there are; changes under the lock, read without.
    idle: AtomicUsize,
}

struct State<T> {
    items: VecDeque<T>,
    /// Receivers that wait and have not been woken, in the order they came.
    waiters: VecDeque<Waiter>,
    next_ticket: u64,
    closed: bool,
    senders: usize,
    receivers: usize,
}

struct Waiter {
    ticket: u64,
    waker: Waker,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing under the lock leaves the state half changed, so poison means nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the counts to those who look without the lock, and unlocks.
    ///
    /// Relaxed: the stores are ordered by the lock, and the loads are hints that nothing else
    /// is read by.
    #[allow(
        clippy::needless_pass_by_value,
        reason = "taking the guard is what ends the locked section"
    )]
    fn publish(&self, state: MutexGuard<'_, State<T>>) {
        self.queued.store(state.items.len(), Ordering::Relaxed);
        self.idle.store(state.waiters.len(), Ordering::Relaxed);
    }

    fn idle(&self) -> usize {
        // Relaxed: a hint, see `publish`.
        self.idle.load(Ordering::Relaxed)
    }

    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let waiters = std::mem::take(&mut state.waiters);
        self.publish(state);
        for waiter in waiters {
            waiter.waker.wake();
        }
    }
}

impl<T> State<T> {
    /// Takes the first waiter out of the list, to be woken when the lock is released.
    fn wake_one(&mut self) -> Option<Waker> {
        self.waiters.pop_front().map(|waiter| waiter.waker)
    }

    fn waiter(&mut self, ticket: u64) -> Option<&mut Waiter> {
        self.waiters.iter_mut().find(|w| w.ticket == ticket)
    }

    fn join(&mut self, waker: Waker) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.waiters.push_back(Waiter { ticket, waker });
        ticket
    }

    /// Takes a waiter out of the list; `None` if it has been woken.
    fn leave(&mut self, ticket: u64) -> Option<Waiter> {
        let at = self.waiters.iter().position(|w| w.ticket == ticket)?;
        self.waiters.remove(at)
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.shared.lock().senders += 1;
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.senders -= 1;
        let last = state.senders == 0;
        drop(state);
        if last {
            self.shared.close();
        }
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        self.shared.lock().receivers += 1;
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.receivers -= 1;
        if state.receivers > 0 {
            return;
        }
        state.closed = true;
        let left = std::mem::take(&mut state.items);
        self.shared.publish(state);
        // Items may have destructors that take time, or use the channel.
        drop(left);
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for Recv<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recv")
            .field("ticket", &self.ticket)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(ringfsd_loom)))]
mod tests {
    use std::pin::pin;
    use std::sync::atomic::AtomicUsize as Count;
    use std::task::Wake;

    use super::*;

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Woken(Count);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn counting() -> (Arc<Woken>, Waker) {
        let woken = Arc::new(Woken::default());
        (Arc::clone(&woken), Waker::from(woken))
    }

    fn poll<T>(recv: &mut Pin<&mut Recv<'_, T>>, waker: &Waker) -> Poll<Option<T>> {
        recv.as_mut().poll(&mut Context::from_waker(waker))
    }

    #[test]
    fn items_come_out_in_the_order_they_went_in() {
        let (sender, receiver) = channel();
        sender.send(1).unwrap();
        sender.send_batch([2, 3]).unwrap();
        let items: Vec<_> = std::iter::from_fn(|| receiver.try_recv()).collect();
        assert_eq!(items, [1, 2, 3]);
    }

    #[test]
    fn a_batch_wakes_no_more_receivers_than_it_has_items() {
        let (sender, receiver) = channel();
        let (woken, waker) = counting();
        let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(receiver.recv())).collect();
        for recv in &mut waiting {
            assert!(poll(&mut recv.as_mut(), &waker).is_pending());
        }
        assert_eq!(sender.idle(), 3);
        sender.send_batch([1, 2]).unwrap();
        assert_eq!(woken.0.load(Ordering::Relaxed), 2);
        assert_eq!(sender.idle(), 1);
    }

    #[test]
    fn receivers_are_served_in_the_order_they_came() {
        let (sender, receiver) = channel();
        let (mut first, mut second) = (pin!(receiver.recv()), pin!(receiver.recv()));
        let ((first_woken, one), (second_woken, two)) = (counting(), counting());
        assert!(poll(&mut first, &one).is_pending());
        assert!(poll(&mut second, &two).is_pending());
        // Looking again doesn't lose the place.
        assert!(poll(&mut first, &one).is_pending());
        sender.send(1).unwrap();
        assert_eq!(first_woken.0.load(Ordering::Relaxed), 1);
        assert_eq!(second_woken.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_woken_receiver_that_is_dropped_passes_the_wake_on() {
        let (sender, receiver) = channel();
        let (woken, waker) = counting();
        let mut first = Box::pin(receiver.recv());
        let mut second = pin!(receiver.recv());
        assert!(poll(&mut first.as_mut(), Waker::noop()).is_pending());
        assert!(poll(&mut second, &waker).is_pending());
        sender.send(1).unwrap();
        assert_eq!(woken.0.load(Ordering::Relaxed), 0);
        drop(first);
        assert_eq!(woken.0.load(Ordering::Relaxed), 1);
        assert_eq!(poll(&mut second, &waker), Poll::Ready(Some(1)));
    }

    #[test]
    fn a_receiver_that_gives_up_is_not_idle() {
        let (sender, receiver) = channel::<()>();
        let mut recv = Box::pin(receiver.recv());
        assert!(poll(&mut recv.as_mut(), Waker::noop()).is_pending());
        assert_eq!(receiver.idle(), 1);
        drop(recv);
        assert_eq!(sender.idle(), 0);
    }

    #[test]
    fn what_is_left_is_received_after_closing() {
        let (sender, receiver) = channel();
        sender.send(1).unwrap();
        receiver.close();
        assert_eq!(sender.send(2), Err(SendError(2)));
        assert_eq!(sender.send_batch([3, 4]), Err(SendError(vec![3, 4])));
        let mut recv = pin!(receiver.recv());
        assert_eq!(poll(&mut recv, Waker::noop()), Poll::Ready(Some(1)));
        let mut recv = pin!(receiver.recv());
        assert_eq!(poll(&mut recv, Waker::noop()), Poll::Ready(None));
    }

    #[test]
    fn the_last_sender_closes_and_wakes_who_waits() {
        let (sender, receiver) = channel::<()>();
        let other = sender.clone();
        let (woken, waker) = counting();
        let mut recv = pin!(receiver.recv());
        assert!(poll(&mut recv, &waker).is_pending());
        drop(sender);
        assert_eq!(woken.0.load(Ordering::Relaxed), 0);
        drop(other);
        assert_eq!(woken.0.load(Ordering::Relaxed), 1);
        assert_eq!(poll(&mut recv, &waker), Poll::Ready(None));
    }

    #[test]
    fn what_nobody_can_receive_any_more_is_dropped() {
        let (sender, receiver) = channel();
        let item = Arc::new(());
        sender.send(Arc::clone(&item)).unwrap();
        drop(receiver.clone());
        assert_eq!(Arc::strong_count(&item), 2);
        drop(receiver);
        assert_eq!(Arc::strong_count(&item), 1);
        assert!(sender.send(item).is_err());
    }
}
