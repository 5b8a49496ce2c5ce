//! Files, guest buffers and runtimes: one suite, run on each runtime.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests are not seen as tests by the lint"
)]

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use ringfsd::io::{Attempt, Engine, File, GuestBuffer, Runtime, SyncKind, spawn};
use tempfile::TempDir;
use testing::each_runtime;

mod answers;
mod direct;
mod lifetime;
mod memory;

use memory::{Arena, with_gaps};

/// Runs `body` on the engine of this name, or prints that this machine doesn't have it.
fn run<F: Future<Output = ()>>(runtime: &str, body: impl FnOnce() -> F) {
    let named = |engine: &&Engine| engine.to_string() == runtime;
    let engine = *Engine::ALL.iter().find(named).unwrap();
    if let Err(reason) = engine.probe() {
        eprintln!("skipped: {reason}");
        return;
    }
    let runtime = Runtime::new(engine).unwrap();
    runtime.block_on(async {
        assert_eq!(Runtime::current(), Some(engine));
        body().await;
    });
    assert_eq!(Runtime::current(), None);
}

/// A directory on a disk, as far as the build directory is on one.
fn scratch() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Tries a read until it is done at once: the host may drop any page at any time.
async fn read_at_once(file: &File, buffer: GuestBuffer, offset: u64) -> (usize, GuestBuffer) {
    let mut buffer = buffer;
    for _ in 0..1000 {
        if let Attempt::Done(n) = file.try_read_at(&mut buffer, offset).unwrap() {
            return (n, buffer);
        }
        let result;
        (result, buffer) = file.read_at(buffer, offset).await;
        result.unwrap();
    }
    panic!("what has just been read is never found in the page cache");
}

/// Bytes that tell their place.
fn pattern(range: Range<usize>) -> Vec<u8> {
    range
        .map(|n| (n * 31 + (n >> 8) * 7).to_le_bytes()[0])
        .collect()
}

fn file_of(dir: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn read_only() -> std::fs::OpenOptions {
    std::fs::OpenOptions::new().read(true).clone()
}

fn read_write() -> std::fs::OpenOptions {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .clone()
}

fn bytes_of(buffer: &GuestBuffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len()];
    assert_eq!(buffer.copy_out(0, &mut bytes), bytes.len());
    bytes
}

async fn read(file: &File, len: usize, offset: u64) -> (io::Result<usize>, Vec<u8>) {
    let (result, buffer) = file
        .read_at(GuestBuffer::from_vec(vec![0; len]), offset)
        .await;
    let mut bytes = bytes_of(&buffer);
    bytes.truncate(*result.as_ref().unwrap_or(&0));
    (result, bytes)
}

#[each_runtime(run)]
async fn scattered_reads_fill_odd_pieces_and_nothing_else() {
    let dir = scratch();
    let path = file_of(&dir, "f", &pattern(0..100_000));
    let file = File::open(&path, &read_only()).await.unwrap();
    let (pieces, len) = with_gaps(&[1, 7, 4096, 513, 1, 30_001, 2, 8191, 3, 3, 3, 3, 777]);
    let total: usize = pieces.iter().map(ExactSizeIterator::len).sum();
    let arena = Arena::new(len);
    arena.fill(&vec![0xEE; len], 0);

    let buffer = arena.buffer(&pieces, Arc::new(()));
    let (result, _buffer) = file.read_at(buffer, 1234).await;
    assert_eq!(result.unwrap(), total);

    let mut expected = vec![0xEE; len];
    let mut source = pattern(1234..1234 + total).into_iter();
    for place in pieces.into_iter().flatten() {
        expected[place] = source.next().unwrap();
    }
    assert!(arena.bytes() == expected);
}

#[each_runtime(run)]
async fn scattered_writes_come_back() {
    let dir = scratch();
    let path = dir.path().join("f");
    let file = File::open(&path, &read_write()).await.unwrap();
    let (pieces, len) = with_gaps(&[3, 5000, 1, 1, 4096, 12_345, 9, 9, 9, 9, 9]);
    let arena = Arena::new(len);
    arena.fill(&pattern(0..len), 0);
    let whole = pattern(0..len);
    let expected: Vec<u8> = pieces
        .iter()
        .flat_map(|p| whole[p.clone()].to_vec())
        .collect();

    let (result, buffer) = file.write_at(arena.buffer(&pieces, Arc::new(())), 77).await;
    assert_eq!(result.unwrap(), expected.len());
    assert_eq!(buffer.len(), expected.len());
    assert!(std::fs::read(&path).unwrap()[77..] == expected);
}

