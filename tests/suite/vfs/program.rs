//! The program with `--vfs`: what its sandbox contains, and what it refuses.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use testing::Server;
use vmm::connection::message::protocol;
use vmm::fuse::wire::FileLock;
use vmm::fuse::{Handle, ROOT};
use vmm::{Options, Profile};

use super::{SUBMOUNT, errno};

/// A user that is not root's, where the tests run as root.
const USER: u32 = 1000;

/// Two directories with a file each, and their arguments.
struct Shared {
    dir: tempfile::TempDir,
    arguments: Vec<String>,
}

impl Shared {
    fn new(user: Option<u32>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut arguments = Vec::new();
        for name in ["one", "two"] {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("file"), name).unwrap();
            for path in [&path, &path.join("file")] {
                chown(path, user, user).unwrap();
            }
            arguments.push(format!("--vfs=/{name}={}", path.display()));
        }
        fs::write(dir.path().join("secret"), "").unwrap();
        chown(dir.path(), user, user).unwrap();
        Self { dir, arguments }
    }

    fn start(self, user: Option<u32>, arguments: &[&str]) -> (Server, PathBuf) {
        let path = self.dir.path().to_owned();
        let mut command = testing::command_as(user, self.dir.path());
        command
            .arg("--socket")
            .arg(path.join("socket"))
            .args(&self.arguments)
            .args(arguments);
        let mut server = Server::spawn(command, self.dir);
        server.wait_until_it_listens();
        (server, path)
    }
}

/// The users to test as.
fn users() -> Vec<Option<u32>> {
    match rustix::process::geteuid().is_root() {
        true => vec![None, Some(USER)],
        false => vec![None],
    }
}

fn uses_both(server: &Server, dir: &Path) {
    let mut guest = server.session(Profile::Qemu, &Options::default());
    for (name, text) in [(c"one", "one"), (c"two", "two")] {
        let root = guest.lookup(ROOT, name).unwrap().nodeid;
        let file = guest.lookup(root, c"file").unwrap().nodeid;
        let handle = guest.open(file, libc::O_RDWR).unwrap();
        assert_eq!(guest.read(file, handle, 0, 9).unwrap(), text.as_bytes());
        guest.write(file, handle, 3, b" more").unwrap();
        guest.release(file, handle).unwrap();
        let path = dir.join(text).join("file");
        assert_eq!(fs::read_to_string(path).unwrap(), format!("{text} more"));
        // Created as the caller asks, removed again.
        let made = guest.mkdir(root, c"made", 0o750).unwrap();
        assert_eq!(made.attr.mode & 0o7777, 0o750);
        guest.rmdir(root, c"made").unwrap();
    }
    assert_eq!(errno(guest.lookup(ROOT, c"secret")), libc::ENOENT);
}

#[test]
fn two_directories_are_served_in_each_sandbox() {
    for user in users() {
        for sandbox in ["--sandbox=namespace", "--sandbox=none"] {
            let (server, dir) = Shared::new(user).start(user, &[sandbox]);
            uses_both(&server, &dir);
        }
    }
}

#[test]
fn sandbox_contains_the_directories_and_nothing_else() {
    for user in users() {
        let (server, _dir) = Shared::new(user).start(user, &[]);
        let serving = server.pid();
        let root = PathBuf::from(format!("/proc/{serving}/root"));
        let mut names: Vec<_> = fs::read_dir(&root)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["0", "1"]);
        assert_eq!(fs::read_to_string(root.join("1/file")).unwrap(), "two");
        let mounts = fs::read_to_string(format!("/proc/{serving}/mountinfo")).unwrap();
        assert_eq!(mounts.lines().count(), 3, "{mounts}");
        for line in mounts.lines() {
            assert!(line.contains("nosuid,nodev,noexec"), "{line}");
        }
        assert!(
            mounts.lines().any(|line| line.contains(" / / ro,")),
            "{mounts}"
        );
    }
}

#[test]
fn readonly_applies_to_all_directories() {
    let (server, _dir) = Shared::new(None).start(None, &["--readonly"]);
    let mut guest = server.session(Profile::Qemu, &Options::default());
    for name in [c"one", c"two"] {
        let root = guest.lookup(ROOT, name).unwrap().nodeid;
        assert_eq!(errno(guest.mkdir(root, c"made", 0o755)), libc::EROFS);
    }
    let serving = server.pid();
    let mounts = fs::read_to_string(format!("/proc/{serving}/mountinfo")).unwrap();
    assert!(mounts.lines().all(|line| line.contains(" ro,")), "{mounts}");
}

