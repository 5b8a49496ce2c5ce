//! The control socket: what it shows, what it changes, who may use it, and what no client can do to
//! others. `control/mounts.rs` has what it mounts, `control/recovery.rs` restarts and upgrades,
//! `control/top.rs` the live view.

mod mounts;
mod protocol;
mod recovery;
mod top;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use clap::CommandFactory;
use ringfsd::internals::cli::Options;
use rustix::process::Signal;
use serde_json::Value;
use testing::{Server, TIMEOUT, USER};
use vmm::fuse::ROOT;
use vmm::{Options as VmmOptions, Profile};

/// A place for a control socket, and the option that makes it.
struct ControlSocket {
    dir: tempfile::TempDir,
}

impl ControlSocket {
    fn new() -> Self {
        Self::of(None)
    }

    fn of(user: Option<u32>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        chown(dir.path(), user, user).unwrap();
        Self { dir }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("control")
    }

    fn option(&self) -> String {
        format!("--control=unix:{}", self.socket().display())
    }

    /// Starts a server with it.
    fn start(&self, arguments: &[&str]) -> Server {
        Server::start(&[&[&*self.option()], arguments].concat())
    }

    fn try_ctl(&self, arguments: &[&str]) -> Output {
        try_ctl(&self.socket(), arguments)
    }

    /// What a command returns.
    fn ctl(&self, arguments: &[&str]) -> Value {
        let output = self.try_ctl(&[arguments, &["--json"]].concat());
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{arguments:?}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    /// The code of the failure of a command.
    fn refusal(&self, arguments: &[&str]) -> String {
        let output = self.try_ctl(&[arguments, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let reply: Value = serde_json::from_slice(&output.stdout).unwrap();
        reply["error"]["code"].as_str().unwrap().to_owned()
    }

    fn connect(&self) -> Connection {
        Connection::to(&self.socket())
    }
}

fn try_ctl(socket: &Path, arguments: &[&str]) -> Output {
    let mut command = testing::command();
    command.arg("ctl").arg(socket).args(arguments);
    command.output().unwrap()
}

/// A client that speaks the protocol by itself.
struct Connection(BufReader<UnixStream>);

impl Connection {
    fn to(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        Self(BufReader::new(stream))
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }

    /// The next reply; `None` at the end of the connection.
    fn receive(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap()),
        }
    }

    fn ask(&mut self, line: &str) -> Value {
        self.send(format!("{line}\n").as_bytes());
        self.receive().unwrap()
    }
}

const STATUS: &str = r#"{"version":1,"command":"status"}"#;

#[test]
fn status_shows_server_and_its_session() {
    let place = ControlSocket::new();
    let server = place.start(&["--workers=2", "--cache=never", "--tag=here"]);
    let status = place.ctl(&["status"]);
    assert_eq!(status["process"], server.guardian());
    assert_eq!(status["source"]["option"], "--shared-dir");
    let share = server.share();
    assert_eq!(status["source"]["value"], share.to_str().unwrap());
    assert_eq!(status["socket"], server.socket().to_str().unwrap());
    assert_eq!(status["user"], rustix::process::geteuid().as_raw());
    assert_eq!(status["workers"], 2);
    assert_eq!(status["options"]["cache"], "never");
    assert_eq!(status["options"]["tag"], "here");
    assert_eq!(
        (&status["vmm"], &status["connections"]),
        (&Value::Null, &0.into())
    );
    let guest = server.session(Profile::Qemu, &VmmOptions::default());
    let status = place.ctl(&["status"]);
    let session = &status["vmm"]["session"];
    assert!(
        session["fuse"].as_str().unwrap().starts_with("7."),
        "{session}"
    );
    assert!(!session["flags"].as_array().unwrap().is_empty());
    assert_eq!(status["connections"], 1);
    drop(guest);
    // By text, for people.
    let text = place.try_ctl(&["status"]).stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("runtime:\n  engine"), "{text}");
}

#[test]
fn options_have_the_names_of_the_command_line() {
    let place = ControlSocket::new();
    let _server = place.start(&[]);
    let status = place.ctl(&["status"]);
    let command = Options::command();
    let known: BTreeSet<_> = command
        .get_arguments()
        .filter_map(|it| it.get_long())
        .collect();
    let shown = status["options"].as_object().unwrap();
    assert!(shown.len() > 30);
    for name in shown.keys() {
        assert!(known.contains(name.as_str()), "{name}");
    }
}

