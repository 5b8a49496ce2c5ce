//! An asynchronous, unbounded channel with many senders and many receivers.
//!
//! Items and waiting receivers are served first in, first out. A waiting receiver sleeps in its own
//! runtime, and each item wakes at most one receiver. The invariants: if a receiver is still
//! asleep, at least as many receivers have been notified but not yet polled as there are queued
//! items; and a notified receiver that is dropped instead of polled notifies another one.
//!
//! There is one lock. It is held for a few instructions and never while a waker runs, so a waker
//! may use the channel.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::PoisonError;
use std::task::{Context, Poll, Waker};

use smallvec::SmallVec;
use thiserror::Error;

use super::sync::{Arc, AtomicUsize, Mutex, MutexGuard, Ordering};

/// Creates an unbounded channel.
#[must_use]
pub fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            items: VecDeque::new(),
            waiters: VecDeque::new(),
            next_id: 0,
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

/// The error of sending on a closed channel; contains what wasn't sent.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the channel is closed")]
pub struct SendError<T>(pub T);

/// The sending end. The channel closes when the last clone is dropped.
pub struct Sender<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Sender<T> {
    /// Sends one item, and wakes a waiting receiver if there is one.
    ///
    /// # Errors
    ///
    /// Fails and returns the item if the channel is closed.
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

    /// Sends several items at once, in order, and wakes up to as many waiting receivers.
    ///
    /// # Errors
    ///
    /// Fails and returns all items if the channel is closed.
    pub fn send_batch<I>(&self, items: I) -> Result<(), SendError<Vec<T>>>
    where
        I: IntoIterator<Item = T>,
    {
        // The iterator is the caller's code, so run it without the lock.
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

    /// Returns the number of receivers that wait for an item and were not woken. This is a hint,
    /// which may be out of date when the caller uses it. Takes no lock.
    #[must_use]
    pub fn idle(&self) -> usize {
        self.shared.idle()
    }

    /// Closes the channel. Nothing more can be sent; receivers get the remaining items, then
    /// `None`.
    pub fn close(&self) {
        self.shared.close();
    }
}

/// The receiving end. When the last clone is dropped, the channel closes and its items are dropped.
pub struct Receiver<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Receiver<T> {
    /// Takes the oldest item, if there is one. Takes no lock if there is none.
    #[must_use]
    pub fn try_recv(&self) -> Option<T> {
        // Relaxed: a hint, which synchronizes nothing (the lock does). An item whose sending
        // happens before this call is counted.
        if self.shared.queued.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut state = self.shared.lock();
        let item = state.items.pop_front();
        self.shared.publish(state);
        item
    }

    /// Waits for an item. Returns `None` once the channel is closed and empty.
    ///
    /// Dropping the future loses no item.
    pub fn recv(&self) -> Recv<'_, T> {
        Recv {
            shared: &self.shared,
            id: None,
        }
    }

    /// Returns the number of waiting receivers, as [`Sender::idle`] does.
    #[must_use]
    pub fn idle(&self) -> usize {
        self.shared.idle()
    }

    /// Closes the channel, as [`Sender::close`] does.
    pub fn close(&self) {
        self.shared.close();
    }
}

/// The future of [`Receiver::recv`].
#[must_use = "futures do nothing unless awaited"]
pub struct Recv<'a, T> {
    shared: &'a Shared<T>,
    /// Set while this is among the waiters, or was woken and not polled yet.
    id: Option<u64>,
}

