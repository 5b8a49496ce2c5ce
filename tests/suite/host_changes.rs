//! Files that are removed or replaced on the host while the guest relies on their names.
//!
//! A change that the guest makes must not go to an inode that its path no longer leads to: the
//! server refuses it with `ESTALE`, and Linux looks the path up again and repeats the request.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::ffi::{CStr, CString};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use testing::{Server, each_runtime, errno};
use vmm::fuse::wire::{SetattrIn, setattr};
use vmm::fuse::{Client, FuseError, Handle, ROOT};
use vmm::{Options, Profile, Session};

const STALE: Option<i32> = Some(libc::ESTALE);
const WRITE: i32 = libc::O_WRONLY;

/// What a process of the guest does with an inode.
type Act = fn(&mut Scene, u64) -> Result<(), FuseError>;

/// A guest, and the host's side of what it sees.
struct Scene {
    server: Server,
    fs: Client<Session>,
    pid: u32,
}

impl Scene {
    fn start(runtime: &str, more: &[&str]) -> Self {
        let server = Server::start(&[&["--runtime", runtime], more].concat());
        let fs = server.session(Profile::Simple, &Options::default());
        Self {
            server,
            fs,
            pid: 100,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.server.share().join(name)
    }

    fn content(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Another process of the guest makes the requests from now on.
    fn another_process(&mut self) {
        self.pid += 1;
        self.fs.set_pid(self.pid);
    }

    fn node(&mut self, parent: u64, name: &str) -> u64 {
        let name = CString::new(name).unwrap();
        self.fs.lookup(parent, &name).unwrap().nodeid
    }

    /// A file that the guest knows by its name.
    fn known(&mut self, name: &str) -> u64 {
        fs::write(self.path(name), "old\n").unwrap();
        self.node(ROOT, name)
    }

    /// Replaces a file by rename, as editors do.
    fn replace(&self, name: &str) {
        fs::write(self.path("replacement"), "new\n").unwrap();
        fs::rename(self.path("replacement"), self.path(name)).unwrap();
    }

    fn append(&mut self, node: u64, line: &[u8]) -> Result<(), FuseError> {
        let handle = self.fs.open(node, WRITE | libc::O_APPEND)?;
        let at = self.fs.fgetattr(node, handle)?.attr.size;
        self.fs.write(node, handle, at, line)?;
        self.fs.release(node, handle)
    }

    /// As Linux does: `act` with the inode that the guest knows by a name, and once more with what a
    /// lookup of the name has found, if the first is refused. Returns whether it was refused.
    fn by_path<T>(
        &mut self,
        (parent, name): (u64, &str),
        node: u64,
        mut act: impl FnMut(&mut Self, u64) -> Result<T, FuseError>,
    ) -> bool {
        match act(self, node) {
            Ok(_) => false,
            Err(error) => {
                assert_eq!(error.errno(), STALE);
                let now = self.node(parent, name);
                act(self, now).unwrap();
                true
            }
        }
    }
}

#[each_runtime]
fn write_after_host_recreates_file_is_stale_until_lookup(runtime: &str) {
    let mut scene = Scene::start(runtime, &[]);
    let node = scene.known("file");
    fs::remove_file(scene.path("file")).unwrap();
    assert_eq!(errno(scene.append(node, b"line\n")), STALE);
    assert_eq!(errno(scene.fs.lookup(ROOT, c"file")), Some(libc::ENOENT));
    fs::write(scene.path("file"), "new\n").unwrap();
    scene.another_process();
    assert!(scene.by_path((ROOT, "file"), node, |it, node| it.append(node, b"line\n")));
    assert_eq!(scene.content("file"), "new\nline\n");
}

#[each_runtime]
fn append_after_host_replaces(runtime: &str) {
    let mut scene = Scene::start(runtime, &[]);
    for round in 0..5 {
        let node = scene.known("file");
        scene.replace("file");
        let append = |it: &mut Scene, node| it.append(node, b"line\n");
        assert!(scene.by_path((ROOT, "file"), node, append), "{round}");
        assert_eq!(scene.content("file"), "new\nline\n");
    }
}

#[each_runtime]
fn read_after_host_replaces_is_of_what_was_known(runtime: &str) {
    let mut scene = Scene::start(runtime, &[]);
    let node = scene.known("file");
    scene.replace("file");
    let handle = scene.fs.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(scene.fs.read(node, handle, 0, 10).unwrap(), b"old\n");
    assert_eq!(scene.fs.getattr(node).unwrap().attr.nlink, 0);
}

#[each_runtime]
fn attributes_after_host_replaces(runtime: &str) {
    let mut scene = Scene::start(runtime, &[]);
    let times = SetattrIn {
        valid: setattr::MTIME,
        mtime: 1000,
        ..SetattrIn::default()
    };
    let node = scene.known("file");
    scene.replace("file");
    let at = (ROOT, "file");
    assert!(scene.by_path(at, node, |it, node| it.fs.chmod(node, 0o604)));
    let mode = fs::metadata(scene.path("file")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o604);
    let node = scene.node(ROOT, "file");
    scene.replace("file");
    assert!(scene.by_path(at, node, |it, node| it.fs.setattr(node, &times)));
    let node = scene.node(ROOT, "file");
    scene.replace("file");
    assert!(scene.by_path(at, node, |it, node| it.fs.truncate(node, 2)));
    assert_eq!(scene.content("file"), "ne");
}

#[each_runtime]
fn extended_attributes_after_host_replaces(runtime: &str) {
    let mut scene = Scene::start(runtime, &["--xattr"]);
    let node = scene.known("file");
    if !testing::set_on_host(&scene.path("file"), "user.x", b"1") {
        println!("SKIPPED: this file system has no extended attributes");
        return;
    }
    scene.replace("file");
    let at = (ROOT, "file");
    let set = |it: &mut Scene, node| it.fs.setxattr(node, c"user.x", b"2", 0);
    assert!(scene.by_path(at, node, set));
    let node = scene.node(ROOT, "file");
    assert_eq!(scene.fs.getxattr(node, c"user.x").unwrap(), b"2");
    scene.replace("file");
    testing::set_on_host(&scene.path("file"), "user.x", b"3");
    assert!(scene.by_path(at, node, |it, node| it.fs.removexattr(node, c"user.x")));
    let node = scene.node(ROOT, "file");
    assert_eq!(
        errno(scene.fs.getxattr(node, c"user.x")),
        Some(libc::ENODATA)
    );
}

#[each_runtime]
fn names_in_a_replaced_directory(runtime: &str) {
    let mut scene = Scene::start(runtime, &[]);
    let at = (ROOT, "dir");
    fs::create_dir(scene.path("dir")).unwrap();
    let acts: [Act; 7] = [
        |it, node| it.fs.create(node, c"new", 0o644).map(drop),
        |it, node| it.fs.mkdir(node, c"new", 0o755).map(drop),
        |it, node| {
            it.fs
                .mknod(node, c"new", libc::S_IFIFO | 0o644, 0)
                .map(drop)
        },
        |it, node| it.fs.symlink(node, c"new", c"target").map(drop),
        |it, node| it.fs.rename(node, c"there", node, c"new"),
        |it, node| {
            let file = it.fs.lookup(node, c"there")?.nodeid;
            it.fs.link(file, node, c"new").map(drop)
        },
        |it, node| {
            it.fs.unlink(node, c"there")?;
            it.fs.create(node, c"new", 0o644).map(drop)
        },
    ];
    for (n, act) in acts.into_iter().enumerate() {
        fs::write(scene.path("dir/there"), "old").unwrap();
        let node = scene.node(ROOT, "dir");
        let aside = format!("aside{n}");
        fs::rename(scene.path("dir"), scene.path(&aside)).unwrap();
        fs::create_dir(scene.path("dir")).unwrap();
        fs::write(scene.path("dir/there"), "new").unwrap();
        assert!(scene.by_path(at, node, act), "{n}");
        fs::symlink_metadata(scene.path("dir/new")).unwrap();
        assert!(!scene.path(&aside).join("new").exists(), "{n}");
        assert_eq!(scene.content(&format!("{aside}/there")), "old", "{n}");
        fs::remove_dir_all(scene.path("dir")).unwrap();
        fs::create_dir(scene.path("dir")).unwrap();
    }
}

#[each_runtime]
fn names_in_a_removed_directory(runtime: &str) {
    let mut scene = Scene::start(runtime, &[]);
    fs::create_dir(scene.path("dir")).unwrap();
    let node = scene.node(ROOT, "dir");
    fs::remove_dir(scene.path("dir")).unwrap();
    fs::create_dir(scene.path("dir")).unwrap();
    let create = |it: &mut Scene, node| it.fs.create(node, c"new", 0o644);
    assert!(scene.by_path((ROOT, "dir"), node, create));
    assert!(scene.path("dir/new").exists());
}

#[each_runtime]
fn file_in_a_replaced_directory(runtime: &str) {
    let mut scene = Scene::start(runtime, &[]);
    fs::create_dir_all(scene.path("one/two")).unwrap();
    fs::write(scene.path("one/two/file"), "old\n").unwrap();
    let one = scene.node(ROOT, "one");
    let two = scene.node(one, "two");
    let file = scene.node(two, "file");
    fs::rename(scene.path("one"), scene.path("aside")).unwrap();
    fs::create_dir_all(scene.path("one/two")).unwrap();
    fs::write(scene.path("one/two/file"), "new\n").unwrap();
    assert_eq!(errno(scene.append(file, b"line\n")), STALE);
    // Each name is looked up again.
    let one = scene.node(ROOT, "one");
    let two = scene.node(one, "two");
    let file = scene.node(two, "file");
    scene.append(file, b"line\n").unwrap();
    assert_eq!(scene.content("one/two/file"), "new\nline\n");
    assert_eq!(scene.content("aside/two/file"), "old\n");
}

#[each_runtime]
fn append_after_host_keeps_a_backup(runtime: &str) {
    let mut scene = Scene::start(runtime, &[]);
    let append = |it: &mut Scene, node| it.append(node, b"line\n");
    // By a hard link, and by rename.
    for by_link in [true, false] {
        let node = scene.known("file");
        if by_link {
            fs::hard_link(scene.path("file"), scene.path("file~")).unwrap();
            scene.replace("file");
        } else {
            fs::rename(scene.path("file"), scene.path("file~")).unwrap();
            fs::write(scene.path("file"), "new\n").unwrap();
        }
        assert!(scene.by_path((ROOT, "file"), node, append));
        assert_eq!(scene.content("file"), "new\nline\n");
        assert_eq!(scene.content("file~"), "old\n");
        fs::remove_file(scene.path("file")).unwrap();
        fs::remove_file(scene.path("file~")).unwrap();
    }
}

#[each_runtime]
fn link_of_a_replaced_file(runtime: &str) {
    let mut scene = Scene::start(runtime, &[]);
    let node = scene.known("file");
    fs::rename(scene.path("file"), scene.path("aside")).unwrap();
    fs::write(scene.path("file"), "new\n").unwrap();
    let link = |it: &mut Scene, node| it.fs.link(node, ROOT, c"linked");
    assert!(scene.by_path((ROOT, "file"), node, link));
    assert_eq!(scene.content("linked"), "new\n");
}

#[each_runtime]
fn file_with_two_known_names_is_written_by_either(runtime: &str) {
    let mut scene = Scene::start(runtime, &[]);
    let node = scene.known("one");
    fs::hard_link(scene.path("one"), scene.path("two")).unwrap();
    assert_eq!(scene.node(ROOT, "two"), node);
    fs::remove_file(scene.path("two")).unwrap();
    let append = |it: &mut Scene, node| it.append(node, b"line\n");
    // It is known by the name that it has lost; a lookup of the other one finds the same inode.
    assert!(scene.by_path((ROOT, "one"), node, append));
    assert!(!scene.by_path((ROOT, "one"), node, append));
    assert_eq!(scene.content("one"), "old\nline\nline\n");
}

#[each_runtime]
fn open_file_is_changed_after_host_removes_it(runtime: &str) {
    let mut scene = Scene::start(runtime, &[]);
    let node = scene.known("file");
    let handle = scene.fs.open(node, libc::O_RDWR).unwrap();
    fs::remove_file(scene.path("file")).unwrap();
    assert_eq!(scene.fs.write(node, handle, 0, b"more").unwrap(), 4);
    // fchmod(2), futimens(2) and fsetxattr(2) don't say that they come of a descriptor.
    assert_eq!(
        scene.fs.chmod(node, 0o600).unwrap().attr.mode & 0o777,
        0o600
    );
    assert_eq!(scene.fs.read(node, handle, 0, 10).unwrap(), b"more");
    scene.fs.release(node, handle).unwrap();
    assert_eq!(errno(scene.fs.chmod(node, 0o644)), STALE);
}

#[each_runtime]
fn repeated_request_after_estale_succeeds_once(runtime: &str) {
    let mut scene = Scene::start(runtime, &[]);
    let node = scene.known("file");
    fs::remove_file(scene.path("file")).unwrap();
    // As by /proc/self/fd: Linux repeats the request, and looks nothing up.
    for _ in 0..3 {
        assert_eq!(errno(scene.fs.open(node, WRITE)), STALE);
        let handle = scene.fs.open(node, WRITE).unwrap();
        scene.fs.release(node, handle).unwrap();
    }
    // A working directory that has been moved, and one that has been removed.
    fs::create_dir(scene.path("dir")).unwrap();
    let dir = scene.node(ROOT, "dir");
    fs::rename(scene.path("dir"), scene.path("moved")).unwrap();
    assert_eq!(errno(scene.fs.mkdir(dir, c"new", 0o755)), STALE);
    scene.fs.mkdir(dir, c"new", 0o755).unwrap();
    assert!(scene.path("moved/new").exists());
    fs::remove_dir_all(scene.path("moved")).unwrap();
    assert_eq!(errno(scene.fs.mkdir(dir, c"new", 0o755)), STALE);
    assert_eq!(
        errno(scene.fs.mkdir(dir, c"new", 0o755)),
        Some(libc::ENOENT)
    );
}

#[each_runtime]
fn repeated_request_never_fails(runtime: &str) {
    let mut scene = Scene::start(runtime, &[]);
    let node = scene.known("file");
    for _ in 0..10 {
        scene.replace("file");
        assert_eq!(errno(scene.append(node, b"line\n")), STALE);
        let now = scene.node(ROOT, "file");
        // Replaced again between the lookup and what it was for.
        scene.replace("file");
        scene.append(now, b"line\n").unwrap();
        // That holds once, and for this process.
        assert_eq!(errno(scene.append(now, b"line\n")), STALE);
        scene.another_process();
        assert_eq!(errno(scene.append(now, b"line\n")), STALE);
    }
}

#[each_runtime]
fn emptied_file_may_be_replaced_as_it_is_opened(runtime: &str) {
    let mut scene = Scene::start(runtime, &[]);
    let node = scene.known("file");
    let handle = scene.fs.open(node, WRITE).unwrap();
    scene.replace("file");
    // What follows the OPEN of `O_TRUNC`; it names no handle.
    scene.fs.truncate(node, 0).unwrap();
    // truncate(2) of a path.
    assert_eq!(errno(scene.fs.truncate(node, 0)), STALE);
    scene.fs.release(node, handle).unwrap();
    assert_eq!(scene.content("file"), "new\n");
}

fn unlinked_file_that_guest_has_open(scene: &mut Scene) {
    let known = |scene: &mut Scene, name: &str| {
        let name = CString::new(name).unwrap();
        let (entry, handle) = scene.fs.create(ROOT, &name, 0o644).unwrap();
        scene.fs.release(entry.nodeid, handle).unwrap();
        entry.nodeid
    };
    let no_handle = Handle::raw(0);
    let change = |scene: &mut Scene, node, fh: Handle| {
        scene.fs.write(node, fh, 0, b"more").unwrap();
        scene.fs.chmod(node, 0o600).unwrap();
        scene.fs.truncate(node, 2).unwrap();
        assert_eq!(scene.fs.read(node, fh, 0, 10).unwrap(), b"mo");
    };
    let no_open = errno_of_open(scene) == Some(libc::ENOSYS);
    let each = |scene: &mut Scene, node| {
        // An `O_PATH` descriptor of the guest opens nothing before.
        if no_open {
            change(scene, node, no_handle);
        } else {
            let handle = scene.fs.open(node, libc::O_RDWR).unwrap();
            change(scene, node, handle);
            scene.fs.release(node, handle).unwrap();
        }
    };
    let node = known(scene, "unlinked");
    scene.fs.unlink(ROOT, c"unlinked").unwrap();
    each(scene, node);
    let node = known(scene, "replaced");
    known(scene, "new");
    scene.fs.rename(ROOT, c"new", ROOT, c"replaced").unwrap();
    each(scene, node);
    let node = known(scene, "one");
    scene.fs.link(node, ROOT, c"two").unwrap();
    scene.fs.unlink(ROOT, c"two").unwrap();
    scene.fs.unlink(ROOT, c"one").unwrap();
    each(scene, node);
    let (entry, handle) = scene.fs.tmpfile(ROOT, 0o644).unwrap();
    change(scene, entry.nodeid, handle);
    scene.fs.link(entry.nodeid, ROOT, c"linked").unwrap();
    assert_eq!(scene.content("linked"), "mo");
    // A name again: what the host does to that counts.
    scene.replace("linked");
    scene.fs.release(entry.nodeid, handle).unwrap();
    if !no_open {
        assert_eq!(errno(scene.fs.open(entry.nodeid, WRITE)), STALE);
    }
    // Renamed by the guest, it is known by the new name.
    let node = known(scene, "before");
    scene.fs.rename(ROOT, c"before", ROOT, c"after").unwrap();
    each(scene, node);
    assert_eq!(scene.content("after"), "mo");
    // A removed directory is gone, as the host says.
    let dir = scene.fs.mkdir(ROOT, c"dir", 0o755).unwrap().nodeid;
    scene.fs.rmdir(ROOT, c"dir").unwrap();
    assert_eq!(
        errno(scene.fs.mkdir(dir, c"new", 0o755)),
        Some(libc::ENOENT)
    );
}

fn errno_of_open(scene: &mut Scene) -> Option<i32> {
    let node = scene.known("probe");
    match scene.fs.open(node, libc::O_RDONLY) {
        Ok(handle) => {
            scene.fs.release(node, handle).unwrap();
            None
        }
        Err(error) => error.errno(),
    }
}

#[each_runtime]
fn unlinked_open_file_is_still_writable(runtime: &str) {
    let mut option_sets: Vec<&[&str]> =
        vec![&[], &["--cache=always"], &["--no-open"], &["--writeback"]];
    if rustix::process::geteuid().is_root() {
        option_sets.push(&["--inode-file-handles=mandatory"]);
    } else {
        println!("SKIPPED in part: file handles need CAP_DAC_READ_SEARCH");
    }
    for options in option_sets {
        let mut scene = Scene::start(runtime, options);
        unlinked_file_that_guest_has_open(&mut scene);
    }
}

#[each_runtime]
fn write_without_a_handle_after_host_removes(runtime: &str) {
    let mut scene = Scene::start(runtime, &["--no-open"]);
    let no_handle = Handle::raw(0);
    let node = scene.known("file");
    assert_eq!(scene.fs.write(node, no_handle, 0, b"more").unwrap(), 4);
    scene.replace("file");
    assert_eq!(errno(scene.fs.write(node, no_handle, 0, b"lost")), STALE);
    assert_eq!(errno(scene.fs.fallocate(node, no_handle, 0, 0..100)), STALE);
    assert_eq!(errno(scene.fs.chmod(node, 0o600)), STALE);
    assert_eq!(scene.fs.read(node, no_handle, 0, 10).unwrap(), b"more");
    assert!(scene.by_path((ROOT, "file"), node, |it, node| it.fs.truncate(node, 0)));
    assert_eq!(scene.content("file"), "");
    // What was renamed may still be open.
    let node = scene.node(ROOT, "file");
    fs::rename(scene.path("file"), scene.path("rotated")).unwrap();
    assert_eq!(scene.fs.write(node, no_handle, 0, b"line").unwrap(), 4);
    assert_eq!(scene.content("rotated"), "line");
}

/// Of files that a guest replaces itself no request fails, also while inodes have no descriptors.
#[each_runtime]
fn file_removed_by_guest_stays_readable_by_file_handle(runtime: &str) {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: file handles need CAP_DAC_READ_SEARCH");
        return;
    }
    for mode in ["prefer", "mandatory"] {
        let mode = format!("--inode-file-handles={mode}");
        let mut scene = Scene::start(runtime, &[&mode]);
        let make = |scene: &mut Scene, name: &CStr, content: &[u8]| {
            let (entry, handle) = scene.fs.create(ROOT, name, 0o644).unwrap();
            scene.fs.write(entry.nodeid, handle, 0, content).unwrap();
            scene.fs.release(entry.nodeid, handle).unwrap();
            entry.nodeid
        };
        for (by_rename, name) in [(true, c"file1"), (false, c"file2")] {
            let old = make(&mut scene, name, b"old");
            let idle = scene.server.descriptors_of("file");
            if by_rename {
                make(&mut scene, c"new", b"new");
                scene.fs.rename(ROOT, c"new", ROOT, name).unwrap();
            } else {
                scene.fs.unlink(ROOT, name).unwrap();
            }
            let handle = scene.fs.open(old, libc::O_RDONLY).unwrap();
            assert_eq!(scene.fs.read(old, handle, 0, 10).unwrap(), b"old");
            scene.fs.release(old, handle).unwrap();
            assert_eq!(scene.fs.getattr(old).unwrap().attr.nlink, 0);
            scene.fs.forget(old, 1).unwrap();
            assert_eq!(scene.server.descriptors_of("file"), idle);
        }
        // What fails keeps nothing.
        let dir = scene.fs.mkdir(ROOT, c"full", 0o755).unwrap().nodeid;
        scene.fs.mkdir(dir, c"inside", 0o755).unwrap();
        let before = scene.server.descriptors_of("full");
        assert_eq!(errno(scene.fs.rmdir(ROOT, c"full")), Some(libc::ENOTEMPTY));
        assert_eq!(scene.server.descriptors_of("full"), before);
    }
}

/// While a file is replaced on the host without a pause, what a guest's kernel repeats once
/// succeeds, and what is read needs no repetition.
#[each_runtime]
fn host_replaces_without_a_pause(runtime: &str) {
    let mut scene = Scene::start(runtime, &[]);
    let mut node = scene.known("file");
    let share = scene.server.share();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                fs::write(share.join("replacement"), "new\n").unwrap();
                fs::rename(share.join("replacement"), share.join("file")).unwrap();
            }
        });
        for round in 0..2000 {
            let handle = scene.fs.open(node, libc::O_RDONLY).unwrap();
            scene.fs.release(node, handle).unwrap();
            if let Err(error) = scene.append(node, b"line\n") {
                assert_eq!(error.errno(), STALE, "{round}");
                node = scene.node(ROOT, "file");
                scene.append(node, b"line\n").unwrap();
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}
