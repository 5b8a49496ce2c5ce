//! Reads files before a guest does, in a thread of its own.
//!
//! The invariant: the thread ends with the file system that has started it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Contents;
use super::file::RafsFile;

/// What is read before a guest asks for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prefetch {
    /// Nothing.
    None,
    /// The files that the image names for it.
    #[default]
    Named,
    /// All files, those that the image names first.
    All,
}

/// How often the progress is logged.
const INTERVAL: Duration = Duration::from_secs(5);

/// How many bytes are read at a time.
const STEP: u64 = 1 << 20;

/// The thread; dropping this ends it.
#[derive(Debug)]
pub(super) struct Prefetcher {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Prefetcher {
    /// Starts the thread. `file` gives the open file of an inode.
    pub(super) fn start(
        contents: &Arc<Contents>,
        what: Prefetch,
        file: impl Fn(u64) -> crate::fs::Result<Arc<RafsFile>> + Send + 'static,
    ) -> std::io::Result<Option<Self>> {
        if what == Prefetch::None {
            return Ok(None);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (contents, stopped) = (Arc::clone(contents), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name("ringfsd-prefetch".to_owned())
            .spawn(move || run(&contents, what, &stopped, &file))?;
        Ok(Some(Self {
            stop,
            thread: Some(thread),
        }))
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It doesn't panic, and there is nothing to do if it did.
            let _ = thread.join();
        }
    }
}

/// The files to read, in order.
fn files(contents: &Contents, what: Prefetch) -> Vec<u64> {
    let image = &contents.image;
    let mut inodes = image.named_for_prefetch().unwrap_or_else(|error| {
        log::warn!("prefetch: the image's list of files can't be read: {error}");
        Vec::new()
    });
    if what == Prefetch::All {
        inodes.push(image.root());
    }
    let named = inodes.len();
    image.files_below(inodes).unwrap_or_else(|error| {
        log::warn!("prefetch: the {named} inodes that are named can't be found: {error}");
        Vec::new()
    })
}

fn run(
    contents: &Contents,
    what: Prefetch,
    stop: &AtomicBool,
    file: &dyn Fn(u64) -> crate::fs::Result<Arc<RafsFile>>,
) {
    let files = files(contents, what);
    if files.is_empty() {
        if what == Prefetch::Named {
            log::debug!("prefetch: the image names no files");
        }
        return;
    }
    let total = contents.image.bytes_of(&files);
    let (count, began) = (files.len(), Instant::now());
    log::info!("prefetch: {count} files, {} MiB", total >> 20);
    let (mut logged, mut done, mut failed) = (began, 0_u64, 0_usize);
    for number in files {
        let Ok(file) = file(number) else {
            failed += 1;
            continue;
        };
        let mut offset = 0;
        while offset < file.size() {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let len = STEP.min(file.size() - offset);
            let wanted = usize::try_from(len).unwrap_or(usize::MAX);
            // What is damaged has been logged, and fails again when a guest reads it.
            if file.read_blocking(offset, wanted, &mut |_| {}).is_err() {
                failed += 1;
                break;
            }
            offset += len;
            done += len;
            if logged.elapsed() >= INTERVAL {
                logged = Instant::now();
                log::info!("prefetch: {} of {} MiB", done >> 20, total >> 20);
            }
        }
    }
    let seconds = began.elapsed().as_secs_f32();
    match failed {
        0 => log::info!("prefetch: done, {} MiB in {seconds:.1} s", done >> 20),
        failed => log::warn!(
            "prefetch: done, {} MiB in {seconds:.1} s; {failed} of {count} files can't be read",
            done >> 20
        ),
    }
}
