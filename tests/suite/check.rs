//! `ringfsd check`: its verdict is that of really starting the server, with the same reason.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    unsafe_code,
    reason = "a test fails by panicking, and a program is launched behind a filter of system calls"
)]

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use fuse_backend_rs::api::server::Server as FuseServer;
use fuse_backend_rs::passthrough::{Config, PassthroughFs};
use fuse_backend_rs::transport::FuseSession;
use serde_json::Value;
use testing::{Server, USER};

use super::lifecycle::forbid_io_uring;

fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        println!("SKIPPED: needs root");
    }
    is_root
}

/// The program, or what runs it, in a directory that has a share.
type Launch<'a> = &'a dyn Fn(&Path) -> Command;

/// The program run by `prefix`.
fn behind(prefix: &[&str]) -> Command {
    let mut command = Command::new(prefix[0]);
    command.args(&prefix[1..]).arg(testing::program());
    command.env_remove("RINGFSD_LOG");
    command
}

/// A directory with a share, both of which belong to `user`.
fn scene(user: Option<u32>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    std::fs::create_dir(&share).unwrap();
    std::fs::write(share.join("file"), "content").unwrap();
    for path in [dir.path(), &share, &share.join("file")] {
        std::os::unix::fs::chown(path, user, user).unwrap();
    }
    dir
}

/// Names, contents and times of what is in a directory.
fn contents(dir: &Path) -> BTreeMap<String, (Vec<u8>, std::time::SystemTime)> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let data = match meta.is_file() {
            true => std::fs::read(&path).unwrap(),
            false => Vec::new(),
        };
        let name = path.display().to_string();
        found.insert(name, (data, meta.modified().unwrap()));
        if meta.is_dir() {
            found.extend(contents(&path));
        }
    }
    found
}

/// The arguments of a server in `dir`.
fn arguments(dir: &Path, args: &[&str]) -> Vec<String> {
    let place = |text: &str| text.replace("DIR", dir.to_str().unwrap());
    ["--socket=DIR/socket", "--shared-dir=DIR/share"]
        .iter()
        .chain(args)
        .map(|argument| place(argument))
        .collect()
}

fn report(output: &std::process::Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Checks a command line, which changes nothing; then starts the server with it, and compares.
fn agrees(dir: tempfile::TempDir, launch: Launch<'_>, args: &[&str]) -> Value {
    let args = arguments(dir.path(), args);
    let before = contents(dir.path());
    let mut check = launch(dir.path());
    let output = check
        .args(["check", "--json"])
        .args(&args)
        .output()
        .unwrap();
    assert!(contents(dir.path()) == before, "it changed something");
    let report = report(&output);
    let would_start = report["would_start"].as_bool().unwrap();
    assert_eq!(
        output.status.code(),
        Some(i32::from(!would_start)),
        "{report:#}"
    );
    let mut command = launch(dir.path());
    command.args(&args);
    let mut server = Server::spawn(command, dir);
    if would_start {
        server.wait_until_it_listens();
    } else {
        server.wait_for(report["failure"].as_str().unwrap());
        assert_eq!(server.wait().code(), Some(1));
    }
    report
}

fn would(report: &Value) -> bool {
    report["would_start"].as_bool().unwrap()
}

/// What the report says of something that was tested.
fn finding<'a>(report: &'a Value, name: &str) -> &'a Value {
    let of = |findings: &'a Value| findings.as_array().unwrap().iter();
    let mut all = of(&report["host"]).chain(of(&report["directories"][0]["findings"]));
    all.find(|finding| finding["name"] == name)
        .unwrap_or_else(|| panic!("no {name} in {report:#}"))
}

fn support<'a>(report: &'a Value, name: &str) -> &'a str {
    finding(report, name)["support"].as_str().unwrap()
}

fn own(_: &Path) -> Command {
    testing::command()
}

#[test]
fn verdict_for_root_is_right() {
    if !is_root() {
        return;
    }
    for sandbox in ["namespace", "chroot", "none"] {
        let report = agrees(scene(None), &own, &["--sandbox", sandbox]);
        assert!(would(&report), "{report:#}");
        assert_eq!(support(&report, "namespace sandbox"), "yes");
        assert_eq!(support(&report, "access"), "yes");
    }
    assert!(would(&agrees(scene(None), &own, &["--supervise"])));
    assert!(would(&agrees(
        scene(None),
        &own,
        &["--state=DIR/state", "--pid-file=DIR/pid"]
    )));
}

/// Copies the program to where an ordinary user gets at it.
fn copy_for_user(dir: &Path) -> PathBuf {
    drop(testing::command_as(Some(USER), dir));
    dir.join("ringfsd")
}

fn as_user(program: &Path) -> Command {
    let user = USER.to_string();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]);
    command.arg(program).env_remove("RINGFSD_LOG");
    command
}