#[each_runtime(run)]
async fn reads_are_short_at_the_end_only() {
    let dir = scratch();
    let path = file_of(&dir, "f", &pattern(0..10_000));
    let file = File::open(&path, &read_only()).await.unwrap();
    for (offset, len, expected) in [
        (0, 10_000, 10_000),
        (0, 20_000, 10_000),
        (9_999, 10, 1),
        (10_000, 10, 0),
        (1 << 40, 10, 0),
        (5, 0, 0),
    ] {
        let (result, bytes) = read(&file, len, offset).await;
        assert_eq!(result.unwrap(), expected, "{len} bytes at {offset}");
        let start = usize::try_from(offset).unwrap();
        assert!(bytes == pattern(start..start + expected));

        let buffer = GuestBuffer::from_vec(vec![0; len]);
        let (n, _) = read_at_once(&file, buffer, offset).await;
        assert_eq!(n, expected, "{len} bytes at {offset}");
    }
}

#[each_runtime(run)]
async fn buffers_of_1500_pieces_go_both_ways() {
    let dir = scratch();
    let (pieces, len) = with_gaps(&[13; 1500]);
    let arena = Arena::new(len);
    arena.fill(&pattern(0..len), 0);
    let before = arena.bytes();
    let expected: Vec<u8> = pieces
        .iter()
        .flat_map(|p| before[p.clone()].to_vec())
        .collect();

    let path = dir.path().join("f");
    let file = File::open(&path, &read_write()).await.unwrap();
    let (result, _) = file.write_at(arena.buffer(&pieces, Arc::new(())), 0).await;
    assert_eq!(result.unwrap(), 1500 * 13);
    assert!(std::fs::read(&path).unwrap() == expected);
    let attempt = file.try_write_at(&arena.buffer(&pieces, Arc::new(())), 19_500);
    assert_eq!(attempt.unwrap(), Attempt::Done(1500 * 13));

    arena.fill(&vec![0; len], 0);
    let (result, buffer) = file
        .read_at(arena.buffer(&pieces, Arc::new(())), 19_500)
        .await;
    assert_eq!(result.unwrap(), 1500 * 13);
    assert!(bytes_of(&buffer) == expected);

    arena.fill(&vec![0; len], 0);
    let (n, buffer) = read_at_once(&file, arena.buffer(&pieces, Arc::new(())), 0).await;
    assert_eq!(n, 1500 * 13);
    assert!(bytes_of(&buffer) == expected);
}

#[each_runtime(run)]
async fn a_cached_read_is_done_at_once() {
    let dir = scratch();
    let path = file_of(&dir, "f", &pattern(0..1 << 20));
    let file = File::open(&path, &read_only()).await.unwrap();
    let buffer = GuestBuffer::from_vec(vec![0; 1 << 20]);
    let (n, buffer) = read_at_once(&file, buffer, 0).await;
    assert_eq!(n, 1 << 20);
    assert!(bytes_of(&buffer) == pattern(0..1 << 20));
}

#[each_runtime(run)]
async fn uncached_read_waits_for_disk() {
    const LEN: usize = 4 << 20;
    let dir = scratch();
    let path = file_of(&dir, "f", &pattern(0..LEN));
    let file = File::open(&path, &read_only()).await.unwrap();
    file.sync(SyncKind::All).await.unwrap();
    for cached in [0, LEN / 2] {
        let from = cached as u64;
        rustix::fs::fadvise(&file, from, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut buffer = GuestBuffer::from_vec(vec![0; LEN]);
        let filled = match file.try_read_at(&mut buffer, 0).unwrap() {
            Attempt::Done(n) | Attempt::Partial(n) => n,
            Attempt::WouldBlock => 0,
        };
        assert!(bytes_of(&buffer)[..filled] == pattern(0..filled));
        let (result, buffer) = file.read_at_from(buffer, filled, 0).await;
        assert_eq!(result.unwrap(), LEN, "{filled} at once");
        assert!(bytes_of(&buffer) == pattern(0..LEN));
    }
}

#[each_runtime(run)]
async fn a_file_in_memory_is_read_at_once() {
    let shm = std::path::Path::new("/dev/shm");
    if !shm.is_dir() {
        eprintln!("skipped: no /dev/shm");
        return;
    }
    let dir = tempfile::tempdir_in(shm).unwrap();
    let path = file_of(&dir, "f", &pattern(0..100));
    let file = File::open(&path, &read_only()).await.unwrap();
    for offset in [0, 40, 200] {
        let mut buffer = GuestBuffer::from_vec(vec![0; 60]);
        let n = 60.min(100 - offset.min(100));
        let attempt = file.try_read_at(&mut buffer, offset as u64).unwrap();
        assert_eq!(attempt, Attempt::Done(n), "from {offset} on");
        assert!(bytes_of(&buffer)[..n] == pattern(0..100)[offset.min(100)..][..n]);
    }
}

#[each_runtime(run)]
async fn a_write_to_the_page_cache_is_done_at_once() {
    let dir = scratch();
    let path = dir.path().join("f");
    let file = File::open(&path, &read_write()).await.unwrap();
    let buffer = GuestBuffer::from_vec(pattern(0..70_000));
    assert_eq!(
        file.try_write_at(&buffer, 10).unwrap(),
        Attempt::Done(70_000)
    );
    assert!(std::fs::read(&path).unwrap()[10..] == pattern(0..70_000));
}

#[each_runtime(run)]
async fn synchronous_writes_are_not_tried() {
    let dir = scratch();
    for flag in [libc::O_SYNC, libc::O_DSYNC] {
        let path = dir.path().join("f");
        let options = read_write().custom_flags(flag).clone();
        let file = File::open(&path, &options).await.unwrap();
        let buffer = GuestBuffer::from_vec(pattern(0..5000));
        assert_eq!(file.try_write_at(&buffer, 0).unwrap(), Attempt::WouldBlock);
        assert_eq!(file.write_at(buffer, 0).await.0.unwrap(), 5000);
        assert!(std::fs::read(&path).unwrap() == pattern(0..5000));
    }
}

#[each_runtime(run)]
async fn blocked_open_delays_no_other_task() {
    let dir = scratch();
    let path = dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    let opened = Rc::new(Cell::new(false));
    let waiting = spawn({
        let (path, opened) = (path.clone(), Rc::clone(&opened));
        async move {
            let file = File::open(&path, &read_only()).await;
            opened.set(true);
            file
        }
    });
    // The reader is waiting as soon as the other end can be opened without waiting for it.
    let other_file = File::open(dir.path(), &read_only()).await.unwrap();
    let writer = loop {
        other_file.sync(SyncKind::All).await.unwrap();
        let options = std::fs::OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .clone();
        match File::open(&path, &options).await {
            Ok(writer) => break writer,
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENXIO)),
        }
        assert!(!opened.get());
    };
    waiting.await.unwrap().unwrap();
    drop(writer);
}

