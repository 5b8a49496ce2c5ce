//! The cost of each room on the path of a request: `cargo bench --bench hot_rooms`.
//!
//! A ring in shared memory is driven as a guest's driver does; only the server's half of the work
//! is timed. Numbers are for one request, of which thirty-two arrive together.

use std::ffi::{CStr, OsStr};
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use ringfsd::fs::overlay::{self, Lower, Overlay, Upper, XattrPrefix};
use ringfsd::fs::passthrough::{self, Passthrough};
use ringfsd::fs::vfs::{MountPoint, Vfs, VfsOptions};
use ringfsd::fs::{Caller, FileSystem, HandleKind, NodeId};
use ringfsd::internals::fuse::abi::{GetattrIn, InHeader, Opcode, ReadIn};
use ringfsd::internals::fuse::{OUT_HEADER_LEN, request};
use ringfsd::internals::guest_memory::{MemoryLostEvent, Region, RegionDescription, of_regions};
use ringfsd::internals::state::{Limits, Table};
use ringfsd::internals::virtqueue::{
    Call, Chain, Features, InflightPart, Journal, Queue, QueueIndex, RingAddresses, Setup, Tracking,
};
use ringfsd::scheduler;
use rustix::thread::{CpuSet, sched_setaffinity};
use vmm::memory::{Buf, Gpa};
use vmm::ring::QueueOptions;
use zerocopy::IntoBytes;

/// Requests in flight.
const DEPTH: u16 = 32;

/// Entries of the ring: room for this number of requests of 35 descriptors.
const ENTRIES: u16 = 2048;

/// A request's header and arguments.
const REQUEST: u32 = 80;

/// The size of guest memory.
const MEMORY: u64 = 16 << 20;

/// The guest's superuser.
const CALLER: Caller = Caller {
    uid: Some(0),
    gid: Some(0),
    pid: 1,
    kill_set_id: false,
    group: None,
};

/// Both sides of one queue.
struct Ring {
    driver: vmm::Queue,
    device: Queue,
    readable: Vec<Buf>,
    writable: Vec<Buf>,
}

impl Ring {
    /// Requests of two readable descriptors; `reply` has the lengths of the writable ones.
    fn new(reply: &[u32]) -> Self {
        Self::tracked_by(None, reply)
    }

    /// As [`new`](Self::new), with a tracked queue and a journal.
    fn tracked(reply: &[u32]) -> Self {
        let limits = Limits {
            inodes: 1,
            handles: 1,
            queues: 2,
        };
        let table = Table::in_memory(&limits).expect("a table");
        let part = || table.queue(1).expect("a queue");
        let tracking = Tracking {
            inflight: InflightPart::in_table(part()),
            journal: Some(Journal::new(part())),
        };
        Self::tracked_by(Some(tracking), reply)
    }

    fn tracked_by(tracking: Option<Tracking>, reply: &[u32]) -> Self {
        let memory = vmm::Memory::new(&[vmm::Region::new(0, MEMORY)]).expect("guest memory");
        let options = QueueOptions {
            event_idx: true,
            ..QueueOptions::new(ENTRIES)
        };
        let driver = vmm::Queue::new(&memory, &options).expect("a queue");
        let mapped = &memory.regions()[0];
        let file = mapped.fd().try_clone_to_owned().expect("a descriptor");
        let user = mapped.user_address();
        let alarm = Arc::new(MemoryLostEvent::new().expect("an alarm"));
        let description = RegionDescription {
            file: file.into(),
            offset: 0,
            guest: 0,
            user,
            len: MEMORY,
        };
        let region = Region::map(description, &alarm);
        let regions = vec![region.expect("a region")];
        let ours = Arc::new(of_regions(regions).expect("a memory table"));
        let at = driver.addresses();
        let user = |gpa: Gpa| memory.user_address(gpa).expect("an address");
        let addresses = RingAddresses {
            descriptors: user(at.descriptors),
            available: user(at.available),
            used: user(at.used),
            log: None,
        };
        let features = Features {
            event_idx: true,
            indirect: false,
        };
        let call = Arc::<Call>::default();
        let setup = Setup {
            index: QueueIndex(1),
            size: ENTRIES,
            features,
            addresses,
            next: 0,
        };
        let device = Queue::tracked(&setup, &ours, call, tracking);
        let alloc = |len: u32| {
            let align = if len < 4096 { 16 } else { 4096 };
            let gpa = memory.alloc(u64::from(len), align).expect("guest memory");
            Buf::new(gpa, len)
        };
        Self {
            driver,
            device: device.expect("a device"),
            readable: vec![alloc(40), alloc(REQUEST - 40)],
            writable: reply.iter().copied().map(alloc).collect(),
        }
    }

