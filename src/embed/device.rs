//! A virtio-fs device in the process of its VMM: its threads, its queues and the guest's session.
//!
//! The invariant: threads exist from the first activation or load until the device is dropped, and
//! none of them touches a ring of a queue that is stopped.

use std::num::{NonZeroU16, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

use super::error::DeviceError;
use super::queue::{QueueSetup, RingState};
use crate::device::{BackChannel, CONFIG_LEN, Device, EVENT_IDX, INDIRECT_DESC, Tag, VERSION_1};
use crate::fs::FileSystem;
use crate::fuse::{Session, SessionOptions, opcode_name};
use crate::guest_memory::Memory;
use crate::io::{Choice, Engine, choose};
use crate::limits::Limits;
use crate::metrics::{Facts, Registry, SessionState, Shape};
use crate::state::{self, Table};
use crate::virtqueue::{Features, Queue, QueueIndex};
use crate::worker::{WorkerPool, WorkerPoolError};

/// The virtio features that a device in the VMM's process offers. Those of transports are the VMM's.
const FEATURES: u64 = VERSION_1 | EVENT_IDX | INDIRECT_DESC;

/// How a file system is served.
#[derive(Clone, Debug)]
pub struct Options {
    /// The tag in the configuration space, by which the guest mounts the file system; `None` if the
    /// VMM writes it there itself.
    pub tag: Option<Tag>,
    /// Request queues, without the high-priority queue.
    pub request_queues: NonZeroU16,
    /// Threads that serve request queues. Queue *i* belongs to thread *i* mod `workers`. One more
    /// serves the high-priority queue.
    pub workers: NonZeroUsize,
    /// Which engine performs file operations that may wait.
    pub runtime: Choice,
    /// How long a thread polls its rings before it sleeps, after it has found requests by that lately;
    /// zero disables polling.
    pub poll: Duration,
    /// What INIT offers to the guest.
    pub session: SessionOptions,
}

impl Default for Options {
    /// One request queue and one thread for it, with io_uring where the kernel has it.
    fn default() -> Self {
        Self {
            tag: None,
            request_queues: NonZeroU16::MIN,
            workers: NonZeroUsize::MIN,
            runtime: Choice::Auto,
            poll: Duration::from_micros(100),
            session: SessionOptions::default(),
        }
    }
}

/// A virtio-fs device that serves one file system to one guest; see the [module](super).
///
/// A device belongs to one thread at a time: the one of the VMM that handles its registers. Several
/// devices in one process share nothing.
#[derive(Debug)]
pub struct VirtioFs {
    device: Device,
    options: Options,
    fs: Arc<dyn FileSystem>,
    engine: Engine,
    pool: Option<WorkerPool<dyn FileSystem>>,
    metrics: Arc<Registry>,
    limits: Arc<Limits>,
    /// How to ask the VMM for something, once it has said so.
    channel: Option<Arc<dyn BackChannel>>,
    /// Set while the device is active.
    active: Option<Active>,
}

/// What the guest's driver has set up.
#[derive(Debug)]
struct Active {
    memory: Arc<Memory>,
    features: Features,
    /// By the queue's index.
    queues: Vec<Option<Slot>>,
}

/// A queue of an active device.
#[derive(Debug)]
struct Slot {
    /// While the queue runs, the state at its start.
    setup: QueueSetup,
    runs: bool,
    /// Whether [`VirtioFs::resume`] starts it.
    paused: bool,
}

impl VirtioFs {
    /// A device that serves `fs`: a [`Passthrough`](crate::fs::passthrough::Passthrough), or any other
    /// file system. Starts no thread.
    ///
    /// # Errors
    ///
    /// The engine that `options` ask for isn't available, or there is no memory for the counters.
    pub fn new(fs: Arc<dyn FileSystem>, options: Options) -> Result<Self, DeviceError> {
        let engine = choose(options.runtime).map_err(DeviceError::Engine)?.engine;
        Ok(Self {
            device: Device {
                tag: options.tag.clone(),
                request_queues: options.request_queues,
                dax_window: options.session.dax.as_ref().map_or(0, |dax| dax.window),
                dax_fs_map: false,
            },
            metrics: counters(&fs, &options, engine)?,
            limits: Arc::default(),
            options,
            fs,
            engine,
            pool: None,
            channel: None,
            active: None,
        })
    }

    /// The virtio features that the device offers. The VMM may add those of its transport, and handles
    /// these itself.
    #[must_use]
    pub fn features(&self) -> u64 {
        FEATURES
    }

    /// The number of queues: the high-priority queue, which has index 0, and the request queues.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.device.queues()
    }

    /// The configuration space (`struct virtio_fs_config`), which never changes.
    #[must_use]
    pub fn config_space(&self) -> [u8; CONFIG_LEN] {
        self.device.config_space()
    }

    /// Reads the configuration space from `offset` on. Zeros are beyond its end. A write of the guest
    /// is to be ignored.
    pub fn read_config(&self, offset: usize, into: &mut [u8]) {
        let space = self.device.config_space();
        let part = space.get(offset..).unwrap_or_default();
        let len = part.len().min(into.len());
        into[..len].copy_from_slice(&part[..len]);
        into[len..].fill(0);
    }

    /// Whether the driver has set the device up, and not reset it since.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active.is_some()
    }

    /// Whether a guest's session has begun (INIT) or was loaded.
    #[must_use]
    pub fn has_session(&self) -> bool {
        let pool = self.pool.as_ref();
        pool.is_some_and(|pool| pool.session().negotiated().is_some())
    }

    /// What the device counts, from its construction on: the same that the server counts, but
    /// restarts. May be kept and read by any thread, also when the device is gone.
    ///
    /// [`Registry::snapshot`] has the numbers, [`Snapshot::to_open_metrics`] writes them for
    /// Prometheus. Durations are measured once [`Registry::set_timed`] says so.
    ///
    /// [`Snapshot::to_open_metrics`]: crate::metrics::Snapshot::to_open_metrics
    #[must_use]
    pub fn metrics(&self) -> &Arc<Registry> {
        &self.metrics
    }

    /// How much the guest may ask for: nothing is limited until [`Limits::set`] says so. That may
    /// be called by any thread, and takes effect at once.
    #[must_use]
    pub fn limits(&self) -> &Arc<Limits> {
        &self.limits
    }

    /// Starts serving: the driver has accepted `features` and set up `queues`, each with its index.
    /// Further ones may be started later.
    ///
    /// # Errors
    ///
    /// The device is active already, features or queues are wrong, or the host has no threads. The
    /// device then stays inactive.
    pub fn activate(
        &mut self,
        memory: Memory,
        features: u64,
        queues: impl IntoIterator<Item = (u16, QueueSetup)>,
    ) -> Result<(), DeviceError> {
        if self.active.is_some() {
            return Err(DeviceError::Active);
        }
        let extra = features & !FEATURES;
        if extra != 0 {
            return Err(DeviceError::Features {
                accepted: features,
                extra,
            });
        }
        self.start_threads()?;
        self.metrics.set_session(SessionState::Connected);
        self.active = Some(Active {
            memory: Arc::new(memory),
            features: agreed(features),
            queues: (0..self.queues()).map(|_| None).collect(),
        });
        for (index, setup) in queues {
            if let Err(error) = self.start_queue(index, setup) {
                self.stop_all();
                self.active = None;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Starts serving one more queue.
    ///
    /// # Errors
    ///
    /// The device isn't active, has no such queue, or it runs already; or the ring is not in guest
    /// memory or at another position.
    pub fn start_queue(&mut self, index: u16, setup: QueueSetup) -> Result<(), DeviceError> {
        let queues = self.queues();
        let (Some(active), Some(pool)) = (&mut self.active, &self.pool) else {
            return Err(DeviceError::Inactive);
        };
        let Some(slot) = active.queues.get_mut(usize::from(index)) else {
            return Err(DeviceError::NoSuchQueue { index, queues });
        };
        if slot.as_ref().is_some_and(|slot| slot.runs) {
            return Err(DeviceError::Runs(index));
        }
        // The guest may continue here after a migration that failed.
        pool.session().reacquire();
        run(pool, &active.memory, active.features, index, &setup)?;
        *slot = Some(Slot {
            setup,
            runs: true,
            paused: false,
        });
        Ok(())
    }

    /// Stops serving a queue, waits until all chains taken off it have been returned, and returns where
    /// it stopped; `None` if it didn't run.
    pub fn stop_queue(&mut self, index: u16) -> Option<RingState> {
        let slot = self
            .active
            .as_mut()?
            .queues
            .get_mut(usize::from(index))?
            .as_mut()
            .filter(|slot| slot.runs)?;
        slot.runs = false;
        if let Some(queue) = self.pool.as_ref()?.stop(QueueIndex(index)) {
            let ring = &mut slot.setup.ring;
            ring.next_available = queue.next_available();
            ring.next_used = queue.used().published_index();
        }
        Some(slot.setup.ring)
    }

    /// Stops all queues that run, each with its index and where it stopped. The guest's session stays:
    /// [`resume`](Self::resume) continues. All requests that were taken have been answered, so a
    /// snapshot of guest memory that is taken now, the rings' states and what [`save`](Self::save)
    /// returns belong together.
    pub fn pause(&mut self) -> Vec<(u16, RingState)> {
        let mut states = Vec::new();
        for index in 0..self.queues() {
            if let Some(state) = self.stop_queue(index) {
                states.push((index, state));
                if let Some(slot) = self.slot(index) {
                    slot.paused = true;
                }
            }
        }
        states
    }

    /// Starts the queues again that [`pause`](Self::pause) has stopped.
    ///
    /// # Errors
    ///
    /// A queue can't be started; see [`start_queue`](Self::start_queue). Those before it run.
    pub fn resume(&mut self) -> Result<(), DeviceError> {
        for index in 0..self.queues() {
            let paused = self.slot(index).filter(|slot| slot.paused);
            if let Some(setup) = paused.map(|slot| slot.setup.clone()) {
                self.start_queue(index, setup)?;
            }
        }
        Ok(())
    }

    /// Changes the features that the driver has accepted. Queues that run are stopped meanwhile.
    #[cfg(feature = "rust-vmm")]
    pub(super) fn set_features(&mut self, features: u64) -> Result<(), DeviceError> {
        let features = agreed(features);
        if self
            .active
            .as_ref()
            .is_none_or(|active| active.features == features)
        {
            return Ok(());
        }
        self.change(|active| active.features = features)
    }

    /// Replaces the guest's memory, because regions were added or removed. Queues that run are stopped
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// The device isn't active, or a ring is not in the new memory.
    pub fn set_memory(&mut self, memory: Memory) -> Result<(), DeviceError> {
        if self.active.is_none() {
            return Err(DeviceError::Inactive);
        }
        self.change(|active| active.memory = Arc::new(memory))
    }

    /// The driver has reset the device, or the guest is gone: stops all queues and discards the guest's
    /// session. The device can be activated again.
    pub fn reset(&mut self) {
        self.stop_all();
        self.active = None;
        if let Some(pool) = &self.pool {
            pool.session().reset();
        }
        self.metrics.set_session(SessionState::Waiting);
    }

    /// The guest's session, in the format that a server sends and receives when a guest is migrated. It
    /// continues here if its queues do.
    ///
    /// # Errors
    ///
    /// Queues run, or the file system can't be moved, or the guest holds what can't be.
    pub fn save(&self) -> Result<Vec<u8>, DeviceError> {
        if !self.running().is_empty() {
            return Err(DeviceError::QueuesRun);
        }
        match &self.pool {
            Some(pool) => pool.session().save(),
            None => Session::new(Arc::clone(&self.fs), self.options.session.clone()).save(),
        }
        .map_err(DeviceError::Save)
    }

    /// Releases what only one device can hold, such as locks: a device elsewhere is going to continue
    /// the session that was saved. If a queue starts here nevertheless, it is acquired again.
    pub fn release_for_migration(&self) {
        if let Some(pool) = &self.pool {
            pool.session().release_for_migration();
        }
    }

    /// Continues a session that another device or server has saved. To be called before the queues are
    /// started. Starts the threads.
    ///
    /// # Errors
    ///
    /// Queues run, the host has no threads, or the session can't be continued here. The device then has
    /// no session.
    pub fn load(&mut self, session: &[u8]) -> Result<(), DeviceError> {
        if !self.running().is_empty() {
            return Err(DeviceError::QueuesRun);
        }
        let pool = self.start_threads()?;
        pool.session().load(session).map_err(DeviceError::Load)
    }

    /// Hands over the way to ask the VMM for something: mappings of files in the
    /// [window](SessionOptions::dax), if there is one, and what the file system has to ask. To be
    /// called before the device is activated.
    pub fn connect(&mut self, channel: Arc<dyn BackChannel>) {
        self.fs.connected(&channel);
        if let Some(pool) = &self.pool {
            open(pool.session(), &channel);
        }
        self.channel = Some(channel);
    }

    /// The ring of a queue that was started and doesn't run, and whether it has EVENT_IDX.
    #[cfg(feature = "rust-vmm")]
    pub(super) fn stopped(&self, index: u16) -> Option<(RingState, bool)> {
        let active = self.active.as_ref()?;
        let slot = active.queues.get(usize::from(index))?.as_ref()?;
        (!slot.runs).then_some((slot.setup.ring, active.features.event_idx))
    }

    /// The guest's session, as a transfer saves or loads it. Starts the threads.
    #[cfg(feature = "rust-vmm")]
    pub(super) fn device_state(
        &mut self,
    ) -> Result<Arc<dyn crate::migration::DeviceState>, DeviceError> {
        if !self.running().is_empty() {
            return Err(DeviceError::QueuesRun);
        }
        Ok(Arc::clone(self.start_threads()?.session()) as _)
    }

    fn slot(&mut self, index: u16) -> Option<&mut Slot> {
        self.active
            .as_mut()?
            .queues
            .get_mut(usize::from(index))?
            .as_mut()
    }

    /// The indices of the queues that run.
    fn running(&self) -> Vec<u16> {
        let slots = self.active.iter().flat_map(|active| &active.queues);
        (0..)
            .zip(slots)
            .filter(|(_, slot)| slot.as_ref().is_some_and(|slot| slot.runs))
            .map(|(index, _)| index)
            .collect()
    }

    /// Changes what all queues rely on. Those that run are stopped meanwhile.
    fn change(&mut self, change: impl FnOnce(&mut Active)) -> Result<(), DeviceError> {
        let running = self.running();
        for index in &running {
            self.stop_queue(*index);
        }
        if let Some(active) = &mut self.active {
            change(active);
        }
        for index in running {
            if let Some(setup) = self.slot(index).map(|slot| slot.setup.clone()) {
                self.start_queue(index, setup)?;
            }
        }
        Ok(())
    }

    fn stop_all(&mut self) {
        for index in self.running() {
            self.stop_queue(index);
        }
    }

    /// Starts the threads unless they run.
    fn start_threads(&mut self) -> Result<&WorkerPool<dyn FileSystem>, DeviceError> {
        let pool = match self.pool.take() {
            Some(pool) => pool,
            None => self.new_pool()?,
        };
        Ok(self.pool.insert(pool))
    }

    fn new_pool(&self) -> Result<WorkerPool<dyn FileSystem>, DeviceError> {
        let Options {
            workers,
            poll,
            runtime,
            ..
        } = self.options;
        // Records what is mapped. Nothing else needs a table here.
        let limits = state::Limits {
            inodes: 0,
            handles: 0,
            queues: 0,
        };
        let table = (self.options.session.dax.as_ref())
            .map(|_| Table::for_this_process(&limits))
            .transpose()?;
        let start = |engine| {
            let session = Session::new(Arc::clone(&self.fs), self.options.session.clone());
            let mut session = session.reporting_to(Arc::clone(&self.metrics));
            if let Some(table) = &table {
                session = session.remembering(Arc::clone(table));
            }
            WorkerPool::start_limited(Arc::new(session), workers, engine, poll, &self.limits)
        };
        let started = match start(self.engine) {
            Err(WorkerPoolError::Threads(error))
                if runtime == Choice::Auto
                    && self.engine != Engine::ThreadPool
                    && error.is_of_ring() =>
            {
                log::warn!("the device runs without io_uring: {error}");
                start(Engine::ThreadPool)
            }
            started => started,
        };
        let pool = started.map_err(DeviceError::Workers)?;
        if let Some(channel) = &self.channel {
            open(pool.session(), channel);
        }
        Ok(pool)
    }
}

/// The counters of a device that serves `fs`. They keep nothing of it alive.
fn counters(
    fs: &Arc<dyn FileSystem>,
    options: &Options,
    engine: Engine,
) -> Result<Arc<Registry>, DeviceError> {
    let metrics = Registry::for_this_process(Shape {
        workers: options.workers.get(),
        queues: usize::from(options.request_queues.get()) + 1,
        operation: opcode_name,
    })?;
    metrics.set_facts(Facts {
        share: (options.tag.as_ref()).map_or_else(String::new, ToString::to_string),
        runtime: engine.to_string(),
        workers: options.workers.get(),
    });
    let (all, each) = (Arc::downgrade(fs), Arc::downgrade(fs));
    metrics.set_usage(move || all.upgrade().map(|fs| fs.usage()).unwrap_or_default());
    metrics.set_mounts(move || {
        let fs = each.upgrade();
        fs.map(|fs| fs.usage_by_mount()).unwrap_or_default()
    });
    Ok(metrics)
}

/// Lets `session` ask the VMM for mappings.
fn open(session: &Arc<Session<dyn FileSystem>>, channel: &Arc<dyn BackChannel>) {
    session.connected(channel);
    session.channel_opened(false);
}

impl Drop for VirtioFs {
    fn drop(&mut self) {
        self.reset();
        if let Some(pool) = self.pool.take() {
            pool.session().finish_mappings();
            pool.shutdown();
        }
    }
}

/// What the accepted features mean for rings.
fn agreed(features: u64) -> Features {
    Features {
        event_idx: features & EVENT_IDX != 0,
        indirect: features & INDIRECT_DESC != 0,
    }
}

/// Starts a queue on its thread.
fn run(
    pool: &WorkerPool<dyn FileSystem>,
    memory: &Arc<Memory>,
    features: Features,
    index: u16,
    setup: &QueueSetup,
) -> Result<(), DeviceError> {
    let QueueSetup { ring, kick, call } = setup;
    let queue = Queue::new(
        QueueIndex(index),
        ring.size,
        features,
        ring.addresses(),
        memory,
        ring.next_available,
        Arc::clone(call),
    )?;
    let found = queue.used().published_index();
    if found != ring.next_used {
        return Err(DeviceError::Position {
            index,
            wanted: ring.next_used,
            found,
        });
    }
    pool.run(queue, Arc::clone(&kick.0))
        .map_err(|source| DeviceError::Run { index, source })
}
