//! The directory that a target shares with its guest, and what is beside it.
//!
//! The invariant: only the share is ever changed, which `check_outside` verifies.

use std::fs::File;
use std::path::{Path, PathBuf};

use ringfsd::fs::passthrough::Options;

/// No file grows beyond this, once `limit_files` was called.
const FILE_MAX: u64 = 512 * 1024;

/// A shared directory, in memory where that can be, with a file beside it.
#[derive(Debug)]
pub struct Share {
    directory: tempfile::TempDir,
}

impl Share {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let directory = if memory.is_dir() {
            tempfile::tempdir_in(memory)
        } else {
            tempfile::tempdir()
        };
        let share = Self {
            directory: directory.expect("a directory"),
        };
        std::fs::create_dir(share.path()).expect("a share");
        std::fs::write(share.outside(), "outside").expect("a file");
        share
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("share")
    }

    fn outside(&self) -> PathBuf {
        self.directory.path().join("outside")
    }

    /// Options whose bounds a guest reaches soon.
    #[must_use]
    pub fn options() -> Options {
        Options {
            max_open_inodes: Some(64),
            max_inodes: 100,
            remember_inodes: 20,
            max_handles: Some(50),
            ..Options::default()
        }
    }

    /// Has files that grow long fail, instead of filling the memory or ending the process.
    ///
    /// Not to be called before the file systems are made: their own tables are long files, if
    /// mostly of holes.
    pub fn limit_files() {
        // SAFETY: ignoring a signal sets no handler.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        let limit = rustix::process::Rlimit {
            current: Some(FILE_MAX),
            maximum: None,
        };
        // The output of the fuzzer itself may be a file that is longer already; it is not told.
        let _ = rustix::process::setrlimit(rustix::process::Resource::Fsize, limit);
    }

    /// Checks that nothing has changed beside the share.
    pub fn check_outside(&self) {
        let outside = std::fs::read(self.outside()).expect("it is still there");
        assert_eq!(outside, b"outside", "changed from within the share");
        let beside = std::fs::read_dir(self.directory.path()).expect("the directory");
        assert_eq!(beside.count(), 2, "something got out of the share");
    }

    /// Removes all that is in it, however it is protected.
    pub fn clear(&self) {
        clear(&self.path());
    }
}

impl Default for Share {
    fn default() -> Self {
        Self::new()
    }
}

fn clear(directory: &Path) {
    unprotect(directory);
    for entry in std::fs::read_dir(directory).expect("a directory") {
        let entry = entry.expect("an entry");
        let path = entry.path();
        if entry.file_type().expect("its type").is_dir() {
            clear(&path);
            std::fs::remove_dir(path).expect("an empty directory");
        } else {
            if entry.file_type().expect("its type").is_file() {
                unprotect(&path);
            }
            std::fs::remove_file(path).expect("a file");
        }
    }
}

/// Takes flags off that keep a file from being removed.
fn unprotect(path: &Path) {
    if let Ok(file) = File::open(path)
        && let Ok(flags) = rustix::fs::ioctl_getflags(&file)
    {
        let keep = rustix::fs::IFlags::IMMUTABLE | rustix::fs::IFlags::APPEND;
        if flags.intersects(keep) {
            rustix::fs::ioctl_setflags(&file, flags - keep).expect("flags to be taken off");
        }
    }
}
