//! What a service manager is told, and what it passes: `NOTIFY_SOCKET`, the watchdog, `LISTEN_FDS`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use testing::Server;
use vmm::fuse::{Client, ROOT};
use vmm::{Options, Profile, Session};

/// The socket of a service manager.
struct Manager(UnixDatagram);

impl Manager {
    fn new(dir: &Path) -> Self {
        let socket = UnixDatagram::bind(dir.join("notify")).unwrap();
        socket.set_read_timeout(Some(testing::TIMEOUT)).unwrap();
        Self(socket)
    }

    /// The states that one datagram has.
    fn receive(&self) -> Vec<String> {
        let mut bytes = [0; 4096];
        // A read with a timeout isn't restarted after a signal.
        let len = loop {
            match self.0.recv(&mut bytes) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                received => break received.unwrap(),
            }
        };
        let text = String::from_utf8(bytes[..len].to_vec()).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// Waits for a datagram with `state`, past keep-alives alone.
    fn wait_for(&self, state: &str) {
        loop {
            let states = self.receive();
            if states.iter().any(|said| said == state) {
                return;
            }
            assert_eq!(states, ["WATCHDOG=1"], "before {state}");
        }
    }

    /// Whether nothing has been sent.
    fn has_nothing(&self) -> bool {
        self.0.set_nonblocking(true).unwrap();
        let nothing = self.0.recv(&mut [0; 100]).is_err();
        self.0.set_nonblocking(false).unwrap();
        nothing
    }
}

/// The server, run by a shell after `set_up`, with its standard input being `stdin`.
fn launch(dir: tempfile::TempDir, stdin: Stdio, set_up: &str, args: &[&str]) -> Server {
    let socket = dir.path().join("socket");
    let args: Vec<_> = ["--socket", socket.to_str().unwrap()]
        .iter()
        .chain(args)
        .copied()
        .collect();
    launch_on(dir, stdin, set_up, &args)
}

/// As [`launch`], with the option for the socket being among `args`.
fn launch_on(dir: tempfile::TempDir, stdin: Stdio, set_up: &str, args: &[&str]) -> Server {
    let share = dir.path().join("share");
    std::fs::create_dir(&share).unwrap();
    let program = testing::command();
    let mut command = Command::new("bash");
    command
        .args(["-c", &format!("{set_up} exec \"$0\" \"$@\"")])
        .arg(program.get_program())
        .env_remove("RINGFSD_LOG")
        .env("NOTIFY_SOCKET", dir.path().join("notify"))
        .stdin(stdin)
        .arg("--shared-dir")
        .arg(&share)
        .args(args);
    Server::spawn(command, dir)
}

fn session(server: &Server) -> Client<Session> {
    server.session(Profile::Qemu, &Options::default())
}

fn process(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

#[test]
fn manager_is_told_when_a_vmm_can_connect_and_when_the_server_ends() {
    for args in [
        &[][..],
        &["--supervise"],
        &["--sandbox", "none"],
        &["--supervise", "--sandbox", "chroot"],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let manager = Manager::new(dir.path());
        let mut server = launch(dir, Stdio::null(), "", args);
        assert_eq!(manager.receive(), ["READY=1", "WATCHDOG=1"], "{args:?}");
        let mut fs = session(&server);
        fs.mkdir(ROOT, c"dir", 0o755).unwrap();
        drop(fs);
        // Without a watchdog nothing is sent in between.
        server.wait_for("ready for the next VMM");
        assert!(manager.has_nothing(), "{args:?}");
        server.signal(Signal::TERM);
        assert_eq!(manager.receive(), ["STOPPING=1"], "{args:?}");
        assert!(server.wait().success());
    }
}

#[test]
fn manager_is_not_told_that_a_server_is_ready_which_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let manager = Manager::new(dir.path());
    let mut server = launch(
        dir,
        Stdio::null(),
        "",
        &["--modcaps=-setuid", "--uid-map=bad"],
    );
    assert!(!server.wait().success());
    assert!(manager.has_nothing());
}

#[test]
fn watchdog_is_kept_alive_with_and_without_session() {
    for args in [&[][..], &["--supervise"]] {
        let dir = tempfile::tempdir().unwrap();
        let manager = Manager::new(dir.path());
        let set_up = "export WATCHDOG_USEC=600000 WATCHDOG_PID=$$;";
        let server = launch(dir, Stdio::null(), set_up, args);
        manager.wait_for("READY=1");
        manager.wait_for("WATCHDOG=1");
        let mut fs = session(&server);
        for _ in 0..20 {
            assert_eq!(manager.receive(), ["WATCHDOG=1"], "{args:?}");
        }
        fs.mkdir(ROOT, c"dir", 0o755).unwrap();
    }
}

#[test]
fn watchdog_of_another_process_is_not_kept_alive() {
    let dir = tempfile::tempdir().unwrap();
    let manager = Manager::new(dir.path());
    let set_up = "export WATCHDOG_USEC=60000 WATCHDOG_PID=1;";
    let mut server = launch(dir, Stdio::null(), set_up, &[]);
    assert_eq!(manager.receive(), ["READY=1", "WATCHDOG=1"]);
    manager
        .0
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    assert!(manager.0.recv(&mut [0; 100]).is_err());
    server.signal(Signal::TERM);
    assert!(server.wait().success());
}

