//! The one table of what a session holds: inodes, open files, locks, agreements.
//!
//! It lies in a file that is mapped shared (`memfd_create(2)`, or one that the operator names), and
//! is changed in place as requests change it, so that whoever maps the file after the server was
//! killed goes on from there. Three uses: a new process after a crash, a new program after an
//! upgrade, another host after a migration. It knows nothing of what it remembers but its shape.
//!
//! What is written down is complete before it is shown, by one store; so the table is right after
//! each store, wherever the process is killed. A record carries the number of the request that has
//! changed it last: a request that was under way then can be told from one that has taken effect.
//! The invariant: a table that [`Table::open`] accepts is used without further doubt, and one that
//! it refuses has not been changed.

mod blobs;
mod handles;
mod header;
mod inodes;
mod locks;
mod slabs;
pub mod stream;
#[cfg(test)]
mod tests;
mod thread_journal;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

pub use self::blobs::Name;
pub use self::handles::{HandleFields, HandleRecord};
pub use self::header::{Agreement, Limits, QueuePart};
pub use self::inodes::{InodeFields, InodeRecord};
pub use self::locks::{LockFields, LockRecord, Range};
pub use self::thread_journal::{Done, JournalEntry};

use self::header::Layout;
use self::slabs::{RecordKind, Slabs};
use crate::sys::closing::First;
use crate::sys::shared::{SharedWords, WORD};

/// Why there is no table.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file can't be made as long as it has to be.
    #[error("making room for the table of what a session holds ({bytes} bytes, mostly holes)")]
    Grow {
        /// How long.
        bytes: u64,
        /// Why not.
        source: Errno,
    },
    /// The file can't be mapped.
    #[error("mapping the table of what a session holds")]
    Map(#[source] Errno),
    /// Its length can't be asked for.
    #[error("reading how long the state file is")]
    Length(#[source] Errno),
    /// The file is something else.
    #[error("this is no state file of ringfsd")]
    Foreign,
    /// Another program's version.
    #[error(
        "the state has version {found}, and this program reads {known}: start the version that \
         wrote it, or remove the file if no VMM is to go on from it"
    )]
    Version {
        /// That of the file.
        found: u64,
        /// The one that is understood.
        known: u64,
    },
    /// Part of the file is missing.
    #[error("the state file has been cut: {found} bytes of {wanted} are there")]
    Cut {
        /// Bytes that are there.
        found: u64,
        /// Bytes that were written.
        wanted: u64,
    },
    /// Something in it can't be.
    #[error("the state is damaged: {what} at word {at}")]
    Damaged {
        /// What.
        what: &'static str,
        /// Where, in words of 64 bits from the beginning.
        at: usize,
    },
}

/// The table.
#[derive(Debug)]
pub struct Table {
    words: SharedWords,
    layout: Layout,
    slabs: Slabs,
    /// Which half of the threads' room this process has; orders nothing.
    half: AtomicUsize,
    /// Records that are dropped stay; see [`close`](Self::close).
    closed: AtomicBool,
    /// Has the file's lock given up early.
    first: OnceLock<First>,
}

/// Reserves the room of some words on the file system, where that can be had.
fn reserve(file: &OwnedFd, first: usize, words: usize) -> Result<(), Errno> {
    let (offset, len) = ((first * WORD) as u64, (words * WORD) as u64);
    match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, offset, len) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        done => done,
    }
}

/// A place in the table that something is written to.
type RecordRef = u32;

impl Table {
    /// Of the form that this program writes and reads.
    pub const VERSION: u64 = header::VERSION;

