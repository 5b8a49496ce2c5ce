//! Memory outlives the operation, even if the task that started it goes away before its end.

#![allow(unsafe_code, reason = "the suite plays the guest's memory")]

use std::future::{Future, poll_fn};
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Waker};

use ringfsd::io::{Engine, File, Guard, GuestBuffer, Runtime, SyncKind, spawn};
use testing::each_runtime;

use super::direct::open_direct;
use super::memory::{Arena, whole};
use super::{file_of, pattern, read_only, run, scratch};

/// Sees from its own end whether the buffer it guards was full by then.
struct Witness {
    arena: Arena,
    full: mpsc::Sender<bool>,
}

// SAFETY: the arena is memory that anybody may look at.
unsafe impl Send for Witness {}
// SAFETY: as above; a sender may be shared.
unsafe impl Sync for Witness {}

impl Drop for Witness {
    fn drop(&mut self) {
        let _ = self
            .full
            .send(self.arena.bytes() == pattern(0..self.arena.len));
    }
}

#[each_runtime(run)]
async fn a_dropped_read_keeps_its_memory_until_it_is_complete() {
    const LEN: usize = 1 << 20;
    let dir = scratch();
    let path = file_of(&dir, "f", &pattern(0..LEN));
    let file = match open_direct(&path).await {
        Some(file) => file,
        None => File::open(&path, &read_only()).await.unwrap(),
    };
    let (full, was_full) = mpsc::channel();
    let arena = Arena::new(LEN);
    let buffer = whole(arena, Arc::new(Witness { arena, full }));
    {
        let mut reading = pin!(file.read_at(buffer, 0));
        poll_fn(|cx| {
            assert!(reading.as_mut().poll(cx).is_pending());
            Poll::Ready(())
        })
        .await;
    }
    if Runtime::current() != Some(Engine::ThreadPool) {
        // Not even handed to the kernel yet.
        assert_eq!(was_full.try_recv(), Err(mpsc::TryRecvError::Empty));
    }
    let full = loop {
        match was_full.try_recv() {
            Ok(full) => break full,
            Err(_) => file.sync(SyncKind::Data).await.unwrap(),
        }
    };
    assert!(full);
}

/// A future that outlives its runtime doesn't wait any more, and gives its memory back whether it is
/// polled again or not.
#[test]
fn future_that_outlives_its_runtime_frees_its_memory() {
    const LEN: usize = 512 << 10;
    let dir = scratch();
    let path = file_of(&dir, "f", &pattern(0..LEN));
    for &engine in Engine::ALL {
        if let Err(reason) = engine.probe() {
            eprintln!("skipped on {engine}: {reason}");
            continue;
        }
        for polled_again in [true, false] {
            let file = File::from(std::fs::File::open(&path).unwrap());
            // Another thread may have read the file before the future is polled for the first time.
            let begun = (0..1000).find_map(|_| {
                let runtime = Runtime::new(engine).unwrap();
                let guard = Arc::new(());
                let buffer = whole(Arena::new(LEN), Arc::clone(&guard) as Guard);
                let file = file.clone();
                let mut reading = Box::pin(async move { file.read_at(buffer, 0).await });
                let poll = |cx: &mut Context<'_>| Poll::Ready(reading.as_mut().poll(cx));
                let polled = runtime.block_on(poll_fn(poll));
                polled.is_pending().then_some((runtime, guard, reading))
            });
            let (runtime, guard, mut reading) = begun.expect("every read was complete at once");
            drop(runtime);
            if polled_again {
                let mut cx = Context::from_waker(Waker::noop());
                let Poll::Ready((result, buffer)) = reading.as_mut().poll(&mut cx) else {
                    panic!("{engine}: it waits for a runtime that is gone");
                };
                match result {
                    // It was complete when the runtime ended.
                    Ok(LEN) => {}
                    other => assert_eq!(other.unwrap_err().raw_os_error(), Some(libc::ECANCELED)),
                }
                drop(buffer);
            }
            drop(reading);
            assert_eq!(Arc::strong_count(&guard), 1, "{engine}");
        }
    }
}

/// Whether this process has a descriptor of this file.
fn is_open(path: &Path) -> bool {
    let mut all = std::fs::read_dir("/proc/self/fd").unwrap();
    all.any(|fd| std::fs::read_link(fd.unwrap().path()).is_ok_and(|link| link == path))
}

