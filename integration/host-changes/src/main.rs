//! Runs programs of a guest on a mount of this machine, while the host changes the shared
//! directory.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Parser;
use host_changes::{Mounted, Plan, Rules, Share, run};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Write on a mount, change the shared directory on the host, and look for what was lost.
///
/// Exits with 1 if an acknowledged record is neither at its path nor in what the host removed from
/// there afterwards, if a reader gets ESTALE, or if writers get it often.
#[derive(Clone, Debug, Parser)]
#[command(name = "host-changes")]
struct Options {
    /// The mount point of the share.
    #[arg(long, value_name = "DIR")]
    mount: PathBuf,

    /// The directory that is shared.
    #[arg(long, value_name = "DIR")]
    share: PathBuf,

    /// How long to run.
    #[arg(long, value_name = "N", default_value_t = 10)]
    seconds: u64,

    /// The number of programs that write at the same time.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=64))]
    writers: u16,

    /// The longest pause of the host between two changes, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pause: u64,

    /// The server sees no OPEN (--no-open): a write to a removed file may be refused, even if it is
    /// open.
    #[arg(long)]
    no_open: bool,

    /// The server knows inodes and not their names (--inode-file-handles): a change may reach an
    /// inode that the host has renamed.
    #[arg(long)]
    file_handles: bool,

    /// The seed of the random numbers (default: the time).
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

/// Why the program fails.
#[derive(Debug, thiserror::Error)]
enum ChangesError {
    #[error("the shared directory {0} can't be used")]
    Share(PathBuf, #[source] std::io::Error),
    #[error("a change on the host failed")]
    Change(#[source] Errno),
    #[error("{0}")]
    Fault(String),
}

fn main() -> ExitCode {
    match execute(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("host-changes: {error}");
            let mut cause = error.source();
            while let Some(source) = cause {
                eprint!(": {source}");
                cause = source.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn execute(options: &Options) -> Result<(), ChangesError> {
    // Files that the host removes stay open.
    let limit = getrlimit(Resource::Nofile);
    let current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, Rlimit { current, ..limit });
    rustix::process::umask(rustix::fs::Mode::empty());
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    let time = time.map_or(1, |time| u64::from(time.subsec_nanos()) ^ time.as_secs());
    let seed = options.seed.unwrap_or(time);
    println!("seed {seed}");
    let share = Share::new(&options.share)
        .map_err(|error| ChangesError::Share(options.share.clone(), error))?;
    let plan = Plan {
        duration: Duration::from_secs(options.seconds),
        seed,
        pause: Duration::from_millis(options.pause),
        rules: Rules {
            is_alone: false,
            sees_no_open: options.no_open,
            reopens_by_name: false,
            follows_inodes: options.no_open || options.file_handles,
        },
    };
    let programs = Mounted::at(options.mount.clone());
    let programs = vec![programs; usize::from(options.writers)];
    let report = run(&share, programs, &plan).map_err(ChangesError::Change)?;
    match report.fault() {
        None => {
            println!("{report}");
            Ok(())
        }
        Some(fault) => Err(ChangesError::Fault(fault)),
    }
}
