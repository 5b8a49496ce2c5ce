//! A slot for a descriptor that can be closed while no thread uses it, and opened again later.
//!
//! One word contains the descriptor and the number of its borrowers. So borrowing takes no lock and
//! writes to no memory that users of another slot read. The invariant: a descriptor leaves its slot
//! only when its last borrower takes it out, which then owns it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use super::closing;

/// The descriptor's number plus one; 0 for none.
const FD: u64 = 0xffff_ffff;
/// One borrower. There are far fewer than the bits can count.
const USER: u64 = 1 << 32;
const USERS: u64 = ((1 << 28) - 1) * USER;
/// Borrowed since the last [`Slot::second_chance`].
const USED: u64 = 1 << 62;
/// A mark for the slot's owner, see [`Slot::mark`].
const MARK: u64 = 1 << 63;

/// A slot that holds a descriptor or is empty.
#[derive(Debug)]
pub(crate) struct Slot(AtomicU64);

/// A borrowed descriptor: it stays open and in its slot.
#[derive(Debug)]
pub(crate) struct Borrowed<'a> {
    slot: &'a Slot,
    fd: RawFd,
}

impl Slot {
    pub(crate) fn empty() -> Self {
        Self(AtomicU64::new(0))
    }

    pub(crate) fn full(fd: OwnedFd) -> Self {
        closing::opened(fd.as_raw_fd());
        Self(AtomicU64::new(word(fd.into_raw_fd())))
    }

    /// The descriptor, if there is one.
    pub(crate) fn borrow(&self) -> Option<Borrowed<'_>> {
        self.borrow_as(USED)
    }

    /// Like [`borrow`](Self::borrow), but doesn't count as a use.
    pub(crate) fn inspect(&self) -> Option<Borrowed<'_>> {
        self.borrow_as(0)
    }

    fn borrow_as(&self, used: u64) -> Option<Borrowed<'_>> {
        let mut state = self.0.load(Ordering::Relaxed);
        loop {
            let fd = number(state)?;
            // `Acquire` pairs with the `Release` of `fill`: the descriptor is open.
            match self.0.compare_exchange_weak(
                state,
                (state + USER) | used,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(Borrowed { slot: self, fd }),
                Err(now) => state = now,
            }
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        number(self.0.load(Ordering::Relaxed)).is_some()
    }

    /// Puts `fd` in and borrows it.
    ///
    /// # Errors
    ///
    /// Returns `fd` if the slot has a descriptor already.
    pub(crate) fn fill(&self, fd: OwnedFd) -> Result<Borrowed<'_>, OwnedFd> {
        let word = word(fd.as_raw_fd());
        let mut state = self.0.load(Ordering::Relaxed);
        loop {
            if number(state).is_some() {
                return Err(fd);
            }
            match self.0.compare_exchange_weak(
                state,
                state & MARK | word | USER,
                Ordering::Release,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    closing::opened(fd.as_raw_fd());
                    return Ok(Borrowed {
                        slot: self,
                        fd: fd.into_raw_fd(),
                    });
                }
                Err(now) => state = now,
            }
        }
    }

    /// The descriptor, if there is one.
    pub(crate) fn into_inner(mut self) -> Option<OwnedFd> {
        let fd = number(std::mem::take(self.0.get_mut()))?;
        // SAFETY: the number was taken out of the slot, which had its ownership by `into_raw_fd`,
        // and there is no borrower, as `self` is owned.
        Some(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Whether the descriptor was borrowed since the last call.
    pub(crate) fn second_chance(&self) -> bool {
        self.0.fetch_and(!USED, Ordering::Relaxed) & USED != 0
    }

    /// Sets or clears the mark; returns whether it was set. Orders nothing.
    pub(crate) fn mark(&self, set: bool) -> bool {
        let before = if set {
            self.0.fetch_or(MARK, Ordering::Relaxed)
        } else {
            self.0.fetch_and(!MARK, Ordering::Relaxed)
        };
        before & MARK != 0
    }
}

impl Borrowed<'_> {
    /// Takes the descriptor out of its slot, unless there is another borrower or it was used since
    /// the last [`Slot::second_chance`].
    pub(crate) fn take(self) -> Option<OwnedFd> {
        let mut state = self.slot.0.load(Ordering::Relaxed);
        loop {
            if state & USERS != USER || state & USED != 0 {
                return None;
            }
            // `Acquire` pairs with the `Release` of earlier borrowers' drops: all their uses of the
            // descriptor happen before it is closed.
            match self.slot.0.compare_exchange_weak(
                state,
                state & MARK,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => break,
                Err(now) => state = now,
            }
        }
        let fd = self.fd;
        // The exchange has reset the number of borrowers.
        std::mem::forget(self);
        // SAFETY: the exchange took the number out of the slot, which had its ownership by
        // `into_raw_fd`, while this was its only borrower.
        Some(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        self.slot.0.fetch_sub(USER, Ordering::Release);
    }
}

impl AsFd for Borrowed<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the slot neither closes nor gives away a descriptor that is borrowed, and this is
        // a borrower as long as it lives.
        unsafe { BorrowedFd::borrow_raw(self.fd) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(fd) = number(*self.0.get_mut()) {
            // SAFETY: the slot owns the descriptor, and has no borrowers as it is dropped.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}

fn word(fd: RawFd) -> u64 {
    u64::from(fd.cast_unsigned()) + 1
}

fn number(state: u64) -> Option<RawFd> {
    RawFd::try_from((state & FD).checked_sub(1)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn null() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn descriptor_in_use_is_not_taken() {
        let slot = Slot::full(null());
        let user = slot.inspect().unwrap();
        assert!(slot.inspect().unwrap().take().is_none());
        drop(user);
        let taken = slot.inspect().unwrap().take().unwrap();
        assert!(!slot.is_full() && slot.borrow().is_none());
        drop(slot.fill(taken).unwrap());
        assert!(slot.is_full());
    }

    #[test]
    fn used_descriptor_gets_a_second_chance() {
        let slot = Slot::full(null());
        assert!(!slot.second_chance());
        drop(slot.borrow());
        assert!(slot.inspect().unwrap().take().is_none());
        assert!(slot.second_chance());
        assert!(!slot.second_chance());
        assert!(slot.inspect().unwrap().take().is_some());
    }

    #[test]
    fn full_slot_returns_another_descriptor() {
        let slot = Slot::empty();
        drop(slot.fill(null()).unwrap());
        assert!(slot.fill(null()).is_err());
    }

    #[test]
    fn mark_survives_filling_and_taking() {
        let slot = Slot::empty();
        assert!(!slot.mark(true));
        drop(slot.fill(null()).unwrap());
        assert!(slot.inspect().unwrap().take().is_some());
        assert!(slot.mark(false));
        assert!(!slot.mark(true));
    }

    #[test]
    fn racing_borrowers_never_see_a_closed_descriptor() {
        let slot = Slot::full(null());
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        match slot.borrow() {
                            Some(fd) => assert!(rustix::fs::fstat(&fd).is_ok()),
                            None => drop(slot.fill(null())),
                        }
                    }
                });
            }
            scope.spawn(|| {
                for _ in 0..20_000 {
                    slot.second_chance();
                    drop(slot.inspect().and_then(Borrowed::take));
                }
            });
        });
    }
}
