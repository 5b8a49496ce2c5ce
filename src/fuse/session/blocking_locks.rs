//! Requests that wait for the guest itself: for a lock that another of its processes holds.
//!
//! Whoever waits so may wait without end, and must be able to be ended: by INTERRUPT, by the
//! end of the session, and while a queue is stopped, which waits for all that was taken off it.
//! The invariant: a wait that has begun is ended by the next of these, and none begins while a
//! queue is being stopped.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// The most waits of a session; each costs a thread.
const MOST: usize = 256;
/// INTERRUPT requests that are remembered because their request may yet come: it is on another queue.
const EARLY: usize = 64;

/// The requests that wait.
#[derive(Debug, Default)]
pub(super) struct BlockingLocks {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How many queues are being stopped.
    held: usize,
    under_way: HashMap<u64, oneshot::Sender<Errno>>,
    early: VecDeque<u64>,
}

impl BlockingLocks {
    /// Registers a wait of the request `unique`, which ends by itself after `limit`.
    ///
    /// # Errors
    ///
    /// `ENOLCK` if too many wait, `EINTR` if the request has been interrupted already, `EAGAIN`
    /// while a queue is being stopped, `EINVAL` if a request of that name waits.
    pub(super) fn begin(
        self: &Arc<Self>,
        unique: u64,
        limit: Option<Duration>,
    ) -> Result<Wait, Errno> {
        let mut state = self.state();
        if let Some(at) = state.early.iter().position(|early| *early == unique) {
            state.early.remove(at);
            return Err(Errno::INTR);
        }
        if state.held != 0 {
            return Err(Errno::AGAIN);
        }
        if state.under_way.len() >= MOST {
            return Err(Errno::NOLCK);
        }
        if state.under_way.contains_key(&unique) {
            return Err(Errno::INVAL);
        }
        let (end, ended) = oneshot::channel();
        state.under_way.insert(unique, end);
        Ok(Wait {
            blocking_locks: Arc::clone(self),
            unique,
            ended,
            limit,
        })
    }

    /// INTERRUPT: ends a wait, or remembers to. Names are never used twice, so one that is
    /// remembered in vain does no harm.
    pub(super) fn interrupt(&self, unique: u64) {
        let mut state = self.state();
        if let Some(end) = state.under_way.remove(&unique) {
            // One that has just ended by itself doesn't listen any more.
            let _ = end.send(Errno::INTR);
            return;
        }
        if state.early.len() >= EARLY {
            state.early.pop_front();
        }
        state.early.push_back(unique);
    }

    /// Ends all waits with `errno`.
    pub(super) fn end_all(&self, errno: Errno) {
        let mut state = self.state();
        state.early.clear();
        end_all(&mut state, errno);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn end_all(state: &mut State, errno: Errno) {
    for (_, end) in state.under_way.drain() {
        let _ = end.send(errno);
    }
}

/// One wait; dropped when it is over.
#[derive(Debug)]
pub(super) struct Wait {
    blocking_locks: Arc<BlockingLocks>,
    unique: u64,
    ended: oneshot::Receiver<Errno>,
    limit: Option<Duration>,
}

impl Wait {
    /// Ends when the wait has to, with what the request is to be answered with. At the limit that is
    /// `EAGAIN`, for the reason that [`NoWaits::new`] gives.
    pub(super) async fn ended(&mut self) -> Errno {
        let ended = async { (&mut self.ended).await.unwrap_or(Errno::INTR) };
        match self.limit {
            None => ended.await,
            Some(limit) => timeout(limit, ended).await.unwrap_or(Errno::AGAIN),
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        // The name is free once the guest has its answer, so it must not be found then.
        self.blocking_locks.state().under_way.remove(&self.unique);
    }
}

/// While it lives nothing waits for the guest.
#[derive(Debug)]
#[must_use = "waits begin again when it is dropped"]
pub struct NoWaits(Arc<BlockingLocks>);

impl NoWaits {
    /// Ends all waits.
    ///
    /// With `EAGAIN`, which a program that asked for a lock knows as 'somebody else has it'. To
    /// `EINTR` a Linux guest would wait for the signal that came, and hand a number of its own
    /// to the program where there was none.
    pub(super) fn new(waiting: &Arc<BlockingLocks>) -> Self {
        let mut state = waiting.state();
        state.held = state.held.saturating_add(1);
        end_all(&mut state, Errno::AGAIN);
        drop(state);
        Self(Arc::clone(waiting))
    }
}

impl Drop for NoWaits {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.held = state.held.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(wait: &mut Wait) -> Option<Errno> {
        wait.ended.try_recv().ok()
    }

    #[test]
    fn an_interrupt_ends_the_wait_it_names() {
        let waiting = Arc::new(BlockingLocks::default());
        let mut one = waiting.begin(2, None).unwrap();
        let mut other = waiting.begin(4, None).unwrap();
        waiting.interrupt(2);
        assert_eq!(answer(&mut one), Some(Errno::INTR));
        assert_eq!(answer(&mut other), None);
    }

    #[test]
    fn an_interrupt_that_comes_first_ends_the_wait_as_it_begins() {
        let waiting = Arc::new(BlockingLocks::default());
        waiting.interrupt(2);
        assert_eq!(waiting.begin(2, None).err(), Some(Errno::INTR));
        assert!(waiting.begin(2, None).is_ok());
        (0..1000).for_each(|unique| waiting.interrupt(unique));
        assert_eq!(waiting.state().early.len(), EARLY);
    }

    #[test]
    fn nothing_waits_while_a_queue_is_stopped() {
        let waiting = Arc::new(BlockingLocks::default());
        let mut wait = waiting.begin(2, None).unwrap();
        let held = NoWaits::new(&waiting);
        assert_eq!(answer(&mut wait), Some(Errno::AGAIN));
        assert_eq!(waiting.begin(4, None).err(), Some(Errno::AGAIN));
        drop(held);
        assert!(waiting.begin(4, None).is_ok());
    }

    #[test]
    fn waits_are_bounded_and_their_names_unique() {
        let waiting = Arc::new(BlockingLocks::default());
        let mut waits: Vec<_> = (0..MOST as u64)
            .map(|unique| waiting.begin(unique, None).unwrap())
            .collect();
        assert_eq!(waiting.begin(4711, None).err(), Some(Errno::NOLCK));
        waits.pop();
        assert_eq!(waiting.begin(0, None).err(), Some(Errno::INVAL));
        assert!(waiting.begin(4711, None).is_ok());
    }
}