impl<T> Future for Recv<'_, T> {
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut state = self.shared.lock();
        if let Some(item) = state.items.pop_front() {
            let waiting = self.id.take().and_then(|id| state.leave(id));
            self.shared.publish(state);
            drop(waiting);
            return Poll::Ready(Some(item));
        }
        if state.closed {
            // Closing has woken and removed all waiters.
            drop(state);
            self.id = None;
            return Poll::Ready(None);
        }
        let waker = cx.waker();
        let replaced = match self.id.and_then(|id| state.waiter(id)) {
            Some(waiter) if waiter.waker.will_wake(waker) => None,
            Some(waiter) => Some(std::mem::replace(&mut waiter.waker, waker.clone())),
            None => {
                self.id = Some(state.join(waker.clone()));
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
        let Some(id) = self.id else { return };
        let mut state = self.shared.lock();
        let waiting = state.leave(id);
        // Not among the waiters, so it was woken for an item. Another receiver must take that.
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
    /// Number of items. Stored under the lock, loaded without it.
    queued: AtomicUsize,
    /// Number of waiters. Stored under the lock, loaded without it.
    idle: AtomicUsize,
}

struct State<T> {
    items: VecDeque<T>,
    /// Receivers that wait and were not woken, in order of arrival.
    waiters: VecDeque<Waiter>,
    next_id: u64,
    closed: bool,
    senders: usize,
    receivers: usize,
}

struct Waiter {
    id: u64,
    waker: Waker,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing panics with the state half changed, so poisoning can be ignored.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores the counts that are loaded without the lock, and unlocks.
    ///
    /// Relaxed: the lock orders the stores, and the loads are hints that guard no other data.
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
    /// Removes the first waiter, to be woken after the lock was released.
    fn wake_one(&mut self) -> Option<Waker> {
        self.waiters.pop_front().map(|waiter| waiter.waker)
    }

    fn waiter(&mut self, id: u64) -> Option<&mut Waiter> {
        self.waiters.iter_mut().find(|w| w.id == id)
    }

    fn join(&mut self, waker: Waker) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.waiters.push_back(Waiter { id, waker });
        id
    }

    /// Removes a waiter; returns `None` if it was woken.
    fn leave(&mut self, id: u64) -> Option<Waiter> {
        let at = self.waiters.iter().position(|w| w.id == id)?;
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
        let remaining = std::mem::take(&mut state.items);
        self.shared.publish(state);
        // Without the lock: destructors of items may take long, or use the channel.
        drop(remaining);
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
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(ringfsd_loom)))]
mod tests {
    use std::pin::pin;
    use std::sync::atomic::AtomicUsize as Count;
    use std::task::Wake;

    use super::*;

    /// Counts wake-ups.
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
    fn items_are_received_in_order_of_sending() {
        let (sender, receiver) = channel();
        sender.send(1).unwrap();
        sender.send_batch([2, 3]).unwrap();
        let items: Vec<_> = std::iter::from_fn(|| receiver.try_recv()).collect();
        assert_eq!(items, [1, 2, 3]);
    }

    #[test]
    fn batch_wakes_one_receiver_for_each_item() {
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
    fn receivers_are_woken_in_order_of_waiting() {
        let (sender, receiver) = channel();
        let (mut first, mut second) = (pin!(receiver.recv()), pin!(receiver.recv()));
        let ((first_woken, one), (second_woken, two)) = (counting(), counting());
        assert!(poll(&mut first, &one).is_pending());
        assert!(poll(&mut second, &two).is_pending());
        // Polling again keeps the position.
        assert!(poll(&mut first, &one).is_pending());
        sender.send(1).unwrap();
        assert_eq!(first_woken.0.load(Ordering::Relaxed), 1);
        assert_eq!(second_woken.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn dropped_notified_receiver_notifies_another() {
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
    fn dropped_receiver_is_not_idle() {
        let (sender, receiver) = channel::<()>();
        let mut recv = Box::pin(receiver.recv());
        assert!(poll(&mut recv.as_mut(), Waker::noop()).is_pending());
        assert_eq!(receiver.idle(), 1);
        drop(recv);
        assert_eq!(sender.idle(), 0);
    }

    #[test]
    fn remaining_items_are_received_after_close() {
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
    fn drop_of_last_sender_closes_and_wakes_receivers() {
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
    fn drop_of_last_receiver_drops_items() {
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
