//! Processes in the sandbox that try to get out, and the protection that must stop each of them.
//!
//! The server makes no forbidden system call, so this program makes them, inside the library's
//! sandbox. It has no test harness, whose threads would prevent the sandbox from forking: without
//! arguments it runs all tests, each in a process of its own, which is this program called with the
//! name of an attempt.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking"
)]
#![allow(
    unsafe_code,
    reason = "what is tried has no safe wrapper, as nobody wants it"
)]

use std::ffi::{CString, OsStr};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Output};
use std::str::FromStr;

use ringfsd::internals::sandbox::{
    self, Filter, ForkResult, HostAccess, Kind, Needs, Reach, Seccomp, Tree,
};
use ringfsd::io::Engine;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::mount::MountFlags;

/// An ordinary user.
const USER: u32 = 65534;
/// What an attempt that has come through ends with.
const OUT: u8 = 77;
/// What an attempt ends with that was refused.
const HELD: u8 = 0;

/// What is tried with namespaces, root, capabilities and Landlock to hold it, and no filter.
const ESCAPES: &[&str] = &[
    "open a path",
    "walk up from the root",
    "walk up from the descriptors",
    "change the root",
    "mount",
    "open a handle",
    "run a program",
    "open a device",
    "connect",
    "signal the host",
    "take a capability",
];

/// System calls that no runtime's filter lets through.
const FORBIDDEN: &[&str] = &[
    "execve", "ptrace", "socket", "fork", "unshare", "mprotect", "mount", "handle", "setuid",
    "kill", "ioctl",
];

/// What the program is told of an attempt.
struct Attempt {
    /// Without a sandbox.
    outside: bool,
    /// In a sandbox of two directories; the attempt is made from the first one.
    several: bool,
    kind: Kind,
    seccomp: Seccomp,
    runtime: Engine,
    share: PathBuf,
    /// A file outside of it, that everybody may read.
    secret: PathBuf,
    what: String,
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [word, rest @ ..] if word == "attempt" => attempt(&Attempt::parse(rest)),
        // Of a test harness's arguments none means anything here but the wish for a list.
        arguments if arguments.iter().any(|it| it == "--list") => ExitCode::SUCCESS,
        _ => all(),
    }
}

impl Attempt {
    fn parse(words: &[String]) -> Self {
        let [kind, seccomp, runtime, share, secret, what] = words else {
            panic!("{words:?}");
        };
        Self {
            outside: kind == "outside",
            several: kind == "several",
            kind: match kind.as_str() {
                "namespace" | "outside" | "several" => Kind::Namespace,
                "chroot" => Kind::Chroot,
                _ => Kind::None,
            },
            seccomp: match seccomp.as_str() {
                "kill" => Seccomp::Kill,
                "trap" => Seccomp::Trap,
                "log" => Seccomp::Log,
                _ => Seccomp::None,
            },
            runtime: {
                let named = |engine: &&Engine| engine.to_string() == *runtime;
                *Engine::ALL.iter().find(named).unwrap()
            },
            share: share.into(),
            secret: secret.into(),
            what: what.clone(),
        }
    }
}

/// Enters the sandbox as the server does, and tries to get out.
fn attempt(attempt: &Attempt) -> ExitCode {
    let options = sandbox::Options {
        kind: attempt.kind,
        seccomp: attempt.seccomp,
        ..sandbox::Options::default()
    };
    // Else a system that keeps cores would be told of each that is killed.
    let no_core = rustix::process::Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    rustix::process::setrlimit(rustix::process::Resource::Core, no_core).unwrap();
    let handle = Handle::of(&attempt.secret);
    if attempt.outside {
        let path = OFlags::PATH | OFlags::DIRECTORY;
        let open = |name: &Path| rustix::fs::open(name, path, Mode::empty()).unwrap();
        let place = HostAccess {
            root: open(&attempt.share),
            file: None,
            trees: Vec::new(),
            proc_fds: open(Path::new("/proc/self/fd")),
            file_handles: true,
            in_user_namespace: false,
            may_label: false,
            serving: sandbox::Serving::default(),
            descriptors: Vec::new(),
        };
        let out = gets_out(attempt, &place, handle.as_ref());
        return ExitCode::from(if out { OUT } else { HELD });
    }
    let inside = match sandbox::begin(&options, &[]).unwrap() {
        ForkResult::Guardian(mut guardian) => {
            return ExitCode::from(guardian.watch().unwrap().0.pass_on());
        }
        ForkResult::Serving(inside) => inside,
    };
    let needs = Needs {
        more_directories: false,
        readonly: false,
        file_handles: false,
    };
    let place = if attempt.several {
        let other = attempt.share.with_file_name("other");
        let trees = [&attempt.share, &other].map(|path| Tree::of(path, false));
        let mut place = inside.enter(&Reach::Trees(trees.into()), needs).unwrap();
        place.root = place.trees.remove(0).remove(0).fd;
        place
    } else {
        let reach = Reach::Share(attempt.share.clone());
        inside.enter(&reach, needs).unwrap()
    };
    let filter = Filter::new(attempt.seccomp, attempt.runtime, place.file_handles, false).unwrap();
    filter.install().unwrap();
    let out = match attempt.what.strip_prefix("call ") {
        Some(call) => {
            forbidden(call);
            true
        }
        None => match attempt.what.strip_prefix("thread: call ") {
            Some(call) => {
                let call = call.to_owned();
                std::thread::spawn(move || forbidden(&call)).join().unwrap();
                true
            }
            None if attempt.what == "live" => !lives(&place),
            None => gets_out(attempt, &place, handle.as_ref()),
        },
    };
    ExitCode::from(if out { OUT } else { HELD })
}

