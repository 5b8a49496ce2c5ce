//! A server that is killed with requests in flight, and another that takes over from it.
//!
//! The front end reconnects as Cloud Hypervisor does: with the in-flight region that the first
//! server has used, the base of each ring at its available index, and no kick. Each request that
//! the guest had sent before the kill must be completed exactly once.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;

use rustix::process::{Pid, Signal};
use testing::{Server, each_runtime};
use vmm::connection::message::InflightLayout;
use vmm::fuse::{Call, Client, FuseError, Pending, ROOT, wire};
use vmm::{Options, Profile, Session};

/// Requests in flight at each kill.
const IN_FLIGHT: usize = 48;

fn options() -> Options {
    Options::default().request_queues(2).queue_size(128)
}

/// A request that changes nothing, so that it may be served twice.
fn submit(fs: &mut Client<Session>, which: usize) -> Pending {
    fs.use_queue(1 + which % 2);
    let call = match which % 3 {
        0 => Call::new(wire::opcode::STATFS, ROOT).reply(80),
        _ => Call::new(wire::opcode::LOOKUP, ROOT)
            .name(c"file")
            .reply(128),
    };
    fs.submit(call).unwrap()
}

/// Takes the answers to all of these. A server that knows nothing of the session refuses them; but
/// it answers.
fn collect(fs: &mut Client<Session>, pending: Vec<Pending>) {
    let count = pending.len();
    let numbers: HashSet<_> = pending.iter().map(|one| one.unique()).collect();
    assert_eq!(numbers.len(), count);
    for one in pending {
        match fs.collect(one) {
            Ok(_) => (),
            Err(FuseError::Refused { errno, .. }) => assert_eq!(errno.0, libc::EIO),
            // A request that comes back twice is a stray one.
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(fs.in_flight(), 0);
    for queue in &mut fs.guest().queues {
        assert_eq!((queue.in_flight(), queue.ready().unwrap()), (0, 0));
    }
}

fn serves(fs: &mut Client<Session>) {
    fs.init().unwrap();
    fs.lookup(ROOT, c"file").unwrap();
}

/// Killed in the middle of whatever it is doing, again and again.
#[each_runtime]
fn killed_server_answers_each_request_once(runtime: &str) {
    let args = [
        "--runtime",
        runtime,
        "--request-queues",
        "2",
        "--workers",
        "2",
    ];
    let mut server = Server::start(&args);
    std::fs::write(server.share().join("file"), "content").unwrap();
    let mut fs = server.session(Profile::CloudHypervisor, &options());
    for round in 0..12 {
        let mut pending: Vec<_> = (0..IN_FLIGHT).map(|i| submit(&mut fs, i)).collect();
        // The kill comes after so many answers, as others are on their way.
        let answered: Vec<_> = pending.drain(..round * 4).collect();
        for one in answered {
            fs.collect(one).unwrap();
        }
        server.replace_killed(&args);
        fs.guest().reconnect_path(server.socket()).unwrap();
        collect(&mut fs, pending);
        serves(&mut fs);
    }
}

/// Stopped before it has taken anything, then killed; and killed while requests wait for another.
#[each_runtime]
fn waiting_and_untaken_requests_after_kill_are_answered(runtime: &str) {
    let args = [
        "--runtime",
        runtime,
        "--request-queues",
        "2",
        "--posix-locks",
    ];
    let mut server = Server::start(&args);
    std::fs::write(server.share().join("file"), "content").unwrap();
    let mut fs = server.session(Profile::CloudHypervisor, &options());
    let file = fs.lookup(ROOT, c"file").unwrap();
    let handle = fs.open(file.nodeid, libc::O_RDWR).unwrap();
    let whole = wire::FileLock {
        start: 0,
        end: i64::MAX.cast_unsigned(),
        r#type: libc::F_WRLCK.cast_unsigned(),
        pid: 1,
    };
    fs.setlk(file.nodeid, handle, 1, whole).unwrap();
    let mut pending: Vec<_> = (2..10)
        .map(|owner| fs.submit_setlkw(file.nodeid, handle, owner, whole).unwrap())
        .collect();
    // They have been taken by the time that what came after them is answered.
    let last = submit(&mut fs, 0);
    fs.collect(last).unwrap();
    let stop = Pid::from_raw(i32::try_from(server.pid()).unwrap()).unwrap();
    rustix::process::kill_process(stop, Signal::STOP).unwrap();
    pending.extend((0..IN_FLIGHT).map(|i| submit(&mut fs, i)));
    server.replace_killed(&args);
    fs.guest().reconnect_path(server.socket()).unwrap();
    server.wait_for("requests in flight");
    collect(&mut fs, pending);
    serves(&mut fs);
}

/// The session is in a file, from which the other server resumes without an INIT.
#[each_runtime]
fn state_file_preserves_guest_state_after_kill(runtime: &str) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("state");
    let state = format!("--state={}", file.display());
    let args = ["--runtime", runtime, "--request-queues", "2", &state];
    let mut server = Server::start(&args);
    let mut fs = server.session(Profile::CloudHypervisor, &options());
    let (made, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
    fs.write(made.nodeid, handle, 0, b"before").unwrap();
    let mode = std::fs::metadata(file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = testing::output(&["--socket=/nowhere/s", "--shared-dir=/", &state]);
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("is another server's"), "{said}");

    server.replace_killed(&args);
    fs.guest().reconnect_path(server.socket()).unwrap();
    assert_eq!(fs.read(made.nodeid, handle, 0, 100).unwrap(), b"before");
    fs.write(made.nodeid, handle, 6, b" and after").unwrap();
    let again = fs.lookup(ROOT, c"file").unwrap();
    assert_eq!((again.nodeid, again.attr.size), (made.nodeid, 16));
}

#[test]
fn invalid_inflight_region_ends_only_its_session() {
    type Change = fn(&mut InflightLayout);
    let changes: [(Change, &str); 3] = [
        (|layout| layout.mmap_size = 64, "and its queues need"),
        (|layout| layout.num_queues = 60_000, "and its queues need"),
        (
            |layout| layout.queue_size = 40_000,
            "can't be an in-flight region",
        ),
    ];
    let mut server = Server::start(&[]);
    for (change, words) in changes {
        let mut session = server
            .session(Profile::CloudHypervisor, &Options::default())
            .into_guest();
        let (mut layout, file) = session.inflight().unwrap();
        let file = file.try_clone().unwrap();
        change(&mut layout);
        session.connection.set_need_reply(false);
        session
            .connection
            .set_inflight_fd(layout, file.as_fd())
            .unwrap();
        session.connection.wait_closed().unwrap();
        server.wait_for(words);
        server.wait_until_it_listens();
    }
    // Not the version that is known here.
    let mut session = server
        .session(Profile::CloudHypervisor, &Options::default())
        .into_guest();
    session.stop().unwrap();
    let (_, file) = session.inflight().unwrap();
    rustix::io::pwrite(file, &[2], 8).unwrap();
    assert!(session.restart(&[0; 8]).is_err());
    server.wait_for("version 2");
    server.wait_until_it_listens();
    let mut fs = server.session(Profile::Simple, &Options::default());
    fs.getattr(ROOT).unwrap();
}

#[test]
fn inflight_region_for_too_many_queues_is_refused() {
    let mut server = Server::start(&["--request-queues", "1"]);
    let mut session = server
        .session(Profile::CloudHypervisor, &Options::default())
        .into_guest();
    assert!(session.connection.get_inflight_fd(3, 128).is_err());
    server.wait_for("set up queue 2, but there are 2");
}