    /// A new table, in a file of this process's own that no name leads to.
    ///
    /// # Errors
    ///
    /// There is no memory for one, or no room for its addresses.
    pub fn in_memory(limits: &Limits) -> Result<Arc<Self>, StateError> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = rustix::fs::memfd_create(c"ringfsd-state", flags).map_err(StateError::Map)?;
        Self::made(file, limits, false)
    }

    /// As [`in_memory`](Self::in_memory), for this process alone: without a file, where
    /// `RLIMIT_FSIZE` allows none that is so large.
    ///
    /// # Errors
    ///
    /// There is no memory for one, or no room for its addresses.
    pub fn for_this_process(limits: &Limits) -> Result<Arc<Self>, StateError> {
        match Self::in_memory(limits) {
            Err(StateError::Grow {
                source: Errno::FBIG,
                ..
            }) => {
                let layout = Layout::of(limits);
                let words = SharedWords::without_file(layout.words()).map_err(StateError::Map)?;
                Ok(Self::begun(words, layout, false))
            }
            done => done,
        }
    }

    /// A new table in `file`, which is empty, and which nobody cuts while the table is there. The
    /// room that the table takes of its file system is reserved before it is used.
    ///
    /// # Errors
    ///
    /// The file can't be as long as it has to be, or can't be mapped.
    pub fn create(file: OwnedFd, limits: &Limits) -> Result<Arc<Self>, StateError> {
        Self::made(file, limits, true)
    }

    fn made(file: OwnedFd, limits: &Limits, reserved: bool) -> Result<Arc<Self>, StateError> {
        let layout = Layout::of(limits);
        let bytes = layout.bytes();
        let grow = |source| StateError::Grow { bytes, source };
        rustix::fs::ftruncate(&file, bytes).map_err(grow)?;
        if reserved {
            for (first, words) in layout.always_used() {
                reserve(&file, first, words).map_err(grow)?;
            }
        }
        let words = SharedWords::map(file, layout.words()).map_err(StateError::Map)?;
        Ok(Self::begun(words, layout, reserved))
    }

    fn begun(words: SharedWords, layout: Layout, reserved: bool) -> Arc<Self> {
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

    /// The table that is in `file`.
    ///
    /// # Errors
    ///
    /// See [`StateError`]; the file is as it was then.
    pub fn open(file: OwnedFd) -> Result<Arc<Self>, StateError> {
        let stat = rustix::fs::fstat(&file).map_err(StateError::Length)?;
        let found = u64::try_from(stat.st_size).unwrap_or(0);
        let layout = header::read(&file, found)?;
        let words = SharedWords::map(file, layout.words()).map_err(StateError::Map)?;
        // Whether room has to be reserved is not written down: it does no harm.
        let slabs = Slabs::found(&words, &layout)?;
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

    /// The file that it is in, if it is in one.
    #[must_use]
    pub fn file(&self) -> Option<&OwnedFd> {
        self.words.file()
    }

    /// Ends this process's use of the table: records that are dropped from now on stay in it, for the
    /// next process. Until then dropping a record ends it.
    pub fn close(&self) {
        // Relaxed: whoever drops records afterwards has been handed them by the caller.
        self.closed.store(true, Ordering::Relaxed);
    }

    /// Takes [`close`](Self::close) back: dropping a record ends it.
    pub fn reopen(&self) {
        self.closed.store(false, Ordering::Relaxed);
    }

    /// Whether records stay although they are dropped.
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Has the file, and with it the lock on it, given up before the files that a guest has, should the
    /// process be killed.
    pub fn close_first(&self) {
        if let Some(file) = self.file() {
            self.first.get_or_init(|| First::new(file));
        }
    }

    /// Bytes that records and what belongs to them have at this moment.
    #[must_use]
    pub fn bytes_in_use(&self) -> usize {
        self.slabs.bytes_in_use()
    }

    /// The numbers of all descriptors that records name.
    #[must_use]
    pub fn descriptors(&self) -> Vec<i32> {
        let mut fds = Vec::new();
        for kind in [RecordKind::Inode, RecordKind::Handle, RecordKind::Lock] {
            self.slabs.each(kind, |place| {
                let state = self.load(slabs::word_of(place) + slabs::STATE);
                fds.extend(inodes::descriptor(state));
            });
        }
        fds
    }

    /// The word at `index`, which the layout says is there.
    #[inline]
    fn word(&self, index: usize) -> &AtomicU64 {
        static BEYOND: AtomicU64 = AtomicU64::new(0);
        debug_assert!(index < self.words.len());
        self.words.get(index).unwrap_or(&BEYOND)
    }

    #[inline]
    fn load(&self, index: usize) -> u64 {
        // Acquire: pairs with `store`; what was written before a word is seen with it.
        self.word(index).load(Ordering::Acquire)
    }

    #[inline]
    fn store(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Release);
    }

    /// Takes a place for something of `kind`; `None` if the table is full.
    fn take(&self, kind: RecordKind) -> Option<RecordRef> {
        self.slabs.take(&self.words, kind)
    }

    /// Gives a place back whose first word, or state, says already that nothing is there.
    fn give_back(&self, place: RecordRef) {
        self.slabs.give_back(&self.words, place);
    }

    /// Whether each record is one that this program could have written.
    fn check(&self) -> Result<(), StateError> {
        self.check_inodes()?;
        self.check_handles()?;
        self.check_locks()?;
        // Texts that no record refers to any more go back.
        self.slabs.settle(&self.words);
        Ok(())
    }
}
