//! A server that is killed or replaced in the middle of a session: the VMM's connection, its memory
//! and its rings stay in use.
//!
//! Each method of starting the server is tested, as root and as an ordinary user.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use testing::{Server, USER};
use vmm::fuse::wire::FileLock;
use vmm::fuse::{Client, ROOT};
use vmm::{Options, Profile, Session};

/// What a process logs that takes over.
const AGAIN: &str = "serving again";

/// All setups that the user of the tests can start.
fn setups() -> Vec<(&'static str, Option<u32>)> {
    if rustix::process::geteuid().is_root() {
        vec![
            ("namespace", None),
            ("chroot", None),
            ("none", None),
            ("namespace", Some(USER)),
            ("none", Some(USER)),
        ]
    } else {
        println!("SKIPPED: what root does needs root");
        vec![("namespace", None), ("none", None)]
    }
}

fn start(setup: (&str, Option<u32>), args: &[&str]) -> Server {
    println!("{setup:?}");
    let args = [&["--supervise", "--sandbox", setup.0], args].concat();
    Server::start_as(setup.1, &args)
}

fn session(server: &Server, profile: Profile) -> Client<Session> {
    server.session(profile, &Options::default())
}

fn kill(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Kills the process that serves, and waits until another does.
fn crash(server: &mut Server) {
    let before = server.pid();
    kill(before, Signal::KILL);
    server.wait_for(AGAIN);
    assert_ne!(server.pid(), before);
}

/// Whether requests are answered on the connection that there has been, and mean what they meant.
fn goes_on(fs: &mut Client<Session>, server: &Server, round: u32) {
    let name = std::ffi::CString::new(format!("made{round}")).unwrap();
    let (file, handle) = fs.create(ROOT, &name, 0o644).unwrap();
    fs.write(file.nodeid, handle, 0, b"written").unwrap();
    let path = server.share().join(format!("made{round}"));
    assert_eq!(std::fs::read(path).unwrap(), b"written");
    fs.release(file.nodeid, handle).unwrap();
    fs.forget(file.nodeid, 1).unwrap();
}

/// What a guest holds.
struct GuestState {
    file: u64,
    handle: vmm::fuse::Handle,
    gone: u64,
    gone_handle: vmm::fuse::Handle,
    dir: u64,
    listing: vmm::fuse::Handle,
}

impl GuestState {
    fn set_up(fs: &mut Client<Session>) -> Self {
        let (file, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
        fs.write(file.nodeid, handle, 0, b"before").unwrap();
        let (gone, gone_handle) = fs.create(ROOT, c"gone", 0o644).unwrap();
        fs.write(gone.nodeid, gone_handle, 0, b"without a name")
            .unwrap();
        fs.unlink(ROOT, c"gone").unwrap();
        let dir = fs.mkdir(ROOT, c"dir", 0o755).unwrap().nodeid;
        let listing = fs.opendir(dir).unwrap();
        Self {
            file: file.nodeid,
            handle,
            gone: gone.nodeid,
            gone_handle,
            dir,
            listing,
        }
    }

    /// Uses all of it, together with what is looked up anew.
    fn check(&self, fs: &mut Client<Session>, server: &Server) {
        assert_eq!(fs.read(self.file, self.handle, 0, 6).unwrap(), b"before");
        fs.write(self.file, self.handle, 6, b" and after").unwrap();
        let path = server.share().join("file");
        assert_eq!(std::fs::read(&path).unwrap(), b"before and after");
        let read = fs.read(self.gone, self.gone_handle, 0, 100).unwrap();
        assert_eq!(read, b"without a name");
        // The same mounts: names move between what was there before and what comes now.
        let new = fs.mkdir(ROOT, c"new", 0o755).unwrap().nodeid;
        fs.rename(ROOT, c"file", new, c"moved").unwrap();
        fs.rename(new, c"moved", self.dir, c"moved").unwrap();
        let names = fs.readdir_all(self.dir, self.listing).unwrap();
        assert!(names.iter().any(|entry| entry.name == "moved"), "{names:?}");
        fs.link(self.file, new, c"link").unwrap();
        fs.unlink(new, c"link").unwrap();
        fs.rename(self.dir, c"moved", ROOT, c"file").unwrap();
        fs.rmdir(ROOT, c"new").unwrap();
        fs.forget(self.file, 1).unwrap();
        fs.forget(new, 1).unwrap();
        let again = fs.lookup(ROOT, c"file").unwrap();
        assert_eq!(again.nodeid, self.file);
    }
}

#[test]
fn guest_state_survives_kill() {
    for setup in setups() {
        let mut server = start(setup, &[]);
        let mut fs = session(&server, Profile::Qemu);
        let guest = GuestState::set_up(&mut fs);
        for _ in 0..2 {
            crash(&mut server);
            guest.check(&mut fs, &server);
            let output = upgrade(testing::program(), server.guardian());
            assert!(output.status.success(), "{}", said(&output));
            server.wait_for("upgraded to");
            guest.check(&mut fs, &server);
        }
    }
}

/// A guest that makes, writes, renames, links and removes, each of which fails if it is done twice or
/// not at all.
fn work(fs: &mut Client<Session>, share: &Path, round: u32) {
    let name = |kind: &str| std::ffi::CString::new(format!("{kind}{round}")).unwrap();
    let (made, handle) = fs
        .create_with(ROOT, &name("made"), 0o644, libc::O_RDWR | libc::O_EXCL)
        .unwrap();
    let node = made.nodeid;
    fs.write(node, handle, 0, round.to_string().as_bytes())
        .unwrap();
    fs.rename(ROOT, &name("made"), ROOT, &name("renamed"))
        .unwrap();
    fs.link(node, ROOT, &name("linked")).unwrap();
    let dir = fs.mkdir(ROOT, &name("dir"), 0o755).unwrap();
    fs.symlink(dir.nodeid, c"link", c"target").unwrap();
    fs.unlink(dir.nodeid, c"link").unwrap();
    fs.rmdir(ROOT, &name("dir")).unwrap();
    fs.release(node, handle).unwrap();
    assert_eq!(fs.getattr(node).unwrap().attr.nlink, 2);
    fs.unlink(ROOT, &name("linked")).unwrap();
    let path = share.join(format!("renamed{round}"));
    let there = std::fs::read_to_string(path).unwrap();
    assert_eq!(there, round.to_string());
}

#[test]
fn repeated_kills_lose_and_repeat_no_request() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let kills = std::env::var("RINGFSD_KILLS").map_or(20, |text| text.parse().unwrap());
    let mut server = start(("namespace", None), &[]);
    let mut fs = session(&server, Profile::Qemu);
    let over = AtomicBool::new(false);
    let guardian = server.guardian();
    let share = server.share();
    let mut round = 0;
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let mut random = 1_u32;
            for _ in 0..kills {
                let before = testing::child_of(guardian).unwrap();
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                std::thread::sleep(std::time::Duration::from_micros(
                    20_000 + u64::from(random >> 18),
                ));
                kill(before, Signal::KILL);
                server.wait_for(AGAIN);
            }
            over.store(true, Ordering::Relaxed);
        });
        while !over.load(Ordering::Relaxed) && !killer.is_finished() {
            round += 1;
            work(&mut fs, &share, round);
        }
    });
    let names = std::fs::read_dir(&share).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), round as usize, "{names:?}");
    println!("{kills} kills, {round} rounds");
}