#[test]
fn inodes_and_handles_are_listed_page_by_page_with_their_paths() {
    let place = ControlSocket::new();
    let server = place.start(&[]);
    let mut guest = server.session(Profile::Qemu, &VmmOptions::default());
    let dir = guest.mkdir(ROOT, c"dir", 0o755).unwrap().nodeid;
    let mut handles = Vec::new();
    for name in [c"a", c"b", c"c\x1b[2J"] {
        handles.push(guest.create(dir, name, 0o644).unwrap());
    }
    guest.unlink(dir, c"b").unwrap();
    let whole = place.ctl(&["inodes"]);
    let paths = |list: &Value, what: &str| {
        let entries = list[what].as_array().unwrap().iter();
        let paths = entries.map(|entry| entry["path"].as_str().unwrap_or("-").to_owned());
        paths.collect::<Vec<_>>()
    };
    assert_eq!(
        paths(&whole, "inodes"),
        ["/", "/dir", "/dir/a", "/dir/b (deleted)", "/dir/c\u{1b}[2J"]
    );
    assert_eq!(whole["next"], Value::Null);
    assert_eq!(whole["inodes"][1]["kind"], "directory");
    assert_eq!(whole["inodes"][2]["lookups"], 1);
    let open = place.ctl(&["handles"]);
    assert_eq!(
        paths(&open, "handles"),
        ["/dir/a", "/dir/b (deleted)", "/dir/c\u{1b}[2J"]
    );
    assert_eq!(open["handles"][0]["access"], "read-write");
    // In parts, and put together again.
    for what in ["inodes", "handles"] {
        let (mut from, mut seen) = (Some(0), Vec::new());
        while let Some(after) = from {
            let page = place.ctl(&[what, "--limit=2", &format!("--after={after}")]);
            let entries = paths(&page, what);
            assert!(entries.len() <= 2);
            seen.extend(entries);
            from = page["next"].as_u64();
        }
        let all = place.ctl(&[what, "--all"]);
        assert_eq!(seen, paths(&all, what));
    }
    // A terminal gets none of what a guest has put into a name.
    let text = place.try_ctl(&["inodes"]).stdout;
    assert!(!text.contains(&0x1b));
    for (file, handle) in handles {
        guest.release(file.nodeid, handle).unwrap();
    }
    assert_eq!(place.ctl(&["handles"])["handles"], Value::Array(Vec::new()));
}

#[test]
fn dropped_caches_are_opened_again() {
    let place = ControlSocket::new();
    let server = place.start(&[]);
    let mut guest = server.session(Profile::Qemu, &VmmOptions::default());
    let mut nodes = Vec::new();
    for number in 0..40 {
        let name = std::ffi::CString::new(format!("f{number}")).unwrap();
        let (file, handle) = guest.create(ROOT, &name, 0o644).unwrap();
        guest.write(file.nodeid, handle, 0, b"text").unwrap();
        guest.release(file.nodeid, handle).unwrap();
        let handle = guest.open(file.nodeid, libc::O_RDONLY).unwrap();
        guest.release(file.nodeid, handle).unwrap();
        nodes.push(file.nodeid);
    }
    let before = server.descriptors_of("f");
    let dropped = place.ctl(&["drop-caches"]);
    assert!(server.descriptors_of("f") < before, "{before} before");
    let closed = dropped["closed_files"].as_u64().unwrap();
    // Only on file systems on which a closed file stays the one that its name opens.
    let inodes = dropped["inode_descriptors"].as_u64().unwrap();
    assert!(inodes + closed > 0, "{dropped}");
    for node in nodes {
        let handle = guest.open(node, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(node, handle, 0, 9).unwrap(), b"text");
        guest.release(node, handle).unwrap();
    }
}

