//! File systems of fuse-backend-rs, by the adapter, through the real server.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::path::Path;
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::{
    Context, Entry, FileLock, FileSystem as Trait, FsOptions, Layer, OpenOptions, ZeroCopyWriter,
};
use fuse_backend_rs::api::{Vfs, VfsOptions};
use fuse_backend_rs::overlayfs::{self, OverlayFs};
use fuse_backend_rs::passthrough::{self, PassthroughFs};
use ringfsd::fs::FileSystem;
use ringfsd::fs::fuse_backend::{Adapter, Backend, Options};
use ringfsd::internals::fuse::SessionOptions;
use ringfsd::io::Choice;
use testing::TIMEOUT;
use vmm::Session;
use vmm::fuse::wire::FileLock as GuestLock;
use vmm::fuse::{Client, FuseError, ROOT};

use super::served::{engines, serve};

type Guest = Client<Session>;

fn directory(dir: &Path, import: bool) -> PassthroughFs {
    let fs = PassthroughFs::new(passthrough::Config {
        root_dir: dir.to_str().unwrap().to_owned(),
        xattr: true,
        do_import: !import,
        ..passthrough::Config::default()
    })
    .unwrap();
    if import {
        fs.import().unwrap();
    }
    fs
}

/// Serves what `fs` makes, on each engine, where calls may block and where they don't.
fn in_each_way<F: Backend>(fs: impl Fn() -> F, guest: impl Fn(&mut Guest)) {
    for runtime in engines() {
        for may_block in [false, true] {
            let options = Options {
                may_block,
                ..Options::default()
            };
            let adapter = Arc::new(Adapter::with_options(fs(), options));
            let served: Arc<dyn FileSystem> = Arc::clone(&adapter) as _;
            serve(served, (runtime, 2), SessionOptions::default(), &guest);
            assert_eq!((adapter.lookups(), adapter.open_files()), (0, 0));
            assert_eq!(
                Arc::strong_count(&adapter),
                1,
                "nobody else has it any more"
            );
        }
    }
}

/// What a guest does with files in the directory `dir`.
fn uses_files(guest: &mut Guest, dir: u64) {
    let (file, handle) = guest.create(dir, c"file", 0o640).unwrap();
    let data: Vec<u8> = (0..100_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    assert_eq!(guest.write(file.nodeid, handle, 3, &data).unwrap(), 100_000);
    let read = guest.read(file.nodeid, handle, 0, 200_000).unwrap();
    assert_eq!((&read[..3], &read[3..]), (&[0; 3][..], &data[..]));
    let end = guest.read(file.nodeid, handle, 100_003, 10).unwrap();
    assert!(end.is_empty());
    guest.fsync(file.nodeid, handle, false).unwrap();
    guest.fallocate(file.nodeid, handle, 0, 0..200_000).unwrap();
    assert_eq!(guest.getattr(file.nodeid).unwrap().attr.size, 200_000);
    guest.truncate(file.nodeid, 7).unwrap();
    assert_eq!(guest.fgetattr(file.nodeid, handle).unwrap().attr.size, 7);
    guest.flush(file.nodeid, handle).unwrap();
    guest.release(file.nodeid, handle).unwrap();
    let closed = guest.read(file.nodeid, handle, 0, 1).unwrap_err();
    assert_eq!(closed.errno(), Some(libc::EBADF));
    guest.rename(dir, c"file", dir, c"moved").unwrap();
    guest.symlink(dir, c"link", c"moved").unwrap();
    let inner = guest.mkdir(dir, c"dir", 0o755).unwrap();
    assert_eq!(guest.lookup(dir, c"moved").unwrap().nodeid, file.nodeid);
    assert_eq!(names(guest, dir), ["dir", "link", "moved"]);
    assert!(guest.statfs(dir).unwrap().blocks > 0);
    guest.unlink(dir, c"moved").unwrap();
    guest.unlink(dir, c"link").unwrap();
    guest.rmdir(dir, c"dir").unwrap();
    guest.forget(inner.nodeid, 1).unwrap();
    let gone = guest.lookup(dir, c"moved").unwrap_err();
    assert_eq!(gone.errno(), Some(libc::ENOENT));
}

/// The names in a directory, by READDIRPLUS, sorted.
fn names(guest: &mut Guest, dir: u64) -> Vec<String> {
    let listing = guest.opendir(dir).unwrap();
    let entries = guest.readdirplus_all(dir, listing).unwrap();
    guest.releasedir(dir, listing).unwrap();
    let mut names: Vec<_> = entries
        .iter()
        .map(|plus| plus.entry.name.to_str().unwrap().to_owned())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    names
}

#[test]
fn passthrough_serves_files() {
    let dir = tempfile::tempdir().unwrap();
    in_each_way(
        || directory(dir.path(), false),
        |guest| {
            uses_files(guest, ROOT);
            // More entries than one reply takes.
            for n in 0..100 {
                let name = std::ffi::CString::new(format!("name-{n:03}")).unwrap();
                let (file, handle) = guest.create(ROOT, &name, 0o644).unwrap();
                guest.release(file.nodeid, handle).unwrap();
            }
            assert_eq!(names(guest, ROOT).len(), 100);
            for n in 0..100 {
                let name = std::ffi::CString::new(format!("name-{n:03}")).unwrap();
                guest.unlink(ROOT, &name).unwrap();
            }
            guest.setxattr(ROOT, c"user.x", b"value", 0).unwrap();
            assert_eq!(guest.getxattr(ROOT, c"user.x").unwrap(), b"value");
            assert_eq!(guest.getxattr_size(ROOT, c"user.x").unwrap(), 5);
            let listed = guest.listxattr(ROOT).unwrap();
            assert!(listed.iter().any(|name| &**name == c"user.x"));
        },
    );
}

#[test]
fn vfs_serves_two_directories() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let vfs = || {
        let vfs = Vfs::new(VfsOptions {
            no_open: false,
            no_opendir: false,
            ..VfsOptions::default()
        });
        for (name, dir) in [("/one", &one), ("/two", &two)] {
            vfs.mount(Box::new(directory(dir.path(), true)), name)
                .unwrap();
        }
        vfs
    };
    in_each_way(vfs, |guest| {
        for name in [c"one", c"two"] {
            let dir = guest.lookup(ROOT, name).unwrap();
            uses_files(guest, dir.nodeid);
        }
    });
}

