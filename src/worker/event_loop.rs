//! The event loop of one worker: serves its queues' kicks, other workers' backlog and commands.
//!
//! The loop is one task, so a worker is available for the backlog of others only while its thread
//! is idle. A request that waits becomes a task of its own; one that is alone and waits for a disk of
//! this host is waited for in the loop itself, while the idle workers watch its queue. The invariant:
//! the completions of a drain are published before the loop waits for anything.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedReceiver;

use super::batch_size::BatchSize;
use super::busy_poll::BusyPoll;
use super::chain_transport::ChainTransport;
use super::command::Command;
use super::completion_batch::CompletionBatch;
use super::faults::Faults;
use super::kick_moderation::{self, KickModeration};
use super::limited_transport::LimitedTransport;
use super::limiter::Limiter;
use super::lone_waits::LoneWaits;
use super::queue_report::QueueReport;
use super::standby::Standby;
use super::waiting::Waiting;
use crate::fs::FileSystem;
use crate::fuse::{Outcome, Session, Transport};
use crate::io::{self, spawn};
use crate::limits::{Buckets, Clock};
use crate::metrics::{Count, Recorder, Row};
use crate::scheduler::{Placement, Receiver, Sender};
use crate::virtqueue::{BadChain, Chain, Queue, QueueIndex, UsedRing};

/// The most chains that one drain takes off a ring before the loop looks at other queues.
const MAX_DRAIN: usize = 64;

/// No poll for the guest's next request follows a drain in which a request had to wait, nor the next
/// ones, so many in all: compared with such a wait, waking up is cheap. Measured with SQLite, whose
/// transaction is three writes and a wait for the disk: polls between them made it 7 % slower.
const AFTER_WAIT: u8 = 4;

/// The longest busy poll for completions of the disk: about as long as sleeping and waking up take,
/// which also cost processor time. Most disks take longer.
const MAX_DISK_POLL: Duration = Duration::from_micros(10);

/// What a worker does before it sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IdlePolicy {
    /// Polls its rings for up to this time, as long as that pays.
    BusyPoll(Duration),
    /// Delays enabling kicks while they are frequent. Only for queues whose requests no
    /// program waits for.
    ModerateKicks,
}

/// The backlog that the workers share, and where they watch each other's queues.
#[derive(Clone, Debug)]
pub(super) struct Backlog {
    pub(super) placement: Placement,
    pub(super) sender: Sender<Chain>,
    pub(super) receiver: Receiver<Chain>,
    pub(super) standby: Arc<Standby>,
}

/// A queue that this worker owns.
#[derive(Debug)]
struct OwnedQueue {
    queue: Box<Queue>,
    kick: io::Event,
    /// The ring may have chains.
    ready: bool,
    /// The guest was asked for a kick at the next chain.
    notifications_enabled: bool,
    batch_size: BatchSize,
}

impl OwnedQueue {
    fn report(&mut self) -> QueueReport {
        let queue = &mut self.queue;
        QueueReport {
            index: queue.index(),
            size: queue.size(),
            next_available: queue.next_available(),
            waiting: queue.waiting(),
            used: queue.used().published_index(),
            in_flight: queue.used().in_flight(),
            wants_kick: self.notifications_enabled,
            stats: queue.used().stats(),
        }
    }
}

/// What the loop handles next.
enum Event {
    /// A queue may be ready.
    Ready,
    Command(Command),
    /// A chain of another worker's queue.
    Chain(Chain),
    /// The queue that this worker watches may have chains.
    Watched,
    /// The last request in flight has completed.
    Idle,
    /// A request that is held back may be served.
    Due,
    /// The session has ended.
    End,
}

/// One worker's event loop.
pub(super) struct EventLoop<F: ?Sized> {
    session: Arc<Session<F>>,
    commands: UnboundedReceiver<Command>,
    /// `None` for a single worker, and for the high-priority queue's thread.
    backlog: Option<Backlog>,
    queues: Vec<OwnedQueue>,
    /// Becomes ready when the queue of a worker that waits for the host may have chains.
    watched: Option<io::Event>,
    /// That queue may have chains.
    watched_ready: bool,
    lone_waits: LoneWaits,
    /// Chains to be sent to other workers; kept to reuse its allocation.
    offloaded: Vec<Chain>,
    completions: Rc<CompletionBatch>,
    recorder: Rc<Recorder>,
    faults: Faults,
    /// Polls for the guest's next request while none is in flight.
    busy_poll: BusyPoll,
    /// Polls for completions of the disk.
    disk_poll: BusyPoll,
    /// How many drains are left that no poll follows, since a request had to wait.
    after_wait: Cell<u8>,
    moderation: KickModeration,
    /// What is held back, if the guest is limited.
    limiter: Option<Box<Limiter>>,
}

