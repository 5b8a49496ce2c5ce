//! Files that were looked up and not opened: found by name when they are used, whatever the host has
//! put there meanwhile.

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use rustix::fs::{CWD, FileType, Mode};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;

use super::*;
use crate::fs::passthrough::descriptors::MAX_USES_BY_NAME;
use crate::fs::passthrough::inode_table::CLOCK_AHEAD;
use crate::sys::process;

/// Runs `test` with files that count as old, on a thread of its own; and once more, if the tests
/// run as root, in a mount without devices.
fn with_old_files(test: impl Fn(&Rig) + Sync) {
    let run = |rig: Rig| {
        CLOCK_AHEAD.set(60_000_000_000);
        test(&rig);
    };
    on_a_thread(|| run(Rig::new(Options::default()).unwrap()));
    if is_root() {
        on_a_thread(|| {
            let dir = tempfile::tempdir().unwrap();
            process::unshare_namespaces(UnshareFlags::NEWNS).unwrap();
            let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
            rustix::mount::mount_change(c"/", private).unwrap();
            rustix::mount::mount_bind(dir.path(), dir.path()).unwrap();
            let nodev = MountFlags::NODEV | MountFlags::BIND;
            rustix::mount::mount_remount(dir.path(), nodev, c"").unwrap();
            let fs = Passthrough::new(dir.path(), Options::default()).unwrap();
            run(Rig { dir, fs });
        });
    }
}

#[test]
fn lookup_opens_directories_and_no_files() {
    with_old_files(|rig| {
        rig.host_file("file", "content");
        symlink("file", rig.path("link")).unwrap();
        rig.host_dir("dir");
        let file = rig.node("file");
        rig.node("link");
        assert_eq!(rig.fs.inode_descriptors(), 1, "the root's");
        rig.node("dir");
        assert_eq!(rig.fs.inode_descriptors(), 2);
        assert_eq!(rig.node("file"), file);
        assert_eq!(rig.attributes(file).unwrap().size, 7);
        rig.fs.forget(file, 2);
        assert_eq!(rig.attributes(file).err(), Some(Errno::STALE));
    });
}

#[test]
fn birth_time_by_the_hosts_clock_is_sufficient_early() {
    on_a_thread(|| {
        let rig = Rig::new(Options::default()).unwrap();
        if !rig.fs.fds().files().local().exists() {
            println!("SKIPPED: the temporary directory is on no local file system");
            return;
        }
        rig.host_file("new", "");
        rig.node("new");
        assert_eq!(
            rig.fs.inode_descriptors(),
            2,
            "the root's and the new file's"
        );
        CLOCK_AHEAD.set(200_000_000);
        rig.host_file("file", "content");
        let node = rig.node("file");
        assert_eq!(rig.node("file"), node);
        assert_eq!(rig.fs.inode_descriptors(), 2);
        std::fs::remove_file(rig.path("file")).unwrap();
        rig.host_file("file", "another");
        assert_ne!(rig.node("file"), node);
    });
}

#[test]
fn attributes_of_unopened_file_leave_it_unopened() {
    with_old_files(|rig| {
        rig.host_file("file", "content");
        symlink("file", rig.path("link")).unwrap();
        let (file, link) = (rig.node("file"), rig.node("link"));
        assert_eq!(rig.attributes(file).unwrap().size, 7);
        assert_eq!(rig.attributes(link).unwrap().size, 4, "the link's own");
        assert_eq!(rig.fs.inode_descriptors(), 1, "the root's");
        std::fs::rename(rig.path("file"), rig.path("moved")).unwrap();
        rig.host_file("file", "another");
        assert_eq!(rig.attributes(file).err(), Some(Errno::STALE));
        assert_eq!(rig.node("moved"), file);
        assert_eq!(rig.attributes(file).unwrap().size, 7);
    });
}

#[test]
fn file_that_is_used_often_is_opened_while_there_is_room() {
    with_old_files(|rig| {
        rig.host_file("file", "content");
        let file = rig.node("file");
        for _ in 0..MAX_USES_BY_NAME {
            assert_eq!(rig.attributes(file).unwrap().size, 7);
        }
        assert_eq!(rig.fs.inode_descriptors(), 1, "the root's");
        assert_eq!(rig.attributes(file).unwrap().size, 7);
        assert_eq!(rig.fs.inode_descriptors(), 2);

        rig.host_file("read", "content");
        let read = rig.node("read");
        for _ in 0..=MAX_USES_BY_NAME {
            rig.fs.open(&SUPERUSER, read, O_RDONLY).unwrap();
        }
        assert_eq!(rig.fs.inode_descriptors(), 3);
    });
    let options = Options {
        max_open_inodes: Some(2),
        ..Options::default()
    };
    let rig = Rig::new(options).unwrap();
    CLOCK_AHEAD.set(60_000_000_000);
    for name in ["a", "b", "c"] {
        rig.host_file(name, name);
        let file = rig.node(name);
        for _ in 0..10 {
            assert_eq!(rig.attributes(file).unwrap().size, 1);
        }
    }
    assert_eq!(rig.fs.usage().evictions, 0);
}

