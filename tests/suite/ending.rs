//! A killed server releases at once what the next one needs: its socket, its connection and the
//! lock of its state file, however long the host takes to free files that the guest has removed.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FlockOperation;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use testing::Server;
use vmm::fuse::{Client, ROOT};
use vmm::{Options, Profile, Session};

/// Files that the guest has removed and not forgotten.
const REMOVED: usize = 800;

/// What each of them holds.
const SIZE: usize = 64 << 10;

/// Whether `fd` is ready for one of `flags`.
fn is_ready(fd: BorrowedFd<'_>, flags: PollFlags) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, flags)];
    poll(&mut fds, Some(&Timespec::default())).unwrap() > 0
}

/// Whether a process has the socket, asked without connecting to it.
fn is_held(socket: &Path) -> bool {
    let probe = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None).unwrap();
    let address = SocketAddrUnix::new(socket).unwrap();
    rustix::net::connect(&probe, &address) != Err(rustix::io::Errno::CONNREFUSED)
}

fn remove_files(fs: &mut Client<Session>) {
    let content = vec![1; SIZE];
    for number in 0..REMOVED {
        let name = CString::new(format!("file{number}")).unwrap();
        let (file, handle) = fs.create(ROOT, &name, 0o644).unwrap();
        fs.write(file.nodeid, handle, 0, &content).unwrap();
        fs.release(file.nodeid, handle).unwrap();
        fs.unlink(ROOT, &name).unwrap();
    }
}

/// What the descriptors with the highest numbers are of, the highest first.
fn highest(server: &Server, count: usize) -> Vec<String> {
    let directory = format!("/proc/{}/fd", server.pid());
    let numbers = std::fs::read_dir(&directory).unwrap();
    let mut numbers: Vec<u32> = numbers
        .map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_str()
                .unwrap()
                .parse()
                .unwrap()
        })
        .collect();
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    let highest = numbers.iter().take(count);
    let target = |number: &u32| std::fs::read_link(format!("{directory}/{number}")).unwrap();
    highest
        .map(|number| target(number).to_str().unwrap().to_owned())
        .collect()
}

#[test]
fn killed_server_releases_socket_and_locks_before_guest_files() {
    for extra in [&[][..], &["--supervise"]] {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let args = ["--log-level", "info", "--state", state.to_str().unwrap()];
        let server = Server::start(&[&args[..], extra].concat());
        let mut fs = server.session(Profile::CloudHypervisor, &Options::default());
        remove_files(&mut fs);
        // What has never got to the disk needs not be freed there.
        rustix::fs::syncfs(File::open(server.share()).unwrap()).unwrap();
        let sockets_and_state = highest(&server, 3);
        let count = |what: &str| {
            let all = sockets_and_state.iter();
            all.filter(|target| target.contains(what)).count()
        };
        assert_eq!(
            (count("socket:"), count("state")),
            (2, 1),
            "{sockets_and_state:?}"
        );

        let pid = Pid::from_raw(i32::try_from(server.pid()).unwrap()).unwrap();
        let serving = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let lock = File::open(&state).unwrap();
        let begun = Instant::now();
        server.signal(Signal::KILL);
        let mut given_up: [Option<Duration>; 4] = [None; 4];
        while given_up.iter().any(Option::is_none) {
            let connection = fs.guest().connection.stream().as_fd();
            let exclusive = FlockOperation::NonBlockingLockExclusive;
            let now = [
                is_ready(serving.as_fd(), PollFlags::IN),
                is_ready(connection, PollFlags::RDHUP),
                !is_held(&server.socket()),
                rustix::fs::flock(&lock, exclusive).is_ok(),
            ];
            let elapsed = begun.elapsed();
            for (given_up, now) in given_up.iter_mut().zip(now) {
                if now {
                    given_up.get_or_insert(elapsed);
                }
            }
            assert!(elapsed < testing::TIMEOUT, "{given_up:?}");
            std::thread::yield_now();
        }
        let [process, connection, socket, lock] = given_up.map(Option::unwrap);
        println!("{extra:?}: connection {connection:?}, socket {socket:?}, lock {lock:?}");
        println!("the process: {process:?}");
        // Where freeing the files takes no time there is nothing to see.
        if process > Duration::from_millis(500) {
            for early in [connection, socket, lock] {
                assert!(early < process / 2, "{early:?} of {process:?}");
            }
        }
    }
}
