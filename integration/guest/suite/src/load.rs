//! A load that runs until it is told to stop, and verifies everything it does: for a guest that is
//! migrated while it runs. Each part works on things that it has had open from the beginning and
//! keeps a model of what must be there. Invariant: what a part reads comes from the server, not
//! from this kernel's cache.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::fs::{Advice, FlockOperation, Mode, OFlags, RawDir, fadvise, flock, openat};
use rustix::io::Errno;

use crate::failure::{Failure, Outcome, ensure, ensure_eq, refused};
use crate::fixture::{Noise, create_new, open_folder, read_write};
use crate::lock::{self, Kind, Owner, Range};

/// What a part goes by.
struct Pace<'a> {
    stop: &'a AtomicBool,
    rounds: &'a AtomicU64,
}

impl Pace<'_> {
    /// Ends a round; answers whether there is another.
    fn again(&self) -> bool {
        // Relaxed: nothing hangs on what the number says.
        self.rounds.fetch_add(1, Ordering::Relaxed);
        !self.stop.load(Ordering::Acquire)
    }
}

struct Part {
    name: &'static str,
    run: fn(&Path, &Pace<'_>) -> Outcome,
}

macro_rules! parts {
    ($($name:ident),* $(,)?) => {
        const PARTS: &[Part] = &[$(Part { name: stringify!($name), run: $name }),*];
    };
}

parts![
    open_file_keeps_its_content,
    unlinked_file_keeps_its_content,
    appended_log_is_whole,
    renamed_folders_lead_to_their_files,
    name_that_is_no_text_leads_to_its_file,
    linked_file_is_one,
    half_read_folder_is_read_on,
    file_of_a_deep_tree_is_reached,
    locks_are_held,
    files_come_and_go,
];

/// How often the rounds are looked at.
const LOOK: Duration = Duration::from_millis(500);

/// How many looks may find a part where it was: two minutes. Counted and not measured, since the
/// clock of a guest that is moved may leap.
const TIMEOUT: u32 = 240;

/// Runs all parts below `dir` until `stop` is there; true if all was as it had to be.
///
/// # Errors
///
/// The load can't be run here at all.
pub(crate) fn run(dir: &Path, stop: &Path) -> Result<bool, Failure> {
    let told = AtomicBool::new(false);
    let rounds: Vec<AtomicU64> = PARTS.iter().map(|_| AtomicU64::new(0)).collect();
    let mut good = true;
    thread::scope(|scope| {
        let mut parts = Vec::new();
        for (part, rounds) in PARTS.iter().zip(&rounds) {
            let below = dir.join(part.name);
            fs::create_dir(&below)?;
            let pace = Pace {
                stop: &told,
                rounds,
            };
            let run = move || (part.run)(&below, &pace);
            parts.push((part.name, scope.spawn(run)));
        }
        let mut seen = vec![(0, 0); PARTS.len()];
        while !told.load(Ordering::Relaxed) {
            thread::sleep(LOOK);
            let counts: Vec<u64> = rounds.iter().map(|it| it.load(Ordering::Relaxed)).collect();
            println!("rounds {counts:?}");
            for ((last, looks), (count, part)) in seen.iter_mut().zip(counts.iter().zip(PARTS)) {
                if last != count {
                    (*last, *looks) = (*count, 0);
                    continue;
                }
                *looks += 1;
                if *looks == TIMEOUT {
                    println!("FAILED {}: nothing happens any more", part.name);
                    good = false;
                }
            }
            let ended = parts.iter().any(|(_, part)| part.is_finished());
            if ended || stop.exists() {
                told.store(true, Ordering::Release);
            }
        }
        for ((name, part), rounds) in parts.into_iter().zip(&rounds) {
            match part.join() {
                Ok(Ok(())) => println!("ok {name} [{} rounds]", rounds.load(Ordering::Relaxed)),
                Ok(Err(why)) => {
                    println!("FAILED {name}: {why}");
                    good = false;
                }
                Err(_) => {
                    println!("FAILED {name}: panicked");
                    good = false;
                }
            }
        }
        Ok(good)
    })
}

/// Makes the next read of a file ask the server.
fn drop_cache(file: &File) -> Outcome {
    file.sync_data()?;
    Ok(fadvise(file, 0, None, Advice::DontNeed)?)
}

const PIECE: usize = 3000;

/// A file that is open, and what must be in it.
struct Modelled {
    file: File,
    content: Vec<u8>,
    noise: Noise,
}

impl Modelled {
    fn new(file: File, seed: u64) -> Result<Self, Failure> {
        let content = Noise::bytes(seed, 96 * 1024);
        file.write_all_at(&content, 0)?;
        Ok(Self {
            file,
            content,
            noise: Noise::new(seed + 1),
        })
    }

