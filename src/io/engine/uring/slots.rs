//! The operations that are under way on one ring, and what they own.
//!
//! The invariant: what an operation owns leaves its slot only with its result, so not before
//! the kernel is done with it.

use std::io;
use std::sync::Arc;
use std::task::Waker;

use crate::io::buffer::GuestBuffer;
use crate::io::descriptor::Descriptor;

/// What an operation owns while the kernel works on it.
pub(super) struct Held {
    /// What it reads into or writes from, if it does.
    pub(super) buffer: Option<GuestBuffer>,
    /// On the heap, where it stays when this moves.
    pub(super) _vecs: Vec<libc::iovec>,
    /// Keeps the descriptor open.
    pub(super) _descriptor: Arc<Descriptor>,
}

/// Which operation; the user data of its entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key(u32);

impl Key {
    /// As user data.
    pub(super) fn data(self) -> u64 {
        u64::from(self.0)
    }

    /// Out of user data, unless that is no operation's.
    pub(super) fn from_data(data: u64) -> Option<Self> {
        u32::try_from(data).ok().map(Self)
    }
}

enum Slot {
    Free,
    /// The kernel has it, or will have.
    UnderWay {
        held: Held,
        /// None where nobody waits any more.
        waiter: Option<Waiter>,
    },
    Done {
        held: Held,
        result: i32,
    },
}

/// Who waits for an operation.
enum Waiter {
    /// Somebody who hasn't asked yet.
    Silent,
    Waker(Waker),
}

/// What is left of a completed operation, to be dealt with where nothing is borrowed.
pub(super) enum Leftover {
    /// Somebody to be woken.
    Waiter(Waker),
    /// What nobody waits for.
    Memory(#[allow(dead_code, reason = "to be dropped")] Box<Held>),
}

/// The operations of one ring.
#[derive(Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<Key>,
}

impl Slots {
    /// Takes in what an operation owns.
    pub(super) fn insert(&mut self, held: Held) -> Key {
        let waiter = Some(Waiter::Silent);
        let slot = Slot::UnderWay { held, waiter };
        if let Some(key) = self.free.pop() {
            *self.at(key) = slot;
            return key;
        }
        let key = Key(u32::try_from(self.slots.len()).expect("invariant: memory ends before"));
        self.slots.push(slot);
        key
    }

    /// The result and what the operation owned, if it is complete; else `waker` is kept.
    /// Answers also a waker that is not needed any more.
    pub(super) fn poll(&mut self, key: Key, waker: &Waker) -> Result<(i32, Held), Option<Waker>> {
        match self.at(key) {
            Slot::Done { .. } => (),
            Slot::UnderWay { waiter, .. } => {
                return Err(match waiter {
                    Some(Waiter::Waker(known)) if known.will_wake(waker) => None,
                    _ => match waiter.replace(Waiter::Waker(waker.clone())) {
                        Some(Waiter::Waker(old)) => Some(old),
                        Some(Waiter::Silent) | None => None,
                    },
                });
            }
            // Only who waits frees it.
            Slot::Free => return Err(None),
        }
        match self.release(key) {
            Slot::Done { held, result } => Ok((result, held)),
            Slot::Free | Slot::UnderWay { .. } => Err(None),
        }
    }

    /// Nobody waits any more. Answers what is not needed any more.
    pub(super) fn abandon(&mut self, key: Key) -> Option<Leftover> {
        if let Slot::UnderWay { waiter, .. } = self.at(key) {
            return match waiter.take() {
                Some(Waiter::Waker(waker)) => Some(Leftover::Waiter(waker)),
                Some(Waiter::Silent) | None => None,
            };
        }
        match self.release(key) {
            Slot::Done { held, .. } => Some(Leftover::Memory(Box::new(held))),
            Slot::Free | Slot::UnderWay { .. } => None,
        }
    }

    /// The kernel is done, or has never begun.
    pub(super) fn complete(&mut self, key: Key, result: i32) -> Option<Leftover> {
        match std::mem::replace(self.at(key), Slot::Free) {
            Slot::UnderWay { held, waiter } => match waiter {
                Some(waiter) => {
                    *self.at(key) = Slot::Done { held, result };
                    match waiter {
                        Waiter::Waker(waker) => Some(Leftover::Waiter(waker)),
                        Waiter::Silent => None,
                    }
                }
                None => {
                    self.free.push(key);
                    Some(Leftover::Memory(Box::new(held)))
                }
            },
            // The kernel completes an operation once.
            other => {
                *self.at(key) = other;
                None
            }
        }
    }

    /// Those the kernel has, or will have.
    pub(super) fn under_way(&self) -> Vec<Key> {
        (0..)
            .map(Key)
            .zip(&self.slots)
            .filter(|(_, slot)| matches!(slot, Slot::UnderWay { .. }))
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

/// What a completion says.
pub(super) fn outcome(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_negative| io::Error::from_raw_os_error(-result))
}