#[each_runtime(run)]
async fn thousands_of_operations_are_in_flight_at_once() {
    const LEN: usize = 1 << 20;
    let dir = scratch();
    let path = file_of(&dir, "f", &pattern(0..LEN));
    let file = File::open(&path, &read_only()).await.unwrap();
    let tasks: Vec<_> = (0..10_000)
        .map(|n| {
            let file = file.clone();
            spawn(async move {
                let offset = (n * 7919) % (LEN - 100);
                let (result, bytes) = read(&file, 100, offset as u64).await;
                assert_eq!(result.unwrap(), 100);
                assert!(bytes == pattern(offset..offset + 100));
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

#[test]
fn a_ring_of_two_entries_carries_thousands_of_operations() {
    for &engine in Engine::ALL {
        if let Err(reason) = engine.probe() {
            eprintln!("skipped on {engine}: {reason}");
            continue;
        }
        let runtime = Runtime::with_ring_entries(engine, 2).unwrap();
        runtime.block_on(thousands_of_operations_are_in_flight_at_once());
    }
}

#[each_runtime(run)]
async fn operations_go_on_while_the_thread_never_sleeps() {
    let dir = scratch();
    let path = file_of(&dir, "f", &pattern(0..5000));
    let file = File::open(&path, &read_write()).await.unwrap();
    let done = Rc::new(Cell::new(false));
    let task = spawn({
        let done = Rc::clone(&done);
        async move {
            file.sync(SyncKind::All).await.unwrap();
            assert_eq!(read(&file, 5000, 0).await.0.unwrap(), 5000);
            done.set(true);
        }
    });
    while !done.get() {
        tokio::task::yield_now().await;
    }
    task.await.unwrap();
}

#[each_runtime(run)]
async fn a_nonblocking_descriptor_reads_like_any_other() {
    let dir = scratch();
    let path = file_of(&dir, "f", &pattern(0..1 << 20));
    let options = read_only().custom_flags(libc::O_NONBLOCK).clone();
    let file = File::open(&path, &options).await.unwrap();
    file.sync(SyncKind::All).await.unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let (result, bytes) = read(&file, 1 << 20, 0).await;
    assert_eq!(result.unwrap(), 1 << 20);
    assert!(bytes == pattern(0..1 << 20));
}

#[each_runtime(run)]
async fn files_are_synced_allocated_and_copied() {
    let dir = scratch();
    let from = file_of(&dir, "from", &pattern(0..50_000));
    let from = File::open(&from, &read_write()).await.unwrap();
    from.sync(SyncKind::All).await.unwrap();
    from.sync(SyncKind::Data).await.unwrap();
    from.allocate(0, 0, 60_000).await.unwrap();
    assert_eq!(from.metadata().unwrap().stx_size, 60_000);

    let path = dir.path().join("to");
    let to = File::open(&path, &read_write()).await.unwrap();
    let mut copied = 0;
    while copied < 50_000 {
        let (at, left) = (copied as u64, 50_000 - copied);
        let n = from.copy_range_to(at, &to, at + 5, left, 0).await.unwrap();
        assert!(n > 0);
        copied += n;
    }
    assert!(std::fs::read(&path).unwrap()[5..] == pattern(0..50_000));
    assert_eq!(from.copy_range_to(60_000, &to, 0, 10, 0).await.unwrap(), 0);
}

#[each_runtime(run)]
async fn tasks_and_timers_run() {
    let task = spawn(async {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        Rc::new(7)
    });
    assert_eq!(*task.await.unwrap(), 7);
}
