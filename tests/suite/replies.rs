//! A VMM gets each reply exactly once, at whatever instant the serving process is killed.
//!
//! The serving process is traced and killed at each entry to and each return from a system call
//! that it makes for one message: at the first of them, then at the second, until none is left. The
//! VMM reads its reply before the kill or after it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    unsafe_code,
    reason = "a test fails by panicking; tracing takes raw system calls"
)]

use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use testing::Server;
use vmm::connection::Message;
use vmm::connection::message::{InflightLayout, flag, request};
use vmm::fuse::{Client, ROOT};
use vmm::{Options, Profile, Session};
use zerocopy::IntoBytes;

/// A thread that stops at each system call.
struct Tracee(libc::pid_t);

/// Why it has stopped.
#[derive(Debug, PartialEq, Eq)]
enum Stop {
    /// Before or after a system call.
    Call,
    /// Before it waits without a time limit: it has nothing to do any more.
    Idle,
    /// Something else.
    Other(libc::c_int),
    /// It has ended.
    Ended,
}

fn ptrace(request: libc::c_uint, pid: libc::pid_t, addr: usize, data: usize) -> libc::c_long {
    // SAFETY: `data` is a number, or points to what lives on the caller's stack and is as long as
    // the request has it.
    let done = unsafe { libc::ptrace(request, pid, addr, data) };
    if done < 0 {
        panic!("ptrace {request:#x}: {}", std::io::Error::last_os_error());
    }
    done
}

impl Tracee {
    /// Traces the main thread of `pid`, and stops it.
    fn seize(pid: u32) -> Self {
        let tracee = Self(libc::pid_t::try_from(pid).unwrap());
        let options = libc::PTRACE_O_TRACESYSGOOD.unsigned_abs();
        ptrace(
            libc::PTRACE_SEIZE,
            tracee.0,
            0,
            usize::try_from(options).unwrap(),
        );
        ptrace(libc::PTRACE_INTERRUPT, tracee.0, 0, 0);
        assert!(matches!(tracee.wait(), Stop::Other(_)));
        tracee
    }

    fn wait(&self) -> Stop {
        let mut status = 0;
        // SAFETY: the kernel writes `status`.
        let waited = unsafe { libc::waitpid(self.0, &raw mut status, libc::__WALL) };
        assert_eq!(waited, self.0);
        if !libc::WIFSTOPPED(status) {
            return Stop::Ended;
        }
        match libc::WSTOPSIG(status) {
            signal if signal != libc::SIGTRAP | 0x80 => Stop::Other(signal),
            _ if self.is_idle() => Stop::Idle,
            _ => Stop::Call,
        }
    }

    /// Whether it is about to wait for ever (`PTRACE_GET_SYSCALL_INFO`).
    fn is_idle(&self) -> bool {
        const GET_SYSCALL_INFO: libc::c_uint = 0x420e;
        const ENTRY: u64 = 1;
        let mut info = [0_u64; 11];
        let address = (&raw mut info).addr();
        ptrace(GET_SYSCALL_INFO, self.0, size_of_val(&info), address);
        let [operation, _, _, number, arguments @ ..] = info;
        let ppoll = u64::try_from(libc::SYS_ppoll).unwrap();
        operation & 0xff == ENTRY && number == ppoll && arguments[2] == 0
    }

    /// Lets it run to the next stop.
    fn step(&self) -> Stop {
        ptrace(libc::PTRACE_SYSCALL, self.0, 0, 0);
        self.wait()
    }

    fn kill(self) {
        // SAFETY: takes numbers, of a process that is not waited for yet.
        assert_eq!(unsafe { libc::kill(self.0, libc::SIGKILL) }, 0);
        while self.wait() != Stop::Ended {}
    }
}

/// What is asked.
struct Asked {
    request: u32,
    flags: u32,
    body: Vec<u8>,
    /// Whether an eventfd comes with it.
    event: bool,
    /// How many descriptors come with the reply.
    fds: usize,
}

impl Asked {
    fn all() -> Vec<Self> {
        let plain = |request, flags, body: &[u8], fds| Self {
            request,
            flags: flag::VERSION | flags,
            body: body.to_vec(),
            event: request == request::SET_VRING_ERR,
            fds,
        };
        let inflight = InflightLayout {
            num_queues: 2,
            queue_size: 128,
            ..InflightLayout::default()
        };
        let acknowledged = flag::NEED_REPLY;
        let err = 1_u64;
        vec![
            plain(request::GET_FEATURES, 0, &[], 0),
            plain(request::GET_INFLIGHT_FD, 0, inflight.as_bytes(), 1),
            plain(
                request::SET_VRING_ENABLE,
                acknowledged,
                [1_u32, 1].as_bytes(),
                0,
            ),
            plain(request::SET_VRING_ERR, acknowledged, err.as_bytes(), 0),
        ]
    }
}

