//! What a guest gets, and what it can't take from the server, when descriptors run short.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod support;

use std::ffi::CString;
use std::process::{Command, Stdio};

use support::Server;
use vmm::fuse::wire::EntryOut;
use vmm::fuse::{Client, FuseError, ROOT};
use vmm::memory::Region;
use vmm::{Options, Profile, Session};

/// Descriptors that the server may have open.
const LIMIT: usize = 256;

/// How many of them no guest may take: a quarter at least.
const RESERVE: usize = LIMIT / 4;

const ENFILE: Option<i32> = Some(libc::ENFILE);

fn c(name: &str, number: usize) -> CString {
    CString::new(format!("{name}{number}")).unwrap()
}

/// A server with few descriptors.
fn short(runtime: &str, args: &[&str]) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    std::fs::create_dir(&share).unwrap();
    let mut command = Command::new("prlimit");
    command
        .arg(format!("--nofile={LIMIT}:{LIMIT}"))
        .arg(env!("CARGO_BIN_EXE_ringfsd"))
        .env_remove("RINGFSD_LOG")
        .stdin(Stdio::null())
        .arg("--socket")
        .arg(dir.path().join("socket"))
        .arg("--shared-dir")
        .arg(share)
        .args(["--log-level", "info", "--workers", "2"])
        .args(["--runtime", runtime])
        .args(args);
    let mut server = Server::spawn(command, dir);
    server.wait_until_it_listens();
    server
}

/// A guest whose memory has ten regions.
fn many_regions() -> Options {
    let mut regions = vec![Region::new(0, 16 << 20), Region::new(4 << 30, 128 << 20)];
    regions.extend((0..8).map(|n| Region::new((8 + n) << 30, 2 << 20)));
    Options::default().memory(&regions)
}

fn errno<T>(result: Result<T, FuseError>) -> Option<i32> {
    result.err().map(|error| error.errno().unwrap())
}

/// Makes directories and removes them, and keeps the inodes, until the server refuses: answers how
/// many there are, and the last one, which was not removed.
fn hold_removed_directories(
    server: &Server,
    fs: &mut Client<Session>,
    most: usize,
) -> (Vec<EntryOut>, Option<CString>) {
    let mut held = Vec::new();
    for number in 0..most {
        let name = c("removed", number);
        let made = match fs.mkdir(ROOT, &name, 0o755) {
            Ok(made) => made,
            Err(error) => {
                assert_eq!(error.errno(), ENFILE);
                assert!(!server.share().join(name.to_str().unwrap()).exists());
                return (held, Some(name));
            }
        };
        if let Err(error) = fs.rmdir(ROOT, &name) {
            assert_eq!(error.errno(), ENFILE);
            assert!(server.share().join(name.to_str().unwrap()).exists());
            return (held, Some(name));
        }
        held.push(made);
    }
    (held, None)
}

/// Starts the guest anew as a reboot does: the rings are stopped, the memory is handed over again.
fn reboot(fs: &mut Client<Session>) {
    let guest = fs.guest();
    guest.stop().unwrap();
    for queue in &mut guest.queues {
        queue.reset();
    }
    let bases = vec![0; guest.queues.len()];
    guest.restart(&bases).unwrap();
    fs.init().unwrap();
}

