//! Guests that use files and directories without OPEN, OPENDIR, RELEASE and RELEASEDIR.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::ffi::CString;
use std::path::Path;

use testing::{Server, each_runtime, errno};
use vmm::fuse::wire::{CopyFileRangeIn, SetattrIn, WriteIn, WriteOut, init, opcode, setattr};
use vmm::fuse::{Call, Client, Handle, LINUX_OFFERS, ROOT};
use vmm::{Options, Profile, Session};
use zerocopy::IntoBytes;

type Guest = Client<Session>;

/// What a guest says that has opened nothing.
const NONE: Handle = Handle {
    fh: 0,
    open_flags: 0,
};

fn start(runtime: &str, more: &[&str]) -> (Server, Guest) {
    // Paths of open files are as they are outside then.
    let always = ["--sandbox", "none", "--no-open", "--no-opendir"];
    let args = [&["--runtime", runtime], &always[..], more].concat();
    let server = Server::start(&args);
    let fs = server.session(Profile::Simple, &Options::default());
    (server, fs)
}

fn host_file(server: &Server, name: &str, content: &str) {
    std::fs::write(server.share().join(name), content).unwrap();
}

fn node(fs: &mut Guest, name: &str) -> u64 {
    fs.lookup(ROOT, &CString::new(name).unwrap())
        .unwrap()
        .nodeid
}

/// How many descriptors the server has of regular files and directories in its share, those
/// that only hold inodes within reach left out.
fn opened(server: &Server) -> usize {
    let proc = Path::new("/proc").join(server.pid().to_string());
    let share = server.share();
    let fds = std::fs::read_dir(proc.join("fd")).unwrap();
    fds.filter_map(Result::ok)
        .filter(|fd| {
            let target = std::fs::read_link(fd.path()).unwrap_or_default();
            let info = std::fs::read_to_string(proc.join("fdinfo").join(fd.file_name()));
            let flags = info.unwrap_or_default();
            let flags = flags.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = i32::from_str_radix(flags.unwrap_or("0").trim(), 8).unwrap();
            target.starts_with(&share) && target != share && flags & libc::O_PATH == 0
        })
        .count()
}

#[each_runtime]
fn opening_and_closing_need_no_request(runtime: &str) {
    let (server, mut fs) = start(runtime, &[]);
    assert!(fs.has(init::NO_OPEN_SUPPORT | init::NO_OPENDIR_SUPPORT));
    assert!(!fs.has(init::ATOMIC_O_TRUNC), "nobody would truncate");
    host_file(&server, "file", "content");
    let file = node(&mut fs, "file");
    assert_eq!(errno(fs.open(file, libc::O_RDWR)), Some(libc::ENOSYS));
    assert_eq!(errno(fs.opendir(ROOT)), Some(libc::ENOSYS));
    assert_eq!(fs.read(file, NONE, 3, 100).unwrap(), b"tent");
    // Linux asks this once, and then knows that it needn't.
    assert_eq!(errno(fs.flush(file, NONE)), Some(libc::ENOSYS));
    // It sends these only if it has learned since that OPEN is not needed.
    fs.release(file, NONE).unwrap();
    fs.releasedir(ROOT, NONE).unwrap();
    assert_eq!(fs.read(file, NONE, 0, 3).unwrap(), b"con");
}

#[each_runtime]
fn guest_without_no_open_support_opens(runtime: &str) {
    let server = Server::start(&["--runtime", runtime, "--no-open", "--no-opendir"]);
    host_file(&server, "file", "content");
    let guest = Profile::Simple.connect(server.connect(), &Options::default());
    let mut fs = Client::new(guest.unwrap());
    let offers = LINUX_OFFERS & !(init::NO_OPEN_SUPPORT | init::NO_OPENDIR_SUPPORT);
    fs.init_offering(offers).unwrap();
    let file = node(&mut fs, "file");
    assert_eq!(errno(fs.read(file, NONE, 0, 3)), Some(libc::EBADF));
    assert_eq!(errno(fs.readdir_all(ROOT, NONE)), Some(libc::EBADF));
    let handle = fs.open(file, libc::O_RDWR).unwrap();
    assert_eq!(fs.read(file, handle, 0, 3).unwrap(), b"con");
    let directory = fs.opendir(ROOT).unwrap();
    assert!(!fs.readdir_all(ROOT, directory).unwrap().is_empty());
}

