//! The server's life as its user sees it: start, listening, sessions, end.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]
#![allow(
    unsafe_code,
    reason = "a launcher prepares the process before it becomes the server"
)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;

use ringfsd::io::Engine;
use rustix::process::Signal;
use testing::{Server, command, output};
use vmm::fuse::ROOT;
use vmm::{Options, Profile};

#[test]
fn next_vmm_after_disconnect_is_served() {
    let mut server = Server::start(&[]);
    for round in 0..3 {
        let mut fs = server.session(Profile::Simple, &Options::default());
        fs.mkdir(ROOT, c"dir", 0o755).unwrap();
        assert!(fs.lookup(ROOT, c"dir").is_ok(), "round {round}");
        fs.rmdir(ROOT, c"dir").unwrap();
        drop(fs);
        server.wait_until_it_listens();
    }
}

#[test]
fn log_level_selects_lines() {
    let said = |args: &[&str], finer: Option<&str>| {
        let mut command = command();
        command.args(["--socket=/nowhere/s", "--shared-dir=/"]);
        if let Some(finer) = finer {
            command.env("RINGFSD_LOG", finer);
        }
        let output = command.args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let line = "INFO  ringfsd::server";
    assert!(said(&[], None).contains(line));
    assert!(said(&["--log-level", "info"], None).contains(line));
    for quieter in ["off", "error", "warn"] {
        assert!(
            !said(&["--log-level", quieter], None).contains(line),
            "{quieter}"
        );
    }
    assert!(said(&["--log-level", "off", "-d"], None).contains(line));
    let finer = Some("ringfsd::server=info");
    assert!(said(&["--log-level", "off"], finer).contains(line));
    for (args, more) in [
        (&["--log-level", "info"][..], false),
        (&["--log-level", "info", "-d"], true),
        (&["--log-level", "debug"], true),
        (&["--log-level", "trace"], true),
    ] {
        let server = Server::start(args);
        let mut said = server.said().iter();
        assert_eq!(said.any(|line| line.contains("DEBUG ringfsd")), more);
    }
}

#[test]
fn runtime_option_selects_runtime() {
    for runtime in Engine::ALL.iter().map(Engine::to_string) {
        let server = Server::start(&["--runtime", &runtime]);
        let line = format!("runtime {runtime}: ");
        let mut said = server.said().iter();
        assert!(said.any(|said| said.contains(&line)), "{runtime}");
    }
}

#[test]
fn once_means_one_session() {
    let mut server = Server::start(&["--once"]);
    let mut fs = server.session(Profile::Simple, &Options::default());
    fs.getattr(ROOT).unwrap();
    drop(fs);
    assert!(server.wait().success());
    assert!(!server.socket().exists());
}

#[test]
fn a_signal_ends_the_server_and_removes_its_socket() {
    for (signal, with_session) in [
        (Signal::TERM, false),
        (Signal::INT, false),
        (Signal::TERM, true),
    ] {
        let mut server = Server::start(&[]);
        let fs = with_session.then(|| server.session(Profile::Simple, &Options::default()));
        server.signal(signal);
        assert!(server.wait().success(), "{signal:?}");
        assert!(!server.socket().exists(), "{signal:?}");
        drop(fs);
    }
}

#[test]
fn stalled_message_does_not_delay_stop() {
    use std::io::Write;
    let mut server = Server::start(&[]);
    let mut stream = server.connect();
    server.wait_for("connected");
    stream.write_all(&[1, 0, 0, 0, 1]).unwrap();
    server.signal(Signal::TERM);
    assert!(server.wait().success());
}

#[test]
fn stalled_message_ends_only_its_session() {
    use std::io::Write;
    let mut server = Server::start(&[]);
    let mut stream = server.connect();
    stream.write_all(&[1, 0, 0, 0, 1]).unwrap();
    server.wait_for("stopped within a message, of which 5 bytes");
    let mut fs = server.session(Profile::Simple, &Options::default());
    fs.getattr(ROOT).unwrap();
}

#[test]
fn the_socket_of_a_killed_server_is_replaced() {
    let mut server = Server::start(&[]);
    server.signal(Signal::KILL);
    assert!(!server.wait().success());
    assert!(server.socket().exists());
    let mut again = command();
    again.arg("--socket").arg(server.socket());
    again.arg("--shared-dir").arg(server.share());
    let mut again = Server::spawn(again, tempfile::tempdir().unwrap());
    again.wait_until_it_listens();
    let mut fs = server.session(Profile::Simple, &Options::default());
    fs.getattr(ROOT).unwrap();
}

#[test]
fn socket_of_live_server_is_refused() {
    let server = Server::start(&["--once"]);
    let socket = server.socket();
    let share = server.share();
    let other = output(&[
        "--socket",
        socket.to_str().unwrap(),
        "--shared-dir",
        share.to_str().unwrap(),
    ]);
    assert_eq!(other.status.code(), Some(1));
    let said = String::from_utf8(other.stderr).unwrap();
    assert!(said.contains("another server listens on"), "{said}");
    assert!(said.contains("--socket"), "it says what to do: {said}");
    let mut fs = server.session(Profile::Simple, &Options::default());
    fs.getattr(ROOT).unwrap();
}

#[test]
fn an_inherited_socket_is_listened_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("launcher's");
    let share = dir.path().join("share");
    std::fs::create_dir(&share).unwrap();
    let socket = OwnedFd::from(UnixListener::bind(&path).unwrap());
    let number = socket.as_raw_fd();
    let mut launched = command();
    launched
        .args(["--fd", &number.to_string(), "--shared-dir"])
        .arg(share);
    let keep_open = move || rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::empty());
    // SAFETY: between fork and exec only fcntl is called, which is safe there.
    unsafe { launched.pre_exec(move || Ok(keep_open()?)) };
    let mut server = Server::spawn(launched, tempfile::tempdir().unwrap());
    server.wait_until_it_listens();
    let stream = UnixStream::connect(&path).unwrap();
    let session = Profile::Simple
        .connect(stream, &Options::default())
        .unwrap();
    let mut fs = vmm::fuse::Client::new(session);
    fs.init().unwrap();
    drop(fs);
    assert!(server.wait().success(), "nobody else can connect");
    assert!(path.exists(), "the launcher's file stays");
}

