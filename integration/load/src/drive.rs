//! The threads that drive the lanes, and the phases that they go through together.
//!
//! The invariant: when [`drive`] returns, its threads have ended, and if it returns an outcome,
//! nothing is in flight.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vmm::Event;
use vmm::ring::RingError;

use crate::cli::Wait;
use crate::forgets::Forgets;
use crate::lane::{Clock, Lane, Phase, Remains};
use crate::process::{Counters, Process, ProcessError, Usage};
use crate::program::Failure;

/// How long a reply may take.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);

/// How long to warm up and to measure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) warm_up: Duration,
    pub(crate) measure: Duration,
    /// Each lane counts a number of operations instead.
    pub(crate) counted: bool,
    pub(crate) wait: Wait,
    pub(crate) threads: usize,
}

/// Why a case has no outcome.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DriveError {
    /// A lane failed.
    #[error("the case failed")]
    Lane(#[from] Failure),
    /// The server's process could not be measured.
    #[error("can't measure the server")]
    Process(#[from] ProcessError),
    /// A thread panicked.
    #[error("a thread of the generator panicked")]
    Panicked,
}

/// The outcome of a case.
pub(crate) struct Outcome {
    pub(crate) lanes: Vec<Remains>,
    /// The time during which it was measured.
    pub(crate) elapsed: Duration,
    /// What the server used during that time.
    pub(crate) server: Option<Usage>,
    /// Nanoseconds of CPU that this process used during that time.
    pub(crate) own_cpu: u64,
}

/// The phase, as the threads see it.
struct Stage(AtomicU8);

impl Stage {
    fn set(&self, phase: Phase) {
        let number = match phase {
            Phase::WarmUp => 0,
            Phase::Measure => 1,
            Phase::Stop => 2,
        };
        // Relaxed: no other data depends on it.
        self.0.store(number, Ordering::Relaxed);
    }

    fn get(&self) -> Phase {
        match self.0.load(Ordering::Relaxed) {
            0 => Phase::WarmUp,
            1 => Phase::Measure,
            _ => Phase::Stop,
        }
    }
}

/// Runs the lanes through all phases. Measures `server` if there is one.
pub(crate) fn drive(
    lanes: Vec<Lane>,
    plan: &Plan,
    forgets: &Forgets,
    server: Option<&Process>,
) -> Result<Outcome, DriveError> {
    let clock = Clock::start();
    let stage = Stage(AtomicU8::new(0));
    let mut shares: Vec<Vec<Lane>> = Vec::new();
    shares.resize_with(plan.threads.clamp(1, lanes.len().max(1)), Vec::new);
    let threads = shares.len();
    for (index, lane) in lanes.into_iter().enumerate() {
        if let Some(share) = shares.get_mut(index % threads) {
            share.push(lane);
        }
    }
    let (ended, endings) = mpsc::channel();
    std::thread::scope(|scope| {
        let mut handles = Vec::new();
        for mut share in shares {
            let (ended, stage, clock) = (ended.clone(), &stage, &clock);
            handles.push(scope.spawn(move || {
                let result = run(&mut share, plan.wait, clock, stage, forgets);
                // The receiver is gone if another thread failed before.
                let _ = ended.send(result.is_ok());
                result.map(|()| share)
            }));
        }
        drop(ended);
        let measured = measure(plan, &clock, &stage, &endings, server);
        stage.set(Phase::Stop);
        let mut lanes = Vec::new();
        let mut failure = None;
        for handle in handles {
            match handle.join() {
                Ok(Ok(share)) => lanes.extend(share.into_iter().map(Lane::finish)),
                Ok(Err(error)) => failure = Some(DriveError::Lane(error)),
                Err(_) => failure = Some(DriveError::Panicked),
            }
        }
        if let Some(failure) = failure {
            return Err(failure);
        }
        let measured = measured?;
        lanes.sort_unstable_by_key(|lane| lane.first);
        let elapsed = match lanes.iter().map(|lane| lane.last).max() {
            Some(last) if plan.counted && last > measured.from => last - measured.from,
            _ => measured.elapsed,
        };
        Ok(Outcome {
            lanes,
            elapsed: Duration::from_nanos(elapsed),
            server: measured.server,
            own_cpu: measured.own_cpu,
        })
    })
}

struct Measured {
    from: u64,
    elapsed: u64,
    server: Option<Usage>,
    own_cpu: u64,
}

/// Times the phases. Returns early if the threads end by themselves.
fn measure(
    plan: &Plan,
    clock: &Clock,
    stage: &Stage,
    endings: &mpsc::Receiver<bool>,
    server: Option<&Process>,
) -> Result<Measured, ProcessError> {
    let well = sleep(endings, plan.warm_up, false);
    let before: Option<Counters> = server.map(Process::counters).transpose()?;
    let (from, own) = (clock.now(), own_cpu());
    stage.set(Phase::Measure);
    if well {
        sleep(endings, plan.measure, plan.counted);
    }
    let (elapsed, own_cpu) = (clock.now() - from, own_cpu() - own);
    stage.set(Phase::Stop);
    let used = server
        .zip(before)
        .map(|(server, before)| server.since(&before));
    Ok(Measured {
        from,
        elapsed,
        server: used.transpose()?,
        own_cpu,
    })
}

/// Sleeps until the time is up, a thread has failed, or all have ended by themselves. False if one
/// has failed.
fn sleep(endings: &mpsc::Receiver<bool>, time: Duration, counted: bool) -> bool {
    let deadline = Instant::now() + time;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match endings.recv_timeout(left) {
            Ok(true) => {}
            Ok(false) => return false,
            Err(RecvTimeoutError::Timeout) => return true,
            Err(RecvTimeoutError::Disconnected) => {
                // They had nothing to do, as in the case `idle`.
                if !counted {
                    std::thread::sleep(left);
                }
                return true;
            }
        }
    }
}

