//! What a server is doing at this moment, for threads that only look.
//!
//! The invariant: it keeps nothing alive that belongs to a session.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use crate::fs::FileSystem;
use crate::fuse::Session;
use crate::worker::{Observer, WorkerPool};

/// The session that is served, if there is one.
#[derive(Debug, Default)]
pub(super) struct Live(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    session: Option<LiveSession>,
    connections: u64,
}

/// A VMM that is connected.
#[derive(Clone, Debug)]
pub(super) struct LiveSession {
    /// When it has connected, or when this process has resumed its session.
    pub(super) since: Instant,
    pub(super) session: Weak<Session<dyn FileSystem>>,
    pub(super) threads: Observer,
}

impl Live {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that a VMM is served by `pool`.
    pub(super) fn connected(&self, pool: &WorkerPool<dyn FileSystem>) {
        let mut state = self.state();
        state.connections += 1;
        state.session = Some(LiveSession {
            since: Instant::now(),
            session: Arc::downgrade(pool.session()),
            threads: pool.observer(),
        });
    }

    /// Records that no VMM is served any more.
    pub(super) fn disconnected(&self) {
        self.state().session = None;
    }

    /// The session that is served.
    pub(super) fn session(&self) -> Option<LiveSession> {
        self.state().session.clone()
    }

    /// How many VMMs this process has served.
    pub(super) fn connections(&self) -> u64 {
        self.state().connections
    }
}
