//! Counts the heap allocations of the hottest requests, from ring to ring.
//!
//! An allocation for each request would make workers wait for one another in the allocator. The
//! server's threads run in this process, and all of their allocations are counted; so it is a process
//! of its own.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::num::{NonZeroU16, NonZeroUsize};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use ringfsd::fs::passthrough::{Options, Passthrough};
use ringfsd::internals::device::Device;
use ringfsd::internals::fuse::{Session, SessionOptions};
use ringfsd::internals::passthrough;
use ringfsd::internals::vhost_user::{self, Runner, Stop};
use ringfsd::internals::virtqueue::{Queue, QueueIndex};
use ringfsd::internals::worker::WorkerPool;
use ringfsd::io::Engine;
use testing::allocations::{Counting, leave_out_this_thread, of_all_threads};
use vmm::Profile;
use vmm::fuse::{self, Client, ROOT};

#[global_allocator]
static COUNTING: Counting = Counting;

/// Requests of each sort.
const MANY: usize = 100;

/// What the server's threads allocate while `act` is done [`MANY`] times. The least of several
/// times: what is allocated once, when a thread first has to yield or to sleep, is in none but one.
fn allocations(mut act: impl FnMut(usize)) -> usize {
    let once = |_| {
        let before = of_all_threads();
        for n in 0..MANY {
            act(n);
        }
        of_all_threads() - before
    };
    (0..5).map(once).min().unwrap_or_default()
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

/// Serves a directory with a file of 64 KiB to `guest`.
fn serve_to(engine: Engine, guest: impl FnOnce(&mut Client<vmm::Session>)) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), vec![7; 1 << 16]).unwrap();
    let fs = Arc::new(Passthrough::new(dir.path(), Options::default()).unwrap());
    let table = Arc::clone(passthrough::table(&fs));
    let session = Arc::new(Session::new(fs, SessionOptions::default()));
    let one = NonZeroUsize::MIN;
    let pool = WorkerPool::start(session, one, engine, Duration::from_micros(50)).unwrap();
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
        let options = vmm::Options::default();
        let mut client = Client::new(Profile::Simple.connect(theirs, &options).unwrap());
        client.init().unwrap();
        client.set_layout(fuse::Layout::linux());
        guest(&mut client);
        drop(client);
        served.join().unwrap().unwrap();
    });
    pool.shutdown();
}

#[test]
fn hot_requests_allocate_nothing() {
    // The guest's side is not counted.
    leave_out_this_thread();
    for &engine in Engine::ALL {
        if let Err(reason) = engine.probe() {
            eprintln!("skipped on {engine}: {reason}");
            continue;
        }
        serve_to(engine, |fs| {
            let node = fs.lookup(ROOT, c"file").unwrap().nodeid;
            let file = fs.open(node, libc::O_RDWR).unwrap();
            let offset = |n: usize| (n as u64 % 16) * 4096;
            let read = allocations(|n| {
                assert_eq!(fs.read(node, file, offset(n), 4096).unwrap().len(), 4096);
            });
            let write = allocations(|n| {
                assert_eq!(fs.write(node, file, offset(n), &[9; 4096]).unwrap(), 4096);
            });
            let getattr = allocations(|_| {
                assert_eq!(fs.getattr(node).unwrap().attr.size, 1 << 16);
            });
            let lookup = allocations(|_| {
                assert_eq!(fs.lookup(ROOT, c"file").unwrap().nodeid, node);
            });
            let none = [read, write, getattr, lookup];
            assert_eq!(
                none, [0; 4],
                "of {MANY} READ, WRITE, GETATTR, LOOKUP, {engine:?}"
            );

            // The measure measures: an answer of unknown length is made on the heap.
            let listing = allocations(|_| {
                fs.listxattr(node).unwrap();
            });
            assert!(listing >= MANY, "{listing} allocations were seen");
        });
    }
}
