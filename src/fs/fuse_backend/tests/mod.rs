//! An adapter over a file system that records what it is asked.

mod fake;

use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuse_backend_rs::api::filesystem::FsOptions;
use rustix::io::Errno;

use self::fake::Fake;
use super::{Adapter, Options};
use crate::fs::{
    Caller, Changes, DirEntry, DirSink, Entry, FileObject, FileSystem, Handle, HandleKind, Label,
    LockOwner, NegotiatedTerms, NewNode, NewTime, NodeId, OpenFile, Timestamp,
};
use crate::io::{
    Engine, GuestBuffer, Lock, LockKind, RecordLock, Runtime, SyncKind, Transferred, WriteMode,
};

const CALLER: Caller = Caller {
    uid: Some(1000),
    gid: Some(100),
    pid: 42,
    kill_set_id: false,
    group: None,
};

/// An adapter that calls `fake` at once, after INIT.
fn adapter(fake: Fake, root: u64) -> Adapter<Fake> {
    let options = Options {
        root,
        may_block: false,
    };
    let adapter = Adapter::with_options(fake, options);
    adapter.begin(&NegotiatedTerms::default());
    adapter.calls();
    adapter
}

impl Adapter<Fake> {
    /// The calls since the last time.
    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.file_system().calls.lock().unwrap())
    }
}

