//! CREATE, OPEN, MKNOD, SYMLINK, LINK, UNLINK, RMDIR, RENAME.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use super::*;
use crate::fs::{HandleKind, NegotiatedTerms, OpenFile};

const NOREPLACE: u32 = libc::RENAME_NOREPLACE;
const EXCHANGE: u32 = libc::RENAME_EXCHANGE;
const WHITEOUT: u32 = libc::RENAME_WHITEOUT;

fn flags_of(rig: &Rig, node: NodeId, opened: Opened) -> rustix::fs::OFlags {
    let file = rig
        .fs
        .file(node, opened.handle, HandleKind::File)
        .and_then(OpenFile::host)
        .unwrap();
    rustix::fs::fcntl_getfl(&file).unwrap()
}

#[test]
fn create_makes_and_opens_file() {
    in_each_mode(|rig| {
        let before = rig.descriptors();
        let (entry, opened) = rig.create(&SUPERUSER, "file", O_RDWR, 0o640).unwrap();
        let file = rig
            .fs
            .file(entry.node, opened.handle, HandleKind::File)
            .and_then(OpenFile::host);
        rustix::io::pwrite(file.unwrap(), b"hello", 0).unwrap();
        assert_eq!(std::fs::read_to_string(rig.path("file")).unwrap(), "hello");
        assert_eq!(rig.node("file"), entry.node);
        rig.fs.forget(entry.node, 2);
        assert_eq!(rig.fs.known_inodes(), 1);
        rig.fs.release(entry.node, opened.handle).unwrap();
        assert_eq!(rig.descriptors(), before);
    });
}

#[test]
fn created_file_can_be_executed_after_release() {
    in_each_mode(|rig| {
        let (entry, opened) = rig.create(&SUPERUSER, "file", O_RDWR, 0o755).unwrap();
        rig.fs.release(entry.node, opened.handle).unwrap();
        std::fs::write(rig.path("file"), "#!/bin/true\n").unwrap();
        let run = std::process::Command::new(rig.path("file")).status();
        assert!(run.unwrap().success());
    });
}

#[test]
fn create_of_existing_file_opens_it_unless_exclusive() {
    in_each_mode(|rig| {
        rig.host_file("file", "content");
        rig.host_dir("dir");
        let (entry, _) = rig.create(&SUPERUSER, "file", O_RDWR, 0o600).unwrap();
        assert_eq!(entry.attributes.size, 7);
        assert_eq!(entry.node, rig.node("file"));
        let exclusive = rig.create(&SUPERUSER, "file", O_RDWR | O_EXCL, 0o600);
        assert_eq!(exclusive.err(), Some(Errno::EXIST));
        rig.create(&SUPERUSER, "file", O_RDWR | O_TRUNC, 0o600)
            .unwrap();
        assert_eq!(std::fs::metadata(rig.path("file")).unwrap().size(), 0);
        let known = rig.fs.known_inodes();
        let directory = rig.create(&SUPERUSER, "dir", O_RDWR, 0o600);
        assert_eq!(directory.err(), Some(Errno::ISDIR));
        assert_eq!(
            rig.fs.known_inodes(),
            known,
            "a failed create counts no lookup"
        );
    });
}

#[test]
fn create_during_removals_never_fails() {
    in_each_mode(|rig| {
        std::thread::scope(|scope| {
            let makers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        for _ in 0..300 {
                            let (entry, opened) =
                                rig.create(&SUPERUSER, "file", O_RDWR, 0o600).unwrap();
                            rig.fs.release(entry.node, opened.handle).unwrap();
                            rig.fs.forget(entry.node, 1);
                        }
                    })
                })
                .collect();
            scope.spawn(move || {
                while makers.iter().any(|maker| !maker.is_finished()) {
                    let _gone_already = std::fs::remove_file(rig.path("file"));
                }
            });
        });
        assert_eq!(rig.fs.known_inodes(), 1);
    });
}

#[test]
fn open_applies_its_flags() {
    in_each_mode(|rig| {
        rig.host_file("file", "content");
        let node = rig.node("file");
        let append = libc::O_APPEND.cast_unsigned();
        let opened = rig.fs.open(&SUPERUSER, node, O_WRONLY | append).unwrap();
        let flags = flags_of(rig, node, opened);
        assert!(flags.contains(rustix::fs::OFlags::WRONLY));
        // It is sent with each write instead.
        assert!(!flags.contains(rustix::fs::OFlags::APPEND));
        // Flags that would follow a link, block, or concern only the guest are left out.
        let others = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOATIME | libc::O_DIRECT;
        let opened = rig
            .fs
            .open(&SUPERUSER, node, O_RDONLY | others.cast_unsigned());
        let flags = flags_of(rig, node, opened.unwrap());
        assert!(!flags.intersects(rustix::fs::OFlags::from_bits_retain(others.cast_unsigned())));
        assert_eq!(std::fs::metadata(rig.path("file")).unwrap().size(), 7);
        rig.fs.open(&SUPERUSER, node, O_WRONLY | O_TRUNC).unwrap();
        assert_eq!(std::fs::metadata(rig.path("file")).unwrap().size(), 0);
    });
}

