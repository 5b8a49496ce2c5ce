//! The state table: everything that a guest's session holds (inodes, open files, locks, negotiated
//! parameters), in shared memory.
//!
//! The table is a file that is mapped shared (`memfd_create(2)`, or a file that the operator names)
//! and changed in place while requests are served. Another process that maps the file resumes the
//! session: a new process after a crash, or a new program after an upgrade. The table doesn't know what its fields mean, only their
//! layout.
//!
//! Data are written completely before one store makes them visible, so the table is consistent
//! after each store, wherever the process is killed. A record carries the number of the request
//! that changed it last, which tells whether an interrupted request took effect. The invariant: a
//! table that [`Table::open`] accepts is used without further checks, and one that it rejects is
//! left unchanged.

mod blobs;
mod handles;
mod header;
mod inodes;
mod locks;
mod mappings;
mod slabs;
#[cfg(test)]
mod tests;
mod thread_journal;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

pub(crate) use self::handles::{HandleFields, HandleRecord};
pub use self::header::Limits;
pub(crate) use self::header::{Agreement, QueuePart};
pub(crate) use self::inodes::{InodeFields, InodeRecord};
pub(crate) use self::locks::{LockFields, LockRecord, Range};
pub(crate) use self::mappings::{MappingFields, MappingRecord, MappingState};

use self::header::Layout;
use self::slabs::{RecordKind, Slabs};
use crate::sys::closing::First;
use crate::sys::shared::{MappedWords, WORD};

/// Why a table can't be created or opened.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file can't be extended to the table's size.
    #[error("allocating the state table ({bytes} bytes, mostly holes)")]
    Grow {
        /// The size.
        bytes: u64,
        /// The host's error.
        source: Errno,
    },
    /// The file can't be mapped.
    #[error("mapping the state table")]
    Map(#[source] Errno),
    /// The file's length can't be read.
    #[error("reading the length of the state file")]
    Length(#[source] Errno),
    /// The file is not a state table.
    #[error("this is no state file of ringfsd")]
    Foreign,
    /// The table has a version that this program doesn't support.
    #[error(
        "the state has version {found}, but this program reads version {known}: start the version that \
         wrote it, or remove the file if no session is to be resumed from it"
    )]
    Version {
        /// The file's version.
        found: u64,
        /// The supported version.
        known: u64,
    },
    /// Part of the file is missing.
    #[error("the state file is truncated: it has {found} of {wanted} bytes")]
    Truncated {
        /// The file's length, bytes.
        found: u64,
        /// The table's size, bytes.
        wanted: u64,
    },
    /// The table has an invalid value.
    #[error("the state is damaged: {what} at word {at}")]
    Damaged {
        /// The invalid value.
        what: &'static str,
        /// Its position, in words of 64 bits from the start.
        at: usize,
    },
}

/// The state table.
#[derive(Debug)]
pub struct Table {
    words: MappedWords,
    layout: Layout,
    slabs: Slabs,
    /// The half of the thread journals that this process uses. Orders nothing.
    half: AtomicUsize,
    /// Dropped records stay in the table; see [`close`](Self::close).
    closed: AtomicBool,
    /// Makes the kernel release the file's lock early.
    first: OnceLock<First>,
}

/// Reserves space for some words on the file system, if it supports that.
fn reserve(file: &OwnedFd, first: usize, words: usize) -> Result<(), Errno> {
    let (offset, len) = ((first * WORD) as u64, (words * WORD) as u64);
    match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, offset, len) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        done => done,
    }
}

/// Position of a record or blob in the table: the index of its first word.
type SlotRef = u32;

impl Table {
    /// The version that this program writes and reads.
    pub const VERSION: u64 = header::VERSION;

