//! GETATTR, SETATTR and ACCESS on every type of inode.

use std::os::unix::fs::{MetadataExt, symlink};
use std::time::Duration;

use super::*;
use crate::fs::{HandleKind, NewTime, OpenFile, Timestamp};

const SOME_TIME: Timestamp = Timestamp {
    seconds: 1_000_000_000,
    nanoseconds: 123_456_789,
};
const BEFORE_1970: Timestamp = Timestamp {
    seconds: -1000,
    nanoseconds: 5000,
};

fn mode(mode: u32) -> Changes {
    Changes {
        mode: Some(mode),
        ..Changes::default()
    }
}

fn size(size: u64) -> Changes {
    Changes {
        size: Some(size),
        ..Changes::default()
    }
}

fn times(accessed: Option<NewTime>, modified: Option<NewTime>) -> Changes {
    Changes {
        accessed,
        modified,
        ..Changes::default()
    }
}

#[test]
fn getattr_returns_attributes_of_host() {
    in_each_mode(|rig| {
        let path = rig.host_file("file", "content");
        let host = std::fs::metadata(&path).unwrap();
        let found = rig.find(ROOT, "file").unwrap();
        assert_eq!(found.attribute_ttl, Duration::from_secs(1));
        let attributes = rig.attributes(found.node).unwrap();
        assert_eq!(attributes, found.attributes);
        assert_eq!(attributes.inode, host.ino());
        assert_eq!((attributes.size, attributes.blocks), (7, host.blocks()));
        assert_eq!(attributes.mode, host.mode());
        assert_eq!((attributes.uid, attributes.gid), (host.uid(), host.gid()));
        assert_eq!(u64::from(attributes.links), host.nlink());
        assert_eq!(u64::from(attributes.block_size), host.blksize());
        assert_eq!(attributes.modified.seconds, host.mtime());
        assert_eq!(
            i64::from(attributes.modified.nanoseconds),
            host.mtime_nsec()
        );
    });
}

#[test]
fn setattr_changes_each_attribute_by_node_and_by_handle() {
    in_each_mode(|rig| {
        rig.host_file("file", "content");
        let node = rig.node("file");
        let opened = rig.fs.open(&SUPERUSER, node, O_RDWR).unwrap();
        for handle in [None, Some(opened.handle)] {
            assert_eq!(
                rig.change(node, handle, mode(0o640)).unwrap().mode & 0o7777,
                0o640
            );
            assert_eq!(rig.change(node, handle, size(3)).unwrap().size, 3);
            assert_eq!(rig.change(node, handle, size(5000)).unwrap().size, 5000);
            let set = times(Some(NewTime::At(SOME_TIME)), Some(NewTime::At(BEFORE_1970)));
            let changed = rig.change(node, handle, set).unwrap();
            assert_eq!(changed.accessed, SOME_TIME);
            assert_eq!(changed.modified, BEFORE_1970);
            let changed = rig
                .change(node, handle, times(None, Some(NewTime::Now)))
                .unwrap();
            assert_eq!(changed.accessed, SOME_TIME);
            assert!(changed.modified.seconds > SOME_TIME.seconds);
            if is_root() {
                let owner = Changes {
                    uid: Some(12),
                    ..Changes::default()
                };
                let changed = rig.change(node, handle, owner).unwrap();
                assert_eq!((changed.uid, changed.gid), (12, 0));
                let owner = Changes {
                    uid: Some(0),
                    gid: Some(13),
                    ..Changes::default()
                };
                let changed = rig.change(node, handle, owner).unwrap();
                assert_eq!((changed.uid, changed.gid), (0, 13));
                let owner = Changes {
                    gid: Some(0),
                    ..Changes::default()
                };
                rig.change(node, handle, owner).unwrap();
            }
        }
    });
}