#[test]
fn open_flags_depend_on_options_and_write_back() {
    let options = Options {
        allow_direct_io: true,
        ..Options::default()
    };
    with(options, |rig| {
        rig.host_file("file", "");
        let node = rig.node("file");
        let asked = O_WRONLY | libc::O_DIRECT.cast_unsigned();
        for (collects_writes, access) in [
            (false, rustix::fs::OFlags::WRONLY),
            (true, rustix::fs::OFlags::RDWR),
        ] {
            rig.fs.begin(&NegotiatedTerms {
                collects_writes,
                ..NegotiatedTerms::default()
            });
            let opened = rig.fs.open(&SUPERUSER, node, asked).unwrap();
            let flags = flags_of(rig, node, opened);
            assert!(flags.contains(rustix::fs::OFlags::DIRECT));
            assert_eq!(flags & rustix::fs::OFlags::RWMODE, access);
        }
    });
}

#[test]
fn open_of_special_file_is_refused() {
    in_each_mode(|rig| {
        let kinds = [("fifo", libc::S_IFIFO), ("socket", libc::S_IFSOCK)];
        for (name, kind) in kinds {
            let node = new(kind | 0o644);
            let made = rig.fs.mknod(&SUPERUSER, ROOT, &c(name), &node).unwrap();
            for flags in [O_RDONLY, O_WRONLY, O_RDWR] {
                let opened = rig.fs.open(&SUPERUSER, made.node, flags);
                assert_eq!(opened.err(), Some(Errno::NXIO), "{name}");
                let created = rig.create(&SUPERUSER, name, flags, 0o644);
                assert_eq!(created.err(), Some(Errno::NXIO), "{name}");
            }
        }
        rig.host_dir("dir");
        let dir = rig.node("dir");
        let opened = rig.fs.open(&SUPERUSER, dir, O_RDONLY);
        assert_eq!(opened.err(), Some(Errno::ISDIR));
        rig.host_file("file", "");
        let file = rig.node("file");
        let opened = rig.fs.opendir(&SUPERUSER, file, 0);
        assert_eq!(opened.err(), Some(Errno::NOTDIR));
    });
}

#[test]
fn mknod_makes_each_type_of_node() {
    in_each_mode(|rig| {
        let make = |name: &str, mode| rig.fs.mknod(&SUPERUSER, ROOT, &c(name), &new(mode));
        make("fifo", libc::S_IFIFO | 0o666).unwrap();
        make("socket", libc::S_IFSOCK | 0o666).unwrap();
        make("file", libc::S_IFREG | 0o666).unwrap();
        make("plain", 0o666).unwrap();
        let kind = |name: &str| std::fs::symlink_metadata(rig.path(name)).unwrap();
        assert!(kind("fifo").file_type().is_fifo());
        assert!(kind("socket").file_type().is_socket());
        assert!(kind("file").is_file() && kind("plain").is_file());
        assert_eq!(kind("file").permissions().mode() & 0o777, 0o644);
        let exists = make("file", libc::S_IFREG | 0o666);
        assert_eq!(exists.err(), Some(Errno::EXIST));
        let directory = make("dir", libc::S_IFDIR | 0o777);
        assert_eq!(directory.err(), Some(Errno::INVAL));
    });
}

#[test]
fn readlink_returns_target_of_symlink() {
    in_each_mode(|rig| {
        let long = "x/".repeat(500);
        for (name, target) in [("short", "target"), ("up", "../../etc"), ("long", &long)] {
            let made = rig
                .fs
                .symlink(&SUPERUSER, ROOT, &c(name), &c(target), None)
                .unwrap();
            let read = rig.fs.readlink(&SUPERUSER, made.node).unwrap();
            assert_eq!(read, target.as_bytes());
        }
        rig.host_file("file", "");
        let read = rig.fs.readlink(&SUPERUSER, rig.node("file"));
        assert_eq!(read.err(), Some(Errno::INVAL));
    });
}

#[test]
fn link_adds_second_name_to_inode() {
    in_each_mode(|rig| {
        rig.host_file("file", "");
        symlink("file", rig.path("link")).unwrap();
        let node = rig.node("file");
        let linked = rig.fs.link(&SUPERUSER, node, ROOT, c"second").unwrap();
        assert_eq!((linked.node, linked.attributes.links), (node, 2));
        let link = rig.node("link");
        rig.fs.link(&SUPERUSER, link, ROOT, c"second link").unwrap();
        assert!(rig.path("second link").is_symlink());
        let exists = rig.fs.link(&SUPERUSER, node, ROOT, c"link");
        assert_eq!(exists.err(), Some(Errno::EXIST));
        // Two lookups of each.
        rig.fs.forget(node, 1);
        assert!(rig.attributes(node).is_ok());
        rig.fs.forget(node, 1);
        rig.fs.forget(link, 2);
        assert_eq!(rig.fs.known_inodes(), 1);
    });
}

