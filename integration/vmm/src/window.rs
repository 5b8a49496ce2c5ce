//! A shared-memory region of a device: maps what the back end asks for, where a guest would see it.
//!
//! A thread answers the back end's requests, as a VMM's device does. The invariant: a request maps or
//! unmaps within the region and nowhere else, and every mapping has the access that was asked for.
//! Reading and writing go through the kernel, which reports a page that isn't there as an error; only
//! a [`View`] accesses the memory itself, as a virtual processor does.

#![allow(
    unsafe_code,
    reason = "maps files at addresses of its own, and accesses them"
)]

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::mm::{MapFlags, ProtFlags};
use zerocopy::IntoBytes;

use crate::connection::message::{FsMap, MMap, backend_request};
use crate::connection::{Connection, ConnectionError, Message};

/// A mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Bytes.
    pub len: u64,
    /// Where it begins in the file.
    pub file_offset: u64,
    /// Whether the guest may write.
    pub writable: bool,
}

/// How the VMM behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Behaviour {
    /// It refuses to map where something is mapped, as the specification says. The VMMs that exist
    /// replace what is there.
    pub strict: bool,
    /// It serves FS_MAP and FS_UNMAP, and not the requests of the specification.
    pub fs_map: bool,
}

/// The region.
#[derive(Debug)]
pub struct Window {
    base: NonNull<u8>,
    len: usize,
    behaviour: Behaviour,
    mappings: Mutex<BTreeMap<u64, Mapping>>,
    requests: AtomicU64,
    /// The answer to the next request, without doing it; 0 for none.
    refusal: AtomicU64,
    /// Requests are received, and not answered.
    silent: AtomicBool,
    closed: AtomicBool,
}

// SAFETY: the memory is mapped from `new` to `drop`, and it is accessed by the kernel or by raw
// pointers of which no reference is made; the back end, other threads, and programs of the host
// change it at any time anyway, and every value of a byte is valid.
unsafe impl Send for Window {}
// SAFETY: as for `Send`.
unsafe impl Sync for Window {}

