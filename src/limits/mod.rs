//! Limits of what a guest may ask of a share: operations and bytes a second.
//!
//! [`Limits`] has the settings, which may change at any time, and the token [`Buckets`] that all
//! workers of a share take from. [`Lanes`] has the requests of one worker that wait for tokens. This
//! room knows neither virtio nor FUSE: a request is a [`Load`]. The invariant: a request is held
//! back only as long as a bucket that it takes from has no token for it.

mod bucket;
mod buckets;
mod clock;
mod lanes;
#[cfg(all(test, ringfsd_loom))]
mod loom_tests;
mod settings;
mod sync;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

pub(crate) use self::buckets::{Buckets, Kind, Load};
pub(crate) use self::clock::Clock;
pub(crate) use self::lanes::Lanes;
pub(crate) use self::settings::LIMITED;
pub(crate) use self::settings::SettingsWords;
pub use self::settings::{NoRate, Rate, Settings};

/// Is told of the buckets, or that there are none. Returns whether to tell it again.
type Watcher = Box<dyn Fn(Option<Arc<Buckets>>) -> bool + Send + Sync>;

/// Where settings are recorded for the process that serves after this one.
pub(crate) trait Record: fmt::Debug + Send + Sync {
    /// Records the settings.
    fn record(&self, words: &SettingsWords);
}

/// The limits of a share, in effect in all its workers.
#[derive(Default)]
pub struct Limits {
    state: Mutex<State>,
    clock: Clock,
}

#[derive(Default)]
struct State {
    settings: Settings,
    /// `None` if nothing is limited.
    buckets: Option<Arc<Buckets>>,
    watchers: Vec<Watcher>,
    record: Option<Arc<dyn Record>>,
}

impl Limits {
    /// Limits as `settings` says. The buckets are full.
    #[must_use]
    pub fn new(settings: Settings) -> Arc<Self> {
        let limits = Self::default();
        {
            let mut state = limits.lock();
            state.settings = settings;
            state.buckets = Buckets::full(&settings).map(Arc::new);
        }
        Arc::new(limits)
    }

    /// Returns the settings in effect.
    #[must_use]
    pub fn settings(&self) -> Settings {
        self.lock().settings
    }

    /// Replaces the settings. They take effect at the next turn of each worker, also for requests
    /// that are held back, and for the processes that resume this one's session. A bucket whose
    /// rate has changed is empty.
    pub fn set(&self, settings: Settings) {
        let mut state = self.lock();
        if let Some(record) = &state.record {
            record.record(&settings.words());
        }
        let now = self.clock.ticks(Instant::now());
        let buckets = Buckets::replacing(&settings, state.buckets.as_deref(), now).map(Arc::new);
        state.settings = settings;
        state.buckets.clone_from(&buckets);
        state.watchers.retain(|watcher| watcher(buckets.clone()));
        log::info!("limits: {settings}");
    }

    /// Records each later [`set`](Self::set).
    pub(crate) fn recording(&self, record: Arc<dyn Record>) {
        self.lock().record = Some(record);
    }

    /// Tells `watcher` of the buckets, at once and whenever others replace them.
    pub(crate) fn watch(
        &self,
        watcher: impl Fn(Option<Arc<Buckets>>) -> bool + Send + Sync + 'static,
    ) {
        let mut state = self.lock();
        let buckets = state.buckets.clone();
        // A server has one session after the other. This drops the watchers of those that have ended.
        state.watchers.retain(|watcher| watcher(buckets.clone()));
        if watcher(buckets) {
            state.watchers.push(Box::new(watcher));
        }
    }

    /// Whether anything is limited.
    pub(crate) fn is_active(&self) -> bool {
        self.lock().buckets.is_some()
    }

    /// The clock that the buckets go by.
    pub(crate) fn clock(&self) -> Clock {
        self.clock
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limits")
            .field("settings", &self.settings())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;

    #[derive(Debug, Default)]
    struct Recorded(Mutex<Vec<SettingsWords>>);

    impl Record for Recorded {
        fn record(&self, words: &SettingsWords) {
            self.0.lock().unwrap().push(*words);
        }
    }

    fn operations(per_second: u64) -> Settings {
        Settings {
            operations: NonZeroU64::new(per_second).map(Rate::of),
            ..Settings::default()
        }
    }

    #[test]
    fn settings_reach_watchers_and_the_record() {
        let limits = Limits::new(Settings::default());
        let recorded = Arc::new(Recorded::default());
        limits.recording(Arc::clone(&recorded) as _);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&seen);
        limits.watch(move |buckets| {
            told.lock().unwrap().push(buckets.is_some());
            true
        });
        assert!(!limits.is_active());
        limits.set(operations(100));
        assert!(limits.is_active());
        limits.set(Settings::default());
        assert_eq!(*seen.lock().unwrap(), [false, true, false]);
        let recorded = recorded.0.lock().unwrap();
        assert_eq!(Settings::from_words(&recorded[0]), operations(100));
        assert_eq!(Settings::from_words(&recorded[1]), Settings::default());
    }

    #[test]
    fn watcher_that_returns_false_is_dropped() {
        let limits = Limits::new(Settings::default());
        let watched = Arc::new(());
        let weak = Arc::downgrade(&watched);
        limits.watch(move |_| weak.upgrade().is_some());
        assert_eq!(Arc::weak_count(&watched), 1);
        limits.watch(|_| false);
        assert_eq!(limits.lock().watchers.len(), 1);
        drop(watched);
        limits.watch(|_| true);
        limits.watch(|_| true);
        assert_eq!(limits.lock().watchers.len(), 2);
    }
}
