//! The operations in flight on one ring, and the resources that they own.
//!
//! The invariant: an operation's resources leave its slot only with its result, so not before the
//! kernel is done with them.

use std::io;
use std::sync::Arc;
use std::task::Waker;

use crate::io::buffer::GuestBuffer;
use crate::io::descriptor::Descriptor;

/// The resources of an operation while the kernel works on it.
pub(super) struct Resources {
    /// The buffer that it reads into or writes from, if any.
    pub(super) buffer: Option<GuestBuffer>,
    /// On the heap, so it stays in place when this value moves.
    pub(super) _vecs: Vec<libc::iovec>,
    /// Keeps the descriptor open.
    pub(super) _descriptor: Arc<Descriptor>,
}

/// Identifies an operation; the user data of its entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key(u32);

impl Key {
    /// As user data.
    pub(super) fn data(self) -> u64 {
        u64::from(self.0)
    }

    /// From user data, unless that belongs to no operation.
    pub(super) fn from_data(data: u64) -> Option<Self> {
        u32::try_from(data).ok().map(Self)
    }
}

enum Slot {
    Free,
    /// The kernel has the operation, or will get it.
    InFlight {
        resources: Resources,
        /// `None` if nothing waits for it any more.
        waiter: Option<Waiter>,
    },
    Done {
        resources: Resources,
        result: i32,
    },
}

/// What waits for an operation.
enum Waiter {
    /// A future that hasn't been polled yet.
    NotPolled,
    Waker(Waker),
}

/// The remains of a completed operation, to be handled while nothing is borrowed.
pub(super) enum Leftover {
    /// A task to wake.
    Waiter(Waker),
    /// Resources of an operation that nothing waits for.
    Memory(#[allow(dead_code, reason = "to be dropped")] Box<Resources>),
}

/// The operations of one ring.
#[derive(Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<Key>,
}

impl Slots {
    /// Stores the resources of an operation.
    pub(super) fn insert(&mut self, resources: Resources) -> Key {
        let waiter = Some(Waiter::NotPolled);
        let slot = Slot::InFlight { resources, waiter };
        if let Some(key) = self.free.pop() {
            *self.at(key) = slot;
            return key;
        }
        let key = Key(u32::try_from(self.slots.len()).expect("invariant: memory ends before"));
        self.slots.push(slot);
        key
    }

    /// Returns the result and the operation's resources if it is complete; otherwise keeps `waker`.
    /// An error holds a waker that is no longer needed.
    pub(super) fn poll(
        &mut self,
        key: Key,
        waker: &Waker,
    ) -> Result<(i32, Resources), Option<Waker>> {
        match self.at(key) {
            Slot::Done { .. } => (),
            Slot::InFlight { waiter, .. } => {
                return Err(match waiter {
                    Some(Waiter::Waker(current)) if current.will_wake(waker) => None,
                    _ => match waiter.replace(Waiter::Waker(waker.clone())) {
                        Some(Waiter::Waker(old)) => Some(old),
                        Some(Waiter::NotPolled) | None => None,
                    },
                });
            }
            // Only the waiting future frees it.
            Slot::Free => return Err(None),
        }
        match self.release(key) {
            Slot::Done { resources, result } => Ok((result, resources)),
            Slot::Free | Slot::InFlight { .. } => Err(None),
        }
    }

    /// Called when nothing waits for the operation any more. Returns what is no longer needed.
    pub(super) fn abandon(&mut self, key: Key) -> Option<Leftover> {
        if let Slot::InFlight { waiter, .. } = self.at(key) {
            return match waiter.take() {
                Some(Waiter::Waker(waker)) => Some(Leftover::Waiter(waker)),
                Some(Waiter::NotPolled) | None => None,
            };
        }
        match self.release(key) {
            Slot::Done { resources, .. } => Some(Leftover::Memory(Box::new(resources))),
            Slot::Free | Slot::InFlight { .. } => None,
        }
    }

    /// Called when the kernel has completed the operation, or never started it.
    pub(super) fn complete(&mut self, key: Key, result: i32) -> Option<Leftover> {
        match std::mem::replace(self.at(key), Slot::Free) {
            Slot::InFlight { resources, waiter } => match waiter {
                Some(waiter) => {
                    *self.at(key) = Slot::Done { resources, result };
                    match waiter {
                        Waiter::Waker(waker) => Some(Leftover::Waiter(waker)),
                        Waiter::NotPolled => None,
                    }
                }
                None => {
                    self.free.push(key);
                    Some(Leftover::Memory(Box::new(resources)))
                }
            },
            // The kernel completes each operation once.
            other => {
                *self.at(key) = other;
                None
            }
        }
    }

    /// The operations that the kernel has, or will get.
    pub(super) fn in_flight(&self) -> Vec<Key> {
        (0..)
            .map(Key)
            .zip(&self.slots)
            .filter(|(_, slot)| matches!(slot, Slot::InFlight { .. }))
            .map(|(key, _)| key)
            .collect()
    }

    fn release(&mut self, key: Key) -> Slot {
        self.free.push(key);
        std::mem::replace(self.at(key), Slot::Free)
    }

    fn at(&mut self, key: Key) -> &mut Slot {
        &mut self.slots[key.0 as usize]
    }
}

/// The result of a completion.
pub(super) fn outcome(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_negative| io::Error::from_raw_os_error(-result))
}