impl Window {
    /// Reserves addresses for a region of `len` bytes.
    ///
    /// # Errors
    /// Those of `mmap`.
    pub fn new(len: u64, behaviour: Behaviour) -> io::Result<Arc<Self>> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let base =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, ProtFlags::empty(), flags) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Arc::new(Self {
            base,
            len,
            behaviour,
            mappings: Mutex::default(),
            requests: AtomicU64::new(0),
            refusal: AtomicU64::new(0),
            silent: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        }))
    }

    /// Answers the requests that come on the back channel, until it is closed or [`close`](Self::close)
    /// is called. The thread returns the connection.
    #[must_use]
    pub fn serve(self: &Arc<Self>, mut backend: Connection) -> JoinHandle<Connection> {
        let window = Arc::clone(self);
        std::thread::spawn(move || {
            // How soon `close` is noticed.
            let _on_loss_it_ends_anyway = backend.set_timeout(Duration::from_millis(20));
            let mut unanswered = VecDeque::new();
            while !window.closed.load(Ordering::Acquire) {
                match backend.recv() {
                    Ok(message) => {
                        unanswered.push_back((message.header.request, window.answer(&message)));
                    }
                    Err(ConnectionError::TimedOut { .. }) => {}
                    Err(_) => break,
                }
                while !window.silent.load(Ordering::Acquire)
                    && let Some((request, answer)) = unanswered.pop_front()
                {
                    if backend.reply(request, answer.as_bytes()).is_err() {
                        return backend;
                    }
                }
            }
            backend
        })
    }

    /// Ends the thread of [`serve`](Self::serve).
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Refuses the next request with this number.
    pub fn refuse_next(&self, code: u64) {
        self.refusal.store(code, Ordering::Release);
    }

    /// Does what is asked but doesn't answer any more, or answers, what is due first.
    pub fn set_silent(&self, silent: bool) {
        self.silent.store(silent, Ordering::Release);
    }

    /// The number of requests so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Acquire)
    }

    /// The mappings, by their offsets.
    #[must_use]
    pub fn mappings(&self) -> BTreeMap<u64, Mapping> {
        self.lock().clone()
    }

    /// Loses all mappings, as a VMM does that resets the device.
    ///
    /// # Errors
    /// Those of `mmap`.
    pub fn lose(&self) -> io::Result<()> {
        self.lock().clear();
        self.reserve(0, self.len)
    }

    /// Reads the guest's memory at `offset`.
    ///
    /// # Errors
    /// `EFAULT` where nothing is mapped or the file has ended, if there is no byte before that.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        let here = self.iovec(offset, bytes.len())?;
        let there = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: the kernel writes at most `iov_len` bytes to `there`, which is `bytes`, and checks
        // whether it can read `here`.
        let n = unsafe {
            libc::process_vm_readv(own_pid(), &raw const there, 1, &raw const here, 1, 0)
        };
        usize::try_from(n).map_err(|_negative| io::Error::last_os_error())
    }

    /// Writes to the guest's memory at `offset`.
    ///
    /// # Errors
    /// As for [`read`](Self::read), and `EFAULT` where the guest may not write.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let here = self.iovec(offset, bytes.len())?;
        let from = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: the kernel reads `iov_len` bytes from `bytes`, and writes to pages of the region
        // that are mapped for writing and to no others; nothing but files is mapped there.
        let n = unsafe {
            libc::process_vm_writev(own_pid(), &raw const from, 1, &raw const here, 1, 0)
        };
        usize::try_from(n).map_err(|_negative| io::Error::last_os_error())
    }

    /// Part of the region, all of which is mapped: for writing too if `writable`. Nothing is mapped
    /// or unmapped while it is held.
    ///
    /// # Errors
    /// It isn't.
    pub fn view(&self, offset: u64, len: usize, writable: bool) -> io::Result<View<'_>> {
        let start = self.iovec(offset, len)?.iov_base.cast::<u8>();
        let mappings = self.lock();
        let end = offset.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        let mut reached = offset;
        while reached < end {
            let before = mappings.range(..=reached).next_back();
            let next = before.map(|(start, mapping)| (start.saturating_add(mapping.len), mapping));
            match next {
                Some((next, mapping)) if next > reached && (mapping.writable || !writable) => {
                    reached = next;
                }
                _ => return Err(io::ErrorKind::AddrNotAvailable.into()),
            }
        }
        Ok(View {
            start,
            len,
            writable,
            _mappings: mappings,
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Mapping>> {
        self.mappings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn iovec(&self, offset: u64, len: usize) -> io::Result<libc::iovec> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start.checked_add(len).filter(|end| *end <= self.len);
        let Some(_within) = end else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        Ok(libc::iovec {
            iov_base: self.base.as_ptr().wrapping_add(start).cast(),
            iov_len: len,
        })
    }

    /// The answer to a request: 0, or a negative errno.
    fn answer(&self, message: &Message) -> u64 {
        self.requests.fetch_add(1, Ordering::AcqRel);
        match self.refusal.swap(0, Ordering::AcqRel) {
            0 => {}
            code => return code,
        }
        match self.serve_one(message) {
            Ok(()) => 0,
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
                i64::from(errno).wrapping_neg().cast_unsigned()
            }
        }
    }

    fn serve_one(&self, message: &Message) -> io::Result<()> {
        let request = message.header.request;
        let is_old = matches!(request, backend_request::FS_MAP | backend_request::FS_UNMAP);
        if is_old != self.behaviour.fs_map {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let (region, parts) = if is_old {
            let asked = message.value::<FsMap>().map_err(io::Error::other)?;
            (0, parts(&asked))
        } else {
            let asked = message.value::<MMap>().map_err(io::Error::other)?;
            (asked.shmid, vec![(asked.shm_offset, mapping(&asked))])
        };
        if region != 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        for (offset, mapping) in parts {
            match (request, &message.fds[..]) {
                (backend_request::SHMEM_MAP | backend_request::FS_MAP, [fd]) => {
                    self.map(offset, mapping, fd.as_fd())?;
                }
                (backend_request::SHMEM_UNMAP | backend_request::FS_UNMAP, []) => {
                    self.unmap(offset, mapping.len)?;
                }
                _ => return Err(io::ErrorKind::InvalidInput.into()),
            }
        }
        Ok(())
    }

    /// Maps a file at `offset`, as SHMEM_MAP asks for.
    ///
    /// # Errors
    ///
    /// The range isn't within the region, or in use and the VMM strict; or those of `mmap(2)`.
    pub fn map(&self, offset: u64, mapping: Mapping, fd: BorrowedFd<'_>) -> io::Result<()> {
        let (at, len) = self.range(offset, mapping.len)?;
        let mut mappings = self.lock();
        let end = offset.saturating_add(mapping.len);
        let overlaps = |(start, other): (&u64, &Mapping)| {
            *start < end && offset < start.saturating_add(other.len)
        };
        if self.behaviour.strict && mappings.iter().any(overlaps) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        let protection = match mapping.writable {
            true => ProtFlags::READ | ProtFlags::WRITE,
            false => ProtFlags::READ,
        };
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the range is within the region, which this struct has reserved.
        unsafe { rustix::mm::mmap(at, len, protection, flags, fd, mapping.file_offset) }?;
        mappings.retain(|start, other| !overlaps((start, other)));
        mappings.insert(offset, mapping);
        Ok(())
    }

    /// Removes a mapping, as SHMEM_UNMAP asks for.
    ///
    /// # Errors
    ///
    /// The range isn't that of a mapping.
    pub fn unmap(&self, offset: u64, len: u64) -> io::Result<()> {
        let (at, bytes) = self.range(offset, len)?;
        let mut mappings = self.lock();
        // What isn't a whole mapping can't be removed by any VMM that keeps a list.
        if mappings.get(&offset).map(|it| it.len) != Some(len) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.reserve_at(at, bytes)?;
        mappings.remove(&offset);
        Ok(())
    }

    /// Where a range begins, and its length.
    fn range(&self, offset: u64, len: u64) -> io::Result<(*mut libc::c_void, usize)> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        if len == 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok((self.iovec(offset, len)?.iov_base, len))
    }

    fn reserve(&self, offset: u64, len: usize) -> io::Result<()> {
        self.reserve_at(self.iovec(offset, len)?.iov_base, len)
    }

    fn reserve_at(&self, at: *mut libc::c_void, len: usize) -> io::Result<()> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the range is within the region, as `iovec` has checked.
        unsafe { rustix::mm::mmap_anonymous(at, len, ProtFlags::empty(), flags) }?;
        Ok(())
    }
}