    /// Writes somewhere, and compares all that is there.
    fn round(&mut self) -> Outcome {
        let mut piece = vec![0; PIECE];
        self.noise.fill(&mut piece);
        let at = self.noise.below(self.content.len() - PIECE);
        self.file.write_all_at(&piece, u64::try_from(at)?)?;
        self.content[at..at + PIECE].copy_from_slice(&piece);
        drop_cache(&self.file)?;
        self.compare(&self.file)
    }

    fn compare(&self, file: &File) -> Outcome {
        let mut seen = vec![0; self.content.len() + 1];
        let mut filled = 0;
        while let more @ 1.. = file.read_at(&mut seen[filled..], u64::try_from(filled)?)? {
            filled += more;
        }
        ensure_eq!(filled, self.content.len());
        let differs = seen.iter().zip(&self.content).position(|(a, b)| a != b);
        ensure!(differs.is_none(), "another byte at {differs:?}");
        Ok(())
    }
}

fn open_file_keeps_its_content(dir: &Path, pace: &Pace<'_>) -> Outcome {
    let path = dir.join("file");
    let mut held = Modelled::new(create_new(&path, 0o600)?, 1)?;
    let (dev, ino) = (held.file.metadata()?.dev(), held.file.metadata()?.ino());
    loop {
        held.round()?;
        held.compare(&File::open(&path)?)?;
        let now = fs::metadata(&path)?;
        ensure_eq!((now.dev(), now.ino()), (dev, ino));
        if !pace.again() {
            return Ok(());
        }
    }
}

fn unlinked_file_keeps_its_content(dir: &Path, pace: &Pace<'_>) -> Outcome {
    let path = dir.join("file");
    let mut held = Modelled::new(create_new(&path, 0o600)?, 2)?;
    fs::remove_file(&path)?;
    let mut other = Modelled::new(create_new(&path, 0o600)?, 3)?;
    loop {
        held.round()?;
        ensure_eq!(held.file.metadata()?.nlink(), 0);
        other.round()?;
        ensure_eq!(other.file.metadata()?.nlink(), 1);
        if !pace.again() {
            return Ok(());
        }
    }
}

fn appended_log_is_whole(dir: &Path, pace: &Pace<'_>) -> Outcome {
    const RECORD: usize = 32;
    const MOST: u64 = 2000;
    let path = dir.join("log");
    let log = OpenOptions::new().append(true).create(true).open(&path)?;
    let mut count = 0;
    loop {
        for _ in 0..8 {
            let record = format!("{count:0>width$}\n", width = RECORD - 1);
            ensure_eq!(rustix::io::write(&log, record.as_bytes())?, RECORD);
            count += 1;
        }
        drop_cache(&log)?;
        let content = fs::read_to_string(&path)?;
        let mut next = 0;
        for line in content.lines() {
            ensure_eq!(line.parse::<u64>()?, next);
            next += 1;
        }
        ensure_eq!(next, count);
        if count >= MOST {
            log.set_len(0)?;
            count = 0;
        }
        if !pace.again() {
            return Ok(());
        }
    }
}

fn renamed_folders_lead_to_their_files(dir: &Path, pace: &Pace<'_>) -> Outcome {
    fs::create_dir_all(dir.join("name-0/middle/inner"))?;
    let held = Modelled::new(create_new(&dir.join("name-0/middle/inner/file"), 0o600)?, 4)?;
    let inner = open_folder(&dir.join("name-0/middle/inner"))?;
    let mut count = 0;
    loop {
        let (old, new) = (format!("name-{count}"), format!("name-{}", count + 1));
        fs::rename(dir.join(&old), dir.join(&new))?;
        count += 1;
        let file: File = openat(&inner, "file", OFlags::RDONLY, Mode::empty())?.into();
        held.compare(&file)?;
        held.compare(&File::open(dir.join(&new).join("middle/inner/file"))?)?;
        refused(fs::metadata(dir.join(&old)), Errno::NOENT)?;
        let beside = dir
            .join(&new)
            .join("middle")
            .join(format!("beside-{count}"));
        fs::create_dir(&beside)?;
        fs::rename(&beside, dir.join(&new).join("beside"))?;
        fs::remove_dir(dir.join(&new).join("beside"))?;
        if !pace.again() {
            return Ok(());
        }
    }
}

fn name_that_is_no_text_leads_to_its_file(dir: &Path, pace: &Pace<'_>) -> Outcome {
    let name = std::ffi::OsStr::from_bytes(b"\xff\xfe \n\x80\"'\\");
    let below = dir.join(name);
    fs::create_dir(&below)?;
    let path = below.join(name);
    let mut held = Modelled::new(create_new(&path, 0o600)?, 5)?;
    loop {
        held.round()?;
        held.compare(&File::open(&path)?)?;
        ensure!(
            fs::read_dir(&below)?.all(|entry| entry.is_ok_and(|entry| entry.file_name() == name)),
            "another name is listed"
        );
        if !pace.again() {
            return Ok(());
        }
    }
}

fn linked_file_is_one(dir: &Path, pace: &Pace<'_>) -> Outcome {
    let (one, other) = (dir.join("one"), dir.join("other"));
    let mut held = Modelled::new(create_new(&one, 0o600)?, 6)?;
    loop {
        fs::hard_link(&one, &other)?;
        held.round()?;
        held.compare(&File::open(&other)?)?;
        ensure_eq!(held.file.metadata()?.nlink(), 2);
        // What it was made by goes; from now on it has the name of the other.
        fs::remove_file(&one)?;
        held.round()?;
        fs::rename(&other, &one)?;
        held.compare(&File::open(&one)?)?;
        if !pace.again() {
            return Ok(());
        }
    }
}

fn half_read_folder_is_read_on(dir: &Path, pace: &Pace<'_>) -> Outcome {
    const NAMES: usize = 700;
    for number in 0..NAMES {
        create_new(&dir.join(format!("a-name-of-some-length-{number}")), 0o600)?;
    }
    loop {
        let mut times = BTreeMap::new();
        // So small that there are many requests, and so slow that many are not yet made.
        let mut buffer = Vec::with_capacity(4096);
        let mut entries = RawDir::new(open_folder(dir)?, buffer.spare_capacity_mut());
        let mut count = 0;
        while let Some(entry) = entries.next() {
            let name = entry?.file_name().to_bytes().to_vec();
            *times.entry(name).or_insert(0) += 1;
            count += 1;
            if count % 100 == 0 {
                thread::sleep(Duration::from_millis(150));
            }
        }
        let twice = times.iter().filter(|(_, count)| **count != 1).count();
        ensure_eq!((times.len(), twice), (NAMES + 2, 0));
        if !pace.again() {
            return Ok(());
        }
    }
}

fn file_of_a_deep_tree_is_reached(dir: &Path, pace: &Pace<'_>) -> Outcome {
    let mut path = PathBuf::from(dir);
    for depth in 0..60 {
        path.push(format!("level-{depth}"));
    }
    fs::create_dir_all(&path)?;
    let folder = open_folder(&path)?;
    let mut held = Modelled::new(create_new(&path.join("file"), 0o600)?, 7)?;
    loop {
        held.round()?;
        let file: File = openat(&folder, "file", OFlags::RDONLY, Mode::empty())?.into();
        held.compare(&file)?;
        fs::write(path.join("new"), b"new")?;
        fs::remove_file(path.join("new"))?;
        if !pace.again() {
            return Ok(());
        }
    }
}

fn locks_are_held(dir: &Path, pace: &Pace<'_>) -> Outcome {
    let path = dir.join("file");
    let holder = create_new(&path, 0o600)?;
    flock(&holder, FlockOperation::NonBlockingLockExclusive)?;
    let ranges = read_write(&path)?;
    let open = Owner::OpenFile;
    lock::set(ranges.as_fd(), open, Kind::Write, Range(10, 10))?;
    lock::set(ranges.as_fd(), open, Kind::Read, Range(100, 100))?;
    loop {
        let other = read_write(&path)?;
        refused(
            flock(&other, FlockOperation::NonBlockingLockExclusive),
            Errno::WOULDBLOCK,
        )?;
        let try_lock = |kind, range| lock::set(other.as_fd(), open, kind, range);
        refused(try_lock(Kind::Read, Range(19, 1)), Errno::AGAIN)?;
        refused(try_lock(Kind::Write, Range(150, 1)), Errno::AGAIN)?;
        try_lock(Kind::Read, Range(150, 1))?;
        try_lock(Kind::Write, Range(20, 80))?;
        drop(other);
        if !pace.again() {
            return Ok(());
        }
    }
}

fn files_come_and_go(dir: &Path, pace: &Pace<'_>) -> Outcome {
    let mut noise = Noise::new(8);
    let mut model: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
    loop {
        let path = dir.join(format!("file-{}", noise.below(40)));
        match model.get_mut(&path) {
            None => {
                let content = Noise::bytes(noise.number(), 100 + noise.below(20_000));
                let file = create_new(&path, 0o640)?;
                file.write_all_at(&content, 0)?;
                drop_cache(&file)?;
                model.insert(path, content);
            }
            Some(content) => {
                ensure!(
                    fs::read(&path)? == *content,
                    "other bytes than those written"
                );
                let to = dir.join(format!("file-{}", noise.below(40)));
                if noise.below(2) == 0 {
                    fs::remove_file(&path)?;
                    model.remove(&path);
                } else {
                    let content = std::mem::take(content);
                    model.remove(&path);
                    fs::rename(&path, &to)?;
                    model.insert(to, content);
                }
            }
        }
        if noise.below(20) == 0 {
            let mut listed: Vec<PathBuf> = Vec::new();
            for entry in fs::read_dir(dir)? {
                listed.push(entry?.path());
            }
            listed.sort();
            ensure!(
                listed.iter().eq(model.keys()),
                "other names than there must be"
            );
        }
        if !pace.again() {
            return Ok(());
        }
    }
}