    /// Times `serve` on each of `count` chains, in rounds of [`DEPTH`].
    fn time(&mut self, count: u64, serve: impl Fn(Chain)) -> Duration {
        let mut spent = Duration::ZERO;
        for _ in 0..count.div_ceil(DEPTH.into()) {
            for token in 0..DEPTH {
                let staged = self
                    .driver
                    .stage(&self.readable, &self.writable, token.into());
                staged.expect("room on the ring");
            }
            self.driver.publish();
            let start = Instant::now();
            while let Some(chain) = self.device.pop() {
                serve(chain.expect("a good chain"));
            }
            self.device.used().publish();
            spent += start.elapsed();
            while self.driver.pop().expect("a used element").is_some() {}
        }
        spent
    }
}

fn chains(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("chain");
    let mut getattr = Ring::new(&[16, 104]);
    group.bench_function("take and return", |bench| {
        bench.iter_custom(|count| getattr.time(count, Chain::no_reply));
    });
    let mut tracked = Ring::tracked(&[16, 104]);
    group.bench_function("take and return, tracked", |bench| {
        bench.iter_custom(|count| tracked.time(count, Chain::no_reply));
    });
    group.bench_function("take, read 80 bytes, reply 120", |bench| {
        bench.iter_custom(|count| {
            getattr.time(count, |mut chain| {
                let mut bytes = [0; 80];
                chain.read(&mut bytes);
                black_box(&bytes);
                chain.reply(&[&[0; OUT_HEADER_LEN], &[0; 104]]);
            })
        });
    });
    for pages in [1, 32] {
        let mut lens = vec![16];
        lens.resize(pages + 1, 4096);
        let mut read = Ring::new(&lens);
        let bytes = pages * 4096;
        group.bench_function(format!("buffer of {pages} pages for a READ"), |bench| {
            bench.iter_custom(|count| {
                read.time(count, |mut chain| {
                    black_box(chain.reply_buffer(OUT_HEADER_LEN, bytes));
                    chain.reply_filled(&[0; OUT_HEADER_LEN], bytes);
                })
            });
        });
    }
    group.finish();
}

fn message(opcode: Opcode, args: &[u8]) -> Vec<u8> {
    let len = u32::try_from(size_of::<InHeader>() + args.len()).expect("a short request");
    let header = InHeader {
        len,
        opcode: opcode as u32,
        unique: 7,
        nodeid: 1,
        ..Default::default()
    };
    [header.as_bytes(), args].concat()
}

fn decoding(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    let requests = [
        (
            "GETATTR",
            message(Opcode::Getattr, GetattrIn::default().as_bytes()),
        ),
        (
            "LOOKUP",
            message(Opcode::Lookup, b"a-name-of-some-length\0"),
        ),
        (
            "READ",
            message(
                Opcode::Read,
                ReadIn {
                    size: 4096,
                    ..Default::default()
                }
                .as_bytes(),
            ),
        ),
    ];
    for (name, bytes) in &requests {
        request::decode(bytes).expect("a good request");
        group.bench_function(*name, |bench| {
            bench.iter(|| black_box(request::decode(black_box(bytes)).is_ok()));
        });
    }
    group.finish();
}

fn channel(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("channel");
    let (sender, receiver) = scheduler::channel();
    group.bench_function("send and receive, one thread", |bench| {
        bench.iter(|| {
            sender.send(black_box(7_u64)).expect("an open channel");
            receiver.try_recv()
        });
    });
    group.bench_function("a batch of 32", |bench| {
        bench.iter(|| {
            sender.send_batch(0..32).expect("an open channel");
            while receiver.try_recv().is_some() {}
        });
    });
    group.finish();
}

/// The passthrough of a directory.
fn passthrough(path: &Path, readonly: bool) -> Arc<dyn FileSystem> {
    let options = passthrough::Options {
        readonly,
        ..passthrough::Options::default()
    };
    Arc::new(Passthrough::new(path, options).expect("a passthrough"))
}

/// The overlay of the directories in `dir`.
fn overlay(dir: &Path) -> Arc<dyn FileSystem> {
    let lower = Lower {
        fs: passthrough(&dir.join("lower"), true),
        device: Some(1),
    };
    let upper = Upper {
        fs: passthrough(dir, false),
        device: Some(1),
        directory: PathBuf::from("upper"),
        work: PathBuf::from("work"),
    };
    let options = overlay::Options {
        xattr_prefix: XattrPrefix::User,
        redirect_dirs: false,
        sync_copies: false,
        xattr: true,
        max_inodes: 1000,
        entry_ttl: Duration::ZERO,
    };
    Arc::new(Overlay::new(vec![lower], Some(upper), options).expect("an overlay"))
}