#[test]
fn session_resumes_after_kill() {
    for setup in setups() {
        let mut server = start(setup, &[]);
        let mut fs = session(&server, Profile::Simple);
        goes_on(&mut fs, &server, 0);
        for round in 1..4 {
            crash(&mut server);
            goes_on(&mut fs, &server, round);
        }
        // The VMM goes, and another one comes.
        drop(fs);
        server.wait_until_it_listens();
        let mut fs = session(&server, Profile::Simple);
        goes_on(&mut fs, &server, 4);
        server.signal(Signal::TERM);
        assert!(server.wait().success());
        assert!(!server.socket().exists());
    }
}

#[test]
fn wait_for_a_lock_has_its_limit_in_the_next_process() {
    let all = FileLock {
        start: 0,
        end: i64::MAX.cast_unsigned(),
        r#type: libc::F_WRLCK.cast_unsigned(),
        pid: 1,
    };
    for (limit, upgraded) in [(2, false), (3600, true)] {
        let option = format!("--lock-wait-limit={limit}");
        let mut server = start(("namespace", None), &["--posix-locks", &option]);
        let mut fs = session(&server, Profile::Qemu);
        let (file, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
        fs.setlk(file.nodeid, handle, 1, all).unwrap();
        let began = std::time::Instant::now();
        let waiting = fs.submit_setlkw(file.nodeid, handle, 2, all).unwrap();
        // It has been taken by the time that what came after it is answered.
        fs.getattr(ROOT).unwrap();
        if upgraded {
            // An upgrade ends all waits.
            let program = testing::program();
            assert!(upgrade(program, server.guardian()).status.success());
            server.wait_for("upgraded to");
        } else {
            crash(&mut server);
        }
        let refused = fs.collect(waiting).unwrap_err();
        assert_eq!(refused.errno(), Some(libc::EAGAIN));
        assert!(upgraded || began.elapsed().as_secs() >= limit);
        // One that is free by then is had.
        if upgraded {
            let waiting = fs.submit_setlkw(file.nodeid, handle, 2, all).unwrap();
            fs.getattr(ROOT).unwrap();
            crash(&mut server);
            let unlock = FileLock {
                r#type: libc::F_UNLCK.cast_unsigned(),
                ..all
            };
            fs.setlk(file.nodeid, handle, 1, unlock).unwrap();
            fs.collect(waiting).unwrap();
        }
    }
}

#[test]
fn session_of_each_front_end_resumes_after_kill() {
    for profile in Profile::ALL {
        let mut server = start(("namespace", None), &["--request-queues", "2"]);
        let mut fs = session(&server, profile);
        crash(&mut server);
        println!("{profile:?}");
        goes_on(&mut fs, &server, 1);
    }
}

#[test]
fn killed_server_without_session_listens_again() {
    for setup in setups() {
        let mut server = start(setup, &[]);
        crash(&mut server);
        let mut fs = session(&server, Profile::Simple);
        goes_on(&mut fs, &server, 1);
    }
}

#[test]
fn next_process_closes_descriptors_of_killed_one() {
    let mut server = start(("namespace", None), &[]);
    let mut fs = session(&server, Profile::Simple);
    crash(&mut server);
    goes_on(&mut fs, &server, 1);
    crash(&mut server);
    let after = server.holdings();
    for _ in 0..5 {
        goes_on(&mut fs, &server, 2);
        crash(&mut server);
    }
    assert_eq!(server.holdings(), after);
}

#[test]
fn server_that_keeps_crashing_gives_up() {
    let mut server = start(("none", None), &[]);
    let mut dead = 0;
    let end = std::time::Instant::now() + testing::TIMEOUT;
    // As soon as there is one it is killed, mostly before it serves.
    while !server.has_ended() {
        if std::time::Instant::now() > end {
            println!("SKIPPED: {dead} were killed, most of them too late: the machine is too busy");
            return;
        }
        if let Some(serving) = server.child() {
            let pid = Pid::from_raw(i32::try_from(serving).unwrap()).unwrap();
            dead += u32::from(kill_process(pid, Signal::KILL).is_ok());
        }
    }
    let status = server.wait();
    assert_eq!(status.signal(), Some(libc::SIGKILL));
    let said = server.said().iter();
    assert!(
        said.clone().any(|line| line.contains("giving up")),
        "{dead}"
    );
    assert!(!server.socket().exists());
}

#[test]
fn start_error_and_requested_end_are_no_crash() {
    let dir = tempfile::tempdir().unwrap();
    let refused = testing::output(&[
        "--supervise",
        "--socket",
        dir.path().join("s").to_str().unwrap(),
        "--shared-dir",
        "/nowhere",
    ]);
    assert_eq!(refused.status.code(), Some(1));

    let mut server = start(("namespace", None), &["--once"]);
    let mut fs = session(&server, Profile::Simple);
    crash(&mut server);
    goes_on(&mut fs, &server, 1);
    drop(fs);
    assert!(server.wait().success());
}

#[test]
fn neither_process_outlives_the_guardian() {
    for setup in setups() {
        let mut server = start(setup, &[]);
        let mut fs = session(&server, Profile::Simple);
        crash(&mut server);
        goes_on(&mut fs, &server, 1);
        kill(server.guardian(), Signal::KILL);
        // The end of standard error is the end of both.
        assert_eq!(server.wait().signal(), Some(libc::SIGKILL));
    }
}

/// `ringfsd upgrade`, run by a user who may.
fn upgrade(program: &Path, pid: u32) -> Output {
    let mut command = Command::new(program);
    let output = command.args(["upgrade", "--pid", &pid.to_string()]);
    output.output().unwrap()
}

fn said(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

#[test]
fn session_resumes_after_upgrade() {
    for setup in setups() {
        let mut server = start(setup, &[]);
        let mut fs = session(&server, Profile::Qemu);
        for round in 0..3 {
            let guardian = server.guardian();
            let output = upgrade(testing::program(), guardian);
            println!("{}", said(&output));
            assert!(output.status.success(), "{setup:?}: {}", said(&output));
            assert!(said(&output).contains("upgraded to"), "{}", said(&output));
            server.wait_for("upgraded to");
            goes_on(&mut fs, &server, round);
            // It is the new program's processes that are restarted.
            crash(&mut server);
            goes_on(&mut fs, &server, round + 10);
        }
        server.signal(Signal::TERM);
        assert!(server.wait().success());
        assert!(!server.socket().exists());
    }
}

#[test]
fn hangup_upgrades_to_program_at_its_path() {
    for setup in setups() {
        let mut server = start(setup, &[]);
        let mut fs = session(&server, Profile::Simple);
        server.signal(Signal::HUP);
        server.wait_for("upgraded to");
        goes_on(&mut fs, &server, 0);
    }
}

#[test]
fn hangup_before_the_guardian_runs_again_upgrades_too() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: an ordinary user's guardian has another child first, which maps ids");
        return;
    }
    for sandbox in ["namespace", "chroot", "none"] {
        println!("{sandbox}");
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("share");
        std::fs::create_dir(&share).unwrap();
        let mut command = testing::command();
        command.arg("--socket").arg(dir.path().join("socket"));
        command.arg("--shared-dir").arg(&share);
        command.args(["--supervise", "--sandbox", sandbox]);
        let mut server = Server::spawn(command, dir);
        // It doesn't run from the moment it has made the serving process, as on a busy machine.
        while server.child().is_none() {
            std::thread::yield_now();
        }
        server.signal(Signal::STOP);
        server.wait_until_it_listens();
        server.signal(Signal::HUP);
        server.signal(Signal::CONT);
        server.wait_for("upgraded to");
        let mut fs = session(&server, Profile::Simple);
        goes_on(&mut fs, &server, 0);
    }
}

