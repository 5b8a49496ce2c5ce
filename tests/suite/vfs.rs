//! Several file systems under one mount, through the real server: by the library's own service, on
//! each engine, and by the program with `--vfs`, in each sandbox.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod program;

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use ringfsd::fs::passthrough::{Options, Passthrough};
use ringfsd::fs::vfs::{MountError, MountPoint, Vfs, VfsOptions};
use ringfsd::fs::{Caller, FileSystem, HandleKind, NewNode, NodeId, OpenFile};
use ringfsd::io::{Choice, probe};
use rustix::io::Errno;
use vmm::Session;
use vmm::fuse::wire::EntryOut;
use vmm::fuse::{Client, FuseError, ROOT};

use crate::memory_tree::serve;
use crate::memory_tree::tree::MemoryTree;

type Guest = Client<Session>;

/// The flag of attributes that makes a guest's kernel mount the directory (`FUSE_ATTR_SUBMOUNT`).
const SUBMOUNT: u32 = 1;

fn point(path: &str) -> MountPoint {
    MountPoint::parse(OsStr::new(path)).unwrap()
}

fn directory(path: &Path) -> Arc<Passthrough> {
    fs::create_dir_all(path).unwrap();
    Arc::new(Passthrough::new(path, Options::default()).unwrap())
}

/// Serves `vfs` to `guest` on each engine.
fn on_each_engine(vfs: &Arc<Vfs>, guest: impl Fn(&mut Guest)) {
    let mut choices = vec![Choice::Tokio];
    match probe() {
        Ok(()) => choices.push(Choice::Uring),
        Err(reason) => println!("SKIPPED in part: {reason}"),
    }
    for runtime in choices {
        serve(vfs, runtime, &guest);
    }
}

fn errno<T: std::fmt::Debug>(result: Result<T, FuseError>) -> i32 {
    result.unwrap_err().errno().unwrap()
}