impl<F: FileSystem + ?Sized> EventLoop<F> {
    pub(super) fn new(
        session: Arc<Session<F>>,
        commands: UnboundedReceiver<Command>,
        backlog: Option<Backlog>,
        policy: IdlePolicy,
        recorder: Recorder,
    ) -> Self {
        let recorder = Rc::new(recorder);
        let poll = match policy {
            IdlePolicy::BusyPoll(poll) => poll,
            IdlePolicy::ModerateKicks => Duration::ZERO,
        };
        Self {
            session,
            commands,
            backlog,
            queues: Vec::new(),
            watched: None,
            watched_ready: false,
            lone_waits: LoneWaits::default(),
            offloaded: Vec::new(),
            completions: Rc::new(CompletionBatch::new(Rc::clone(&recorder))),
            recorder,
            faults: Faults::default(),
            busy_poll: BusyPoll::new(poll),
            disk_poll: BusyPoll::new(poll.min(MAX_DISK_POLL)),
            after_wait: Cell::new(0),
            moderation: KickModeration::new(policy == IdlePolicy::ModerateKicks),
            limiter: None,
        }
    }

    /// Serves until the session drops its command channel, then waits for the requests in flight.
    pub(super) async fn run(mut self) {
        let publisher = spawn(Rc::clone(&self.completions).publish());
        let watch = (self.backlog.as_ref()).map(|it| io::Event::new(it.standby.readable()));
        match watch.transpose() {
            Ok(watch) => self.watched = watch,
            Err(error) => log::warn!("waiting for other workers' queues: {error}"),
        }
        loop {
            match self.next_event().await {
                Event::Ready | Event::Due => (),
                Event::Watched => {
                    self.recorder.count(Count::Kicks, 1);
                    self.watched_ready = true;
                }
                // Requests may complete one at a time, and the guest waits for them.
                Event::Idle => self.completions.publish_now(),
                Event::Command(command) => self.handle_command(command),
                Event::Chain(chain) => self.serve_stolen(chain),
                Event::End => break,
            }
            for at in 0..self.queues.len() {
                if self.queues[at].ready {
                    self.drain_batch(at);
                }
            }
            if self.watched_ready {
                self.serve_watched();
            }
            if self.limiter.is_some() {
                self.serve_due();
            }
        }
        self.completions.drained().await;
        publisher.abort();
    }

    /// Returns the next event; waits if there is none.
    async fn next_event(&mut self) -> Event {
        if self.watched_ready || self.queues.iter().any(|owned| owned.ready) {
            if let Ok(command) = self.commands.try_recv() {
                return Event::Command(command);
            }
            // Lets other tasks run, and the runtime notice the kicks of other queues.
            tokio::task::yield_now().await;
            return Event::Ready;
        }
        let due = self.limiter.as_ref().and_then(|limiter| limiter.next_due());
        if due.is_some() {
            return self.wait_until_due(due).await;
        }
        let in_flight = self.completions.in_flight() != 0;
        if in_flight && self.disk_poll.pays() {
            // Submits the operations whose completions the poll looks for.
            tokio::task::yield_now().await;
        }
        if self.poll_rings() {
            if !self.queues.iter().any(|owned| owned.ready) {
                // Lets the tasks whose operations have completed run.
                tokio::task::yield_now().await;
            }
            return Event::Ready;
        }
        if self.moderation.is_active() {
            return self.delay_kicks().await;
        }
        if self.enable_notifications() {
            return Event::Ready;
        }
        self.moderation.sleep_starts();
        let event = self.wait(None).await;
        match event {
            Event::Ready => {
                self.busy_poll.woken();
                self.moderation.woken();
            }
            Event::Idle if in_flight => self.disk_poll.woken(),
            _ => (),
        }
        event
    }