/// Programs that are none, made to ask for an upgrade as `ringfsd upgrade` does.
#[test]
fn incapable_program_fails_upgrade_and_session_continues() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let text = dir.path().join("text");
    std::fs::write(&text, "no program\n").unwrap();
    std::fs::set_permissions(&text, PermissionsExt::from_mode(0o755)).unwrap();
    let programs = [Path::new("/bin/false"), Path::new("/bin/true"), &text];
    for (round, setup) in setups().into_iter().enumerate() {
        // All of them once, one of them in each setup.
        let programs = if round == 0 {
            &programs[..]
        } else {
            &programs[2..]
        };
        for program in programs {
            // It is found by the path that the server was started by.
            let copy = dir.path().join("ringfsd");
            testing::copy_program(testing::program(), &copy);
            let mut server =
                Server::start_program(&copy, setup.1, &["--supervise", "--sandbox", setup.0]);
            let mut fs = session(&server, Profile::Simple);
            let serving = server.pid();
            std::fs::remove_file(&copy).unwrap();
            testing::copy_program(program, &copy);
            server.signal(Signal::HUP);
            server.wait_for("not upgraded");
            assert_eq!(server.pid(), serving);
            fs.getattr(ROOT).unwrap();
        }
    }
}

/// The new program's serving process, if it has started. The process of the upgrade's check is a
/// child too, and is not meant.
fn new_serving_process(guardian: u32) -> Option<u32> {
    let child = testing::child_of(guardian)?;
    let environment = std::fs::read(format!("/proc/{child}/environ")).ok()?;
    let name = b"RINGFSD_HAND_OVER=";
    environment
        .windows(name.len())
        .any(|part| part == name)
        .then_some(child)
}