/// The names in a directory, and what READDIRPLUS says of them, read in pieces of `size` bytes.
fn list(guest: &mut Guest, node: u64, size: u32) -> Vec<(String, EntryOut)> {
    let handle = guest.opendir(node).unwrap();
    let mut all = Vec::new();
    let mut offset = 0;
    loop {
        let some = guest.readdirplus(node, handle, offset, size).unwrap();
        let Some(last) = some.last() else { break };
        offset = last.entry.offset;
        let named = some.into_iter().map(|plus| {
            let name = plus.entry.name.into_string().unwrap();
            (name, plus.node)
        });
        all.extend(named);
    }
    let plain = guest.readdir_all(node, handle).unwrap();
    let plain: Vec<_> = plain
        .iter()
        .map(|entry| entry.name.to_str().unwrap())
        .collect();
    let plus: Vec<_> = all.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(plain, plus, "READDIR lists what READDIRPLUS does");
    guest.releasedir(node, handle).unwrap();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn names(list: &[(String, EntryOut)]) -> Vec<&str> {
    list.iter().map(|(name, _)| name.as_str()).collect()
}

#[test]
fn each_mount_has_its_own_files() {
    let dir = tempfile::tempdir().unwrap();
    let vfs = Arc::new(Vfs::new(VfsOptions::default()));
    let one = directory(&dir.path().join("one"));
    vfs.mount(&point("/one"), Arc::clone(&one) as _).unwrap();
    vfs.mount(&point("/deep/two"), directory(&dir.path().join("two")))
        .unwrap();
    // One that may block beside others that may not.
    vfs.mount(&point("/memory"), Arc::new(MemoryTree::new(true)))
        .unwrap();
    on_each_engine(&vfs, |guest| {
        let listed = list(guest, ROOT, 4096);
        assert_eq!(names(&listed), [".", "..", "deep", "memory", "one"]);
        let flags = |name: &str| {
            let (_, node) = listed.iter().find(|(other, _)| other == name).unwrap();
            node.attr.flags & SUBMOUNT
        };
        assert_eq!((flags("one"), flags("memory"), flags("deep")), (1, 1, 0));
        let deep = guest.lookup(ROOT, c"deep").unwrap().nodeid;
        let nodes = [
            guest.lookup(ROOT, c"one").unwrap(),
            guest.lookup(deep, c"two").unwrap(),
            guest.lookup(ROOT, c"memory").unwrap(),
        ];
        for (number, node) in nodes.iter().enumerate() {
            assert_eq!(node.attr.flags & SUBMOUNT, SUBMOUNT);
            let (file, handle) = guest.create(node.nodeid, c"file", 0o644).unwrap();
            let data = format!("mount {number}").repeat(5000);
            let written = guest
                .write(file.nodeid, handle, 0, data.as_bytes())
                .unwrap();
            assert_eq!(written as usize, data.len());
            assert_eq!(
                guest.read(file.nodeid, handle, 0, 100_000).unwrap(),
                data.as_bytes()
            );
            guest.fsync(file.nodeid, handle, false).unwrap();
            guest.flush(file.nodeid, handle).unwrap();
            guest.release(file.nodeid, handle).unwrap();
            assert!(guest.statfs(node.nodeid).unwrap().namelen > 0);
        }
        assert!(dir.path().join("two/file").exists());
        guest.syncfs(ROOT).unwrap();
        guest.syncfs(nodes[1].nodeid).unwrap();
        // What the guest forgets is forgotten by the file system below.
        assert_eq!(one.known_inodes(), 2);
        let file = guest.lookup(nodes[0].nodeid, c"file").unwrap();
        guest.forget(file.nodeid, 2).unwrap();
        guest.statfs(nodes[0].nodeid).unwrap();
        assert_eq!(one.known_inodes(), 1, "the root alone");
        for node in nodes {
            guest.unlink(node.nodeid, c"file").unwrap();
        }
    });
    drop(vfs);
    assert_eq!(Arc::strong_count(&one), 1, "nobody else has it any more");
}

#[test]
fn names_of_mount_points_cannot_be_changed() {
    let dir = tempfile::tempdir().unwrap();
    let vfs = Arc::new(Vfs::new(VfsOptions::default()));
    vfs.mount(&point("/a"), directory(&dir.path().join("a")))
        .unwrap();
    vfs.mount(&point("/b/c"), directory(&dir.path().join("c")))
        .unwrap();
    on_each_engine(&vfs, |guest| {
        let a = guest.lookup(ROOT, c"a").unwrap().nodeid;
        let b = guest.lookup(ROOT, c"b").unwrap().nodeid;
        let c = guest.lookup(b, c"c").unwrap().nodeid;
        assert_eq!(errno(guest.mkdir(ROOT, c"new", 0o755)), libc::EROFS);
        assert_eq!(errno(guest.mkdir(ROOT, c"a", 0o755)), libc::EEXIST);
        assert_eq!(errno(guest.create(b, c"file", 0o644)), libc::EROFS);
        assert_eq!(errno(guest.rmdir(ROOT, c"a")), libc::EBUSY);
        assert_eq!(errno(guest.rmdir(ROOT, c"b")), libc::EBUSY);
        assert_eq!(errno(guest.unlink(b, c"missing")), libc::ENOENT);
        assert_eq!(errno(guest.rename(ROOT, c"a", ROOT, c"z")), libc::EBUSY);
        assert_eq!(errno(guest.chmod(b, 0o700)), libc::EROFS);
        assert_eq!(errno(guest.open(b, libc::O_RDONLY)), libc::EISDIR);
        assert_eq!(errno(guest.lookup(b, c"missing")), libc::ENOENT);
        assert_eq!(errno(guest.getxattr(b, c"user.x")), libc::ENODATA);
        assert!(guest.listxattr(b).unwrap().is_empty());
        assert_eq!(guest.statfs(b).unwrap().blocks, 0);
        // Between mounts there are no links and no renames.
        let (file, handle) = guest.create(a, c"file", 0o644).unwrap();
        guest.release(file.nodeid, handle).unwrap();
        assert_eq!(errno(guest.rename(a, c"file", c, c"file")), libc::EXDEV);
        assert_eq!(errno(guest.rename(a, c"file", b, c"c")), libc::EBUSY);
        assert_eq!(errno(guest.rename(a, c"file", b, c"file")), libc::EXDEV);
        assert_eq!(errno(guest.link(file.nodeid, c, c"file")), libc::EXDEV);
        guest.rename(a, c"file", a, c"other").unwrap();
        guest.link(file.nodeid, a, c"file").unwrap();
        guest.unlink(a, c"file").unwrap();
        guest.unlink(a, c"other").unwrap();
        // A node id that was never assigned, of a mount that never was.
        assert_eq!(errno(guest.getattr(9 << 48 | 1)), libc::ESTALE);
        assert_eq!(errno(guest.getattr(77)), libc::ESTALE);
        assert_eq!(errno(guest.getattr(u64::MAX)), libc::ESTALE);
    });
}

#[test]
fn mounts_within_another_mount_take_the_place_of_its_names() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("x/y/hidden")).unwrap();
    fs::create_dir_all(root.join("x/sub")).unwrap();
    for number in 0..50 {
        fs::write(root.join(format!("x/file {number}")), "").unwrap();
    }
    fs::write(root.join("plain"), "").unwrap();
    let vfs = Arc::new(Vfs::new(VfsOptions::default()));
    // The order doesn't matter.
    vfs.mount(&point("/x/y"), directory(&dir.path().join("y")))
        .unwrap();
    vfs.mount(&point("/new/z"), directory(&dir.path().join("z")))
        .unwrap();
    vfs.mount(&point("/"), directory(&root)).unwrap();
    vfs.mount(&point("/x/y/below"), directory(&dir.path().join("below")))
        .unwrap();
    fs::write(dir.path().join("y/visible"), "").unwrap();
    on_each_engine(&vfs, |guest| {
        for size in [400, 4096] {
            let listed = list(guest, ROOT, size);
            assert_eq!(names(&listed), [".", "..", "new", "plain", "x"]);
            let x = listed.iter().find(|(name, _)| name == "x").unwrap().1;
            assert_eq!(x.attr.flags & SUBMOUNT, 0);
            let listed = list(guest, x.nodeid, size);
            assert_eq!(listed.len(), 54, "{:?}", names(&listed));
            assert!(names(&listed).ends_with(&["file 9", "sub", "y"]));
            let y = listed.last().unwrap().1;
            assert_eq!(y.attr.flags & SUBMOUNT, SUBMOUNT);
            let listed = list(guest, y.nodeid, size);
            assert_eq!(names(&listed), [".", "..", "below", "visible"]);
        }
        let x = guest.lookup(ROOT, c"x").unwrap();
        let y = guest.lookup(x.nodeid, c"y").unwrap();
        assert_eq!(errno(guest.lookup(y.nodeid, c"hidden")), libc::ENOENT);
        guest.lookup(y.nodeid, c"visible").unwrap();
        // The directory above a mount is the one of the file system that is mounted above.
        assert_eq!(guest.lookup(y.nodeid, c"..").unwrap().nodeid, x.nodeid);
        assert_eq!(guest.lookup(x.nodeid, c"..").unwrap().nodeid, ROOT);
        assert_eq!(guest.lookup(y.nodeid, c".").unwrap().nodeid, y.nodeid);
        let sub = guest.lookup(x.nodeid, c"sub").unwrap();
        assert_eq!(guest.lookup(sub.nodeid, c"..").unwrap().nodeid, x.nodeid);
        assert_eq!(errno(guest.rmdir(ROOT, c"x")), libc::EBUSY);
        assert_eq!(errno(guest.rmdir(x.nodeid, c"y")), libc::EBUSY);
        assert_eq!(errno(guest.rename(ROOT, c"x", ROOT, c"w")), libc::EBUSY);
        assert_eq!(errno(guest.mkdir(x.nodeid, c"y", 0o755)), libc::EEXIST);
        assert_eq!(
            errno(guest.rename(x.nodeid, c"file 1", y.nodeid, c"f")),
            libc::EXDEV
        );
        // The root is writable, being a directory of the host.
        guest.mkdir(ROOT, c"made", 0o755).unwrap();
        guest.rmdir(ROOT, c"made").unwrap();
        let new = guest.lookup(ROOT, c"new").unwrap();
        assert_eq!(errno(guest.mkdir(new.nodeid, c"made", 0o755)), libc::EROFS);
        guest.lookup(new.nodeid, c"z").unwrap();
        assert_eq!(guest.lookup(new.nodeid, c"..").unwrap().nodeid, ROOT);
    });
}

