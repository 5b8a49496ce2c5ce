//! What a server costs whose guest knows very many inodes, lists very large directories, or has very
//! many files open.
//!
//! For each number it measures the server's CPU time of one request, over a sample, and the memory.
//! The invariant: at each number of inodes the same work is done on a sample of the same size, so
//! that two numbers can be compared.

use std::ffi::CString;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use vmm::fuse::wire::{GetattrIn, OpenIn, OpenOut, ReadIn, ReleaseIn, opcode};
use vmm::fuse::{Call, Client, FuseError, Handle, LINUX_OFFERS, ROOT};
use vmm::session::SessionError;
use vmm::{Profile, Region, Session};
use zerocopy::IntoBytes;

use crate::cli::Many;
use crate::drive::{TIMEOUT, own_cpu};
use crate::process::{Process, ProcessError};
use crate::random::Random;
use crate::share::name;

/// The directory in the share that contains all files.
const FOLDER: &str = "ringfsd-many";
/// Files in each of the directories whose files become known.
const IN_EACH: u32 = 10_000;
/// Requests of which the cost is measured.
const SAMPLE: u32 = 100_000;
/// Requests in flight.
const DEPTH: usize = 32;
/// Inodes in one BATCH_FORGET.
const BATCH: usize = 64;
/// How old files are when the server gets to know them.
const AGE: Duration = Duration::from_secs(5);
/// Bytes of a READDIRPLUS.
const LISTING: u32 = 32 << 10;

/// Why the measurement fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ManyError {
    /// The files could not be made.
    #[error("can't make {path}", path = path.display())]
    Make {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// No session with the server.
    #[error("there is no session with the server")]
    Session(#[from] SessionError),
    /// A request failed.
    #[error("{what} failed")]
    Request {
        what: &'static str,
        #[source]
        source: FuseError,
    },
    /// The server's process can't be read.
    #[error("can't measure the server's process")]
    Process(#[from] ProcessError),
    /// A listing was not complete.
    #[error("{found} entries were listed instead of {wanted}")]
    Listing { found: u64, wanted: u32 },
    /// A name led to another inode than before.
    #[error("file {number} is node {found} and was node {wanted}")]
    Node {
        number: u32,
        found: u64,
        wanted: u64,
    },
}

fn failed(what: &'static str) -> impl Fn(FuseError) -> ManyError {
    move |source| ManyError::Request { what, source }
}

/// The cost of one request.
#[derive(Clone, Copy)]
struct Cost {
    /// The server's CPU time, in microseconds.
    cpu: f64,
    /// The time that passed, in microseconds.
    time: f64,
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} ({:.2})", self.cpu, self.time)
    }
}

/// Measures what the options name.
pub(crate) fn run(options: &Many) -> Result<(), ManyError> {
    let folder = options.shared_dir.join(FOLDER);
    make_folder(&folder)?;
    let memory = [Region::new(0, 16 << 20), Region::new(4 << 30, 64 << 20)];
    let settings = vmm::Options::default().memory(&memory).timeout(TIMEOUT);
    let session = Profile::Simple.connect_path(&options.socket, &settings)?;
    let mut client = Client::new(session);
    client.set_timeout(TIMEOUT);
    client.init_offering(LINUX_OFFERS).map_err(failed("INIT"))?;
    let root = lookup(&mut client, ROOT, FOLDER)?;
    let mut many = Measuring {
        process: Process::new(options.pid)?,
        client,
        folder,
        root,
        directories: Vec::new(),
        nodes: Vec::new(),
    };
    if !options.inodes.is_empty() {
        many.inodes(&options.inodes)?;
    }
    if let Some(&most) = options.open_files.iter().max() {
        many.open_files(&options.open_files, most)?;
    }
    for (turn, &count) in options.entries.iter().enumerate() {
        if turn == 0 {
            println!("\n| entries of a directory | µs of CPU an entry (of time) | KiB meanwhile |");
            println!("| --: | --: | --: |");
        }
        many.entries(count)?;
    }
    Ok(())
}

