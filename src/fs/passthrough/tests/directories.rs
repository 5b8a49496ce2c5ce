//! READDIR and READDIRPLUS return each entry once, whatever changes in between.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;

use super::*;

struct Directory<'a> {
    rig: &'a Rig,
    node: NodeId,
    handle: Handle,
}

impl<'a> Directory<'a> {
    fn open(rig: &'a Rig, node: NodeId) -> Self {
        let handle = rig.fs.opendir(&SUPERUSER, node, 0).unwrap().handle;
        Self { rig, node, handle }
    }

    fn read(&self, offset: u64, room: usize, plus: bool) -> Vec<Listed> {
        let mut listing = Listing::new(room);
        self.rig
            .fs
            .readdir(
                &SUPERUSER,
                self.node,
                self.handle,
                offset,
                plus,
                &mut listing,
            )
            .unwrap();
        listing.listed
    }

    /// Reads to the end, `room` entries at a time.
    fn read_all(&self, mut offset: u64, room: usize, plus: bool) -> Vec<Listed> {
        let mut all = Vec::new();
        loop {
            let listed = self.read(offset, room, plus);
            match listed.last() {
                Some(last) => offset = last.next_offset,
                None => return all,
            }
            all.extend(listed);
        }
    }
}

fn names(listed: &[Listed]) -> HashSet<&str> {
    let names: HashSet<&str> = listed.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names.len(), listed.len(), "a name came twice");
    names
}

#[test]
fn readdir_of_large_directory_returns_each_entry_once() {
    in_each_mode(|rig| {
        for n in 0..10_000 {
            rig.host_file(&format!("a rather long name for a file {n}"), "");
        }
        let directory = Directory::open(rig, ROOT);
        for room in [37, 1000, usize::MAX] {
            let all = directory.read_all(0, room, false);
            assert_eq!(names(&all).len(), 10_002);
        }
        let all = directory.read_all(0, 100, true);
        assert_eq!(names(&all).len(), 10_002);
        assert_eq!(rig.fs.known_inodes(), 10_001);
        for node in all.iter().filter_map(|it| it.entry).map(|it| it.node) {
            rig.fs.forget(node, 1);
        }
        assert_eq!(rig.fs.known_inodes(), 1);
    });
}

#[test]
fn readdir_from_any_returned_offset_continues_there() {
    in_each_mode(|rig| {
        for n in 0..500 {
            rig.host_file(&n.to_string(), "");
        }
        let directory = Directory::open(rig, ROOT);
        let all = directory.read_all(0, 10, false);
        for start in [400, 3, 100, 250, 499, 1] {
            let offset = all[start].next_offset;
            let rest = directory.read_all(offset, 50, false);
            let names = |listed: &[Listed]| -> Vec<String> {
                listed.iter().map(|it| it.name.clone()).collect()
            };
            assert_eq!(names(&rest), names(&all[start + 1..]));
        }
    });
}

#[test]
fn readdir_after_rewind_returns_current_entries() {
    in_each_mode(|rig| {
        rig.host_file("old", "");
        let directory = Directory::open(rig, ROOT);
        assert!(names(&directory.read(0, 2, false)).len() == 2);
        std::fs::remove_file(rig.path("old")).unwrap();
        rig.host_file("new", "");
        let all = directory.read_all(0, 100, false);
        assert_eq!(names(&all), HashSet::from([".", "..", "new"]));
    });
}

#[test]
fn readdir_after_unlink_skips_no_other_entry() {
    in_each_mode(|rig| {
        for n in 0..3000 {
            rig.host_file(&n.to_string(), "");
        }
        let directory = Directory::open(rig, ROOT);
        let mut seen = Vec::new();
        let mut offset = 0;
        // Removes the entries that it has read, as `rm -r` does.
        loop {
            let listed = directory.read(offset, 64, true);
            let Some(last) = listed.last() else { break };
            offset = last.next_offset;
            for it in listed.iter().filter(|it| it.entry.is_some()) {
                rig.fs.unlink(&SUPERUSER, ROOT, &c(&it.name)).unwrap();
            }
            seen.extend(listed);
        }
        assert_eq!(names(&seen).len(), 3002);
        assert_eq!(std::fs::read_dir(rig.dir.path()).unwrap().count(), 0);
    });
}

#[test]
fn readdirplus_of_vanished_name_has_no_entry() {
    in_each_mode(|rig| {
        for n in 0..10 {
            rig.host_file(&n.to_string(), "");
        }
        let directory = Directory::open(rig, ROOT);
        let first = directory.read(0, 1, false);
        for n in 0..10 {
            std::fs::remove_file(rig.path(&n.to_string())).unwrap();
        }
        let rest = directory.read(first[0].next_offset, 100, true);
        assert!(rest.iter().all(|it| it.entry.is_none()));
        assert_eq!(rig.fs.known_inodes(), 1);
    });
}