#[test]
fn file_system_is_mounted_and_unmounted_while_a_guest_runs() {
    let dir = tempfile::tempdir().unwrap();
    let vfs = Arc::new(Vfs::new(VfsOptions::default()));
    vfs.mount(&point("/stays"), directory(&dir.path().join("stays")))
        .unwrap();
    on_each_engine(&vfs, |guest| {
        let there = point("/a/b");
        assert_eq!(errno(guest.lookup(ROOT, c"a")), libc::ENOENT);
        let fs = directory(&dir.path().join("b"));
        vfs.mount(&there, Arc::clone(&fs) as _).unwrap();
        let taken = vfs.mount(&there, Arc::clone(&fs) as _);
        assert_eq!(taken, Err(MountError::InUse(there.clone())));
        let a = guest.lookup(ROOT, c"a").unwrap();
        let b = guest.lookup(a.nodeid, c"b").unwrap();
        let (file, handle) = guest.create(b.nodeid, c"file", 0o644).unwrap();
        guest.write(file.nodeid, handle, 0, b"content").unwrap();
        assert_eq!(
            vfs.unmount(&point("/a")).unwrap_err(),
            MountError::NotMounted(point("/a"))
        );
        drop(vfs.unmount(&there).unwrap());
        assert_eq!(Arc::strong_count(&fs), 1, "nobody else has it any more");
        // All that the guest has of it is stale.
        assert_eq!(errno(guest.read(file.nodeid, handle, 0, 9)), libc::ESTALE);
        assert_eq!(
            errno(guest.write(file.nodeid, handle, 0, b"x")),
            libc::ESTALE
        );
        assert_eq!(errno(guest.getattr(b.nodeid)), libc::ESTALE);
        assert_eq!(errno(guest.lookup(b.nodeid, c"file")), libc::ESTALE);
        assert_eq!(errno(guest.release(file.nodeid, handle)), libc::ESTALE);
        guest.forget(file.nodeid, 1).unwrap();
        assert_eq!(errno(guest.lookup(ROOT, c"a")), libc::ENOENT);
        assert_eq!(errno(guest.getattr(a.nodeid)), libc::ESTALE);
        // What is mounted there next has node ids of its own.
        vfs.mount(&there, directory(&dir.path().join("b"))).unwrap();
        let a = guest.lookup(ROOT, c"a").unwrap();
        let again = guest.lookup(a.nodeid, c"b").unwrap();
        assert_ne!(again.nodeid, b.nodeid);
        assert_eq!(errno(guest.getattr(b.nodeid)), libc::ESTALE);
        let file = guest.lookup(again.nodeid, c"file").unwrap();
        let handle = guest.open(file.nodeid, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(file.nodeid, handle, 0, 9).unwrap(), b"content");
        guest.release(file.nodeid, handle).unwrap();
        vfs.mount(&point("/a/b/c"), directory(&dir.path().join("c")))
            .unwrap();
        let busy = vfs.unmount(&there).unwrap_err();
        assert_eq!(busy, MountError::Busy(there.clone()));
        guest.lookup(again.nodeid, c"c").unwrap();
        vfs.unmount(&point("/a/b/c")).unwrap();
        vfs.unmount(&there).unwrap();
        guest.lookup(ROOT, c"stays").unwrap();
    });
}

