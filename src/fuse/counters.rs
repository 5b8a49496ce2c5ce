//! Counters of the requests that a session has served.
//!
//! This module only counts; others report the numbers. The invariant: a counter never decreases.

use std::sync::atomic::{AtomicU64, Ordering};

use super::abi::Opcode;

/// At least one more than the highest opcode. Slot 0, which no opcode uses, counts unknown opcodes.
const SLOTS: usize = 64;

/// The counters of a session. They order nothing, so all accesses are `Relaxed`.
#[derive(Debug)]
pub struct Counters {
    requests: [AtomicU64; SLOTS],
    errors: AtomicU64,
    malformed: AtomicU64,
    later: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            requests: std::array::from_fn(|_| AtomicU64::new(0)),
            errors: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
            later: AtomicU64::new(0),
        }
    }
}

impl Counters {
    /// Requests for `opcode`.
    pub fn requests(&self, opcode: Opcode) -> u64 {
        self.slot(opcode.number()).map_or(0, load)
    }

    /// Requests with an opcode that is not in the protocol.
    pub fn unknown(&self) -> u64 {
        self.slot(0).map_or(0, load)
    }

    /// Replies that were errors.
    pub fn errors(&self) -> u64 {
        load(&self.errors)
    }

    /// Requests that could not be decoded.
    pub fn malformed(&self) -> u64 {
        load(&self.malformed)
    }

    /// Requests that were deferred to a future.
    pub fn later(&self) -> u64 {
        load(&self.later)
    }

    pub(super) fn count_request(&self, opcode: u32) {
        let known = Opcode::from_number(opcode).map_or(0, Opcode::number);
        if let Some(slot) = self.slot(known) {
            slot.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn count_error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one, and returns the new total.
    pub(super) fn count_malformed(&self) -> u64 {
        self.malformed
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1)
    }

    pub(super) fn count_later(&self) {
        self.later.fetch_add(1, Ordering::Relaxed);
    }

    fn slot(&self, number: u32) -> Option<&AtomicU64> {
        self.requests.get(usize::try_from(number).ok()?)
    }
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

const _: () = {
    let mut rest = Opcode::ALL;
    while let [opcode, behind @ ..] = rest {
        assert!(
            (opcode.number() as usize) < SLOTS,
            "every opcode has its slot"
        );
        rest = behind;
    }
};