#[test]
fn readdirplus_counts_one_lookup_for_each_returned_entry() {
    in_each_mode(|rig| {
        let path = rig.host_file("file", "content");
        rig.host_dir("dir");
        let file = rig.node("file");
        let directory = Directory::open(rig, ROOT);
        assert_eq!(directory.read(0, 0, true).len(), 0);
        let all = directory.read_all(0, 1, true);
        for it in &all {
            let own = it.name == "." || it.name == "..";
            assert_eq!(it.entry.is_none(), own);
        }
        let listed = all.iter().find(|it| it.name == "file").unwrap();
        let entry = listed.entry.unwrap();
        assert_eq!(entry.node, file);
        assert_eq!(entry.attributes.size, 7);
        assert_eq!(listed.inode, std::fs::metadata(path).unwrap().ino());
        assert_eq!(listed.kind, libc::DT_REG);
        rig.fs.forget(file, 2);
        assert_eq!(rig.attributes(file).err(), Some(Errno::STALE));
        let dir = all.iter().find(|it| it.name == "dir").unwrap();
        rig.fs.forget(dir.entry.unwrap().node, 1);
        assert_eq!(rig.fs.known_inodes(), 1);
    });
}

#[test]
fn readdir_of_root_hides_directory_above() {
    in_each_mode(|rig| {
        let own = std::fs::metadata(rig.dir.path()).unwrap().ino();
        let inner = rig.host_dir("dir");
        let numbers = |node| {
            let all = Directory::open(rig, node).read_all(0, 10, false);
            let of = |name| all.iter().find(|it| it.name == name).unwrap().inode;
            (of("."), of(".."))
        };
        assert_eq!(numbers(ROOT), (own, own));
        let inner = std::fs::metadata(inner).unwrap().ino();
        assert_eq!(numbers(rig.node("dir")), (inner, own));
    });
}

#[test]
fn two_handles_of_one_directory_read_independently() {
    in_each_mode(|rig| {
        for n in 0..100 {
            rig.host_file(&n.to_string(), "");
        }
        let (one, two) = (Directory::open(rig, ROOT), Directory::open(rig, ROOT));
        let first = one.read(0, 50, false);
        assert_eq!(two.read_all(0, 7, false).len(), 102);
        let rest = one.read_all(first[49].next_offset, 10, false);
        assert_eq!(first.len() + rest.len(), 102);
    });
}

/// Lists the root with one lookup of each entry. Returns the node with `name`.
fn listed_node(rig: &Rig, name: &str) -> NodeId {
    let listed = Directory::open(rig, ROOT).read_all(0, 100, true);
    let found = listed.iter().find(|it| it.name == name).unwrap();
    found.entry.as_ref().unwrap().node
}

#[test]
fn readdirplus_opens_no_inode() {
    with(Options::default(), |rig| {
        for n in 0..100 {
            rig.host_file(&n.to_string(), "");
        }
        let before = rig.fs.inode_descriptors();
        let node = listed_node(rig, "7");
        assert_eq!(rig.fs.known_inodes(), 101);
        assert_eq!(rig.fs.inode_descriptors(), before);
        let ino = std::fs::metadata(rig.path("7")).unwrap().ino();
        assert_eq!(rig.attributes(node).unwrap().inode, ino);
        assert_eq!(rig.fs.inode_descriptors(), before + 1);
        assert_eq!(listed_node(rig, "7"), node);
    });
}

#[test]
fn listed_file_replaced_on_host_is_stale() {
    with(Options::default(), |rig| {
        rig.host_file("a", "old");
        rig.host_file("b", "new");
        let node = listed_node(rig, "a");
        std::fs::rename(rig.path("b"), rig.path("a")).unwrap();
        assert_eq!(rig.attributes(node).err(), Some(Errno::STALE));
        let found = rig.find(ROOT, "a").unwrap();
        assert_ne!(found.node, node);
        assert!(rig.attributes(found.node).is_ok());
    });
}

#[test]
fn listed_file_is_found_after_rename_and_unlink() {
    with(Options::default(), |rig| {
        rig.host_file("a", "text");
        let node = listed_node(rig, "a");
        let (from, to) = (c("a"), c("b"));
        let rename = rig.fs.rename(&SUPERUSER, (ROOT, &from), (ROOT, &to), 0);
        rename.unwrap();
        rig.fs.unlink(&SUPERUSER, ROOT, &to).unwrap();
        assert_eq!(rig.attributes(node).unwrap().links, 0);
    });
}
