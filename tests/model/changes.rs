//! A guest that writes while the host changes the share directly: it replaces files and directories
//! by rename, removes them, makes backups, truncates. Each change that was acknowledged to a
//! program of the guest must be in the file where its path leads, or in what the host removed from
//! that path afterwards.
//!
//! In one test the two take turns, in random sequences that are shortened if they fail; in the
//! other they run at the same time. The invariant: only the guest's kernel gets `ESTALE`, never a
//! program.
//!
//! `RINGFSD_HOST_CHANGES_SECONDS` makes the latter longer, `RINGFSD_MODEL_CASES` adds cases to the
//! former.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use host_changes::{
    Action, DIRECTORIES, DirectoryChange, File, FileChange, Plan, Report, Rules, Share, Target,
    Writer, run,
};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use testing::Server;
use vmm::fuse::wire::init;
use vmm::fuse::{Client, LINUX_OFFERS, Lane};
use vmm::{Options, Profile, Session};

use crate::kernel::{DIRECTORIES_STAY, Kernel, Process};
use crate::{act_as_myself, cases};

/// The longest sequence.
const MOST: usize = 60;

/// What a guest may rely on with these arguments.
fn rules(arguments: &[&str], is_alone: bool) -> Rules {
    let sees_no_open = arguments.contains(&"--no-open");
    Rules {
        is_alone,
        sees_no_open,
        reopens_by_name: arguments.contains(&"--max-open-inodes"),
        follows_inodes: sees_no_open || arguments.contains(&"--inode-file-handles"),
    }
}

/// The number of the guest's first process.
const PID: u32 = 1000;

/// Guests' threads, each with a queue.
const THREADS: u16 = 4;

/// How a server may be told to treat names, inodes and open files.
const OPTION_SETS: [&[&str]; 7] = [
    &["--cache", "auto"],
    &["--cache", "always"],
    &["--cache", "auto", "--inode-file-handles", "prefer"],
    &["--cache", "always", "--inode-file-handles", "prefer"],
    &["--cache", "auto", "--no-open"],
    &["--cache", "always", "--no-open"],
    &["--cache", "always", "--max-open-inodes", "8"],
];

/// One turn.
#[derive(Clone, Debug)]
enum Turn {
    /// The host changes a file.
    File(Target, FileChange),
    /// The host changes a directory.
    Directory(&'static str, DirectoryChange),
    /// The host makes the directories that are missing.
    Complete,
    /// Until the server looks at all directories again.
    Wait,
    /// A program of the guest does something.
    Guest(Action, Target),
}

fn target() -> impl Strategy<Value = Target> {
    let file = select(&[File::Log, File::Document][..]);
    (0..DIRECTORIES.len(), file).prop_map(|(directory, file)| Target {
        directory,
        file,
        writer: 0,
    })
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let file = (target(), select(&FileChange::ALL[..]));
    let directory = (select(&DIRECTORIES[..]), select(&DirectoryChange::ALL[..]));
    let guest = (select(&Action::ALL[..]), target());
    let turn = prop_oneof![
        6 => file.prop_map(|(target, change)| Turn::File(target, change)),
        2 => directory.prop_map(|(path, change)| Turn::Directory(path, change)),
        1 => Just(Turn::Complete),
        3 => Just(Turn::Wait),
        12 => guest.prop_map(|(action, target)| Turn::Guest(action, target)),
    ];
    prop::collection::vec(turn, 1..MOST)
}

/// A guest with its queues, in whose memory they are.
struct Machine {
    _session: Session,
    lanes: Vec<Client<Lane>>,
}

impl Machine {
    fn start(server: &Server, threads: u16) -> Self {
        let queues = Options::default().request_queues(threads);
        let session = Profile::Simple.connect(server.connect(), &queues).unwrap();
        let mut first = Client::new(session);
        // A client on a lane hasn't seen INIT, and knows the older form only.
        let offers = LINUX_OFFERS & !init::SETXATTR_EXT;
        first.init_offering(offers).unwrap();
        let mut session = first.into_guest();
        let queues: Vec<_> = session.queues.drain(1..).collect();
        let memory = session.memory.clone();
        let lanes = queues.into_iter().map(|queue| {
            let memory = memory.clone();
            let mut client = Client::new(Lane { memory, queue });
            act_as_myself(&mut client);
            client
        });
        let lanes = lanes.collect();
        Self {
            _session: session,
            lanes,
        }
    }
}

/// Does the turns, the guest's with this client. Nothing may be lost.
fn take_turns(
    share: &Share,
    process: Process,
    turns: &[Turn],
    rules: Rules,
) -> (Process, Result<(), String>) {
    let mut writer = Writer::new(process, share, 0, rules);
    let mut fault = Ok(());
    for (number, turn) in turns.iter().enumerate() {
        match turn {
            Turn::File(target, change) => {
                share.change_file(&target.path(), *change).unwrap();
            }
            Turn::Directory(path, change) => share.change_directory(path, *change).unwrap(),
            Turn::Complete => share.complete().unwrap(),
            Turn::Wait => std::thread::sleep(DIRECTORIES_STAY),
            Turn::Guest(action, target) => writer.act(*action, target),
        }
        if let Some(found) = writer.report().fault() {
            fault = Err(format!("turn {number}, {turn:?}: {found}"));
            break;
        }
    }
    let (process, _) = writer.end().unwrap();
    (process, fault)
}

fn sequences_on(arguments: &[&str], runner: &mut TestRunner) {
    let mut server = Server::start(arguments);
    let mut machine = Machine::start(&server, 1);
    let lane = Cell::new(machine.lanes.pop());
    // Each case is another process: the server remembers for a while what one was told.
    let pid = Cell::new(PID);
    let result = runner.run(&turns(), |turns| {
        for entry in std::fs::read_dir(server.share()).unwrap() {
            std::fs::remove_dir_all(entry.unwrap().path()).unwrap();
        }
        let share = Share::new(&server.share()).unwrap();
        let kernel = Arc::new(Kernel::default());
        let process = Process::new(&kernel, lane.take().unwrap(), pid.get());
        pid.set(pid.get() + 1);
        let (process, fault) = take_turns(&share, process, &turns, rules(arguments, true));
        lane.set(Some(process.unmount()));
        fault.map_err(TestCaseError::fail)
    });
    if let Err(error) = result {
        panic!("{arguments:?}: {error}");
    }
    drop((lane, machine));
    server.wait_until_it_listens();
}

/// The same sequences each time, and some others.
pub(crate) fn alternating_changes_of_host_and_guest_lose_no_record(runtime: &str) {
    let seed: u64 = rand_seed();
    println!("seed {seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    for options in OPTION_SETS {
        let arguments = [&["--runtime", runtime], options].concat();
        for (rng, usual) in [([7; 32], 5), (bytes, 2)] {
            let config = Config {
                max_shrink_iters: 5000,
                ..crate::runner(cases(usual)).config().clone()
            };
            let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &rng);
            sequences_on(&arguments, &mut TestRunner::new_with_rng(config, rng));
        }
    }
}

