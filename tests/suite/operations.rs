//! Each FUSE operation over the socket, with its effect on the host's directory.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use testing::{Server, each_runtime};
use vmm::fuse::wire::{CopyFileRangeIn, FileLock, SetattrIn, init, setattr};
use vmm::fuse::{LINUX_OFFERS, ROOT};
use vmm::{Options, Profile};

#[each_runtime]
fn each_operation_takes_effect_on_host(runtime: &str) {
    let server = Server::start(&["--runtime", runtime]);
    let mut fs = server.session(Profile::Simple, &Options::default());
    assert!(fs.has(init::DO_READDIRPLUS));

    let dir = fs.mkdir(ROOT, c"dir", 0o755).unwrap();
    let (file, handle) = fs.create(dir.nodeid, c"file", 0o666).unwrap();
    assert_eq!(file.attr.mode & 0o777, 0o644, "the umask is applied");
    fs.write(file.nodeid, handle, 0, b"0123456789").unwrap();
    fs.flush(file.nodeid, handle).unwrap();
    fs.fsync(file.nodeid, handle, true).unwrap();
    assert_eq!(fs.getattr(file.nodeid).unwrap().attr.size, 10);
    assert_eq!(fs.fgetattr(file.nodeid, handle).unwrap().attr.size, 10);

    assert_eq!(
        fs.chmod(file.nodeid, 0o600).unwrap().attr.mode & 0o777,
        0o600
    );
    assert_eq!(fs.chown(file.nodeid, 5, 6).unwrap().attr.uid, 5);
    assert_eq!(fs.truncate(file.nodeid, 4).unwrap().attr.size, 4);
    let times = SetattrIn {
        valid: setattr::ATIME | setattr::MTIME,
        atime: 1,
        mtime: 2,
        ..SetattrIn::default()
    };
    assert_eq!(fs.setattr(file.nodeid, &times).unwrap().attr.mtime, 2);

    fs.fallocate(file.nodeid, handle, 0, 0..8192).unwrap();
    assert_eq!(fs.getattr(file.nodeid).unwrap().attr.size, 8192);
    assert_eq!(
        fs.lseek(file.nodeid, handle, 0, libc::SEEK_DATA).unwrap(),
        0
    );
    for whence in [libc::SEEK_DATA, libc::SEEK_HOLE] {
        let before = fs.lseek(file.nodeid, handle, u64::MAX, whence);
        assert_eq!(before.unwrap_err().errno(), Some(libc::ENXIO));
    }
    let (copy, copied) = fs.create(ROOT, c"copy", 0o644).unwrap();
    let range = CopyFileRangeIn {
        fh_in: handle.fh,
        off_in: 0,
        nodeid_out: copy.nodeid,
        fh_out: copied.fh,
        off_out: 0,
        len: 4,
        flags: 0,
    };
    assert_eq!(fs.copy_file_range(file.nodeid, &range).unwrap(), 4);
    assert_eq!(fs.read(copy.nodeid, copied, 0, 100).unwrap(), b"0123");
    let range = CopyFileRangeIn {
        off_out: 4,
        ..range
    };
    assert_eq!(fs.copy_file_range_64(file.nodeid, &range).unwrap(), 4);
    assert_eq!(fs.read(copy.nodeid, copied, 0, 100).unwrap(), b"01230123");

    let link = fs.symlink(ROOT, c"link", c"dir/file").unwrap();
    assert_eq!(fs.readlink(link.nodeid).unwrap(), b"dir/file");
    fs.mknod(ROOT, c"pipe", libc::S_IFIFO | 0o600, 0).unwrap();
    assert_eq!(fs.link(file.nodeid, ROOT, c"second").unwrap().attr.nlink, 2);
    fs.rename(ROOT, c"second", dir.nodeid, c"third").unwrap();
    let taken = fs.rename2(
        dir.nodeid,
        c"third",
        dir.nodeid,
        c"file",
        libc::RENAME_NOREPLACE,
    );
    assert_eq!(taken.unwrap_err().errno(), Some(libc::EEXIST));
    let transport = libc::RENAME_EXCHANGE;
    fs.rename2(dir.nodeid, c"third", dir.nodeid, c"file", transport)
        .unwrap();

    fs.setxattr(file.nodeid, c"user.x", b"value", 0).unwrap();
    assert_eq!(fs.getxattr(file.nodeid, c"user.x").unwrap(), b"value");
    assert_eq!(fs.getxattr_size(file.nodeid, c"user.x").unwrap(), 5);
    assert_eq!(fs.listxattr(file.nodeid).unwrap(), [c"user.x"]);
    assert_eq!(fs.listxattr_size(file.nodeid).unwrap(), 7);
    fs.removexattr(file.nodeid, c"user.x").unwrap();
    let gone = fs.getxattr(file.nodeid, c"user.x").unwrap_err();
    assert_eq!(gone.errno(), Some(libc::ENODATA));

    fs.access(file.nodeid, libc::R_OK).unwrap();
    assert!(fs.statfs(ROOT).unwrap().blocks > 0);
    let opened = fs.opendir(dir.nodeid).unwrap();
    let names: Vec<_> = fs.readdir_all(dir.nodeid, opened).unwrap();
    assert_eq!(names.iter().filter(|one| one.kind == 8).count(), 2);
    let plus = fs.readdirplus_all(dir.nodeid, opened).unwrap();
    assert!(plus.iter().any(|one| one.node.nodeid == file.nodeid));
    fs.fsyncdir(dir.nodeid, opened, false).unwrap();
    fs.releasedir(dir.nodeid, opened).unwrap();

    // What is not served says ENOSYS, so that the guest's kernel stops asking.
    let enosys = Some(libc::ENOSYS);
    let lock = FileLock {
        start: 0,
        end: 9,
        r#type: 0,
        pid: 1,
    };
    assert_eq!(
        fs.getlk(file.nodeid, handle, 1, lock).unwrap_err().errno(),
        enosys
    );
    assert_eq!(
        fs.setlk(file.nodeid, handle, 1, lock).unwrap_err().errno(),
        enosys
    );
    let unknown = fs
        .request(vmm::fuse::Call::new(4711, ROOT).reply(0))
        .unwrap_err();
    assert_eq!(unknown.errno(), enosys);

    let reading = fs.submit_read(file.nodeid, handle, 0, 4).unwrap();
    fs.interrupt(reading).unwrap();
    assert_eq!(fs.collect(reading).unwrap().bytes, b"0123");
    fs.release(file.nodeid, handle).unwrap();
    fs.batch_forget(&[(file.nodeid, 1), (link.nodeid, 1)])
        .unwrap();
    fs.unlink(ROOT, c"copy").unwrap();
    let busy = fs.rmdir(ROOT, c"dir").unwrap_err();
    assert_eq!(busy.errno(), Some(libc::ENOTEMPTY));
    fs.destroy().unwrap();
}