#[test]
fn overlay_writes_to_upper_layer_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    };
    std::fs::write(path("lower").join("below"), "below").unwrap();
    let overlay = || {
        // A new upper layer each time.
        let _ = std::fs::remove_file(path("upper").join("below"));
        type BoxedLayer = Box<dyn Layer<Inode = u64, Handle = u64> + Send + Sync>;
        let layer = |name| -> Arc<BoxedLayer> { Arc::new(Box::new(directory(&path(name), true))) };
        OverlayFs::new(
            Some(layer("upper")),
            vec![layer("lower")],
            overlayfs::config::Config {
                work: path("work").to_str().unwrap().to_owned(),
                do_import: true,
                ..overlayfs::config::Config::default()
            },
        )
        .unwrap()
    };
    in_each_way(overlay, |guest| {
        let below = guest.lookup(ROOT, c"below").unwrap();
        let handle = guest.open(below.nodeid, libc::O_RDWR).unwrap();
        assert_eq!(
            guest.read(below.nodeid, handle, 0, 10).unwrap()[..5],
            *b"below"
        );
        guest.write(below.nodeid, handle, 0, b"above").unwrap();
        guest.release(below.nodeid, handle).unwrap();
        assert_eq!(names(guest, ROOT), ["below"]);
    });
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    assert_eq!(
        (read("upper/below"), read("lower/below")),
        ("above".into(), "below".into())
    );
}

/// A file system that waits: for as many reads at once as there are requests, and for `open` to
/// be told that it may end. It keeps locks too.
struct Hesitant {
    reads: Barrier,
    may_open: Mutex<bool>,
    told: Condvar,
    locks: Mutex<HashMap<u64, FileLock>>,
}

impl Hesitant {
    fn new(reads: usize) -> Self {
        Self {
            reads: Barrier::new(reads),
            may_open: Mutex::new(true),
            told: Condvar::new(),
            locks: Mutex::default(),
        }
    }

    fn let_open(&self, may: bool) {
        *self.may_open.lock().unwrap() = may;
        self.told.notify_all();
    }

    fn stat(inode: u64) -> stat64 {
        let mut stat = Entry::default().attr;
        stat.st_ino = inode;
        stat.st_mode = libc::S_IFREG | 0o644;
        stat.st_nlink = 1;
        stat
    }
}

impl Trait for Hesitant {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        Ok(capable)
    }

    fn lookup(&self, _: &Context, _: u64, _: &CStr) -> io::Result<Entry> {
        Ok(Entry {
            inode: 2,
            attr: Self::stat(2),
            ..Entry::default()
        })
    }

    fn getattr(&self, _: &Context, inode: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        Ok((Self::stat(inode), Duration::ZERO))
    }

    fn open(
        &self,
        _: &Context,
        _: u64,
        _: u32,
        _: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let may_open = self.may_open.lock().unwrap();
        drop(self.told.wait_while(may_open, |may| !*may).unwrap());
        Ok((Some(7), OpenOptions::empty(), None))
    }

    fn read(
        &self,
        _: &Context,
        _: u64,
        _: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        self.reads.wait();
        let byte = u8::try_from(offset >> 12).unwrap();
        writer.write_all(&vec![byte; usize::try_from(size).unwrap()])?;
        Ok(usize::try_from(size).unwrap())
    }

    fn setlk(
        &self,
        _: &Context,
        _: u64,
        _: u64,
        owner: u64,
        lock: FileLock,
        _: u32,
    ) -> io::Result<()> {
        let mut locks = self.locks.lock().unwrap();
        if lock.lock_type.cast_signed() == libc::F_UNLCK {
            locks.remove(&owner);
        } else if locks.keys().any(|held| *held != owner) {
            return Err(io::ErrorKind::WouldBlock.into());
        } else {
            locks.insert(owner, lock);
        }
        Ok(())
    }

    fn getlk(
        &self,
        _: &Context,
        _: u64,
        _: u64,
        owner: u64,
        lock: FileLock,
        _: u32,
    ) -> io::Result<FileLock> {
        let locks = self.locks.lock().unwrap();
        let held = locks.iter().find(|(held, _)| **held != owner);
        let unlocked = FileLock {
            lock_type: libc::F_UNLCK.cast_unsigned(),
            ..lock
        };
        Ok(held.map_or(unlocked, |(_, lock)| *lock))
    }
}