/// The session, and what the server knows.
struct Measuring {
    process: Process,
    client: Client<Session>,
    folder: PathBuf,
    root: u64,
    directories: Vec<u64>,
    /// The nodes of known files, by their numbers.
    nodes: Vec<u64>,
}

impl Measuring {
    fn inodes(&mut self, counts: &[u32]) -> Result<(), ManyError> {
        println!(
            "\n| known inodes | KiB | bytes an inode | LOOKUP, new | LOOKUP, known | GETATTR | FORGET \
             | statx by the host |"
        );
        println!("| --: | --: | --: | --: | --: | --: | --: | --: |");
        let base = self.memory()?;
        for &count in counts {
            self.know(count)?;
            let memory = self.memory()?;
            let mut random = Random::new(count.into());
            // Distinct numbers, as a file can be forgotten once.
            let stride = (count / SAMPLE).max(1);
            let mut picked: Vec<u32> = (0..count.min(SAMPLE))
                .map(|turn| turn * stride + random.below(stride))
                .collect();
            for last in (1..picked.len()).rev() {
                let bound = u32::try_from(last + 1).unwrap_or(1);
                picked.swap(last, random.below(bound) as usize);
            }
            let known = self.timed(picked.len(), |it| it.look_up(&picked))?;
            let getattr = self.timed(picked.len(), |it| it.getattr(&picked))?;
            let forget = self.timed(picked.len(), |it| it.forget(&picked, 2))?;
            let new = self.timed(picked.len(), |it| it.look_up_new(&picked))?;
            let bare = bare(&self.folder, &picked)?;
            println!(
                "| {count} | {memory} | {:.0} | {new} | {known} | {getattr} | {forget} | {bare:.2} |",
                f64::from(u32::try_from(memory.saturating_sub(base)).unwrap_or(u32::MAX)) * 1024.0
                    / f64::from(count),
            );
        }
        let all: Vec<u32> = (0..u32::try_from(self.nodes.len()).unwrap_or(0)).collect();
        let cost = self.timed(all.len(), |it| it.forget(&all, 1))?;
        self.nodes.clear();
        println!(
            "\nFORGET of all of them: {cost} µs each; afterwards {} KiB.",
            self.memory()?
        );
        Ok(())
    }