/// What a READ asks of the file system: the open file of a handle.
fn open_files(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a directory");
    for name in ["lower", "upper", "work"] {
        std::fs::create_dir(dir.path().join(name)).expect("a directory");
    }
    for name in ["lower/below", "upper/above"] {
        std::fs::write(dir.path().join(name), "data").expect("a file");
    }
    let options = VfsOptions {
        xattr: true,
        announce_submounts: true,
    };
    let root = MountPoint::parse(OsStr::new("/")).expect("a mount point");
    let vfs = Vfs::new(options);
    let share = passthrough(&dir.path().join("lower"), false);
    vfs.mount(&root, share).expect("a mount");
    let layers = overlay(dir.path());
    let cases = [
        (
            "passthrough",
            passthrough(&dir.path().join("lower"), false),
            c"below",
        ),
        ("vfs", Arc::new(vfs) as Arc<dyn FileSystem>, c"below"),
        ("overlay, lower layer", Arc::clone(&layers), c"below"),
        ("overlay, upper layer", layers, c"above"),
    ];
    let mut group = criterion.benchmark_group("open file");
    for (name, fs, file) in cases {
        let node = fs.lookup(&CALLER, NodeId::ROOT, file).expect("a file").node;
        let handle = fs.open(&CALLER, node, 0).expect("an open file").handle;
        group.bench_function(name, |bench| {
            bench.iter(|| black_box(fs.file(black_box(node), handle, HandleKind::File)).is_ok());
        });
    }
    group.finish();
}

/// Runs `work` `times` times on each of the first `threads` processors, all at the same time.
/// Returns how long that took. `work` gets the number of its thread.
fn pinned(threads: usize, times: u64, work: impl Fn(usize) + Sync) -> Duration {
    let start = Barrier::new(threads + 1);
    let end = Barrier::new(threads + 1);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (start, end, work) = (&start, &end, &work);
            scope.spawn(move || {
                let mut processors = CpuSet::new();
                processors.set(thread);
                sched_setaffinity(None, &processors).expect("a processor for each thread");
                start.wait();
                for _ in 0..times {
                    work(thread);
                }
                end.wait();
            });
        }
        start.wait();
        let begin = Instant::now();
        end.wait();
        begin.elapsed()
    })
}

/// What it costs that several processors write to the same words: a word of its own, and LOOKUPs of
/// a known name, which count references of the directory and of the file.
fn shared_words(criterion: &mut Criterion) {
    #[repr(align(128))]
    struct Line(AtomicU64);
    let mut group = criterion.benchmark_group("shared words");
    let lines = [const { Line(AtomicU64::new(0)) }; 2];
    for (name, threads, own) in [
        ("a word, one thread", 1, true),
        ("a word each, two threads", 2, true),
        ("one word, two threads", 2, false),
    ] {
        group.bench_function(name, |bench| {
            bench.iter_custom(|times| {
                pinned(threads, times, |thread| {
                    let line = if own { thread } else { 0 };
                    lines[line].0.fetch_add(1, Ordering::Relaxed);
                })
            });
        });
    }
    let dir = tempfile::tempdir().expect("a directory");
    for name in ["a", "b"] {
        std::fs::create_dir(dir.path().join(name)).expect("a directory");
        for file in ["0", "1"] {
            std::fs::write(dir.path().join(name).join(file), "data").expect("a file");
        }
    }
    let fs = passthrough(dir.path(), false);
    let lookup = |parent, name: &CStr| fs.lookup(&CALLER, parent, name).expect("an entry").node;
    let dirs = [c"a", c"b"].map(|name| lookup(NodeId::ROOT, name));
    let files = [c"0", c"1"];
    for (name, threads, own_dir, own_file) in [
        ("LOOKUP, one thread", 1, true, true),
        ("LOOKUP, two threads, a directory each", 2, true, true),
        ("LOOKUP, two threads, one directory", 2, false, true),
        ("LOOKUP, two threads, one file", 2, false, false),
    ] {
        group.bench_function(name, |bench| {
            bench.iter_custom(|times| {
                pinned(threads, times, |thread| {
                    let dir = if own_dir { thread } else { 0 };
                    let file = if own_file { thread } else { 0 };
                    black_box(lookup(dirs[dir], files[file]));
                })
            });
        });
    }
    group.finish();
}

criterion_group!(
    hot_rooms,
    chains,
    decoding,
    channel,
    open_files,
    shared_words
);
criterion_main!(hot_rooms);