fn object(adapter: &Adapter<Fake>, node: u64, handle: Handle) -> Arc<dyn FileObject> {
    match adapter
        .file(NodeId(node), handle, HandleKind::File)
        .unwrap()
    {
        OpenFile::Object(object) => object,
        OpenFile::Host(_) => panic!("no file of the host"),
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    Runtime::new(Engine::ThreadPool).unwrap().block_on(future)
}

/// A buffer in `memory` of pieces of 8 bytes, each 16 behind the one before.
fn scattered(memory: &mut [u8], pieces: usize) -> GuestBuffer {
    let start = memory.as_mut_ptr();
    assert!(memory.len() >= pieces * 16);
    let pieces = (0..pieces).map(|n| (start.wrapping_add(n * 16), 8));
    // The memory outlives the buffer in each test, and isn't touched.
    #[allow(unsafe_code, reason = "raw memory stands for a guest's")]
    // SAFETY: all pieces lie in `memory`, which outlives the buffer.
    unsafe {
        GuestBuffer::from_raw_pieces(pieces, Arc::new(()))
    }
}

fn transferred((result, buffer): Transferred) -> usize {
    drop(buffer);
    result.unwrap()
}

#[test]
fn data_are_read_and_written_in_pages_of_guest_itself() {
    let adapter = adapter(Fake::default(), 1);
    let opened = adapter.open(&CALLER, NodeId(5), 0o2).unwrap();
    assert!(opened.keep_cache && !opened.direct_io);
    let mut memory = vec![0; 64];
    let start = memory.as_ptr().addr();
    let pages = [(start, 8), (start + 16, 8), (start + 32, 8)];
    let file = || object(&adapter, 5, opened.handle);
    assert_eq!(
        transferred(run(file().read(scattered(&mut memory, 3), 100))),
        24
    );
    let memory_of = |adapter: &Adapter<Fake>| {
        std::mem::take(&mut *adapter.file_system().memory.lock().unwrap())
    };
    assert_eq!(memory_of(&adapter), pages);
    let mode = WriteMode::default();
    let buffer = scattered(&mut memory, 3);
    assert_eq!(transferred(run(file().write(mode, buffer, 7))), 24);
    assert_eq!(memory_of(&adapter), pages);
    assert_eq!(
        adapter.calls(),
        [
            "open 5 0o2 0",
            "read 5 1005 1000 0o2",
            "3 pieces at 100",
            "write 5 1005 0o2",
            "3 pieces at 7",
        ]
    );
}

#[test]
fn more_pieces_than_one_call_takes_become_several() {
    let adapter = adapter(Fake::default(), 1);
    let opened = adapter.open(&CALLER, NodeId(5), 0).unwrap();
    let mut memory = vec![0; 1500 * 16];
    let buffer = scattered(&mut memory, 1500);
    let read = run(object(&adapter, 5, opened.handle).read(buffer, 3));
    assert_eq!(transferred(read), 12_000);
    assert_eq!(
        adapter.calls()[2..],
        ["1024 pieces at 3", "476 pieces at 8195"]
    );
}

#[test]
fn append_and_durability_reach_the_file() {
    let adapter = adapter(Fake::default(), 1);
    let opened = adapter.open(&CALLER, NodeId(5), 0o1).unwrap();
    let write = |append, durable| {
        let buffer = GuestBuffer::from_vec(vec![1; 4]);
        let mode = WriteMode { append, durable };
        transferred(run(
            object(&adapter, 5, opened.handle).write(mode, buffer, 0)
        ))
    };
    assert_eq!(write(true, None), 4);
    assert_eq!(write(false, Some(SyncKind::Data)), 4);
    let calls = adapter.calls();
    assert_eq!(calls[1], "write 5 1005 0o2001");
    assert_eq!(
        calls[3..],
        ["write 5 1005 0o1", "1 pieces at 0", "fsync 5 1005 true"]
    );
}

#[test]
fn roots_exchange_their_numbers() {
    let adapter = adapter(Fake::default(), 128);
    assert_eq!(
        adapter.lookup(&CALLER, NodeId::ROOT, c"1").unwrap().node,
        NodeId(128)
    );
    assert_eq!(
        adapter.lookup(&CALLER, NodeId(128), c"128").unwrap().node,
        NodeId::ROOT
    );
    assert_eq!(
        adapter.lookup(&CALLER, NodeId(7), c"9").unwrap().node,
        NodeId(9)
    );
    adapter.forget(NodeId(128), 1);
    adapter.forget(NodeId::ROOT, 1);
    assert_eq!(
        adapter.calls(),
        [
            "lookup 128/\"1\" 1000 100 42",
            "lookup 1/\"128\" 1000 100 42",
            "lookup 7/\"9\" 1000 100 42",
            "forget 1 1",
        ]
    );
    assert_eq!(adapter.lookups(), 1);
}

#[test]
fn entry_has_what_file_system_says() {
    let adapter = adapter(Fake::default(), 1);
    let Entry {
        generation,
        attribute_ttl,
        entry_ttl,
        submount,
        ..
    } = adapter.lookup(&CALLER, NodeId::ROOT, c"9").unwrap();
    assert_eq!((generation, submount), (3, true));
    assert_eq!((attribute_ttl.as_secs(), entry_ttl.as_secs()), (1, 2));
    let missing = |name| adapter.lookup(&CALLER, NodeId::ROOT, name).unwrap_err();
    assert_eq!((missing(c"0"), missing(c"x")), (Errno::NOENT, Errno::NOENT));
}

#[test]
fn what_guest_holds_is_returned_when_session_ends() {
    let adapter = adapter(Fake::default(), 1);
    for name in [c"5", c"5", c"6"] {
        adapter.lookup(&CALLER, NodeId::ROOT, name).unwrap();
    }
    // A guest that forgets more than it has.
    adapter.forget(NodeId(6), 1000);
    adapter.forget(NodeId(77), 1);
    adapter.open(&CALLER, NodeId(5), 0).unwrap();
    adapter.opendir(&CALLER, NodeId(5), 0).unwrap();
    adapter.calls();
    adapter.unmounted();
    let mut calls = adapter.calls();
    calls[..2].sort();
    assert_eq!(
        calls,
        [
            "release 5 1005 0o0 false None",
            "releasedir 5 5",
            "forget 5 2",
            "destroy",
        ]
    );
    assert_eq!((adapter.lookups(), adapter.open_files()), (0, 0));
    adapter.reset();
    assert!(adapter.calls().is_empty());
}

#[test]
fn forgets_are_applied_in_background_where_calls_may_block() {
    let adapter = Adapter::new(Fake::default());
    adapter.begin(&NegotiatedTerms::default());
    for _ in 0..3 {
        adapter.lookup(&CALLER, NodeId::ROOT, c"5").unwrap();
    }
    adapter.calls();
    adapter.forget(NodeId(5), 1);
    adapter.forget(NodeId(5), 1);
    if let Some(wait) = adapter.pending_closes() {
        wait();
    }
    assert_eq!(adapter.calls(), ["forget 5 1", "forget 5 1"]);
    assert!(adapter.pending_closes().is_none());
    let calls = Arc::clone(&adapter.file_system().calls);
    drop(adapter);
    assert_eq!(Arc::strong_count(&calls), 1, "the thread has ended");
}

#[test]
fn panic_of_file_system_is_an_error() {
    let adapter = adapter(Fake::default(), 1);
    let opened = adapter.open(&CALLER, NodeId(5), 0).unwrap();
    adapter.file_system().panics.store(true, Ordering::Relaxed);
    let failed = adapter.lookup(&CALLER, NodeId::ROOT, c"5").unwrap_err();
    assert_eq!(failed, Errno::IO);
    let file = object(&adapter, 5, opened.handle);
    let (read, buffer) = run(file.read(GuestBuffer::from_vec(vec![0; 16]), 0));
    assert_eq!(Errno::from_io_error(&read.unwrap_err()), Some(Errno::IO));
    assert_eq!(buffer.len(), 16, "the guest's buffer is returned");
    adapter.file_system().panics.store(false, Ordering::Relaxed);
    adapter.lookup(&CALLER, NodeId::ROOT, c"5").unwrap();
}

#[test]
fn handles_belong_to_one_file() {
    let fake = Fake {
        without_handles: true,
        ..Fake::default()
    };
    let adapter = adapter(fake, 1);
    let one = adapter.open(&CALLER, NodeId(5), 0).unwrap().handle;
    let other = adapter.open(&CALLER, NodeId(6), 0).unwrap().handle;
    assert_ne!(one, other);
    adapter.getattr(&CALLER, NodeId(5), Some(one)).unwrap();
    for (node, handle) in [(6, one), (5, Handle(0)), (5, Handle(99))] {
        let refused = adapter.file(NodeId(node), handle, HandleKind::File);
        assert_eq!(refused.unwrap_err(), Errno::BADF);
    }
    adapter
        .flush_and_unlock(&CALLER, NodeId(6), other, LockOwner(8))
        .unwrap();
    adapter.release(NodeId(6), other).unwrap();
    assert_eq!(adapter.release(NodeId(6), other).unwrap_err(), Errno::BADF);
    assert_eq!(
        adapter.calls()[2..],
        [
            "getattr 5 None",
            "flush 6 0 8",
            "release 6 0 0o0 false None"
        ]
    );
}

#[test]
fn terms_are_those_that_file_system_wants() {
    let fake = Fake {
        wants: FsOptions::WRITEBACK_CACHE | FsOptions::ZERO_MESSAGE_OPEN,
        without_handles: true,
        ..Fake::default()
    };
    let adapter = Adapter::new(fake);
    let all = NegotiatedTerms {
        collects_writes: true,
        no_open: true,
        no_opendir: true,
        idmapped: true,
        kills_set_id: true,
        record_locks: true,
        file_locks: true,
    };
    let accepted = adapter.accept(&all).unwrap();
    let expected = NegotiatedTerms {
        collects_writes: true,
        no_open: true,
        ..NegotiatedTerms::default()
    };
    assert_eq!(accepted, expected);
    adapter.begin(&accepted);
    assert_eq!(adapter.calls(), ["init WRITEBACK_CACHE"]);
    let opened = adapter
        .create(&CALLER, NodeId::ROOT, c"5", 0o1, &NEW)
        .unwrap()
        .1;
    assert_eq!(opened.handle, Handle(0), "there will be no RELEASE");
    let read = run(object(&adapter, 5, Handle(0)).read(GuestBuffer::from_vec(vec![0; 8]), 0));
    assert_eq!(transferred(read), 8);
    assert_eq!(adapter.calls()[1], "read 5 0 0 0o2");
}

#[test]
fn file_system_gets_less_if_only_begun_with_less() {
    let adapter = adapter(Fake::default(), 1);
    adapter.accept(&NegotiatedTerms::default()).unwrap();
    adapter.begin(&NegotiatedTerms {
        collects_writes: true,
        ..NegotiatedTerms::default()
    });
    assert_eq!(adapter.calls(), ["init (empty)", "init WRITEBACK_CACHE"]);
}

#[test]
fn caller_without_ids_is_refused() {
    let adapter = adapter(Fake::default(), 1);
    let unknown = Caller {
        uid: None,
        ..CALLER
    };
    let refused = adapter.lookup(&unknown, NodeId::ROOT, c"5").unwrap_err();
    assert_eq!((refused, adapter.calls().len()), (Errno::OVERFLOW, 0));
}

const NEW: NewNode<'_> = NewNode {
    mode: 0o777,
    umask: 0o22,
    rdev: 0,
    label: None,
};

