//! A damaged state table, which is read and resumed from.
//!
//! An input is a list of stores into the table of a file system in use, as no server would have
//! made them. What must hold: the table is refused, or a file system resumes from it, in which
//! every operation returns, nothing outside of the share is reached, and everything is released at
//! the end.
//!
//! A store of the input is: its location (part, one byte; word, two bytes), its kind (one byte),
//! the value (eight).

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use ringfsd::fs::passthrough::{Options, Passthrough, PreviousProcess, Shared};
use ringfsd::fs::{Caller, FileSystem, Handle, HandleKind, LockOwner, NodeId, Replay};
use ringfsd::internals::passthrough::with_table;
use ringfsd::internals::state::{Limits, Table};
use ringfsd::io::{Lock, LockKind, RecordLock};

use crate::count;
use crate::share::Share;
use crate::source::Source;

const WORD: u64 = 8;
/// Words of a chunk, and how many chunks of the table are in use.
const CHUNK: u64 = 8192;
const CHUNKS: u64 = 12;
/// Words of a chunk that are.
const USED: u64 = 256;

const ROOT: NodeId = NodeId::ROOT;
const CALLER: Caller = Caller {
    uid: Some(0),
    gid: Some(0),
    pid: 1,
    kill_set_id: false,
    group: None,
};

const LIMITS: Limits = Limits {
    inodes: 100,
    handles: 50,
    queues: 1,
};

/// A share, and the table of a file system that has it in use.
struct Scene {
    share: Share,
    /// Parts of the table, by where they begin in bytes.
    parts: Vec<(u64, Vec<u8>)>,
    len: u64,
    journals: u64,
    kinds: u64,
    chunks: u64,
}

fn memfd() -> OwnedFd {
    rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd")
}

fn shared(share: &Path) -> Shared {
    let open = |path: &Path| std::fs::File::open(path).expect("a directory").into();
    Shared {
        root: open(share),
        proc_fds: open(Path::new("/proc/self/fd")),
        path: share.to_owned(),
    }
}

fn options() -> Options {
    Options {
        max_open_inodes: Some(40),
        ..Share::options()
    }
}

/// Has a few inodes known, files open and ranges locked.
fn use_it(fs: &Passthrough) {
    fs.prepare_thread().expect("a thread");
    let found = |parent, name: &CStr| fs.lookup(&CALLER, parent, name).expect("it is there").node;
    let directory = found(ROOT, c"directory");
    let file = found(directory, c"file");
    let other = found(ROOT, c"other");
    let writing = libc::O_RDWR.cast_unsigned();
    let opened = fs.open(&CALLER, file, writing).expect("a file").handle;
    fs.open(&CALLER, other, writing).expect("a file");
    fs.opendir(&CALLER, directory, 0).expect("a directory");
    let owner = LockOwner(9);
    let lock = Lock::Record(RecordLock {
        kind: LockKind::Exclusive,
        start: 3,
        end: 9,
    });
    let locked = fs.lock_file(file, opened, owner).expect("a file to lock");
    locked.try_lock(lock).expect("a lock");
    fs.record_lock(file, opened, owner, lock);
}

impl Scene {
    fn new() -> Self {
        let share = Share::new();
        let path = share.path();
        std::fs::create_dir(path.join("directory")).expect("a directory");
        for name in ["directory/file", "other"] {
            std::fs::write(path.join(name), name).expect("a file");
        }
        let table = Table::in_memory(&LIMITS).expect("a table");
        table.set_agreement(Some([31, 0, 4096, 4096, 1, 0, 0, 0]));
        table.set_session_snapshot(b"what a front end might have said");
        let (fs, _) = with_table(shared(&path), options(), &table, None).expect("a file system");
        use_it(&fs);

        let len = rustix::fs::fstat(table.file().expect("a file"))
            .expect("its length")
            .st_size;
        let word = |at: u64| {
            let mut bytes = [0; 8];
            rustix::io::pread(table.file().expect("a file"), &mut bytes, at * WORD)
                .expect("a word");
            u64::from_ne_bytes(bytes)
        };
        let count = word(2);
        let journals = 512 + 2 * 16 * 1024 + (1 << 19);
        let kinds = journals + 2 * 256 * 8192;
        let chunks = (kinds + count).next_multiple_of(CHUNK);
        let areas = [
            (0, 1024),
            (512 + 16 * 1024, 64),
            (journals, 64),
            (kinds, 64),
        ]
        .into_iter();
        let areas = areas.chain((0..CHUNKS).map(|n| (chunks + n * CHUNK, USED)));
        let parts = areas.map(|(first, words)| {
            let mut bytes = vec![0; usize::try_from(words * WORD).expect("few")];
            rustix::io::pread(table.file().expect("a file"), &mut bytes, first * WORD)
                .expect("a part");
            (first * WORD, bytes)
        });
        Self {
            parts: parts.collect(),
            len: u64::try_from(len).expect("a length"),
            journals,
            kinds,
            chunks,
            share,
        }
    }

