//! A file of the host with vectored operations at an offset: performed at once if they can't wait,
//! else on the caller's runtime.
//!
//! [`File`] keeps no position and isn't bound to a thread: clones may be used on several runtimes
//! at once. The invariant: a short read has reached the end of the file, and a write is passed to
//! the kernel as a whole.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags};

use super::buffer::GuestBuffer;
use super::descriptor::{Descriptor, Facts};
use super::engine::{self, SyncKind, thread_pool};
use super::vectored::{self, Direction};

/// The metadata of a file, as `statx(2)` returns it.
pub type Metadata = rustix::fs::Statx;

/// The result of trying an operation that must not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// Done: this many bytes, fewer than asked for only at the end of the file.
    Done(usize),
    /// This many bytes are done, more than none; the rest would wait. Continue with
    /// [`File::read_at_from`].
    Partial(usize),
    /// Nothing is done: the operation would wait, or might.
    WouldBlock,
}

/// What a write does beyond the descriptor's own flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteMode {
    /// Write at the end of the file at that moment instead of at the offset.
    pub append: bool,
    /// Be durable on completion, as with `O_SYNC` or `O_DSYNC`.
    pub durable: Option<SyncKind>,
}

impl WriteMode {
    /// As flags of `pwritev2(2)`.
    fn flags(self) -> libc::c_int {
        let append = if self.append { libc::RWF_APPEND } else { 0 };
        append
            | match self.durable {
                None => 0,
                Some(SyncKind::Data) => libc::RWF_DSYNC,
                Some(SyncKind::All) => libc::RWF_SYNC,
            }
    }
}

/// A host file for asynchronous vectored operations. Clones share one descriptor, which is closed
/// with the last clone and the last running operation.
#[derive(Clone, Debug)]
pub struct File {
    inner: Arc<Descriptor>,
}

