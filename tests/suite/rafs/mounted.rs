//! Images and overlays among several file systems under one mount, served by the program with its
//! sandbox and its filter of system calls.

use std::fs;
use std::path::{Path, PathBuf};

use testing::{Server, command};
use vmm::fuse::{Client, ROOT};
use vmm::{Options, Profile, Session};

use super::image::{Image, everything};
use super::server::LISTENING;
use super::tree::{compare_below, try_read};

/// An image, and the directories beside it.
struct Shared {
    image: Image,
    dir: tempfile::TempDir,
}

impl Shared {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for path in [
            "plain",
            "lower",
            "one/upper",
            "one/work",
            "two/upper",
            "two/work",
            "cache",
        ] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        fs::write(dir.path().join("plain/file"), "plain").unwrap();
        fs::write(dir.path().join("lower/file"), "below").unwrap();
        fs::write(dir.path().join("lower/gone"), "").unwrap();
        fs::write(dir.path().join("secret"), "").unwrap();
        let image = Image::of(everything, &[]);
        Self { image, dir }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    /// The arguments: a directory, an image, an overlay of directories, and one on the image.
    fn mounts(&self) -> [String; 4] {
        let at = |path| self.at(path).display().to_string();
        let (bootstrap, blobs) = (self.image.bootstrap(), self.image.blobs());
        let (bootstrap, blobs) = (bootstrap.display(), blobs.display());
        [
            format!("--vfs=/plain={}", at("plain")),
            format!(
                "--vfs=/image=rafs:{bootstrap},blobs={blobs},cache-dir={}",
                self.image.cache().display()
            ),
            format!(
                "--vfs=/layers=overlay:lower={},upper={},work={},xattr=user",
                at("lower"),
                at("one/upper"),
                at("one/work")
            ),
            format!(
                "--vfs=/top=overlay:rafs={bootstrap},blobs={blobs},cache-dir={},upper={},work={},\
                 xattr=user",
                at("cache"),
                at("two/upper"),
                at("two/work")
            ),
        ]
    }

    fn start(&self, sandbox: &str) -> Server {
        let socket = tempfile::tempdir().unwrap();
        let mut command = command();
        command
            .arg("--socket")
            .arg(socket.path().join("socket"))
            .args(self.mounts())
            .args(["--log-level=info", "--seccomp=trap", "--sandbox", sandbox]);
        let mut server = Server::spawn(command, socket);
        server.wait_for(LISTENING);
        server
    }
}

fn change(guest: &mut Client<Session>, node: u64, at: u64, bytes: &[u8]) {
    let handle = guest.open(node, libc::O_RDWR).unwrap();
    guest.write(node, handle, at, bytes).unwrap();
    guest.flush(node, handle).unwrap();
    guest.release(node, handle).unwrap();
}