fn rand_seed() -> u64 {
    let asked = std::env::var("RINGFSD_MODEL_SEED").ok();
    let time = || std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos();
    asked.map_or_else(
        || u64::try_from(time() & u128::from(u64::MAX)).unwrap(),
        |seed| seed.parse().unwrap(),
    )
}

/// How long all of it takes.
fn duration() -> Duration {
    let seconds = std::env::var("RINGFSD_HOST_CHANGES_SECONDS");
    Duration::from_secs_f64(seconds.map_or(6.0, |text| text.parse().unwrap()))
}

pub(crate) fn concurrent_changes_of_host_lose_no_record(runtime: &str) {
    let seed = rand_seed();
    println!("seed {seed}");
    let end = Instant::now() + duration();
    // What the host displaces stays open until the end of a round.
    let each = (duration() / 7).min(Duration::from_secs(8));
    let mut total = Report::default();
    for round in 0.. {
        for (number, options) in OPTION_SETS.iter().enumerate() {
            if round > 0 && Instant::now() >= end {
                println!("all rounds: {total}");
                if let Some(fault) = total.fault() {
                    panic!("{fault}");
                }
                return;
            }
            let threads = 1 + u16::try_from(number + round).unwrap() % THREADS;
            let queues = threads.to_string();
            let mut arguments = vec!["--runtime", runtime, "--request-queues", &queues];
            arguments.extend(*options);
            let plan = Plan {
                duration: each,
                seed: seed.wrapping_add(round as u64 * 1000 + number as u64 * 100),
                pause: Duration::from_millis(10),
                rules: rules(options, false),
            };
            total.add(run_on(&arguments, threads, &plan));
        }
    }
}

fn run_on(arguments: &[&str], threads: u16, plan: &Plan) -> Report {
    let mut server = Server::start(arguments);
    let share = Share::new(&server.share()).unwrap();
    let mut machine = Machine::start(&server, threads);
    let kernel = Arc::new(Kernel::default());
    let lanes = machine.lanes.drain(..);
    let processes = (PID..).zip(lanes);
    let processes = processes.map(|(pid, lane)| Process::new(&kernel, lane, pid));
    let processes = processes.collect();
    let mut report = run(&share, processes, plan).unwrap();
    report.retries = kernel.retries();
    if let Some(loss) = report.loss() {
        panic!("{arguments:?}, {threads} threads: {loss}");
    }
    println!("{arguments:?}, {threads} threads: {report}");
    drop(machine);
    server.wait_until_it_listens();
    report
}
