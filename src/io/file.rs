//! A file of the host: vectored operations at an offset, at once where they can't wait, else
//! on whichever runtime the caller runs on.
//!
//! [`File`] doesn't keep a position and doesn't belong to a thread: clones may be used on
//! several runtimes at once. The invariant: a read that is answered as short has met the end of
//! the file, and a write is handed to the kernel whole.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::{AtFlags, FallocateFlags, FileType, OFlags, StatxFlags};

use super::buffer::{GuestBuffer, IOV_MAX};
use super::ring::Transfer;
use super::runtime::{Kind, Runtime};
use super::{blocking, ring};

/// What `statx` tells of a file.
pub type Metadata = rustix::fs::Statx;

/// What came of trying an operation that must not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// It is done: this many bytes; fewer than asked for at the end of the file only.
    Done(usize),
    /// The first so many bytes are done, more than none; the rest would wait. Go on with
    /// [`File::read_at_from`].
    Partial(usize),
    /// Nothing is done: it would wait, or can't be known not to.
    WouldBlock,
}

/// How much `sync` makes durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncKind {
    /// Data and metadata, as `fsync(2)`.
    All,
    /// Data and what is needed to read it back, as `fdatasync(2)`.
    Data,
}

/// What a write shall do beyond what the descriptor's own flags say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteMode {
    /// Write at the end of the file, wherever that is then, instead of at the offset.
    pub append: bool,
    /// Be durable when it is answered, as with `O_SYNC` or `O_DSYNC`.
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

/// `ramfs` of `statfs(2)`.
const RAMFS_MAGIC: libc::c_long = 0x8584_58f6;

/// A host file for asynchronous vectored operations. Clones share one descriptor, which is
/// closed with the last of them and of the operations still running.
#[derive(Clone, Debug)]
pub struct File {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    fd: OwnedFd,
    /// [`Facts`] learned so far. Each bit is set once and means the same whoever set it, and no
    /// other memory is reached through it: all accesses are `Relaxed`.
    facts: AtomicU8,
}

/// What has been learned of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Facts(u8);

impl Facts {
    /// The other bits have been looked up.
    const KNOWN: u8 = 1;
    /// A regular file or a block device: has offsets, and only the disk to wait for.
    const SEEKABLE: u8 = 1 << 1;
    /// A regular file.
    const REGULAR: u8 = 1 << 2;
    /// `O_DIRECT`: passes the page cache by.
    const DIRECT: u8 = 1 << 3;
    /// `O_SYNC` or `O_DSYNC`: a write waits for the disk.
    const SYNCED: u8 = 1 << 4;
    /// The file system doesn't know `RWF_NOWAIT`.
    const NO_NOWAIT: u8 = 1 << 5;
    /// A file of a file system in memory, which doesn't know `RWF_NOWAIT` either: there is no disk to
    /// wait for.
    const IN_MEMORY: u8 = 1 << 6;

    fn of(kind: FileType, flags: OFlags) -> u8 {
        let mut facts = match kind {
            FileType::RegularFile => Self::SEEKABLE | Self::REGULAR,
            FileType::BlockDevice => Self::SEEKABLE,
            _ => 0,
        };
        if flags.contains(OFlags::DIRECT) {
            facts |= Self::DIRECT;
        }
        // O_SYNC has the bit of O_DSYNC in it; rustix has one name too many for O_SYNC.
        if flags.bits() & libc::O_DSYNC.cast_unsigned() != 0 {
            facts |= Self::SYNCED;
        }
        facts
    }

    fn has(self, bit: u8) -> bool {
        self.0 & bit != 0
    }
}

