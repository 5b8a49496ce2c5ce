//! Limits on what one guest may hold.

use std::collections::HashSet;
use std::ffi::CString;

use testing::{Server, each_runtime};
use vmm::fuse::wire::{FileLock, opcode};
use vmm::fuse::{Call, ROOT};
use vmm::{Options, Profile};

fn name(at: usize) -> CString {
    CString::new(format!("file{at}")).unwrap()
}

fn lock(kind: i32, start: u64, end: u64) -> FileLock {
    FileLock {
        start,
        end,
        r#type: kind.cast_unsigned(),
        pid: 1,
    }
}

#[each_runtime]
fn inodes_beyond_the_bound_are_enfile(runtime: &str) {
    let server = Server::start(&["--runtime", runtime, "--max-inodes", "100"]);
    for at in 0..200 {
        std::fs::write(server.share().join(format!("file{at}")), "").unwrap();
    }
    let mut fs = server.session(Profile::Simple, &Options::default());
    let nodes: Vec<_> = (0..100)
        .map(|at| fs.lookup(ROOT, &name(at)).unwrap().nodeid)
        .collect();
    let enfile = Some(libc::ENFILE);
    assert_eq!(fs.lookup(ROOT, &name(100)).unwrap_err().errno(), enfile);
    assert_eq!(fs.mkdir(ROOT, c"new", 0o755).unwrap_err().errno(), enfile);
    assert_eq!(fs.symlink(ROOT, c"new", c"to").unwrap_err().errno(), enfile);
    let made = fs.mknod(ROOT, c"new", 0o10_0644, 0);
    assert_eq!(made.unwrap_err().errno(), enfile);
    assert_eq!(fs.create(ROOT, c"new", 0o644).unwrap_err().errno(), enfile);
    assert_eq!(fs.tmpfile(ROOT, 0o600).unwrap_err().errno(), enfile);
    assert!(
        !server.share().join("new").exists(),
        "it was made all the same"
    );
    // What is known is found again, and lists come without what can't be known.
    assert_eq!(fs.lookup(ROOT, &name(7)).unwrap().nodeid, nodes[7]);
    let directory = fs.opendir(ROOT).unwrap();
    let listed = fs.readdirplus_all(ROOT, directory).unwrap();
    assert_eq!(listed.len(), 202);
    // What is released makes room.
    fs.forget(nodes[0], 1_000_000).unwrap();
    // A stopped queue has dealt with all that was on it, and a FORGET has no answer.
    let bases = fs.guest().stop().unwrap();
    fs.guest().restart(&bases).unwrap();
    assert!(fs.lookup(ROOT, &name(150)).is_ok());
}

#[each_runtime]
fn remembered_inodes_are_dropped_before_enfile(runtime: &str) {
    let server = Server::start(&[
        "--runtime",
        runtime,
        "--max-inodes",
        "100",
        "--remember-inodes",
        "1000",
    ]);
    for at in 0..200 {
        std::fs::write(server.share().join(format!("file{at}")), "").unwrap();
    }
    let mut fs = server.session(Profile::Simple, &Options::default());
    let mut remembered = Vec::new();
    for at in 0..100 {
        remembered.push(fs.lookup(ROOT, &name(at)).unwrap().nodeid);
        fs.forget(remembered[at], 1).unwrap();
    }
    let bases = fs.guest().stop().unwrap();
    fs.guest().restart(&bases).unwrap();
    // Made-up node ids find nothing.
    for node in (0..64).map(|bit| 1 << bit).chain([u64::MAX]) {
        if node != ROOT && !remembered.contains(&node) {
            let found = fs.lookup(node, c".").unwrap_err();
            assert_eq!(found.errno(), Some(libc::ESTALE), "{node}");
        }
    }
    for at in 100..200 {
        fs.lookup(ROOT, &name(at)).unwrap();
    }
    let enfile = Some(libc::ENFILE);
    assert_eq!(fs.mkdir(ROOT, c"new", 0o755).unwrap_err().errno(), enfile);
    for node in remembered {
        let found = fs.lookup(node, c".").unwrap_err();
        assert_eq!(found.errno(), Some(libc::ESTALE));
    }
}

