//! All runtimes return the same results, and one file serves several of them.

use std::io;

use ringfsd::io::{Choice, Engine, File, GuestBuffer, Runtime, SyncKind, choose, probe};

use super::{file_of, pattern, read, read_only, scratch};

/// What goes wrong, and with which errno.
async fn errors() -> Vec<(&'static str, Option<i32>)> {
    let dir = scratch();
    let path = file_of(&dir, "f", b"some bytes");
    let buffer = || GuestBuffer::from_vec(vec![0; 10]);
    let readable = File::open(&path, &read_only()).await.unwrap();
    let write_only = std::fs::OpenOptions::new().write(true).clone();
    let writable = File::open(&path, &write_only).await.unwrap();
    let directory = File::open(dir.path(), &read_only()).await.unwrap();
    let (pipe, other_end) = rustix::pipe::pipe().unwrap();
    let (pipe, other_end) = (File::from_fd(pipe), File::from_fd(other_end));
    let missing = dir.path().join("missing");

    let errno = |result: io::Result<usize>| result.unwrap_err().raw_os_error();
    let done = |result: io::Result<()>| result.unwrap_err().raw_os_error();
    vec![
        (
            "read of write-only",
            errno(writable.read_at(buffer(), 0).await.0),
        ),
        (
            "write of read-only",
            errno(readable.write_at(buffer(), 0).await.0),
        ),
        (
            "read beyond off_t",
            errno(readable.read_at(buffer(), 1 << 63).await.0),
        ),
        (
            "read at -1",
            errno(readable.read_at(buffer(), u64::MAX).await.0),
        ),
        (
            "write at -1",
            errno(writable.write_at(buffer(), u64::MAX).await.0),
        ),
        (
            "write to the largest offset",
            errno(writable.write_at(buffer(), i64::MAX as u64).await.0),
        ),
        (
            "read of a directory",
            errno(directory.read_at(buffer(), 0).await.0),
        ),
        ("read of a pipe", errno(pipe.read_at(buffer(), 0).await.0)),
        (
            "write of a pipe",
            errno(other_end.write_at(buffer(), 0).await.0),
        ),
        ("sync of a pipe", done(pipe.sync(SyncKind::All).await)),
        (
            "allocation of nothing",
            done(writable.allocate(0, 0, 0).await),
        ),
        (
            "allocation of too much",
            done(writable.allocate(0, u64::MAX, 1).await),
        ),
        (
            "unknown allocation",
            done(writable.allocate(1 << 30, 0, 1).await),
        ),
        (
            "copy with flags",
            errno(readable.copy_range_to(0, &writable, 0, 1, 1).await),
        ),
        (
            "copy into read-only",
            errno(writable.copy_range_to(0, &readable, 0, 1, 0).await),
        ),
        (
            "open of nothing",
            File::open(&missing, &read_only())
                .await
                .unwrap_err()
                .raw_os_error(),
        ),
        (
            "try a read of write-only",
            writable
                .try_read_at(&mut buffer(), 0)
                .unwrap_err()
                .raw_os_error(),
        ),
        (
            "try a write of read-only",
            readable
                .try_write_at(&buffer(), 0)
                .unwrap_err()
                .raw_os_error(),
        ),
        (
            "try a read at -1",
            readable
                .try_read_at(&mut buffer(), u64::MAX)
                .unwrap_err()
                .raw_os_error(),
        ),
    ]
}

#[test]
fn all_runtimes_give_the_same_errors() {
    let tokio = Runtime::new(Engine::ThreadPool).unwrap().block_on(errors());
    for &engine in Engine::ALL {
        if let Err(reason) = engine.probe() {
            eprintln!("skipped on {engine}: {reason}");
            continue;
        }
        let errors = Runtime::new(engine).unwrap().block_on(errors());
        assert_eq!(errors, tokio, "{engine}");
    }
}

#[test]
fn one_file_is_used_by_two_threads_at_once() {
    const LEN: usize = 1 << 20;
    let dir = scratch();
    let path = file_of(&dir, "f", &pattern(0..LEN));
    let file = File::from(std::fs::File::open(path).unwrap());
    let available = |engine: &&Engine| engine.probe().is_ok();
    let threads = Engine::ALL.iter().filter(available).map(|&engine| {
        let file = file.clone();
        std::thread::spawn(move || {
            Runtime::new(engine).unwrap().block_on(async {
                for n in 0..500 {
                    let offset = (n * 7919) % (LEN - 1000);
                    let (result, bytes) = read(&file, 1000, offset as u64).await;
                    assert_eq!(result.unwrap(), 1000);
                    assert!(bytes == pattern(offset..offset + 1000));
                }
            });
        })
    });
    let threads: Vec<_> = threads.collect();
    drop(file);
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn auto_finds_a_runtime_and_says_why() {
    let chosen = choose(Choice::Auto).unwrap();
    assert!(!chosen.reason.is_empty());
    assert_eq!(chosen.engine == Engine::Uring, probe().is_ok());
    assert_eq!(choose(Choice::Tokio).unwrap().engine, Engine::ThreadPool);
    assert_eq!(choose(Choice::Uring).is_ok(), probe().is_ok());
    let of_tokio_uring = choose(Choice::TokioUring).map(|chosen| chosen.engine.to_string());
    if cfg!(feature = "tokio-uring") {
        assert_eq!(of_tokio_uring.unwrap(), "tokio-uring");
    } else {
        let error = of_tokio_uring.unwrap_err().to_string();
        assert!(error.contains("--features tokio-uring"), "{error}");
    }
}