#[test]
fn program_that_fails_to_serve_is_rolled_back() {
    // Mostly it is quicker than who would kill it before it serves.
    for _ in 0..50 {
        let mut server = start(("namespace", None), &[]);
        let mut fs = session(&server, Profile::Qemu);
        let guest = GuestState::set_up(&mut fs);
        let guardian = server.guardian();
        let upgraded = std::thread::scope(|scope| {
            let upgrade = scope.spawn(|| upgrade(testing::program(), guardian));
            while !upgrade.is_finished() {
                if let Some(serving) = new_serving_process(guardian) {
                    kill(serving, Signal::KILL);
                    break;
                }
            }
            upgrade.join().unwrap()
        });
        if upgraded.status.success() {
            continue;
        }
        assert!(said(&upgraded).contains("the previous program keeps running"));
        server.wait_for("not upgraded");
        guest.check(&mut fs, &server);
        crash(&mut server);
        guest.check(&mut fs, &server);
        let upgraded = upgrade(testing::program(), guardian);
        assert!(upgraded.status.success(), "{}", said(&upgraded));
        guest.check(&mut fs, &server);
        return;
    }
    panic!("it was always quicker");
}

#[test]
fn upgrade_of_process_that_is_no_supervisor_is_refused() {
    let server = Server::start(&[]);
    let output = upgrade(testing::program(), server.guardian());
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("--supervise"), "{}", said(&output));
    session(&server, Profile::Simple).getattr(ROOT).unwrap();

    let server = start(("namespace", None), &[]);
    let output = upgrade(testing::program(), server.pid());
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("parent"), "{}", said(&output));
}

