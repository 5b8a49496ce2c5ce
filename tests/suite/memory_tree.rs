//! A file system that is no directory of the host, through the real server.
//!
//! The example `memory_tree` keeps a tree in memory. Here it is served over a socket by the library's own
//! service, to a client that speaks as a guest does, on each engine, with methods that may block and
//! without.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "../../integration/examples/memory_tree/content.rs"]
mod content;
#[path = "../../integration/examples/memory_tree/tree.rs"]
pub(crate) mod tree;

use std::sync::Arc;

use ringfsd::fs::FileSystem;
use ringfsd::io::Choice;
use ringfsd::service::SessionOptions;
use vmm::Session;
use vmm::fuse::{Client, ROOT};

use super::served::{self, engines};

use self::tree::MemoryTree;

/// Serves a tree to `guest` on each engine.
fn on_each_engine(may_block: bool, guest: impl Fn(&mut Client<Session>)) {
    for runtime in engines() {
        let tree = Arc::new(MemoryTree::new(may_block));
        serve(&tree, runtime, &guest);
        assert_eq!(Arc::strong_count(&tree), 1, "nobody else has it any more");
    }
}

/// Serves `fs` to `guest`, and returns when both have ended.
pub(crate) fn serve<F: FileSystem>(
    fs: &Arc<F>,
    runtime: Choice,
    guest: impl Fn(&mut Client<Session>),
) {
    let session = SessionOptions::default();
    served::serve(Arc::clone(fs) as _, (runtime, 2), session, guest);
}

/// What a guest does with files and names; the same wherever the methods are called.
fn uses_files(guest: &mut Client<Session>) {
    let (file, handle) = guest.create(ROOT, c"file", 0o640).unwrap();
    let data: Vec<u8> = (0..100_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    assert_eq!(guest.write(file.nodeid, handle, 3, &data).unwrap(), 100_000);
    let read = guest.read(file.nodeid, handle, 0, 200_000).unwrap();
    assert_eq!(read[..3], [0; 3], "a hole");
    assert_eq!(read[3..], data);
    assert!(
        guest
            .read(file.nodeid, handle, 100_003, 10)
            .unwrap()
            .is_empty()
    );
    guest.fsync(file.nodeid, handle, false).unwrap();
    guest.fallocate(file.nodeid, handle, 0, 0..200_000).unwrap();
    assert_eq!(guest.getattr(file.nodeid).unwrap().attr.size, 200_000);
    let huge = guest.write(file.nodeid, handle, 1 << 31, b"x").unwrap_err();
    assert_eq!(huge.errno(), Some(libc::EFBIG));
    guest.release(file.nodeid, handle).unwrap();
    let closed = guest.read(file.nodeid, handle, 0, 1).unwrap_err();
    assert_eq!(closed.errno(), Some(libc::EBADF));
}

fn uses_names(guest: &mut Client<Session>) {
    let dir = guest.mkdir(ROOT, c"dir", 0o755).unwrap();
    let (file, handle) = guest.create(dir.nodeid, c"one", 0o600).unwrap();
    guest.release(file.nodeid, handle).unwrap();
    guest.link(file.nodeid, dir.nodeid, c"two").unwrap();
    assert_eq!(guest.getattr(file.nodeid).unwrap().attr.nlink, 2);
    guest.rename(dir.nodeid, c"one", ROOT, c"three").unwrap();
    let gone = guest.lookup(dir.nodeid, c"one").unwrap_err();
    assert_eq!(gone.errno(), Some(libc::ENOENT));
    assert_eq!(guest.lookup(ROOT, c"three").unwrap().nodeid, file.nodeid);
    guest.symlink(ROOT, c"link", c"dir/two").unwrap();
    let listing = guest.opendir(ROOT).unwrap();
    let entries = guest.readdirplus_all(ROOT, listing).unwrap();
    let names: Vec<_> = entries
        .iter()
        .map(|plus| plus.entry.name.to_str().unwrap())
        .collect();
    assert_eq!(names, [".", "..", "dir", "link", "three"]);
    guest.releasedir(ROOT, listing).unwrap();
    let full = guest.rmdir(ROOT, c"dir").unwrap_err();
    assert_eq!(full.errno(), Some(libc::ENOTEMPTY));
    guest.unlink(dir.nodeid, c"two").unwrap();
    guest.rmdir(ROOT, c"dir").unwrap();
}

#[test]
fn files_in_memory_are_written_and_read() {
    on_each_engine(false, uses_files);
}

#[test]
fn files_are_the_same_where_methods_may_block() {
    on_each_engine(true, uses_files);
}

#[test]
fn names_in_memory_are_made_and_removed() {
    on_each_engine(false, uses_names);
}

#[test]
fn names_are_the_same_where_methods_may_block() {
    on_each_engine(true, uses_names);
}

#[test]
fn forgotten_inodes_without_a_name_are_gone() {
    let tree = Arc::new(MemoryTree::new(false));
    serve(&tree, Choice::Tokio, |guest| {
        let (file, handle) = guest.create(ROOT, c"file", 0o600).unwrap();
        guest.unlink(ROOT, c"file").unwrap();
        guest.write(file.nodeid, handle, 0, b"still there").unwrap();
        assert_eq!(guest.read(file.nodeid, handle, 6, 9).unwrap(), b"there");
        guest.release(file.nodeid, handle).unwrap();
        guest.forget(file.nodeid, 1).unwrap();
    });
    assert_eq!(tree.inodes(), 1, "the root alone");
}