fn removed_directories_leave_the_server_its_reserve(runtime: &str) {
    for args in [&[][..], &["--supervise"]] {
        let mut server = short(runtime, args);
        std::fs::write(server.share().join("file"), "content").unwrap();
        let mut fs = server.session(Profile::Simple, &many_regions());
        let before = server.holdings().descriptors;
        let (held, refused) = hold_removed_directories(&server, &mut fs, 2 * LIMIT);
        let refused = refused.expect("there is a bound");
        assert!(held.len() >= LIMIT / 2, "{}", held.len());
        let taken = server.holdings().descriptors;
        assert!(
            taken <= LIMIT - RESERVE / 2,
            "{before} + {} > {taken}",
            held.len()
        );
        server.wait_for("raise --rlimit-nofile");

        // Whatever would need one more is refused before it takes effect.
        for number in 0..10 {
            let name = c("new", number);
            let path = server.share().join(name.to_str().unwrap());
            assert_eq!(errno(fs.create(ROOT, &name, 0o644)), ENFILE);
            assert!(!path.exists());
            std::fs::write(&path, "").unwrap();
            fs.lookup(ROOT, &name).unwrap();
            let other = c("other", number);
            match fs.rename(ROOT, &refused, ROOT, &other) {
                Ok(()) => fs.rename(ROOT, &other, ROOT, &refused).unwrap(),
                Err(error) => assert_eq!(error.errno(), ENFILE),
            }
            assert_eq!(errno(fs.unlink(ROOT, &name)), ENFILE);
            assert!(path.exists());
        }
        assert_eq!(errno(fs.opendir(ROOT)), ENFILE);
        assert_eq!(errno(fs.tmpfile(ROOT, 0o600)), ENFILE);
        let file = fs.lookup(ROOT, c"file").unwrap();
        assert_eq!(errno(fs.open(file.nodeid, libc::O_RDONLY)), ENFILE);
        fs.getattr(held[0].nodeid).unwrap();

        // One that is given back makes room, and so does a reboot.
        fs.forget(held[0].nodeid, 1).unwrap();
        let bases = fs.guest().stop().unwrap();
        fs.guest().restart(&bases).unwrap();
        let (made, _) = fs.create(ROOT, c"made", 0o644).unwrap();
        fs.getattr(made.nodeid).unwrap();
        reboot(&mut fs);
        let file = fs.lookup(ROOT, c"file").unwrap();
        let handle = fs.open(file.nodeid, libc::O_RDONLY).unwrap();
        assert_eq!(fs.read(file.nodeid, handle, 0, 100).unwrap(), b"content");
    }
}

fn half_the_limit_in_removed_inodes_hinders_nothing(runtime: &str) {
    let server = short(runtime, &[]);
    std::fs::write(server.share().join("file"), "content").unwrap();
    let mut fs = server.session(Profile::Simple, &many_regions());
    let (held, refused) = hold_removed_directories(&server, &mut fs, LIMIT / 2);
    assert_eq!((held.len(), refused), (LIMIT / 2, None));
    use_as_usual(&mut fs);
    for one in held {
        fs.getattr(one.nodeid).unwrap();
    }
}

/// What any program may do that has nothing to do with the removed inodes.
fn use_as_usual(fs: &mut Client<Session>) {
    for number in 0..50 {
        let name = c("new", number);
        let (made, handle) = fs.create(ROOT, &name, 0o644).unwrap();
        fs.write(made.nodeid, handle, 0, b"data").unwrap();
        fs.release(made.nodeid, handle).unwrap();
        assert_eq!(fs.lookup(ROOT, &name).unwrap().nodeid, made.nodeid);
        fs.mkdir(ROOT, &c("dir", number), 0o755).unwrap();
        fs.symlink(ROOT, &c("link", number), c"to").unwrap();
        fs.mknod(ROOT, &c("node", number), 0o10_0644, 0).unwrap();
        fs.link(made.nodeid, ROOT, &c("linked", number)).unwrap();
        fs.rename(ROOT, &name, ROOT, &c("renamed", number)).unwrap();
        let file = fs.lookup(ROOT, c"file").unwrap();
        let handle = fs.open(file.nodeid, libc::O_RDONLY).unwrap();
        assert_eq!(fs.read(file.nodeid, handle, 0, 100).unwrap(), b"content");
        fs.release(file.nodeid, handle).unwrap();
    }
}

fn a_server_without_descriptors_says_so_and_blames_nobody(runtime: &str) {
    let mut server = short(runtime, &[]);
    std::fs::write(server.share().join("file"), "content").unwrap();
    let mut fs = server.session(Profile::Simple, &many_regions());
    let file = fs.lookup(ROOT, c"file").unwrap();
    // Fewer than are open: somebody lowers the limit of the running server.
    let lower = |limit: usize| {
        let status = Command::new("prlimit")
            .args(["--pid", &server.pid().to_string()])
            .arg(format!("--nofile={limit}:"))
            .status();
        assert!(status.unwrap().success());
    };
    lower(8);
    assert_eq!(errno(fs.open(file.nodeid, libc::O_RDONLY)), ENFILE);
    assert_eq!(errno(fs.create(ROOT, c"new", 0o644)), ENFILE);
    assert!(!server.share().join("new").exists());
    server.wait_for("raise --rlimit-nofile");
    let guest = fs.guest();
    guest.stop().unwrap();
    assert!(guest.restart(&[0, 0]).is_err());
    let line = server.wait_for("the session is ended");
    assert!(
        line.contains("no file descriptor left") && line.contains("--rlimit-nofile"),
        "{line}"
    );
}

on_both_runtimes!(
    a_server_without_descriptors_says_so_and_blames_nobody,
    half_the_limit_in_removed_inodes_hinders_nothing,
    removed_directories_leave_the_server_its_reserve,
);