/// A file handle of a file that is outside, had before.
struct Handle(Vec<u8>);

impl Handle {
    fn of(path: &Path) -> Option<Self> {
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        let mut bytes = vec![0_u8; 8 + 128];
        bytes[..4].copy_from_slice(&128_u32.to_ne_bytes());
        let mut mount = 0_i32;
        // SAFETY: the buffer has the 128 bytes behind its head that it says it has.
        let done = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                libc::AT_FDCWD,
                path.as_ptr(),
                bytes.as_mut_ptr(),
                &raw mut mount,
                0,
            )
        };
        (done == 0).then_some(Self(bytes))
    }

    /// Whether it can be opened through a descriptor of its file system.
    fn opens(&self, mount: BorrowedFd<'_>) -> bool {
        let mut bytes = self.0.clone();
        // SAFETY: the buffer is what the kernel has filled.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                mount.as_raw_fd(),
                bytes.as_mut_ptr(),
                libc::O_RDONLY,
            )
        };
        fd >= 0
    }
}

/// Whether the server's operations still work: a thread, memory, a file, also after a panic.
fn lives(place: &HostAccess) -> bool {
    let thread = std::thread::spawn(|| vec![1_u8; 10 << 20].len());
    let made = rustix::fs::openat(
        &place.root,
        c"made",
        OFlags::CREATE | OFlags::WRONLY,
        Mode::from_raw_mode(0o600),
    );
    // One that tells where it was, which looks for more than it finds here.
    let panicked = std::thread::spawn(|| panic!("a panic that is survived")).join();
    panicked.is_err()
        && thread.join().unwrap() == 10 << 20
        && made.is_ok_and(|fd| rustix::io::write(fd, b"x") == Ok(1))
}