#[each_runtime]
fn open_files_beyond_the_bound_are_enfile(runtime: &str) {
    let server = Server::start(&["--runtime", runtime, "--max-handles", "50"]);
    std::fs::write(server.share().join("file"), "").unwrap();
    let mut fs = server.session(Profile::Simple, &Options::default());
    let node = fs.lookup(ROOT, c"file").unwrap().nodeid;
    let handles: Vec<_> = (0..50)
        .map(|_| fs.open(node, libc::O_RDONLY).unwrap())
        .collect();
    let enfile = Some(libc::ENFILE);
    assert_eq!(fs.open(node, libc::O_RDONLY).unwrap_err().errno(), enfile);
    assert_eq!(fs.opendir(ROOT).unwrap_err().errno(), enfile);
    assert_eq!(fs.create(ROOT, c"new", 0o644).unwrap_err().errno(), enfile);
    assert_eq!(fs.tmpfile(ROOT, 0o600).unwrap_err().errno(), enfile);
    assert!(
        !server.share().join("new").exists(),
        "it was made all the same"
    );
    fs.release(node, handles[0]).unwrap();
    assert!(
        fs.open(node, libc::O_RDONLY).is_ok(),
        "what is closed makes room"
    );
}

/// A directory that is half read keeps 64 KiB of entries, or, where many do, is read again.
#[each_runtime]
fn half_read_directories_are_bounded(runtime: &str) {
    const OPEN: usize = 3000;
    let server = Server::start(&["--runtime", runtime]);
    for at in 0..100 {
        std::fs::write(server.share().join(format!("file{at}")), "").unwrap();
    }
    let mut fs = server.session(Profile::Simple, &Options::default());
    let directories: Vec<_> = (0..OPEN).map(|_| fs.opendir(ROOT).unwrap()).collect();
    let before = resident(&server);
    let halves: Vec<_> = directories
        .iter()
        .map(|directory| fs.readdir(ROOT, *directory, 0, 2048).unwrap())
        .collect();
    let more = resident(&server).saturating_sub(before);
    assert!(
        more < 100 << 20,
        "{more} bytes for {OPEN} directories half read"
    );
    for (directory, mut half) in directories.into_iter().zip(halves) {
        loop {
            let offset = half.last().unwrap().offset;
            let rest = fs.readdir(ROOT, directory, offset, 4096).unwrap();
            if rest.is_empty() {
                break;
            }
            half.extend(rest);
        }
        let names: HashSet<_> = half.iter().map(|entry| &entry.name).collect();
        assert_eq!((names.len(), half.len()), (102, 102), "each entry once");
    }
}

/// Bytes of memory that the server has.
fn resident(server: &Server) -> usize {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", server.pid())).unwrap();
    let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * rustix::param::page_size()
}

#[each_runtime]
fn locks_beyond_the_bound_are_enolck(runtime: &str) {
    let server = Server::start(&["--runtime", runtime, "--max-handles", "50", "--posix-locks"]);
    let mut fs = server.session(Profile::Simple, &Options::default());
    let (file, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
    let node = file.nodeid;
    for owner in 1..50 {
        let shared = lock(libc::F_RDLCK, 0, 9);
        fs.setlk(node, handle, owner, shared).unwrap();
    }
    let refused = fs.setlk(node, handle, 50, lock(libc::F_RDLCK, 0, 9));
    assert_eq!(refused.unwrap_err().errno(), Some(libc::ENOLCK));
    // Who has a lock may have another, and who gives all up makes room.
    fs.setlk(node, handle, 1, lock(libc::F_RDLCK, 20, 29))
        .unwrap();
    let flush = [handle.fh, 0, 1].map(u64::to_le_bytes).concat();
    fs.request(Call::new(opcode::FLUSH, node).arg(&flush).reply(0))
        .unwrap();
    fs.setlk(node, handle, 50, lock(libc::F_RDLCK, 0, 9))
        .unwrap();
}

#[each_runtime]
fn waiting_locks_are_bounded(runtime: &str) {
    // One worker takes them in order.
    let args = ["--runtime", runtime, "--posix-locks", "--workers", "1"];
    let server = Server::start(&args);
    let options = Options::default().queue_size(1024);
    let mut fs = server.session(Profile::Simple, &options);
    let (file, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
    let node = file.nodeid;
    fs.setlk(node, handle, 1, lock(libc::F_WRLCK, 0, 9))
        .unwrap();
    let waits: Vec<_> = (0..300)
        .map(|_| {
            fs.submit_setlkw(node, handle, 2, lock(libc::F_WRLCK, 0, 9))
                .unwrap()
        })
        .collect();
    let (waiting, refused) = waits.split_at(256);
    for wait in refused {
        let refused = fs.collect(*wait).unwrap_err();
        assert_eq!(refused.errno(), Some(libc::ENOLCK));
    }
    // The rest of the queue is served at the same time, and they get the lock.
    fs.getattr(ROOT).unwrap();
    fs.setlk(node, handle, 1, lock(libc::F_UNLCK, 0, 9))
        .unwrap();
    for wait in waiting {
        fs.collect(*wait).unwrap();
    }
}
