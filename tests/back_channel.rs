//! Requests of a file system to the VMM, through the real server: answered, refused, never answered,
//! and pending when the serving process is killed.
//!
//! Nothing in the server sends requests, so this program is a server too: the library's, with a
//! layer above the shared directory whose ACCESS asks the VMM. It has no test harness, whose threads
//! would prevent the server from forking: without arguments it runs all tests, with those of a server
//! it is one.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking"
)]

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use clap::Parser;
use ringfsd::fs::{
    Attributes, Caller, Changes, DirSink, Entry, FileSystem, Handle, HandleKind, Label, NewNode,
    NodeId, OpenFile, Opened, Replay, Result, Statistics, XattrFlags,
};
use ringfsd::internals::cli::Options;
use ringfsd::internals::config::Config;
use ringfsd::internals::device::{BackChannel, BackChannelError, BackendRequest};
use ringfsd::internals::recovery::{ExecHandover, Watched};
use ringfsd::internals::sandbox;
use ringfsd::internals::server::{Exit, Server, Started};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use vmm::Profile;
use vmm::connection::message::{backend_request, flag, protocol};
use vmm::connection::{Connection, ConnectionError};
use vmm::fuse::{Client, FuseError, ROOT};

use testing::Server as Process;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("--socket") => serve(),
        // Of a test harness's arguments none means anything here but the wish for a list.
        Some("--list") => ExitCode::SUCCESS,
        _ => {
            for (name, test) in TESTS {
                println!("test {name} ...");
                test();
                println!("test {name} ... ok");
            }
            ExitCode::SUCCESS
        }
    }
}

const TESTS: [(&str, fn()); 6] = [
    (
        "request_is_answered_or_refused",
        request_is_answered_or_refused,
    ),
    (
        "request_without_answer_delays_neither_queue_nor_message",
        request_without_answer_delays_neither_queue_nor_message,
    ),
    (
        "garbage_and_a_closed_channel_end_requests_alone",
        garbage_and_a_closed_channel_end_requests_alone,
    ),
    (
        "pending_request_is_sent_again_by_the_next_process",
        pending_request_is_sent_again_by_the_next_process,
    ),
    (
        "answer_counts_once_however_close_the_kill",
        answer_counts_once_however_close_the_kill,
    ),
    (
        "channel_is_kept_over_an_upgrade",
        channel_is_kept_over_an_upgrade,
    ),
];

/// The server.
fn serve() -> ExitCode {
    env_logger::builder()
        .filter_level(log::LevelFilter::Info)
        .init();
    let options = Options::parse_from(std::env::args_os());
    let config = Config::try_from(options).unwrap();
    match ringfsd::internals::server::check_for_upgrade(&config) {
        None => {}
        Some(status) => return ExitCode::from(status.unwrap()),
    }
    let handover = ExecHandover::take().unwrap();
    sandbox::reset_inherited(handover.is_some()).unwrap();
    let layer = |shared| Arc::new(Asking::over(shared)) as _;
    let server = match Server::start_with(layer, config, None, handover).unwrap() {
        Started::Serving(server) => server,
        Started::Guardian(parent) => match parent.watch(None).unwrap() {
            Watched::Serving(server) => server,
            Watched::Ended { ending, .. } => return ExitCode::from(ending.pass_on()),
        },
    };
    serve_inside(*server)
}

fn serve_inside(mut server: Server) -> ExitCode {
    let (stop, signalled) = UnixStream::pair().unwrap();
    let leave = Arc::new(AtomicBool::new(false));
    let hangup = signal_hook::consts::SIGHUP;
    signal_hook::flag::register(hangup, Arc::clone(&leave)).unwrap();
    for signal in [hangup, signal_hook::consts::SIGTERM] {
        signal_hook::low_level::pipe::register(signal, signalled.try_clone().unwrap()).unwrap();
    }
    server.release_signals().unwrap();
    match server.run(stop.as_fd(), &leave).unwrap() {
        Exit::Ended => ExitCode::SUCCESS,
        Exit::Left => server.leave(),
    }
}