#[test]
fn verdict_for_ordinary_user_is_right() {
    if !is_root() {
        return;
    }
    let check = |args: &[&str]| {
        let dir = scene(Some(USER));
        let program = copy_for_user(dir.path());
        agrees(dir, &move |_: &Path| as_user(&program), args)
    };
    let report = check(&[]);
    assert_eq!(
        support(&report, "namespace sandbox") == "yes",
        would(&report)
    );
    let report = check(&["--sandbox=none"]);
    assert!(would(&report), "{report:#}");
    assert_eq!(support(&report, "chroot sandbox"), "no");
    assert_eq!(support(&report, "file handles"), "no");
    assert_eq!(support(&report, "trusted.* attributes"), "no");
    let report = check(&["--sandbox=none", "--inode-file-handles=mandatory"]);
    assert!(!would(&report), "{report:#}");
    assert!(!would(&check(&["--sandbox=chroot"])));
}

#[test]
fn verdict_without_capabilities_is_right() {
    if !is_root() {
        return;
    }
    let without = |which: &'static str| {
        move |_: &Path| behind(&["setpriv", "--bounding-set", which, "--inh-caps=-all"])
    };
    let report = agrees(scene(None), &without("-sys_admin"), &[]);
    assert!(!would(&report), "{report:#}");
    assert!(
        report["failure"]
            .as_str()
            .unwrap()
            .contains("--sandbox chroot")
    );
    let report = agrees(scene(None), &without("-sys_admin"), &["--sandbox=chroot"]);
    assert!(would(&report), "{report:#}");
    assert_eq!(support(&report, "namespace sandbox"), "no");
    assert_eq!(support(&report, "chroot sandbox"), "yes");
    let report = agrees(scene(None), &without("-all"), &["--sandbox=chroot"]);
    assert!(!would(&report), "{report:#}");
    assert!(would(&agrees(
        scene(None),
        &without("-all"),
        &["--sandbox=none"]
    )));
}

/// The kernel's answer where the sysctl forbids io_uring, and the sysctl with that value, for one
/// process tree: the real sysctl is that of the whole host.
fn without_io_uring(dir: &Path) -> Command {
    let value = dir.join("../").join(format!(
        "{}-sysctl",
        dir.file_name().unwrap().to_str().unwrap()
    ));
    std::fs::write(&value, "2\n").unwrap();
    let script = "mount --bind \"$1\" /proc/sys/kernel/io_uring_disabled && rm \"$1\" && shift && \
                  exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]);
    command.arg(&value).arg(testing::program());
    command.env_remove("RINGFSD_LOG");
    // SAFETY: between fork and exec only the two system calls that set the filter are made.
    unsafe { command.pre_exec(forbid_io_uring) };
    command
}

#[test]
fn verdict_without_io_uring_is_right() {
    if !is_root() {
        return;
    }
    let off = "sysctl kernel.io_uring_disabled is 2";
    let detail = |report: &Value| finding(report, "io_uring")["detail"].to_string();
    let report = agrees(scene(None), &without_io_uring, &[]);
    assert!(would(&report), "{report:#}");
    assert_eq!(support(&report, "io_uring"), "no");
    assert!(detail(&report).contains(off), "{report:#}");
    let report = agrees(scene(None), &without_io_uring, &["--runtime=uring"]);
    assert!(!would(&report), "{report:#}");
    assert!(report["failure"].as_str().unwrap().contains(off));

    let filtered = |_: &Path| {
        let mut command = testing::command();
        // SAFETY: as above.
        unsafe { command.pre_exec(forbid_io_uring) };
        command
    };
    let report = agrees(scene(None), &filtered, &["--runtime=uring"]);
    assert!(!would(&report), "{report:#}");
    assert!(detail(&report).contains("seccomp filter"), "{report:#}");
}

#[test]
fn verdict_on_tmpfs_is_right() {
    if !is_root() {
        return;
    }
    let on_tmpfs = |dir: &Path| {
        let share = dir.join("share");
        let script = "mount -t tmpfs tmpfs \"$1\" && shift && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh"]);
        command.arg(share).arg(testing::program());
        command.env_remove("RINGFSD_LOG");
        command
    };
    let report = agrees(scene(None), &on_tmpfs, &[]);
    assert!(would(&report), "{report:#}");
    let detail = finding(&report, "file system")["detail"].to_string();
    assert!(detail.contains("tmpfs (tmpfs): in memory"), "{detail}");
    assert_eq!(support(&report, "RWF_NOWAIT"), "no");
    assert_eq!(support(&report, "O_TMPFILE"), "yes");
    let report = agrees(scene(None), &on_tmpfs, &["--inode-file-handles=mandatory"]);
    assert_eq!(would(&report), support(&report, "file handles") == "yes");
}