/// The mapping that a message asks for.
fn mapping(asked: &MMap) -> Mapping {
    Mapping {
        len: asked.len,
        file_offset: asked.fd_offset,
        writable: asked.flags & MMap::WRITABLE != 0,
    }
}

/// The mappings that a message of the older form asks for, and where they begin in the window.
fn parts(asked: &FsMap) -> Vec<(u64, Mapping)> {
    let all = (0..asked.len.len()).filter(|at| asked.len[*at] != 0);
    all.map(|at| {
        let mapping = Mapping {
            len: asked.len[at],
            file_offset: asked.fd_offset[at],
            writable: asked.flags[at] & FsMap::WRITE != 0,
        };
        (asked.cache_offset[at], mapping)
    })
    .collect()
}

/// Mapped memory of the guest, which is accessed as a virtual processor does: where a file has ended,
/// the program is killed.
#[derive(Debug)]
pub struct View<'a> {
    start: *mut u8,
    len: usize,
    writable: bool,
    _mappings: MutexGuard<'a, BTreeMap<u64, Mapping>>,
}

impl View<'_> {
    /// Copies the bytes at `offset` to `bytes`.
    ///
    /// # Errors
    /// They reach beyond the view.
    #[inline]
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> io::Result<()> {
        let from = self.locate(offset, bytes.len())?;
        // SAFETY: the range is mapped while the view exists, and isn't part of a buffer of this
        // program.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    /// They reach beyond the view, or it isn't mapped for writing.
    #[inline]
    pub fn write(&self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        let to = self.locate(offset, bytes.len())?;
        if !self.writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        // SAFETY: the range is mapped for writing while the view exists, and isn't part of a buffer
        // of this program.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    #[inline]
    fn locate(&self, offset: usize, len: usize) -> io::Result<*mut u8> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.start.wrapping_add(offset)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: these are the address and the length of the region, which nobody uses any more.
        if let Err(error) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) } {
            debug_assert!(false, "munmap of a region of ours: {error}");
        }
    }
}

fn own_pid() -> libc::pid_t {
    rustix::process::getpid().as_raw_nonzero().get()
}