/// Tries one of [`ESCAPES`]; answers whether it has come through.
fn gets_out(attempt: &Attempt, place: &HostAccess, handle: Option<&Handle>) -> bool {
    let read = OFlags::RDONLY | OFlags::CLOEXEC;
    let secret = attempt.secret.strip_prefix("/").unwrap();
    let opens = |from: BorrowedFd<'_>, path: &Path| {
        rustix::fs::openat(from, path, read, Mode::empty()).is_ok()
    };
    let up: PathBuf = std::iter::repeat_n("..", 20).collect();
    let flags = MountFlags::empty();
    match attempt.what.as_str() {
        "open a path" => std::fs::File::open(&attempt.secret).is_ok(),
        "walk up from the root" => opens(place.root.as_fd(), &up.join(secret)),
        "walk up from the descriptors" => {
            let links = ["../root", "../../1/root", "../cwd"];
            opens(place.proc_fds.as_fd(), &up.join(secret))
                || links
                    .iter()
                    .any(|link| opens(place.proc_fds.as_fd(), &Path::new(link).join(secret)))
                || opens(
                    place.proc_fds.as_fd(),
                    Path::new("../../sys/kernel/core_pattern"),
                )
                || opens(place.proc_fds.as_fd(), Path::new("../environ"))
        }
        "change the root" => {
            let _ = rustix::fs::mkdirat(&place.root, c"sub", Mode::from_raw_mode(0o777));
            rustix::process::fchdir(&place.root).unwrap();
            let moved = rustix::process::chroot("sub").is_ok();
            let _ = rustix::process::chdir(&up);
            moved || opens(rustix::fs::CWD, secret)
        }
        "mount" => {
            // SAFETY: namespaces don't change what descriptors mean.
            let made =
                unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) };
            made.is_ok() || rustix::mount::mount("none", ".", "tmpfs", flags, None).is_ok()
        }
        "open a handle" => {
            let anchor = rustix::fs::openat(&place.root, c".", read, Mode::empty()).unwrap();
            handle.is_some_and(|handle| handle.opens(anchor.as_fd()))
        }
        "run a program" => {
            rustix::process::fchdir(&place.root).unwrap();
            Command::new("./program").status().is_ok()
        }
        "open a device" => {
            let device = rustix::fs::makedev(1, 3);
            let mode = Mode::from_raw_mode(0o666);
            let made = rustix::fs::mknodat(
                &place.root,
                c"device",
                FileType::CharacterDevice,
                mode,
                device,
            );
            // Where nothing else holds, it is the server that opens none.
            made.is_ok()
                && attempt.kind == Kind::Namespace
                && opens(place.root.as_fd(), Path::new("device"))
        }
        "connect" => {
            let port = u16::from_str(&std::env::var("CONFINEMENT_PORT").unwrap()).unwrap();
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        }
        "signal the host" => {
            let host = i32::from_str(&std::env::var("CONFINEMENT_PID").unwrap()).unwrap();
            let host = rustix::process::Pid::from_raw(host).unwrap();
            rustix::process::test_kill_process(host).is_ok()
        }
        "take a capability" => {
            use rustix::thread::{CapabilitySet, CapabilitySets};
            let all = CapabilitySets {
                effective: CapabilitySet::SYS_ADMIN,
                permitted: CapabilitySet::SYS_ADMIN,
                inheritable: CapabilitySet::empty(),
            };
            rustix::thread::set_capabilities(None, all).is_ok()
                && !rustix::thread::no_new_privs().unwrap()
        }
        other => panic!("no attempt {other:?}"),
    }
}

/// Makes a system call that the server never makes. Whether it succeeds is nothing to a filter.
fn forbidden(call: &str) {
    match call {
        "execve" => drop(Command::new("/bin/true").exec()),
        // SAFETY: asks for nothing that is allowed.
        "ptrace" => drop(unsafe { libc::ptrace(libc::PTRACE_ATTACH, 1, 0, 0) }),
        "socket" => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
        "fork" => {
            // SAFETY: the child, should there be one, ends at once.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: takes a number.
                unsafe { libc::_exit(0) }
            }
        }
        "unshare" => {
            // SAFETY: namespaces don't change what descriptors mean.
            let made =
                unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWUSER) };
            let _ = made;
        }
        "mprotect" => {
            let protection = libc::PROT_READ | libc::PROT_EXEC;
            // SAFETY: the address isn't mapped, and so nothing is changed.
            let _ = unsafe { libc::mprotect(std::ptr::null_mut(), 4096, protection) };
        }
        "mount" => drop(rustix::mount::mount(
            "none",
            "/",
            "tmpfs",
            MountFlags::empty(),
            None,
        )),
        "handle" => drop(Handle(vec![0; 136]).opens(rustix::fs::CWD)),
        // SAFETY: changes this thread's id alone, if at all.
        "setuid" => drop(unsafe { libc::syscall(libc::SYS_setuid, 0) }),
        "kill" => drop(rustix::process::test_kill_process(rustix::process::getpid())),
        // SAFETY: the request writes nothing for a descriptor that isn't open.
        "ioctl" => drop(unsafe { libc::ioctl(-1, libc::TIOCSTI, 0) }),
        // SAFETY: an address of no structure is refused.
        "io_uring_setup" => drop(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, 0) }),
        other => panic!("no call {other:?}"),
    }
}

/// The share, the secret, and this program where any user gets at it.
struct Scene {
    dir: tempfile::TempDir,
    port: u16,
    _listener: TcpListener,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("share")).unwrap();
        std::fs::create_dir(at("other")).unwrap();
        std::fs::write(at("secret"), "outside").unwrap();
        std::fs::copy(std::env::current_exe().unwrap(), at("program")).unwrap();
        std::fs::copy("/bin/true", at("share/program")).unwrap();
        for (name, mode) in [("", 0o755), ("share", 0o777), ("secret", 0o644)] {
            std::fs::set_permissions(at(name), PermissionsExt::from_mode(mode)).unwrap();
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        Self {
            dir,
            port,
            _listener: listener,
        }
    }

    fn run(&self, words: [&str; 3], user: Option<u32>, what: &str) -> Output {
        let mut command = Command::new(self.dir.path().join("program"));
        command
            .arg("attempt")
            .args(words)
            .arg(self.dir.path().join("share"))
            .arg(self.dir.path().join("secret"))
            .arg(what)
            .env("RUST_BACKTRACE", "1")
            .env("CONFINEMENT_PORT", self.port.to_string())
            .env("CONFINEMENT_PID", std::process::id().to_string());
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        let output = command.output().unwrap();
        // What one attempt has made another makes anew.
        for name in ["device", "made"] {
            let _ = std::fs::remove_file(self.dir.path().join("share").join(name));
        }
        output
    }
}