impl File {
    /// Takes over a descriptor.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self {
            inner: Arc::new(Inner {
                fd,
                facts: AtomicU8::new(0),
            }),
        }
    }

    /// Takes over a descriptor that was opened with `flags` on a file of this `kind`, which is
    /// then not asked for again.
    #[must_use]
    pub fn opened(fd: OwnedFd, kind: FileType, flags: OFlags) -> Self {
        let file = Self::from_fd(fd);
        let facts = Facts::KNOWN | Facts::of(kind, flags);
        file.inner.facts.store(facts, Ordering::Relaxed);
        file
    }

    /// Opens `path` as `options` say. Opening may wait (for a disk, for the other end of a
    /// FIFO), and does so on a blocking thread.
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
        blocking::run(move || options.open(path))
            .await?
            .map(Self::from)
    }

    /// Reads from `offset` on into `buffer`, as long as there are bytes: fewer than the buffer
    /// holds only at the end of the file. Hands the buffer back with how many there were.
    ///
    /// A buffer of more pieces than one operation takes (1024) is filled by several.
    ///
    /// # Errors
    ///
    /// Those of `preadv(2)`, whatever was read before; `EINVAL` for an offset above 2⁶³ − 1.
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

    /// Like [`read_at`](Self::read_at) where the first `filled` bytes of the buffer are there
    /// already: `offset` still is the place of the buffer's beginning in the file, and the
    /// answer counts the bytes that were there.
    ///
    /// # Errors
    ///
    /// As for [`read_at`](Self::read_at).
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn read_at_from(
        &self,
        buffer: GuestBuffer,
        filled: usize,
        offset: u64,
    ) -> (io::Result<usize>, GuestBuffer) {
        if buffer.is_empty() {
            return (self.read_nothing(&buffer, offset), buffer);
        }
        let facts = self.facts();
        if !facts.has(Facts::SEEKABLE) || !on_ring() {
            return self.read_blocking(buffer, filled, offset).await;
        }
        let mut buffer = buffer;
        let mut filled = filled;
        while filled < buffer.len() {
            let result;
            (result, buffer) = ring::transfer(Transfer::Read, self, buffer, filled, offset).await;
            match result {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                // A ring gives up on a descriptor with O_NONBLOCK where `preadv` would wait.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return self.read_blocking(buffer, filled, offset).await;
                }
                Err(e) => return (Err(e), buffer),
            }
            if self.is_read_over(facts, &buffer, filled, offset) {
                break;
            }
        }
        (Ok(filled), buffer)
    }

    /// Writes `buffer` at `offset` by one operation; returns how many bytes were written, which
    /// are fewer only where `pwritev(2)` writes fewer (the disk or a limit is full).
    ///
    /// A buffer of more pieces than one operation takes (1024) can't be one write: it becomes
    /// several, in order, and ends with the first that is short.
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
        let facts = self.facts();
        if !facts.has(Facts::SEEKABLE) || !on_ring() {
            return self.write_blocking(buffer, (0, offset), 0).await;
        }
        let way = if facts.has(Facts::DIRECT) {
            Transfer::Write
        } else {
            Transfer::WriteBuffered
        };
        let mut buffer = buffer;
        let mut done = 0;
        loop {
            let expected = one_operation(&buffer, done);
            let result;
            (result, buffer) = ring::transfer(way, self, buffer, done, offset).await;
            match result {
                Ok(n) => {
                    done += n;
                    if n < expected || done == buffer.len() {
                        return (Ok(done), buffer);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && done == 0 => {
                    return self.write_blocking(buffer, (0, offset), 0).await;
                }
                Err(e) => return (ok_if_any(done, e), buffer),
            }
        }
    }

    /// As [`write_at`](Self::write_at), in this `mode`.
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
        match self.mode_beyond(mode).flags() {
            0 => self.write_at(buffer, offset).await,
            flags => self.write_blocking(buffer, (0, offset), flags).await,
        }
    }

    /// Writes what is left of a buffer of which the first `done` bytes are written, on a thread that
    /// may wait; the answer counts these. `offset` is the place of the buffer's beginning.
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
        self.write_blocking(buffer, (done, offset), flags).await
    }

    /// Reads as much as is there without waiting, or from a file system in memory, where there is
    /// nothing to wait for. For a file that isn't on the page cache's side of things (`O_DIRECT`,
    /// any other file system without `RWF_NOWAIT`, a device) this is [`Attempt::WouldBlock`] without a
    /// system call.
    ///
    /// # Errors
    ///
    /// Those of `preadv2(2)`, whatever was read before; `EINVAL` for an offset above 2⁶³ − 1.
    pub fn try_read_at(&self, buffer: &mut GuestBuffer, offset: u64) -> io::Result<Attempt> {
        if buffer.is_empty() {
            return self.read_nothing(buffer, offset).map(Attempt::Done);
        }
        let facts = self.facts();
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
            match blocking::read(self.as_fd(), buffer, filled, offset, flags) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) => match e.raw_os_error() {
                    Some(libc::EAGAIN) if filled > 0 => return Ok(Attempt::Partial(filled)),
                    Some(libc::EAGAIN) => return Ok(Attempt::WouldBlock),
                    Some(libc::EOPNOTSUPP) if flags != 0 && is_in_memory(self) => {
                        self.inner
                            .facts
                            .fetch_or(Facts::IN_MEMORY, Ordering::Relaxed);
                        flags = 0;
                    }
                    Some(libc::EOPNOTSUPP) if filled == 0 => {
                        self.inner
                            .facts
                            .fetch_or(Facts::NO_NOWAIT, Ordering::Relaxed);
                        return Ok(Attempt::WouldBlock);
                    }
                    _ => return Err(e),
                },
            }
        }
        Ok(Attempt::Done(filled))
    }

    /// Writes at once, by one `pwritev`, if the write ends in the page cache; it is
    /// [`Attempt::WouldBlock`] with nothing written for `O_DIRECT`, `O_SYNC`, `O_DSYNC` and
    /// whatever isn't a regular file, and never [`Attempt::Partial`]: a write is one write.
    ///
    /// The kernel makes writers wait when too much is dirty, here as anywhere.
    ///
    /// # Errors
    ///
    /// As for [`write_at`](Self::write_at).
    pub fn try_write_at(&self, buffer: &GuestBuffer, offset: u64) -> io::Result<Attempt> {
        self.try_write_as(WriteMode::default(), buffer, offset)
    }

    /// As [`try_write_at`](Self::try_write_at), in this `mode`; what shall be durable would
    /// block.
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
        let facts = self.facts();
        let avoid = Facts::DIRECT | Facts::SYNCED;
        if mode.durable.is_some() || !facts.has(Facts::REGULAR) || facts.has(avoid) {
            return Ok(Attempt::WouldBlock);
        }
        write_all_pieces(self.as_fd(), buffer, (0, offset), mode.flags()).map(Attempt::Done)
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    ///
    /// Those of `fsync(2)`, among them those of earlier writes.
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn sync(&self, kind: SyncKind) -> io::Result<()> {
        if on_ring() {
            return ring::sync(self, kind).await;
        }
        let file = self.clone();
        blocking::run(move || match kind {
            SyncKind::All => rustix::fs::fsync(&file),
            SyncKind::Data => rustix::fs::fdatasync(&file),
        })
        .await?
        .map_err(io::Error::from)
    }

    /// Makes all of the file system that the file is on durable, as `syncfs(2)`.
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
        blocking::run(move || rustix::fs::syncfs(&file))
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
        if on_ring() {
            return ring::allocate(self, mode, offset, len).await;
        }
        let file = self.clone();
        let mode = FallocateFlags::from_bits_retain(mode);
        blocking::run(move || rustix::fs::fallocate(&file, mode, offset, len))
            .await?
            .map_err(io::Error::from)
    }

    /// The file's metadata, by one `statx`, at once: what an open file's inode says needs no
    /// waiting on a local file system.
    ///
    /// # Errors
    ///
    /// Those of `statx(2)`.
    pub fn metadata(&self) -> io::Result<Metadata> {
        let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        Ok(rustix::fs::statx(self, c"", AtFlags::EMPTY_PATH, mask)?)
    }

    /// Copies up to `len` bytes from `offset` on to `target_offset` in `target`, within the
    /// kernel; returns how many, which may be fewer, and are 0 at the end of this file.
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
        blocking::run(move || {
            let (mut from, mut to) = (offset, target_offset);
            rustix::fs::copy_file_range(&source, Some(&mut from), &target, Some(&mut to), len)
        })
        .await?
        .map_err(io::Error::from)
    }

    /// The descriptor, if this is the last clone and no operation is under way.
    pub(crate) fn into_fd(self) -> Option<OwnedFd> {
        Arc::into_inner(self.inner).map(|inner| inner.fd)
    }

    /// How many clones there are, and operations under way.
    pub(crate) fn users(&self) -> usize {
        Arc::strong_count(&self.inner)
    }

    /// What is known of the descriptor, looked up at the first call. A descriptor whose flags
    /// can't be had is treated as one that may wait for ever.
    fn facts(&self) -> Facts {
        let known = self.inner.facts.load(Ordering::Relaxed);
        if known & Facts::KNOWN != 0 {
            return Facts(known);
        }
        let learned = Facts::KNOWN | self.look_up().unwrap_or_default();
        Facts(learned | self.inner.facts.fetch_or(learned, Ordering::Relaxed))
    }

    fn look_up(&self) -> rustix::io::Result<u8> {
        let flags = rustix::fs::fcntl_getfl(self)?;
        let mode = rustix::fs::fstat(self)?.st_mode;
        Ok(Facts::of(FileType::from_raw_mode(mode), flags))
    }

    /// Whether nothing is left to read after a read that filled the buffer up to `filled`.
    fn is_read_over(&self, facts: Facts, buffer: &GuestBuffer, filled: usize, offset: u64) -> bool {
        if filled == buffer.len() {
            return true;
        }
        // Asking again would be refused: the end of a file needs not be aligned.
        facts.has(Facts::DIRECT)
            && rustix::fs::fstat(self).is_ok_and(|stat| {
                let size = u64::try_from(stat.st_size).unwrap_or(0);
                offset.saturating_add(filled as u64) >= size
            })
    }

    /// A read of no bytes, which never waits: the kernel still checks the open mode.
    fn read_nothing(&self, empty: &GuestBuffer, offset: u64) -> io::Result<usize> {
        blocking::read(self.as_fd(), empty, 0, offset, 0)
    }

    fn read_blocking(
        &self,
        buffer: GuestBuffer,
        filled: usize,
        offset: u64,
    ) -> impl Future<Output = (io::Result<usize>, GuestBuffer)> + Send + use<> {
        let file = self.clone();
        blocking::run_on_buffer(buffer, move |buffer| {
            let facts = file.facts();
            let mut filled = filled;
            while filled < buffer.len() {
                match blocking::read(file.as_fd(), buffer, filled, offset, 0)? {
                    0 => break,
                    n => filled += n,
                }
                // What isn't a file or a disk may wait for more to come.
                if !facts.has(Facts::SEEKABLE) || file.is_read_over(facts, buffer, filled, offset) {
                    break;
                }
            }
            Ok(filled)
        })
    }

    /// What of `mode` the descriptor doesn't do by itself.
    fn mode_beyond(&self, mode: WriteMode) -> WriteMode {
        let durable = mode.durable.filter(|_| !self.facts().has(Facts::SYNCED));
        WriteMode { durable, ..mode }
    }

    fn write_blocking(
        &self,
        buffer: GuestBuffer,
        from: (usize, u64),
        flags: libc::c_int,
    ) -> impl Future<Output = (io::Result<usize>, GuestBuffer)> + Send + use<> {
        let file = self.clone();
        blocking::run_on_buffer(buffer, move |buffer| {
            write_all_pieces(file.as_fd(), buffer, from, flags)
        })
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.fd.as_fd()
    }
}

