//! The system calls that a case can't do without, in a loop in one thread: the upper limit for a
//! server.
//!
//! No server, no queue, no FUSE: one operation after the other by the process that uses the result.
//! The invariant: files and random choices are those of the case against a server.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::fs::{AtFlags, Mode, OFlags, RawDir, StatxFlags, openat, statx, unlinkat};
use rustix::io::{Errno, pread, pwrite};

use crate::cli::Bare;
use crate::histogram::Histogram;
use crate::pattern::Seed;
use crate::process::{Process, ProcessError};
use crate::program;
use crate::random::Random;
use crate::report::{Measurement, Raw, heading};
use crate::share::{
    COLD, COLD_FILES, DATA, DIRECT, KNOWN, KNOWN_FILES, NEW, SMALL, Share, ShareError, name,
};
use crate::spec::{Kind, Spec, Transfer};

/// Why the bare calls fail.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BareError {
    /// An option is missing.
    #[error("{0} is needed")]
    Missing(&'static str),
    /// The files could not be made or read.
    #[error("can't make or read the files of the share")]
    Share(#[from] ShareError),
    /// This process can't be measured.
    #[error("can't measure this process")]
    Process(#[from] ProcessError),
    /// A directory or file could not be opened.
    #[error("can't open {0}")]
    Open(String, #[source] io::Error),
    /// A system call of a case failed.
    #[error("a system call of {0} failed")]
    Call(Spec, #[source] io::Error),
}

/// Runs the cases that the options name. Prints and skips those that have no bare calls.
pub(crate) fn run(options: &Bare) -> Result<(), BareError> {
    let shared_dir = options.share.shared_dir.as_deref();
    let shared_dir = shared_dir.ok_or(BareError::Missing("--shared-dir"))?;
    let share = Share::new(shared_dir, options.share.file_size, options.share.keep)?;
    let process = Process::new(i32::try_from(std::process::id()).unwrap_or(0))?;
    if !options.measure.json {
        println!("{}", heading());
    }
    for mut spec in options.measure.specs() {
        if matches!(spec.kind, Kind::Idle | Kind::Mixed | Kind::VmLike) {
            eprintln!("load: {spec} has no bare system calls; skipped");
            continue;
        }
        // Operations that a case has in flight together are made one by one here, under the case's name.
        let case = spec.to_string();
        spec.depth = 1;
        let mut calls = Calls::new(&share, spec)?;
        let mut latencies = Histogram::new();
        loop_for(options.measure.warm_up, || calls.one(), |_| {})
            .map_err(|errno| BareError::Call(spec, errno.into()))?;
        let before = process.counters()?;
        let began = Instant::now();
        loop_for(
            options.measure.seconds,
            || calls.one(),
            |nanos| latencies.record(nanos),
        )
        .map_err(|errno| BareError::Call(spec, errno.into()))?;
        let elapsed = began.elapsed();
        let used = process.since(&before)?;
        if let Kind::Data(transfer) = spec.kind
            && transfer.write
        {
            share.settle(file(transfer))?;
        }
        let raw = Raw {
            latencies: &latencies,
            elapsed,
            server: Some(used),
            own_cpu: used.cpu,
            threads: 1,
            bytes: program::bytes(spec),
            in_flight: 1,
        };
        let items = program::items(spec.kind);
        let measured = Measurement::new("bare", case, items, &raw);
        if options.measure.json {
            println!("{}", measured.json());
        } else {
            println!("{}", measured.row());
        }
    }
    Ok(())
}

/// Performs one operation after the other, for at least this long and at least once.
fn loop_for(
    time: std::time::Duration,
    mut one: impl FnMut() -> Result<(), Errno>,
    mut record: impl FnMut(u64),
) -> Result<(), Errno> {
    let began = Instant::now();
    let mut last = std::time::Duration::ZERO;
    loop {
        one()?;
        let now = began.elapsed();
        record(u64::try_from((now - last).as_nanos()).unwrap_or(u64::MAX));
        last = now;
        if now >= time {
            return Ok(());
        }
    }
}

fn file(transfer: Transfer) -> &'static str {
    if transfer.direct { DIRECT } else { DATA }
}

/// One case's calls and what they work on.
struct Calls {
    spec: Spec,
    known: OwnedFd,
    cold: OwnedFd,
    new: OwnedFd,
    file: Option<OwnedFd>,
    /// Descriptors of the known files, as a server has them.
    nodes: Vec<OwnedFd>,
    random: Random,
    /// How many files or offsets have been visited.
    count: u32,
    places: u32,
    buffer: Aligned,
}

/// A page-aligned buffer, as O_DIRECT needs it.
struct Aligned {
    bytes: Vec<u8>,
    from: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + 4096];
        let from = bytes.as_ptr().align_offset(4096);
        Self { bytes, from, len }
    }

    fn get(&mut self) -> &mut [u8] {
        let range = self.from..self.from + self.len;
        self.bytes.get_mut(range).unwrap_or_default()
    }
}

impl Calls {
    fn new(share: &Share, spec: Spec) -> Result<Self, BareError> {
        let open = |name: &str, flags| {
            let path = share.path(name);
            let opened = rustix::fs::open(&path, flags | OFlags::CLOEXEC, Mode::empty());
            opened.map_err(|errno| BareError::Open(path.display().to_string(), errno.into()))
        };
        let known = open(KNOWN, OFlags::DIRECTORY)?;
        let mut places = 1;
        let file = if let Kind::Data(transfer) = spec.kind {
            places = u32::try_from(share.file_size() / u64::from(spec.size)).unwrap_or(u32::MAX);
            let mut flags = OFlags::RDWR;
            if transfer.direct {
                share.evict(DIRECT)?;
                flags |= OFlags::DIRECT;
            } else {
                share.warm(DATA)?;
            }
            Some(open(file(transfer), flags)?)
        } else {
            None
        };
        let mut nodes = Vec::new();
        if spec.kind == Kind::Getattr {
            // As many as a process may always have open.
            for number in 0..500 {
                let path = format!("{KNOWN}/{}", String::from_utf8_lossy(&name(number)));
                nodes.push(open(&path, OFlags::PATH)?);
            }
        }
        let mut buffer = Aligned::new(spec.size.max(SMALL) as usize);
        Seed::WRITTEN.fill(0, buffer.get());
        Ok(Self {
            spec,
            known,
            cold: open(COLD, OFlags::DIRECTORY)?,
            new: open(NEW, OFlags::DIRECTORY)?,
            file,
            nodes,
            random: Random::new(0),
            count: 0,
            places,
            buffer,
        })
    }

    /// One operation.
    fn one(&mut self) -> Result<(), Errno> {
        self.count = self.count.wrapping_add(1);
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC;
        let wanted = StatxFlags::BASIC_STATS;
        match self.spec.kind {
            Kind::Getattr => {
                let node = self.random.below(500) as usize;
                if let Some(node) = self.nodes.get(node) {
                    statx(node, c"", flags | AtFlags::EMPTY_PATH, wanted)?;
                }
            }
            Kind::Lookup => {
                let number = self.random.below(KNOWN_FILES);
                statx(&self.known, path(&mut [0; 8], number), flags, wanted)?;
            }
            Kind::LookupNew | Kind::Revalidate => {
                let number = self.count % COLD_FILES;
                statx(&self.cold, path(&mut [0; 8], number), flags, wanted)?;
            }
            Kind::LookupAbsent => {
                let number = 90_000 + self.random.below(10_000);
                match statx(&self.known, path(&mut [0; 8], number), flags, wanted) {
                    Err(Errno::NOENT) => {}
                    Err(errno) => return Err(errno),
                    Ok(_) => return Err(Errno::EXIST),
                }
            }
            Kind::Data(transfer) => self.transfer(transfer)?,
            Kind::Create => {
                let name = c"new";
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
                drop(openat(&self.new, name, flags, Mode::from_raw_mode(0o644))?);
                unlinkat(&self.new, name, AtFlags::empty())?;
            }
            Kind::OpenReadClose => {
                let number = self.random.below(KNOWN_FILES);
                visit(&self.known, number, OFlags::RDONLY, self.buffer.get())?;
            }
            Kind::OpenRwClose => {
                let number = self.random.below(KNOWN_FILES);
                visit(&self.known, number, OFlags::RDWR, self.buffer.get())?;
            }
            Kind::Chmod => {
                let number = self.random.below(KNOWN_FILES);
                let mode = Mode::from_raw_mode(0o644);
                let flags = AtFlags::empty();
                rustix::fs::chmodat(&self.known, path(&mut [0; 8], number), mode, flags)?;
            }
            Kind::Cold => {
                let number = self.count % COLD_FILES;
                statx(&self.cold, path(&mut [0; 8], number), flags, wanted)?;
                visit(&self.cold, number, OFlags::RDONLY, self.buffer.get())?;
            }
            Kind::Readdirplus | Kind::ListLookup => {
                let opened = OFlags::DIRECTORY | OFlags::CLOEXEC;
                let folder = openat(&self.cold, c".", opened, Mode::empty())?;
                let mut space = [std::mem::MaybeUninit::uninit(); 32 << 10];
                let mut entries = RawDir::new(&folder, &mut space);
                while let Some(entry) = entries.next() {
                    statx(&folder, entry?.file_name(), flags, wanted)?;
                }
            }
            Kind::Idle | Kind::Mixed | Kind::VmLike => {}
        }
        Ok(())
    }

    fn transfer(&mut self, transfer: Transfer) -> Result<(), Errno> {
        let place = if transfer.sequential {
            self.count % self.places
        } else {
            self.random.below(self.places)
        };
        let offset = u64::from(place) * u64::from(self.spec.size);
        let Some(file) = &self.file else {
            return Err(Errno::BADF);
        };
        let buffer = self.buffer.get();
        let len = buffer.len();
        let done = if transfer.write {
            pwrite(file, buffer, offset)?
        } else {
            pread(file, buffer, offset)?
        };
        if done == len { Ok(()) } else { Err(Errno::IO) }
    }
}

fn visit(folder: impl AsFd, number: u32, flags: OFlags, buffer: &mut [u8]) -> Result<(), Errno> {
    let flags = flags | OFlags::CLOEXEC;
    let file = openat(folder, path(&mut [0; 8], number), flags, Mode::empty())?;
    let done = pread(&file, buffer, 0)?;
    if done == SMALL as usize {
        Ok(())
    } else {
        Err(Errno::IO)
    }
}

/// A small file's name as a path, without an allocation.
fn path(space: &mut [u8; 8], number: u32) -> &std::ffi::CStr {
    if let Some(text) = space.first_chunk_mut::<6>() {
        *text = name(number);
    }
    std::ffi::CStr::from_bytes_until_nul(space).unwrap_or_default()
}