/// A file system whose ACCESS asks the VMM, and answers with what that has said.
#[derive(Debug)]
struct Asking {
    shared: Arc<dyn FileSystem>,
    channel: Mutex<Option<Arc<dyn BackChannel>>>,
}

impl Asking {
    fn over(shared: Arc<dyn FileSystem>) -> Self {
        Self {
            shared,
            channel: Mutex::default(),
        }
    }
}

/// Passes methods on to the file system below.
macro_rules! pass_on {
    ($(fn $name:ident(&self $(, $argument:ident: $kind:ty)*) $(-> $result:ty)?;)*) => {
        $(fn $name(&self $(, $argument: $kind)*) $(-> $result)? {
            self.shared.$name($($argument),*)
        })*
    };
}

impl FileSystem for Asking {
    fn connected(&self, channel: &Arc<dyn BackChannel>) {
        *self.channel.lock().unwrap() = Some(Arc::clone(channel));
    }

    fn may_block(&self) -> bool {
        true
    }

    fn access(&self, _caller: &Caller, _node: NodeId, _mask: u32) -> Result<()> {
        let channel = self.channel.lock().unwrap().clone().unwrap();
        channel
            .request(BackendRequest::ConfigChanged, None)
            .map_err(|error| match error {
                BackChannelError::Refused(_) => Errno::PERM,
                BackChannelError::TimedOut => Errno::TIMEDOUT,
                BackChannelError::Interrupted => Errno::CANCELED,
                BackChannelError::NotConnected => Errno::NOTCONN,
                BackChannelError::NotNegotiated(_) => Errno::OPNOTSUPP,
                BackChannelError::Malformed(_) => Errno::BADMSG,
                BackChannelError::Closed => Errno::PIPE,
                _ => Errno::IO,
            })
    }

    fn replay(&self) -> Option<&dyn Replay> {
        self.shared.replay()
    }