fn is_readable(fs: &mut Client<Session>) -> bool {
    let stream = fs.guest().connection.stream();
    let mut fds = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).unwrap() > 0
}

/// The limit of system calls for one message: more of them is an endless loop.
const MOST: usize = 200;

/// Kills the serving process at stop `at` of those that dealing with the message takes; `false` if
/// there are fewer. With `early` the VMM has read the reply by then if it is there.
fn kill_at(
    server: &mut Server,
    fs: &mut Client<Session>,
    asked: &Asked,
    at: usize,
    early: bool,
) -> bool {
    let tracee = Tracee::seize(server.pid());
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let fds = if asked.event {
        &[event.as_fd()][..]
    } else {
        &[]
    };
    let connection = &mut fs.guest().connection;
    connection
        .send(asked.request, asked.flags, &asked.body, fds)
        .unwrap();
    let mut stops = 0;
    // The first is the end of the wait that the message ends.
    let mut begun = false;
    while stops < at {
        match tracee.step() {
            Stop::Idle if begun && is_readable(fs) => break,
            Stop::Call | Stop::Idle => begun = true,
            Stop::Other(_) => continue,
            Stop::Ended => panic!("it has ended"),
        }
        stops += 1;
        assert!(stops < MOST);
    }
    let reply = |fs: &mut Client<Session>| {
        let reply = fs.guest().connection.recv_reply(asked.request).unwrap();
        assert_eq!(reply.fds.len(), asked.fds, "at {at}");
        if asked.flags & flag::NEED_REPLY != 0 {
            assert_eq!(reply.value::<u64>().unwrap(), 0);
        }
    };
    let read = early && is_readable(fs);
    if read {
        reply(fs);
    }
    tracee.kill();
    server.wait_for("serving again");
    if !read {
        reply(fs);
    }
    // Whatever comes twice comes before the reply to this one.
    let connection = &mut fs.guest().connection;
    connection
        .send(request::GET_QUEUE_NUM, flag::VERSION, &[], &[])
        .unwrap();
    let next: Message = connection.recv().unwrap();
    assert_eq!(next.header.request, request::GET_QUEUE_NUM, "at {at}");
    fs.getattr(ROOT).unwrap();
    stops == at
}

#[test]
fn reply_arrives_once_whichever_system_call_the_server_is_killed_at() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: tracing a server in its sandbox takes root");
        return;
    }
    for asked in Asked::all() {
        for early in [false, true] {
            let mut server = Server::start_as(None, &["--supervise"]);
            let mut fs = server.session(Profile::Simple, &Options::default());
            let mut at = 1;
            while kill_at(&mut server, &mut fs, &asked, at, early) {
                at += 1;
            }
            assert!(at > 5, "{at}");
            println!("message {}: killed at {at} instants", asked.request);
        }
    }
}

#[test]
fn reply_arrives_once_when_the_server_is_killed_as_it_arrives() {
    // Each restart shall be logged, and there are more than are logged otherwise.
    let options = ["--supervise", "--log-level=info,recovery=debug"];
    let mut server = Server::start_as(None, &options);
    let mut fs = server.session(Profile::Simple, &Options::default());
    let mut twice = 0;
    for round in 0..60 {
        let connection = &mut fs.guest().connection;
        let features = request::GET_FEATURES;
        connection.send(features, flag::VERSION, &[], &[]).unwrap();
        let pid = rustix::process::Pid::from_raw(i32::try_from(server.pid()).unwrap()).unwrap();
        let mut fds = [PollFd::from_borrowed_fd(
            connection.stream().as_fd(),
            PollFlags::IN,
        )];
        poll(&mut fds, None).unwrap();
        let early = round % 2 == 0;
        if early {
            connection.recv_reply(features).unwrap();
        }
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        server.wait_for("serving again");
        if !early {
            connection.recv_reply(features).unwrap();
        }
        let queues = request::GET_QUEUE_NUM;
        connection.send(queues, flag::VERSION, &[], &[]).unwrap();
        while connection.recv().unwrap().header.request != queues {
            twice += 1;
        }
    }
    assert_eq!(twice, 0, "of 60");
}
