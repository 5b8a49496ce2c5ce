//! What programs of a guest do to the share, through a mount or any other access to it.
//!
//! [`Mounted`] is a mount on this machine, used by plain system calls. The invariant: each method
//! is one system call of a program, so a second attempt after `ESTALE` is the guest kernel's.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::XattrFlags;

use crate::Result;
use crate::effect::ATTRIBUTE;

/// How long before it was opened a file may have been removed from its path, if it is unknown when the
/// guest's kernel looked the path up.
const TOLERANCE: Duration = Duration::from_millis(100);

/// What an operation relied on.
#[derive(Clone, Copy, Debug)]
pub struct Reliance {
    /// A file that was removed from its path before this must not have been changed.
    pub since: Instant,
    /// A directory above it that was removed before this must not have been traversed.
    pub directories_since: Instant,
    /// Whether the process got `ESTALE` shortly before and has looked this up since, so that the server
    /// may let it through once, whatever has happened to the name.
    pub may_pass: bool,
    /// Whether the guest had the file open before the operation or opened it meanwhile, if known: a
    /// change of attributes may then come from a descriptor.
    pub was_open: Option<bool>,
}

/// System calls of one process of the guest. Paths are below the share's root.
pub trait Programs {
    /// An open file.
    type File;

    /// `open`, with its flags.
    ///
    /// # Errors
    /// The error number, here and below.
    fn open(&mut self, path: &str, flags: i32, mode: u32) -> Result<Self::File>;
    /// `write`, of all of it.
    fn write(&mut self, file: &mut Self::File, bytes: &[u8]) -> Result<()>;
    /// `fsync`.
    fn sync(&mut self, file: &mut Self::File) -> Result<()>;
    /// `close`.
    fn close(&mut self, file: Self::File) -> Result<()>;
    /// `open`, `read` to the end and `close`.
    fn read(&mut self, path: &str) -> Result<Vec<u8>>;
    /// `stat`.
    fn stat(&mut self, path: &str) -> Result<()>;
    /// The names in a directory.
    fn list(&mut self, path: &str) -> Result<Vec<String>>;
    /// `truncate`.
    fn truncate(&mut self, path: &str, length: u64) -> Result<()>;
    /// `chmod`.
    fn chmod(&mut self, path: &str, mode: u32) -> Result<()>;
    /// `setxattr`, of the attribute that [`Effect`](crate::Effect) checks.
    fn set_attribute(&mut self, path: &str, value: &str) -> Result<()>;
    /// `rename`.
    fn rename(&mut self, from: &str, to: &str) -> Result<()>;
    /// `unlink`.
    fn unlink(&mut self, path: &str) -> Result<()>;
    /// `mkdir`.
    fn mkdir(&mut self, path: &str) -> Result<()>;
    /// Makes the guest's kernel drop its caches, which it may do at any time.
    fn drop_caches(&mut self) -> Result<()>;

    /// What the last operation that changed something relied on; the program began it at `began`.
    fn reliance(&self, began: Instant) -> Reliance {
        let since = began.checked_sub(TOLERANCE).unwrap_or(began);
        Reliance {
            since,
            directories_since: since,
            may_pass: false,
            was_open: None,
        }
    }
}

/// A mount on this machine.
#[derive(Clone, Debug)]
pub struct Mounted {
    root: PathBuf,
}

impl Mounted {
    /// The share is mounted here.
    #[must_use]
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }
}

/// The error number.
fn raw<T>(result: io::Result<T>) -> Result<T> {
    result.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
}

impl Programs for Mounted {
    type File = fs::File;

    fn open(&mut self, path: &str, flags: i32, mode: u32) -> Result<fs::File> {
        let access = flags & libc::O_ACCMODE;
        let create = flags & libc::O_CREAT != 0;
        let mut options = OpenOptions::new();
        options
            .read(access != libc::O_WRONLY)
            .write(access != libc::O_RDONLY && flags & libc::O_APPEND == 0)
            .append(flags & libc::O_APPEND != 0)
            .truncate(flags & libc::O_TRUNC != 0)
            .create_new(create && flags & libc::O_EXCL != 0)
            .create(create)
            .mode(mode);
        raw(options.open(self.root.join(path)))
    }

    fn write(&mut self, file: &mut fs::File, bytes: &[u8]) -> Result<()> {
        raw(file.write_all(bytes))
    }

    fn sync(&mut self, file: &mut fs::File) -> Result<()> {
        raw(file.sync_all())
    }

    fn close(&mut self, file: fs::File) -> Result<()> {
        drop(file);
        Ok(())
    }

    fn read(&mut self, path: &str) -> Result<Vec<u8>> {
        raw(fs::read(self.root.join(path)))
    }

    fn stat(&mut self, path: &str) -> Result<()> {
        raw(fs::symlink_metadata(self.root.join(path)).map(drop))
    }

    fn list(&mut self, path: &str) -> Result<Vec<String>> {
        let entries = raw(fs::read_dir(self.root.join(path)))?;
        let name = |entry: io::Result<fs::DirEntry>| {
            raw(entry).map(|entry| entry.file_name().to_string_lossy().into_owned())
        };
        entries.map(name).collect()
    }

    fn truncate(&mut self, path: &str, length: u64) -> Result<()> {
        truncate_path(&self.root.join(path), length)
    }

    fn chmod(&mut self, path: &str, mode: u32) -> Result<()> {
        let mode = fs::Permissions::from_mode(mode);
        raw(fs::set_permissions(self.root.join(path), mode))
    }

    fn set_attribute(&mut self, path: &str, value: &str) -> Result<()> {
        let set = rustix::fs::setxattr(
            self.root.join(path),
            ATTRIBUTE,
            value.as_bytes(),
            XattrFlags::empty(),
        );
        set.map_err(rustix::io::Errno::raw_os_error)
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<()> {
        raw(fs::rename(self.root.join(from), self.root.join(to)))
    }

    fn unlink(&mut self, path: &str) -> Result<()> {
        raw(fs::remove_file(self.root.join(path)))
    }

    fn mkdir(&mut self, path: &str) -> Result<()> {
        raw(fs::create_dir(self.root.join(path)))
    }

    fn drop_caches(&mut self) -> Result<()> {
        Ok(())
    }
}

/// `truncate(2)`: by path, without opening the file.
#[expect(unsafe_code, reason = "neither the standard library nor rustix has it")]
fn truncate_path(path: &Path, length: u64) -> Result<()> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_nul| libc::EINVAL)?;
    let length = length.try_into().map_err(|_too_large| libc::EFBIG)?;
    // SAFETY: `path` is a string that ends with a zero, and lives until the call returns.
    let done = unsafe { libc::truncate(path.as_ptr(), length) };
    if done == 0 {
        Ok(())
    } else {
        raw(Err(io::Error::last_os_error()))
    }
}
