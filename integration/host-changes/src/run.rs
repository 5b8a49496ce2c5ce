//! Runs writers and the host at the same time, for a given time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::host::{DirectoryChange, FileChange};
use crate::programs::Programs;
use crate::random::Random;
use crate::report::Report;
use crate::share::{DIRECTORIES, Share};
use crate::writer::{Action, Rules, Target, Writer};

/// How often in a row a file is replaced without pause, now and then.
const STORM: u32 = 100;

/// The settings of a run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The duration.
    pub duration: Duration,
    /// The seed of its random numbers.
    pub seed: u64,
    /// The longest pause of the host between two changes.
    pub pause: Duration,
    /// What writers may rely on.
    pub rules: Rules,
}

/// Runs a writer over each of `programs`, while the host changes what they use.
///
/// # Errors
/// Those of the host's file system.
pub fn run<P>(share: &Share, programs: Vec<P>, plan: &Plan) -> rustix::io::Result<Report>
where
    P: Programs + Send,
{
    let over = AtomicBool::new(false);
    let writers = programs.len();
    thread::scope(|scope| {
        let host = scope.spawn(|| change(share, writers, plan, &over));
        let write = |(number, programs)| {
            let over = &over;
            scope.spawn(move || write(share, programs, number, writers, plan, over))
        };
        let threads: Vec<_> = programs.into_iter().enumerate().map(write).collect();
        let mut report = Report::default();
        let mut panicked = false;
        for thread in threads {
            match thread.join() {
                Ok(found) => report.add(found),
                Err(_) => panicked = true,
            }
        }
        over.store(true, Ordering::Relaxed);
        match host.join() {
            Ok(changes) => report.changes = changes?,
            Err(_) => panicked = true,
        }
        if panicked {
            report.error("a thread has panicked".to_owned());
        }
        Ok(report)
    })
}

/// Changes the share on the host until the run is over. Returns the number of changes.
fn change(
    share: &Share,
    writers: usize,
    plan: &Plan,
    over: &AtomicBool,
) -> rustix::io::Result<u64> {
    let mut random = Random::new(plan.seed);
    let mut changes = 0;
    let pause = u64::try_from(plan.pause.as_micros()).unwrap_or(u64::MAX);
    while !over.load(Ordering::Relaxed) {
        let writer = usize::try_from(random.below(writers as u64)).unwrap_or(0);
        let path = Target::random(&mut random, writer).path();
        if random.one_in(12) {
            let directory = random.pick(&DIRECTORIES);
            let change = *random.pick(&DirectoryChange::ALL);
            share.change_directory(directory, change)?;
        } else if random.one_in(100) {
            for _ in 0..STORM {
                share.change_file(&path, FileChange::Replace)?;
            }
        } else {
            share.change_file(&path, *random.pick(&FileChange::ALL))?;
        }
        changes += 1;
        if random.one_in(4) {
            share.complete()?;
        }
        thread::sleep(Duration::from_micros(random.below(pause)));
    }
    share.complete()?;
    Ok(changes)
}

fn write<P: Programs>(
    share: &Share,
    programs: P,
    number: usize,
    writers: usize,
    plan: &Plan,
    over: &AtomicBool,
) -> Report {
    let end = Instant::now() + plan.duration;
    let mut random = Random::new(plan.seed.wrapping_add(1 + number as u64));
    let mut writer = Writer::new(programs, share, number, plan.rules);
    while Instant::now() < end && !over.load(Ordering::Relaxed) {
        let mut action = *random.pick(&Action::ALL);
        // Seldom: cached names are what is tested.
        if action == Action::DropCaches && !random.one_in(20) {
            action = Action::Append;
        }
        let is_reading = matches!(action, Action::Read | Action::Stat | Action::List);
        let owner = if is_reading {
            usize::try_from(random.below(writers as u64)).unwrap_or(number)
        } else {
            number
        };
        writer.act(action, &Target::random(&mut random, owner));
        // Not faster than things change: other threads need the processor, too.
        thread::sleep(Duration::from_micros(random.below(2000)));
    }
    match writer.end() {
        Ok((_, report)) => report,
        Err(errno) => {
            let mut report = Report::default();
            let error = std::io::Error::from_raw_os_error(errno);
            report.error(format!("the last file can't be closed: {error}"));
            report
        }
    }
}
