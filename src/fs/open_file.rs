//! What a file system returns for an open file: the object that data are read from and written to.
//!
//! The invariant: the guest's buffer is owned by the operation until it completes, and is returned
//! with the result.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use rustix::io::Errno;

use super::LockOwner;
use crate::io::{File, GuestBuffer, Lock, RecordLock, SyncKind, Transferred, WriteMode};

/// An operation of a [`FileObject`]. It runs on the worker's own runtime, so it must not block:
/// waiting must be awaited, or moved to [`io::blocking`](crate::io::blocking()).
pub type ObjectFuture<T> = Pin<Box<dyn Future<Output = T>>>;

/// An open file.
#[derive(Clone, Debug)]
pub enum OpenFile {
    /// A file of the host. The engine reads and writes it without a copy, and first tries whether
    /// that is possible without waiting.
    Host(File),
    /// Anything else.
    Object(Arc<dyn FileObject>),
}

/// An open file that isn't a file of the host.
///
/// Errors are errnos for the guest (`io::Error::from_raw_os_error`); an error without one becomes
/// `EIO`.
pub trait FileObject: fmt::Debug + Send + Sync + 'static {
    /// READ: fills `buffer` from `offset` on; returns how many bytes, fewer than it holds only at
    /// the end of the file.
    fn read(self: Arc<Self>, buffer: GuestBuffer, offset: u64) -> ObjectFuture<Transferred>;

    /// WRITE: writes `buffer` at `offset`, or at the end of the file if `mode` says so; returns how
    /// many bytes.
    fn write(
        self: Arc<Self>,
        mode: WriteMode,
        buffer: GuestBuffer,
        offset: u64,
    ) -> ObjectFuture<Transferred>;

    /// FSYNC, FSYNCDIR and SYNCFS: makes written data durable.
    fn sync(self: Arc<Self>, kind: SyncKind) -> ObjectFuture<io::Result<()>>;

    /// FALLOCATE of `len` bytes from `offset` on; `mode` has the `FALLOC_FL_*` flags of
    /// `fallocate(2)`.
    fn allocate(
        self: Arc<Self>,
        _mode: u32,
        _offset: u64,
        _len: u64,
    ) -> ObjectFuture<io::Result<()>> {
        Box::pin(async { Err(Errno::OPNOTSUPP.into()) })
    }

    /// COPY_FILE_RANGE: copies up to `len` bytes from `offset` on to `target_offset` in `target`;
    /// returns how many. With `EOPNOTSUPP`, the default, and `EXDEV` the guest's kernel reads and
    /// writes instead.
    fn copy_to(
        self: Arc<Self>,
        _offset: u64,
        _target: OpenFile,
        _target_offset: u64,
        _len: usize,
    ) -> ObjectFuture<io::Result<usize>> {
        Box::pin(async { Err(Errno::OPNOTSUPP.into()) })
    }

    /// GETLK: a record lock of another owner that conflicts with `lock`, if there is one.
    fn conflicting_lock(
        self: Arc<Self>,
        _owner: LockOwner,
        _lock: RecordLock,
    ) -> ObjectFuture<io::Result<Option<RecordLock>>> {
        Box::pin(async { Err(Errno::NOSYS.into()) })
    }

    /// SETLK, SETLKW and `flock`: acquires or releases a lock for `owner`, without waiting for
    /// another owner: `EAGAIN` if it would have to. A request that waits is tried again.
    fn try_lock(self: Arc<Self>, _owner: LockOwner, _lock: Lock) -> ObjectFuture<io::Result<()>> {
        Box::pin(async { Err(Errno::NOSYS.into()) })
    }
}

impl OpenFile {
    /// The host's file, for operations that need one: record locks and `flock`.
    ///
    /// # Errors
    ///
    /// `ENOSYS` if this isn't a file of the host.
    pub fn host(self) -> super::Result<File> {
        match self {
            Self::Host(file) => Ok(file),
            Self::Object(_) => Err(Errno::NOSYS),
        }
    }

    /// Writes `buffer` at `offset`, or at the end, as `mode` says.
    pub async fn write(self, mode: WriteMode, buffer: GuestBuffer, offset: u64) -> Transferred {
        match self {
            Self::Host(file) => file.write_as(mode, buffer, offset).await,
            Self::Object(object) => object.write(mode, buffer, offset).await,
        }
    }

    /// Makes written data durable.
    ///
    /// # Errors
    ///
    /// Those of `fsync(2)`.
    pub async fn sync(self, kind: SyncKind) -> io::Result<()> {
        match self {
            Self::Host(file) => file.sync(kind).await,
            Self::Object(object) => object.sync(kind).await,
        }
    }

    /// Makes the whole file system durable.
    ///
    /// # Errors
    ///
    /// Those of `syncfs(2)`.
    pub async fn sync_file_system(self) -> io::Result<()> {
        match self {
            Self::Host(file) => file.sync_file_system().await,
            Self::Object(object) => object.sync(SyncKind::All).await,
        }
    }

    /// Reserves or frees space, as `fallocate(2)`.
    ///
    /// # Errors
    ///
    /// Those of `fallocate(2)`.
    pub async fn allocate(self, mode: u32, offset: u64, len: u64) -> io::Result<()> {
        match self {
            Self::Host(file) => file.allocate(mode, offset, len).await,
            Self::Object(object) => object.allocate(mode, offset, len).await,
        }
    }

    /// Copies up to `len` bytes from `offset` on to `target_offset` in `target`; returns how many.
    ///
    /// # Errors
    ///
    /// Those of `copy_file_range(2)`; `EXDEV` from a file of the host to a [`FileObject`].
    pub async fn copy_to(
        self,
        offset: u64,
        target: Self,
        target_offset: u64,
        len: usize,
    ) -> io::Result<usize> {
        match (self, target) {
            (Self::Host(file), Self::Host(target)) => {
                file.copy_range_to(offset, &target, target_offset, len, 0)
                    .await
            }
            (Self::Host(_), Self::Object(_)) => Err(Errno::XDEV.into()),
            (Self::Object(object), target) => {
                object.copy_to(offset, target, target_offset, len).await
            }
        }
    }
}