impl AsRawFd for File {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.inner.fd.as_raw_fd()
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

/// The place in the file of a buffer's byte `done`, the buffer beginning at `offset`; refuses
/// what doesn't fit `off_t`, where −1 would mean the descriptor's own position.
pub(super) fn position(offset: u64, done: usize) -> io::Result<i64> {
    offset
        .checked_add(done as u64)
        .and_then(|position| i64::try_from(position).ok())
        .ok_or_else(|| rustix::io::Errno::INVAL.into())
}

/// Whether a file has no disk behind it but the host's memory.
fn is_in_memory(file: &File) -> bool {
    rustix::fs::fstatfs(file)
        .is_ok_and(|told| [libc::TMPFS_MAGIC, RAMFS_MAGIC].contains(&told.f_type))
}

fn on_ring() -> bool {
    Runtime::current() == Some(Kind::Uring)
}

/// Bytes that one operation moves from byte `done` of the buffer on, if it moves all it can.
fn one_operation(buffer: &GuestBuffer, done: usize) -> usize {
    let pieces = buffer.io_vecs(done);
    pieces.iter().take(IOV_MAX).map(|piece| piece.iov_len).sum()
}

/// One `pwritev2`, or as few as take all pieces, beginning with the byte that is told.
fn write_all_pieces(
    fd: BorrowedFd<'_>,
    buffer: &GuestBuffer,
    (mut done, offset): (usize, u64),
    flags: libc::c_int,
) -> io::Result<usize> {
    loop {
        match blocking::write(fd, buffer, done, offset, flags) {
            Ok(n) => {
                done += n;
                if done == buffer.len() || n < one_operation(buffer, done - n) {
                    return Ok(done);
                }
            }
            Err(e) => return ok_if_any(done, e),
        }
    }
}

/// A write that failed after some bytes is short, as the file has them.
fn ok_if_any(done: usize, error: io::Error) -> io::Result<usize> {
    if done > 0 { Ok(done) } else { Err(error) }
}
