//! The loop of one worker: its queues' kicks, the backlog of others, the session's commands.
//!
//! All is one task, so that a worker offers itself for others' backlog only while its thread
//! has nothing to do. Requests that wait are tasks of their own beside it. The invariant:
//! what a pass completes is published at its end at the latest, before the loop waits for anything.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::oneshot;

use super::batch_size::BatchSize;
use super::busy_poll::BusyPoll;
use super::chain_transport::ChainTransport;
use super::completion_batch::CompletionBatch;
use super::faults::Faults;
use super::kick_moderation::{self, KickModeration};
use crate::fs::FileSystem;
use crate::fuse::{Outcome, Session};
use crate::io::{self, spawn};
use crate::scheduler::{Placement, Receiver, Sender};
use crate::virtqueue::{Chain, Queue, QueueIndex};

/// Chains taken off a ring before their replies are published and other queues looked at.
const BATCH: usize = 64;

/// How long to look for what the disk does, at most: about as long as it takes to sleep and be
/// woken, which costs processor time too. Most disks take longer.
const DISK_POLL: Duration = Duration::from_micros(10);

/// What the session asks of a worker.
#[derive(Debug)]
pub(super) enum Command {
    /// Serve this queue from now on.
    Run {
        queue: Box<Queue>,
        kick: Arc<OwnedFd>,
        done: mpsc::Sender<std::io::Result<()>>,
    },
    /// Serve what is on this thread's queues by now.
    ServeWaiting {
        /// Dropped when that is done.
        done: oneshot::Sender<()>,
    },
    /// Take no more off this queue; chains under way go on.
    Stop {
        index: QueueIndex,
        done: mpsc::Sender<Option<Box<Queue>>>,
    },
}

/// What a worker does before it sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IdlePolicy {
    /// Looks at its rings for up to so long, if that pays.
    BusyPoll(Duration),
    /// ModerateKicks, if that pays: nobody waits for it.
    ModerateKicks,
}

/// How a worker gives to others and takes from them.
#[derive(Debug)]
pub(super) struct Backlog {
    pub(super) placement: Placement,
    pub(super) give: Sender<Chain>,
    pub(super) take: Receiver<Chain>,
}

/// A queue that this worker owns.
#[derive(Debug)]
struct Owned {
    queue: Box<Queue>,
    kick: io::Event,
    /// There may be chains on the ring.
    ready: bool,
    /// The guest has been asked for a kick at the next chain.
    notifications_enabled: bool,
    batch_size: BatchSize,
}

/// Why the loop goes on.
enum Event {
    /// Some queue is ready.
    Ready,
    Command(Command),
    /// Another worker's chain.
    Chain(Chain),
    /// Nothing is under way any more.
    Idle,
    /// The session is over.
    End,
}

/// One worker's loop.
pub(super) struct Loop<F: ?Sized> {
    session: Arc<Session<F>>,
    commands: UnboundedReceiver<Command>,
    /// None where there is nobody to share with, or nothing to be shared.
    backlog: Option<Backlog>,
    queues: Vec<Owned>,
    /// Chains on their way to other workers.
    batch: Vec<Chain>,
    completions: Rc<CompletionBatch>,
    faults: Faults,
    /// For the guest's next request, with nothing under way.
    busy_poll: BusyPoll,
    /// For the disk.
    disk_poll: BusyPoll,
    /// Something of the last pass had to be waited for. Beside that, to be woken by the guest's next
    /// request costs little.
    waited: Cell<bool>,
    nap: KickModeration,
}

impl<F: FileSystem + ?Sized> Loop<F> {
    pub(super) fn new(
        session: Arc<Session<F>>,
        commands: UnboundedReceiver<Command>,
        backlog: Option<Backlog>,
        policy: IdlePolicy,
    ) -> Self {
        let poll = match policy {
            IdlePolicy::BusyPoll(poll) => poll,
            IdlePolicy::ModerateKicks => Duration::ZERO,
        };
        Self {
            session,
            commands,
            backlog,
            queues: Vec::new(),
            batch: Vec::new(),
            completions: Rc::default(),
            faults: Faults::default(),
            busy_poll: BusyPoll::new(poll),
            disk_poll: BusyPoll::new(poll.min(DISK_POLL)),
            waited: Cell::new(false),
            nap: KickModeration::new(policy == IdlePolicy::ModerateKicks),
        }
    }

