//! SIGBUS in memory that somebody else gave: survived, and told.
//!
//! A front end that truncates the file behind guest memory, or a page of it that the hardware has
//! lost, turns our next access into a SIGBUS. The kernel's own accesses fail with `EFAULT`; ours
//! are mended here: the handler puts a page of zeros where the fault was and raises the
//! [`MemoryLostEvent`] of the mapping, whose session then ends. A SIGBUS anywhere else goes to whoever
//! handled the signal before, which as a rule ends the process.
//!
//! The invariant: the handler takes no lock and allocates nothing. It looks for the address in a
//! table of which each entry has a version, odd while it changes. A mapping whose memory a
//! thread is in the middle of using can't change its entry at the same time, because the thread
//! keeps it mapped; so an entry that changes under the handler's eyes is not the one it looks
//! for, and is passed over.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::io::Errno;

/// The most mappings that are watched at the same time, in the whole process.
const MOST: usize = 2048;

/// No place: nothing has happened.
const QUIET: u64 = u64::MAX;

/// Tells that some of a session's memory is gone, and where: becomes readable then.
#[derive(Debug)]
pub struct MemoryLostEvent {
    event: OwnedFd,
    /// The first place, in the terms of [`Watch::new`]'s `base`.
    place: AtomicU64,
}

impl MemoryLostEvent {
    /// One that is quiet.
    ///
    /// # Errors
    ///
    /// There is no descriptor to be had for it.
    pub fn new() -> std::io::Result<Self> {
        use rustix::event::EventfdFlags;
        let event = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self {
            event,
            place: AtomicU64::new(QUIET),
        })
    }

    /// Where memory was first found gone, if it was.
    #[must_use]
    pub fn place(&self) -> Option<u64> {
        // Acquire: pairs with the handler's exchange; whoever sees the place sees the rest.
        Some(self.place.load(Ordering::Acquire)).filter(|place| *place != QUIET)
    }

    /// Called in the signal handler.
    fn raise(&self, place: u64) {
        // A second one changes nothing: the session ends for the first.
        let _first = self.place.compare_exchange(
            QUIET,
            place.min(QUIET - 1),
            Ordering::Release,
            Ordering::Relaxed,
        );
        let one = 1_u64;
        // SAFETY: the descriptor is open as long as `self`, and `one` has the eight bytes that an
        // eventfd takes. `write` may be called in a signal handler. It can fail only where the
        // counter is full, and then the alarm has been raised.
        unsafe { libc::write(self.event.as_raw_fd(), (&raw const one).cast(), 8) };
    }
}

impl AsFd for MemoryLostEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// One mapping that is watched. All fields but the version mean something only while that is
/// even, and nothing where `len` is 0.
struct Entry {
    version: AtomicUsize,
    start: AtomicUsize,
    len: AtomicUsize,
    unit: AtomicUsize,
    base: AtomicU64,
    alarm: AtomicPtr<MemoryLostEvent>,
}

/// What an entry said at one moment.
struct Seen {
    start: usize,
    len: usize,
    unit: usize,
    base: u64,
    alarm: *const MemoryLostEvent,
}

