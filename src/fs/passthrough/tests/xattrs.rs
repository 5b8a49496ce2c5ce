//! Extended attributes on every type of inode.

use std::os::unix::fs::symlink;

use rustix::fs::XattrFlags;

use super::*;

/// Reads an attribute on the host for comparison.
fn host_value(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = Vec::with_capacity(100);
    let spare = rustix::buffer::spare_capacity(&mut value);
    rustix::fs::lgetxattr(path, name, spare).ok()?;
    Some(value)
}

fn set(rig: &Rig, node: NodeId, name: &str, value: &[u8], flags: XattrFlags) -> Result<()> {
    rig.fs.setxattr(&SUPERUSER, node, &c(name), value, flags)
}

/// Whether the file system under the tests has user attributes.
fn has_attributes(rig: &Rig) -> bool {
    let has = set(rig, ROOT, "user.probe", b"", XattrFlags::empty()).is_ok();
    if !has {
        println!("SKIPPED: needs a file system with extended attributes");
    }
    has
}

#[test]
fn files_and_directories_have_xattrs() {
    in_each_mode(|rig| {
        if !has_attributes(rig) {
            return;
        }
        rig.host_file("file", "");
        rig.host_dir("dir");
        for name in ["file", "dir"] {
            let (node, fs) = (rig.node(name), &rig.fs);
            set(rig, node, "user.one", b"value", XattrFlags::empty()).unwrap();
            assert_eq!(host_value(&rig.path(name), "user.one").unwrap(), b"value");
            let get = |limit| fs.getxattr(&SUPERUSER, node, c"user.one", limit);
            assert_eq!(get(100).unwrap(), b"value");
            assert_eq!(get(5).unwrap(), b"value");
            assert_eq!(get(4), Err(Errno::RANGE));
            assert_eq!(get(0), Err(Errno::RANGE));
            assert_eq!(fs.getxattr_len(&SUPERUSER, node, c"user.one"), Ok(5));
            let exists = set(rig, node, "user.one", b"", XattrFlags::CREATE);
            assert_eq!(exists, Err(Errno::EXIST));
            let none = set(rig, node, "user.two", b"", XattrFlags::REPLACE);
            assert_eq!(none, Err(Errno::NODATA));
            set(rig, node, "user.two", b"", XattrFlags::CREATE).unwrap();
            assert_eq!(fs.getxattr(&SUPERUSER, node, c"user.two", 10).unwrap(), b"");
            let len = fs.listxattr_len(&SUPERUSER, node).unwrap();
            let list = fs.listxattr(&SUPERUSER, node, len).unwrap();
            let mut names: Vec<&[u8]> = list.split_inclusive(|&byte| byte == 0).collect();
            names.retain(|name| name.starts_with(b"user."));
            names.sort_unstable();
            assert_eq!(names, [b"user.one\0", b"user.two\0"]);
            let short = fs.listxattr(&SUPERUSER, node, len - 1);
            assert_eq!(short, Err(Errno::RANGE));
            fs.removexattr(&SUPERUSER, node, c"user.one").unwrap();
            let again = fs.removexattr(&SUPERUSER, node, c"user.one");
            assert_eq!(again, Err(Errno::NODATA));
        }
    });
}

#[test]
fn links_and_special_files_have_xattrs_of_their_own() {
    in_each_mode(|rig| {
        if !is_root() || !has_attributes(rig) {
            return;
        }
        let target = rig.host_file("file", "");
        symlink(&target, rig.path("link")).unwrap();
        let fifo = new(libc::S_IFIFO | 0o644);
        rig.fs.mknod(&SUPERUSER, ROOT, c"fifo", &fifo).unwrap();
        for name in ["link", "fifo"] {
            let node = rig.node(name);
            set(rig, node, "trusted.x", b"value", XattrFlags::empty()).unwrap();
            assert_eq!(host_value(&rig.path(name), "trusted.x").unwrap(), b"value");
            let value = rig.fs.getxattr(&SUPERUSER, node, c"trusted.x", 10);
            assert_eq!(value.unwrap(), b"value");
            // The host has user attributes only on files and directories.
            let refused = set(rig, node, "user.x", b"value", XattrFlags::empty());
            assert_eq!(refused, Err(Errno::PERM));
        }
        assert_eq!(host_value(&target, "trusted.x"), None);
    });
}

#[test]
fn trusted_xattrs_are_listed_to_superuser_only() {
    in_each_mode(|rig| {
        if !is_root() || !has_attributes(rig) {
            return;
        }
        rig.host_file("file", "");
        let node = rig.node("file");
        for name in ["trusted.x", "user.one", "trusted.y", "user.two"] {
            set(rig, node, name, b"value", XattrFlags::empty()).unwrap();
        }
        let listed = |caller: &Caller, prefix: &[u8]| {
            let len = rig.fs.listxattr_len(caller, node).unwrap();
            let list = rig.fs.listxattr(caller, node, len).unwrap();
            assert_eq!(list.len(), len);
            let short = rig.fs.listxattr(caller, node, len - 1);
            assert_eq!(short, Err(Errno::RANGE));
            let names = list.split_inclusive(|&byte| byte == 0);
            names.filter(|name| name.starts_with(prefix)).count()
        };
        assert_eq!(listed(&SUPERUSER, b"trusted."), 2);
        assert_eq!(listed(&SUPERUSER, b"user."), 2);
        assert_eq!(listed(&user(1000), b"trusted."), 0);
        assert_eq!(listed(&user(1000), b"user."), 2);
    });
}

#[test]
fn nameless_file_has_xattrs() {
    in_each_mode(|rig| {
        if !has_attributes(rig) {
            return;
        }
        let (entry, opened) = rig.create(&SUPERUSER, "file", O_RDWR, 0o600).unwrap();
        rig.fs.unlink(&SUPERUSER, ROOT, c"file").unwrap();
        set(rig, entry.node, "user.x", b"x", XattrFlags::empty()).unwrap();
        assert_eq!(
            rig.fs.getxattr_len(&SUPERUSER, entry.node, c"user.x"),
            Ok(1)
        );
        rig.fs.release(entry.node, opened.handle).unwrap();
    });
}

#[test]
fn disabled_xattrs_are_not_supported() {
    let options = Options {
        xattr: false,
        ..Options::default()
    };
    with(options, |rig| {
        let refused = set(rig, ROOT, "user.x", b"", XattrFlags::empty());
        assert_eq!(refused, Err(Errno::OPNOTSUPP));
        let refused = rig.fs.listxattr_len(&SUPERUSER, ROOT);
        assert_eq!(refused, Err(Errno::OPNOTSUPP));
    });
}
