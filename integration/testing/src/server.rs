//! A ringfsd process under test, started as a user would start it.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use vmm::fuse::Client;
use vmm::{Options, Profile, Session};

/// How long anything may take that should take no time at all.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// What the server says when a front end can connect.
const LISTENING: &str = "Waiting for vhost-user socket connection";

/// What it says when another one can, after the first has gone.
const READY: &str = "ready for the next VMM";

/// A server, its shared directory, its socket and what it says.
#[derive(Debug)]
pub struct Server {
    child: Child,
    dir: tempfile::TempDir,
    lines: Receiver<String>,
    said: Vec<String>,
}

impl Server {
    /// Starts a server with these arguments besides the socket and the directory, and waits
    /// until it listens.
    pub fn start(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("share");
        std::fs::create_dir(&share).unwrap();
        Self::start_in(dir, &share, args)
    }

    /// As [`start`](Self::start), with something else as the share.
    pub fn start_sharing(share: &Path, args: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), share, args)
    }

    fn start_in(dir: tempfile::TempDir, share: &Path, args: &[&str]) -> Self {
        let mut command = command();
        command
            .arg("--socket")
            .arg(dir.path().join("socket"))
            .arg("--shared-dir")
            .arg(share)
            .args(["--log-level", "debug"])
            .args(args);
        let mut server = Self::spawn(command, dir);
        server.wait_for(LISTENING);
        server
    }

    /// As [`start`](Self::start), as another user where the tests run as root, with the share
    /// being that user's; the server logs what `--log-level info` says.
    pub fn start_as(user: Option<u32>, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let command = command_as(user, dir.path());
        Self::start_command(command, dir, user, args)
    }

    /// As [`start_as`](Self::start_as), from another file, which that user can run.
    pub fn start_program(program: &Path, user: Option<u32>, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = match user {
            Some(user) => {
                let mut command = Command::new("setpriv");
                let user = user.to_string();
                command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]);
                command.arg(program);
                command
            }
            None => Command::new(program),
        };
        command.env_remove("RINGFSD_LOG").stdin(Stdio::null());
        Self::start_command(command, dir, user, args)
    }

    fn start_command(
        mut command: Command,
        dir: tempfile::TempDir,
        user: Option<u32>,
        args: &[&str],
    ) -> Self {
        let share = dir.path().join("share");
        std::fs::create_dir(&share).unwrap();
        if let Some(user) = user {
            for path in [dir.path(), &share] {
                std::os::unix::fs::chown(path, Some(user), Some(user)).unwrap();
            }
        }
        command
            .arg("--socket")
            .arg(dir.path().join("socket"))
            .arg("--shared-dir")
            .arg(&share)
            .args(args);
        let mut server = Self::spawn(command, dir);
        server.wait_for(LISTENING);
        server
    }

    /// Runs a command as a server; `dir` lives as long as it.
    pub fn spawn(mut command: Command, dir: tempfile::TempDir) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            dir,
            lines,
            said: Vec::new(),
        }
    }

    /// The directory that is shared.
    pub fn share(&self) -> PathBuf {
        self.dir.path().join("share")
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// The process that serves, once the server listens. The one that was started waits for it.
    pub fn pid(&self) -> u32 {
        self.child().expect("a process that serves")
    }

    /// As [`pid`](Self::pid), if there is one.
    pub fn child(&self) -> Option<u32> {
        child_of(self.child.id())
    }

    /// The process that was started.
    pub fn guardian(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that has `text` in it and returns it.
    pub fn wait_for(&mut self, text: &str) -> String {
        self.wait_for_any(&[text])
    }

    fn wait_for_any(&mut self, texts: &[&str]) -> String {
        let end = Instant::now() + TIMEOUT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.said.push(line.clone());
                    if texts.iter().any(|text| line.contains(text)) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    panic!("no line with {texts:?}; the server said {:#?}", self.said)
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!(
                        "the server ended without {texts:?}; it said {:#?}",
                        self.said
                    )
                }
            }
        }
    }

    /// Waits until the server listens, for the first time or again.
    pub fn wait_until_it_listens(&mut self) {
        self.wait_for_any(&[LISTENING, READY]);
    }

    /// All lines that [`wait_for`](Self::wait_for) went past.
    pub fn said(&self) -> &[String] {
        &self.said
    }

    /// Connects to the socket.
    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(self.socket()).unwrap()
    }

    /// A session as `profile` has it, with INIT done.
    pub fn session(&self, profile: Profile, options: &Options) -> Client<Session> {
        let session = profile.connect(self.connect(), options).unwrap();
        let mut client = Client::new(session);
        client.init().unwrap();
        // Answered when what came before has been dealt with, and what came along with it closed.
        client.guest().connection.get_features().unwrap();
        client
    }

    /// How many descriptors the process has of files whose path begins like this in the share.
    pub fn descriptors_of(&self, name: &str) -> usize {
        // A server in a mount namespace of its own has the share as its root.
        let prefixes = [self.share(), "/".into()].map(|share| share.join(name));
        let prefixes = prefixes.map(|prefix| prefix.to_str().unwrap().to_owned());
        let begins = |target: &Path| {
            let target = target.to_str().unwrap_or_default();
            prefixes.iter().any(|prefix| target.starts_with(prefix))
        };
        let fds = format!("/proc/{}/fd", self.pid());
        std::fs::read_dir(fds)
            .unwrap()
            .filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
            .filter(|target| begins(target))
            .count()
    }

    /// Kills the process that serves, and starts another one on the same socket and share with
    /// these arguments, which listens when this returns.
    pub fn replace_killed(&mut self, args: &[&str]) {
        let pid = i32::try_from(self.pid()).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        self.wait();
        self.start_again(args);
    }

    /// Starts another server on the same socket and share, which listens when this returns; the one
    /// from before has ended.
    pub fn start_again(&mut self, args: &[&str]) {
        self.launch_again(args);
        self.wait_for(LISTENING);
    }

    /// As [`start_again`](Self::start_again), without waiting for anything.
    pub fn launch_again(&mut self, args: &[&str]) {
        let mut command = command();
        command
            .arg("--socket")
            .arg(self.socket())
            .arg("--shared-dir")
            .arg(self.share())
            .args(["--log-level", "debug"])
            .args(args);
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap());
        *self = Self::spawn(command, dir);
    }

    /// Sends a signal, as a launcher would: to the process that it has started.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = i32::try_from(self.child.id()).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for the end; a server that doesn't end fails the test.
    pub fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + TIMEOUT;
        while Instant::now() < end {
            // The end of its standard error is the end of the process.
            match self.lines.recv_timeout(end - Instant::now()) {
                Ok(line) => self.said.push(line),
                Err(_) => break,
            }
        }
        if let Some(status) = self.child.try_wait().unwrap() {
            return status;
        }
        assert!(
            Instant::now() < end,
            "the server doesn't end; it said {:#?}",
            self.said
        );
        self.child.wait().unwrap()
    }

    /// What the process holds: descriptors, mappings, threads.
    pub fn holdings(&self) -> Holdings {
        let proc = Path::new("/proc").join(self.pid().to_string());
        let count = |what: &str| std::fs::read_dir(proc.join(what)).unwrap().count();
        let maps = std::fs::read_to_string(proc.join("maps")).unwrap();
        Holdings {
            descriptors: count("fd"),
            threads: count("task"),
            guest_mappings: maps.lines().filter(of_a_guest).count(),
            mappings: maps.lines().count(),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let status = self.child.wait();
        if std::thread::panicking() {
            self.said.extend(self.lines.try_iter());
            let signal = status.map(|status| status.signal());
            eprintln!("the server ({signal:?}) said: {:#?}", self.said);
        }
    }
}

