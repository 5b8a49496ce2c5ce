//! Names and references: what stays known, what is given back, and what is refused.

use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

use rustix::io::Errno;
use tempfile::TempDir;

use super::{
    FileSystem, Lower, O_RDONLY, Overlay, OverlayError, Passthrough, ROOT, Upper, c, caller, new,
    options, overlay, with_overlay,
};
use crate::fs::overlay::check;
use crate::fs::{XattrFlags, passthrough};

#[test]
fn everything_that_was_looked_up_is_given_back() {
    let fill = |lower: &std::path::Path| {
        std::fs::create_dir_all(lower.join("a/b/c")).unwrap();
        for file in 0..30 {
            std::fs::write(lower.join(format!("a/b/{file}")), "x").unwrap();
        }
    };
    with_overlay(fill, |rig| {
        let before = rig.descriptors();
        let a = rig.node("a");
        let b = rig.find(a, "b").unwrap().node;
        let handle = rig.fs.opendir(&caller(), b, 0).unwrap().handle;
        let mut nodes = vec![];
        for file in 0..30 {
            let name = file.to_string();
            let node = rig.find(b, &name).unwrap().node;
            if file % 3 == 0 {
                let opened = rig.open(node, super::O_RDWR);
                rig.fs.release(node, opened.handle).unwrap();
            } else if file % 3 == 1 {
                rig.fs.unlink(&caller(), b, &c(&name)).unwrap();
            }
            nodes.push(node);
        }
        rig.fs.releasedir(b, handle).unwrap();
        // Parents first, as it happens when FORGETs overtake each other.
        for node in [a, b].into_iter().chain(nodes.iter().copied()) {
            rig.fs.forget(node, 1);
        }
        for node in [a, b].into_iter().chain(nodes) {
            let known = rig.fs.getattr(&caller(), node, None);
            assert_eq!(known.err(), Some(Errno::STALE), "{node:?}");
        }
        let closed = rig.fs.pending_closes();
        if let Some(wait) = closed {
            wait();
        }
        // Files that were closed may be kept open for a while, but by no inode.
        rig.fs.reset();
        assert!(
            rig.descriptors() <= before,
            "{} descriptors",
            rig.descriptors()
        );
    });
}

#[test]
fn merged_directory_lists_each_name_once_with_stable_offsets() {
    let fill = |lower: &std::path::Path| {
        for name in ["a", "b", "c", "d"] {
            std::fs::write(lower.join(name), name).unwrap();
        }
    };
    with_overlay(fill, |rig| {
        rig.fs.unlink(&caller(), ROOT, c"b").unwrap();
        let node = rig.node("c");
        rig.open(node, super::O_RDWR);
        rig.fs.mkdir(&caller(), ROOT, c"e", &new(0o755)).unwrap();
        let handle = rig.fs.opendir(&caller(), ROOT, 0).unwrap().handle;
        let all = rig.list(ROOT, handle, 0);
        let mut names: Vec<_> = all.iter().map(|(name, ..)| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, [".", "..", "a", "c", "d", "e"]);
        for (at, (name, _, next)) in all.iter().enumerate() {
            rig.fs
                .mknod(&caller(), ROOT, &c(&format!("new{at}")), &new(0o100_644))
                .unwrap();
            let rest = rig.list(ROOT, handle, *next);
            assert_eq!(rest.len(), all.len() - at - 1, "after {name}");
            assert_eq!(rest.first(), all.get(at + 1), "after {name}");
        }
        assert_eq!(rig.list(ROOT, handle, 0).len(), all.len() * 2);
        rig.fs.releasedir(ROOT, handle).unwrap();
    });
}

#[test]
fn hard_links_in_a_lower_layer_are_separated_and_get_numbers_of_their_own() {
    let fill = |lower: &std::path::Path| {
        std::fs::write(lower.join("a"), "x").unwrap();
        std::fs::hard_link(lower.join("a"), lower.join("b")).unwrap();
    };
    with_overlay(fill, |rig| {
        let (a, b) = (rig.node("a"), rig.node("b"));
        assert_ne!(a, b);
        assert_eq!(rig.attributes(a).inode, rig.attributes(b).inode);
        rig.open(a, super::O_RDWR);
        assert_ne!(rig.attributes(a).inode, rig.attributes(b).inode);
        assert_eq!((rig.attributes(a).links, rig.attributes(b).links), (1, 2));
        // Above, names of one file stay that.
        let linked = rig.fs.link(&caller(), a, ROOT, c"c").unwrap();
        assert_eq!((linked.node, linked.attributes.links), (a, 2));
    });
}

#[test]
fn whiteouts_replace_names_below_and_only_those() {
    let fill = |lower: &std::path::Path| std::fs::write(lower.join("a"), "x").unwrap();
    with_overlay(fill, |rig| {
        rig.fs.unlink(&caller(), ROOT, c"a").unwrap();
        let whiteout = std::fs::symlink_metadata(rig.path("upper/a")).unwrap();
        assert!(whiteout.file_type().is_char_device());
        rig.fs
            .mknod(&caller(), ROOT, c"new", &new(0o100_644))
            .unwrap();
        rig.fs.unlink(&caller(), ROOT, c"new").unwrap();
        assert!(!rig.path("upper/new").exists());
        let refused = rig.fs.mknod(&caller(), ROOT, c"device", &new(0o020_644));
        assert_eq!(refused.err(), Some(Errno::PERM));
    });
}

