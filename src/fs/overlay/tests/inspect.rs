//! What an operator sees of an overlay, and what it uses.

use super::*;
use crate::fs::{Inspect, KnownInode, OpenHandle, Page};

/// The entries of all pages of a list.
fn all<T>(page: impl Fn(u64, usize) -> Page<T>) -> Vec<T> {
    let (mut from, mut all) = (Some(0), Vec::new());
    while let Some(start) = from {
        let page = page(start, 2);
        assert!(page.entries.len() <= 2);
        // As in a list of several file systems, whose number is above these bits.
        assert!(page.next.is_none_or(|next| next > start && next < 1 << 48));
        all.extend(page.entries);
        from = page.next;
    }
    all
}

fn path(path: Option<&Vec<u8>>) -> &str {
    path.map_or("unknown", |path| std::str::from_utf8(path).unwrap())
}

fn paths(inodes: &[KnownInode]) -> Vec<(&str, u32)> {
    let inodes = inodes.iter();
    inodes
        .map(|inode| (path(inode.path.as_ref()), inode.kind))
        .collect()
}

#[test]
fn nodes_and_handles_are_listed_with_the_paths_that_the_guest_knows() {
    let fill = |lower: &Path| {
        std::fs::create_dir(lower.join("dir")).unwrap();
        std::fs::write(lower.join("dir/below"), "below").unwrap();
        std::fs::write(lower.join("copied"), "copied").unwrap();
    };
    with_overlay(fill, |rig| {
        let before = rig.fs.usage();
        assert_eq!((before.inodes, before.handles), (Some(0), Some(0)));
        assert_eq!((before.max_inodes, before.max_handles), (Some(1000), None));
        let dir = rig.node("dir");
        let below = rig.find(dir, "below").unwrap().node;
        let copied = rig.node("copied");
        let from_below = rig.open(copied, O_RDONLY).handle;
        let changed = rig.open(copied, O_RDWR).handle;
        let read = rig.open(below, O_RDONLY).handle;
        let (made, opened) = (rig.fs)
            .create(&caller(), dir, &c("made"), O_RDWR, &new(0o644))
            .unwrap();
        let listed = rig.fs.opendir(&caller(), dir, 0).unwrap().handle;

        let inodes = all(|from, limit| rig.fs.inodes(from, limit));
        let (file, directory) = (libc::S_IFREG, libc::S_IFDIR);
        let expected = [
            ("/", directory),
            ("/dir", directory),
            ("/dir/below", file),
            ("/copied", file),
            ("/dir/made", file),
        ];
        let shown = paths(&inodes);
        for (shown, expected) in shown.iter().zip(expected) {
            // The upper layer may have a file handle of what was made there, and no name.
            let in_upper = ["/copied", "/dir/made"].contains(&expected.0);
            let is_unknown = in_upper && *shown == ("unknown", expected.1);
            assert!(*shown == expected || is_unknown, "{shown:?}: {expected:?}");
        }
        assert_eq!(shown.len(), expected.len());
        assert_eq!(inodes[2].number, rig.attributes(below).inode);
        let device = std::fs::metadata(rig.path("lower")).unwrap().dev();
        let device = (libc::major(device), libc::minor(device));
        let shown = inodes[2].device;
        assert_eq!(
            (shown >> 32, shown & 0xffff_ffff),
            (device.0.into(), device.1.into())
        );
        assert_eq!(rig.fs.inode(made.node).as_ref(), inodes.last());
        assert_eq!(path(rig.fs.path(below).as_ref()), "/dir/below");
        assert_eq!(rig.fs.path(NodeId(999)), None);

        let handles = all(|from, limit| rig.fs.handles(from, limit));
        let mut shown: Vec<_> = handles
            .iter()
            .map(|open: &OpenHandle| {
                let access = open.flags & libc::O_ACCMODE.cast_unsigned();
                (
                    open.handle,
                    open.node,
                    path(open.path.as_ref()),
                    open.kind,
                    access,
                )
            })
            .collect();
        shown.sort_by_key(|open| open.0.0);
        let (file, directory) = (HandleKind::File, HandleKind::Directory);
        let mut expected = vec![
            (from_below, copied, "/copied", file, O_RDONLY),
            (changed, copied, "/copied", file, O_RDWR),
            (read, below, "/dir/below", file, O_RDONLY),
            (opened.handle, made.node, "/dir/made", file, O_RDWR),
            (listed, dir, "/dir", directory, O_RDONLY),
        ];
        expected.sort_by_key(|open| open.0.0);
        assert_eq!(shown, expected);

        let usage = rig.fs.usage();
        assert_eq!((usage.inodes, usage.handles), (Some(4), Some(5)));
        assert!(usage.descriptors > before.descriptors, "{usage:?}");
        assert!(usage.max_descriptors > usage.descriptors, "{usage:?}");
        for handle in [from_below, changed] {
            rig.fs.release(copied, handle).unwrap();
        }
        assert_eq!(rig.fs.usage().handles, Some(3));
        // The layers close what they can open again.
        let descriptors = rig.descriptors();
        let dropped = rig.fs.drop_caches();
        assert!(
            dropped.inode_descriptors + dropped.closed_files > 0,
            "{dropped:?}"
        );
        assert!(rig.descriptors() < descriptors);
        assert_eq!(rig.content(below, read), b"below");
        assert_eq!(rig.attributes(copied).size, 6);
    });
}