/// An engine closes a file neither before its last operation nor twice: then it would close one that
/// was opened since under the same number.
#[test]
fn each_descriptor_is_closed_once() {
    const LEN: usize = 64 << 10;
    let dir = scratch();
    for &engine in Engine::ALL {
        if let Err(reason) = engine.probe() {
            eprintln!("skipped on {engine}: {reason}");
            continue;
        }
        let runtime = Runtime::new(engine).unwrap();
        let mut kept = Vec::new();
        runtime.block_on(async {
            for n in 0..20 {
                let path = file_of(&dir, &format!("{engine}-{n}"), &pattern(n..n + LEN));
                let file = File::from(std::fs::File::open(&path).unwrap());
                let (result, buffer) = file.read_at(GuestBuffer::from_vec(vec![0; LEN]), 0).await;
                let mut bytes = vec![0; LEN];
                buffer.copy_out(0, &mut bytes);
                assert!(result.unwrap() == LEN && bytes == pattern(n..n + LEN));
                if n % 2 == 0 {
                    drop(file);
                    assert!(!is_open(&path), "{engine} leaves a descriptor open");
                } else {
                    kept.push((n, path, file));
                }
            }
        });
        drop(runtime);
        let runtime = Runtime::new(engine).unwrap();
        runtime.block_on(async {
            for (n, path, file) in kept {
                let (result, buffer) = file.read_at(GuestBuffer::from_vec(vec![0; LEN]), 0).await;
                let mut bytes = vec![0; LEN];
                buffer.copy_out(0, &mut bytes);
                assert!(result.unwrap() == LEN && bytes == pattern(n..n + LEN));
                drop(file);
                assert!(!is_open(&path), "{engine} leaves a descriptor open");
            }
        });
    }
}

/// Says when it goes, and what was in the arena then.
struct LastLook {
    arena: Arena,
    seen: mpsc::Sender<Vec<u8>>,
    runtime_is_gone: Arc<AtomicBool>,
}

// SAFETY: the arena is memory that anybody may look at.
unsafe impl Send for LastLook {}
// SAFETY: as above; a sender may be shared.
unsafe impl Sync for LastLook {}

impl Drop for LastLook {
    fn drop(&mut self) {
        assert!(!self.runtime_is_gone.load(Ordering::Relaxed));
        let _ = self.seen.send(self.arena.bytes());
    }
}

/// A runtime dropped in the middle of reads: what its operations own goes before the runtime's
/// drop returns, and not a byte changes after that.
#[test]
fn a_dropped_runtime_frees_memory_after_the_kernel_is_done() {
    const LEN: usize = 512 << 10;
    // A ring of one entry has room for four completions: half of the reads wait for it.
    let sizes = [256, 1];
    let all = Engine::ALL.iter();
    for (&engine, entries) in all.flat_map(|engine| sizes.map(|entries| (engine, entries))) {
        if let Err(reason) = engine.probe() {
            eprintln!("skipped on {engine}: {reason}");
            continue;
        }
        let dir = scratch();
        let path = file_of(&dir, "f", &vec![0xAB; LEN]);
        for round in 0..20 {
            let runtime = Runtime::with_ring_entries(engine, entries).unwrap();
            let (seen, last_looks) = mpsc::channel();
            let runtime_is_gone = Arc::new(AtomicBool::new(false));
            let arenas: Vec<_> = (0..8).map(|_| Arena::new(LEN)).collect();
            runtime.block_on(async {
                let file = match open_direct(&path).await {
                    Some(file) => file,
                    None => File::open(&path, &read_only()).await.unwrap(),
                };
                for &arena in &arenas {
                    let look = LastLook {
                        arena,
                        seen: seen.clone(),
                        runtime_is_gone: Arc::clone(&runtime_is_gone),
                    };
                    let buffer = whole(arena, Arc::new(look));
                    let file = file.clone();
                    drop(spawn(async move { file.read_at(buffer, 0).await.0 }));
                }
                // Long enough for the operations to be in flight, not for all to end.
                for _ in 0..round % 4 {
                    file.sync(SyncKind::Data).await.unwrap();
                }
                tokio::task::yield_now().await;
            });
            drop(seen);
            drop(runtime);
            runtime_is_gone.store(true, Ordering::Relaxed);
            let at_last: Vec<_> = last_looks.try_iter().collect();
            assert_eq!(
                at_last.len(),
                arenas.len(),
                "something outlives the runtime"
            );
            std::thread::yield_now();
            let mut now: Vec<_> = arenas.iter().map(Arena::bytes).collect();
            let mut then = at_last;
            now.sort();
            then.sort();
            assert!(now == then, "memory changed after it had been freed");
        }
    }
}
