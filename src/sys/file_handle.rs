//! File handles: identifiers of inodes that outlive descriptors (`name_to_handle_at(2)`).
//!
//! The invariant: a [`FileHandle`] contains the bytes that the kernel has returned, unchanged.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;
use smallvec::SmallVec;

use super::last_errno;

/// The maximum size of a handle in bytes (`MAX_HANDLE_SZ`, uapi `linux/fcntl.h`).
const MAX_BYTES: usize = 128;

/// The kernel's `struct file_handle`, with space for the longest handle.
#[repr(C)]
struct Raw {
    header: libc::file_handle,
    bytes: [u8; MAX_BYTES],
}

impl Raw {
    fn empty() -> Self {
        Self {
            header: libc::file_handle {
                handle_bytes: 0,
                handle_type: 0,
                f_handle: [],
            },
            bytes: [0; MAX_BYTES],
        }
    }
}

/// Identifies an inode within its file system for as long as the inode exists: the kernel's handle
/// distinguishes reused inode numbers. 12 bytes for ext4, 16 for XFS, which stay inline.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FileHandle {
    /// The handle's type in native byte order, followed by its bytes.
    parts: SmallVec<[u8; 16]>,
}

/// The size of the type at the beginning of a [`FileHandle`].
const TYPE_LEN: usize = size_of::<libc::c_int>();

/// How often to retry to open a handle whose inode number is just being reused for a new inode.
const MAX_RETRIES: u32 = 100;

impl FileHandle {
    /// The handle of the inode that `fd` refers to, which may be an `O_PATH` descriptor.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` if the file system has no handles.
    pub(crate) fn of(fd: impl AsFd) -> Result<Self, Errno> {
        Self::query(fd, c"", libc::AT_EMPTY_PATH)
    }

    /// The handle of the entry `name` of `directory`. Doesn't follow a symbolic link.
    ///
    /// # Errors
    ///
    /// As for [`of`](Self::of); `ENOENT` if there is no such entry.
    pub(crate) fn at(directory: impl AsFd, name: &CStr) -> Result<Self, Errno> {
        Self::query(directory, name, 0)
    }

    fn query(fd: impl AsFd, path: &CStr, flags: libc::c_int) -> Result<Self, Errno> {
        let mut raw = Raw::empty();
        raw.header.handle_bytes = u32::try_from(MAX_BYTES).or(Err(Errno::OVERFLOW))?;
        let mut mount_id = 0;
        // SAFETY: `raw` is a `file_handle` with `handle_bytes` writable bytes behind it, and
        // it and `mount_id` are exclusively borrowed during the call; the path ends with its
        // NUL; the descriptor is open as long as `fd` is borrowed.
        let result = unsafe {
            libc::name_to_handle_at(
                fd.as_fd().as_raw_fd(),
                path.as_ptr(),
                (&raw mut raw).cast(),
                &raw mut mount_id,
                flags,
            )
        };
        if result != 0 {
            return Err(last_errno());
        }
        let len = usize::try_from(raw.header.handle_bytes).or(Err(Errno::OVERFLOW))?;
        let bytes = raw.bytes.get(..len).ok_or(Errno::OVERFLOW)?;
        let mut parts = SmallVec::from_slice(&raw.header.handle_type.to_ne_bytes());
        parts.extend_from_slice(bytes);
        Ok(Self { parts })
    }

    /// Opens the inode; `mount` is a descriptor (not `O_PATH`) of any file in its mount. Needs
    /// `CAP_DAC_READ_SEARCH`.
    ///
    /// # Errors
    ///
    /// `ESTALE` if the inode no longer exists, `EPERM` without the capability; otherwise those of
    /// `open(2)`.
    pub(crate) fn open(&self, mount: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let (kind, bytes) = self
            .parts
            .split_first_chunk::<TYPE_LEN>()
            .ok_or(Errno::STALE)?;
        let mut raw = Raw::empty();
        raw.header.handle_type = libc::c_int::from_ne_bytes(*kind);
        raw.header.handle_bytes = u32::try_from(bytes.len()).or(Err(Errno::STALE))?;
        raw.bytes
            .get_mut(..bytes.len())
            .ok_or(Errno::STALE)?
            .copy_from_slice(bytes);
        let flags = (flags | OFlags::CLOEXEC).bits().cast_signed();
        let mut retries = 0;
        loop {
            // SAFETY: `raw` is a `file_handle` with at least `handle_bytes` bytes behind it, and
            // exclusively borrowed during the call; `mount` is open as long as it is borrowed.
            let fd = unsafe {
                libc::open_by_handle_at(mount.as_fd().as_raw_fd(), (&raw mut raw).cast(), flags)
            };
            if fd >= 0 {
                // SAFETY: the kernel has just opened `fd` for this call, so no other code owns it.
                return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
            }
            match last_errno() {
                // While an inode with the same number is being created, Linux finds neither the old
                // nor the new one (`iget_locked` skips `I_CREATING`) and reports a lack of memory.
                Errno::NOMEM if retries < MAX_RETRIES => {
                    retries += 1;
                    std::thread::yield_now();
                }
                error => return Err(error),
            }
        }
    }

    /// The bytes for [`from_bytes`](Self::from_bytes).
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.parts
    }

    /// Restores a handle from its [`bytes`](Self::bytes). Forged bytes give a handle that can't be
    /// opened, or one of a file whose handle the forger knows.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        (TYPE_LEN..=TYPE_LEN + MAX_BYTES)
            .contains(&bytes.len())
            .then(|| Self {
                parts: SmallVec::from_slice(bytes),
            })
    }

    /// A handle that can't be opened, for tests.
    #[cfg(test)]
    pub(crate) fn invented(bytes: &[u8]) -> Self {
        Self {
            parts: SmallVec::from_slice(bytes),
        }
    }
}
