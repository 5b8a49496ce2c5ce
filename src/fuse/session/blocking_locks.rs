//! Requests that wait for the guest itself: for a lock that another of its processes holds.
//!
//! Such a wait has no limit of its own. It is ended by INTERRUPT, by the end of the session, and
//! when a queue is stopped, because stopping waits for all requests taken off the queue. The
//! invariant: a wait that has begun is ended by the first of these events, and none begins while a
//! queue is being stopped.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Maximum number of waits in a session; each occupies a thread.
const MAX_WAITS: usize = 256;
/// Maximum number of INTERRUPTs that are kept because their request may still arrive on another
/// queue.
const MAX_EARLY_INTERRUPTS: usize = 64;

/// The waiting requests of a session.
#[derive(Debug, Default)]
pub(super) struct BlockingLocks {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How many [`NoWaits`] exist: queues that are being stopped.
    stops: usize,
    active: HashMap<u64, oneshot::Sender<Errno>>,
    early_interrupts: VecDeque<u64>,
}

impl BlockingLocks {
    /// Registers a wait of the request `unique`. The wait ends by itself after `limit`.
    ///
    /// # Errors
    ///
    /// `ENOLCK` if too many requests wait, `EINTR` if the request was interrupted already, `EAGAIN`
    /// while a queue is being stopped, `EINVAL` if a request with this number waits already.
    pub(super) fn begin(
        self: &Arc<Self>,
        unique: u64,
        limit: Option<Duration>,
    ) -> Result<Wait, Errno> {
        let mut state = self.state();
        if let Some(at) = state
            .early_interrupts
            .iter()
            .position(|early| *early == unique)
        {
            state.early_interrupts.remove(at);
            return Err(Errno::INTR);
        }
        if state.stops != 0 {
            return Err(Errno::AGAIN);
        }
        if state.active.len() >= MAX_WAITS {
            return Err(Errno::NOLCK);
        }
        if state.active.contains_key(&unique) {
            return Err(Errno::INVAL);
        }
        let (end, ended) = oneshot::channel();
        state.active.insert(unique, end);
        Ok(Wait {
            blocking_locks: Arc::clone(self),
            unique,
            ended,
            limit,
        })
    }

    /// INTERRUPT: ends a wait, or keeps the number for a wait that begins later. Request numbers
    /// are never reused, so a number kept in vain does no harm.
    pub(super) fn interrupt(&self, unique: u64) {
        let mut state = self.state();
        if let Some(end) = state.active.remove(&unique) {
            // A wait that has just ended by itself no longer listens.
            let _ = end.send(Errno::INTR);
            return;
        }
        if state.early_interrupts.len() >= MAX_EARLY_INTERRUPTS {
            state.early_interrupts.pop_front();
        }
        state.early_interrupts.push_back(unique);
    }

    /// Ends all waits with `errno`.
    pub(super) fn end_all(&self, errno: Errno) {
        let mut state = self.state();
        state.early_interrupts.clear();
        end_all(&mut state, errno);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn end_all(state: &mut State, errno: Errno) {
    for (_, end) in state.active.drain() {
        let _ = end.send(errno);
    }
}

/// A registered wait; dropping it removes the registration.
#[derive(Debug)]
pub(super) struct Wait {
    blocking_locks: Arc<BlockingLocks>,
    unique: u64,
    ended: oneshot::Receiver<Errno>,
    limit: Option<Duration>,
}

impl Wait {
    /// Completes when the wait must end, with the errno for the request. At the limit that is
    /// `EAGAIN`, for the reason given at [`NoWaits::new`].
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
        // The guest may reuse the number once it has the reply, so it must not be found after that.
        self.blocking_locks.state().active.remove(&self.unique);
    }
}

/// While it exists, no request waits for the guest.
#[derive(Debug)]
#[must_use = "waits begin again when it is dropped"]
pub struct NoWaits(Arc<BlockingLocks>);

impl NoWaits {
    /// Ends all waits.
    ///
    /// The waits end with `EAGAIN`, which a program that requests a lock knows as "held by another
    /// process". On `EINTR` a Linux guest would wait for a signal, and without one return a
    /// kernel-internal number to the program.
    pub(super) fn new(blocking_locks: &Arc<BlockingLocks>) -> Self {
        let mut state = blocking_locks.state();
        state.stops = state.stops.saturating_add(1);
        end_all(&mut state, Errno::AGAIN);
        drop(state);
        Self(Arc::clone(blocking_locks))
    }
}

impl Drop for NoWaits {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.stops = state.stops.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(wait: &mut Wait) -> Option<Errno> {
        wait.ended.try_recv().ok()
    }

    #[test]
    fn interrupt_ends_wait_with_same_number() {
        let blocking_locks = Arc::new(BlockingLocks::default());
        let mut one = blocking_locks.begin(2, None).unwrap();
        let mut other = blocking_locks.begin(4, None).unwrap();
        blocking_locks.interrupt(2);
        assert_eq!(answer(&mut one), Some(Errno::INTR));
        assert_eq!(answer(&mut other), None);
    }

    #[test]
    fn early_interrupt_ends_wait_at_its_start() {
        let blocking_locks = Arc::new(BlockingLocks::default());
        blocking_locks.interrupt(2);
        assert_eq!(blocking_locks.begin(2, None).err(), Some(Errno::INTR));
        assert!(blocking_locks.begin(2, None).is_ok());
        (0..1000).for_each(|unique| blocking_locks.interrupt(unique));
        assert_eq!(
            blocking_locks.state().early_interrupts.len(),
            MAX_EARLY_INTERRUPTS
        );
    }

    #[test]
    fn wait_does_not_begin_while_queue_is_stopped() {
        let blocking_locks = Arc::new(BlockingLocks::default());
        let mut wait = blocking_locks.begin(2, None).unwrap();
        let no_waits = NoWaits::new(&blocking_locks);
        assert_eq!(answer(&mut wait), Some(Errno::AGAIN));
        assert_eq!(blocking_locks.begin(4, None).err(), Some(Errno::AGAIN));
        drop(no_waits);
        assert!(blocking_locks.begin(4, None).is_ok());
    }

    #[test]
    fn waits_are_limited_and_their_numbers_unique() {
        let blocking_locks = Arc::new(BlockingLocks::default());
        let mut waits: Vec<_> = (0..MAX_WAITS as u64)
            .map(|unique| blocking_locks.begin(unique, None).unwrap())
            .collect();
        assert_eq!(blocking_locks.begin(4711, None).err(), Some(Errno::NOLCK));
        waits.pop();
        assert_eq!(blocking_locks.begin(0, None).err(), Some(Errno::INVAL));
        assert!(blocking_locks.begin(4711, None).is_ok());
    }
}
