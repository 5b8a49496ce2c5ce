//! A guest that is limited: its requests wait, none fails, and none is lost when the server stops,
//! is killed or gets other limits meanwhile.
//!
//! Nearly all tests limit the bytes read to one a second: the first READ passes, and the next one
//! would wait for a quarter of an hour, so no test depends on how fast anything is.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::num::{NonZeroU16, NonZeroU64, NonZeroUsize};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use ringfsd::fs::passthrough::{self, Passthrough};
use ringfsd::internals;
use ringfsd::internals::device::Device;
use ringfsd::internals::fuse::{Session, SessionOptions};
use ringfsd::internals::limits::{Limits, Rate, Settings};
use ringfsd::internals::vhost_user::{self, Runner, Stop};
use ringfsd::internals::virtqueue::{Queue, QueueIndex};
use ringfsd::internals::worker::WorkerPool;
use ringfsd::io::Engine;
use rustix::process::{Pid, Signal, kill_process};
use testing::{Server, each_runtime, errno, program};
use vmm::fuse::wire::opcode;
use vmm::fuse::{Call, Client, Handle, Pending, ROOT};
use vmm::{Options, Profile};

/// The arguments of a server whose guest may read one byte a second.
const ONE_BYTE: &str = "--limit-bandwidth=read=1";

/// Bytes of each READ.
const LEN: u32 = 1000;

/// A guest that has a file open, of which it has read as much as it may.
struct Guest {
    fs: Client<vmm::Session>,
    node: u64,
    handle: Handle,
}

