//! The cases against a server: connect, prepare, drive, check, print.
//!
//! The invariant: between cases nothing is in flight, and guest memory is as it was before the
//! first one.

use std::io;
use std::num::TryFromIntError;
use std::path::Path;

use vmm::fuse::wire::init;
use vmm::fuse::{Client, FuseError, Guest, LINUX_OFFERS, Layout};
use vmm::session::SessionError;
use vmm::{Memory, Profile, Queue, Region, Session};

use crate::cli::{Descriptors, Run};
use crate::drive::{DriveError, Outcome, Plan, TIMEOUT, drive};
use crate::forgets::Forgets;
use crate::histogram::Histogram;
use crate::lane::Lane;
use crate::pattern::Seed;
use crate::process::{Process, ProcessError};
use crate::program::{self, Builder, Failure, Manner, Written};
use crate::report::{Measurement, Raw, heading};
use crate::scene::Scene;
use crate::share::{self, DATA, DIRECT, Share, ShareError};
use crate::spec::{Kind, LONGEST, PAGE, Spec, Transfer};

/// Why a run fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    /// An option is missing.
    #[error("{0} is needed")]
    Missing(&'static str),
    /// The files could not be made or read.
    #[error("can't make or read the files of the share")]
    Share(#[from] ShareError),
    /// No session with the server.
    #[error("there is no session with the server at {path}")]
    Session {
        path: String,
        #[source]
        source: SessionError,
    },
    /// INIT, or another request before the cases, failed.
    #[error("the preparation of the cases failed on the server")]
    Scene(#[source] FuseError),
    /// The server's process can't be read.
    #[error("can't measure the server's process")]
    Process(#[from] ProcessError),
    /// A transfer is longer than the server accepts.
    #[error("{spec} is too large: the server accepts {longest} bytes at a time")]
    TooLarge { spec: Spec, longest: u32 },
    /// A case's requests could not be prepared.
    #[error("{spec} could not be prepared")]
    Prepare {
        spec: Spec,
        #[source]
        source: Failure,
    },
    /// A case failed.
    #[error("{spec} failed")]
    Drive {
        spec: Spec,
        #[source]
        source: DriveError,
    },
    /// A case's file has wrong content afterwards.
    #[error("after {spec} the file is wrong at offset {offset}")]
    Written { spec: Spec, offset: u64 },
    /// The numbers don't fit this machine.
    #[error("the number does not fit")]
    Number(#[from] TryFromIntError),
    /// The results could not be printed.
    #[error("can't print")]
    Print(#[from] io::Error),
}

/// Guest memory without queues, which suffices to prepare requests.
pub(crate) struct NoQueues(Memory);

impl Guest for NoQueues {
    fn memory(&self) -> &Memory {
        &self.0
    }

    fn queues(&mut self) -> &mut [Queue] {
        &mut []
    }
}

/// A client that prepares requests in this memory, after the areas that are allocated already.
pub(crate) fn preparer(memory: &Memory, descriptors: Descriptors) -> Client<NoQueues> {
    let mut client = Client::new(NoQueues(memory.clone()));
    client.set_layout(match descriptors {
        Descriptors::Pages => Layout::linux(),
        Descriptors::Whole => Layout::default(),
    });
    client
}

/// Runs the cases that the options name.
pub(crate) fn run(options: &Run) -> Result<(), RunError> {
    let socket = options.socket.as_deref();
    let socket = socket.ok_or(RunError::Missing("--socket"))?;
    let shared_dir = options.share.shared_dir.as_deref();
    let shared_dir = shared_dir.ok_or(RunError::Missing("--shared-dir"))?;
    let share = Share::new(shared_dir, options.share.file_size, options.share.keep)?;
    let process = options.pid.map(Process::new).transpose()?;
    let specs = options.measure.specs();
    let queues = specs.iter().map(|spec| spec.queues).max().unwrap_or(1);

    let session = connect(socket, queues)?;
    let mut client = Client::new(session);
    client.set_timeout(TIMEOUT);
    let without = if options.zero_message_open {
        0
    } else {
        init::NO_OPEN_SUPPORT | init::NO_OPENDIR_SUPPORT
    };
    let agreed = client.init_offering(LINUX_OFFERS & !without);
    agreed.map_err(RunError::Scene)?;
    let scene = Scene::new(&mut client, share.file_size()).map_err(RunError::Scene)?;
    if !options.measure.json {
        println!("{}", heading());
    }
    let mut bench = Bench {
        options,
        share: &share,
        process: process.as_ref(),
        scene: &scene,
        client,
    };
    for spec in specs {
        let measured = bench.measure(spec)?;
        if options.measure.json {
            println!("{}", measured.json());
        } else {
            println!("{}", measured.row());
        }
    }
    Ok(())
}

fn connect(path: &Path, queues: u16) -> Result<Session, RunError> {
    // Reserved, not used: only pages that a case touches take memory.
    let memory = [Region::new(0, 16 << 20), Region::new(4 << 30, 4 << 30)];
    let options = vmm::Options::default()
        .request_queues(queues)
        .memory(&memory)
        .timeout(TIMEOUT);
    let connected = Profile::Simple.connect_path(path, &options);
    connected.map_err(|source| RunError::Session {
        path: path.display().to_string(),
        source,
    })
}

/// State that the cases share.
struct Bench<'a> {
    options: &'a Run,
    share: &'a Share,
    process: Option<&'a Process>,
    scene: &'a Scene,
    client: Client<Session>,
}

impl Bench<'_> {
    fn measure(&mut self, spec: Spec) -> Result<Measurement, RunError> {
        let longest = self.client.max_write();
        let needed = match spec.kind {
            Kind::Data(_) | Kind::Mixed => spec.size,
            Kind::VmLike => LONGEST,
            _ => 0,
        };
        if needed > longest {
            return Err(RunError::TooLarge { spec, longest });
        }
        self.before(spec)?;
        let memory = self.client.guest().memory.clone();
        let mark = memory.mark();
        let (outcome, written) = self.drive(spec, &memory)?;
        memory.reset_to(&mark);
        self.after(spec, written.as_deref())?;

        let mut latencies = Histogram::new();
        for lane in &outcome.lanes {
            latencies.merge(&lane.latencies);
        }
        let raw = Raw {
            latencies: &latencies,
            elapsed: outcome.elapsed,
            server: outcome.server,
            own_cpu: outcome.own_cpu,
            threads: self.threads(spec),
            bytes: program::bytes(spec),
            in_flight: u32::from(spec.depth) * u32::from(spec.queues),
        };
        let items = program::items(spec.kind);
        let label = &self.options.measure.label;
        let mut measured = Measurement::new(label, spec.to_string(), items, &raw);
        measured.verified = self.options.verify && spec.kind != Kind::Idle;
        measured.note = self.note(spec, measured.operations);
        let lanes = outcome.lanes.into_iter().map(|lane| lane.queue);
        self.client.guest().queues.splice(1..1, lanes);
        Ok(measured)
    }

    /// Drives the case's queues, which are returned with the outcome; the others stay in the session.
    fn drive(
        &mut self,
        spec: Spec,
        memory: &Memory,
    ) -> Result<(Outcome, Option<std::sync::Arc<Written>>), RunError> {
        let prepare = |source| RunError::Prepare { spec, source };
        let manner = Manner {
            verify: self.options.verify,
            flush: !self.options.no_flush,
            // Where the server clears set-ID bits, Linux asks once for each file.
            capabilities: !self.options.no_getxattr && !self.client.has(init::HANDLE_KILLPRIV_V2),
        };
        let client = preparer(memory, self.options.descriptors);
        let mut builder = Builder::new(client, memory.clone(), self.scene, spec, manner);
        let mut lanes = Vec::new();
        let mut first = 0;
        let queues = &mut self.client.guest().queues;
        let used = usize::from(spec.queues);
        let rest = queues.split_off(queues.len().min(1 + used));
        let mut taken = std::mem::replace(queues, rest).into_iter();
        let urgent = taken.next().ok_or(RunError::Missing("a queue"))?;
        let forgets = Forgets::new(&mut builder.client, urgent, self.options.forget);
        let forgets = forgets.map_err(|error| prepare(error.into()))?;
        let depth = match spec.kind {
            Kind::Idle => 0,
            _ => spec.depth,
        };
        let budget = self.options.measure.ops.map(u64::from);
        for queue in taken {
            let programs: Result<Vec<_>, _> = (0..depth).map(|_| builder.build()).collect();
            lanes.push(Lane::new(queue, programs.map_err(prepare)?, first, budget));
            first += u64::from(depth);
        }
        let plan = Plan {
            warm_up: self.options.measure.warm_up,
            measure: self.options.measure.seconds,
            counted: budget.is_some() && spec.kind != Kind::Idle,
            wait: self.options.wait,
            threads: self.threads(spec),
        };
        let driven = drive(lanes, &plan, &forgets, self.process);
        let (urgent, forgotten) = forgets.finish();
        self.client.guest().queues.insert(0, urgent);
        let outcome = driven.map_err(|source| RunError::Drive { spec, source })?;
        forgotten.map_err(|error| RunError::Drive {
            spec,
            source: DriveError::Lane(error.into()),
        })?;
        Ok((outcome, builder.written))
    }

    fn threads(&self, spec: Spec) -> usize {
        let asked = usize::try_from(self.options.threads.get()).unwrap_or(usize::MAX);
        asked.min(usize::from(spec.queues))
    }

    /// Brings the host's caches into the state that the case measures.
    fn before(&self, spec: Spec) -> Result<(), RunError> {
        if self.options.drop_caches {
            share::drop_caches()?;
        }
        let Some(transfer) = transfer(spec) else {
            return Ok(());
        };
        let name = file(transfer);
        if self.options.verify {
            self.share.fill(name)?;
        }
        if transfer.direct {
            self.share.evict(name)?;
        } else {
            self.share.warm(name)?;
        }
        Ok(())
    }

    /// Checks what the case has written, and syncs it.
    fn after(&self, spec: Spec, written: Option<&Written>) -> Result<(), RunError> {
        let Some(transfer) = transfer(spec) else {
            return Ok(());
        };
        let name = file(transfer);
        if transfer.write {
            self.share.settle(name)?;
        }
        let Some(written) = written else {
            return Ok(());
        };
        let mut wrong = None;
        self.share.scan(name, |offset, bytes| {
            for (page, bytes) in (0..).zip(bytes.chunks(PAGE as usize)) {
                let at = offset + page * u64::from(PAGE);
                let seed = if written.contains(at) {
                    Seed::WRITTEN
                } else {
                    Seed::MADE
                };
                wrong = wrong.or_else(|| seed.difference(at, bytes));
            }
        })?;
        wrong.map_or(Ok(()), |offset| Err(RunError::Written { spec, offset }))
    }

    /// A remark on a result, if it needs one.
    fn note(&self, spec: Spec, operations: u64) -> Option<String> {
        if operations == 0 && spec.kind != Kind::Idle {
            return Some("no operation was completed in that time".to_owned());
        }
        let direct = transfer(spec).is_some_and(|transfer| transfer.direct);
        let process = self.process.filter(|_| direct)?;
        let path = self.share.path(DIRECT);
        let note = "cached: the server opened the file without O_DIRECT";
        (!process.has_open(&path, libc::O_DIRECT)).then(|| note.to_owned())
    }
}

/// The transfer whose file a case uses.
fn transfer(spec: Spec) -> Option<Transfer> {
    match spec.kind {
        Kind::Data(transfer) => Some(transfer),
        Kind::Mixed | Kind::VmLike => Some(Transfer {
            write: true,
            sequential: false,
            direct: false,
        }),
        _ => None,
    }
}

fn file(transfer: Transfer) -> &'static str {
    if transfer.direct { DIRECT } else { DATA }
}
