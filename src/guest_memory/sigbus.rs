//! Survives SIGBUS in shared memory that another process has provided, and reports it.
//!
//! An access to guest memory raises SIGBUS if the front end has truncated the file behind it, or
//! the hardware has lost the page. (Accesses by the kernel fail with `EFAULT` instead.) The handler
//! maps zeros at the fault and signals the mapping's [`MemoryLostEvent`], which ends the session. A
//! SIGBUS at any other address goes to the previous handler, which usually ends the process.
//!
//! The invariant: the handler takes no lock and allocates nothing. It looks for the address in a
//! table whose entries have a version, which is odd while an entry changes. A thread that uses a
//! mapping keeps it mapped, so the mapping's entry can't change at the same time. An entry that
//! changes while the handler reads it is therefore not the one that it looks for, and is skipped.

#![allow(
    clippy::indexing_slicing,
    reason = "an entry's index is below the length of both tables"
)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::io::Errno;

/// The maximum number of mappings that are watched at the same time in the process.
const MAX_WATCHES: usize = 2048;

/// No address: no memory was lost.
const NOTHING_LOST: u64 = u64::MAX;

/// Becomes readable when memory of a session is lost, and has the address.
#[derive(Debug)]
pub struct MemoryLostEvent {
    event: OwnedFd,
    /// The first lost address, relative to [`Watch::new`]'s `base`.
    address: AtomicU64,
}

impl MemoryLostEvent {
    /// An event that hasn't been signalled.
    ///
    /// # Errors
    ///
    /// The eventfd can't be made.
    pub fn new() -> std::io::Result<Self> {
        use rustix::event::EventfdFlags;
        let event = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self {
            event,
            address: AtomicU64::new(NOTHING_LOST),
        })
    }

    /// The address at which memory was first found lost, if it was.
    #[must_use]
    pub fn place(&self) -> Option<u64> {
        // Acquire: pairs with the Release of `signal`; a thread that sees the address sees the
        // zeros too.
        Some(self.address.load(Ordering::Acquire)).filter(|address| *address != NOTHING_LOST)
    }

    /// Called in the signal handler.
    fn signal(&self, address: u64) {
        // Only the first address is reported: it ends the session.
        let _first = self.address.compare_exchange(
            NOTHING_LOST,
            address.min(NOTHING_LOST - 1),
            Ordering::Release,
            Ordering::Relaxed,
        );
        let one = 1_u64;
        // SAFETY: the descriptor is open as long as `self`, and `one` has the eight bytes that an
        // eventfd takes. `write` may be called in a signal handler. It can fail only if the counter
        // is full, and then the event has been signalled before.
        unsafe { libc::write(self.event.as_raw_fd(), (&raw const one).cast(), 8) };
    }
}

impl AsFd for MemoryLostEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// A watched mapping. The fields are valid only while the version is even. The entry is unused if
/// `len` is 0.
struct Entry {
    version: AtomicUsize,
    start: AtomicUsize,
    len: AtomicUsize,
    unit: AtomicUsize,
    base: AtomicU64,
    event: AtomicPtr<MemoryLostEvent>,
}

/// The fields of an entry at one moment.
struct Mapping {
    start: usize,
    len: usize,
    unit: usize,
    base: u64,
    event: *const MemoryLostEvent,
}

