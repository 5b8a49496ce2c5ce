//! Does the same random operations on two mounts and compares what they answer, and the trees
//! afterwards.
//!
//!     overlay-oracle populate SEED DIRECTORY...
//!     overlay-oracle run SEED OPERATIONS ONE OTHER
//!     overlay-oracle compare ONE OTHER
//!
//! `populate` fills directories that become lower layers, with whiteouts and opaque directories in
//! all but the last. `run` does operations on both mounts; the first is the one that is right. The
//! exit status is 1 if they differ. The invariant: the same seed gives the same operations.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program tells its user what it finds"
)]

mod operation;
mod random;

use std::path::Path;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{CWD, FileType, Mode, XattrFlags};

use self::operation::{Operation, Side, describe};
use self::random::Random;

const USAGE: &str = "usage: overlay-oracle populate SEED DIRECTORY... | run SEED OPERATIONS ONE OTHER | compare ONE OTHER";

/// How many differences are printed.
const SHOWN: usize = 20;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    rustix::process::umask(Mode::empty());
    let differences = match *arguments.as_slice() {
        ["populate", seed, ref directories @ ..] => seed.parse().ok().map(|seed| {
            for (at, directory) in directories.iter().enumerate() {
                let is_lowest = at + 1 == directories.len();
                populate(Path::new(directory), seed, at, is_lowest);
            }
            0
        }),
        ["run", seed, operations, one, other] => seed
            .parse()
            .ok()
            .zip(operations.parse().ok())
            .map(|(seed, operations)| run(seed, operations, Path::new(one), Path::new(other))),
        ["compare", one, other] => Some(compare(Path::new(one), Path::new(other))),
        _ => None,
    };
    match differences {
        None => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
        Some(0) => ExitCode::SUCCESS,
        Some(_) => ExitCode::FAILURE,
    }
}

/// Seconds since 1970.
fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs().cast_signed())
}

/// Fills a directory by random operations, then gives it what only layers have.
fn populate(directory: &Path, seed: u64, layer: usize, is_lowest: bool) {
    let mut random = Random::new(seed ^ (layer as u64) << 32);
    let mut side = Side::new(directory);
    for _ in 0..600 {
        // Layers are not made by removing.
        let operation = Operation::random(&mut random);
        if !matches!(
            operation,
            Operation::Unlink(_) | Operation::RemoveDirectory(_) | Operation::Rename(..)
        ) {
            let _ = side.perform(&operation);
        }
    }
    for name in ["a", "b", "c"] {
        for inner in ["a", "b", "d", "e", "f"] {
            let path = directory.join(name).join(inner);
            if !is_lowest && random.one_in(4) {
                let mode = Mode::empty();
                let _ = rustix::fs::mknodat(CWD, &path, FileType::CharacterDevice, mode, 0);
            }
        }
        let opaque = !is_lowest && random.one_in(3);
        let path = directory.join(name);
        if opaque && path.is_dir() {
            let name = "trusted.overlay.opaque";
            let _ = rustix::fs::lsetxattr(&path, name, b"y", XattrFlags::empty());
        }
    }
}

fn run(seed: u64, operations: u64, one: &Path, other: &Path) -> usize {
    let mut random = Random::new(seed);
    let (mut first, mut second) = (Side::new(one), Side::new(other));
    let since = now() - 1000;
    let (mut differences, mut succeeded) = (0, 0);
    for number in 0..operations {
        let operation = Operation::random(&mut random);
        let (right, ours) = (first.perform(&operation), second.perform(&operation));
        succeeded += u64::from(right.is_ok());
        if right != ours {
            differences += 1;
            if differences <= SHOWN {
                println!("{number}: {operation:?}: {right:?}, but {ours:?}");
            }
        }
        if number % 250 == 249 && differences == 0 {
            differences += compare_since(one, other, since);
            if differences > 0 {
                println!("the trees differ after operation {number}");
                break;
            }
        }
    }
    drop((first, second));
    println!(
        "seed {seed}: {operations} operations, {succeeded} succeeded, {differences} differences"
    );
    differences
}

fn compare(one: &Path, other: &Path) -> usize {
    compare_since(one, other, now() - 10_000)
}

fn compare_since(one: &Path, other: &Path, since: i64) -> usize {
    let (right, ours) = match (describe(one, since), describe(other, since)) {
        (Ok(right), Ok(ours)) => (right, ours),
        (right, ours) => {
            println!("reading the trees: {:?}, {:?}", right.err(), ours.err());
            return 1;
        }
    };
    let only = |these: &[String], those: &[String]| -> Vec<String> {
        let those: std::collections::HashSet<_> = those.iter().collect();
        let missing = these.iter().filter(|line| !those.contains(line));
        missing.cloned().collect()
    };
    let (missing, added) = (only(&right, &ours), only(&ours, &right));
    for line in missing.iter().take(SHOWN) {
        println!("- {}", shortened(line));
    }
    for line in added.iter().take(SHOWN) {
        println!("+ {}", shortened(line));
    }
    missing.len() + added.len()
}

fn shortened(line: &str) -> String {
    line.chars().take(300).collect()
}