#[test]
fn setattr_with_all_changes_applies_each() {
    in_each_mode(|rig| {
        if !is_root() {
            return;
        }
        rig.host_file("file", "content");
        let node = rig.node("file");
        let all = Changes {
            mode: Some(0o6755),
            uid: Some(1000),
            gid: Some(1000),
            size: Some(2),
            accessed: Some(NewTime::At(SOME_TIME)),
            modified: Some(NewTime::At(SOME_TIME)),
        };
        let changed = rig.change(node, None, all).unwrap();
        assert_eq!(changed.mode & 0o7777, 0o6755);
        assert_eq!((changed.uid, changed.gid, changed.size), (1000, 1000, 2));
        assert_eq!((changed.accessed, changed.modified), (SOME_TIME, SOME_TIME));
        // A change of owner alone clears the set-id bits, as on the host.
        let owner = Changes {
            uid: Some(1001),
            ..Changes::default()
        };
        assert_eq!(rig.change(node, None, owner).unwrap().mode & 0o7777, 0o755);
    });
}

#[test]
fn setattr_of_directory_link_or_special_file_changes_itself() {
    in_each_mode(|rig| {
        rig.host_dir("dir");
        let target = rig.host_file("target", "content");
        symlink("target", rig.path("link")).unwrap();
        let fifo = new(libc::S_IFIFO | 0o644);
        rig.fs.mknod(&SUPERUSER, ROOT, c"fifo", &fifo).unwrap();
        for name in ["dir", "link", "fifo"] {
            let node = rig.node(name);
            let set = times(Some(NewTime::At(SOME_TIME)), Some(NewTime::At(BEFORE_1970)));
            let changed = rig.change(node, None, set).unwrap();
            assert_eq!(changed.modified, BEFORE_1970, "{name}");
            let changed = rig.change(node, None, mode(0o600));
            if name == "link" {
                assert_eq!(changed.err(), Some(Errno::OPNOTSUPP));
            } else {
                assert_eq!(changed.unwrap().mode & 0o7777, 0o600);
            }
            if is_root() {
                let owner = Changes {
                    uid: Some(5),
                    gid: Some(6),
                    ..Changes::default()
                };
                rig.change(node, None, owner).unwrap();
                assert_eq!(owner_of(rig, name), (5, 6));
            }
        }
        let dir = rig.node("dir");
        assert_eq!(rig.change(dir, None, size(0)).err(), Some(Errno::ISDIR));
        let fifo = rig.node("fifo");
        assert_eq!(rig.change(fifo, None, size(0)).err(), Some(Errno::INVAL));
        let untouched = std::fs::metadata(target).unwrap();
        assert_eq!(untouched.size(), 7);
        assert_ne!(untouched.uid(), 5);
        assert!(untouched.mtime() > SOME_TIME.seconds);
    });
}

fn owner_of(rig: &Rig, name: &str) -> (u32, u32) {
    owner(&rig.path(name))
}

#[test]
fn setattr_with_invalid_owner_is_refused() {
    in_each_mode(|rig| {
        rig.host_file("file", "");
        let node = rig.node("file");
        let owner = Changes {
            uid: Some(u32::MAX),
            ..Changes::default()
        };
        assert_eq!(rig.change(node, None, owner).err(), Some(Errno::INVAL));
    });
}

#[test]
fn setattr_of_size_through_read_handle_succeeds() {
    in_each_mode(|rig| {
        rig.host_file("file", "content");
        let node = rig.node("file");
        let opened = rig.fs.open(&SUPERUSER, node, O_RDONLY).unwrap();
        let changed = rig.change(node, Some(opened.handle), size(1)).unwrap();
        assert_eq!(changed.size, 1);
    });
}

