//! Under the name `virtiofsd`, or with `--compat virtiofsd`, the program does what virtiofsd does:
//! compared with virtiofsd itself where it is installed, and with what was measured of it elsewhere.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![allow(
    unsafe_code,
    reason = "a launcher keeps a descriptor open for its child"
)]

mod ends;
mod files;
mod launch_lines;
mod log;
mod observations;
mod options;
mod spellings;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ringfsd::internals::cli::{DIFFERENCES, Difference, Persona};
use testing::Server;
use vmm::fuse::{Client, ROOT};
use vmm::{Options, Profile};

/// A program, and the name that it is started under.
#[derive(Clone, Debug)]
struct Program {
    path: PathBuf,
    name: &'static str,
}

impl Program {
    fn own() -> Self {
        Self {
            path: env!("CARGO_BIN_EXE_ringfsd").into(),
            name: "ringfsd",
        }
    }

    /// ringfsd in virtiofsd's place.
    fn persona() -> Self {
        Self {
            name: "/usr/libexec/virtiofsd",
            ..Self::own()
        }
    }

    /// virtiofsd itself, 1.14.
    fn virtiofsd() -> Option<Self> {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        let home = std::env::var_os("HOME").unwrap_or_default();
        let cargo = PathBuf::from(home).join(".cargo/bin");
        let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/bin");
        let folders = std::env::split_paths(&paths).chain([cargo, built]);
        let given = std::env::var_os("VIRTIOFSD").map(PathBuf::from);
        let mut candidates = given
            .into_iter()
            .chain(folders.map(|folder| folder.join("virtiofsd")));
        let path = candidates.find_map(|path| {
            let version = Command::new(&path).arg("--version").output().ok()?;
            let text = String::from_utf8_lossy(&version.stdout).into_owned();
            (text.trim() == "virtiofsd 1.14.0").then_some(path)
        });
        if path.is_none() {
            println!("SKIPPED in part: virtiofsd 1.14 is not installed");
        }
        path.map(|path| Self {
            path,
            name: "virtiofsd",
        })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command
            .arg0(self.name)
            .env_remove("RINGFSD_LOG")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        command
    }

    /// Starts it with a socket and a share, and waits until it listens.
    fn serve(&self, args: &[&str]) -> Server {
        let (mut command, dir) = self.command_in_place();
        command.args(args);
        let mut server = Server::spawn(command, dir);
        server.wait_until_it_listens();
        server
    }

    fn command_in_place(&self) -> (Command, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("share")).unwrap();
        let mut command = self.command();
        command
            .arg("--socket-path")
            .arg(dir.path().join("socket"))
            .arg("--shared-dir")
            .arg(dir.path().join("share"));
        (command, dir)
    }

    /// As [`command_in_place`](Self::command_in_place), by an ordinary user, from a copy under the name
    /// `virtiofsd`.
    fn command_in_place_as(&self, user: u32) -> (Command, tempfile::TempDir) {
        let (as_root, dir) = self.command_in_place();
        let copy = dir.path().join("virtiofsd");
        testing::copy_program(&self.path, &copy);
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap();
        std::os::unix::fs::chown(dir.path(), Some(user), Some(user)).unwrap();
        let mut command = Command::new("setpriv");
        let user = user.to_string();
        command
            .args(["--reuid", &user, "--regid", &user, "--clear-groups"])
            .arg(copy)
            .args(as_root.get_args())
            .env_remove("RINGFSD_LOG")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        (command, dir)
    }

    /// Starts it with a listening socket that a launcher has made, which has the usual path.
    fn serve_inherited(&self, args: &[&str]) -> Server {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("share")).unwrap();
        let socket = UnixListener::bind(dir.path().join("socket")).unwrap();
        let socket = OwnedFd::from(socket);
        let mut command = self.command();
        command
            .arg(format!("--fd={}", socket.as_raw_fd()))
            .arg("--shared-dir")
            .arg(dir.path().join("share"))
            .args(args);
        let keep_open =
            move || rustix::io::fcntl_setfd(socket.as_fd(), rustix::io::FdFlags::empty());
        // SAFETY: between fork and exec only fcntl is called, which is safe there.
        unsafe { command.pre_exec(move || Ok(keep_open()?)) };
        let mut server = Server::spawn(command, dir);
        server.wait_until_it_listens();
        server
    }
}

/// The rows of the manual's table of differences.
fn rows_of_manual() -> Vec<String> {
    let manual = include_str!("../../docs/manual.md");
    let heading = "| | ringfsd | virtiofsd | why |";
    let table = manual.lines().skip_while(|line| *line != heading);
    let rows = table.skip(2).take_while(|line| line.starts_with('|'));
    rows.map(str::to_owned).collect()
}

#[test]
fn manual_shows_the_table_of_differences() {
    let rows: Vec<_> = DIFFERENCES
        .iter()
        .map(|difference| {
            let Difference {
                subject,
                ringfsd,
                virtiofsd,
                why,
            } = difference;
            format!("| {subject} | {ringfsd} | {virtiofsd} | {why} |")
        })
        .collect();
    assert_eq!(rows_of_manual(), rows, "{}", rows.join("\n"));
}

#[test]
fn persona_is_chosen_by_name_and_by_option() {
    let version = |program: Program, args: &[&str]| {
        let output = program.command().args(args).arg("--version").output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    let is_virtiofsd = |text: String| text.starts_with("virtiofsd 1.14.0 (ringfsd ");
    assert!(is_virtiofsd(version(Program::persona(), &[])));
    assert!(is_virtiofsd(version(
        Program::own(),
        &["--compat=virtiofsd"]
    )));
    let own = format!("ringfsd {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(version(Program::own(), &[]), own);
    assert_eq!(version(Program::persona(), &["--compat", "ringfsd"]), own);
    assert_eq!(Persona::default(), Persona::Ringfsd);
}

#[test]
fn defaults_of_the_persona_are_those_of_virtiofsd() {
    let mut programs = vec![Program::persona()];
    programs.extend(Program::virtiofsd());
    for program in programs {
        // What is served without an option, and with one.
        for (args, served) in [(&[][..], false), (&["--xattr"][..], true)] {
            let server = program.serve(args);
            let file = server.share().join("file");
            std::fs::write(&file, "").unwrap();
            assert!(testing::set_on_host(&file, "user.x", b"1"));
            let session = Profile::Qemu.connect(server.connect(), &Options::default());
            let mut fs = Client::new(session.unwrap());
            fs.init().unwrap();
            let node = fs.lookup(ROOT, c"file").unwrap().nodeid;
            let got = fs.getxattr(node, c"user.x");
            assert_eq!(got.is_ok(), served, "{program:?} {args:?}: {got:?}");
        }
    }
}

#[test]
fn print_capabilities_says_what_virtiofsd_says() {
    let printed = |program: &Program| {
        let output = program.command().arg("--print-capabilities").output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(0));
        String::from_utf8(output.stdout).unwrap()
    };
    let own = printed(&Program::own());
    for feature in [
        "migrate-precopy",
        "posix-acl-negotiation-mode",
        "security-label-negotiation-mode",
        "separate-options",
    ] {
        assert!(own.contains(&format!("\"{feature}\"")), "{own}");
    }
    assert_eq!(printed(&Program::persona()), own);
    if let Some(virtiofsd) = Program::virtiofsd() {
        assert_eq!(printed(&virtiofsd), own);
    }
}