#[test]
fn unopened_file_is_read_written_renamed_and_removed() {
    with_old_files(|rig| {
        for name in ["read", "written", "renamed", "removed", "linked"] {
            rig.host_file(name, name);
        }
        let read = rig.fs.open(&SUPERUSER, rig.node("read"), O_RDONLY).unwrap();
        let written = rig.node("written");
        let opened = rig.fs.open(&SUPERUSER, written, O_RDWR).unwrap();
        let renamed = rig.node("renamed");
        rig.fs
            .rename(&SUPERUSER, (ROOT, c"renamed"), (ROOT, c"other"), 0)
            .unwrap();
        assert_eq!(rig.attributes(renamed).unwrap().size, 7);
        assert_eq!(rig.node("other"), renamed);
        let removed = rig.node("removed");
        rig.fs.unlink(&SUPERUSER, ROOT, c"removed").unwrap();
        assert_eq!(rig.attributes(removed).unwrap().links, 0);
        let linked = rig.node("linked");
        rig.fs.link(&SUPERUSER, linked, ROOT, c"again").unwrap();
        assert_eq!(rig.attributes(linked).unwrap().links, 2);
        rig.fs.release(rig.node("read"), read.handle).unwrap();
        rig.fs.release(written, opened.handle).unwrap();
    });
}

#[test]
fn what_the_host_puts_in_place_of_a_file_is_not_opened() {
    with_old_files(|rig| {
        for name in ["fifo", "file", "dir", "link", "socket"] {
            rig.host_file(name, "mine");
            let node = rig.node(name);
            std::fs::rename(rig.path(name), rig.path("moved")).unwrap();
            let path = rig.path(name);
            match name {
                "fifo" => {
                    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RWXU, 0).unwrap();
                }
                "file" => drop(rig.host_file(name, "another")),
                "dir" => drop(rig.host_dir(name)),
                "link" => symlink("/etc/passwd", path).unwrap(),
                _ => drop(UnixListener::bind(path).unwrap()),
            }
            for flags in [O_RDONLY, O_RDWR] {
                let opened = rig.fs.open(&SUPERUSER, node, flags);
                assert_eq!(opened.err(), Some(Errno::STALE), "{name}, flags {flags}");
            }
            assert_eq!(rig.node("moved"), node);
            let opened = rig.fs.open(&SUPERUSER, node, O_RDONLY).unwrap();
            rig.fs.release(node, opened.handle).unwrap();
            std::fs::remove_file(rig.path("moved")).unwrap();
        }
    });
}

#[test]
fn open_file_stays_reachable_when_the_host_moves_it() {
    with_old_files(|rig| {
        rig.host_file("file", "content");
        let node = rig.node("file");
        let opened = rig.fs.open(&SUPERUSER, node, O_RDONLY).unwrap();
        std::fs::rename(rig.path("file"), rig.path("moved")).unwrap();
        rig.host_file("file", "another file");
        // As `fstat` and `fgetxattr` of a program that doesn't use the name any more.
        assert_eq!(rig.attributes(node).unwrap().size, 7);
        rig.fs.release(node, opened.handle).unwrap();
        assert_ne!(rig.node("file"), node);
    });
}

#[test]
fn file_that_is_opened_by_name_waits_for_the_disk() {
    with_old_files(|rig| {
        rig.host_file("file", "content");
        let node = rig.node("file");
        let opened = rig.fs.open(&SUPERUSER, node, O_RDONLY).unwrap();
        let path = rig.path("file");
        let open = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|fd| fd.ok())
            .filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|target| target == path))
            .map(|fd| fd.file_name().into_string().unwrap());
        let mut files = 0;
        for fd in open {
            let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
            let flags = info
                .lines()
                .find_map(|line| line.strip_prefix("flags:"))
                .unwrap();
            let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
            if flags & libc::O_PATH == 0 {
                files += 1;
                assert_eq!(flags & libc::O_NONBLOCK, 0, "io_uring would not wait");
            }
        }
        assert_eq!(files, 1);
        rig.fs.release(node, opened.handle).unwrap();
    });
}