impl Guest {
    fn new(mut fs: Client<vmm::Session>) -> Self {
        let (file, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
        let node = file.nodeid;
        fs.write(node, handle, 0, &content()).unwrap();
        Self { fs, node, handle }
    }

    fn of(server: &Server, queues: u16) -> Self {
        let options = Options::default().request_queues(queues);
        Self::new(server.session(Profile::Qemu, &options))
    }

    fn read(&mut self) {
        let read = self.fs.read(self.node, self.handle, 0, LEN).unwrap();
        assert!(read == content());
    }

    fn submit_read(&mut self) -> Pending {
        self.fs.submit_read(self.node, self.handle, 0, LEN).unwrap()
    }

    /// A READ that has been taken off the ring and is held back.
    fn held_read(&mut self) -> Pending {
        let pending = self.submit_read();
        // Whatever is on the ring before this has been taken off it.
        self.fs.getattr(ROOT).unwrap();
        assert!(self.fs.returned().unwrap().is_empty(), "it is served");
        pending
    }

    fn collect(&mut self, pending: Pending) {
        assert!(self.fs.collect(pending).unwrap().bytes == content());
    }

    fn interrupt(&mut self, pending: Pending) {
        self.fs.interrupt(pending).unwrap();
        assert_eq!(errno(self.fs.collect(pending)), Some(libc::EINTR));
    }
}

fn content() -> Vec<u8> {
    (0..=u8::MAX).cycle().take(LEN as usize).collect()
}

#[each_runtime]
fn limited_guest_waits_and_sees_no_error(runtime: &str) {
    let limit = "--limit-iops=metadata=400,burst=20";
    let server = Server::start(&["--runtime", runtime, "--request-queues=2", limit]);
    let options = Options::default().request_queues(2);
    let mut fs = server.session(Profile::Simple, &options);
    let started = Instant::now();
    let pending: Vec<_> = (0..100)
        .map(|n| {
            let call = Call::new(opcode::GETATTR, ROOT).arg(&[0; 16]).reply(104);
            fs.submit(call.on_queue(1 + n % 2)).unwrap()
        })
        .collect();
    for pending in pending {
        fs.collect(pending).unwrap();
    }
    // 20 at once, and the others at 400 a second.
    assert!(started.elapsed() >= Duration::from_millis(200));
}

#[each_runtime]
fn held_reads_delay_nothing_else(runtime: &str) {
    let server = Server::start(&["--runtime", runtime, "--request-queues=2", ONE_BYTE]);
    let mut guest = Guest::of(&server, 2);
    let other = guest.fs.open(guest.node, libc::O_RDONLY).unwrap();
    guest.read();
    let mut held = Vec::new();
    for queue in [1, 2, 1] {
        guest.fs.use_queue(queue);
        held.push(guest.held_read());
    }
    for queue in [1, 2] {
        guest.fs.use_queue(queue);
        guest.fs.lookup(ROOT, c"file").unwrap();
        let written = guest.fs.write(guest.node, guest.handle, 0, &content());
        assert_eq!(written.unwrap(), LEN);
    }
    guest.fs.release(guest.node, other).unwrap();
    guest.fs.forget(guest.node, 1).unwrap();
    for pending in held {
        guest.interrupt(pending);
    }
}

#[each_runtime]
fn interrupt_reaches_request_before_and_after_it_is_held_back(runtime: &str) {
    let server = Server::start(&["--runtime", runtime, ONE_BYTE]);
    let mut guest = Guest::of(&server, 1);
    guest.read();
    for round in 0..50 {
        let pending = match round % 2 {
            0 => guest.submit_read(),
            _ => guest.held_read(),
        };
        guest.interrupt(pending);
    }
}

#[each_runtime]
fn stopped_queue_answers_held_requests(runtime: &str) {
    let server = Server::start(&["--runtime", runtime, "--request-queues=2", ONE_BYTE]);
    let mut guest = Guest::of(&server, 2);
    guest.read();
    for _ in 0..3 {
        let mut held = Vec::new();
        for n in 0..20 {
            guest.fs.use_queue(1 + n % 2);
            held.push(guest.held_read());
        }
        let bases = guest.fs.guest().stop().unwrap();
        for queue in [1, 2] {
            let used = guest.fs.guest().queues[queue].used_idx();
            assert_eq!(used, bases[queue], "taken, and not returned");
        }
        guest.fs.guest().restart(&bases).unwrap();
        held.into_iter().for_each(|pending| guest.collect(pending));
    }
    // They are paid for: the next one waits.
    let pending = guest.held_read();
    guest.interrupt(pending);
}

#[each_runtime]
fn end_of_session_waits_for_no_token(runtime: &str) {
    let mut server = Server::start(&["--runtime", runtime, ONE_BYTE]);
    let mut guest = Guest::of(&server, 1);
    guest.read();
    let _unanswered = guest.held_read();
    drop(guest);
    server.wait_until_it_listens();
    let mut next = server.session(Profile::Qemu, &Options::default());
    next.lookup(ROOT, c"file").unwrap();
}

#[each_runtime]
fn bytes_that_are_not_there_are_not_paid_for(runtime: &str) {
    let limit = "--limit-bandwidth=read=1,burst=1000";
    let server = Server::start(&["--runtime", runtime, limit]);
    let mut guest = Guest::of(&server, 1);
    for _ in 0..20 {
        let beyond = u64::from(LEN);
        let read = guest.fs.read(guest.node, guest.handle, beyond, LEN);
        assert!(read.unwrap().is_empty());
        // On no open file.
        let refused = guest.fs.read(guest.node, Handle::raw(4711), 0, LEN);
        assert_eq!(errno(refused), Some(libc::EBADF));
    }
    guest.read();
    let pending = guest.held_read();
    guest.interrupt(pending);
}

#[each_runtime]
fn copies_are_paid_for_when_they_are_done(runtime: &str) {
    let server = Server::start(&["--runtime", runtime, "--limit-bandwidth=write=1,burst=1001"]);
    let mut guest = Guest::of(&server, 1);
    let (copy, to) = guest.fs.create(ROOT, c"copy", 0o644).unwrap();
    let asked = vmm::fuse::wire::CopyFileRangeIn {
        fh_in: guest.handle.fh,
        nodeid_out: copy.nodeid,
        fh_out: to.fh,
        len: u64::from(LEN),
        ..Default::default()
    };
    let copied = guest.fs.copy_file_range(guest.node, &asked).unwrap();
    assert_eq!(u64::from(copied), u64::from(LEN));
    let pending = guest.fs.submit_write(copy.nodeid, to, 0, &[1]).unwrap();
    guest.fs.getattr(ROOT).unwrap();
    assert!(guest.fs.returned().unwrap().is_empty());
    guest.interrupt(pending);
}

#[each_runtime]
fn high_priority_queue_is_no_way_around_limits(runtime: &str) {
    let server = Server::start(&["--runtime", runtime, ONE_BYTE]);
    let mut guest = Guest::of(&server, 1);
    guest.read();
    guest.fs.use_queue(0);
    let pending = guest.held_read();
    guest.interrupt(pending);
}

#[test]
fn requests_held_by_killed_or_replaced_process_are_answered() {
    let mut server = Server::start(&["--supervise", ONE_BYTE]);
    let mut guest = Guest::of(&server, 1);
    guest.read();
    for _ in 0..2 {
        let held: Vec<_> = (0..10).map(|_| guest.held_read()).collect();
        let serving = Pid::from_raw(server.pid().cast_signed()).unwrap();
        kill_process(serving, Signal::KILL).unwrap();
        server.wait_for("serving again");
        held.into_iter().for_each(|pending| guest.collect(pending));
        // The next process begins with full buckets, and these reads have emptied them.
        let held: Vec<_> = (0..10).map(|_| guest.held_read()).collect();
        let mut upgrade = std::process::Command::new(program());
        let upgrade = upgrade.args(["upgrade", "--pid", &server.guardian().to_string()]);
        let upgraded = upgrade.output().unwrap();
        assert!(upgraded.status.success(), "{upgraded:?}");
        held.into_iter().for_each(|pending| guest.collect(pending));
        guest.read();
    }
}

/// Workers, and nothing around them.
struct Workers<'a>(&'a WorkerPool<Passthrough>);

