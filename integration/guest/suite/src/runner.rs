//! Runs the checks, each in a process and a folder of its own, and prints the results. A check that
//! crashes or hangs fails, and the next one runs. Invariant: one line for each check, and a closing
//! line whose numbers add up.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::checks::{self, Check};
use crate::failure::{Failure, Outcome, ensure};
use crate::fixture::is_quick;
use crate::process::{ALICE, Child, as_user, limit_time, set_umask};

/// How long a check may take.
fn limit() -> Duration {
    Duration::from_secs(if is_quick() { 60 } else { 240 })
}

// What a process that is ended while it waits for a request may still need.
const GRACE: Duration = Duration::from_secs(10);

/// Runs the checks whose names contain `filter` below `dir`; true if all passed.
///
/// # Errors
///
/// The checks can't be run here at all.
pub(crate) fn run(dir: &Path, filter: &str) -> Result<bool, Failure> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "must run as root: the checks act as several users"
    );
    set_umask(0o022);
    let dir = fs::canonicalize(dir)?;
    as_user(ALICE, || Ok(fs::metadata(&dir).map(|_| ())?)).map_err(|why| {
        Failure::new(format_args!(
            "{} can't be reached by other users (chmod 755 it): {why}",
            dir.display()
        ))
    })?;

    let chosen: Vec<&Check> = checks::all().filter(|c| c.name.contains(filter)).collect();
    ensure!(!chosen.is_empty(), "no check's name contains {filter:?}");
    let (mut passed, mut failed) = (0, 0);
    for check in chosen {
        let started = Instant::now();
        let outcome = run_one(&dir, check);
        let slow = match started.elapsed().as_secs_f64() {
            seconds if seconds >= 1.0 => format!(" [{seconds:.1} s]"),
            _ => String::new(),
        };
        match outcome {
            Ok(()) => {
                passed += 1;
                println!("ok {}{slow}", check.name);
            }
            Err(why) => {
                failed += 1;
                println!("FAILED {}: {why}{slow}", check.name);
            }
        }
        std::io::stdout().flush()?;
    }
    println!("{passed} passed, {failed} failed");
    Ok(failed == 0)
}

fn run_one(dir: &Path, check: &Check) -> Outcome {
    let folder = dir.join(check.name);
    if fs::symlink_metadata(&folder).is_ok() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir(&folder)?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
    let child = Child::start(|| {
        limit_time(limit());
        // What the check leaves running ends with it, as far as it is in its group.
        rustix::process::setpgid(None, None)?;
        (check.act)(&folder)
    })?;
    let group = child.pid();
    if !has_ended(&child)? {
        return Err(Failure::reported("hangs, and can't be ended"));
    }
    let outcome = child.join();
    // Mostly there is none left, and that is an error to the kernel.
    let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    outcome?;
    if is_quick() {
        return Ok(());
    }
    // What has been made can also be removed.
    fs::remove_dir_all(&folder)
        .map_err(|error| Failure::new(format_args!("what it made can't be removed: {error}")))
}

fn has_ended(child: &Child) -> Result<bool, Failure> {
    let event = child.end_event()?;
    let deadline = Instant::now() + limit() + GRACE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left)?;
        match poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
