//! All counters of one server, in memory that outlives its processes.
//!
//! The invariant: a counter never decreases, whatever process reads it, as long as the server exists.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::io::Errno;

use super::block::Block;
use super::buckets::bucket_of;
use super::layout::{Layout, OPCODES, PROCESS, Process, Section, Server};
use super::snapshot::{MountUsage, SessionState, Snapshot, Usage};
use super::sum::Reader;
use crate::sys::clock::Clock;
use crate::sys::shared::MappedWords;

/// Why there is no memory for the counters.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The memory can't be allocated.
    #[error("allocating {bytes} bytes, mostly holes, for the counters")]
    Allocate {
        /// Its size.
        bytes: usize,
        /// Why not.
        source: Errno,
    },
    /// The memory can't be mapped.
    #[error("mapping the counters")]
    Map(#[source] Errno),
    /// The memory of the previous process can't be read.
    #[error("reading the counters of the previous process")]
    Read(#[source] Errno),
}

/// Which threads and queues are counted.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Workers. The thread of the high-priority queue isn't among them.
    pub workers: usize,
    /// Queues of the device.
    pub queues: usize,
    /// The name of the operation with this number, if there is one.
    pub operation: fn(u32) -> Option<String>,
}

/// What doesn't change while the process lives.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// What is served: the tag, or the directory.
    pub share: String,
    /// The engine of the workers.
    pub runtime: String,
    /// The number of workers.
    pub workers: usize,
}

/// A time in which no process served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Interruption {
    /// What ended it.
    pub(crate) process: Process,
    /// When it began, on the monotonic clock.
    pub(crate) since: Duration,
}

/// Tells how much of the limited resources is in use. Called by whoever reads the counters.
type ReadUsage = Box<dyn Fn() -> Usage + Send + Sync>;

/// Tells the same of each mount.
type ReadMounts = Box<dyn Fn() -> Vec<MountUsage> + Send + Sync>;

/// The counters of a server.
pub struct Registry {
    words: Arc<MappedWords>,
    layout: Layout,
    shape: Shape,
    /// The opcodes that exist, one bit each.
    known: u64,
    clock: Clock,
    timed: AtomicBool,
    always_timed: AtomicBool,
    facts: OnceLock<Facts>,
    usage: OnceLock<ReadUsage>,
    mounts: OnceLock<ReadMounts>,
    /// The count of evictions when this process began.
    evictions_before: u64,
    session: AtomicU8,
    interruption: Mutex<Option<Interruption>>,
}

impl Registry {
    /// Counters that end with this process.
    ///
    /// # Errors
    ///
    /// There is no address space for them.
    pub fn for_this_process(shape: Shape) -> Result<Arc<Self>, MetricsError> {
        let layout = shape.layout();
        let words = MappedWords::without_file(layout.words()).map_err(MetricsError::Map)?;
        Ok(Self::over(words, layout, shape))
    }

    /// Counters in `file`, a [`SharedFile`](super::SharedFile) for the same shape.
    ///
    /// # Errors
    ///
    /// The file can't be mapped.
    pub(crate) fn in_file(file: OwnedFd, shape: Shape) -> Result<Arc<Self>, MetricsError> {
        let layout = shape.layout();
        let words = MappedWords::map(file, layout.words()).map_err(MetricsError::Map)?;
        Ok(Self::over(words, layout, shape))
    }

    fn over(words: MappedWords, layout: Layout, shape: Shape) -> Arc<Self> {
        let rows = (0..).zip(0..OPCODES);
        let known = rows.fold(0, |known, (number, row)| {
            known | u64::from((shape.operation)(number).is_some()) << row
        });
        let mut this = Self {
            words: Arc::new(words),
            layout,
            shape,
            known,
            clock: Clock::choose(),
            timed: AtomicBool::new(false),
            always_timed: AtomicBool::new(false),
            facts: OnceLock::new(),
            usage: OnceLock::new(),
            mounts: OnceLock::new(),
            evictions_before: 0,
            session: AtomicU8::new(SessionState::Waiting as u8),
            interruption: Mutex::default(),
        };
        this.evictions_before = this.server(Server::Evictions).map_or(0, load);
        if let Some(began) = this.server(Server::Began) {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            let now = now.map_or(0, |now| now.as_secs());
            // Fails if an earlier process has set it.
            let _ = began.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        }
        Arc::new(this)
    }

    /// Measures how long requests take for as long as the process lives.
    pub(crate) fn keep_timed(&self) {
        self.always_timed.store(true, Ordering::Relaxed);
        self.set_timed(true);
    }