/// The socket of a program that asks for an upgrade.
fn asker(value: &str) -> SocketAddr {
    SocketAddr::from_abstract_name(format!("ringfsd-upgrade-{value}")).unwrap()
}

#[test]
fn program_of_another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: needs root");
        return;
    }
    let mut server = start(("namespace", None), &[]);
    let mut fs = session(&server, Profile::Qemu);
    let value = 0x7e57_0000_0000_0000 | usize::try_from(server.guardian()).unwrap();
    let listener = std::thread::spawn(move || {
        // This thread's alone. The user at the time of `listen` is what counts.
        let user = rustix::process::Uid::from_raw(USER);
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        UnixListener::bind_addr(&asker(&format!("{value:016x}"))).unwrap()
    });
    let listener = listener.join().unwrap();
    let guardian = i32::try_from(server.guardian()).unwrap();
    ringfsd::internals::recovery::ask_for_upgrade(guardian, value).unwrap();
    drop(listener.accept().unwrap());
    let line = server.wait_for("not upgraded");
    assert!(line.contains("another process listens"), "{line}");
    goes_on(&mut fs, &server, 0);
}

#[test]
fn upgrade_result_comes_only_from_supervisor() {
    let mut server = start(("none", None), &[]);
    let mut fs = session(&server, Profile::Qemu);
    // Until others have had their say.
    kill(server.guardian(), Signal::STOP);
    let pid = server.guardian().to_string();
    let mut command = Command::new(testing::program());
    let command = command.args(["upgrade", "--pid", &pid]);
    let asking = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let asking = asking.spawn().unwrap();
    let mut sockets = Vec::new();
    while sockets.is_empty() {
        let names = std::fs::read_to_string("/proc/net/unix").unwrap();
        let values = names
            .lines()
            .filter_map(|line| line.split_once("@ringfsd-upgrade-"));
        let values = values.filter(|(_, value)| !value.starts_with("7e57"));
        // Other tests' are among them, and do without this one.
        sockets = values
            .filter_map(|(_, value)| UnixStream::connect_addr(&asker(value)).ok())
            .collect();
    }
    for socket in &mut sockets {
        let _ = writeln!(socket, "upgraded to nonsense");
    }
    kill(server.guardian(), Signal::CONT);
    let output = asking.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(!said(&output).contains("nonsense"), "{}", said(&output));
    server.wait_for("upgraded to");
    goes_on(&mut fs, &server, 0);
}