    /// Serves until the session's end of the commands is gone, then waits for what is under way.
    pub(super) async fn run(mut self) {
        let publisher = spawn(Rc::clone(&self.completions).publish());
        loop {
            match self.next_event().await {
                Event::Ready => (),
                // What completes may be one by one; the guest waits for it.
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
        }
        self.completions.drained().await;
        publisher.abort();
    }

    /// What to do next; waits if there is nothing.
    async fn next_event(&mut self) -> Event {
        if self.queues.iter().any(|owned| owned.ready) {
            if let Ok(command) = self.commands.try_recv() {
                return Event::Command(command);
            }
            // Lets the tasks run, and the runtime see the other queues' kicks.
            tokio::task::yield_now().await;
            return Event::Ready;
        }
        let waits = self.completions.under_way() != 0;
        if waits && self.disk_poll.pays() {
            // Hands to the kernel what is looked for then.
            tokio::task::yield_now().await;
        }
        if self.look() {
            if !self.queues.iter().any(|owned| owned.ready) {
                // Lets the tasks run whose operations are complete.
                tokio::task::yield_now().await;
            }
            return Event::Ready;
        }
        if self.nap.pays() {
            return self.nap().await;
        }
        if self.arm() {
            return Event::Ready;
        }
        self.nap.sleeps();
        let event = self.wait().await;
        match event {
            Event::Ready => {
                self.busy_poll.woken();
                self.nap.woken();
            }
            Event::Idle if waits => self.disk_poll.woken(),
            _ => (),
        }
        event
    }

    /// Sleeps for a moment, unless a ring fills up, and looks at the rings then.
    async fn nap(&mut self) -> Event {
        let queues = &mut self.queues;
        let many = queues
            .iter_mut()
            .fold(false, |many, owned| many | owned.queue.arm_for_many());
        if !many {
            let commands = &mut self.commands;
            let woken = poll_fn(|cx| {
                if let Poll::Ready(command) = commands.poll_recv(cx) {
                    return Poll::Ready(Some(command.map_or(Event::End, Event::Command)));
                }
                let kicked = queues.iter_mut().fold(false, |kicked, owned| {
                    kicked | owned.kick.poll(cx).is_ready()
                });
                if kicked {
                    Poll::Ready(None)
                } else {
                    Poll::Pending
                }
            });
            if let Ok(Some(event)) = tokio::time::timeout(kick_moderation::LENGTH, woken).await {
                return event;
            }
        }
        let found = self.queues.iter_mut().fold(false, |found, owned| {
            owned.ready |= owned.queue.has_more();
            found | owned.ready
        });
        self.nap.taken(found);
        Event::Ready
    }

    /// Looks at the rings for a moment, and at what the kernel has completed. True if there is
    /// something to do.
    fn look(&mut self) -> bool {
        let queues = &mut self.queues;
        if queues.is_empty() {
            return false;
        }
        let waits = self.completions.under_way() != 0;
        if !waits && self.waited.get() {
            return false;
        }
        let busy_poll = if waits {
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
                owned.queue.disarm();
            }
        }
        busy_poll.look(|| {
            let any = queues.iter_mut().fold(false, |any, owned| {
                owned.ready |= owned.queue.has_more();
                any | owned.ready
            });
            any || (waits && io::has_completions())
        })
    }

    /// Asks for kicks. True if there is something to do instead.
    fn arm(&mut self) -> bool {
        let queues = &mut self.queues;
        for owned in queues
            .iter_mut()
            .filter(|owned| !owned.notifications_enabled)
        {
            owned.notifications_enabled = true;
            owned.ready |= owned.queue.arm();
        }
        queues.iter().any(|owned| owned.ready)
    }