#[each_runtime]
fn lookup_of_path_is_refused(runtime: &str) {
    let server = Server::start(&["--runtime", runtime]);
    std::os::unix::fs::symlink("/etc", server.share().join("link")).unwrap();
    let mut fs = server.session(Profile::Simple, &Options::default());
    for name in [c"..", c".", c"", c"a/b", c"../share", c"/etc"] {
        match fs.lookup(ROOT, name) {
            // A guest asks so for file handles.
            Ok(entry) => assert!([c"..", c"."].contains(&name) && entry.nodeid == ROOT),
            Err(refused) => assert_eq!(refused.errno(), Some(libc::EINVAL), "{name:?}"),
        }
        assert!(
            fs.mkdir(ROOT, name, 0o755).unwrap_err().errno().is_some(),
            "{name:?}"
        );
    }
    let link = fs.lookup(ROOT, c"link").unwrap();
    assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    let through = fs.lookup(link.nodeid, c"passwd").unwrap_err().errno();
    assert_eq!(through, Some(libc::ENOTDIR));
    assert!(fs.opendir(link.nodeid).unwrap_err().errno().is_some());
    assert!(
        fs.open(link.nodeid, libc::O_RDONLY)
            .unwrap_err()
            .errno()
            .is_some()
    );
}

#[each_runtime]
fn open_of_fifo_delays_no_request(runtime: &str) {
    let server = Server::start(&["--runtime", runtime, "--workers", "1"]);
    let mut fs = server.session(Profile::Simple, &Options::default());
    let fifo = fs.mknod(ROOT, c"fifo", libc::S_IFIFO | 0o600, 0).unwrap();
    for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
        let refused = fs.open(fifo.nodeid, flags).unwrap_err().errno();
        assert!(refused.is_some());
    }
    fs.getattr(ROOT).unwrap();
}

#[each_runtime]
fn truncation_by_a_user_clears_set_id_bits(runtime: &str) {
    let server = Server::start(&["--runtime", runtime]);
    let mut fs = server.session(Profile::Simple, &Options::default());
    // With mapped owners the caller's ids are unknown.
    fs.init_offering(LINUX_OFFERS & !init::ALLOW_IDMAP).unwrap();
    let (file, handle) = fs.create(ROOT, c"file", 0o777).unwrap();
    fs.release(file.nodeid, handle).unwrap();
    for (uid, left) in [(0, 0o6777), (1000, 0o777)] {
        fs.chmod(file.nodeid, 0o6777).unwrap();
        fs.act_as(uid, uid);
        let flags = libc::O_WRONLY | libc::O_TRUNC;
        let opened = fs.open(file.nodeid, flags).unwrap();
        fs.release(file.nodeid, opened).unwrap();
        let mode = fs.getattr(file.nodeid).unwrap().attr.mode;
        assert_eq!(mode & 0o7777, left, "user {uid}");
        fs.act_as(0, 0);
    }
}