#[each_runtime]
fn requests_without_handle_take_effect(runtime: &str) {
    let (server, mut fs) = start(runtime, &[]);
    let content = || std::fs::read_to_string(server.share().join("file")).unwrap();
    let (made, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
    let (file, made_as) = (made.nodeid, handle.fh);
    assert_eq!(made_as, 0, "Linux would never release another");
    assert_eq!(fs.write(file, NONE, 0, b"0123456789").unwrap(), 10);
    assert_eq!(content(), "0123456789");
    fs.fsync(file, NONE, false).unwrap();
    fs.fsyncdir(ROOT, NONE, true).unwrap();
    assert_eq!(fs.lseek(file, NONE, 0, libc::SEEK_HOLE).unwrap(), 10);
    fs.fallocate(file, NONE, 0, 0..12).unwrap();
    assert_eq!(fs.fgetattr(file, NONE).unwrap().attr.size, 12);
    let shorter = SetattrIn {
        valid: setattr::SIZE | setattr::FH,
        size: 5,
        ..SetattrIn::default()
    };
    assert_eq!(fs.setattr(file, &shorter).unwrap().attr.size, 5);
    let copy = CopyFileRangeIn {
        nodeid_out: file,
        off_out: 5,
        len: 5,
        ..CopyFileRangeIn::default()
    };
    assert_eq!(fs.copy_file_range(file, &copy).unwrap(), 5);
    assert_eq!(content(), "0123401234");
    for flags in [libc::O_APPEND, libc::O_APPEND | libc::O_DSYNC] {
        let asked = WriteIn {
            size: 1,
            flags: flags.cast_unsigned(),
            ..WriteIn::default()
        };
        let call = Call::new(opcode::WRITE, file).arg(asked.as_bytes());
        fs.request(call.arg(b"+").reply_of::<WriteOut>()).unwrap();
    }
    assert_eq!(content(), "0123401234++");
    // One that is there already, and is to be emptied.
    let again = fs.create_with(ROOT, c"file", 0o644, libc::O_RDONLY | libc::O_TRUNC);
    let (again, handle) = again.unwrap();
    assert_eq!((again.nodeid, handle.fh), (file, 0));
    assert_eq!(content(), "");
    let (nameless, handle) = fs.tmpfile(ROOT, 0o600).unwrap();
    assert_eq!(handle.fh, 0);
    fs.write(nameless.nodeid, NONE, 0, b"kept").unwrap();
    fs.link(nameless.nodeid, ROOT, c"named").unwrap();
    let named = std::fs::read(server.share().join("named")).unwrap();
    assert_eq!(named, b"kept");
}

#[each_runtime]
fn directories_are_read_without_a_handle(runtime: &str) {
    let (server, mut fs) = start(runtime, &[]);
    for n in 0..500 {
        host_file(&server, &format!("file{n}"), "");
    }
    let names = |fs: &mut Guest| {
        let listed = fs.readdir_all(ROOT, NONE).unwrap();
        let mut names: Vec<_> = listed.into_iter().map(|entry| entry.name).collect();
        names.sort();
        names
    };
    let all = names(&mut fs);
    assert_eq!(all.len(), 502);
    // One reader stops half-way, and another reads everything in the meantime.
    let half = fs.readdir(ROOT, NONE, 0, 4096).unwrap();
    assert_eq!(names(&mut fs), all);
    let mut rest = half;
    loop {
        let offset = rest.last().unwrap().offset;
        let more = fs.readdir(ROOT, NONE, offset, 4096).unwrap();
        if more.is_empty() {
            break;
        }
        rest.extend(more);
    }
    let mut rest: Vec<_> = rest.into_iter().map(|entry| entry.name).collect();
    rest.sort();
    assert_eq!(rest, all);
    // What changes is seen by who begins again.
    std::fs::remove_file(server.share().join("file7")).unwrap();
    host_file(&server, "new", "");
    let now = names(&mut fs);
    assert!(now.iter().any(|name| name == "new") && !now.iter().any(|name| name == "file7"));
    assert_eq!(fs.readdirplus_all(ROOT, NONE).unwrap().len(), 502);
}

#[each_runtime]
fn only_so_many_files_stay_open(runtime: &str) {
    let (server, mut fs) = start(runtime, &["--max-open-inodes", "40"]);
    let files: Vec<u64> = (0..200)
        .map(|n| {
            host_file(&server, &format!("file{n}"), &n.to_string());
            node(&mut fs, &format!("file{n}"))
        })
        .collect();
    for round in 0..2 {
        for (n, file) in files.iter().enumerate() {
            let content = fs.read(*file, NONE, 0, 100).unwrap();
            assert_eq!(content, n.to_string().as_bytes(), "{round}");
        }
        assert_eq!(opened(&server), 10, "a quarter");
        assert!(server.descriptors_of("file") <= 40);
    }
    for file in &files {
        fs.write(*file, NONE, 0, b"written").unwrap();
    }
    assert_eq!(opened(&server), 10);
    for n in 0..200 {
        let content = std::fs::read(server.share().join(format!("file{n}"))).unwrap();
        assert_eq!(content, b"written");
    }
}

#[each_runtime]
fn forget_closes_handleless_file(runtime: &str) {
    let (server, mut fs) = start(runtime, &[]);
    host_file(&server, "file", "content");
    let file = node(&mut fs, "file");
    fs.read(file, NONE, 0, 1).unwrap();
    assert_eq!(opened(&server), 1);
    fs.write(file, NONE, 0, b"C").unwrap();
    let again = node(&mut fs, "file");
    fs.forget(file, 1).unwrap();
    assert_ne!(opened(&server), 0, "it was looked up twice");
    fs.forget(again, 1).unwrap();
    assert_eq!(opened(&server), 0);
    assert_eq!(errno(fs.read(file, NONE, 0, 1)), Some(libc::ESTALE));
    assert_eq!(errno(fs.write(file, NONE, 0, b"C")), Some(libc::ESTALE));
    // So it is with a session.
    let file = node(&mut fs, "file");
    fs.read(file, NONE, 0, 1).unwrap();
    fs.destroy().unwrap();
    assert_eq!(opened(&server), 0);
}

#[each_runtime]
fn unlinked_file_stays_usable(runtime: &str) {
    for more in [&[][..], &["--max-open-inodes", "20"]] {
        let (server, mut fs) = start(runtime, more);
        host_file(&server, "target", "content");
        host_file(&server, "replaced", "content");
        let nodes = [node(&mut fs, "target"), node(&mut fs, "replaced")];
        for n in 0..100 {
            host_file(&server, &format!("file{n}"), "other");
            let other = node(&mut fs, &format!("file{n}"));
            fs.read(other, NONE, 0, 1).unwrap();
        }
        fs.unlink(ROOT, c"target").unwrap();
        fs.rename(ROOT, c"file0", ROOT, c"replaced").unwrap();
        for n in 1..100 {
            let other = node(&mut fs, &format!("file{n}"));
            fs.read(other, NONE, 0, 1).unwrap();
        }
        for file in nodes {
            assert_eq!(fs.read(file, NONE, 0, 100).unwrap(), b"content");
            fs.write(file, NONE, 0, b"C").unwrap();
            assert_eq!(fs.read(file, NONE, 0, 100).unwrap(), b"Content");
            assert_eq!(fs.getattr(file).unwrap().attr.nlink, 0);
        }
    }
}

#[each_runtime]
fn access_without_open_follows_open_rules(runtime: &str) {
    let (server, mut fs) = start(runtime, &["--readonly"]);
    host_file(&server, "file", "content");
    let file = node(&mut fs, "file");
    assert_eq!(fs.read(file, NONE, 0, 100).unwrap(), b"content");
    assert_eq!(errno(fs.write(file, NONE, 0, b"x")), Some(libc::EROFS));
    let allocated = fs.fallocate(file, NONE, 0, 0..10);
    assert_eq!(errno(allocated), Some(libc::EROFS));

    let (server, mut fs) = start(runtime, &[]);
    host_file(&server, "file", "content");
    let file = node(&mut fs, "file");
    let fifo = fs
        .mknod(ROOT, c"fifo", libc::S_IFIFO | 0o666, 0)
        .unwrap()
        .nodeid;
    let link = fs.symlink(ROOT, c"link", c"file").unwrap().nodeid;
    for (node, expected) in [
        (fifo, libc::ENXIO),
        (link, libc::ELOOP),
        (ROOT, libc::EISDIR),
        (4711, libc::ESTALE),
    ] {
        assert_eq!(errno(fs.read(node, NONE, 0, 1)), Some(expected));
        assert_eq!(errno(fs.write(node, NONE, 0, b"1")), Some(expected));
    }
    // A directory that is open is no file either, nor is a file a directory.
    fs.readdir_all(ROOT, NONE).unwrap();
    assert_eq!(errno(fs.read(ROOT, NONE, 0, 1)), Some(libc::EISDIR));
    fs.read(file, NONE, 0, 1).unwrap();
    assert_eq!(errno(fs.readdir_all(file, NONE)), Some(libc::ENOTDIR));
}

#[test]
fn no_open_and_no_opendir_are_independent() {
    for (option, flag) in [
        ("--no-open", init::NO_OPEN_SUPPORT),
        ("--no-opendir", init::NO_OPENDIR_SUPPORT),
    ] {
        let both = init::NO_OPEN_SUPPORT | init::NO_OPENDIR_SUPPORT;
        let server = Server::start(&[option]);
        let mut fs = server.session(Profile::Simple, &Options::default());
        assert!(fs.has(flag) && !fs.has(both), "{option}");
        host_file(&server, "file", "");
        let file = node(&mut fs, "file");
        let opened = fs.open(file, libc::O_RDONLY);
        assert_eq!(opened.is_err(), option == "--no-open");
        assert_eq!(fs.opendir(ROOT).is_err(), option == "--no-opendir");
    }
}

#[test]
fn what_does_not_go_together_is_refused() {
    for contradicting in [
        &["--no-open", "--cache=never"][..],
        &["--no-open", "--cache=metadata"],
        &["--no-opendir", "--cache=never"],
        &["--no-open", "--inode-file-handles=prefer"],
        &["--no-open", "--posix-locks"],
        &["--no-open", "--flock"],
        &["--no-open", "--allow-direct-io"],
        &["--no-open", "--preserve-noatime"],
    ] {
        let args = [&["--socket=/nowhere/s", "--shared-dir=/"], contradicting].concat();
        let refused = testing::output(&args);
        assert_eq!(refused.status.code(), Some(2), "{contradicting:?}");
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains("can't be used with") || said.contains("cannot be used with"));
    }
}
