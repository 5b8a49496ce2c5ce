//! Fixtures of many checks: varied bytes, files with a given mode and owner, and short spellings of
//! long calls. Invariant: the same seed gives the same bytes.

use std::fs::{self, File, OpenOptions};
use std::hash::Hasher;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags};

use crate::failure::{Failure, Outcome};

static QUICK: AtomicBool = AtomicBool::new(false);

/// From now on sizes are the small ones.
pub(crate) fn be_quick() {
    // Relaxed: set before the first process is forked and the first thread is started.
    QUICK.store(true, Ordering::Relaxed);
}

/// Whether sizes are the small ones.
pub(crate) fn is_quick() -> bool {
    QUICK.load(Ordering::Relaxed)
}

static USER_NAMESPACE: AtomicBool = AtomicBool::new(false);

/// From now on the server is in a user namespace, and not the host's superuser.
pub(crate) fn expect_user_namespace() {
    // Relaxed: as for QUICK.
    USER_NAMESPACE.store(true, Ordering::Relaxed);
}

/// Whether the host denies what takes a capability in its first user namespace: to make a device
/// node, and to write without set-ID bits being cleared.
pub(crate) fn in_user_namespace() -> bool {
    USER_NAMESPACE.load(Ordering::Relaxed)
}

/// How much of something a check does: `quick` is for where each request is slow.
pub(crate) fn size(full: usize, quick: usize) -> usize {
    if is_quick() { quick } else { full }
}

/// A run of numbers that looks random.
#[derive(Debug)]
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit.max(1)).unwrap_or(u64::MAX);
        usize::try_from(self.number() % limit).unwrap_or(0)
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let number = self.number().to_le_bytes();
            chunk.copy_from_slice(&number[..chunk.len()]);
        }
    }

    pub(crate) fn bytes(seed: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        Self::new(seed).fill(&mut bytes);
        bytes
    }
}

/// A checksum of what is written to it (FNV-1a over words: quick in an emulated guest).
#[derive(Clone, Debug)]
pub(crate) struct Checksum {
    hash: u64,
    rest: Vec<u8>,
}

impl Checksum {
    pub(crate) fn new() -> Self {
        Self {
            hash: 0xCBF2_9CE4_8422_2325,
            rest: Vec::with_capacity(8),
        }
    }

    fn word(&mut self, word: [u8; 8]) {
        self.hash = (self.hash ^ u64::from_le_bytes(word)).wrapping_mul(0x0100_0000_01B3);
        self.hash ^= self.hash >> 32;
    }
}

impl Hasher for Checksum {
    fn write(&mut self, mut bytes: &[u8]) {
        while !self.rest.is_empty() && !bytes.is_empty() {
            self.rest.push(bytes[0]);
            bytes = &bytes[1..];
            if let Ok(word) = <[u8; 8]>::try_from(self.rest.as_slice()) {
                self.word(word);
                self.rest.clear();
            }
        }
        let words = bytes.chunks_exact(8);
        self.rest.extend_from_slice(words.remainder());
        for word in words {
            let mut eight = [0; 8];
            eight.copy_from_slice(word);
            self.word(eight);
        }
    }

    fn finish(&self) -> u64 {
        let mut end = self.clone();
        let mut word = [0; 8];
        word[..end.rest.len()].copy_from_slice(&end.rest);
        word[7] = u8::try_from(end.rest.len()).unwrap_or(0) | 0x80;
        end.word(word);
        end.hash
    }
}

/// Creates a file with this content, mode and owner.
pub(crate) fn file_of(path: &Path, content: &[u8], mode: u32, owner: (u32, u32)) -> Outcome {
    fs::write(path, content)?;
    own(path, mode, owner)
}

/// Creates a folder with this mode and owner.
pub(crate) fn folder_of(path: &Path, mode: u32, owner: (u32, u32)) -> Outcome {
    fs::create_dir(path)?;
    own(path, mode, owner)
}

// The mode last: a change of owner takes set-user-ID bits away.
fn own(path: &Path, mode: u32, (uid, gid): (u32, u32)) -> Outcome {
    std::os::unix::fs::chown(path, Some(uid), Some(gid))?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

/// Opens a file to be read and written, new or not.
pub(crate) fn read_write(path: &Path) -> Result<File, Failure> {
    Ok(OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?)
}

/// Opens a new file to be read and written; `mode` as asked for, before the umask.
pub(crate) fn create_new(path: &Path, mode: u32) -> std::io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
}

/// Opens a folder, for calls that take a descriptor.
pub(crate) fn open_folder(path: &Path) -> Result<File, Failure> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

/// The twelve permission bits of a path.
#[track_caller]
pub(crate) fn has_mode(path: &Path, wanted: u32) -> Outcome {
    let mode = fs::symlink_metadata(path)?.mode() & 0o7777;
    if mode == wanted {
        return Ok(());
    }
    let name = path.file_name().unwrap_or_default().display();
    Err(Failure::new(format_args!(
        "the mode of {name} is {mode:04o}, not {wanted:04o}"
    )))
}

/// How many bytes a file's blocks take now: as it is, and not as it was when last asked for.
pub(crate) fn space_of(file: &File) -> Result<u64, Failure> {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
    Ok(statx(file, "", flags, StatxFlags::BLOCKS)?.stx_blocks * 512)
}

/// The path of an open descriptor in the kernel's own folder of them.
pub(crate) fn path_of_descriptor(file: &impl std::os::fd::AsRawFd) -> std::path::PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}