#[test]
fn descriptors_on_submounts_are_dropped_too() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: to mount a tmpfs needs root");
        return;
    }
    let place = ControlSocket::new();
    let share = tempfile::tempdir().unwrap();
    let within = share.path().join("within");
    std::fs::create_dir(&within).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", &within, "tmpfs", flags, None).unwrap();
    for number in 0..40 {
        std::fs::write(within.join(format!("f{number}")), "text").unwrap();
    }
    let server = Server::start_sharing(share.path(), &[&*place.option()]);
    let mut guest = server.session(Profile::Qemu, &VmmOptions::default());
    let root = guest.lookup(ROOT, c"within").unwrap().nodeid;
    let nodes: Vec<_> = (0..40)
        .map(|number| {
            let name = std::ffi::CString::new(format!("f{number}")).unwrap();
            guest.lookup(root, &name).unwrap().nodeid
        })
        .collect();
    let dropped = place.ctl(&["drop-caches"]);
    for node in nodes {
        let handle = guest.open(node, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(node, handle, 0, 9).unwrap(), b"text");
        guest.release(node, handle).unwrap();
    }
    drop(server);
    let _ = rustix::mount::unmount(&within, rustix::mount::UnmountFlags::DETACH);
    assert!(
        dropped["inode_descriptors"].as_u64().unwrap() > 0,
        "{dropped}"
    );
}

#[test]
fn log_level_changes_while_the_server_runs() {
    let place = ControlSocket::new();
    let mut server = place.start(&["--supervise"]);
    place.ctl(&["set-log-level", "warn"]);
    let levels = place.ctl(&["set-log-level", "debug", "virtqueue"]);
    assert_eq!(levels["rooms"]["virtqueue"], "debug");
    assert_eq!(place.ctl(&["status"])["log"]["level"], "warn");
    assert_eq!(
        place.refusal(&["set-log-level", "debug", "attic"]),
        "invalid-argument"
    );
    place.ctl(&["set-log-level", "debug"]);
    server.wait_for("log level DEBUG of all rooms");
    place.ctl(&["status"]);
    server.wait_for("control: status");
}

#[test]
fn dump_shows_queues_and_requests() {
    let place = ControlSocket::new();
    let server = place.start(&["--workers=2"]);
    assert_eq!(place.ctl(&["dump"])["threads"], Value::Null);
    let mut guest = server.session(Profile::Qemu, &VmmOptions::default());
    guest.mkdir(ROOT, c"dir", 0o755).unwrap();
    let dump = place.ctl(&["dump"]);
    let threads = dump["threads"].as_array().unwrap();
    let names: Vec<_> = threads
        .iter()
        .map(|it| it["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        ["ringfsd-high-0", "ringfsd-work-0", "ringfsd-work-1"]
    );
    assert!(threads.iter().all(|thread| thread["responds"] == true));
    let queues: Vec<_> = threads
        .iter()
        .flat_map(|it| it["queues"].as_array().unwrap())
        .collect();
    assert!(!queues.is_empty());
    let served = queues
        .iter()
        .map(|queue| queue["returned"].as_u64().unwrap());
    assert!(served.sum::<u64>() >= 2, "{queues:?}");
    let operations = dump["statistics"]["operations"].as_array().unwrap();
    let made = operations.iter().find(|it| it["operation"] == "mkdir");
    assert_eq!(made.unwrap()["requests"], 1, "{operations:?}");
}

#[test]
fn signal_logs_a_report_with_and_without_control_socket() {
    let place = ControlSocket::new();
    for arguments in [&[][..], &["--supervise"], &[&*place.option()]] {
        let mut server = Server::start(arguments);
        let mut guest = server.session(Profile::Qemu, &VmmOptions::default());
        guest.mkdir(ROOT, c"dir", 0o755).unwrap();
        for _ in 0..2 {
            server.signal(Signal::USR1);
            server.wait_for("report: ringfsd");
            server.wait_for("report: 2 inodes known");
            server.wait_for("report: ringfsd-high-0: queue 0");
        }
        guest.rmdir(ROOT, c"dir").unwrap();
    }
}

#[test]
fn what_cannot_be_done_says_so_and_why() {
    let place = ControlSocket::new();
    let _server = place.start(&[]);
    for (arguments, code) in [
        (&["upgrade"][..], "not-possible"),
        (&["unmount", "/a"], "not-possible"),
        (&["mount", "/a", "/"], "not-possible"),
    ] {
        assert_eq!(place.refusal(arguments), code, "{arguments:?}");
    }
    let output = place.try_ctl(&["upgrade"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("--supervise") && said.contains("hint:"),
        "{said}"
    );
    let nobody = try_ctl(Path::new("/nonexistent/socket"), &["status"]);
    let said = String::from_utf8(nobody.stderr).unwrap();
    assert!(said.contains("--control unix:/nonexistent"), "{said}");
    assert_eq!(nobody.status.code(), Some(1));
}

#[test]
fn socket_is_the_owners_and_ends_with_the_server() {
    let place = ControlSocket::new();
    let mut server = place.start(&[]);
    let mode = std::fs::metadata(place.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o077, 0, "{mode:o}");
    // Another server can't take it.
    let other = tempfile::tempdir().unwrap();
    let socket = other.path().join("socket");
    let arguments = [
        "--socket",
        socket.to_str().unwrap(),
        "--shared-dir=/",
        &place.option(),
    ];
    let output = testing::output(&arguments);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("another server listens"), "{said}");
    assert!(!socket.exists(), "what has failed leaves no socket");
    server.signal(Signal::TERM);
    server.wait();
    assert!(!place.socket().exists());
}

#[test]
fn other_users_are_refused_even_if_the_mode_lets_them_in() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: another user needs root");
        return;
    }
    let place = ControlSocket::new();
    let _server = place.start(&[]);
    let program = place.dir.path().join("ringfsd");
    testing::copy_program(testing::program(), &program);
    let open = |path: &Path| {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
    };
    open(place.dir.path());
    let as_other = || {
        let mut command = std::process::Command::new("setpriv");
        let user = (USER - 1).to_string();
        command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]);
        command.arg(&program).arg("ctl").arg(place.socket());
        let output = command.args(["status", "--json"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(as_other().contains("Permission denied"));
    open(&place.socket());
    let reply: Value = serde_json::from_str(&as_other()).unwrap();
    assert_eq!(reply["error"]["code"], "denied");
    place.ctl(&["status"]);
}

#[test]
fn ordinary_user_and_root_control_a_server_in_its_user_namespace() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: another user needs root");
        return;
    }
    for sandbox in ["--sandbox=namespace", "--sandbox=none"] {
        let place = ControlSocket::of(Some(USER));
        let server = Server::start_as(Some(USER), &[sandbox, &place.option()]);
        let status = place.ctl(&["status"]);
        assert_eq!(status["user"], USER, "{sandbox}");
        assert_eq!(status["process"], server.guardian());
        let program = place.dir.path().join("ringfsd");
        testing::copy_program(testing::program(), &program);
        let mut command = std::process::Command::new("setpriv");
        let user = USER.to_string();
        command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]);
        command.arg(&program).arg("ctl").arg(place.socket());
        let output = command.arg("status").output().unwrap();
        assert!(output.status.success(), "{sandbox}: {output:?}");
    }
}