#[test]
fn unlink_of_directory_and_rmdir_of_file_are_refused() {
    in_each_mode(|rig| {
        rig.host_file("file", "");
        let dir = rig.host_dir("dir");
        std::fs::write(dir.join("inside"), "").unwrap();
        let fs = &rig.fs;
        assert_eq!(fs.rmdir(&SUPERUSER, ROOT, c"file"), Err(Errno::NOTDIR));
        assert_eq!(fs.unlink(&SUPERUSER, ROOT, c"dir"), Err(Errno::ISDIR));
        assert_eq!(fs.rmdir(&SUPERUSER, ROOT, c"dir"), Err(Errno::NOTEMPTY));
        assert_eq!(fs.unlink(&SUPERUSER, ROOT, c"none"), Err(Errno::NOENT));
        let inside = rig.node("dir");
        fs.unlink(&SUPERUSER, inside, c"inside").unwrap();
        fs.rmdir(&SUPERUSER, ROOT, c"dir").unwrap();
        fs.unlink(&SUPERUSER, ROOT, c"file").unwrap();
        assert_eq!(std::fs::read_dir(rig.dir.path()).unwrap().count(), 0);
    });
}

#[test]
fn rename_applies_its_flags() {
    in_each_mode(|rig| {
        rig.host_file("one", "1");
        rig.host_file("two", "2");
        rig.host_dir("dir");
        let dir = rig.node("dir");
        let node = rig.node("one");
        let rename = |from: &str, to: &str, flags| {
            let (from, to) = (c(from), c(to));
            rig.fs.rename(&SUPERUSER, (ROOT, &from), (ROOT, &to), flags)
        };
        let read = |name: &str| std::fs::read_to_string(rig.path(name)).unwrap();
        assert_eq!(rename("one", "two", NOREPLACE), Err(Errno::EXIST));
        rename("one", "two", EXCHANGE).unwrap();
        assert_eq!((read("one"), read("two")), ("2".into(), "1".into()));
        assert_eq!(rename("one", "none", EXCHANGE), Err(Errno::NOENT));
        assert_eq!(rename("one", "two", 1 << 10), Err(Errno::INVAL));
        assert_eq!(
            rename("one", "two", NOREPLACE | EXCHANGE),
            Err(Errno::INVAL)
        );
        rename("two", "one", 0).unwrap();
        assert_eq!(read("one"), "1");
        assert_eq!(
            rig.node("one"),
            node,
            "an inode keeps its node through renames"
        );
        rename("one", "three", NOREPLACE).unwrap();
        let (from, to) = ((ROOT, c"three"), (dir, c"four"));
        rig.fs.rename(&SUPERUSER, from, to, 0).unwrap();
        assert_eq!(read("dir/four"), "1");
        assert_eq!(rig.find(dir, "four").unwrap().node, node);
    });
}

#[test]
fn rename_with_whiteout_leaves_whiteout() {
    in_each_mode(|rig| {
        if !is_root() {
            return;
        }
        rig.host_file("one", "1");
        let (from, to) = ((ROOT, c"one"), (ROOT, c"two"));
        match rig.fs.rename(&user(1000), from, to, WHITEOUT) {
            Ok(()) => {
                let left = std::fs::symlink_metadata(rig.path("one")).unwrap();
                assert!(left.file_type().is_char_device());
                assert_eq!((left.rdev(), left.uid()), (0, 1000));
            }
            Err(error) => println!("SKIPPED: whiteouts: {error}"),
        }
    });
}

#[test]
fn lseek_finds_holes_and_data() {
    in_each_mode(|rig| {
        let (entry, opened) = rig.create(&SUPERUSER, "file", O_RDWR, 0o600).unwrap();
        let file = rig
            .fs
            .file(entry.node, opened.handle, HandleKind::File)
            .and_then(OpenFile::host)
            .unwrap();
        rustix::io::pwrite(&file, b"data", 1 << 20).unwrap();
        let seek = |offset, whence: i32| {
            rig.fs
                .lseek(entry.node, opened.handle, offset, whence.cast_unsigned())
        };
        assert_eq!(seek(0, libc::SEEK_DATA), Ok(1 << 20));
        assert_eq!(seek(0, libc::SEEK_HOLE), Ok(0));
        assert_eq!(seek(1 << 21, libc::SEEK_DATA), Err(Errno::NXIO));
        assert_eq!(seek(0, libc::SEEK_CUR), Err(Errno::INVAL));
    });
}