/// Serves a hesitant file system with one worker, on each engine.
fn with_hesitant(reads: usize, guest: impl Fn(&mut Guest, &Hesitant)) {
    let session = SessionOptions {
        posix_locks: true,
        ..SessionOptions::default()
    };
    for runtime in engines() {
        let adapter = Arc::new(Adapter::new(Hesitant::new(reads)));
        let served: Arc<dyn FileSystem> = Arc::clone(&adapter) as _;
        serve(served, (runtime, 1), session.clone(), |client| {
            guest(client, adapter.file_system());
        });
    }
}

#[test]
fn slow_call_delays_no_other_request() {
    with_hesitant(1, |guest, fs| {
        let file = guest.lookup(ROOT, c"file").unwrap().nodeid;
        fs.let_open(false);
        let slow = {
            use vmm::fuse::{Call, wire};
            use zerocopy::IntoBytes;
            let asked = wire::OpenIn {
                flags: 0,
                open_flags: 0,
            };
            let call = Call::new(wire::opcode::OPEN, file).arg(asked.as_bytes());
            guest.submit(call.reply_of::<wire::OpenOut>()).unwrap()
        };
        for _ in 0..100 {
            guest.getattr(file).unwrap();
        }
        guest.forget(file, 1).unwrap();
        assert!(guest.returned().unwrap().is_empty(), "it is still waiting");
        fs.let_open(true);
        guest.collect(slow).unwrap();
    });
}

#[test]
fn thirty_two_reads_are_in_file_system_at_once() {
    const DEPTH: usize = 32;
    with_hesitant(DEPTH, |guest, _| {
        let file = guest.lookup(ROOT, c"file").unwrap().nodeid;
        let handle = guest.open(file, libc::O_RDONLY).unwrap();
        let reads: Vec<_> = (0..DEPTH as u64)
            .map(|n| guest.submit_read(file, handle, n << 12, 4096).unwrap())
            .collect();
        for (n, read) in reads.into_iter().enumerate() {
            let data = guest.collect(read).unwrap().bytes;
            assert_eq!(data, vec![u8::try_from(n).unwrap(); 4096]);
        }
    });
}

fn lock(kind: i32) -> GuestLock {
    GuestLock {
        start: 0,
        end: 9,
        r#type: kind.cast_unsigned(),
        pid: 1,
    }
}

#[test]
fn locks_of_file_system_are_waited_for_and_interrupted() {
    with_hesitant(1, |guest, _| {
        let file = guest.lookup(ROOT, c"file").unwrap().nodeid;
        let handle = guest.open(file, libc::O_RDWR).unwrap();
        guest.setlk(file, handle, 1, lock(libc::F_WRLCK)).unwrap();
        let refused = guest.setlk(file, handle, 2, lock(libc::F_RDLCK));
        assert_eq!(errno(refused), Some(libc::EAGAIN));
        let held = guest.getlk(file, handle, 2, lock(libc::F_RDLCK)).unwrap();
        assert_eq!(held.r#type, libc::F_WRLCK.cast_unsigned());
        let wait = |guest: &mut Guest, owner| {
            guest
                .submit_setlkw(file, handle, owner, lock(libc::F_WRLCK))
                .unwrap()
        };
        let interrupted = wait(guest, 2);
        guest.interrupt(interrupted).unwrap();
        let ended = guest.collect(interrupted);
        assert_eq!(errno(ended), Some(libc::EINTR));
        let waiting = wait(guest, 2);
        guest.setlk(file, handle, 1, lock(libc::F_UNLCK)).unwrap();
        guest.collect(waiting).unwrap();
        let held = guest.getlk(file, handle, 1, lock(libc::F_RDLCK)).unwrap();
        assert_eq!(held.r#type, libc::F_WRLCK.cast_unsigned());
    });
}

fn errno<T>(result: Result<T, FuseError>) -> Option<i32> {
    result.err().and_then(|error| error.errno())
}

#[test]
fn migration_is_refused() {
    let adapter = Arc::new(Adapter::new(Hesitant::new(1)));
    assert!(adapter.replay().is_none(), "no recovery either");
    let served: Arc<dyn FileSystem> = Arc::clone(&adapter) as _;
    let session = SessionOptions::default();
    serve(served, (Choice::Tokio, 1), session, |guest| {
        guest.guest().stop().unwrap();
        assert!(guest.guest().save_state(TIMEOUT).is_err());
    });
}