#[test]
fn stuck_and_hostile_clients_delay_neither_guests_nor_others() {
    let place = ControlSocket::new();
    let server = place.start(&[]);
    let mut guest = server.session(Profile::Qemu, &VmmOptions::default());
    // One that never completes its line, one that never reads, and more than there may be.
    let mut silent = place.connect();
    silent.send(b"{\"version\":1,");
    let mut deaf = place.connect();
    deaf.0
        .get_ref()
        .set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let many = format!("{STATUS}\n").repeat(1000);
    while deaf.0.get_mut().write_all(many.as_bytes()).is_ok() {}
    let idle: Vec<_> = (0..40).map(|_| place.connect()).collect();
    let mut round = 0;
    let mut works = || {
        let status = place.ctl(&["status"]);
        assert_eq!(status["process"], server.guardian());
        let name = std::ffi::CString::new(format!("d{round}")).unwrap();
        guest.mkdir(ROOT, &name, 0o755).unwrap();
        round += 1;
    };
    (0..10).for_each(|_| works());
    // And while they come, each of them with something to say.
    std::thread::scope(|scope| {
        let crowd = scope.spawn(|| {
            for _ in 0..1000 {
                let mut client = place.connect();
                // The server may have replaced it already.
                let _ = client.0.get_mut().write_all(b"not JSON\n{");
            }
        });
        works();
        while !crowd.is_finished() {
            works();
        }
    });
    drop(idle);
    // A line without end is refused, before it takes much memory.
    let mut endless = place.connect();
    let chunk = [b'x'; 4096];
    while endless.0.get_mut().write_all(&chunk).is_ok() {}
    let fds = format!("/proc/{}/fd", server.pid());
    assert!(std::fs::read_dir(fds).unwrap().count() < 200);
    // What was begun is given up after a while.
    assert_eq!(silent.receive(), None);
    place.ctl(&["status"]);
}