impl Runner for Workers<'_> {
    fn run(&mut self, queue: Queue, kick: Arc<OwnedFd>) -> std::io::Result<()> {
        self.0.run(queue, kick)
    }

    fn stop(&mut self, queue: QueueIndex) -> Option<u16> {
        self.0.stop(queue).map(|queue| queue.next_available())
    }

    fn reset(&mut self) {
        self.0.session().reset();
    }
}

/// Serves a directory to `act` with limits that it may change.
fn with_limits(engine: Engine, limits: &Arc<Limits>, act: impl FnOnce(&mut Guest)) {
    let dir = tempfile::tempdir().unwrap();
    let fs = Arc::new(Passthrough::new(dir.path(), passthrough::Options::default()).unwrap());
    let table = Arc::clone(internals::passthrough::table(&fs));
    let session = Arc::new(Session::new(fs, SessionOptions::default()));
    let workers = NonZeroUsize::new(2).unwrap();
    let pool = WorkerPool::start_limited(session, workers, engine, Duration::ZERO, limits).unwrap();
    let device = Device {
        tag: None,
        request_queues: NonZeroU16::MIN,
        dax_window: 0,
        dax_fs_map: false,
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (_stop, never) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            let stop = Stop {
                asked: never.as_fd(),
                leave: &AtomicBool::new(false),
            };
            vhost_user::serve(ours, &device, &mut Workers(&pool), &table, stop)
        });
        let session = Profile::Simple
            .connect(theirs, &Options::default())
            .unwrap();
        let mut client = Client::new(session);
        client.init().unwrap();
        let mut guest = Guest::new(client);
        act(&mut guest);
        drop(guest);
        served.join().unwrap().unwrap();
    });
    pool.shutdown();
}

fn bytes_read(per_second: u64) -> Settings {
    Settings {
        bytes_read: NonZeroU64::new(per_second).map(Rate::of),
        ..Settings::default()
    }
}

#[test]
fn changed_limits_apply_to_requests_that_wait() {
    for &engine in Engine::ALL {
        if let Err(reason) = engine.probe() {
            eprintln!("skipped on {engine}: {reason}");
            continue;
        }
        let limits = Limits::new(Settings::default());
        with_limits(engine, &limits, |guest| {
            for _ in 0..5 {
                guest.read();
            }
            for served_again in [bytes_read(1 << 30), Settings::default()] {
                // The buckets are empty: the first READ waits.
                limits.set(bytes_read(1));
                assert_eq!(limits.settings(), bytes_read(1));
                let held: Vec<_> = (0..10).map(|_| guest.held_read()).collect();
                limits.set(served_again);
                held.into_iter().for_each(|pending| guest.collect(pending));
                guest.read();
            }
        });
    }
}