    /// Measures from now on how long requests take, or doesn't any more, unless it always does.
    pub fn set_timed(&self, timed: bool) {
        let timed = timed || self.always_timed.load(Ordering::Relaxed);
        if timed {
            self.clock.calibrate();
        }
        self.timed.store(timed, Ordering::Relaxed);
    }

    /// Whether the duration of requests is measured.
    #[inline]
    pub fn is_timed(&self) -> bool {
        self.timed.load(Ordering::Relaxed)
    }

    /// Sets what doesn't change, once.
    pub fn set_facts(&self, facts: Facts) {
        let _ = self.facts.set(facts);
    }

    /// Sets what tells how much of the limited resources is in use, once.
    pub fn set_usage(&self, usage: impl Fn() -> Usage + Send + Sync + 'static) {
        let _ = self.usage.set(Box::new(usage));
    }

    /// Sets what tells the same of each mount, once.
    pub fn set_mounts(&self, mounts: impl Fn() -> Vec<MountUsage> + Send + Sync + 'static) {
        let _ = self.mounts.set(Box::new(mounts));
    }

    /// The session is in this state now.
    pub fn set_session(&self, state: SessionState) {
        self.session.store(state as u8, Ordering::Relaxed);
    }

    /// Sets what interrupted the service until this process serves.
    pub(crate) fn set_interruption(&self, interruption: Option<Interruption>) {
        *self.interruption() = interruption;
    }

    /// The process serves, at this time of the monotonic clock: counts the interruption that has ended.
    pub(crate) fn serves(&self, now: Duration) {
        let Some(Interruption { process, since }) = self.interruption().take() else {
            return;
        };
        let pause = now.saturating_sub(since).as_nanos();
        let pause = u64::try_from(pause).unwrap_or(u64::MAX);
        let first = self.layout.part(Section::Processes).first + process as usize * PROCESS;
        for (at, more) in [(0, 1), (1, pause), (2 + bucket_of(pause), 1)] {
            if let Some(word) = self.word(first + at) {
                word.fetch_add(more, Ordering::Relaxed);
            }
        }
    }

    fn interruption(&self) -> MutexGuard<'_, Option<Interruption>> {
        let interruption = self.interruption.lock();
        interruption.unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an event of the whole server.
    pub(crate) fn count(&self, count: Server) {
        if let Some(word) = self.server(count) {
            word.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Reads all counters. Takes no lock that a request needs, but those for [`Usage`].
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let mut usage = self.usage.get().map(|usage| usage()).unwrap_or_default();
        usage.evictions = self.evictions_before.saturating_add(usage.evictions);
        if let Some(evictions) = self.server(Server::Evictions) {
            usage.evictions = usage
                .evictions
                .max(evictions.fetch_max(usage.evictions, Ordering::Relaxed));
        }
        let facts = self.facts.get().cloned().unwrap_or_default();
        let reader = Reader {
            layout: &self.layout,
            word: |at| self.word(at).map_or(0, load),
        };
        let mut snapshot = reader.read(self.shape.operation);
        snapshot.share = facts.share;
        snapshot.runtime = facts.runtime;
        snapshot.workers = facts.workers;
        snapshot.timed = self.is_timed();
        snapshot.session = SessionState::of(self.session.load(Ordering::Relaxed));
        snapshot.usage = usage;
        snapshot.mounts = self.mounts.get().map(|mounts| mounts()).unwrap_or_default();
        snapshot
    }

    /// The counters of a thread, or of the last one if there are not so many.
    pub(super) fn block(&self, thread: usize) -> Block {
        let thread = thread.min(self.layout.threads.saturating_sub(1));
        let block = Block::new(&self.words, &self.layout, thread);
        block.expect("invariant: each layout has a thread, and its words are mapped")
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    #[inline]
    pub(super) fn word(&self, at: usize) -> Option<&AtomicU64> {
        self.words.get(at)
    }

    /// The opcodes that exist, one bit each.
    pub(super) fn known(&self) -> u64 {
        self.known
    }

    fn server(&self, count: Server) -> Option<&AtomicU64> {
        self.word(self.layout.part(Section::Server).first + count as usize)
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("layout", &self.layout)
            .field("timed", &self.timed)
            .finish_non_exhaustive()
    }
}

impl Shape {
    pub(super) fn layout(&self) -> Layout {
        // One block for the thread of the high-priority queue.
        Layout::new(self.workers + 1, self.queues)
    }
}

fn load(word: &AtomicU64) -> u64 {
    word.load(Ordering::Relaxed)
}