#[test]
fn directory_below_another_is_renamed_only_with_redirects() {
    let fill = |lower: &std::path::Path| std::fs::create_dir_all(lower.join("a/b")).unwrap();
    with_overlay(fill, |rig| {
        let rename = |from, to| rig.fs.rename(&caller(), (ROOT, from), (ROOT, to), 0);
        assert_eq!(rename(c"a", c"z"), Err(Errno::XDEV));
        rig.fs.mkdir(&caller(), ROOT, c"own", &new(0o755)).unwrap();
        assert_eq!(rename(c"own", c"z"), Ok(()));
        let whiteout = rustix::fs::RenameFlags::WHITEOUT.bits();
        let refused = rig
            .fs
            .rename(&caller(), (ROOT, c"z"), (ROOT, c"y"), whiteout);
        assert_eq!(refused, Err(Errno::INVAL));
    });
}

#[test]
fn work_directory_belongs_to_one_overlay_and_is_emptied_at_the_start() {
    with_overlay(
        |_| {},
        |rig| {
            let again = overlay(rig.dir.path(), options());
            assert!(
                matches!(again, Err(OverlayError::InUse { .. })),
                "{again:?}"
            );
        },
    );
    let dir = tempfile::tempdir().unwrap();
    for name in ["lower", "upper", "work/work/#1/inner"] {
        std::fs::create_dir_all(dir.path().join(name)).unwrap();
    }
    std::fs::write(dir.path().join("work/work/#1/inner/half"), "half").unwrap();
    let built = overlay(dir.path(), options()).unwrap();
    assert_eq!(
        std::fs::read_dir(dir.path().join("work/work"))
            .unwrap()
            .count(),
        0
    );
    drop(built);
    assert!(
        overlay(dir.path(), options()).is_ok(),
        "the lock ends with the overlay"
    );
}

#[test]
fn directories_that_contain_each_other_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["upper/inner", "work", "lower"] {
        std::fs::create_dir_all(at(name)).unwrap();
    }
    let common = check(&at("upper"), &at("work"), &[at("lower")]).unwrap();
    assert_eq!(common, dir.path().canonicalize().unwrap());
    for (upper, work, lower) in [
        ("upper", "upper", "lower"),
        ("upper", "upper/inner", "lower"),
        ("upper", "work", "upper/inner"),
        ("upper/inner", "work", "upper"),
        ("upper", "work", "."),
    ] {
        let checked = check(&at(upper), &at(work), &[at(lower)]);
        assert!(
            matches!(checked, Err(OverlayError::Nested { .. })),
            "{checked:?}"
        );
    }
    let missing = check(&at("upper"), &at("none"), &[at("lower")]);
    assert!(matches!(missing, Err(OverlayError::Directory { .. })));
    if rustix::process::geteuid().is_root() {
        let other = check(
            &at("upper"),
            std::path::Path::new("/proc/1"),
            &[at("lower")],
        );
        assert!(matches!(other, Err(OverlayError::DifferentMounts { .. })));
    }
}

#[test]
fn session_begins_anew_after_a_reset() {
    let fill = |lower: &std::path::Path| std::fs::write(lower.join("a"), "x").unwrap();
    with_overlay(fill, |rig| {
        let old = rig.node("a");
        let opened = rig.open(old, O_RDONLY);
        rig.fs.reset();
        assert!(
            rig.fs
                .file(old, opened.handle, crate::fs::HandleKind::File)
                .is_err()
        );
        let new_node = rig.node("a");
        let opened = rig.open(new_node, super::O_RDWR);
        assert_eq!(rig.content(new_node, opened.handle), b"x");
    });
}

#[test]
fn layer_without_attributes_does_not_end_requests_for_those_of_others() {
    let dir = TempDir::new().unwrap();
    for name in ["lower", "upper", "work"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
    }
    std::fs::write(dir.path().join("lower/below"), "").unwrap();
    std::fs::write(dir.path().join("upper/above"), "").unwrap();
    let without = passthrough::Options {
        xattr: false,
        max_inodes: 1000,
        ..passthrough::Options::default()
    };
    let layer = Lower {
        fs: Arc::new(Passthrough::new(&dir.path().join("lower"), without).unwrap()),
        device: Some(1),
    };
    let upper = Upper {
        fs: super::passthrough(dir.path(), false),
        device: Some(1),
        directory: "upper".into(),
        work: "work".into(),
    };
    let fs = Overlay::new(vec![layer], Some(upper), options()).unwrap();
    let node = |name| fs.lookup(&caller(), ROOT, name).unwrap().node;
    let (below, above) = (node(c"below"), node(c"above"));
    let none = XattrFlags::empty();
    let refused = [
        fs.getxattr(&caller(), below, c"user.a", 9).err(),
        fs.getxattr_len(&caller(), below, c"user.a").err(),
        fs.listxattr(&caller(), below, 9).err(),
        fs.listxattr_len(&caller(), below).err(),
        fs.removexattr(&caller(), below, c"user.a").err(),
    ];
    assert_eq!(refused, [Some(Errno::OPNOTSUPP); 5]);
    // Setting one copies the file to the layer that has them.
    for node in [above, below] {
        fs.setxattr(&caller(), node, c"user.a", b"value", none)
            .unwrap();
        let value = fs.getxattr(&caller(), node, c"user.a", 9);
        assert_eq!(value.unwrap(), b"value");
    }
}
