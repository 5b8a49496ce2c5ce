//! Starts a server as a launcher does, and records what the launcher, its VMM and the guest see. The
//! invariant: ringfsd under virtiofsd's name and virtiofsd itself are started in the same way.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::process::Signal;
use testing::Server;
use vmm::{Options, Profile};

use super::super::Program;
use super::super::observations::{Observation, Observer, populate};
use super::super::options::explain;

/// What the launcher waits for before it starts the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// Nothing: the socket is the launcher's.
    Nothing,
    /// A line on standard error.
    Line(&'static str),
    /// The socket.
    Socket,
    /// The socket's path with `.pid` appended.
    PidFile,
}

/// Where the server starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Directory {
    /// `/`.
    Root,
    /// The directory that is shared.
    Share,
    /// The directory of the socket.
    Socket,
}

/// How the server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The VMM disconnects.
    Vmm,
    /// The launcher sends this signal while the VMM is connected, and then the VMM ends.
    Signal(Signal),
}

/// A launcher: its command line and its environment.
#[derive(Clone, Debug)]
pub(super) struct Launcher {
    /// Arguments, separated by spaces; `%share` and `%socket` are the paths, and `%limit` is a million
    /// open files, or as many as this machine permits.
    pub(super) line: &'static str,
    /// The number of the listening socket that the launcher passes, if it makes one.
    pub(super) fd: Option<u32>,
    pub(super) wait: Wait,
    pub(super) directory: Directory,
    pub(super) umask: u32,
    /// Environment variables as the shell sets them.
    pub(super) environment: &'static str,
    /// What the command line of the server is an argument of.
    pub(super) wrapper: &'static str,
    /// An ordinary user that starts the server, if it isn't root.
    pub(super) user: Option<u32>,
    /// A script that the launcher runs instead, with `%program` for the server.
    pub(super) script: Option<&'static str>,
    pub(super) vmm: Profile,
    pub(super) endings: &'static [Ending],
    /// The directory that is shared contains the files for the guest, and is not itself their parent.
    pub(super) shares_all: bool,
}

impl Default for Launcher {
    fn default() -> Self {
        Self {
            line: "",
            fd: None,
            wait: Wait::Nothing,
            directory: Directory::Root,
            umask: 0o022,
            environment: "",
            wrapper: "",
            user: None,
            script: None,
            vmm: Profile::Qemu,
            endings: &[Ending::Vmm, Ending::Signal(Signal::TERM)],
            shares_all: false,
        }
    }
}

/// What came of a start.
#[derive(Debug)]
struct Outcome {
    /// The files beside the share while the server serves: type and mode, owner and group, name.
    files: Vec<String>,
    guest: Vec<Observation>,
    /// The status, or the signal that killed it.
    end: (Option<i32>, Option<i32>),
    /// The files when it has ended.
    left: Vec<String>,
}

/// Runs the launcher with each program, and compares.
pub(super) fn compare(launcher: &Launcher) {
    if !testing::is_root() {
        return;
    }
    if launcher.line.contains("--syslog") && Path::new("/dev/log").exists() {
        println!("SKIPPED: this host has a syslog, which is not to be written to");
        return;
    }
    let virtiofsd = Program::virtiofsd();
    for &ending in launcher.endings {
        let ours = run(launcher, &Program::persona(), ending);
        let Some(virtiofsd) = &virtiofsd else {
            continue;
        };
        let theirs = run(launcher, virtiofsd, ending);
        assert_eq!(ours.files, theirs.files, "{ending:?}");
        assert_eq!(ours.end, theirs.end, "{ending:?}");
        // virtiofsd leaves the socket that it has made, which launchers remove.
        let is_socket = |file: &&String| launcher.fd.is_none() && file.ends_with(" socket");
        let rest = |left: &[String]| -> Vec<_> {
            left.iter()
                .filter(|file| !is_socket(file))
                .cloned()
                .collect()
        };
        assert_eq!(rest(&ours.left), rest(&theirs.left), "{ending:?}");
        explain(launcher.line, &ours.guest, &theirs.guest);
    }
}