    fn open_files(&mut self, counts: &[u32], most: u32) -> Result<(), ManyError> {
        println!("\n| open files | KiB | OPEN | READ | GETATTR | RELEASE |");
        println!("| --: | --: | --: | --: | --: | --: |");
        self.know(most)?;
        let mut open: Vec<Handle> = Vec::new();
        let flags = libc::O_RDONLY.cast_unsigned();
        let asked = OpenIn {
            flags,
            open_flags: 0,
        };
        let base = self.memory()?;
        for &count in counts {
            let first = u32::try_from(open.len()).unwrap_or(0);
            let nodes: Vec<u64> = self
                .nodes
                .get(first as usize..count as usize)
                .unwrap_or_default()
                .to_vec();
            let opened = self.timed(nodes.len(), |it| {
                for chunk in nodes.chunks(DEPTH) {
                    let calls = chunk.iter().map(|&node| {
                        Call::new(opcode::OPEN, node)
                            .arg(asked.as_bytes())
                            .reply_of::<OpenOut>()
                    });
                    for reply in together(&mut it.client, calls).map_err(failed("OPEN"))? {
                        let out: OpenOut = reply.value().map_err(failed("OPEN"))?;
                        open.push(out.into());
                    }
                }
                Ok(())
            })?;
            let memory = self.memory()?;
            let mut random = Random::new(count.into());
            let picked: Vec<u32> = (0..SAMPLE).map(|_| random.below(count)).collect();
            let read = self.timed(picked.len(), |it| {
                for chunk in picked.chunks(DEPTH) {
                    let asked: Vec<_> = chunk
                        .iter()
                        .map(|&number| {
                            let handle = open.get(number as usize).map_or(0, |handle| handle.fh);
                            let asked = ReadIn {
                                fh: handle,
                                size: 4096,
                                flags,
                                ..ReadIn::default()
                            };
                            (it.node(number), asked)
                        })
                        .collect();
                    let calls = asked.iter().map(|(node, asked)| {
                        Call::new(opcode::READ, *node)
                            .arg(asked.as_bytes())
                            .reply(4096)
                    });
                    together(&mut it.client, calls).map_err(failed("READ"))?;
                }
                Ok(())
            })?;
            let getattr = self.timed(picked.len(), |it| it.getattr(&picked))?;
            // A sample is closed, and opened again.
            let some = (count as usize).min(1000);
            let release = self.timed(some, |it| {
                for (number, handle) in (0..).zip(open.iter().take(some)) {
                    let node = it.node(number);
                    it.client
                        .release(node, *handle)
                        .map_err(failed("RELEASE"))?;
                }
                Ok(())
            })?;
            for (number, handle) in (0..).zip(open.iter_mut().take(some)) {
                let node = self.nodes.get(number).copied().unwrap_or(0);
                let again = self.client.open(node, libc::O_RDONLY);
                *handle = again.map_err(failed("OPEN"))?;
            }
            println!(
                "| {count} | {} | {opened} | {read} | {getattr} | {release} |",
                memory.saturating_sub(base)
            );
        }
        let count = open.len();
        let release = self.timed(count, |it| {
            for (first, chunk) in (0..).step_by(DEPTH).zip(open.chunks(DEPTH)) {
                let asked: Vec<_> = chunk
                    .iter()
                    .map(|handle| ReleaseIn {
                        fh: handle.fh,
                        flags,
                        ..ReleaseIn::default()
                    })
                    .collect();
                let nodes: Vec<u64> = (first..)
                    .take(chunk.len())
                    .map(|number| it.node(number))
                    .collect();
                let calls = nodes.iter().zip(&asked).map(|(&node, asked)| {
                    Call::new(opcode::RELEASE, node)
                        .arg(asked.as_bytes())
                        .reply(0)
                });
                together(&mut it.client, calls).map_err(failed("RELEASE"))?;
            }
            Ok(())
        })?;
        println!("\nRELEASE of all of them: {release} µs each.");
        let all: Vec<u32> = (0..most).collect();
        self.forget(&all, 1)?;
        self.nodes.clear();
        Ok(())
    }

    fn entries(&mut self, count: u32) -> Result<(), ManyError> {
        let folder = format!("e{count}");
        let path = self.folder.join(&folder);
        make_folder(&path)?;
        make_files(&path, count)?;
        let node = lookup(&mut self.client, self.root, &folder)?;
        let mut memory = 0;
        let cost = self.timed(count as usize, |it| {
            let client = &mut it.client;
            let handle = match client.opendir(node) {
                Err(error) if error.errno() == Some(libc::ENOSYS) => Handle::raw(0),
                other => other.map_err(failed("OPENDIR"))?,
            };
            let (mut found, mut offset) = (0, 0);
            let mut nodes = Vec::with_capacity(count as usize);
            loop {
                let page = client.readdirplus(node, handle, offset, LISTING);
                let page = page.map_err(failed("READDIRPLUS"))?;
                let Some(last) = page.last() else {
                    break;
                };
                offset = last.entry.offset;
                for plus in &page {
                    if plus.entry.name != "." && plus.entry.name != ".." {
                        found += 1;
                        if plus.node.nodeid != 0 {
                            nodes.push((plus.node.nodeid, 1));
                        }
                    }
                }
            }
            if found != u64::from(count) {
                return Err(ManyError::Listing {
                    found,
                    wanted: count,
                });
            }
            memory = it.memory()?;
            forget(&mut it.client, &nodes)?;
            // ENOSYS to OPENDIR means that there is none to release.
            let _ = it.client.releasedir(node, handle);
            Ok(())
        })?;
        println!("| {count} | {cost} | {memory} |");
        Ok(())
    }