#[test]
fn locks_of_each_directory_are_the_hosts() {
    let arguments = ["--posix-locks", "--no-announce-submounts"];
    let (server, dir) = Shared::new(None).start(None, &arguments);
    let mut guest = server.session(Profile::Qemu, &Options::default());
    let lock = FileLock {
        start: 0,
        end: 9,
        r#type: libc::F_WRLCK as u32,
        pid: 1,
    };
    for (name, path) in [(c"one", "one/file"), (c"two", "two/file")] {
        let root = guest.lookup(ROOT, name).unwrap();
        assert_eq!(root.attr.flags & SUBMOUNT, 0, "not announced");
        let node = guest.lookup(root.nodeid, c"file").unwrap().nodeid;
        let handle = guest.open(node, libc::O_RDWR).unwrap();
        guest.setlk(node, handle, 7, lock).unwrap();
        assert_eq!(errno(guest.setlk(node, handle, 8, lock)), libc::EAGAIN);
        let host = fs::File::options()
            .write(true)
            .open(dir.join(path))
            .unwrap();
        let nonblocking = FlockOperation::NonBlockingLockExclusive;
        let taken = rustix::fs::fcntl_lock(&host, nonblocking);
        assert_eq!(taken, Err(Errno::AGAIN), "{path}");
        guest.release(node, handle).unwrap();
    }
}

#[test]
fn directories_work_without_open_and_opendir() {
    let (server, dir) = Shared::new(None).start(None, &["--no-open", "--no-opendir"]);
    let mut guest = server.session(Profile::Qemu, &Options::default());
    assert_eq!(errno(guest.opendir(ROOT)), libc::ENOSYS);
    let none = Handle::raw(0);
    let names: Vec<_> = guest.readdir_all(ROOT, none).unwrap();
    assert_eq!(names.len(), 4, "{names:?}");
    for (name, text) in [(c"one", "one"), (c"two", "two")] {
        let root = guest.lookup(ROOT, name).unwrap().nodeid;
        assert_eq!(errno(guest.opendir(root)), libc::ENOSYS);
        assert_eq!(guest.readdirplus_all(root, none).unwrap().len(), 3);
        let file = guest.lookup(root, c"file").unwrap().nodeid;
        assert_eq!(errno(guest.open(file, libc::O_RDWR)), libc::ENOSYS);
        assert_eq!(guest.read(file, none, 0, 9).unwrap(), text.as_bytes());
        guest.write(file, none, 0, b"new").unwrap();
        assert_eq!(fs::read(dir.join(text).join("file")).unwrap(), b"new");
    }
}

/// What the program says, and its status, with these arguments beside the socket.
fn refused(arguments: &[&str]) -> (Option<i32>, String) {
    let all: Vec<_> = ["--socket=/nowhere/s"]
        .iter()
        .chain(arguments)
        .copied()
        .collect();
    let output = testing::output(&all);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), said)
}

#[test]
fn what_cannot_be_recorded_is_refused_at_the_start() {
    for source in ["--vfs=/a=/tmp", "--overlay=lower=/tmp"] {
        for option in [
            "--supervise",
            "--state=/nowhere/state",
            "--migration-mode=file-handles",
            "--sandbox=chroot",
        ] {
            let (status, said) = refused(&[source, option]);
            assert_eq!(status, Some(2), "{source} {option}: {said}");
            let name = source.split('=').next().unwrap();
            assert!(said.contains(name), "{said}");
            assert!(said.contains("use "), "what to do: {said}");
        }
    }
}

#[test]
fn migration_is_offered_for_a_single_directory_only() {
    let offers = |server: &Server| {
        let mut guest = server.session(Profile::Qemu, &Options::default());
        guest.guest().connection.has(protocol::DEVICE_STATE)
    };
    let (several, _dir) = Shared::new(None).start(None, &[]);
    assert!(!offers(&several));
    assert!(offers(&Server::start(&[])));
}

#[test]
fn impossible_sources_are_refused() {
    for (arguments, text) in [
        (
            &["--vfs=/a=/tmp", "--vfs=/a/=/"][..],
            "two file systems can't be mounted at /a",
        ),
        (&["--vfs=a=/tmp"], "absolute path"),
        (
            &["--vfs=/a=/tmp", "--shared-dir=/tmp"],
            "cannot be used with",
        ),
        (
            &["--vfs=/a=/tmp", "--overlay=lower=/tmp"],
            "cannot be used with",
        ),
        (&["--overlay=upper=/tmp"], "belong together"),
        (&["--overlay="], "needs a layer"),
        (&["--rafs=/tmp"], "--blobs"),
        (&[], "--shared-dir"),
    ] {
        let (status, said) = refused(arguments);
        assert_eq!(status, Some(2), "{arguments:?}: {said}");
        assert!(said.contains(text), "{arguments:?}: {said}");
    }
    for (arguments, text) in [
        (&["--vfs=/a=/nowhere"][..], "sharing /nowhere"),
        (
            &["--vfs=/a=/tmp", "--vfs=/b=/etc/passwd"],
            "not a directory",
        ),
    ] {
        let (status, said) = refused(arguments);
        assert_eq!(status, Some(1), "{arguments:?}: {said}");
        assert!(said.contains(text), "{arguments:?}: {said}");
    }
}

#[test]
#[cfg(not(feature = "nydus"))]
fn build_without_images_says_so() {
    for arguments in [
        &["--rafs=/b", "--blobs=/d"][..],
        &["--vfs=/i=rafs:/b,blobs=/d"],
    ] {
        let (status, said) = refused(arguments);
        assert_eq!(status, Some(2), "{said}");
        assert!(said.contains("--features nydus"), "{said}");
    }
}