impl Entry {
    const fn empty() -> Self {
        Self {
            version: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            unit: AtomicUsize::new(0),
            base: AtomicU64::new(0),
            alarm: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// Changes the entry; whoever calls this holds [`WRITER`].
    fn change(&self, to: &Seen) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        // Release: pairs with the Acquire fence in `see`. Who sees one of the stores below sees
        // the odd version at its second look.
        fence(Ordering::Release);
        self.start.store(to.start, Ordering::Relaxed);
        self.len.store(to.len, Ordering::Relaxed);
        self.unit.store(to.unit, Ordering::Relaxed);
        self.base.store(to.base, Ordering::Relaxed);
        self.alarm.store(to.alarm.cast_mut(), Ordering::Relaxed);
        // Release: pairs with the Acquire load in `see`; the fields come before.
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    /// What it says, unless it changes right now.
    fn see(&self) -> Option<Seen> {
        let version = self.version.load(Ordering::Acquire);
        let seen = Seen {
            start: self.start.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            unit: self.unit.load(Ordering::Relaxed),
            base: self.base.load(Ordering::Relaxed),
            alarm: self.alarm.load(Ordering::Relaxed),
        };
        fence(Ordering::Acquire);
        let same = version & 1 == 0 && self.version.load(Ordering::Relaxed) == version;
        same.then_some(seen)
    }
}

static TABLE: [Entry; MOST] = [const { Entry::empty() }; MOST];

/// Which entries are taken; held while one changes. Never taken in the handler.
static WRITER: Mutex<[bool; MOST]> = Mutex::new([false; MOST]);

/// Who handled SIGBUS before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Keeps a mapping watched as long as it lives.
#[derive(Debug)]
pub(crate) struct Watch {
    entry: usize,
    /// The entry points to it.
    _alarm: Arc<MemoryLostEvent>,
}

impl Watch {
    /// Watches `start..start + len`. A fault there replaces the `unit` bytes around it by zeros
    /// (all of the mapping where that can't be), and raises `alarm` with `base` plus how far
    /// into the mapping it was.
    ///
    /// # Safety
    ///
    /// The bytes are one mapping, which stays there as long as the watch; no Rust reference to
    /// it exists; `start` is a multiple of `unit`, a page size of the mapping.
    ///
    /// # Errors
    ///
    /// `ENFILE`: too many are watched already. Those of `sigaction(2)`.
    pub(crate) unsafe fn new(
        (start, len): (*mut u8, usize),
        unit: usize,
        base: u64,
        alarm: &Arc<MemoryLostEvent>,
    ) -> Result<Self, Errno> {
        handle_sigbus()?;
        let mut taken = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = taken.iter().position(|taken| !taken).ok_or(Errno::NFILE)?;
        taken[entry] = true;
        TABLE[entry].change(&Seen {
            start: start.addr(),
            len,
            unit,
            base,
            alarm: Arc::as_ptr(alarm),
        });
        Ok(Self {
            entry,
            _alarm: Arc::clone(alarm),
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut taken = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
        TABLE[self.entry].change(&Seen {
            start: 0,
            len: 0,
            unit: 0,
            base: 0,
            alarm: ptr::null(),
        });
        taken[self.entry] = false;
    }
}

/// Makes this file handle the process's SIGBUS, if it doesn't.
fn handle_sigbus() -> Result<(), Errno> {
    static DONE: OnceLock<Result<(), Errno>> = OnceLock::new();
    *DONE.get_or_init(|| {
        // SAFETY: all-zero bytes are a valid `sigaction`: the default action and an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_sigbus as extern "C" fn(_, _, _) as usize;
        // On the alternative stack where the thread has one, as for all that handles faults.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: as above.
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: both structures are valid for the call, and `on_sigbus` does nothing that may
        // not be done in a signal handler.
        let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, &raw mut before) };
        if result != 0 {
            return Err(super::last_errno());
        }
        // The only `set` there is.
        let _first = BEFORE.set(before);
        Ok(())
    })
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the handler was installed with SA_SIGINFO, so the kernel passes a valid structure.
    let info = unsafe { &*info };
    // SAFETY: errno is the thread's own.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the address is the thread's, for as long as it runs.
    let before = unsafe { *errno };
    // SAFETY: a SIGBUS of the kernel has an address; one that was sent has other bytes there,
    // which are looked at only where the code says that it is the kernel's.
    let address = unsafe { info.si_addr() }.addr();
    let by_kernel = info.si_code > 0;
    if !(by_kernel && mend(address)) {
        step_back(signal, by_kernel);
    }
    // SAFETY: as for the read.
    unsafe { *errno = before };
}

/// Puts zeros where memory is gone. False if `address` is none of ours, or that failed.
fn mend(address: usize) -> bool {
    for entry in &TABLE {
        let Some(seen) = entry.see() else {
            continue;
        };
        let offset = address.wrapping_sub(seen.start);
        if offset >= seen.len || seen.unit == 0 {
            continue;
        }
        let down = offset - offset % seen.unit;
        let whole = seen.len.next_multiple_of(seen.unit);
        if !zeros(seen.start + down, seen.unit) && !zeros(seen.start, whole) {
            return false;
        }
        // SAFETY: the thread that faulted is using the mapping, so its owner keeps the watch,
        // which keeps the alarm.
        let alarm = unsafe { &*seen.alarm };
        alarm.raise(seen.base.saturating_add(offset as u64));
        return true;
    }
    false
}

/// Maps zeros over `start..start + len`, of a watched mapping.
fn zeros(start: usize, len: usize) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: by the contract of `Watch::new` the addresses belong to a mapping of memory that
    // others may change at any time, to which there is no reference; after this they are still
    // mapped, readable and writable. The system call may be made in a signal handler.
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

/// Lets who handled the signal before have it: a fault comes again as the handler returns, a
/// signal that was sent is sent again.
fn step_back(signal: libc::c_int, by_kernel: bool) {
    let action = BEFORE.get().map_or(ptr::null(), ptr::from_ref);
    if action.is_null() {
        // SAFETY: restores the default action.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    } else {
        // SAFETY: the structure is what `sigaction` gave, and is never changed.
        unsafe { libc::sigaction(signal, action, ptr::null_mut()) };
    }
    if !by_kernel {
        // SAFETY: may be called in a signal handler; it comes when this one has returned.
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
            // SAFETY: a new mapping, where the kernel likes it.
            let start = unsafe {
                rustix::mm::mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, &file, 0)
            };
            let start = start.unwrap().cast();
            Self { file, start, len }
        }

        fn watch(&self, base: u64, alarm: &Arc<MemoryLostEvent>) -> Watch {
            // SAFETY: the mapping outlives the watch in every test, and there is no reference.
            unsafe { Watch::new((self.start, self.len), PAGE, base, alarm) }.unwrap()
        }

        fn byte(&self, at: usize) -> u8 {
            assert!(at < self.len);
            // SAFETY: within the mapping.
            unsafe { self.start.wrapping_add(at).read_volatile() }
        }
    }