    /// Makes this number of files and lets the server know all of them.
    fn know(&mut self, count: u32) -> Result<(), ManyError> {
        let mut made = false;
        while self.directories.len() < count.div_ceil(IN_EACH) as usize {
            let folder = format!("i{}", self.directories.len());
            let path = self.folder.join(&folder);
            make_folder(&path)?;
            made |= make_files(&path, IN_EACH)?;
            let node = lookup(&mut self.client, self.root, &folder)?;
            self.directories.push(node);
        }
        if made {
            // A server may have to identify younger files with more care.
            std::thread::sleep(AGE);
        }
        let known = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
        let missing: Vec<u32> = (known..count).collect();
        self.nodes.resize(count.max(known) as usize, 0);
        self.look_up_new(&missing)
    }

    /// Runs `work`, which makes this many requests, and measures what one costs.
    fn timed(
        &mut self,
        requests: usize,
        work: impl FnOnce(&mut Self) -> Result<(), ManyError>,
    ) -> Result<Cost, ManyError> {
        let before = self.process.counters()?;
        let began = Instant::now();
        work(self)?;
        let time = began.elapsed();
        let used = self.process.since(&before)?;
        let requests = f64::from(u32::try_from(requests.max(1)).unwrap_or(u32::MAX));
        let cpu = Duration::from_nanos(used.cpu);
        Ok(Cost {
            cpu: cpu.as_secs_f64() * 1e6 / requests,
            time: time.as_secs_f64() * 1e6 / requests,
        })
    }

    fn memory(&self) -> Result<u64, ManyError> {
        Ok(self.process.since(&self.process.counters()?)?.memory)
    }

    fn node(&self, number: u32) -> u64 {
        self.nodes.get(number as usize).copied().unwrap_or(0)
    }

    /// LOOKUP of files that the server doesn't know; remembers their nodes.
    fn look_up_new(&mut self, numbers: &[u32]) -> Result<(), ManyError> {
        self.looked_up(numbers, |_number, found, node| {
            *node = found;
            Ok(())
        })
    }

    /// LOOKUP of files that the server knows.
    fn look_up(&mut self, numbers: &[u32]) -> Result<(), ManyError> {
        self.looked_up(numbers, |number, found, node| {
            if found == *node {
                Ok(())
            } else {
                let wanted = *node;
                Err(ManyError::Node {
                    number,
                    found,
                    wanted,
                })
            }
        })
    }

    fn looked_up(
        &mut self,
        numbers: &[u32],
        mut take: impl FnMut(u32, u64, &mut u64) -> Result<(), ManyError>,
    ) -> Result<(), ManyError> {
        for chunk in numbers.chunks(DEPTH) {
            let names: Vec<[u8; 7]> = chunk.iter().map(|number| terminated(*number)).collect();
            let calls = chunk.iter().zip(&names).map(|(&number, name)| {
                let folder = self.directories.get((number / IN_EACH) as usize);
                Call::new(opcode::LOOKUP, folder.copied().unwrap_or(ROOT))
                    .arg(name)
                    .reply_of::<vmm::fuse::wire::EntryOut>()
            });
            let replies = together(&mut self.client, calls).map_err(failed("LOOKUP"))?;
            for (&number, reply) in chunk.iter().zip(replies) {
                let entry: vmm::fuse::wire::EntryOut = reply.value().map_err(failed("LOOKUP"))?;
                if let Some(node) = self.nodes.get_mut(number as usize) {
                    take(number, entry.nodeid, node)?;
                }
            }
        }
        Ok(())
    }

    fn getattr(&mut self, numbers: &[u32]) -> Result<(), ManyError> {
        let asked = GetattrIn::default();
        for chunk in numbers.chunks(DEPTH) {
            let calls = chunk.iter().map(|&number| {
                let node = self.nodes.get(number as usize).copied().unwrap_or(0);
                Call::new(opcode::GETATTR, node)
                    .arg(asked.as_bytes())
                    .reply_of::<vmm::fuse::wire::AttrOut>()
            });
            together(&mut self.client, calls).map_err(failed("GETATTR"))?;
        }
        Ok(())
    }

