//! What a guest gets when descriptors run short, and which of them it can't take from the server.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::ffi::CString;
use std::process::{Command, Stdio};

use testing::{Server, each_runtime, errno};
use vmm::fuse::wire::EntryOut;
use vmm::fuse::{Client, Handle, ROOT};
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
        .arg(testing::program())
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

/// Kills the serving process; another one continues.
fn kill(server: &mut Server) {
    let pid = i32::try_from(server.pid()).unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    server.wait_for("the session has resumed");
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

#[each_runtime]
fn inodes_removed_on_host_make_room_unless_open(runtime: &str) {
    let server = short(runtime, &[]);
    let mut fs = server.session(Profile::Simple, &Options::default());
    let path = |name: &CString| server.share().join(name.to_str().unwrap());
    let open = c("open", 0);
    std::fs::write(path(&open), "content").unwrap();
    let open_node = fs.lookup(ROOT, &open).unwrap().nodeid;
    let handle = fs.open(open_node, libc::O_RDONLY).unwrap();
    std::fs::remove_file(path(&open)).unwrap();

    // The guest's kernel keeps all of them in its cache, longer than there are descriptors.
    let mut removed = Vec::new();
    for number in 0..3 * LIMIT {
        let name = c("file", number);
        std::fs::write(path(&name), "content").unwrap();
        let node = fs.lookup(ROOT, &name).unwrap().nodeid;
        fs.getattr(node).unwrap();
        std::fs::remove_file(path(&name)).unwrap();
        // Still in the guest's cache, so it can be used.
        assert_eq!(fs.getattr(node).unwrap().attr.size, 7);
        removed.push(node);
    }
    fs.create(ROOT, c"new", 0o644).unwrap();
    fs.mkdir(ROOT, c"another", 0o755).unwrap();
    assert!(server.holdings().descriptors <= LIMIT - RESERVE / 2);
    let stale = removed
        .iter()
        .filter(|node| errno(fs.getattr(**node)) == Some(libc::ESTALE))
        .count();
    assert!(stale > 2 * LIMIT, "{stale} of {}", removed.len());
    assert_eq!(fs.getattr(open_node).unwrap().attr.size, 7);
    assert_eq!(fs.read(open_node, handle, 0, 100).unwrap(), b"content");
}

#[each_runtime]
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
        if !args.is_empty() {
            // Another process can resume all of it.
            kill(&mut server);
            fs.getattr(held[0].nodeid).unwrap();
            assert_eq!(errno(fs.opendir(ROOT)), ENFILE);
        }

        // A forgotten one makes room, and so does a reboot.
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

#[each_runtime]
fn removed_inodes_of_half_the_limit_leave_room(runtime: &str) {
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

#[each_runtime]
fn exhausted_descriptors_are_logged_without_blaming_guest(runtime: &str) {
    let mut server = short(runtime, &[]);
    std::fs::write(server.share().join("file"), "content").unwrap();
    let mut fs = server.session(Profile::Simple, &many_regions());
    let file = fs.lookup(ROOT, c"file").unwrap();
    // Fewer than are open: the limit of the running server is lowered.
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

/// Makes files, opens and removes them; answers those that are open then.
fn hold_unlinked_files(fs: &mut Client<Session>, count: usize) -> Vec<(EntryOut, Handle)> {
    let make = |number| {
        let name = c("unlinked", number);
        let (made, handle) = fs.create(ROOT, &name, 0o644).unwrap();
        fs.unlink(ROOT, &name).unwrap();
        (made, handle)
    };
    (0..count).map(make).collect()
}

#[each_runtime]
fn unlinked_open_files_of_half_the_limit_leave_room(runtime: &str) {
    let mut server = short(runtime, &["--supervise"]);
    std::fs::write(server.share().join("file"), "content").unwrap();
    let mut fs = server.session(Profile::Simple, &many_regions());
    let before = server.holdings().descriptors;
    let held = hold_unlinked_files(&mut fs, LIMIT / 2);
    use_as_usual(&mut fs);
    use_unlinked(&mut fs, &held, 3);
    kill(&mut server);
    use_unlinked(&mut fs, &held, 4);

    // Whoever has one open alone closes it, and the guest still holds the inode.
    for (one, handle) in &held {
        let again = fs.open(one.nodeid, libc::O_RDONLY).unwrap();
        fs.release(one.nodeid, *handle).unwrap();
        assert_eq!(fs.read(one.nodeid, again, 0, 10).unwrap().len(), 4);
        fs.release(one.nodeid, again).unwrap();
        assert_eq!(fs.getattr(one.nodeid).unwrap().attr.nlink, 0);
        let again = fs.open(one.nodeid, libc::O_RDWR).unwrap();
        fs.release(one.nodeid, again).unwrap();
    }
    // A reboot gives all of it back.
    reboot(&mut fs);
    let after = server.holdings().descriptors;
    assert!(after <= before + 4, "{before} before, {after} after");
}

/// Uses files without a name, by handle and by node, which nothing else can reach.
fn use_unlinked(fs: &mut Client<Session>, held: &[(EntryOut, Handle)], len: usize) {
    for (number, (one, handle)) in held.iter().enumerate() {
        let data = vec![number as u8; len];
        fs.write(one.nodeid, *handle, 0, &data).unwrap();
        assert_eq!(fs.getattr(one.nodeid).unwrap().attr.size, len as u64);
        fs.chmod(one.nodeid, 0o600).unwrap();
        // As through /proc in the guest.
        let again = fs.open(one.nodeid, libc::O_RDONLY).unwrap();
        assert_eq!(fs.read(one.nodeid, again, 0, 10).unwrap(), data);
        fs.release(one.nodeid, again).unwrap();
    }
}
