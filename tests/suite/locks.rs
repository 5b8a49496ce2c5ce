//! Locks over the socket: between the guest's own processes, and between guest and host.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use testing::{Server, each_runtime, errno};
use vmm::fuse::wire::{FileLock, LkIn, ReleaseIn, init, opcode, request_flag};
use vmm::fuse::{Call, Client, Handle, Pending, ROOT};
use vmm::{Options, Profile, Session};
use zerocopy::IntoBytes;

const ALICE: u64 = 0x0a11_ce00_0a11_ce00;
const BOB: u64 = 0xb0b;
const END: u64 = i64::MAX.cast_unsigned();

const EAGAIN: Option<i32> = Some(libc::EAGAIN);

type Guest = Client<Session>;

fn start(runtime: &str) -> (Server, Guest, u64, Handle) {
    start_with(runtime, &[])
}

fn start_with(runtime: &str, more: &[&str]) -> (Server, Guest, u64, Handle) {
    let args = ["--runtime", runtime, "--posix-locks", "--flock"];
    let server = Server::start(&[&args[..], &["--workers", "1"], more].concat());
    let mut fs = server.session(Profile::Simple, &Options::default());
    assert!(fs.has(init::POSIX_LOCKS | init::FLOCK_LOCKS));
    let (file, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
    (server, fs, file.nodeid, handle)
}

fn lock(kind: i32, start: u64, end: u64) -> FileLock {
    FileLock {
        start,
        end,
        r#type: kind.cast_unsigned(),
        pid: 42,
    }
}

fn flock(fs: &mut Guest, opcode: u32, node: u64, handle: Handle, kind: i32) -> Pending {
    let asked = LkIn {
        fh: handle.fh,
        owner: ALICE,
        lk: lock(kind, 0, END),
        lk_flags: request_flag::LK_FLOCK,
        padding: 0,
    };
    let call = Call::new(opcode, node).arg(asked.as_bytes()).reply(0);
    fs.submit(call).unwrap()
}

fn host_file(server: &Server) -> std::fs::File {
    let path = server.share().join("file");
    std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

#[each_runtime]
fn lock_owners_of_one_guest_conflict(runtime: &str) {
    let (_server, mut fs, node, handle) = start(runtime);
    fs.setlk(node, handle, ALICE, lock(libc::F_WRLCK, 10, 19))
        .unwrap();
    // Alice's own lock doesn't conflict with hers; Bob learns which one conflicts with his.
    let mine = fs
        .getlk(node, handle, ALICE, lock(libc::F_WRLCK, 0, END))
        .unwrap();
    assert_eq!(mine.r#type, libc::F_UNLCK.cast_unsigned());
    let theirs = fs
        .getlk(node, handle, BOB, lock(libc::F_RDLCK, 0, END))
        .unwrap();
    assert_eq!((theirs.start, theirs.end, theirs.pid), (10, 19, 0));
    assert_eq!(theirs.r#type, libc::F_WRLCK.cast_unsigned());

    let refused = fs.setlk(node, handle, BOB, lock(libc::F_RDLCK, 19, 30));
    assert_eq!(errno(refused), EAGAIN);
    fs.setlk(node, handle, BOB, lock(libc::F_WRLCK, 20, END))
        .unwrap();
    let theirs = fs
        .getlk(node, handle, ALICE, lock(libc::F_RDLCK, 20, 20))
        .unwrap();
    assert_eq!((theirs.start, theirs.end), (20, END));

    // A part is given up; then all, by closing a descriptor.
    fs.setlk(node, handle, ALICE, lock(libc::F_UNLCK, 15, 19))
        .unwrap();
    fs.setlk(node, handle, BOB, lock(libc::F_WRLCK, 15, 15))
        .unwrap();
    let refused = fs.setlk(node, handle, BOB, lock(libc::F_WRLCK, 14, 14));
    assert_eq!(errno(refused), EAGAIN);
    flush(&mut fs, node, handle, ALICE);
    fs.setlk(node, handle, BOB, lock(libc::F_WRLCK, 0, END))
        .unwrap();

    for bad in [
        lock(7, 0, 1),
        lock(libc::F_RDLCK, 2, 1),
        lock(libc::F_RDLCK, 0, END + 1),
    ] {
        assert_eq!(errno(fs.setlk(node, handle, BOB, bad)), Some(libc::EINVAL));
    }
    let unknown = Handle::raw(4711);
    let refused = fs.setlk(node, unknown, BOB, lock(libc::F_RDLCK, 0, 1));
    assert_eq!(errno(refused), Some(libc::EBADF));
}

fn flush(fs: &mut Guest, node: u64, handle: Handle, owner: u64) {
    let asked = vmm::fuse::wire::FlushIn {
        fh: handle.fh,
        lock_owner: owner,
        ..Default::default()
    };
    let call = Call::new(opcode::FLUSH, node).arg(asked.as_bytes());
    fs.request(call.reply(0)).unwrap();
}

#[each_runtime]
fn locks_of_guest_and_host_conflict(runtime: &str) {
    let (server, mut fs, node, handle) = start(runtime);
    let host = host_file(&server);
    let exclusive = FlockOperation::NonBlockingLockExclusive;
    fs.setlk(node, handle, ALICE, lock(libc::F_RDLCK, 0, 0))
        .unwrap();
    assert!(rustix::fs::fcntl_lock(&host, exclusive).is_err());
    fs.setlk(node, handle, ALICE, lock(libc::F_UNLCK, 0, END))
        .unwrap();
    rustix::fs::fcntl_lock(&host, exclusive).unwrap();
    let refused = fs.setlk(node, handle, ALICE, lock(libc::F_RDLCK, 0, 0));
    assert_eq!(errno(refused), EAGAIN);

    // A wait for a lock that is held outside ends when it is given up there.
    let all = lock(libc::F_WRLCK, 0, END);
    let waiting = fs.submit_setlkw(node, handle, ALICE, all).unwrap();
    fs.getattr(node).unwrap();
    assert!(fs.returned().unwrap().is_empty());
    rustix::fs::fcntl_lock(&host, FlockOperation::Unlock).unwrap();
    fs.collect(waiting).unwrap();
    assert!(rustix::fs::fcntl_lock(&host, exclusive).is_err());

    // Locks end with the session.
    fs.destroy().unwrap();
    rustix::fs::fcntl_lock(&host, exclusive).unwrap();
}

#[each_runtime]
fn waiting_lock_is_granted_after_release_and_delays_no_request(runtime: &str) {
    let (_server, mut fs, node, handle) = start(runtime);
    let all = lock(libc::F_WRLCK, 0, END);
    fs.setlk(node, handle, ALICE, all).unwrap();
    let waiting = fs.submit_setlkw(node, handle, BOB, all).unwrap();
    fs.write(node, handle, 0, b"meanwhile").unwrap();
    assert_eq!(fs.read(node, handle, 0, 9).unwrap(), b"meanwhile");
    assert!(fs.returned().unwrap().is_empty());
    // Releasing a part of his range doesn't end Bob's wait.
    flush(&mut fs, node, handle, BOB);
    assert!(fs.returned().unwrap().is_empty());
    fs.setlk(node, handle, ALICE, lock(libc::F_UNLCK, 0, END))
        .unwrap();
    fs.collect(waiting).unwrap();
    assert_eq!(errno(fs.setlk(node, handle, ALICE, all)), EAGAIN);
    flush(&mut fs, node, handle, BOB);
    fs.setlk(node, handle, ALICE, all).unwrap();
}

#[each_runtime]
fn an_interrupt_ends_the_wait_for_a_lock(runtime: &str) {
    let (_server, mut fs, node, handle) = start(runtime);
    let all = lock(libc::F_WRLCK, 0, END);
    fs.setlk(node, handle, ALICE, all).unwrap();
    for round in 0..50 {
        let waiting = fs.submit_setlkw(node, handle, BOB, all).unwrap();
        if round % 2 == 0 {
            fs.getattr(ROOT).unwrap();
        }
        fs.interrupt(waiting).unwrap();
        assert_eq!(errno(fs.collect(waiting)), Some(libc::EINTR));
    }
    let waiting = fs.submit_setlkw(node, handle, BOB, all).unwrap();
    flush(&mut fs, node, handle, ALICE);
    fs.collect(waiting).unwrap();
}

#[each_runtime]
fn a_stopped_queue_returns_its_waiting_locks(runtime: &str) {
    let (mut server, mut fs, node, handle) = start(runtime);
    let all = lock(libc::F_WRLCK, 0, END);
    fs.setlk(node, handle, ALICE, all).unwrap();
    let waiting: Vec<_> = (0..8)
        .map(|owner| fs.submit_setlkw(node, handle, owner, all).unwrap())
        .collect();
    // Whatever is on the ring before this has been taken off it.
    fs.getattr(ROOT).unwrap();
    let bases = fs.guest().stop().unwrap();
    fs.guest().restart(&bases).unwrap();
    for one in waiting {
        assert_eq!(errno(fs.collect(one)), EAGAIN);
    }
    // The lock is held as before, and can be waited for again.
    let again = fs.submit_setlkw(node, handle, BOB, all).unwrap();
    fs.setlk(node, handle, ALICE, lock(libc::F_UNLCK, 0, END))
        .unwrap();
    fs.collect(again).unwrap();

    // A front end that goes away takes its waits with it.
    let _waits = fs.submit_setlkw(node, handle, ALICE, all).unwrap();
    fs.getattr(ROOT).unwrap();
    drop(fs);
    server.wait_until_it_listens();
    let host = host_file(&server);
    rustix::fs::fcntl_lock(&host, FlockOperation::NonBlockingLockExclusive).unwrap();
}

#[each_runtime]
fn wait_for_a_lock_ends_at_its_limit(runtime: &str) {
    let limit = Duration::from_millis(200);
    let limited = ["--lock-wait-limit", "0.2"];
    let (_server, mut fs, node, handle) = start_with(runtime, &limited);
    let all = lock(libc::F_WRLCK, 0, END);
    let other = fs.open(node, libc::O_RDWR).unwrap();
    fs.setlk(node, handle, ALICE, all).unwrap();
    let set = flock(&mut fs, opcode::SETLK, node, handle, libc::F_WRLCK);
    fs.collect(set).unwrap();

    let began = Instant::now();
    let record = fs.submit_setlkw(node, handle, BOB, all).unwrap();
    let whole = flock(&mut fs, opcode::SETLKW, node, other, libc::F_RDLCK);
    assert_eq!(errno(fs.collect(record)), EAGAIN);
    assert!(began.elapsed() >= limit);
    assert_eq!(errno(fs.collect(whole)), EAGAIN);
    assert!(began.elapsed() >= limit);
    // An owner whose request was refused doesn't have the lock.
    for (opcode, kind) in [
        (opcode::SETLK, libc::F_UNLCK),
        (opcode::SETLK, libc::F_WRLCK),
    ] {
        let set = flock(&mut fs, opcode, node, handle, kind);
        fs.collect(set).unwrap();
    }
    flush(&mut fs, node, handle, ALICE);
    fs.setlk(node, handle, ALICE, all).unwrap();

    // What comes in time is had.
    let (_server, mut fs, node, handle) = start_with(runtime, &["--lock-wait-limit=3600"]);
    fs.setlk(node, handle, ALICE, all).unwrap();
    let waiting = fs.submit_setlkw(node, handle, BOB, all).unwrap();
    fs.getattr(ROOT).unwrap();
    flush(&mut fs, node, handle, ALICE);
    fs.collect(waiting).unwrap();
    assert_eq!(errno(fs.setlk(node, handle, ALICE, all)), EAGAIN);
}

#[each_runtime]
fn locks_on_whole_files_belong_to_the_open_file(runtime: &str) {
    let (server, mut fs, node, handle) = start(runtime);
    let host = host_file(&server);
    let exclusive = FlockOperation::NonBlockingLockExclusive;
    let other = fs.open(node, libc::O_RDONLY).unwrap();
    let set = flock(&mut fs, opcode::SETLK, node, handle, libc::F_WRLCK);
    fs.collect(set).unwrap();
    let refused = flock(&mut fs, opcode::SETLK, node, other, libc::F_RDLCK);
    assert_eq!(errno(fs.collect(refused)), EAGAIN);
    assert!(rustix::fs::flock(&host, exclusive).is_err());
    // Record locks know nothing of it.
    fs.setlk(node, other, BOB, lock(libc::F_WRLCK, 0, END))
        .unwrap();

    let waiting = flock(&mut fs, opcode::SETLKW, node, other, libc::F_RDLCK);
    fs.getattr(ROOT).unwrap();
    fs.release(node, handle).unwrap();
    fs.collect(waiting).unwrap();
    assert!(rustix::fs::flock(&host, exclusive).is_err());
    let interrupted = fs.open(node, libc::O_RDONLY).unwrap();
    let waiting = flock(&mut fs, opcode::SETLKW, node, interrupted, libc::F_WRLCK);
    fs.interrupt(waiting).unwrap();
    assert_eq!(errno(fs.collect(waiting)), Some(libc::EINTR));
    let unset = flock(&mut fs, opcode::SETLK, node, other, libc::F_UNLCK);
    fs.collect(unset).unwrap();
    rustix::fs::flock(&host, exclusive).unwrap();
}

#[each_runtime]
fn locks_of_an_open_file_end_with_it(runtime: &str) {
    let (_server, mut fs, node, handle) = start(runtime);
    let all = lock(libc::F_WRLCK, 0, END);
    let other = fs.open(node, libc::O_RDWR).unwrap();
    fs.setlk(node, other, ALICE, all).unwrap();
    assert_eq!(errno(fs.setlk(node, handle, BOB, all)), EAGAIN);
    let asked = ReleaseIn {
        fh: other.fh,
        ..ReleaseIn::default()
    };
    let call = Call::new(opcode::RELEASE, node).arg(asked.as_bytes());
    fs.request(call.reply(0)).unwrap();
    fs.setlk(node, handle, BOB, all).unwrap();
}

#[each_runtime]
fn each_sort_of_lock_has_its_option(runtime: &str) {
    for (option, posix, whole) in [("--posix-locks", true, false), ("--flock", false, true)] {
        let server = Server::start(&["--runtime", runtime, option]);
        let mut fs = server.session(Profile::Simple, &Options::default());
        assert_eq!(fs.has(init::POSIX_LOCKS), posix);
        assert_eq!(fs.has(init::FLOCK_LOCKS), whole);
        let (file, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
        let set = fs.setlk(file.nodeid, handle, BOB, lock(libc::F_RDLCK, 0, 1));
        assert_eq!(set.is_ok(), posix);
        let set = flock(&mut fs, opcode::SETLK, file.nodeid, handle, libc::F_RDLCK);
        assert_eq!(fs.collect(set).is_ok(), whole);
    }
}

#[each_runtime]
fn a_readonly_share_has_locks_of_files_open_for_reading(runtime: &str) {
    let args = ["--runtime", runtime, "--posix-locks", "--flock"];
    let server = Server::start(&[&args[..], &["--readonly"]].concat());
    std::fs::write(server.share().join("file"), "").unwrap();
    let mut fs = server.session(Profile::Simple, &Options::default());
    let node = fs.lookup(ROOT, c"file").unwrap().nodeid;
    let handle = fs.open(node, libc::O_RDONLY).unwrap();
    let host = host_file(&server);
    let exclusive = FlockOperation::NonBlockingLockExclusive;

    fs.setlk(node, handle, ALICE, lock(libc::F_RDLCK, 0, END))
        .unwrap();
    assert!(rustix::fs::fcntl_lock(&host, exclusive).is_err());
    // What a lock belongs to on the host is open for reading only.
    let refused = fs.setlk(node, handle, ALICE, lock(libc::F_WRLCK, 0, END));
    assert_eq!(errno(refused), Some(libc::EBADF));
    flush(&mut fs, node, handle, ALICE);
    rustix::fs::fcntl_lock(&host, exclusive).unwrap();

    let set = flock(&mut fs, opcode::SETLK, node, handle, libc::F_WRLCK);
    fs.collect(set).unwrap();
    assert!(rustix::fs::flock(&host, exclusive).is_err());
}

#[test]
fn wait_limit_needs_locks_to_wait_for() {
    let socket = ["--socket=/nowhere/s", "--shared-dir=/"];
    for (more, code) in [
        (&["--lock-wait-limit=1"][..], 2),
        (&["--lock-wait-limit=soon", "--flock"], 2),
        (&["--lock-wait-limit=1", "--flock"], 1),
    ] {
        let output = testing::output(&[&socket, more].concat());
        assert_eq!(output.status.code(), Some(code), "{more:?}");
    }
}