#[test]
fn unlinked_file_stays_usable_while_open() {
    in_each_mode(|rig| {
        rig.host_file("file", "content");
        let node = rig.node("file");
        let opened = rig.fs.open(&SUPERUSER, node, O_RDWR).unwrap();
        rig.fs.unlink(&SUPERUSER, ROOT, c"file").unwrap();
        let handle = Some(opened.handle);
        let (attributes, _) = rig.fs.getattr(&SUPERUSER, node, handle).unwrap();
        assert_eq!((attributes.links, attributes.size), (0, 7));
        assert_eq!(rig.attributes(node).unwrap().links, 0);
        assert_eq!(rig.change(node, handle, size(3)).unwrap().size, 3);
        assert_eq!(rig.change(node, None, size(4)).unwrap().size, 4);
        assert_eq!(
            rig.change(node, None, mode(0o600)).unwrap().mode & 0o7777,
            0o600
        );
        let file = rig
            .fs
            .file(node, opened.handle, HandleKind::File)
            .and_then(OpenFile::host)
            .unwrap();
        let mut bytes = [0; 10];
        let read = rustix::io::pread(&file, &mut bytes, 0).unwrap();
        assert_eq!(&bytes[..read], b"con\0");
        let again = rig.fs.open(&SUPERUSER, node, O_RDWR).unwrap();
        rig.fs.release(node, again.handle).unwrap();
        rig.fs.release(node, opened.handle).unwrap();
    });
}

#[test]
fn removed_directory_stays_usable_by_node() {
    in_each_mode(|rig| {
        rig.host_dir("dir");
        let node = rig.node("dir");
        let opened = rig.fs.opendir(&SUPERUSER, node, 0).unwrap();
        rig.fs.rmdir(&SUPERUSER, ROOT, c"dir").unwrap();
        let handle = Some(opened.handle);
        assert_eq!(rig.fs.getattr(&SUPERUSER, node, handle).unwrap().0.links, 0);
        assert_eq!(rig.find(node, "x").err(), Some(Errno::NOENT));
        rig.fs.releasedir(node, opened.handle).unwrap();
    });
}

#[test]
fn handle_of_another_inode_is_refused() {
    in_each_mode(|rig| {
        rig.host_file("one", "");
        rig.host_file("two", "");
        let (one, two) = (rig.node("one"), rig.node("two"));
        let handle = rig.fs.open(&SUPERUSER, one, O_RDWR).unwrap().handle;
        let fs = &rig.fs;
        let refused = [
            fs.getattr(&SUPERUSER, two, Some(handle)).err(),
            rig.change(two, Some(handle), size(1)).err(),
            fs.file(two, handle, HandleKind::File).err(),
            fs.file(one, handle, HandleKind::Directory).err(),
            fs.flush(&SUPERUSER, two, handle).err(),
            fs.lseek(two, handle, 0, libc::SEEK_DATA.cast_unsigned())
                .err(),
            fs.release(two, handle).err(),
            fs.releasedir(one, handle).err(),
            fs.readdir(&SUPERUSER, one, handle, 0, false, &mut Listing::new(1))
                .err(),
        ];
        assert_eq!(refused, [Some(Errno::BADF); 9]);
        fs.flush(&SUPERUSER, one, handle).unwrap();
        fs.release(one, handle).unwrap();
    });
}

#[test]
fn access_depends_on_mode_and_caller() {
    in_each_mode(|rig| {
        rig.host_file("file", "");
        let node = rig.node("file");
        rig.change(node, None, mode(0o604)).unwrap();
        let may = |caller: &Caller, mask| rig.fs.access(caller, node, mask);
        assert_eq!(may(&SUPERUSER, 0o6), Ok(()));
        assert_eq!(may(&SUPERUSER, 0o1), Err(Errno::ACCESS));
        assert_eq!(may(&user(4321), 0o4), Ok(()));
        assert_eq!(may(&user(4321), 0o2), Err(Errno::ACCESS));
        assert_eq!(may(&user(4321), 0), Ok(()));
        assert_eq!(rig.fs.access(&SUPERUSER, ROOT, 0o7), Ok(()));
    });
}

#[test]
fn statfs_returns_statistics_of_host() {
    in_each_mode(|rig| {
        let explicit = rig.fs.statfs(ROOT).unwrap();
        let host = rustix::fs::statvfs(rig.dir.path()).unwrap();
        assert_eq!(explicit.blocks, host.f_blocks);
        assert_eq!(u64::from(explicit.fragment_size), host.f_frsize);
        assert_eq!(u64::from(explicit.name_length), host.f_namemax);
    });
}