fn run(launcher: &Launcher, program: &Program, ending: Ending) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let share = path.join("share");
    std::fs::create_dir(&share).unwrap();
    populate(&share);
    let command = command(launcher, program, &path);
    let mut server = Server::spawn(command, dir);
    match launcher.wait {
        Wait::Nothing => {}
        Wait::Line(line) => {
            server.wait_for(line);
        }
        Wait::Socket => until(&mut server, || path.join("socket").exists()),
        Wait::PidFile => until(&mut server, || path.join("socket.pid").exists()),
    }
    let mut stream = None;
    until(&mut server, || {
        stream = UnixStream::connect(path.join("socket")).ok();
        stream.is_some()
    });
    let session = launcher.vmm.connect(stream.unwrap(), &Options::default());
    let mut observer = Observer::new(session.unwrap());
    let below = if launcher.shares_all {
        &share
    } else {
        Path::new("/")
    };
    let guest = observer.observe(below);
    let files = files(&path);
    if let Ending::Signal(signal) = ending {
        server.signal(signal);
    }
    drop(observer);
    let status = server.wait();
    Outcome {
        files,
        guest,
        end: (status.code(), status.signal()),
        left: self::files(&path),
    }
}

/// Waits for what nothing tells of, as launchers do.
fn until(server: &mut Server, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + testing::TIMEOUT;
    while !condition() {
        assert!(
            Instant::now() < end,
            "nothing to wait for: {:?}",
            server.said()
        );
        std::thread::yield_now();
    }
}

/// The command that starts the program as the launcher does.
fn command(launcher: &Launcher, program: &Program, dir: &Path) -> Command {
    let folder = dir.join("bin");
    std::fs::create_dir(&folder).unwrap();
    let named = folder.join("virtiofsd");
    if let Some(user) = launcher.user {
        testing::copy_program(&program.path, &named);
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir, open).unwrap();
        chown(dir, Some(user), Some(user)).unwrap();
    } else {
        symlink(&program.path, &named).unwrap();
    }
    let started = match launcher.script {
        None => named,
        Some(text) => {
            let script = folder.join("script");
            let text = text.replace("%program", named.to_str().unwrap());
            std::fs::write(&script, text).unwrap();
            script
        }
    };
    let socket = dir.join("socket");
    let directory = match launcher.directory {
        Directory::Root => Path::new("/").to_owned(),
        Directory::Share => dir.join("share"),
        Directory::Socket => dir.to_owned(),
    };
    let permitted = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let permitted = permitted.unwrap_or(u64::MAX);
    let line = launcher
        .line
        .replace("%share", dir.join("share").to_str().unwrap())
        .replace("%socket", socket.to_str().unwrap())
        .replace("%limit", &permitted.min(1_048_576).to_string());
    let mut prefix = Vec::new();
    if let Some(user) = launcher.user {
        prefix.push(format!(
            "setpriv --reuid {user} --regid {user} --clear-groups"
        ));
    }
    prefix.push(launcher.wrapper.to_owned());
    if launcher.script.is_some() {
        prefix.push("bash".to_owned());
    }
    let mut command = Command::new("bash");
    let listener = launcher
        .fd
        .map(|_| OwnedFd::from(UnixListener::bind(&socket).unwrap()));
    // The launcher's descriptor under its number, and under no other.
    let passed = match (launcher.fd, listener.as_ref().map(AsRawFd::as_raw_fd)) {
        (Some(number), Some(own)) if i64::from(number) != i64::from(own) => {
            format!("{number}<&{own} {own}<&-")
        }
        _ => String::new(),
    };
    let script = format!(
        "umask {umask:03o}; cd \"$0\" || exit 99; {environment} exec {prefix} \"$@\" {passed}",
        umask = launcher.umask,
        environment = launcher.environment,
        prefix = prefix.join(" "),
    );
    command
        .args(["-c", &script])
        .arg(directory)
        .arg(started)
        .args(line.split(' '))
        .env_remove("RINGFSD_LOG")
        .env_remove("RUST_LOG")
        .stdin(Stdio::null());
    if let Some(listener) = listener {
        let keep_open =
            move || rustix::io::fcntl_setfd(listener.as_fd(), rustix::io::FdFlags::empty());
        // SAFETY: between fork and exec only fcntl is called, which is safe there.
        unsafe { command.pre_exec(move || Ok(keep_open()?)) };
    }
    command
}

/// The files beside the share and the program: type and mode, owner and group, name.
fn files(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    let mut files: Vec<_> = entries
        .filter(|entry| entry.file_name() != "share" && entry.file_name() != "bin")
        .map(|entry| {
            let metadata = entry.metadata().unwrap();
            let (mode, uid, gid) = (metadata.mode(), metadata.uid(), metadata.gid());
            let name = entry.file_name().into_string().unwrap();
            format!("{mode:o} {uid}:{gid} {name}")
        })
        .collect();
    files.sort();
    files
}
