//! Copies a directory tree with the library's runtime, files, buffers, channel and workers, and
//! without virtio:
//!
//! ```text
//! cargo run --release --example copy_tree -- --runtime uring SRC DST
//! ```
//!
//! The main thread walks the tree, makes the directories and symbolic links, and sends the
//! files to the workers, which copy them in chunks, several at a time. Modes are kept; owners,
//! times and extended attributes are not.

use std::cell::Cell;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use std::{fs, thread};

use clap::{Parser, ValueEnum};
use ringfsd::Threads;
use ringfsd::error_chain;
use ringfsd::io::{Attempt, Choice, File, GuestBuffer, choose, spawn};
use ringfsd::scheduler::{Receiver, Sender, channel};
use rustix::fs::{Mode, fchmod};

/// Bytes of one read and one write.
const CHUNK: u64 = 256 << 10;

/// Chunks of one file in flight at the same time.
const CHUNKS_IN_FLIGHT: usize = 8;

/// Files that one worker copies at the same time.
const FILES_IN_FLIGHT: usize = 8;

/// Copies the tree under SRC to DST, which must not exist yet.
#[derive(Parser)]
struct Options {
    /// The runtime to copy with.
    #[arg(long, value_enum, default_value_t = RuntimeName::Auto)]
    runtime: RuntimeName,
    /// Threads that copy [default: one for each processor].
    #[arg(long)]
    workers: Option<NonZeroUsize>,
    /// The directory to copy.
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// The directory to copy to.
    #[arg(value_name = "DST")]
    target: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum RuntimeName {
    Auto,
    Uring,
    Tokio,
    TokioUring,
}

/// A file to be copied.
struct Job {
    source: PathBuf,
    target: PathBuf,
}

/// Progress and failures.
#[derive(Default)]
struct Progress {
    files: AtomicU64,
    bytes: AtomicU64,
    failures: AtomicU64,
}

impl Progress {
    fn failed(&self, path: &Path, error: &io::Error) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        eprintln!("copy_tree: {}: {error}", path.display());
    }
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failures) => {
            eprintln!("copy_tree: {failures} not copied");
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("copy_tree: {}", error_chain::one_line(&*e));
            ExitCode::FAILURE
        }
    }
}

/// Copies; returns the number of failures.
fn run(options: &Options) -> Result<u64, Box<dyn std::error::Error>> {
    let chosen = choose(match options.runtime {
        RuntimeName::Auto => Choice::Auto,
        RuntimeName::Uring => Choice::Uring,
        RuntimeName::Tokio => Choice::Tokio,
        RuntimeName::TokioUring => Choice::TokioUring,
    })?;
    let workers = match options.workers {
        Some(workers) => workers,
        None => thread::available_parallelism()?,
    };
    let begin = Instant::now();
    let progress = Arc::new(Progress::default());
    let (sender, receiver) = channel();
    let pool = Threads::start(workers, chosen.engine, {
        let progress = Arc::clone(&progress);
        move |_worker| work(receiver.clone(), Arc::clone(&progress))
    })?;

    let mut directories = Vec::new();
    walk(
        &options.source,
        &options.target,
        &sender,
        &mut directories,
        &progress,
    );
    drop(sender);
    pool.join()?;
    // Only now: a directory's mode may forbid new entries. The innermost first.
    for (directory, mode) in directories.iter().rev() {
        if let Err(e) = fs::set_permissions(directory, fs::Permissions::from_mode(*mode)) {
            progress.failed(directory, &e);
        }
    }

    let bytes = progress.bytes.load(Ordering::Relaxed);
    let seconds = begin.elapsed().as_secs_f64();
    println!(
        "{} files, {bytes} bytes in {seconds:.3} s: {:.1} MB/s with {workers} workers on {} ({})",
        progress.files.load(Ordering::Relaxed),
        bytes as f64 / 1e6 / seconds,
        chosen.engine,
        chosen.reason,
    );
    Ok(progress.failures.load(Ordering::Relaxed))
}

