//! A process without inherited descriptors finds inodes whose known name is gone but that have
//! another one.

use super::restored::killed;
use super::*;
use crate::fs::passthrough::inode_table::CLOCK_AHEAD;
use crate::fs::{HandleKind, OpenFile, Replay};

/// Runs `test` with settled files and with young ones, each on a thread that can't open file
/// handles.
fn by_name_with_forgotten_inodes(test: impl Fn(Rig) + Sync) {
    for later in [0, 60_000_000_000] {
        on_a_thread(|| {
            let mut sets = rustix::thread::capabilities(None).unwrap();
            sets.effective -= rustix::thread::CapabilitySet::DAC_READ_SEARCH;
            rustix::thread::set_capabilities(None, sets).unwrap();
            CLOCK_AHEAD.set(later);
            test(Rig::new(Options::default()).unwrap());
        });
    }
}

fn link(rig: &Rig, from: &str, to: &str) {
    std::fs::hard_link(rig.path(from), rig.path(to)).unwrap();
}

fn is_there(rig: &Rig, node: NodeId, name: &str) {
    let attributes = rig.attributes(node).unwrap();
    let number = std::fs::metadata(rig.path(name)).unwrap().ino();
    assert_eq!(attributes.inode, number);
    let opened = rig.fs.open(&SUPERUSER, node, O_RDWR).unwrap();
    rig.fs.release(node, opened.handle).unwrap();
}

#[test]
fn file_without_its_known_name_is_found_by_another() {
    by_name_with_forgotten_inodes(|rig| {
        rig.host_dir("known");
        rig.host_dir("unknown");
        rig.host_dir("unknown/deep");
        rig.node("known");
        let others = ["other", "known/other", "unknown/deep/other"];
        let mut nodes = Vec::new();
        for (at, other) in others.iter().enumerate() {
            let name = format!("file{at}");
            rig.host_file(&name, "");
            link(&rig, &name, other);
            nodes.push(rig.node(&name));
            rig.fs.unlink(&SUPERUSER, ROOT, &c(&name)).unwrap();
        }
        let (rig, _) = killed(rig).next(false, &[]);
        for (node, other) in nodes.iter().zip(others) {
            is_there(&rig, *node, other);
        }
        // The same nodes under those names.
        assert_eq!(rig.node("other"), nodes[0]);
        let deep = rig.find(rig.node("unknown"), "deep").unwrap().node;
        assert_eq!(rig.find(deep, "other").unwrap().node, nodes[2]);
    });
}

#[test]
fn file_looked_up_by_another_name_first_is_the_same_node() {
    by_name_with_forgotten_inodes(|rig| {
        rig.host_file("file", "");
        link(&rig, "file", "other");
        let node = rig.node("file");
        rig.fs.unlink(&SUPERUSER, ROOT, c"file").unwrap();
        let (rig, _) = killed(rig).next(false, &[]);
        assert_eq!(rig.node("other"), node);
        is_there(&rig, node, "other");
    });
}

#[test]
fn file_replaced_by_rename_is_found_by_its_other_name() {
    by_name_with_forgotten_inodes(|rig| {
        rig.host_file("file", "");
        link(&rig, "file", "other");
        rig.host_file("new", "");
        let (node, new) = (rig.node("file"), rig.node("new"));
        let renamed = rig
            .fs
            .rename(&SUPERUSER, (ROOT, c"new"), (ROOT, c"file"), 0);
        renamed.unwrap();
        let (rig, _) = killed(rig).next(false, &[]);
        is_there(&rig, node, "other");
        is_there(&rig, new, "file");
    });
}

#[test]
fn open_file_without_its_known_name_is_reopened() {
    by_name_with_forgotten_inodes(|rig| {
        rig.host_file("file", "content");
        link(&rig, "file", "other");
        let node = rig.node("file");
        let opened = rig.fs.open(&SUPERUSER, node, O_RDWR).unwrap();
        rig.fs.unlink(&SUPERUSER, ROOT, c"file").unwrap();
        let (rig, restored) = killed(rig).next(false, &[]);
        assert_eq!((restored.files, restored.lost), (1, 0));
        let file = rig
            .fs
            .file(node, opened.handle, HandleKind::File)
            .and_then(OpenFile::host)
            .unwrap();
        assert_eq!(rustix::fs::fstat(&file).unwrap().st_size, 7);
    });
}

#[test]
fn names_changed_between_two_processes_are_found() {
    by_name_with_forgotten_inodes(|rig| {
        rig.host_dir("dir");
        rig.host_file("dir/file", "");
        let dir = rig.node("dir");
        let file = rig.find(dir, "file").unwrap().node;
        let killed = killed(rig);
        let path = |name: &str| killed.path(name);
        std::fs::rename(path("dir/file"), path("dir/renamed")).unwrap();
        std::fs::rename(path("dir"), path("moved")).unwrap();
        let (rig, _) = killed.next(false, &[]);
        is_there(&rig, file, "moved/renamed");
        assert!(rig.find(dir, "renamed").is_ok());
    });
}

#[test]
fn first_search_looks_for_all_lost_inodes_only() {
    by_name_with_forgotten_inodes(|rig| {
        rig.host_dir("dir");
        for name in ["dir/moved", "dir/stays", "gone", "renamed", "there"] {
            rig.host_file(name, "");
        }
        let dir = rig.node("dir");
        let in_dir = ["moved", "stays"].map(|name| rig.find(dir, name).unwrap().node);
        let [gone, renamed, there] = ["gone", "renamed", "there"].map(|name| rig.node(name));
        let killed = killed(rig);
        let path = |name: &str| killed.path(name);
        std::fs::rename(path("dir"), path("other")).unwrap();
        std::fs::rename(path("other/moved"), path("other/again")).unwrap();
        std::fs::remove_file(path("gone")).unwrap();
        std::fs::rename(path("renamed"), path("new")).unwrap();
        let (rig, _) = killed.next(false, &[]);
        is_there(&rig, in_dir[1], "other/stays");
        assert_eq!(rig.attributes(gone), Err(Errno::STALE));
        for node in [dir, gone, renamed] {
            assert!(rig.fs.fds().has_searched_for(node));
        }
        assert!(!rig.fs.fds().has_searched_for(there));
        is_there(&rig, in_dir[0], "other/again");
        is_there(&rig, renamed, "new");
        is_there(&rig, there, "there");
    });
}

#[test]
fn unrecorded_removal_leaves_other_name_usable() {
    by_name_with_forgotten_inodes(|rig| {
        let number = std::fs::metadata(rig.host_file("file", "")).unwrap().ino();
        link(&rig, "file", "other");
        let node = rig.node("file");
        let killed = killed(rig);
        std::fs::remove_file(killed.path("file")).unwrap();
        let (rig, _) = killed.next(false, &[]);
        assert!(rig.fs.was_removed(ROOT, c"file", number));
        is_there(&rig, node, "other");
    });
}

#[test]
fn file_without_any_name_is_stale_and_not_searched_for() {
    by_name_with_forgotten_inodes(|rig| {
        rig.host_file("file", "");
        let node = rig.node("file");
        rig.fs.unlink(&SUPERUSER, ROOT, c"file").unwrap();
        let (rig, _) = killed(rig).next(false, &[]);
        // The file that takes its number is another inode.
        rig.host_file("other", "");
        assert_eq!(rig.attributes(node), Err(Errno::STALE));
        assert!(!rig.fs.fds().has_searched_for(node));
        assert_ne!(rig.node("other"), node);
    });
}