    impl Drop for Mapped {
        fn drop(&mut self) {
            // SAFETY: the mapping is this value's own.
            unsafe { rustix::mm::munmap(self.start.cast(), self.len) }.unwrap();
        }
    }

    #[test]
    fn a_page_that_is_gone_reads_as_zeros_and_raises_the_alarm() {
        let mapped = Mapped::new(3);
        let alarm = Arc::new(MemoryLostEvent::new().unwrap());
        let watch = mapped.watch(0x1000_0000, &alarm);
        assert_eq!((mapped.byte(2 * PAGE), alarm.place()), (1, None));
        mapped.file.set_len(PAGE as u64).unwrap();
        assert_eq!(mapped.byte(2 * PAGE + 5), 0);
        assert_eq!(alarm.place(), Some(0x1000_2005));
        assert_eq!(mapped.byte(0), 1, "what is there stays");
        assert_eq!(mapped.byte(PAGE), 0);
        assert_eq!(alarm.place(), Some(0x1000_2005), "the first place is told");
        let mut count = [0; 8];
        rustix::io::read(&alarm.event, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 2);
        drop(watch);
    }

    #[test]
    fn faults_are_mended_while_others_come_and_go() {
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let alarm = Arc::new(MemoryLostEvent::new().unwrap());
                    let mapped = Mapped::new(1);
                    while !stop.load(Ordering::Relaxed) {
                        drop(mapped.watch(0, &alarm));
                    }
                    assert_eq!(alarm.place(), None, "somebody else's fault");
                });
            }
            for round in 0..500 {
                let mapped = Mapped::new(1);
                let alarm = Arc::new(MemoryLostEvent::new().unwrap());
                let watch = mapped.watch(round, &alarm);
                mapped.file.set_len(0).unwrap();
                assert_eq!(mapped.byte(7), 0);
                assert_eq!(alarm.place(), Some(round + 7));
                drop(watch);
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