/// CPU time of this process so far, in nanoseconds.
pub(crate) fn own_cpu() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// The body of a thread.
fn run(
    lanes: &mut [Lane],
    wait: Wait,
    clock: &Clock,
    stage: &Stage,
    forgets: &Forgets,
) -> Result<(), Failure> {
    let events: Vec<Arc<Event>> = lanes
        .iter_mut()
        .map(|lane| Arc::clone(lane.queue().call_event()))
        .collect();
    let polled = events
        .iter()
        .map(|event| PollFd::from_borrowed_fd(event.as_fd(), PollFlags::IN));
    let mut polled: Vec<_> = polled.collect();
    for lane in &mut *lanes {
        if wait == Wait::Poll {
            lane.queue().suppress_calls();
        }
        lane.start(clock)?;
    }
    loop {
        let phase = stage.get();
        let mut busy = false;
        for lane in &mut *lanes {
            busy |= lane.turn(clock, phase, forgets)?;
        }
        if busy {
            continue;
        }
        if lanes.iter().all(Lane::is_idle) {
            return Ok(());
        }
        match (wait, &mut *lanes) {
            (Wait::Call, [lane]) => lane.queue().wait(TIMEOUT)?,
            (Wait::Call, lanes) => sleep_for_any(lanes, &events, &mut polled)?,
            (Wait::Poll, lanes) => spin_for_any(lanes)?,
        }
    }
}

/// Sleeps until a queue has completions.
fn sleep_for_any(
    lanes: &mut [Lane],
    events: &[Arc<Event>],
    polled: &mut [PollFd<'_>],
) -> Result<(), Failure> {
    for lane in &mut *lanes {
        lane.queue().ask_for_call(1);
    }
    if any_ready(lanes)? {
        return Ok(());
    }
    let timeout = Timespec::try_from(TIMEOUT).unwrap_or_default();
    match poll(polled, Some(&timeout)) {
        Ok(0) => Err(timed_out(lanes)),
        Ok(_) => {
            for (event, polled) in events.iter().zip(polled) {
                if !polled.revents().is_empty() {
                    event.take().map_err(RingError::Event)?;
                }
            }
            Ok(())
        }
        Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(RingError::Event(errno.into()).into()),
    }
}

/// Polls the used rings until one has completions.
fn spin_for_any(lanes: &mut [Lane]) -> Result<(), Failure> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        // The clock costs more than polling a ring.
        for _ in 0..64 {
            if any_ready(lanes)? {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        if Instant::now() >= deadline {
            return Err(timed_out(lanes));
        }
    }
}

fn any_ready(lanes: &mut [Lane]) -> Result<bool, Failure> {
    for lane in lanes {
        if lane.queue().ready()? > 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

fn timed_out(lanes: &mut [Lane]) -> Failure {
    let in_flight = lanes.iter_mut().map(|lane| lane.queue().in_flight()).sum();
    RingError::TimedOut { in_flight }.into()
}