#[test]
fn unusable_share_error_names_cause() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("file"), "").unwrap();
    let here = at("");
    for (args, code, words) in [
        (
            vec!["--socket", &at("s"), "--shared-dir", &at("nowhere")],
            1,
            "nowhere",
        ),
        (
            vec!["--socket", &at("file"), "--shared-dir", &here],
            1,
            "is not a socket",
        ),
        (
            vec!["--socket", &at("no/s"), "--shared-dir", &here],
            1,
            "no/s",
        ),
        (
            vec!["--fd", "97", "--shared-dir", &here],
            1,
            "was not left open",
        ),
        (
            vec!["--fd", "0", "--shared-dir", &here],
            1,
            "not a listening",
        ),
        (vec!["--shared-dir", &here], 2, "--socket"),
        (vec!["--socket", &at("s")], 2, "--shared-dir"),
        (
            vec![
                "--socket",
                &at("s"),
                "--shared-dir",
                &here,
                "--workers",
                "0",
            ],
            2,
            "1 to 256",
        ),
        (
            vec![
                "--socket",
                &at("s"),
                "--shared-dir",
                &here,
                "--runtime",
                "x",
            ],
            2,
            "uring",
        ),
    ] {
        let run = output(&args);
        let said = String::from_utf8(run.stderr).unwrap();
        assert_eq!(run.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(words), "{args:?}: {said}");
        assert!(!dir.path().join("s").exists());
    }
}

#[test]
fn help_lists_each_option_and_version_is_printed() {
    let help = |option| {
        let output = output(&[option]);
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let (short, long) = (help("-h"), help("--help"));
    for option in [
        "--socket",
        "--socket-path",
        "--fd",
        "--shared-dir",
        "--request-queues",
        "--log-level",
    ] {
        for text in [&short, &long] {
            assert!(text.contains(option), "{option}");
        }
    }
    assert!(2 * short.lines().count() < long.lines().count());
    assert!(output(&["--version"]).status.success());
}

#[test]
fn the_log_says_which_runtime_and_why() {
    let mut server = Server::start(&["--runtime", "tokio"]);
    assert!(
        server
            .said()
            .iter()
            .any(|line| line.contains("runtime tokio:"))
    );
    server.signal(Signal::TERM);
    server.wait();
    let server = Server::start(&["--runtime", "auto"]);
    assert!(
        server
            .said()
            .iter()
            .any(|line| line.contains("runtime uring:"))
    );
}

#[test]
fn forbidden_io_uring_selects_tokio_or_fails_with_reason() {
    let launch = |runtime: &str| {
        let dir = tempfile::tempdir().unwrap();
        let mut launched = command();
        launched.arg("--socket").arg(dir.path().join("socket"));
        launched.arg("--shared-dir").arg(dir.path());
        launched.args(["--runtime", runtime]);
        // SAFETY: between fork and exec only the two system calls that set the filter are made.
        unsafe { launched.pre_exec(forbid_io_uring) };
        Server::spawn(launched, dir)
    };
    let mut server = launch("auto");
    let line = server.wait_for("runtime tokio:");
    assert!(line.contains("io_uring"), "{line}");
    server.wait_until_it_listens();
    for engine in Engine::ALL
        .iter()
        .filter(|engine| **engine != Engine::ThreadPool)
    {
        let mut refused = launch(&engine.to_string());
        let line = refused.wait_for("ringfsd:");
        assert!(line.contains("io_uring"), "{line}");
        assert_eq!(refused.wait().code(), Some(1));
    }
}

/// A seccomp filter under which `io_uring_setup` answers EPERM.
pub(crate) fn forbid_io_uring() -> std::io::Result<()> {
    let statement = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt,
        jf,
        k,
    };
    let number = u32::try_from(libc::SYS_io_uring_setup).unwrap_or(0);
    let refuse = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EPERM).unwrap_or(0);
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, refuse),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: plain numbers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the program and its filter outlive the call, which copies them.
    match unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