    /// Creates a table in an anonymous file.
    ///
    /// # Errors
    ///
    /// Fails if there is no memory for the table, or no address space.
    pub fn in_memory(limits: &Limits) -> Result<Arc<Self>, StateError> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = rustix::fs::memfd_create(c"ringfsd-state", flags).map_err(StateError::Map)?;
        Self::create_in(file, limits, false)
    }

    /// Like [`in_memory`](Self::in_memory), for this process only: uses memory without a file if
    /// `RLIMIT_FSIZE` doesn't allow a file of this size.
    ///
    /// # Errors
    ///
    /// Fails if there is no memory for the table, or no address space.
    pub fn for_this_process(limits: &Limits) -> Result<Arc<Self>, StateError> {
        match Self::in_memory(limits) {
            Err(StateError::Grow {
                source: Errno::FBIG,
                ..
            }) => {
                let layout = Layout::of(limits);
                let words = MappedWords::without_file(layout.words()).map_err(StateError::Map)?;
                Ok(Self::with_words(words, layout, false))
            }
            done => done,
        }
    }

    /// Creates a table in `file`, which must be empty and must not be truncated while the table
    /// exists. Space on the file system is reserved before it is used.
    ///
    /// # Errors
    ///
    /// Fails if the file can't be extended to the table's size, or can't be mapped.
    pub fn create(file: OwnedFd, limits: &Limits) -> Result<Arc<Self>, StateError> {
        Self::create_in(file, limits, true)
    }

    fn create_in(file: OwnedFd, limits: &Limits, reserved: bool) -> Result<Arc<Self>, StateError> {
        let layout = Layout::of(limits);
        let bytes = layout.bytes();
        let grow = |source| StateError::Grow { bytes, source };
        rustix::fs::ftruncate(&file, bytes).map_err(grow)?;
        if reserved {
            for (first, words) in layout.always_used() {
                reserve(&file, first, words).map_err(grow)?;
            }
        }
        let words = MappedWords::map(file, layout.words()).map_err(StateError::Map)?;
        Ok(Self::with_words(words, layout, reserved))
    }

    fn with_words(words: MappedWords, layout: Layout, reserved: bool) -> Arc<Self> {
        header::write(&words, &layout);
        Arc::new(Self {
            slabs: Slabs::new(&layout, reserved),
            half: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            words,
            layout,
            first: OnceLock::new(),
        })
    }

    /// Opens the table in `file`.
    ///
    /// # Errors
    ///
    /// See [`StateError`]. The file is then unchanged.
    pub fn open(file: OwnedFd) -> Result<Arc<Self>, StateError> {
        let stat = rustix::fs::fstat(&file).map_err(StateError::Length)?;
        let found = u64::try_from(stat.st_size).unwrap_or(0);
        let layout = header::read(&file, found)?;
        let words = MappedWords::map(file, layout.words()).map_err(StateError::Map)?;
        // Whether space must be reserved is not recorded; reserving does no harm.
        let slabs = Slabs::from_table(&words, &layout)?;
        let table = Self {
            words,
            layout,
            slabs,
            half: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            first: OnceLock::new(),
        };
        table.half.store(table.half_in_use(), Ordering::Relaxed);
        table.check()?;
        Ok(Arc::new(table))
    }

    /// The table's file, if it has one.
    #[must_use]
    pub fn file(&self) -> Option<&OwnedFd> {
        self.words.file()
    }

    /// Ends this process's use of the table: records that are dropped from now on stay in it for
    /// the next process. Before that, dropping a record removes it from the table.
    pub fn close(&self) {
        // Relaxed: a thread that drops records afterwards received them from the caller.
        self.closed.store(true, Ordering::Relaxed);
    }

    /// Reverts [`close`](Self::close): dropping a record removes it again.
    pub fn reopen(&self) {
        self.closed.store(false, Ordering::Relaxed);
    }

    /// Whether dropped records stay in the table.
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// If the process is killed, makes the kernel close this file, and release the lock on it,
    /// before the guest's files.
    pub fn close_first(&self) {
        if let Some(file) = self.file() {
            self.first.get_or_init(|| First::new(file));
        }
    }

    /// Bytes that records and their blobs occupy at this moment.
    #[must_use]
    pub fn bytes_in_use(&self) -> usize {
        self.slabs.bytes_in_use()
    }

    /// The numbers of all descriptors that are recorded.
    #[must_use]
    pub fn descriptors(&self) -> Vec<i32> {
        let mut fds = Vec::new();
        for kind in [RecordKind::Inode, RecordKind::Handle, RecordKind::Lock] {
            self.slabs.for_each(kind, |slot| {
                let state = self.load(slabs::word_of(slot) + slabs::STATE);
                fds.extend(inodes::descriptor(state));
            });
        }
        fds
    }

    /// The word at `index`, which must be within the layout.
    #[inline]
    fn word(&self, index: usize) -> &AtomicU64 {
        static BEYOND: AtomicU64 = AtomicU64::new(0);
        debug_assert!(index < self.words.len());
        self.words.get(index).unwrap_or(&BEYOND)
    }

    #[inline]
    fn load(&self, index: usize) -> u64 {
        // Acquire: pairs with `store`, so everything that was written before the word is visible
        // with it.
        self.word(index).load(Ordering::Acquire)
    }

    #[inline]
    fn store(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Release);
    }

    /// Allocates a slot for a record or blob of `kind`; `None` if the table is full.
    fn allocate(&self, kind: RecordKind) -> Option<SlotRef> {
        self.slabs.allocate(&self.words, kind)
    }

    /// Frees a slot whose first word, or state, already says that it is unused.
    fn free(&self, slot: SlotRef) {
        self.slabs.free(&self.words, slot);
    }

    /// Checks that each record is one that this program could have written.
    fn check(&self) -> Result<(), StateError> {
        self.check_inodes()?;
        self.check_handles()?;
        self.check_locks()?;
        self.check_mappings()?;
        // Blobs that no record refers to are freed.
        self.slabs.finish_claims(&self.words);
        Ok(())
    }
}
