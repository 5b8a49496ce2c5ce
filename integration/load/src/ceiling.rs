//! Measures the generator itself: the cases against a responder in a thread of this process.
//!
//! There are two measurements. With the responder in a thread of its own, cache lines move between
//! processors as they do with a server, but other load on the machine shows. In turns in one
//! thread, by CPU time, it does not. Both are lower bounds, as they include the responder's work.
//! The invariant: the same lanes and programs are used as against a server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmm::ring::{QueueOptions, RingError};
use vmm::{Memory, Queue, Region};

use crate::cli::{Ceiling, Descriptors};
use crate::drive::{DriveError, Plan, drive, own_cpu};
use crate::forgets::{Forgets, Form};
use crate::lane::{Clock, Lane, Phase};
use crate::program::{self, Builder, Failure, Manner, Program};
use crate::report::{Measurement, Raw, heading};
use crate::responder::Responder;
use crate::run::preparer;
use crate::scene::Scene;
use crate::spec::{Spec, Typed};

/// The cases for which the responder's empty replies suffice.
const CASES: [&str; 6] = [
    "getattr@1",
    "getattr@32",
    "lookup@32",
    "read/4k@32",
    "read/4k@128",
    "read-seq/1m@8",
];

/// Why the measurement fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CeilingError {
    /// Guest memory couldn't be made.
    #[error("no guest memory")]
    Memory(#[from] vmm::memory::MemoryError),
    /// The queue failed.
    #[error("no queue")]
    Queue(#[from] RingError),
    /// The requests could not be prepared.
    #[error("the requests could not be prepared")]
    Prepare(#[from] Failure),
    /// A case failed.
    #[error("{0} failed")]
    Drive(Spec, #[source] DriveError),
}

/// A queue, its device, and the programs of a case.
struct Rig {
    queue: Queue,
    responder: Responder,
    programs: Vec<Box<dyn Program>>,
    forgets: Forgets,
}

fn rig(spec: Spec) -> Result<Rig, CeilingError> {
    let memory = Memory::new(&[Region::new(0, 1 << 30)])?;
    let options = QueueOptions {
        event_idx: true,
        indirect: true,
        indirect_capacity: 288,
        ..QueueOptions::new(1024)
    };
    let queue = Queue::new(&memory, &options)?;
    let urgent = Queue::new(&memory, &options)?;
    let responder = Responder::new(&memory, &queue)?;
    let scene = Scene::nowhere(256 << 20);
    let manner = Manner {
        verify: false,
        flush: false,
        capabilities: false,
    };
    let client = preparer(&memory, Descriptors::Pages);
    let mut builder = Builder::new(client, memory, &scene, spec, manner);
    let forgets =
        Forgets::new(&mut builder.client, urgent, Form::Case).map_err(Failure::Request)?;
    let programs: Result<_, _> = (0..spec.depth).map(|_| builder.build()).collect();
    Ok(Rig {
        queue,
        responder,
        programs: programs?,
        forgets,
    })
}

/// Runs the cases.
pub(crate) fn run(options: &Ceiling) -> Result<(), CeilingError> {
    if !options.json {
        println!("{}", heading());
    }
    for case in CASES {
        let Ok(typed) = case.parse::<Typed>() else {
            continue;
        };
        let spec = typed.resolve(None, None, None);
        for measured in [in_turns(spec, options)?, in_threads(spec, options)?] {
            if options.json {
                println!("{}", measured.json());
            } else {
                println!("{}", measured.row());
            }
        }
    }
    Ok(())
}

/// Driver and device take turns in this thread.
fn in_turns(spec: Spec, options: &Ceiling) -> Result<Measurement, CeilingError> {
    let mut rig = rig(spec)?;
    rig.queue.suppress_calls();
    let mut lane = Lane::new(rig.queue, rig.programs, 0, None);
    let clock = Clock::start();
    let own = own_cpu();
    lane.start(&clock)?;
    let until = u64::try_from(options.seconds.as_nanos()).unwrap_or(u64::MAX);
    while clock.now() < until {
        for _ in 0..64 {
            rig.responder.turn();
            lane.turn(&clock, Phase::Measure, &rig.forgets)?;
        }
    }
    let own_cpu = own_cpu() - own;
    let lane = lane.finish();
    let raw = Raw {
        latencies: &lane.latencies,
        elapsed: Duration::from_nanos(own_cpu),
        server: None,
        own_cpu,
        threads: 1,
        bytes: program::bytes(spec),
        in_flight: spec.depth.into(),
    };
    let case = format!("{spec} in turns");
    Ok(Measurement::new("ceiling", case, 1, &raw))
}

/// Driver and device have a thread each.
fn in_threads(spec: Spec, options: &Ceiling) -> Result<Measurement, CeilingError> {
    let Rig {
        queue,
        mut responder,
        programs,
        forgets,
    } = rig(spec)?;
    let call = Arc::clone(queue.call_event());
    let lane = Lane::new(queue, programs, 0, None);
    let plan = Plan {
        warm_up: options.seconds / 10,
        measure: options.seconds,
        counted: false,
        wait: options.wait,
        threads: 1,
    };
    let stop = AtomicBool::new(false);
    let driven = std::thread::scope(|scope| {
        scope.spawn(|| responder.run(&call, &stop));
        let driven = drive(vec![lane], &plan, &forgets, None);
        // Relaxed: no other data depends on it.
        stop.store(true, Ordering::Relaxed);
        driven
    });
    let outcome = driven.map_err(|error| CeilingError::Drive(spec, error))?;
    let [lane] = &outcome.lanes[..] else {
        return Err(CeilingError::Drive(spec, DriveError::Panicked));
    };
    let raw = Raw {
        latencies: &lane.latencies,
        elapsed: outcome.elapsed,
        server: None,
        own_cpu: outcome.own_cpu,
        threads: 2,
        bytes: program::bytes(spec),
        in_flight: spec.depth.into(),
    };
    let case = format!("{spec} in threads");
    Ok(Measurement::new("ceiling", case, 1, &raw))
}

#[cfg(test)]
mod tests {
    use testing::allocations::{Counting, of_this_thread};

    use super::*;
    use crate::cli::Wait;

    #[global_allocator]
    static COUNTING: Counting = Counting;

    #[test]
    fn no_case_allocates_for_a_request() {
        for case in CASES {
            let spec = case.parse::<Typed>().unwrap().resolve(None, None, None);
            let mut rig = rig(spec).unwrap();
            let mut lane = Lane::new(rig.queue, rig.programs, 0, None);
            let clock = Clock::start();
            let before = of_this_thread();
            lane.start(&clock).unwrap();
            for _ in 0..1000 {
                rig.responder.turn();
                assert!(lane.turn(&clock, Phase::Measure, &rig.forgets).unwrap());
            }
            rig.responder.turn();
            lane.turn(&clock, Phase::Stop, &rig.forgets).unwrap();
            assert_eq!(of_this_thread(), before, "{case}");
            assert!(lane.is_idle());
            let done = lane.finish().latencies.count();
            assert_eq!(done, 1000 * u64::from(spec.depth), "{case}");
        }
    }

    #[test]
    fn every_way_of_waiting_gets_through() {
        for wait in [Wait::Call, Wait::Poll] {
            let spec = "read/4k@8".parse::<Typed>().unwrap();
            let mut rig = rig(spec.resolve(None, None, None)).unwrap();
            let call = Arc::clone(rig.queue.call_event());
            let lane = Lane::new(rig.queue, rig.programs, 0, Some(1000));
            let plan = Plan {
                warm_up: Duration::ZERO,
                measure: Duration::from_secs(60),
                counted: true,
                wait,
                threads: 1,
            };
            let stop = AtomicBool::new(false);
            let outcome = std::thread::scope(|scope| {
                scope.spawn(|| rig.responder.run(&call, &stop));
                let outcome = drive(vec![lane], &plan, &rig.forgets, None);
                stop.store(true, Ordering::Relaxed);
                outcome
            });
            let outcome = outcome.unwrap();
            assert_eq!(outcome.lanes[0].latencies.count(), 1000);
            assert!(outcome.elapsed < plan.measure);
        }
    }
}
