//! Compares what a guest sees with the directory that the image was made of.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use vmm::Session;
use vmm::fuse::{Client, ROOT};

/// What has been compared.
#[derive(Debug, Default)]
pub(super) struct Compared {
    pub(super) inodes: usize,
    pub(super) bytes: u64,
    /// The guest's number of each inode of the host.
    numbers: HashMap<u64, u64>,
}

/// Compares everything below `source` with the root that `guest` sees.
pub(super) fn compare(guest: &mut Client<Session>, source: &Path) -> Compared {
    let mut compared = Compared::default();
    compare_inode(guest, ROOT, source, &mut compared);
    directory(guest, ROOT, source, &mut compared);
    compared
}

/// Compares everything below `source` with what is below the directory `node` of the guest.
pub(super) fn compare_below(guest: &mut Client<Session>, node: u64, source: &Path) -> Compared {
    let mut compared = Compared::default();
    directory(guest, node, source, &mut compared);
    compared
}

fn directory(guest: &mut Client<Session>, node: u64, path: &Path, compared: &mut Compared) {
    let handle = guest.opendir(node).unwrap();
    let plain = guest.readdir_all(node, handle).unwrap();
    let plus = guest.readdirplus_all(node, handle).unwrap();
    guest.releasedir(node, handle).unwrap();
    let mut names: Vec<_> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .chain([".".into(), "..".into()])
        .collect();
    names.sort();
    let sorted = |mut names: Vec<std::ffi::OsString>| {
        names.sort();
        names
    };
    let listed = plain.iter().map(|entry| entry.name.clone()).collect();
    assert_eq!(sorted(listed), names, "{}", path.display());
    let listed = plus.iter().map(|plus| plus.entry.name.clone()).collect();
    assert_eq!(sorted(listed), names, "{}", path.display());
    for listed in plus {
        let name = &listed.entry.name;
        if name == "." || name == ".." {
            continue;
        }
        let path = path.join(name);
        let found = guest
            .lookup(node, &CString::new(name.as_bytes()).unwrap())
            .unwrap();
        assert_eq!(found.nodeid, listed.node.nodeid);
        assert_eq!(found.attr.mode, listed.node.attr.mode);
        assert_eq!(listed.entry.kind, found.attr.mode >> 12);
        compare_inode(guest, found.nodeid, &path, compared);
        if path.symlink_metadata().unwrap().is_dir() {
            directory(guest, found.nodeid, &path, compared);
        }
    }
}

fn compare_inode(guest: &mut Client<Session>, node: u64, path: &Path, compared: &mut Compared) {
    let ours = guest.getattr(node).unwrap().attr;
    let theirs = path.symlink_metadata().unwrap();
    let which = path.display();
    assert_eq!(ours.mode, theirs.mode(), "{which}");
    assert_eq!(
        (ours.uid, ours.gid),
        (theirs.uid(), theirs.gid()),
        "{which}"
    );
    let modified = (ours.mtime.cast_signed(), i64::from(ours.mtimensec));
    // The builder records no time for the root.
    if node != ROOT {
        assert_eq!(modified, (theirs.mtime(), theirs.mtime_nsec()), "{which}");
    }
    let rdev = match theirs.rdev() {
        0 => 0,
        device => {
            let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
            (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
        }
    };
    assert_eq!(ours.rdev, rdev, "{which}");
    if !theirs.is_dir() {
        assert_eq!(ours.size, theirs.size(), "{which}");
        assert_eq!(u64::from(ours.nlink), theirs.nlink(), "{which}");
        let number = *compared.numbers.entry(theirs.ino()).or_insert(ours.ino);
        assert_eq!(number, ours.ino, "{which}: hard links are one inode");
    }
    xattrs(guest, node, path);
    if theirs.is_symlink() {
        let target = fs::read_link(path).unwrap();
        assert_eq!(
            guest.readlink(node).unwrap(),
            target.into_os_string().into_vec()
        );
    } else if theirs.is_file() {
        let bytes = fs::read(path).unwrap();
        assert!(read(guest, node) == bytes, "{which}: other bytes");
        compared.bytes += bytes.len() as u64;
    }
    compared.inodes += 1;
}

fn xattrs(guest: &mut Client<Session>, node: u64, path: &Path) {
    let mut list = vec![0; 64 << 10];
    let len = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    let mut names: Vec<CString> = list[..len]
        .split_inclusive(|byte| *byte == 0)
        .map(|name| CStr::from_bytes_with_nul(name).unwrap().to_owned())
        .collect();
    names.sort();
    let mut listed = guest.listxattr(node).unwrap();
    listed.sort();
    assert_eq!(listed, names, "{}", path.display());
    for name in names {
        let mut value = vec![0; 64 << 10];
        let len = rustix::fs::lgetxattr(path, &name, &mut value[..]).unwrap();
        assert_eq!(guest.getxattr(node, &name).unwrap(), value[..len]);
        assert_eq!(guest.getxattr_size(node, &name).unwrap() as usize, len);
    }
}

/// All bytes of a file.
pub(super) fn read(guest: &mut Client<Session>, node: u64) -> Vec<u8> {
    try_read(guest, node).unwrap()
}

/// All bytes of a file, or the error of the first READ that fails.
pub(super) fn try_read(guest: &mut Client<Session>, node: u64) -> Result<Vec<u8>, i32> {
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    let mut bytes = Vec::new();
    let result = loop {
        match guest.read(node, handle, bytes.len() as u64, 128 << 10) {
            Ok(read) if read.is_empty() => break Ok(()),
            Ok(read) => bytes.extend_from_slice(&read),
            Err(error) => break Err(error.errno().unwrap()),
        }
    };
    guest.release(node, handle).unwrap();
    result.map(|()| bytes)
}