    /// The table with the stores of `source` made to it.
    fn damaged(&self, source: &mut Source<'_>) -> OwnedFd {
        let file = memfd();
        rustix::fs::ftruncate(&file, self.len).expect("its length");
        for (at, bytes) in &self.parts {
            rustix::io::pwrite(&file, bytes, *at).expect("a part");
        }
        while !source.is_empty() {
            let (part, word, how) = (source.u8(), u64::from(source.u16()), source.u8());
            let value = source.u64();
            let place = match part {
                0..0x20 => word % 1024,
                0x20..0x30 => self.kinds + word % 64,
                0x30..0x40 => self.journals + word % 64,
                0x40..0x48 => {
                    rustix::fs::ftruncate(&file, word * 64).expect("another length");
                    continue;
                }
                part => self.chunks + u64::from(part) % CHUNKS * CHUNK + word % USED,
            };
            let mut old = [0; 8];
            let _ = rustix::io::pread(&file, &mut old, place * WORD);
            let old = u64::from_ne_bytes(old);
            let new = match how % 4 {
                0 => value,
                1 => old ^ 1 << (value % 64),
                2 => old.wrapping_add(value),
                // What stands elsewhere in the table.
                _ => {
                    let other = self.chunks + value % CHUNKS * CHUNK + (value >> 8) % USED;
                    let mut bytes = [0; 8];
                    let _ = rustix::io::pread(&file, &mut bytes, other * WORD);
                    u64::from_ne_bytes(bytes)
                }
            };
            let _ = rustix::io::pwrite(&file, &new.to_ne_bytes(), place * WORD);
        }
        file
    }
}

/// One input.
pub fn run(data: &[u8]) {
    thread_local! {
        static SCENE: Scene = Scene::new();
    }
    SCENE.with(|scene| with(scene, Source::new(data)));
}

fn with(scene: &Scene, mut source: Source<'_>) {
    let in_flight = vec![source.u64(), 2];
    let file = scene.damaged(&mut source);
    count::add(1);
    let Ok(table) = Table::open(file) else {
        return;
    };
    let _ = (
        table.agreement(),
        table.session_snapshot(),
        table.is_in_use(),
    );
    let _ = ringfsd::internals::virtqueue::unanswered_requests(&table);
    let share = scene.share.path();
    let past = PreviousProcess {
        inherited_fds: false,
        in_flight,
    };
    let Ok((fs, _)) = with_table(shared(&share), options(), &table, Some(&past)) else {
        return;
    };
    go_on(&fs);
    fs.reset();
    assert_eq!((fs.known_inodes(), fs.open_handles()), (1, 0));
    drop(fs);
    scene.share.check_outside();
}

/// Uses what came back, whatever it is.
fn go_on(fs: &Passthrough) {
    let fs = Arc::new(fs);
    for node in (1..8).map(NodeId) {
        let _ = fs.getattr(&CALLER, node, None);
        for name in [c"directory", c"file", c"other", c"absent"] {
            let _ = fs.lookup(&CALLER, node, name);
        }
        for handle in (1..5).map(Handle) {
            for kind in [HandleKind::File, HandleKind::Directory] {
                let _ = fs.file(node, handle, kind);
            }
            let _ = fs.release(node, handle);
        }
        let number = fs.inode_at(node, c"file").unwrap_or_default();
        let _ = fs.was_renamed((ROOT, c"other"), (node, c"file"), number);
        let _ = fs.was_removed(ROOT, c"other", number);
        let _ = (fs.recorded_inode(node.0), fs.was_forgotten(node, 2));
        fs.forget(node, 1);
    }
}