/// Creates directories and links, and sends files; `directories` gets each directory with its mode.
fn walk(
    source: &Path,
    target: &Path,
    jobs: &Sender<Job>,
    directories: &mut Vec<(PathBuf, u32)>,
    progress: &Progress,
) {
    let entries = fs::metadata(source).and_then(|metadata| {
        fs::DirBuilder::new().mode(0o700).create(target)?;
        directories.push((target.to_path_buf(), metadata.permissions().mode() & 0o7777));
        fs::read_dir(source)
    });
    let entries = match entries {
        Ok(entries) => entries,
        Err(e) => return progress.failed(source, &e),
    };
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(e) => return progress.failed(source, &e),
        };
        let job = Job {
            source: entry.path(),
            target: target.join(entry.file_name()),
        };
        let result = entry.file_type().and_then(|kind| {
            if kind.is_dir() {
                walk(&job.source, &job.target, jobs, directories, progress);
                Ok(())
            } else if kind.is_symlink() {
                std::os::unix::fs::symlink(fs::read_link(&job.source)?, &job.target)
            } else if kind.is_file() {
                let send = jobs.send(job);
                send.map_err(|_closed| io::Error::other("the workers are gone"))
            } else {
                Err(io::Error::other(
                    "neither file, directory nor symbolic link",
                ))
            }
        });
        if let Err(e) = result {
            progress.failed(&entry.path(), &e);
        }
    }
}

/// A worker's body: several tasks take files until there are no more.
async fn work(jobs: Receiver<Job>, progress: Arc<Progress>) {
    let tasks: Vec<_> = (0..FILES_IN_FLIGHT)
        .map(|_| {
            let (jobs, progress) = (jobs.clone(), Arc::clone(&progress));
            spawn(async move {
                while let Some(job) = jobs.recv().await {
                    match copy(&job).await {
                        Ok(bytes) => {
                            progress.files.fetch_add(1, Ordering::Relaxed);
                            progress.bytes.fetch_add(bytes, Ordering::Relaxed);
                        }
                        Err(e) => progress.failed(&job.source, &e),
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        finished(task.await);
    }
}

/// Copies one file; returns its length.
async fn copy(job: &Job) -> io::Result<u64> {
    let source = File::open(&job.source, fs::OpenOptions::new().read(true)).await?;
    let metadata = source.metadata()?;
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let target = File::open(&job.target, &options).await?;

    let copy = Rc::new(Copy {
        source,
        target,
        len: metadata.stx_size,
        next: Cell::new(0),
        copied: Cell::new(0),
    });
    let tasks = metadata
        .stx_size
        .div_ceil(CHUNK)
        .min(CHUNKS_IN_FLIGHT as u64);
    if tasks > 1 {
        let tasks: Vec<_> = (0..tasks)
            .map(|_| spawn(Rc::clone(&copy).chunks()))
            .collect();
        let mut result = Ok(());
        for task in tasks {
            result = result.and(finished(task.await));
        }
        result?;
    } else {
        Rc::clone(&copy).chunks().await?;
    }
    fchmod(
        &copy.target,
        Mode::from_raw_mode(u32::from(metadata.stx_mode) & 0o7777),
    )?;
    Ok(copy.copied.get())
}

/// One file being copied by several tasks of one thread.
struct Copy {
    source: File,
    target: File,
    len: u64,
    /// The offset of the next chunk that no task has taken.
    next: Cell<u64>,
    copied: Cell<u64>,
}

impl Copy {
    /// Copies chunks until none is left.
    async fn chunks(self: Rc<Self>) -> io::Result<()> {
        loop {
            let offset = self.next.get();
            let len = self.len.saturating_sub(offset).min(CHUNK);
            if len == 0 {
                return Ok(());
            }
            self.next.set(offset + len);
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            self.chunk(offset, len).await?;
        }
    }

    async fn chunk(&self, offset: u64, len: usize) -> io::Result<()> {
        let mut buffer = GuestBuffer::from_vec(vec![0; len]);
        let filled = match self.source.try_read_at(&mut buffer, offset)? {
            Attempt::Done(filled) => filled,
            attempt => {
                let filled = match attempt {
                    Attempt::Partial(filled) => filled,
                    _ => 0,
                };
                let result;
                (result, buffer) = self.source.read_at_from(buffer, filled, offset).await;
                result?
            }
        };
        // Fewer if the file has become shorter.
        buffer.truncate(filled);
        let written = match self.target.try_write_at(&buffer, offset)? {
            Attempt::Done(written) | Attempt::Partial(written) => written,
            Attempt::WouldBlock => self.target.write_at(buffer, offset).await.0?,
        };
        if written < filled {
            return Err(io::Error::new(
                io::ErrorKind::WriteZero,
                "a write was short",
            ));
        }
        self.copied.set(self.copied.get() + written as u64);
        Ok(())
    }
}

/// The result of a task of this worker; a panic is resumed in the task that waits for it.
fn finished<T>(joined: Result<T, tokio::task::JoinError>) -> T {
    match joined {
        Ok(value) => value,
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}