impl Entry {
    const fn empty() -> Self {
        Self {
            version: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            unit: AtomicUsize::new(0),
            base: AtomicU64::new(0),
            event: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// Changes the entry. The caller holds [`WRITER`].
    fn store(&self, to: &Mapping) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        // Release: pairs with the Acquire fence in `load`. A reader that sees one of the stores
        // below sees the odd version when it reads the version again.
        fence(Ordering::Release);
        self.start.store(to.start, Ordering::Relaxed);
        self.len.store(to.len, Ordering::Relaxed);
        self.unit.store(to.unit, Ordering::Relaxed);
        self.base.store(to.base, Ordering::Relaxed);
        self.event.store(to.event.cast_mut(), Ordering::Relaxed);
        // Release: pairs with the Acquire load in `load`; the fields are stored before.
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    /// Reads the entry; `None` if it is being changed.
    fn load(&self) -> Option<Mapping> {
        let version = self.version.load(Ordering::Acquire);
        let mapping = Mapping {
            start: self.start.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            unit: self.unit.load(Ordering::Relaxed),
            base: self.base.load(Ordering::Relaxed),
            event: self.event.load(Ordering::Relaxed),
        };
        fence(Ordering::Acquire);
        let is_unchanged = version & 1 == 0 && self.version.load(Ordering::Relaxed) == version;
        is_unchanged.then_some(mapping)
    }
}

static TABLE: [Entry; MAX_WATCHES] = [const { Entry::empty() }; MAX_WATCHES];

/// Which entries are in use; locked while an entry changes. Never locked in the handler.
static WRITER: Mutex<[bool; MAX_WATCHES]> = Mutex::new([false; MAX_WATCHES]);

/// The action of SIGBUS before this module's.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// Watches a mapping until it is dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    entry: usize,
    /// The entry points to it.
    _event: Arc<MemoryLostEvent>,
}

impl Watch {
    /// Watches `start..start + len`. A fault there replaces the `unit` bytes around it by zeros
    /// (all of the mapping if that fails), and signals `event` with `base` plus the offset in the
    /// mapping.
    ///
    /// # Safety
    ///
    /// The bytes are one mapping, which stays mapped as long as the watch; no Rust reference to it
    /// exists; `start` is a multiple of `unit`, a page size of the mapping.
    ///
    /// # Errors
    ///
    /// `ENFILE` if too many mappings are watched; those of `sigaction(2)`.
    pub(crate) unsafe fn new(
        (start, len): (*mut u8, usize),
        unit: usize,
        base: u64,
        event: &Arc<MemoryLostEvent>,
    ) -> Result<Self, Errno> {
        handle_sigbus()?;
        let mut used = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = used.iter().position(|used| !used).ok_or(Errno::NFILE)?;
        used[entry] = true;
        TABLE[entry].store(&Mapping {
            start: start.addr(),
            len,
            unit,
            base,
            event: Arc::as_ptr(event),
        });
        Ok(Self {
            entry,
            _event: Arc::clone(event),
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut used = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
        TABLE[self.entry].store(&Mapping {
            start: 0,
            len: 0,
            unit: 0,
            base: 0,
            event: ptr::null(),
        });
        used[self.entry] = false;
    }
}

/// Installs the handler of SIGBUS once for the process.
fn handle_sigbus() -> Result<(), Errno> {
    static DONE: OnceLock<Result<(), Errno>> = OnceLock::new();
    *DONE.get_or_init(|| {
        // SAFETY: all-zero bytes are a valid `sigaction`: the default action and an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_sigbus as extern "C" fn(_, _, _) as usize;
        // Use the alternative stack if the thread has one, as all fault handlers should.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: as above.
        let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: both structures are valid for the call, and `on_sigbus` does only what is allowed
        // in a signal handler.
        let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, &raw mut previous) };
        if result != 0 {
            return Err(crate::sys::last_errno());
        }
        // This is the only call of `set`.
        let _first = PREVIOUS.set(previous);
        Ok(())
    })
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the handler was installed with SA_SIGINFO, so the kernel passes a valid structure.
    let info = unsafe { &*info };
    // SAFETY: errno is the thread's own.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the address is the thread's, for as long as it runs.
    let saved = unsafe { *errno };
    // SAFETY: a SIGBUS of the kernel has an address; one that a process has sent has other bytes
    // there, which are used only if the code says that the kernel has sent it.
    let address = unsafe { info.si_addr() }.addr();
    let by_kernel = info.si_code > 0;
    if !(by_kernel && replace_lost_memory(address)) {
        pass_to_previous(signal, by_kernel);
    }
    // SAFETY: as for the read.
    unsafe { *errno = saved };
}

/// Maps zeros where memory is lost. Returns false if `address` isn't watched, or mapping fails.
fn replace_lost_memory(address: usize) -> bool {
    for entry in &TABLE {
        let Some(mapping) = entry.load() else {
            continue;
        };
        let offset = address.wrapping_sub(mapping.start);
        if offset >= mapping.len || mapping.unit == 0 {
            continue;
        }
        let down = offset - offset % mapping.unit;
        let whole = mapping.len.next_multiple_of(mapping.unit);
        if !map_zeros(mapping.start + down, mapping.unit) && !map_zeros(mapping.start, whole) {
            return false;
        }
        // SAFETY: the thread that faulted is using the mapping, so its owner keeps the watch, which
        // keeps the event.
        let event = unsafe { &*mapping.event };
        event.signal(mapping.base.saturating_add(offset as u64));
        return true;
    }
    false
}

/// Maps zeros over `start..start + len` of a watched mapping.
fn map_zeros(start: usize, len: usize) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: by the contract of `Watch::new` the addresses belong to a mapping of memory that
    // other processes may change at any time, to which there is no reference; afterwards they are
    // still mapped, readable and writable. The system call may be made in a signal handler.
    let mapped = unsafe {
        libc::mmap(
            ptr::with_exposed_provenance_mut(start),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

/// Restores the previous action of the signal. A fault is repeated when the handler returns; a
/// signal that a process has sent is sent again.
fn pass_to_previous(signal: libc::c_int, by_kernel: bool) {
    let action = PREVIOUS.get().map_or(ptr::null(), ptr::from_ref);
    if action.is_null() {
        // SAFETY: restores the default action.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    } else {
        // SAFETY: `sigaction` has filled in the structure, and it is never changed.
        unsafe { libc::sigaction(signal, action, ptr::null_mut()) };
    }
    if !by_kernel {
        // SAFETY: may be called in a signal handler; the signal is delivered when this one has
        // returned.
        unsafe { libc::raise(signal) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::MemfdFlags;
    use rustix::mm::{MapFlags, ProtFlags};

    const PAGE: usize = 4096;

    /// A mapping of a file of `pages` pages of ones.
    struct Mapped {
        file: std::fs::File,
        start: *mut u8,
        len: usize,
    }

    impl Mapped {
        fn new(pages: usize) -> Self {
            let fd = rustix::fs::memfd_create("bus", MemfdFlags::CLOEXEC).unwrap();
            let file = std::fs::File::from(fd);
            let len = pages * PAGE;
            std::os::unix::fs::FileExt::write_all_at(&file, &vec![1; len], 0).unwrap();
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: a new mapping, at an address that the kernel chooses.
            let start = unsafe {
                rustix::mm::mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, &file, 0)
            };
            let start = start.unwrap().cast();
            Self { file, start, len }
        }

        fn watch(&self, base: u64, event: &Arc<MemoryLostEvent>) -> Watch {
            // SAFETY: the mapping outlives the watch in every test, and there is no reference.
            unsafe { Watch::new((self.start, self.len), PAGE, base, event) }.unwrap()
        }

        fn byte(&self, at: usize) -> u8 {
            assert!(at < self.len);
            // SAFETY: within the mapping.
            unsafe { self.start.wrapping_add(at).read_volatile() }
        }
    }

    impl Drop for Mapped {
        fn drop(&mut self) {
            // SAFETY: this value owns the mapping.
            unsafe { rustix::mm::munmap(self.start.cast(), self.len) }.unwrap();
        }
    }

    #[test]
    fn lost_page_reads_as_zeros_and_signals_the_event() {
        let mapped = Mapped::new(3);
        let event = Arc::new(MemoryLostEvent::new().unwrap());
        let watch = mapped.watch(0x1000_0000, &event);
        assert_eq!((mapped.byte(2 * PAGE), event.place()), (1, None));
        mapped.file.set_len(PAGE as u64).unwrap();
        assert_eq!(mapped.byte(2 * PAGE + 5), 0);
        assert_eq!(event.place(), Some(0x1000_2005));
        assert_eq!(mapped.byte(0), 1, "the page that is there is unchanged");
        assert_eq!(mapped.byte(PAGE), 0);
        assert_eq!(
            event.place(),
            Some(0x1000_2005),
            "the first address is kept"
        );
        let mut count = [0; 8];
        rustix::io::read(&event.event, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 2);
        drop(watch);
    }

    #[test]
    fn faults_are_handled_while_other_watches_come_and_go() {
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let event = Arc::new(MemoryLostEvent::new().unwrap());
                    let mapped = Mapped::new(1);
                    while !stop.load(Ordering::Relaxed) {
                        drop(mapped.watch(0, &event));
                    }
                    assert_eq!(event.place(), None, "a fault of another mapping");
                });
            }
            for round in 0..500 {
                let mapped = Mapped::new(1);
                let event = Arc::new(MemoryLostEvent::new().unwrap());
                let watch = mapped.watch(round, &event);
                mapped.file.set_len(0).unwrap();
                assert_eq!(mapped.byte(7), 0);
                assert_eq!(event.place(), Some(round + 7));
                drop(watch);
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