/// A process that was stopped, by a debugger or by hand, is not one that hangs.
#[test]
fn stopped_process_keeps_its_watchdog() {
    let dir = tempfile::tempdir().unwrap();
    let manager = Manager::new(dir.path());
    let set_up = "export WATCHDOG_USEC=600000 WATCHDOG_PID=$$;";
    let mut server = launch(dir, Stdio::null(), set_up, &["--supervise"]);
    manager.wait_for("READY=1");
    let mut fs = session(&server);
    let serving = server.pid();
    kill_process(process(serving), Signal::STOP).unwrap();
    server.wait_for("and is stopped");
    manager.wait_for("WATCHDOG=1");
    kill_process(process(serving), Signal::CONT).unwrap();
    fs.mkdir(ROOT, c"dir", 0o755).unwrap();
    assert_eq!(server.pid(), serving);
}

#[test]
fn killed_process_is_replaced_and_the_manager_hears_of_no_end() {
    let dir = tempfile::tempdir().unwrap();
    let manager = Manager::new(dir.path());
    let set_up = "export WATCHDOG_USEC=600000 WATCHDOG_PID=$$;";
    let mut server = launch(dir, Stdio::null(), set_up, &["--supervise"]);
    manager.wait_for("READY=1");
    let mut fs = session(&server);
    kill_process(process(server.pid()), Signal::KILL).unwrap();
    server.wait_for("serving again");
    fs.mkdir(ROOT, c"dir", 0o755).unwrap();
    for _ in 0..3 {
        assert_eq!(manager.receive(), ["WATCHDOG=1"]);
    }
}

/// Passes standard input as the only socket.
const PASS_STDIN: &str = "exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1;";

/// A socket of a service manager, with which it starts server after server.
struct SocketUnit {
    dir: tempfile::TempDir,
    listener: UnixListener,
}

impl SocketUnit {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        Self { dir, listener }
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("socket")
    }

    fn start(&self, args: &[&str]) -> Server {
        let passed = self.listener.try_clone().unwrap();
        let passed = Stdio::from(std::os::fd::OwnedFd::from(passed));
        let dir = tempfile::tempdir().unwrap();
        let path = self.path();
        let args: Vec<_> = args
            .iter()
            .map(|arg| arg.replace("SOCKET", path.to_str().unwrap()))
            .collect();
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        launch_on(dir, passed, PASS_STDIN, &args)
    }

    /// A VMM that connects, whether a server runs or not.
    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.path()).unwrap()
    }
}

/// Makes a directory by way of a VMM's connection.
fn use_session(connection: UnixStream, name: &std::ffi::CStr) {
    let session = Profile::Qemu
        .connect(connection, &Options::default())
        .unwrap();
    let mut fs = Client::new(session);
    fs.init().unwrap();
    fs.mkdir(ROOT, name, 0o755).unwrap();
}

#[test]
fn server_started_by_a_socket_unit_serves_one_vmm_after_the_other() {
    for args in [
        &["--socket=SOCKET"][..],
        &["--socket=SOCKET", "--supervise"],
        &["--fd=3", "--keep-listening"],
    ] {
        let unit = SocketUnit::new();
        let mut server = unit.start(args);
        server.wait_until_it_listens();
        for name in [c"first", c"second"] {
            use_session(unit.connect(), name);
            server.wait_for("ready for the next VMM");
        }
        assert!(server.share().join("second").exists(), "{args:?}");
        server.signal(Signal::TERM);
        assert!(server.wait().success(), "{args:?}");
        assert!(unit.path().exists(), "{args:?}");
    }
}

/// A VMM that connects while no server runs waits for the one that the manager then starts.
#[test]
fn server_started_by_a_socket_unit_may_end_with_each_vmm() {
    for args in [
        &["--socket=SOCKET", "--once"][..],
        &["--socket=SOCKET", "--once", "--supervise"],
        &["--fd=3"],
        &["--compat=virtiofsd", "--socket=SOCKET"],
    ] {
        let unit = SocketUnit::new();
        for name in [c"first", c"second"] {
            let connection = unit.connect();
            let mut server = unit.start(args);
            use_session(connection, name);
            assert_eq!(server.wait().code(), Some(0), "{args:?}");
            assert!(server.share().join(name.to_str().unwrap()).exists());
            assert!(unit.path().exists(), "{args:?}");
        }
    }
}

#[test]
fn passed_socket_is_used_if_it_is_the_one_of_the_option() {
    let set_up = PASS_STDIN;
    for args in [&[][..], &["--supervise"]] {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let passed = listener.try_clone().unwrap();
        let mut server = launch(
            dir,
            Stdio::from(std::os::fd::OwnedFd::from(passed)),
            set_up,
            args,
        );
        server.wait_until_it_listens();
        let mut fs = session(&server);
        fs.mkdir(ROOT, c"dir", 0o755).unwrap();
        drop(fs);
        server.signal(Signal::TERM);
        assert!(server.wait().success());
        // It is the service manager's.
        assert!(socket.exists());
    }

    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("other");
    let listener = UnixListener::bind(&other).unwrap();
    let passed = Stdio::from(std::os::fd::OwnedFd::from(listener));
    let mut server = launch(dir, passed, set_up, &[]);
    server.wait_for("ListenStream=");
    assert_eq!(server.wait().code(), Some(1));
}

#[test]
fn sockets_passed_to_another_process_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let set_up = "export LISTEN_PID=1 LISTEN_FDS=1;";
    let mut server = launch(dir, Stdio::null(), set_up, &[]);
    server.wait_until_it_listens();
    assert!(server.socket().exists());
    server.signal(Signal::TERM);
    assert!(server.wait().success());
    assert!(!server.socket().exists());
}