    /// Returns the next event; waits at most until `due`, when a request may be served that is held
    /// back. To poll meanwhile would find little, since the guest waits too.
    async fn wait_until_due(&mut self, due: Option<Instant>) -> Event {
        if self.enable_notifications() {
            return Event::Ready;
        }
        if due.is_some_and(|due| due <= Instant::now()) {
            if let Ok(command) = self.commands.try_recv() {
                return Event::Command(command);
            }
            tokio::task::yield_now().await;
            return Event::Due;
        }
        self.wait(due).await
    }

    /// Sleeps for [`kick_moderation::DELAY`] or until a ring fills up, then checks the rings.
    async fn delay_kicks(&mut self) -> Event {
        let (queues, recorder) = (&mut self.queues, &self.recorder);
        let filled = queues.iter_mut().fold(false, |filled, owned| {
            filled | owned.queue.enable_notifications_when_filled()
        });
        if !filled {
            let commands = &mut self.commands;
            let woken = poll_fn(|cx| {
                if let Poll::Ready(command) = commands.poll_recv(cx) {
                    return Poll::Ready(Some(command.map_or(Event::End, Event::Command)));
                }
                let kicked = queues
                    .iter_mut()
                    .filter_map(|owned| owned.kick.poll(cx).is_ready().then_some(1))
                    .sum();
                if kicked != 0 {
                    recorder.count(Count::Kicks, kicked);
                    Poll::Ready(None)
                } else {
                    Poll::Pending
                }
            });
            if let Ok(Some(event)) = tokio::time::timeout(kick_moderation::DELAY, woken).await {
                return event;
            }
        }
        let found = self.queues.iter_mut().fold(false, |found, owned| {
            owned.ready |= owned.queue.has_more();
            found | owned.ready
        });
        self.moderation.delay_ended(found);
        Event::Ready
    }

    /// Busy polls the rings and the runtime's completions. Returns whether there is work.
    fn poll_rings(&mut self) -> bool {
        let queues = &mut self.queues;
        if queues.is_empty() {
            return false;
        }
        let in_flight = self.completions.in_flight() != 0;
        if !in_flight && self.after_wait.get() != 0 {
            return false;
        }
        let busy_poll = if in_flight {
            &mut self.disk_poll
        } else {
            &mut self.busy_poll
        };
        if busy_poll.pays() {
            for owned in queues
                .iter_mut()
                .filter(|owned| owned.notifications_enabled)
            {
                owned.notifications_enabled = false;
                owned.queue.disable_notifications();
            }
        }
        busy_poll.poll(|| {
            let any = queues.iter_mut().fold(false, |any, owned| {
                owned.ready |= owned.queue.has_more();
                any | owned.ready
            });
            any || (in_flight && io::has_completions())
        })
    }

    /// Asks for kicks. Returns true if there is work already.
    fn enable_notifications(&mut self) -> bool {
        let queues = &mut self.queues;
        for owned in queues
            .iter_mut()
            .filter(|owned| !owned.notifications_enabled)
        {
            owned.notifications_enabled = true;
            owned.ready |= owned.queue.enable_notifications();
        }
        queues.iter().any(|owned| owned.ready)
    }