    fn forget(&mut self, numbers: &[u32], lookups: u64) -> Result<(), ManyError> {
        let nodes: Vec<_> = numbers
            .iter()
            .map(|&number| (self.node(number), lookups))
            .collect();
        forget(&mut self.client, &nodes)
    }
}

fn forget(client: &mut Client<Session>, nodes: &[(u64, u64)]) -> Result<(), ManyError> {
    for batch in nodes.chunks(BATCH) {
        client.batch_forget(batch).map_err(failed("BATCH_FORGET"))?;
    }
    Ok(())
}

/// Sends these requests together, and collects their replies.
fn together<'c>(
    client: &mut Client<Session>,
    calls: impl Iterator<Item = Call<'c>>,
) -> Result<Vec<vmm::fuse::Reply>, FuseError> {
    let mut pending = Vec::with_capacity(DEPTH);
    for call in calls {
        pending.push(client.stage(call)?);
    }
    client.kick_all()?;
    pending.into_iter().map(|one| client.collect(one)).collect()
}

fn lookup(client: &mut Client<Session>, parent: u64, name: &str) -> Result<u64, ManyError> {
    let name = CString::new(name).unwrap_or_default();
    let entry = client.lookup(parent, &name).map_err(failed("LOOKUP"))?;
    Ok(entry.nodeid)
}

/// The name of the file with this number in its directory, with its NUL.
fn terminated(number: u32) -> [u8; 7] {
    let mut with_nul = [0; 7];
    for (to, from) in with_nul.iter_mut().zip(name(number % IN_EACH)) {
        *to = from;
    }
    with_nul
}

fn make_folder(path: &Path) -> Result<(), ManyError> {
    fs::create_dir_all(path).map_err(|source| ManyError::Make {
        path: path.to_owned(),
        source,
    })
}

/// Makes empty files with the numbers from 0 as names, those that are missing. True if there were
/// such.
fn make_files(path: &Path, count: u32) -> Result<bool, ManyError> {
    let make = || -> rustix::io::Result<bool> {
        let mut made = false;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(path, flags, Mode::empty())?;
        for number in 0..count {
            let name = if count > IN_EACH {
                format!("f{number:07}")
            } else {
                String::from_utf8_lossy(&name(number)).into_owned()
            };
            let mode = Mode::from_raw_mode(0o644);
            match rustix::fs::mknodat(&folder, &name, FileType::RegularFile, mode, 0) {
                Ok(()) => made = true,
                Err(rustix::io::Errno::EXIST) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(made)
    };
    make().map_err(|errno| ManyError::Make {
        path: path.to_owned(),
        source: errno.into(),
    })
}

/// Microseconds of CPU of a `statx` of each of these files by their names, which the server can't do
/// without.
fn bare(folder: &Path, numbers: &[u32]) -> Result<f64, ManyError> {
    let count = numbers.iter().max().map_or(0, |last| last / IN_EACH + 1);
    let stat = || -> rustix::io::Result<u64> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folders: Result<Vec<_>, _> = (0..count)
            .map(|index| rustix::fs::open(folder.join(format!("i{index}")), flags, Mode::empty()))
            .collect();
        let folders = folders?;
        let before = own_cpu();
        for &number in numbers {
            if let Some(folder) = folders.get((number / IN_EACH) as usize) {
                let name = name(number % IN_EACH);
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::statx(folder, &name[..], flags, StatxFlags::BASIC_STATS)?;
            }
        }
        Ok(own_cpu() - before)
    };
    let used = stat().map_err(|errno| ManyError::Make {
        path: folder.to_owned(),
        source: errno.into(),
    })?;
    let requests = f64::from(u32::try_from(numbers.len().max(1)).unwrap_or(u32::MAX));
    Ok(Duration::from_nanos(used).as_secs_f64() * 1e6 / requests)
}