/// A mount of a directory by FUSE, as network file systems of programs are (sshfs).
struct FuseMount {
    session: FuseSession,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl FuseMount {
    fn new(of: &Path, at: &Path) -> Option<Self> {
        let config = Config {
            root_dir: of.to_str().unwrap().to_owned(),
            ..Config::default()
        };
        let fs = PassthroughFs::<()>::new(config).unwrap();
        fs.import().unwrap();
        let server = FuseServer::new(Arc::new(fs));
        let mut session = FuseSession::new(at, "far.example:/x", "far", false).ok()?;
        // Only root enters.
        session.set_allow_other(false);
        session.mount().ok()?;
        let mut channel = session.new_channel().unwrap();
        let thread = std::thread::spawn(move || {
            while let Ok(Some((reader, writer))) = channel.get_request() {
                // One that fails has been answered.
                let _ = server.handle_message(reader, writer.into(), None, None);
            }
        });
        Some(Self {
            session,
            thread: Some(thread),
        })
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        // Errors are those of an earlier failure.
        let _ = self.session.umount();
        let _ = self.session.wake();
        let _ended = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

#[test]
fn verdict_on_file_system_of_a_program_is_right() {
    if !is_root() {
        return;
    }
    let (far, near) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let Some(_mounted) = FuseMount::new(far.path(), near.path()) else {
        println!("SKIPPED: no FUSE");
        return;
    };
    let dir = scene(None);
    let share = dir.path().join("share");
    std::fs::remove_dir_all(&share).unwrap();
    std::os::unix::fs::symlink(near.path(), &share).unwrap();
    let report = agrees(dir, &own, &[]);
    assert!(would(&report), "{report:#}");
    let detail = finding(&report, "file system")["detail"].to_string();
    assert!(
        detail.contains("fuse") && detail.contains("far.example"),
        "{detail}"
    );
    assert!(detail.contains("maybe from a network"), "{detail}");
    assert_ne!(support(&report, "RWF_NOWAIT"), "yes", "{report:#}");

    // The user that hasn't mounted it can't even look.
    let dir = scene(Some(USER));
    let mut command = as_user(&copy_for_user(dir.path()));
    command.args(["check", "--sandbox=none"]).arg(near.path());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

#[test]
fn verdict_under_limits_is_right() {
    let limited = |limit: &'static str| {
        move |_: &Path| {
            behind(&[
                "bash",
                "-c",
                &format!("ulimit {limit}; exec \"$@\""),
                "bash",
            ])
        }
    };
    let report = agrees(scene(None), &limited("-n 30"), &[]);
    assert!(!would(&report), "{report:#}");
    let report = agrees(scene(None), &limited("-t 1000"), &[]);
    assert!(!would(&report), "{report:#}");
    let report = agrees(scene(None), &limited("-t 1000"), &["--supervise"]);
    assert!(would(&report), "{report:#}");
    assert_eq!(support(&report, "processor time"), "note");
}

#[test]
fn verdict_beside_a_running_server_is_right_and_disturbs_nothing() {
    let mut running = Server::start(&["--once"]);
    let socket = running.socket();
    let check = |args: &[&str]| testing::output(&[&["check", "--json"], args].concat());
    let socket = format!("--socket={}", socket.display());
    let output = check(&[&socket, running.share().to_str().unwrap()]);
    let refused = report(&output);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        refused["failure"]
            .as_str()
            .unwrap()
            .contains("another server listens")
    );
    assert!(would(&report(&check(&[running.share().to_str().unwrap()]))));
    // It would have ended with the first connection.
    assert!(!running.has_ended());
    assert!(running.socket().exists());
}

#[test]
fn verdict_on_state_of_another_directory_is_right_and_keeps_it() {
    let dir = scene(None);
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let state = format!("--state={}", dir.path().join("state").display());
    let mut server = Server::start_sharing(&other, &[&state]);
    let mut fs = server.session(vmm::Profile::Simple, &vmm::Options::default());
    fs.getattr(vmm::fuse::ROOT).unwrap();
    server.signal(rustix::process::Signal::TERM);
    assert!(server.wait().success());
    drop(fs);
    let report = agrees(dir, &own, &["--state=DIR/state"]);
    assert!(!would(&report), "{report:#}");
    assert!(
        report["failure"]
            .as_str()
            .unwrap()
            .contains("another directory")
    );
}

#[test]
fn check_without_permission_to_write_creates_no_file() {
    let dir = scene(None);
    let share = dir.path().join("share");
    let output = testing::output(&["check", "--json", "--no-write", share.to_str().unwrap()]);
    let report = report(&output);
    assert!(would(&report), "{report:#}");
    for name in ["O_TMPFILE", "RWF_NOWAIT", "reflink"] {
        assert_eq!(support(&report, name), "unknown", "{name}");
    }
    assert_eq!(support(&report, "user.* attributes"), "yes");
}

#[test]
fn text_and_status_say_whether_server_would_start() {
    let dir = scene(None);
    let check = |args: &[&str]| {
        let mut command = testing::command();
        let output = command
            .arg("check")
            .args(args)
            .current_dir(dir.path().join("share"));
        let output = output.output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    let (status, text) = check(&[]);
    assert_eq!(status, Some(0), "{text}");
    assert!(text.ends_with("\nThe server would start.\n"), "{text}");
    let (status, text) = check(&["/no/such/directory"]);
    assert_eq!(status, Some(1));
    assert!(
        text.contains("The server would NOT start:\n  sharing "),
        "{text}"
    );
    let (status, text) = check(&["--fd=3"]);
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("--fd 3 isn't open here"), "{text}");
    assert_eq!(check(&["--no-such-option"]).0, Some(2));
    assert_eq!(check(&["--no-xattr", "--posix-acl"]).0, Some(2));
}
