//! Worker threads and the channel between them, on each runtime.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests are not seen as tests by the lint"
)]

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};

use ringfsd::io::{Engine, Runtime};
use ringfsd::scheduler::{WorkerId, channel};
use ringfsd::{Threads, ThreadsError};

/// The runtimes of this machine.
fn engines() -> Vec<Engine> {
    let mut engines = Engine::ALL.to_vec();
    engines.retain(|engine| match engine.probe() {
        Ok(()) => true,
        Err(reason) => {
            eprintln!("skipped on {engine}: {reason}");
            false
        }
    });
    engines
}

fn workers(n: usize) -> NonZeroUsize {
    NonZeroUsize::new(n).unwrap()
}

#[test]
fn each_worker_runs_its_body_on_its_own_thread_and_runtime() {
    for engine in engines() {
        let (seen, all) = mpsc::channel();
        let pool = Threads::start(workers(3), engine, move |worker| {
            let seen = seen.clone();
            async move {
                assert_eq!(Runtime::current(), Some(engine));
                let name = std::thread::current().name().unwrap().to_owned();
                seen.send((worker.id.0, name)).unwrap();
            }
        })
        .unwrap();
        assert_eq!(pool.workers(), 3);
        pool.join().unwrap();
        let mut all: Vec<_> = all.iter().collect();
        all.sort();
        let expected = [0, 1, 2].map(|n| (n, format!("ringfsd-work-{n}")));
        assert_eq!(all, expected);
    }
}

#[test]
fn join_names_panicked_worker() {
    for engine in engines() {
        let pool = Threads::start(workers(3), engine, |worker| async move {
            assert_ne!(worker.id, WorkerId(1), "as this test wants it");
        })
        .unwrap();
        match pool.join() {
            Err(ThreadsError::Panicked(who)) => assert_eq!(who, [WorkerId(1)]),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn dropping_a_pool_waits_for_its_workers() {
    for engine in engines() {
        let ended = Arc::new(AtomicBool::new(false));
        let (sender, receiver) = channel::<()>();
        let pool = Threads::start(workers(1), engine, {
            let (ended, receiver) = (Arc::clone(&ended), receiver);
            move |_| {
                let (ended, receiver) = (Arc::clone(&ended), receiver.clone());
                async move {
                    assert_eq!(receiver.recv().await, None);
                    ended.store(true, Ordering::Relaxed);
                }
            }
        })
        .unwrap();
        sender.close();
        drop(pool);
        assert!(ended.load(Ordering::Relaxed));
    }
}

/// The last test's limit holds for the whole process, so it runs in one of its own.
const LIMITED: &str = "RINGFSD_TEST_FEW_DESCRIPTORS";

#[test]
fn failed_runtime_starts_no_body() {
    if std::env::var_os(LIMITED).is_some() {
        start_with_few_descriptors();
        return;
    }
    let this = std::env::current_exe().unwrap();
    let output = std::process::Command::new(this)
        .args(["--exact", "pool::failed_runtime_starts_no_body"])
        .env(LIMITED, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    // A name that no test has would pass too.
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("1 passed"), "{said}");
}

fn start_with_few_descriptors() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let few = Rlimit {
        current: Some(40),
        maximum: Some(40),
    };
    setrlimit(Resource::Nofile, few).unwrap();
    for &engine in Engine::ALL {
        let result = Threads::start(workers(100), engine, |_| async {
            std::process::abort();
        });
        assert!(
            matches!(result, Err(ThreadsError::Runtime { .. })),
            "{result:?}"
        );
    }
}

#[test]
fn items_sent_by_many_are_received_once_by_many() {
    const ITEMS: usize = 10_000;
    for engine in engines() {
        let (sender, receiver) = channel();
        let sum = Arc::new(AtomicUsize::new(0));
        let count = Arc::new(AtomicUsize::new(0));
        let receivers = Threads::start(workers(3), engine, {
            let (sum, count) = (Arc::clone(&sum), Arc::clone(&count));
            move |_| {
                let (sum, count) = (Arc::clone(&sum), Arc::clone(&count));
                let receiver = receiver.clone();
                async move {
                    while let Some(item) = receiver.recv().await {
                        sum.fetch_add(item, Ordering::Relaxed);
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        })
        .unwrap();
        let senders = Threads::start(workers(2), engine, {
            let sender = sender.clone();
            move |worker| {
                let sender = sender.clone();
                async move {
                    let mine: Vec<_> = (0..ITEMS).filter(|n| n % 2 == worker.id.0).collect();
                    for (n, few) in mine.chunks(7).enumerate() {
                        if n % 2 == 0 {
                            sender.send_batch(few.iter().copied()).unwrap();
                        } else {
                            few.iter().for_each(|&item| sender.send(item).unwrap());
                        }
                        tokio::task::yield_now().await;
                    }
                }
            }
        })
        .unwrap();
        senders.join().unwrap();
        drop(sender);
        receivers.join().unwrap();
        assert_eq!(count.load(Ordering::Relaxed), ITEMS);
        assert_eq!(sum.load(Ordering::Relaxed), ITEMS * (ITEMS - 1) / 2);
    }
}