/// Ends what runs beside a test.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn mounts_change_while_requests_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let vfs = Arc::new(Vfs::new(VfsOptions::default()));
    vfs.mount(&point("/"), directory(&dir.path().join("root")))
        .unwrap();
    fs::create_dir_all(dir.path().join("root/x")).unwrap();
    fs::write(dir.path().join("root/x/file"), "below").unwrap();
    fs::create_dir_all(dir.path().join("y")).unwrap();
    fs::write(dir.path().join("y/file"), "mounted").unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Also if the guest fails.
        let _ends = Ends(&is_over);
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let fs = directory(&dir.path().join("y"));
                vfs.mount(&point("/x/y"), fs).unwrap();
                vfs.unmount(&point("/x/y")).unwrap();
            }
        });
        on_each_engine(&vfs, |guest| {
            let mut found = [0, 0];
            let end = Instant::now() + testing::TIMEOUT;
            while Instant::now() < end {
                let x = guest.lookup(ROOT, c"x").unwrap();
                // A name of the file system above is always there.
                let file = guest.lookup(x.nodeid, c"file").unwrap();
                match guest.lookup(x.nodeid, c"y") {
                    Ok(y) => match guest.lookup(y.nodeid, c"file") {
                        Ok(inner) => {
                            assert_eq!(inner.attr.size, 7);
                            found[0] += 1;
                        }
                        error => assert_eq!(errno(error), libc::ESTALE),
                    },
                    error => {
                        assert_eq!(errno(error), libc::ENOENT);
                        found[1] += 1;
                    }
                }
                guest
                    .batch_forget(&[(x.nodeid, 1), (file.nodeid, 1)])
                    .unwrap();
                if found.iter().all(|found| *found > 50) {
                    return;
                }
            }
            panic!("found and missed: {found:?}");
        });
    });
}