impl File {
    /// Takes over a descriptor.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self {
            inner: Arc::new(Descriptor::new(fd)),
        }
    }

    /// Takes over a descriptor that was opened with `flags` on a file of this `kind`, so that these
    /// need not be looked up.
    #[must_use]
    pub fn opened(fd: OwnedFd, kind: FileType, flags: OFlags) -> Self {
        Self {
            inner: Arc::new(Descriptor::opened(fd, kind, flags)),
        }
    }

    /// States that the file is on a file system in memory (tmpfs, ramfs), where nothing is waited
    /// for, so that the first read need not find it out.
    #[must_use]
    pub fn in_memory(self) -> Self {
        self.inner.learn(Facts::IN_MEMORY);
        self
    }

    /// States that the file is on a file system of this host's own, and no other machine or process
    /// serves it: a thread that has nothing else to do may wait for its disk.
    #[must_use]
    pub fn local(self) -> Self {
        if self.inner.facts().has(Facts::REGULAR) {
            self.inner.learn(Facts::LOCAL);
        }
        self
    }

    /// Opens `path` with `options`. Opening may wait (for a disk, for the other end of a FIFO), so
    /// it runs on a blocking thread.
    ///
    /// # Errors
    ///
    /// Those of `open(2)`.
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn open(path: impl AsRef<Path>, options: &std::fs::OpenOptions) -> io::Result<Self> {
        let (path, options) = (path.as_ref().to_path_buf(), options.clone());
        thread_pool::run(move || options.open(path))
            .await?
            .map(Self::from)
    }

    /// Reads from `offset` on into `buffer`, until it is full or the file ends. Returns the number
    /// of bytes, and the buffer.
    ///
    /// A buffer of more pieces than one operation takes (1024) is filled by several.
    ///
    /// # Errors
    ///
    /// Those of `preadv(2)`, even if some bytes were read before; `EINVAL` for an offset above 2⁶³
    /// − 1.
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn read_at(
        &self,
        buffer: GuestBuffer,
        offset: u64,
    ) -> (io::Result<usize>, GuestBuffer) {
        self.read_at_from(buffer, 0, offset).await
    }

    /// Like [`read_at`](Self::read_at) for a buffer whose first `filled` bytes are already read.
    /// `offset` is still the position of the buffer's start, and the result includes the `filled`
    /// bytes.
    ///
    /// # Errors
    ///
    /// As for [`read_at`](Self::read_at).
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub fn read_at_from(
        &self,
        buffer: GuestBuffer,
        filled: usize,
        offset: u64,
    ) -> impl Future<Output = (io::Result<usize>, GuestBuffer)> {
        engine::read(&self.inner, buffer, filled, offset)
    }

    /// Writes `buffer` at `offset` by one operation. Returns the number of bytes, which is less
    /// than the buffer's length only where `pwritev(2)` writes less (the disk or a limit is full).
    ///
    /// A buffer of more pieces than one operation takes (1024) can't be one write: it becomes
    /// several, in order, and ends with the first short one.
    ///
    /// # Errors
    ///
    /// Those of `pwritev(2)`; `EINVAL` for an offset above 2⁶³ − 1.
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn write_at(
        &self,
        buffer: GuestBuffer,
        offset: u64,
    ) -> (io::Result<usize>, GuestBuffer) {
        engine::write(&self.inner, buffer, offset, 0).await
    }

    /// Like [`write_at`](Self::write_at), in this `mode`.
    ///
    /// # Errors
    ///
    /// As for [`write_at`](Self::write_at).
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn write_as(
        &self,
        mode: WriteMode,
        buffer: GuestBuffer,
        offset: u64,
    ) -> (io::Result<usize>, GuestBuffer) {
        let flags = self.mode_beyond(mode).flags();
        engine::write(&self.inner, buffer, offset, flags).await
    }

    /// Writes the rest of a buffer whose first `done` bytes are written, on a blocking thread; the
    /// result includes them. `offset` is the position of the buffer's start.
    ///
    /// # Errors
    ///
    /// As for [`write_at`](Self::write_at), if nothing was written at all.
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn write_rest(
        &self,
        mode: WriteMode,
        buffer: GuestBuffer,
        done: usize,
        offset: u64,
    ) -> (io::Result<usize>, GuestBuffer) {
        let flags = self.mode_beyond(mode).flags();
        thread_pool::write(&self.inner, buffer, (done, offset), flags).await
    }

    /// Reads what is available without waiting, or anything from a file system in memory, where
    /// nothing is waited for. For a file that bypasses the page cache or can't be read without
    /// waiting (`O_DIRECT`, any other file system without `RWF_NOWAIT`, a device) this is
    /// [`Attempt::WouldBlock`] without a system call.
    ///
    /// # Errors
    ///
    /// Those of `preadv2(2)`, even if some bytes were read before; `EINVAL` for an offset above 2⁶³
    /// − 1.
    pub fn try_read_at(&self, buffer: &mut GuestBuffer, offset: u64) -> io::Result<Attempt> {
        if buffer.is_empty() {
            return vectored::read_nothing(self.as_fd(), buffer, offset).map(Attempt::Done);
        }
        let facts = self.inner.facts();
        let avoid = Facts::DIRECT | Facts::NO_NOWAIT;
        if !facts.has(Facts::REGULAR) || facts.has(avoid) {
            return Ok(Attempt::WouldBlock);
        }
        let mut flags = match facts.has(Facts::IN_MEMORY) {
            true => 0,
            false => libc::RWF_NOWAIT,
        };
        let mut filled = 0;
        while filled < buffer.len() {
            match vectored::transfer(
                Direction::Read,
                self.as_fd(),
                buffer,
                (filled, offset),
                flags,
            ) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) => match e.raw_os_error() {
                    Some(libc::EAGAIN) if filled > 0 => return Ok(Attempt::Partial(filled)),
                    Some(libc::EAGAIN) => return Ok(Attempt::WouldBlock),
                    Some(libc::EOPNOTSUPP) if flags != 0 && self.inner.is_in_memory() => {
                        self.inner.learn(Facts::IN_MEMORY);
                        flags = 0;
                    }
                    Some(libc::EOPNOTSUPP) if filled == 0 => {
                        self.inner.learn(Facts::NO_NOWAIT);
                        return Ok(Attempt::WouldBlock);
                    }
                    _ => return Err(e),
                },
            }
        }
        Ok(Attempt::Done(filled))
    }

    /// Writes at once, by one `pwritev`, if the write ends in the page cache. For `O_DIRECT`,
    /// `O_SYNC`, `O_DSYNC` and anything that isn't a regular file it is [`Attempt::WouldBlock`]
    /// with nothing written. Never [`Attempt::Partial`]: a write is one write.
    ///
    /// The kernel makes writers wait when too many pages are dirty, here as elsewhere.
    ///
    /// # Errors
    ///
    /// As for [`write_at`](Self::write_at).
    pub fn try_write_at(&self, buffer: &GuestBuffer, offset: u64) -> io::Result<Attempt> {
        self.try_write_as(WriteMode::default(), buffer, offset)
    }

    /// Like [`try_write_at`](Self::try_write_at), in this `mode`. A durable write is
    /// [`Attempt::WouldBlock`].
    ///
    /// # Errors
    ///
    /// As for [`write_at`](Self::write_at).
    pub fn try_write_as(
        &self,
        mode: WriteMode,
        buffer: &GuestBuffer,
        offset: u64,
    ) -> io::Result<Attempt> {
        let facts = self.inner.facts();
        let avoid = Facts::DIRECT | Facts::SYNCED;
        if mode.durable.is_some() || !facts.has(Facts::REGULAR) || facts.has(avoid) {
            return Ok(Attempt::WouldBlock);
        }
        vectored::write_all_pieces(self.as_fd(), buffer, (0, offset), mode.flags())
            .map(Attempt::Done)
    }

    /// Makes written data durable.
    ///
    /// # Errors
    ///
    /// Those of `fsync(2)`, including those of earlier writes.
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn sync(&self, kind: SyncKind) -> io::Result<()> {
        engine::sync(&self.inner, kind).await
    }

    /// Makes the whole file system that the file is on durable, as `syncfs(2)`.
    ///
    /// # Errors
    ///
    /// Those of `syncfs(2)`.
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn sync_file_system(&self) -> io::Result<()> {
        let file = self.clone();
        thread_pool::run(move || rustix::fs::syncfs(&file))
            .await?
            .map_err(io::Error::from)
    }

    /// Reserves or frees space, as `fallocate(2)`; `mode` are its `FALLOC_FL_*` flags.
    ///
    /// # Errors
    ///
    /// Those of `fallocate(2)`.
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn allocate(&self, mode: u32, offset: u64, len: u64) -> io::Result<()> {
        engine::allocate(&self.inner, mode, offset, len).await
    }

    /// The file's metadata, by one `statx`, at once: an open file's inode needs no waiting on a
    /// local file system.
    ///
    /// # Errors
    ///
    /// Those of `statx(2)`.
    pub fn metadata(&self) -> io::Result<Metadata> {
        let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        Ok(rustix::fs::statx(self, c"", AtFlags::EMPTY_PATH, mask)?)
    }

    /// Copies up to `len` bytes from `offset` on to `target_offset` in `target`, within the kernel.
    /// Returns the number of bytes, which may be less than `len` and is 0 at the end of this file.
    ///
    /// # Errors
    ///
    /// Those of `copy_file_range(2)`: `EXDEV` or `EOPNOTSUPP` where the kernel can't, `EINVAL`
    /// for `flags` other than 0.
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn copy_range_to(
        &self,
        offset: u64,
        target: &Self,
        target_offset: u64,
        len: usize,
        flags: u32,
    ) -> io::Result<usize> {
        if flags != 0 {
            return Err(rustix::io::Errno::INVAL.into());
        }
        let (source, target) = (self.clone(), target.clone());
        thread_pool::run(move || {
            let (mut from, mut to) = (offset, target_offset);
            rustix::fs::copy_file_range(&source, Some(&mut from), &target, Some(&mut to), len)
        })
        .await?
        .map_err(io::Error::from)
    }

    /// The descriptor, if this is the last clone and no operation is running.
    pub(crate) fn into_fd(self) -> Option<OwnedFd> {
        Arc::into_inner(self.inner).map(Descriptor::into_fd)
    }

    /// The number of clones and running operations.
    pub(crate) fn users(&self) -> usize {
        Arc::strong_count(&self.inner)
    }

    /// The part of `mode` that the descriptor's flags don't cover.
    fn mode_beyond(&self, mode: WriteMode) -> WriteMode {
        let durable = mode
            .durable
            .filter(|_| !self.inner.facts().has(Facts::SYNCED));
        WriteMode { durable, ..mode }
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl AsRawFd for File {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.inner.as_raw_fd()
    }
}

impl From<OwnedFd> for File {
    fn from(fd: OwnedFd) -> Self {
        Self::from_fd(fd)
    }
}

impl From<std::fs::File> for File {
    fn from(file: std::fs::File) -> Self {
        Self::from_fd(file.into())
    }
}