    pass_on! {
        fn prepare_thread(&self) -> std::io::Result<()>;
        fn reset(&self);
        fn lookup(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<Entry>;
        fn forget(&self, node: NodeId, count: u64);
        fn getattr(&self, caller: &Caller, node: NodeId, handle: Option<Handle>)
            -> Result<(Attributes, Duration)>;
        fn setattr(&self, caller: &Caller, node: NodeId, handle: Option<Handle>, changes: &Changes)
            -> Result<(Attributes, Duration)>;
        fn readlink(&self, caller: &Caller, node: NodeId) -> Result<Vec<u8>>;
        fn symlink(&self, caller: &Caller, parent: NodeId, name: &CStr, target: &CStr,
            label: Option<Label<'_>>) -> Result<Entry>;
        fn mknod(&self, caller: &Caller, parent: NodeId, name: &CStr, new: &NewNode<'_>)
            -> Result<Entry>;
        fn mkdir(&self, caller: &Caller, parent: NodeId, name: &CStr, new: &NewNode<'_>)
            -> Result<Entry>;
        fn unlink(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<()>;
        fn rmdir(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<()>;
        fn rename(&self, caller: &Caller, from: (NodeId, &CStr), to: (NodeId, &CStr), flags: u32)
            -> Result<()>;
        fn link(&self, caller: &Caller, node: NodeId, parent: NodeId, name: &CStr)
            -> Result<Entry>;
        fn open(&self, caller: &Caller, node: NodeId, flags: u32) -> Result<Opened>;
        fn create(&self, caller: &Caller, parent: NodeId, name: &CStr, flags: u32,
            new: &NewNode<'_>) -> Result<(Entry, Opened)>;
        fn flush(&self, caller: &Caller, node: NodeId, handle: Handle) -> Result<()>;
        fn release(&self, node: NodeId, handle: Handle) -> Result<()>;
        fn kill_set_id(&self, node: NodeId, handle: Handle) -> Result<()>;
        fn file(&self, node: NodeId, handle: Handle, kind: HandleKind) -> Result<OpenFile>;
        fn statfs(&self, node: NodeId) -> Result<Statistics>;
        fn setxattr(&self, caller: &Caller, node: NodeId, name: &CStr, value: &[u8],
            flags: XattrFlags) -> Result<()>;
        fn getxattr(&self, caller: &Caller, node: NodeId, name: &CStr, limit: usize)
            -> Result<Vec<u8>>;
        fn getxattr_len(&self, caller: &Caller, node: NodeId, name: &CStr) -> Result<usize>;
        fn listxattr(&self, caller: &Caller, node: NodeId, limit: usize) -> Result<Vec<u8>>;
        fn listxattr_len(&self, caller: &Caller, node: NodeId) -> Result<usize>;
        fn removexattr(&self, caller: &Caller, node: NodeId, name: &CStr) -> Result<()>;
        fn opendir(&self, caller: &Caller, node: NodeId, flags: u32) -> Result<Opened>;
        fn readdir(&self, caller: &Caller, node: NodeId, handle: Handle, offset: u64, plus: bool,
            sink: &mut dyn DirSink) -> Result<()>;
        fn releasedir(&self, node: NodeId, handle: Handle) -> Result<()>;
        fn lseek(&self, node: NodeId, handle: Handle, offset: u64, whence: u32) -> Result<u64>;
    }
}

type Guest = Client<vmm::Session>;

/// A server, a guest, and the VMM's end of the back channel.
fn start(arguments: &[&str]) -> (Process, Guest, Connection) {
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    std::fs::create_dir(&share).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .arg("--socket")
        .arg(dir.path().join("socket"))
        .arg("--shared-dir")
        .arg(&share)
        .args(arguments)
        .stdin(Stdio::null());
    let mut server = Process::spawn(command, dir);
    server.wait_until_it_listens();
    // Of those that open a back channel, the one that reads the configuration space.
    let mut guest = server.session(Profile::Crosvm, &vmm::Options::default());
    let backend = guest.guest().backend.take().unwrap();
    assert!(guest.guest().connection.has(protocol::BACKEND_REQ));
    (server, guest, backend)
}

/// Has the guest send ACCESS.
fn access(mut guest: Guest) -> JoinHandle<(Guest, std::result::Result<(), FuseError>)> {
    std::thread::spawn(move || {
        let result = guest.access(ROOT, libc::R_OK);
        (guest, result)
    })
}

fn errno(result: std::result::Result<(), FuseError>) -> Option<i32> {
    result.err().map(|error| error.errno().unwrap())
}

/// Receives a request on the VMM's end.
fn receive(backend: &mut Connection) {
    let request = backend.recv().unwrap();
    assert_eq!(request.header.request, backend_request::CONFIG_CHANGE_MSG);
    assert_eq!(request.header.flags, flag::VERSION | flag::NEED_REPLY);
    assert!(request.body.is_empty() && request.fds.is_empty());
}

fn reply(backend: &mut Connection, value: u64) {
    let number = backend_request::CONFIG_CHANGE_MSG;
    backend.reply(number, &value.to_ne_bytes()).unwrap();
}

fn crash(server: &mut Process) {
    let pid = Pid::from_raw(i32::try_from(server.pid()).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    server.wait_for("serving again");
}

/// A request is answered, and the answer is its own.
fn goes_on(guest: Guest, backend: &mut Connection) -> Guest {
    let mut guest = guest;
    for value in [0, 1, 0] {
        let asked = access(guest);
        receive(backend);
        reply(backend, value);
        let (back, result) = asked.join().unwrap();
        let expected = (value != 0).then_some(libc::EPERM);
        assert_eq!(errno(result), expected);
        guest = back;
    }
    guest
}

fn request_is_answered_or_refused() {
    for arguments in [&[][..], &["--supervise"], &["--runtime", "tokio"]] {
        let (_server, guest, mut backend) = start(arguments);
        goes_on(guest, &mut backend);
    }
}

fn request_without_answer_delays_neither_queue_nor_message() {
    let (_server, guest, mut backend) = start(&[]);
    let asked = access(guest);
    receive(&mut backend);
    // It waits for as long as a request may take.
    let (mut guest, result) = asked.join().unwrap();
    assert_eq!(errno(result), Some(libc::ETIMEDOUT));
    // Other requests, and messages, are answered meanwhile; a request that comes next is not sent.
    guest.getattr(ROOT).unwrap();
    guest.guest().connection.get_features().unwrap();
    backend.set_timeout(Duration::from_millis(100)).unwrap();
    let silent = backend.recv().unwrap_err();
    assert!(matches!(silent, ConnectionError::TimedOut { .. }));
    backend.set_timeout(testing::TIMEOUT).unwrap();
    // The answer comes after all. It isn't that to the next request.
    reply(&mut backend, 1);
    goes_on(guest, &mut backend);
}

fn garbage_and_a_closed_channel_end_requests_alone() {
    let (_server, guest, mut backend) = start(&[]);
    let asked = access(guest);
    receive(&mut backend);
    backend.send_bytes(&[0xff; 100], &[]).unwrap();
    let (mut guest, result) = asked.join().unwrap();
    assert_eq!(errno(result), Some(libc::EBADMSG));
    assert_eq!(errno(guest.access(ROOT, 0)), Some(libc::EPIPE));
    // The VMM opens another one.
    let mut backend = guest.guest().connection.set_backend_req_fd().unwrap();
    guest.guest().connection.get_features().unwrap();
    let mut guest = goes_on(guest, &mut backend);
    drop(backend);
    assert_eq!(errno(guest.access(ROOT, 0)), Some(libc::EPIPE));
    guest.getattr(ROOT).unwrap();
}

fn pending_request_is_sent_again_by_the_next_process() {
    let (mut server, mut guest, mut backend) = start(&["--supervise"]);
    for _ in 0..3 {
        let asked = access(guest);
        receive(&mut backend);
        crash(&mut server);
        // This is the answer to what the killed process has asked: if it were taken for that to the
        // next request, ACCESS would fail.
        reply(&mut backend, 1);
        receive(&mut backend);
        reply(&mut backend, 0);
        let (back, result) = asked.join().unwrap();
        assert_eq!(errno(result), None);
        guest = goes_on(back, &mut backend);
    }
}

fn answer_counts_once_however_close_the_kill() {
    let (mut server, mut guest, mut backend) = start(&["--supervise"]);
    for round in 0..30_u32 {
        let asked = access(guest);
        receive(&mut backend);
        let pid = Pid::from_raw(i32::try_from(server.pid()).unwrap()).unwrap();
        // It may be received, and the reply of ACCESS be returned, before the kill.
        reply(&mut backend, 0);
        for _ in 0..round * 100 {
            std::hint::spin_loop();
        }
        kill_process(pid, Signal::KILL).unwrap();
        server.wait_for("serving again");
        // If not, it is asked again.
        while !asked.is_finished() {
            backend.set_timeout(Duration::from_millis(20)).unwrap();
            match backend.recv() {
                Ok(_) => reply(&mut backend, 0),
                Err(ConnectionError::TimedOut { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        backend.set_timeout(testing::TIMEOUT).unwrap();
        let (back, result) = asked.join().unwrap();
        assert_eq!(errno(result), None, "round {round}");
        guest = goes_on(back, &mut backend);
    }
}

fn channel_is_kept_over_an_upgrade() {
    let (mut server, guest, mut backend) = start(&["--supervise"]);
    let guest = goes_on(guest, &mut backend);
    let pid = Pid::from_raw(i32::try_from(server.guardian()).unwrap()).unwrap();
    // Without a program, it runs its own anew.
    kill_process(pid, Signal::HUP).unwrap();
    server.wait_for("upgraded to");
    let guest = goes_on(guest, &mut backend);
    // And what has been asked is not waited for.
    let asked = access(guest);
    receive(&mut backend);
    kill_process(pid, Signal::HUP).unwrap();
    server.wait_for("upgraded to");
    let (guest, result) = asked.join().unwrap();
    assert_eq!(errno(result), Some(libc::ECANCELED));
    reply(&mut backend, 1);
    goes_on(guest, &mut backend);
}