/// The process that serves, of a server that was started as that.
pub fn child_of(guardian: u32) -> Option<u32> {
    // Not on every kernel.
    let children = format!("/proc/{guardian}/task/{guardian}/children");
    if let Ok(children) = std::fs::read_to_string(children) {
        let mut children = children.split_whitespace();
        return children.next().and_then(|pid| pid.parse().ok());
    }
    let mut serving = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
        (parent.trim().parse() == Ok(guardian)).then_some(pid)
    });
    serving.next()
}

/// Whether a mapping is of what a front end has handed over.
fn of_a_guest(line: &&str) -> bool {
    // The state table and the counters are the server's own, and outlive sessions.
    let own = ["memfd:ringfsd-state", "memfd:ringfsd-metrics"];
    line.contains("memfd:") && !own.iter().any(|name| line.contains(name))
}

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Open descriptors.
    pub descriptors: usize,
    /// Its threads.
    pub threads: usize,
    /// Mappings of what a front end has shared.
    pub guest_mappings: usize,
    /// All mappings.
    pub mappings: usize,
}

/// The program under test, which cargo has built beside the tests.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        // Cargo says where from 1.94 on, and puts tests into a folder beside programs by default.
        std::env::var_os("CARGO_BIN_EXE_ringfsd").map_or_else(
            || {
                let test = std::env::current_exe().unwrap();
                test.ancestors().nth(2).unwrap().join("ringfsd")
            },
            PathBuf::from,
        )
    })
}

/// A command that runs the program under test.
pub fn command() -> Command {
    let mut command = Command::new(program());
    command.env_remove("RINGFSD_LOG").stdin(Stdio::null());
    command
}

/// The program under test, run as another user, from a copy in `dir` that any user gets at.
pub fn command_as(user: Option<u32>, dir: &Path) -> Command {
    let Some(user) = user else { return command() };
    let copy = dir.join("ringfsd");
    copy_program(program(), &copy);
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(dir, open).unwrap();
    let mut command = Command::new("setpriv");
    let user = user.to_string();
    command
        .args(["--reuid", &user, "--regid", &user, "--clear-groups"])
        .arg(copy)
        .env_remove("RINGFSD_LOG")
        .stdin(Stdio::null());
    command
}

/// Copies a program by another process: a descriptor to write with, which a child of another test has
/// for a moment, would keep the copy from being run.
pub fn copy_program(from: &Path, to: &Path) {
    let done = Command::new("cp").arg(from).arg(to).status().unwrap();
    assert!(done.success());
}

/// Runs to its end a command that should end by itself.
pub fn output(args: &[&str]) -> std::process::Output {
    command().args(args).output().unwrap()
}