#[test]
fn umask_is_applied_unless_file_system_does() {
    for (wants, mode) in [(FsOptions::empty(), 755), (FsOptions::DONT_MASK, 777)] {
        let fake = Fake {
            wants,
            ..Fake::default()
        };
        let adapter = adapter(fake, 1);
        adapter.mkdir(&CALLER, NodeId::ROOT, c"5", &NEW).unwrap();
        assert_eq!(adapter.calls(), [format!("mkdir {mode} 22")]);
    }
}

#[test]
fn what_cannot_be_labelled_is_removed() {
    let adapter = adapter(Fake::default(), 1);
    *adapter.file_system().mode.lock().unwrap() = libc::S_IFDIR | 0o755;
    let label = Label {
        name: c"security.selinux",
        value: b"x",
    };
    let new = NewNode {
        label: Some(label),
        ..NEW
    };
    let refused = adapter
        .mkdir(&CALLER, NodeId::ROOT, c"5", &new)
        .unwrap_err();
    assert_eq!(refused, Errno::OPNOTSUPP);
    assert_eq!(
        adapter.calls(),
        ["mkdir 755 22", "setxattr", "rmdir 1/\"5\"", "forget 5 1"]
    );
}

#[test]
fn setattr_passes_only_what_changes() {
    let adapter = adapter(Fake::default(), 1);
    let opened = adapter.open(&CALLER, NodeId(5), 0).unwrap();
    let at = Timestamp {
        seconds: -2,
        nanoseconds: 3,
    };
    let changes = Changes {
        accessed: Some(NewTime::Now),
        modified: Some(NewTime::At(at)),
        ..Changes::default()
    };
    adapter
        .setattr(&CALLER, NodeId(5), Some(opened.handle), &changes)
        .unwrap();
    *adapter.file_system().mode.lock().unwrap() = libc::S_IFREG | 0o6755;
    let kills = Caller {
        kill_set_id: true,
        ..CALLER
    };
    adapter
        .setattr(&kills, NodeId(5), None, &Changes::default())
        .unwrap();
    let calls = adapter.calls();
    assert_eq!(
        calls[1],
        "setattr 5 Some(1005) ATIME | MTIME | ATIME_NOW 0 (-2, 3)"
    );
    assert_eq!(calls[3], "setattr 5 None MODE 755 (0, 0)");
}