    async fn wait(&mut self) -> Event {
        let Self {
            commands,
            backlog,
            queues,
            completions,
            ..
        } = self;
        // Waiting here, and nowhere else, shows this worker to the others as idle.
        let mut chain = pin!(async {
            match backlog {
                Some(backlog) => backlog.take.recv().await,
                None => std::future::pending().await,
            }
        });
        let mut idle = pin!(completions.idle());
        poll_fn(|cx| {
            match commands.poll_recv(cx) {
                Poll::Ready(Some(command)) => return Poll::Ready(Event::Command(command)),
                Poll::Ready(None) => return Poll::Ready(Event::End),
                Poll::Pending => (),
            }
            let mut ready = false;
            for owned in queues.iter_mut() {
                match owned.kick.poll(cx) {
                    Poll::Ready(Ok(())) => owned.ready = true,
                    Poll::Ready(Err(error)) => log::error!("waiting for a kick: {error}"),
                    Poll::Pending => (),
                }
                ready |= owned.ready;
            }
            if ready {
                return Poll::Ready(Event::Ready);
            }
            if idle.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Event::Idle);
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
                    self.queues.push(Owned {
                        queue,
                        kick,
                        // What came before the kick could be seen has no kick any more.
                        ready: true,
                        notifications_enabled: true,
                        batch_size: BatchSize::default(),
                    });
                });
                // The session waits for this; were it gone, so would be the need to tell.
                let _ = done.send(outcome);
            }
            Command::ServeWaiting { done } => {
                for at in 0..self.queues.len() {
                    // A guest that goes on filling the ring doesn't keep it here.
                    let passes = usize::from(self.queues[at].queue.waiting()).div_ceil(BATCH);
                    (0..passes).for_each(|_| self.drain_batch(at));
                }
                drop(done);
            }
            Command::Stop { index, done } => {
                let at = self
                    .queues
                    .iter()
                    .position(|owned| owned.queue.index() == index);
                let queue = at.map(|at| self.queues.swap_remove(at).queue);
                let _ = done.send(queue);
            }
        }
    }

    /// Takes what is on the ring of a queue, serves it, publishes the replies.
    fn drain_batch(&mut self, at: usize) {
        let owned = &mut self.queues[at];
        let index = owned.queue.index();
        if owned.notifications_enabled {
            owned.notifications_enabled = false;
            owned.queue.disarm();
        }
        let used = Arc::clone(owned.queue.used());
        let there = usize::from(owned.queue.waiting()).min(BATCH);
        let away = self.backlog.as_ref().map_or(0, |backlog| {
            backlog.placement.spread(there, backlog.give.idle())
        });
        if away != 0 {
            self.offload(at, away);
        }
        let mut taken = away;
        self.waited.set(false);
        self.queues[at].batch_size.begin(there);
        while (taken < BATCH || self.queues[at].queue.is_resuming())
            && let Some(chain) = self.queues[at].queue.take()
        {
            taken += 1;
            match chain {
                Ok(chain) => self.serve(chain),
                Err(fault) => self.faults.report(index, fault),
            }
            let Owned {
                batch_size, queue, ..
            } = &mut self.queues[at];
            if batch_size.served(|| usize::from(queue.waiting())) {
                used.publish();
            }
        }
        used.publish();
        let owned = &mut self.queues[at];
        owned.ready = owned.queue.has_more();
    }

    /// Takes `count` chains off a queue and lets other workers serve them.
    fn offload(&mut self, at: usize, count: usize) {
        let Some(backlog) = &self.backlog else {
            return;
        };
        let queue = &mut self.queues[at].queue;
        for _ in 0..count {
            match queue.take() {
                Some(Ok(chain)) => self.batch.push(chain),
                Some(Err(fault)) => self.faults.report(queue.index(), fault),
                None => break,
            }
        }
        // Closed only when all workers are gone, this one included.
        let _ = backlog.give.send_batch(self.batch.drain(..));
    }

    /// Serves chains of another worker's queue.
    fn serve_stolen(&mut self, first: Chain) {
        let mut next = Some(first);
        let mut done = 0;
        let mut last: Option<Arc<_>> = None;
        while let Some(chain) = next.take() {
            let used = Arc::clone(chain.used());
            if let Some(previous) = last.replace(Arc::clone(&used))
                && !Arc::ptr_eq(&previous, &used)
            {
                previous.publish();
            }
            self.serve(chain);
            done += 1;
            if done < BATCH && !self.queues.iter().any(|owned| owned.ready) {
                next = self
                    .backlog
                    .as_ref()
                    .and_then(|backlog| backlog.take.try_recv());
            }
        }
        if let Some(used) = last {
            used.publish();
        }
    }

    /// Serves one chain: at once, or by a task where it must wait.
    fn serve(&self, chain: Chain) {
        let used = Arc::clone(chain.used());
        let session = &self.session;
        // Nothing a guest sends should panic; if something does, the request's own drop has
        // answered it and the worker lives on.
        match catch_unwind(AssertUnwindSafe(|| {
            session.serve(ChainTransport::new(chain))
        })) {
            Ok(Outcome::Done) => (),
            Ok(Outcome::Later(request)) => {
                self.waited.set(true);
                let guard = self.completions.begin(used);
                spawn(async move {
                    request.await;
                    drop(guard);
                });
            }
            Err(_panic) => log::error!("serving a request panicked"),
        }
    }
}
