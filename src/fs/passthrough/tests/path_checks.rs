//! Directories that a host process moves while the guest relies on the path of what is in them.

use std::sync::Arc;

use super::*;
use crate::fs::passthrough::inode_table::Inode;

/// Enough descriptors for all that the tests use.
const ENOUGH: usize = 100;

/// What the guest knows of `one/two/file`.
struct Known {
    one: Arc<Inode>,
    two: Arc<Inode>,
    file: Arc<Inode>,
}

impl Known {
    fn new(rig: &Rig) -> Self {
        rig.host_dir("one");
        rig.host_dir("one/two");
        rig.host_file("one/two/file", "");
        let inode = |node| rig.fs.fds().inodes().any(node).unwrap();
        let one = rig.node("one");
        let two = rig.find(one, "two").unwrap().node;
        let file = rig.find(two, "file").unwrap().node;
        Self {
            one: inode(one),
            two: inode(two),
            file: inode(file),
        }
    }
}

/// Closes a descriptor as if others were needed more, which takes two attempts after a use.
fn close(rig: &Rig, inode: &Inode) {
    let closed = rig.fs.fds().close(inode) || rig.fs.fds().close(inode);
    assert!(closed && !inode.slot().is_full());
}

/// Moves `one` away, and makes another one with the same names.
fn replace_top(rig: &Rig) {
    std::fs::rename(rig.path("one"), rig.path("aside")).unwrap();
    rig.host_dir("one");
    rig.host_dir("one/two");
    rig.host_file("one/two/file", "");
}

#[test]
fn directory_counts_as_unchanged_for_two_periods_at_any_depth() {
    by_name(ENOUGH, |rig| {
        let known = Known::new(rig);
        let is_current = |inode, period| rig.fs.ops.has_current_parents(inode, period);
        let first = 1000;
        assert!(is_current(&known.two, first));
        // `two` is checked later than `one`, which is above it.
        assert!(is_current(&known.file, first + 1));
        replace_top(rig);
        assert!(is_current(&known.file, first + 1));
        assert!(!is_current(&known.file, first + 2));
        assert!(!is_current(&known.two, first + 2));
    });
}

#[test]
fn closed_directory_is_checked() {
    by_name(ENOUGH, |rig| {
        let known = Known::new(rig);
        close(rig, &known.one);
        assert!(known.two.slot().is_full());
        replace_top(rig);
        let opened = rig.fs.open(&SUPERUSER, known.file.node(), O_WRONLY);
        assert_eq!(opened.err(), Some(Errno::STALE));
    });
}

#[test]
fn closed_directory_in_its_place_is_found_current() {
    by_name(ENOUGH, |rig| {
        let known = Known::new(rig);
        close(rig, &known.one);
        rig.fs
            .open(&SUPERUSER, known.file.node(), O_WRONLY)
            .unwrap();
        assert!(known.one.slot().is_full());
    });
}