#[test]
fn xattr_size_is_asked_for_apart_from_value() {
    let adapter = adapter(Fake::default(), 1);
    let get = |limit| adapter.getxattr(&CALLER, NodeId(5), c"user.x", limit);
    assert_eq!(adapter.getxattr_len(&CALLER, NodeId(5), c"user.x"), Ok(5));
    assert_eq!(get(5), Ok(b"value".to_vec()));
    assert_eq!((get(4), get(0)), (Err(Errno::RANGE), Err(Errno::RANGE)));
}

#[test]
fn locks_name_their_owner_and_kind() {
    let adapter = adapter(Fake::default(), 1);
    let opened = adapter.open(&CALLER, NodeId(5), 0).unwrap();
    let file = || object(&adapter, 5, opened.handle);
    let record = RecordLock {
        kind: LockKind::Exclusive,
        start: 3,
        end: 9,
    };
    run(file().try_lock(LockOwner(8), Lock::Record(record))).unwrap();
    run(file().try_lock(LockOwner(9), Lock::Whole(LockKind::Shared))).unwrap();
    adapter.release(NodeId(5), opened.handle).unwrap();
    assert_eq!(
        adapter.calls()[1..],
        [
            "setlk 8 3-9 1 0".to_owned(),
            format!("setlk 9 0-{} 0 1", i64::MAX),
            "release 5 1005 0o0 true Some(9)".to_owned(),
        ]
    );
}

/// A reply to READDIRPLUS of `room` bytes.
struct Reply {
    room: usize,
    names: Vec<(String, Option<NodeId>, u64)>,
}

impl Reply {
    const fn size(name: &CStr) -> usize {
        152 + name.count_bytes().next_multiple_of(8)
    }
}

impl DirSink for Reply {
    fn room(&self) -> usize {
        self.room
    }

    fn has_room(&self, name: &CStr) -> bool {
        Self::size(name) <= self.room
    }

    fn add(&mut self, dir_entry: DirEntry<'_>, entry: Option<&Entry>) {
        self.room = self.room.checked_sub(Self::size(dir_entry.name)).unwrap();
        let name = dir_entry.name.to_str().unwrap().to_owned();
        let node = entry.map(|entry| entry.node);
        self.names.push((name, node, dir_entry.next_offset));
    }
}

#[test]
fn each_entry_that_is_counted_reaches_guest() {
    let adapter = adapter(Fake::default(), 1);
    let opened = adapter.opendir(&CALLER, NodeId::ROOT, 0).unwrap();
    let (mut offset, mut all) = (0, Vec::new());
    loop {
        let mut reply = Reply {
            room: LARGE_REPLY,
            names: Vec::new(),
        };
        adapter
            .readdir(
                &CALLER,
                NodeId::ROOT,
                opened.handle,
                offset,
                true,
                &mut reply,
            )
            .unwrap();
        let Some((_, _, last)) = reply.names.last() else {
            break;
        };
        offset = *last;
        all.push(reply.names.len());
        for (name, node, _) in reply.names {
            assert_eq!(node.map(|node| node.0), name.parse().ok());
        }
    }
    assert_eq!(all.iter().sum::<usize>(), 52);
    assert!(all.len() > 1, "it took several replies");
    let calls = adapter.calls();
    let found = calls
        .iter()
        .filter(|call| call.starts_with("found"))
        .count();
    let dots = calls.iter().filter(|call| **call == "forget 7 1").count();
    assert_eq!((found, dots, adapter.lookups()), (52, 2, 50));
}

/// Room for a few entries, and for what the adapter keeps free.
const LARGE_REPLY: usize = 7 * 280 + 408;