/// Counts, and prints a line for each test as others do.
#[derive(Default)]
struct Report {
    passed: usize,
    failed: usize,
}

impl Report {
    fn check(&mut self, name: &str, output: &Output, as_it_should: impl Fn(&ExitStatus) -> bool) {
        if as_it_should(&output.status) {
            self.passed += 1;
            println!("test {name} ... ok");
        } else {
            self.failed += 1;
            let said = OsStr::from_bytes(&output.stderr);
            println!("test {name} ... FAILED: {}: {said:?}", output.status);
        }
    }
}

/// Whether the scene lies on a file system whose files can be opened by handle.
fn has_handles(scene: &Scene) -> bool {
    let anchor = std::fs::File::open(scene.dir.path()).unwrap();
    let handle = Handle::of(&scene.dir.path().join("secret"));
    handle.is_some_and(|handle| handle.opens(anchor.as_fd()))
}

fn all() -> ExitCode {
    let scene = Scene::new();
    let mut report = Report::default();
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIPPED: what root does needs root");
    }
    let mut setups = vec![("namespace", None), ("several", None), ("none", None)];
    if root {
        setups.extend([
            ("chroot", None),
            ("namespace", Some(USER)),
            ("several", Some(USER)),
            ("none", Some(USER)),
        ]);
    }
    for (kind, user) in setups {
        for what in ESCAPES {
            let output = scene.run([kind, "none", "tokio"], user, what);
            let name = format!("{kind}, {user:?}: {what}");
            report.check(&name, &output, |status| status.code() == Some(HELD.into()));
        }
        for runtime in Engine::ALL.iter().map(Engine::to_string) {
            let output = scene.run([kind, "kill", &runtime], user, "live");
            let name = format!("{kind}, {user:?}, {runtime}: live");
            report.check(&name, &output, |status| status.success());
        }
    }
    let through = |status: &ExitStatus| status.code() == Some(OUT.into());
    if root {
        // Else to be held would be no feat.
        for what in ESCAPES {
            let output = scene.run(["outside", "none", "tokio"], None, what);
            if *what == "open a handle" && !has_handles(&scene) {
                println!("SKIPPED: this file system has no file handles");
                continue;
            }
            report.check(&format!("outside: {what}"), &output, through);
        }
    }
    let killed = |status: &ExitStatus| status.signal() == Some(libc::SIGSYS);
    for call in FORBIDDEN {
        for runtime in Engine::ALL.iter().map(Engine::to_string) {
            for place in ["call", "thread: call"] {
                let output =
                    scene.run(["none", "kill", &runtime], None, &format!("{place} {call}"));
                report.check(
                    &format!("{runtime}, {place} {call}: killed"),
                    &output,
                    killed,
                );
            }
        }
        let call = format!("call {call}");
        let output = scene.run(["none", "trap", "tokio"], None, &call);
        let told = String::from_utf8_lossy(&output.stderr).contains("ringfsd: system call ");
        report.check(&format!("{call}: trapped and told"), &output, |status| {
            told && status.code() == Some(1)
        });
    }
    let ring = "call io_uring_setup";
    let output = scene.run(["none", "kill", "tokio"], None, ring);
    report.check("tokio has no ring", &output, killed);
    for engine in Engine::ALL
        .iter()
        .filter(|engine| **engine != Engine::ThreadPool)
    {
        let output = scene.run(["none", "kill", &engine.to_string()], None, ring);
        report.check(&format!("{engine} has a ring"), &output, through);
    }
    for action in ["log", "none"] {
        let output = scene.run(["none", action, "tokio"], None, "call kill");
        report.check(&format!("{action} lets a call happen"), &output, through);
    }
    let Report { passed, failed } = report;
    println!("test result: {passed} passed; {failed} failed");
    ExitCode::from(u8::from(failed > 0))
}