    /// Sleeps until there is an event, at most until `due`.
    async fn wait(&mut self, due: Option<Instant>) -> Event {
        let Self {
            commands,
            backlog,
            queues,
            watched,
            completions,
            recorder,
            ..
        } = self;
        // A worker that waits on this channel counts as idle for the others, so wait nowhere else.
        let mut chain = pin!(async {
            match backlog {
                Some(backlog) => backlog.receiver.recv().await,
                None => std::future::pending().await,
            }
        });
        let mut idle = pin!(completions.idle());
        let mut timer = pin!(async {
            match due {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        });
        poll_fn(|cx| {
            match commands.poll_recv(cx) {
                Poll::Ready(Some(command)) => return Poll::Ready(Event::Command(command)),
                Poll::Ready(None) => return Poll::Ready(Event::End),
                Poll::Pending => (),
            }
            let mut ready = false;
            for owned in queues.iter_mut() {
                match owned.kick.poll(cx) {
                    Poll::Ready(Ok(())) => {
                        recorder.count(Count::Kicks, 1);
                        owned.ready = true;
                    }
                    Poll::Ready(Err(error)) => log::error!("waiting for a kick: {error}"),
                    Poll::Pending => (),
                }
                ready |= owned.ready;
            }
            if ready {
                return Poll::Ready(Event::Ready);
            }
            if (watched.as_ref()).is_some_and(|watched| watched.poll(cx).is_ready()) {
                return Poll::Ready(Event::Watched);
            }
            if idle.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Event::Idle);
            }
            if due.is_some() && timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Event::Due);
            }
            chain
                .as_mut()
                .poll(cx)
                .map(|chain| chain.map_or(Event::End, Event::Chain))
        })
        .await
    }

    fn handle_command(&mut self, command: Command) {
        match command {
            Command::Run { queue, kick, done } => {
                let outcome = io::Event::new(kick).map(|kick| {
                    self.queues.push(OwnedQueue {
                        queue,
                        kick,
                        // Chains that were added before the kick was watched cause no further kick.
                        ready: true,
                        notifications_enabled: true,
                        batch_size: BatchSize::default(),
                    });
                });
                // Fails only if the session has ended, which needs no reply.
                let _ = done.send(outcome);
            }
            Command::ServeWaiting { done } => {
                for at in 0..self.queues.len() {
                    // Bounded, so a guest that keeps filling the ring can't hold the worker here.
                    let drains = usize::from(self.queues[at].queue.waiting()).div_ceil(MAX_DRAIN);
                    (0..drains).for_each(|_| self.drain_batch(at));
                }
                drop(done);
            }
            Command::Ping { done } => drop(done),
            Command::Describe { done } => {
                // Fails if nobody waits for it any more.
                let _ = done.send(self.queues.iter_mut().map(OwnedQueue::report).collect());
            }
            Command::Limit { buckets, clock } => self.limit(buckets, clock),
            Command::Interrupt { unique } => {
                let found = (self.limiter.as_mut()).and_then(|limiter| limiter.interrupt(unique));
                if let Some(request) = found {
                    let used = Arc::clone(request.used());
                    request.interrupt();
                    self.publish(&used);
                }
            }
            Command::Stop { index, done } => {
                let at = self
                    .queues
                    .iter()
                    .position(|owned| owned.queue.index() == index);
                let queue = at.map(|at| self.queues.swap_remove(at).queue);
                if let Some(limiter) = &mut self.limiter {
                    let held = limiter.take_queue(index);
                    self.serve_held(held);
                }
                let _ = done.send(queue);
            }
        }
    }

    /// Serves up to [`MAX_DRAIN`] chains of a queue, and publishes the replies.
    fn drain_batch(&mut self, at: usize) {
        let owned = &mut self.queues[at];
        let index = owned.queue.index();
        if owned.notifications_enabled {
            owned.notifications_enabled = false;
            owned.queue.disable_notifications();
        }
        let used = Arc::clone(owned.queue.used());
        let waiting = usize::from(owned.queue.waiting()).min(MAX_DRAIN);
        // Whether a request may be served is decided where it is taken.
        let backlog = self.backlog.as_ref().filter(|_| self.limiter.is_none());
        let offloaded = backlog.map_or(0, |backlog| {
            backlog.placement.spread(waiting, backlog.sender.idle())
        });
        if offloaded != 0 {
            self.offload(at, offloaded);
        }
        let mut popped = offloaded;
        let may_wait_here = waiting == 1 && self.may_wait_here();
        let mut alone = None;
        self.after_wait.set(self.after_wait.get().saturating_sub(1));
        self.recorder.found(waiting);
        let batch_size = &mut self.queues[at].batch_size;
        self.recorder.begin_row(Row {
            requests: waiting,
            // What is held back ends in another row.
            is_fast: self.limiter.is_none() && batch_size.is_fast(),
        });
        batch_size.begin(waiting, &self.recorder);
        let mut next = self.pop(at, &mut popped);
        while let Some(chain) = next {
            // One chain ahead: its request is loaded while this one is served.
            next = self.pop(at, &mut popped);
            match chain {
                Ok(chain) => {
                    let waiting = self.serve(chain, &used);
                    if may_wait_here && alone.is_none() {
                        alone = waiting;
                    } else if let Some(waiting) = waiting {
                        waiting.spawn();
                    }
                }
                Err(fault) => self.report_fault(index, fault),
            }
            let OwnedQueue {
                batch_size, queue, ..
            } = &mut self.queues[at];
            let left = || usize::from(queue.waiting()) + usize::from(next.is_some());
            // The next request doesn't begin before the guest was called.
            if batch_size.served(left, &self.recorder) && self.publish(&used) {
                self.recorder.interrupt_row();
            }
        }
        self.publish(&used);
        self.queues[at].batch_size.end(&self.recorder);
        self.recorder.end_row();
        if let Some(waiting) = alone {
            self.wait_for(waiting, at);
        }
        let owned = &mut self.queues[at];
        owned.ready = owned.queue.has_more();
    }

    /// Whether this worker may wait for the host itself in a request that is alone.
    fn may_wait_here(&self) -> bool {
        let is_other_idle = |it: &Backlog| it.sender.idle() != 0;
        self.backlog.as_ref().is_some_and(is_other_idle)
            && self.limiter.is_none()
            && self.queues.len() == 1
            && self.completions.in_flight() == 0
    }

    /// Waits for the host in a request of a queue, here if it is alone.
    fn wait_for(&mut self, waiting: Waiting, at: usize) {
        let pays = self.completions.in_flight() == 1 && self.lone_waits.pay();
        let Some(backlog) = self.backlog.as_ref().filter(|_| pays) else {
            return waiting.spawn();
        };
        let mut owned = self.queues.swap_remove(at);
        match backlog.standby.watch(owned.queue, owned.kick.eventfd()) {
            Ok(watched) => {
                let waiting = waiting.wait_here();
                let (queue, is_changed) = watched.end();
                owned.queue = queue;
                owned.notifications_enabled = true;
                self.lone_waits.ended(!is_changed);
                match waiting {
                    Some(waiting) => waiting.spawn(),
                    None => self.completions.publish_now(),
                }
            }
            Err(queue) => {
                owned.queue = queue;
                owned.notifications_enabled = false;
                self.lone_waits.ended(false);
                waiting.spawn();
            }
        }
        self.queues.push(owned);
    }

    /// Serves chains of the queue that this worker watches, up to [`MAX_DRAIN`].
    fn serve_watched(&mut self) {
        let Some(backlog) = &self.backlog else {
            return;
        };
        let standby = Arc::clone(&backlog.standby);
        let mut chains = Vec::new();
        let has_more = standby.with_watched(|queue| {
            queue.disable_notifications();
            while chains.len() < MAX_DRAIN
                && let Some(popped) = queue.pop()
            {
                match popped {
                    Ok(chain) => chains.push(chain),
                    Err(fault) => self.report_fault(queue.index(), fault),
                }
            }
            queue.enable_notifications()
        });
        self.watched_ready = has_more.unwrap_or(false);
        let mut chains = chains.into_iter();
        self.serve_others(|_| chains.next());
    }

    /// Takes the next chain of a drain off a queue, unless the drain has `popped` enough.
    fn pop(&mut self, at: usize, popped: &mut usize) -> Option<Result<Chain, BadChain>> {
        let queue = &mut self.queues[at].queue;
        if *popped >= MAX_DRAIN && !queue.is_resuming() {
            return None;
        }
        let chain = queue.pop()?;
        *popped += 1;
        if let Ok(chain) = &chain {
            chain.prefetch();
        }
        Some(chain)
    }

    /// Takes `count` chains off a queue and sends them to other workers.
    fn offload(&mut self, at: usize, count: usize) {
        let Some(backlog) = &self.backlog else {
            return;
        };
        let queue = &mut self.queues[at].queue;
        for _ in 0..count {
            match queue.pop() {
                Some(Ok(chain)) => self.offloaded.push(chain),
                Some(Err(fault)) => {
                    self.recorder.count(Count::FaultyChains, 1);
                    self.faults.report(queue.index(), fault);
                }
                None => break,
            }
        }
        let offloaded = self.offloaded.len() as u64;
        self.recorder.count(Count::Offloaded, offloaded);
        // The channel closes only after all workers have ended, including this one.
        let _ = backlog.sender.send_batch(self.offloaded.drain(..));
    }

    /// Serves chains of the backlog, beginning with `first`.
    fn serve_stolen(&mut self, first: Chain) {
        let mut first = Some(first);
        let mut left = MAX_DRAIN;
        self.serve_others(|this| {
            left = left.checked_sub(1)?;
            first.take().or_else(|| {
                let is_ready = this.queues.iter().any(|owned| owned.ready);
                let backlog = this.backlog.as_ref().filter(|_| !is_ready)?;
                backlog.receiver.try_recv()
            })
        });
    }

    /// Serves the chains that `next` returns, which are of other workers' queues.
    fn serve_others(&self, mut next: impl FnMut(&Self) -> Option<Chain>) {
        let mut served = 0;
        let mut last: Option<Arc<_>> = None;
        self.recorder.begin_row(Row::SLOW);
        while let Some(chain) = next(self) {
            let used = Arc::clone(chain.used());
            if let Some(previous) = last.replace(Arc::clone(&used))
                && !Arc::ptr_eq(&previous, &used)
            {
                self.publish(&previous);
            }
            let waiting = match &self.limiter {
                None => self.serve_now(|| ChainTransport::new(chain, &self.recorder), &used),
                Some(limiter) => {
                    self.serve_now(|| limiter.admit_stolen(chain, &self.recorder), &used)
                }
            };
            if let Some(waiting) = waiting {
                waiting.spawn();
            }
            served += 1;
        }
        self.recorder.end_row();
        self.recorder.count(Count::Stolen, served);
        if let Some(used) = last {
            self.publish(&used);
        }
    }

    /// Publishes what was returned to a ring. Returns whether the guest was called.
    fn publish(&self, used: &UsedRing) -> bool {
        let published = used.publish_counted();
        self.recorder.published(published.chains, published.called);
        published.called
    }

    /// Logs and counts a faulty chain that was returned empty.
    fn report_fault(&mut self, index: QueueIndex, fault: BadChain) {
        self.recorder.count(Count::FaultyChains, 1);
        self.faults.report(index, fault);
    }

    /// Serves one chain of the queue that `used` is part of, or holds it back.
    fn serve(&mut self, chain: Chain, used: &Arc<UsedRing>) -> Option<Waiting> {
        match &mut self.limiter {
            None => self.serve_now(|| ChainTransport::new(chain, &self.recorder), used),
            Some(limiter) => {
                let request = limiter.admit(chain, &self.recorder)?;
                self.serve_now(|| request, used)
            }
        }
    }

    /// Applies other limits.
    fn limit(&mut self, buckets: Option<Arc<Buckets>>, clock: Clock) {
        match (buckets, &mut self.limiter) {
            (Some(buckets), Some(limiter)) => limiter.replace(buckets),
            (Some(buckets), None) => self.limiter = Some(Box::new(Limiter::new(buckets, clock))),
            (None, limiter) => {
                let held = limiter.take().map(|limiter| limiter.take_all());
                self.serve_held(held.into_iter().flatten());
            }
        }
    }

    /// Serves requests that were held back until now, a batch of them.
    fn serve_due(&mut self) {
        let mut last = None;
        self.recorder.begin_row(Row::SLOW);
        for _ in 0..MAX_DRAIN {
            let due = self.limiter.as_mut().and_then(|limiter| limiter.pop_due());
            let Some(request) = due else {
                break;
            };
            self.serve_next(request, &mut last);
        }
        self.recorder.end_row();
        if let Some(used) = last {
            self.publish(&used);
        }
    }

    /// Serves requests that were held back.
    fn serve_held(&self, requests: impl IntoIterator<Item = LimitedTransport>) {
        let mut last = None;
        for request in requests {
            self.serve_next(request, &mut last);
        }
        if let Some(used) = last {
            self.publish(&used);
        }
    }

    /// Serves a request. Publishes the replies of the queue before, `last`, if it is another one.
    fn serve_next(&self, request: LimitedTransport, last: &mut Option<Arc<UsedRing>>) {
        let used = Arc::clone(request.used());
        if let Some(waiting) = self.serve_now(|| request, &used) {
            waiting.spawn();
        }
        if let Some(previous) = last.replace(Arc::clone(&used))
            && !Arc::ptr_eq(&previous, &used)
        {
            self.publish(&previous);
        }
    }

    /// Serves the request that `transport` returns, of the queue that `used` is part of. Returns it if
    /// it waits for the host.
    fn serve_now<T: Transport>(
        &self,
        transport: impl FnOnce() -> T,
        used: &Arc<UsedRing>,
    ) -> Option<Waiting> {
        let session = &self.session;
        // No request should cause a panic. If one does, dropping the transport has replied to it,
        // and the worker continues.
        match catch_unwind(AssertUnwindSafe(|| session.serve(transport()))) {
            Ok(Outcome::Done) => None,
            Ok(Outcome::Later(request)) => {
                self.after_wait.set(AFTER_WAIT);
                self.recorder.begin_wait();
                let guard = self.completions.begin(Arc::clone(used));
                Some(Waiting::new(request, guard))
            }
            Err(_panic) => {
                log::error!("serving a request panicked");
                None
            }
        }
    }
}