/// Changes the file systems that can be changed, and compares each with what the host has.
fn use_all(guest: &mut Client<Session>, shared: &Shared) {
    let [plain, image, layers, top] = [c"plain", c"image", c"layers", c"top"]
        .map(|name| guest.lookup(ROOT, name).unwrap().nodeid);
    let source = shared.image.source();
    for node in [image, top] {
        let compared = compare_below(guest, node, &source);
        assert!(
            compared.inodes > 2000 && compared.bytes > 5 << 20,
            "{compared:?}"
        );
    }
    let file = guest.lookup(plain, c"file").unwrap().nodeid;
    change(guest, file, 0, b"PLAIN");
    assert_eq!(fs::read(shared.at("plain/file")).unwrap(), b"PLAIN");
    // The image refuses, the overlay on the same image has a copy in its own upper layer.
    let of_image = guest.lookup(image, c"large").unwrap().nodeid;
    let refused = guest.open(of_image, libc::O_RDWR).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::EROFS));
    let of_top = guest.lookup(top, c"large").unwrap().nodeid;
    change(guest, of_top, 1_500_000, b"changed");
    let original = fs::read(source.join("large")).unwrap();
    let mut changed = original.clone();
    changed[1_500_000..1_500_007].copy_from_slice(b"changed");
    assert!(try_read(guest, of_top).unwrap() == changed);
    assert!(fs::read(shared.at("two/upper/large")).unwrap() == changed);
    assert!(try_read(guest, of_image).unwrap() == original);
    // A file that is still the image's doesn't end requests for files that aren't.
    let same = guest.lookup(top, c"same").unwrap().nodeid;
    let handle = guest.open(same, libc::O_RDONLY).unwrap();
    guest.flush(same, handle).unwrap();
    guest.release(same, handle).unwrap();
    // The overlay of directories.
    let file = guest.lookup(layers, c"file").unwrap().nodeid;
    change(guest, file, 0, b"above");
    guest.unlink(layers, c"gone").unwrap();
    let gone = guest.lookup(layers, c"gone").unwrap_err();
    assert_eq!(gone.errno(), Some(libc::ENOENT));
    assert_eq!(fs::read(shared.at("one/upper/file")).unwrap(), b"above");
    assert_eq!(fs::read(shared.at("lower/file")).unwrap(), b"below");
    assert!(shared.at("lower/gone").exists());
    // Nothing moves from one to another, and nothing else is there.
    let moved = guest.rename(layers, c"file", top, c"file").unwrap_err();
    assert_eq!(moved.errno(), Some(libc::EXDEV));
    let secret = guest.lookup(ROOT, c"secret").unwrap_err();
    assert_eq!(secret.errno(), Some(libc::ENOENT));
}

#[test]
fn images_and_overlays_are_served_beside_directories_in_each_sandbox() {
    if !testing::is_root() {
        return;
    }
    for sandbox in ["namespace", "none"] {
        let shared = Shared::new();
        let mut server = shared.start(sandbox);
        let mut guest = server.session(Profile::Qemu, &Options::default());
        guest.init().unwrap();
        use_all(&mut guest, &shared);
        drop(guest);
        server.signal(rustix::process::Signal::TERM);
        assert!(server.wait().success());
        // The next server has what the guest has changed.
        let server = shared.start(sandbox);
        let mut guest = server.session(Profile::Qemu, &Options::default());
        guest.init().unwrap();
        let top = guest.lookup(ROOT, c"top").unwrap().nodeid;
        let large = guest.lookup(top, c"large").unwrap().nodeid;
        let bytes = fs::read(shared.at("two/upper/large")).unwrap();
        assert!(try_read(&mut guest, large).unwrap() == bytes);
    }
}

#[test]
fn sandbox_of_images_and_overlays_contains_nothing_else() {
    if !testing::is_root() {
        return;
    }
    let shared = Shared::new();
    let server = shared.start("namespace");
    let root = PathBuf::from(format!("/proc/{}/root", server.pid()));
    let mut names: Vec<_> = fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_by_key(|name| name.parse::<usize>().expect("a number"));
    let numbers: Vec<_> = (0..names.len()).map(|number| number.to_string()).collect();
    assert_eq!(names, numbers);
    assert!(!has(&root, "secret"), "{names:?}");
    assert!(has(&root, "file"), "{names:?}");
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", server.pid())).unwrap();
    for line in mounts.lines() {
        assert!(line.contains("nosuid,nodev,noexec"), "{line}");
    }
    // Only the upper layers, the directory and the caches can be written.
    let options = mounts.lines().filter_map(|line| line.split(' ').nth(5));
    let writable = options.filter(|options| options.starts_with("rw,"));
    assert_eq!(writable.count(), 5, "{mounts}");
}

/// Whether a tree of the sandbox has this name at its top.
fn has(root: &Path, name: &str) -> bool {
    let mut trees = fs::read_dir(root).unwrap();
    trees.any(|tree| tree.unwrap().path().join(name).exists())
}
