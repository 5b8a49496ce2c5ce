//! With `--state` a guest's session outlives its server: however the server ends, whoever connects
//! in between, and while the previous process is still ending.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::FlockOperation;
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process};
use testing::Server;
use vmm::connection::Connection;
use vmm::connection::message::VringAddress;
use vmm::event::Event;
use vmm::fuse::{Call, Client, Handle, Pending, ROOT, wire};
use vmm::{Memory, Options, Profile, Region, Session};

/// What a server logs that resumes from a file.
const RESUMED: &str = "resuming where another process ended";

fn options() -> Options {
    Options::default().request_queues(2).queue_size(128)
}

/// A server with a state file beside its share.
struct ServerWithState {
    server: Server,
    args: Vec<String>,
    state: PathBuf,
    /// Of `state`.
    _dir: tempfile::TempDir,
}

impl ServerWithState {
    fn start(more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let own = format!("--state={}", state.display());
        let args = [&["--request-queues=2", "--posix-locks", &own], more].concat();
        Self {
            server: Server::start(&args),
            args: args.into_iter().map(str::to_owned).collect(),
            state,
            _dir: dir,
        }
    }

    fn session(&self) -> Client<Session> {
        self.server.session(Profile::CloudHypervisor, &options())
    }

    /// Another server, after the end of this one.
    fn launch_next(&mut self) {
        let args: Vec<_> = self.args.iter().map(String::as_str).collect();
        self.server.launch_again(&args);
    }

    /// The same, which listens when this returns.
    fn next(&mut self) {
        self.launch_next();
        self.server.wait_until_it_listens();
    }

    /// Ends this server by a signal, and starts another, which listens when this returns.
    fn replace(&mut self, signal: Signal) {
        self.server.signal(signal);
        self.server.wait();
        self.next();
    }

    /// Connects the guest's session to the server that listens now.
    fn reconnect(&self, fs: &mut Client<Session>) {
        fs.guest().reconnect_path(self.server.socket()).unwrap();
    }
}