#[test]
fn open_file_of_a_directory_is_the_hosts_own() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "content").unwrap();
    let vfs = Vfs::new(VfsOptions::default());
    vfs.mount(&point("/a"), directory(dir.path())).unwrap();
    let caller = Caller::default();
    let root = vfs.lookup(&caller, NodeId::ROOT, c"a").unwrap().node;
    let node = vfs.lookup(&caller, root, c"file").unwrap().node;
    let handle = vfs.open(&caller, node, 0).unwrap().handle;
    let file = vfs.file(node, handle, HandleKind::File).unwrap();
    // The engine reads it without a copy.
    assert!(matches!(file, OpenFile::Host(_)), "{file:?}");
}

#[test]
fn file_system_that_lacks_a_request_does_not_take_it_from_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let vfs = Vfs::new(VfsOptions::default());
    vfs.mount(&point("/memory"), Arc::new(MemoryTree::new(false)))
        .unwrap();
    vfs.mount(&point("/a"), directory(dir.path())).unwrap();
    let caller = Caller {
        uid: Some(0),
        gid: Some(0),
        ..Caller::default()
    };
    let memory = vfs.lookup(&caller, NodeId::ROOT, c"memory").unwrap().node;
    let plain = NewNode {
        mode: 0o644,
        umask: 0,
        rdev: 0,
        label: None,
    };
    let (file, _) = vfs.create(&caller, memory, c"file", 2, &plain).unwrap();
    // The tree has none of these.
    assert!(vfs.statx(file.node, None).is_ok());
    assert!(vfs.whole_file_system(memory).is_ok());
    let unnamed = vfs.tmpfile(&caller, memory, 2, &plain).unwrap_err();
    assert_eq!(unnamed, Errno::OPNOTSUPP);
}

#[test]
fn session_of_a_vfs_cannot_be_recorded_or_moved() {
    let vfs = Vfs::new(VfsOptions::default());
    assert!(vfs.replay().is_none());
    assert!(vfs.migrate().is_none());
}