fn kill(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// What a guest holds.
struct GuestState {
    file: u64,
    handle: Handle,
    dir: u64,
    listing: Handle,
}

const OWNER: u64 = 7;

fn whole_file() -> wire::FileLock {
    wire::FileLock {
        start: 0,
        end: i64::MAX.cast_unsigned(),
        r#type: libc::F_WRLCK.cast_unsigned(),
        pid: 1,
    }
}

impl GuestState {
    fn set_up(fs: &mut Client<Session>) -> Self {
        let dir = fs.mkdir(ROOT, c"dir", 0o755).unwrap().nodeid;
        let listing = fs.opendir(dir).unwrap();
        let (file, handle) = fs.create(dir, c"file", 0o644).unwrap();
        fs.write(file.nodeid, handle, 0, b"before").unwrap();
        fs.setlk(file.nodeid, handle, OWNER, whole_file()).unwrap();
        Self {
            file: file.nodeid,
            handle,
            dir,
            listing,
        }
    }

    /// Requests that are in flight as the server ends, each of which shows whether it was lost.
    fn submit(&self, fs: &mut Client<Session>) -> Vec<Pending> {
        let getattr = wire::GetattrIn::default();
        let mut pending = Vec::new();
        for which in 0..40 {
            fs.use_queue(1 + which % 2);
            let call = match which % 4 {
                0 => Call::new(wire::opcode::STATFS, ROOT).reply(80),
                1 => Call::new(wire::opcode::LOOKUP, self.dir)
                    .name(c"file")
                    .reply(128),
                _ => {
                    let arg = zerocopy::IntoBytes::as_bytes(&getattr);
                    let call = Call::new(wire::opcode::GETATTR, self.file);
                    call.arg(arg).reply(104)
                }
            };
            pending.push(fs.submit(call).unwrap());
        }
        pending
    }

    /// Uses all of it.
    fn check(&self, fs: &mut Client<Session>, share: &Path) {
        fs.getattr(self.file).unwrap();
        assert_eq!(fs.read(self.file, self.handle, 0, 6).unwrap(), b"before");
        fs.write(self.file, self.handle, 6, b" and after").unwrap();
        let content = std::fs::read(share.join("dir/file")).unwrap();
        assert_eq!(content, b"before and after");
        let names = fs.readdir_all(self.dir, self.listing).unwrap();
        assert!(names.iter().any(|entry| entry.name == "file"), "{names:?}");
        let again = fs.lookup(self.dir, c"file").unwrap();
        assert_eq!(again.nodeid, self.file);
        fs.forget(self.file, 1).unwrap();
        let other = fs.getlk(self.file, self.handle, OWNER + 1, whole_file());
        let other = other.unwrap();
        assert_eq!(other.r#type, libc::F_WRLCK.cast_unsigned());
    }
}

/// How a server is ended.
type End = fn(&Server);

/// A server is ended in the middle of requests, a few times, and the next one resumes.
fn goes_on_after(name: &str, more: &[&str], end: End) {
    println!("{name} {more:?}");
    let mut with_state = ServerWithState::start(more);
    let mut fs = with_state.session();
    let guest = GuestState::set_up(&mut fs);
    for _ in 0..2 {
        let pending = guest.submit(&mut fs);
        end(&with_state.server);
        with_state.server.wait();
        with_state.next();
        with_state.reconnect(&mut fs);
        for one in pending {
            fs.collect(one).unwrap();
        }
        guest.check(&mut fs, &with_state.server.share());
        let told = with_state
            .server
            .said()
            .iter()
            .find(|line| line.contains(RESUMED));
        assert!(told.is_some_and(|line| line.contains("0 lost")), "{told:?}");
    }
}

#[test]
fn next_server_resumes_after_any_end() {
    let ends: [(&str, End); 8] = [
        ("SIGTERM", |server| server.signal(Signal::TERM)),
        ("SIGINT", |server| server.signal(Signal::INT)),
        ("SIGHUP", |server| server.signal(Signal::HUP)),
        ("SIGQUIT", |server| server.signal(Signal::QUIT)),
        ("SIGKILL", |server| server.signal(Signal::KILL)),
        ("SIGTERM to both", |server| {
            // As systemd does with KillMode=control-group. The second may have ended by then.
            let serving = Pid::from_raw(i32::try_from(server.pid()).unwrap());
            server.signal(Signal::TERM);
            let _ended = kill_process(serving.unwrap(), Signal::TERM);
        }),
        ("SIGTERM to the one that serves", |server| {
            kill(server.pid(), Signal::TERM);
        }),
        ("SIGKILL to the one that serves", |server| {
            kill(server.pid(), Signal::KILL);
        }),
    ];
    for (name, end) in ends {
        goes_on_after(name, &[], end);
        // There the hangup asks for an upgrade, and a killed process is replaced.
        if !matches!(name, "SIGHUP" | "SIGKILL to the one that serves") {
            goes_on_after(name, &["--supervise"], end);
        }
    }
    for more in [["--sandbox=none"], ["--runtime=tokio"]] {
        goes_on_after("SIGTERM", &more, |server| server.signal(Signal::TERM));
    }
}

#[test]
fn next_server_resumes_after_upgrade() {
    let mut with_state = ServerWithState::start(&["--supervise"]);
    let mut fs = with_state.session();
    let guest = GuestState::set_up(&mut fs);
    let pid = with_state.server.guardian().to_string();
    let upgrade = Command::new(testing::program())
        .args(["upgrade", "--pid", &pid])
        .output();
    assert!(upgrade.unwrap().status.success());
    guest.check(&mut fs, &with_state.server.share());
    with_state.replace(Signal::TERM);
    with_state.reconnect(&mut fs);
    guest.check(&mut fs, &with_state.server.share());
}

#[test]
fn failing_accept_keeps_session_in_state_file() {
    let mut with_state = ServerWithState::start(&[]);
    let mut fs = with_state.session();
    let guest = GuestState::set_up(&mut fs);
    with_state.replace(Signal::TERM);
    // No descriptor is left for a connection.
    let serving = Pid::from_raw(i32::try_from(with_state.server.pid()).unwrap());
    let none = Rlimit {
        current: Some(1),
        maximum: Some(1),
    };
    rustix::process::prlimit(serving, Resource::Nofile, none).unwrap();
    let _refused = with_state.server.connect();
    assert_eq!(with_state.server.wait().code(), Some(1));
    with_state.next();
    with_state.reconnect(&mut fs);
    guest.check(&mut fs, &with_state.server.share());
}

#[test]
fn connection_without_queues_keeps_stored_session() {
    for more in [&[][..], &["--supervise"]] {
        let mut with_state = ServerWithState::start(more);
        let mut fs = with_state.session();
        let guest = GuestState::set_up(&mut fs);
        let pending = guest.submit(&mut fs);
        with_state.replace(Signal::KILL);
        let strangers: [fn(&Server); 4] = [
            |server| drop(server.connect()),
            // Asks what is offered.
            |server| {
                let connection = Connection::new(server.connect());
                connection.unwrap().get_features().unwrap();
            },
            // Breaks the protocol.
            |server| {
                use std::io::Write;
                server.connect().write_all(&[0xff; 64]).unwrap();
            },
            // Stops within a message.
            |server| {
                use std::io::Write;
                server.connect().write_all(&[1, 0, 0, 0, 1]).unwrap();
            },
        ];
        for stranger in strangers {
            stranger(&with_state.server);
            with_state.server.wait_for("keeping the guest's state");
            with_state.server.wait_until_it_listens();
        }
        with_state.reconnect(&mut fs);
        for one in pending {
            fs.collect(one).unwrap();
        }
        guest.check(&mut fs, &with_state.server.share());
        // The VMM's own end is another matter, and is told.
        drop(fs);
        with_state.server.wait_for("discarding the guest's state");
        with_state.server.wait_until_it_listens();
        let mut fs = with_state.session();
        assert!(fs.getattr(guest.file).is_err());
    }
}

#[test]
fn mismatched_memory_keeps_stored_session() {
    let mut with_state = ServerWithState::start(&[]);
    let mut fs = with_state.session();
    let guest = GuestState::set_up(&mut fs);
    with_state.replace(Signal::KILL);
    let mut connection = Connection::new(with_state.server.connect()).unwrap();
    connection.get_features().unwrap();
    connection.set_features(1 << 32).unwrap();
    let memory = Memory::new(&[Region::new(0, 1 << 20)]).unwrap();
    connection.set_mem_table(&memory).unwrap();
    connection.set_vring_num(1, 128).unwrap();
    let beyond = VringAddress {
        index: 1,
        flags: 0,
        descriptors: u64::MAX - 0xffff,
        used: 0,
        available: 0,
        log: 0,
    };
    connection.set_vring_addr_raw(beyond).unwrap();
    let kick = Event::new().unwrap();
    connection.set_vring_kick(1, Some(&kick)).unwrap();
    with_state.server.wait_for("queue can't be used");
    with_state.server.wait_for("keeping the guest's state");
    with_state.server.wait_until_it_listens();
    with_state.reconnect(&mut fs);
    guest.check(&mut fs, &with_state.server.share());
}

#[test]
fn restarted_guest_discards_stored_session_with_log_line() {
    let mut with_state = ServerWithState::start(&[]);
    let mut fs = with_state.session();
    let guest = GuestState::set_up(&mut fs);
    with_state.replace(Signal::TERM);
    let mut fs = with_state.session();
    with_state
        .server
        .wait_for("the previous session is discarded");
    assert!(fs.getattr(guest.file).is_err());
    assert_eq!(fs.lookup(ROOT, c"dir").unwrap().attr.nlink, 2);
}

#[test]
fn server_waits_for_end_of_predecessor() {
    let mut with_state = ServerWithState::start(&[]);
    let mut fs = with_state.session();
    let guest = GuestState::set_up(&mut fs);
    with_state.server.signal(Signal::KILL);
    with_state.server.wait();
    // What a process that is still ending has: the lock of the state, and the socket.
    let state = std::fs::File::open(&with_state.state).unwrap();
    rustix::fs::flock(&state, FlockOperation::LockExclusive).unwrap();
    let socket = with_state.server.socket();
    std::fs::remove_file(&socket).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    with_state.launch_next();
    with_state.server.wait_for("waiting up to");
    drop(state);
    with_state.server.wait_for("another server listens");
    drop(listener);
    with_state.server.wait_until_it_listens();
    fs.guest().reconnect_path(socket).unwrap();
    guest.check(&mut fs, &with_state.server.share());
}
