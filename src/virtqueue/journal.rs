//! What became of each request in flight, beside the in-flight region: a slot for each head.
//!
//! The region tells a server that comes after this one which heads are in flight, and nothing of
//! what was done for them. A slot says which request is at the head, what its server intended, and
//! whether its reply is in the guest's memory already: then it goes back with that reply and is not
//! served again. The invariant: a slot means something only as long as its head is in flight, and
//! only to the one taking that its counter names.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::state::{QueuePart, Table};

/// Words of a slot: as many as lie in a line of a processor's cache.
const SLOT: usize = 8;

/// Of a slot's words, by what is stored in them.
mod at {
    pub(super) const UNIQUE: usize = 0;
    pub(super) const OUTCOME: usize = 1;
    pub(super) const INTENT: usize = 2;
    /// The counter of the in-flight region's entry, and one more: 0 is a slot never used.
    pub(super) const COUNTER: usize = 6;
}

/// The reply is in place; its length lies in the low half.
const DONE: u64 = 1 << 63;

/// Words of an intent.
pub const INTENT: usize = 4;

/// What a slot holds of a request that was in flight as its server ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Previous {
    /// The number of the FUSE request; 0 if it was not noted, so nothing was done for it.
    pub unique: u64,
    /// As [`Chain::set_intent`](super::Chain::set_intent) has left it; the first word is 0 where
    /// there was none.
    pub intent: [u64; INTENT],
}

/// The slots of one queue.
#[derive(Clone, Debug)]
pub struct Journal(QueuePart);

/// The slot of one head. Where the table were too small there would be none, and nothing kept.
struct Slot<'a>(&'a [AtomicU64]);

impl Slot<'_> {
    #[inline]
    fn load(&self, word: usize) -> u64 {
        let word = self.0.get(word);
        // Relaxed: see `words`.
        word.map_or(0, |word| u64::from_le(word.load(Ordering::Relaxed)))
    }

    #[inline]
    fn store(&self, word: usize, value: u64) {
        #[cfg(test)]
        if !super::crash_injection::is_alive() {
            return;
        }
        if let Some(word) = self.0.get(word) {
            // Release: see `words`.
            word.store(value.to_le(), Ordering::Release);
        }
    }
}

/// How many slots are looked at at once. Drivers use the lower heads first.
const SOME: u16 = 1024;

/// The requests that were under way, and not yet answered, as the process before ended: of all
/// queues that `table` keeps a journal of.
#[must_use]
pub fn under_way(table: &Arc<Table>) -> Vec<u64> {
    let parts = (0..=u16::MAX).map_while(|index| table.queue(index));
    parts
        .flat_map(|part| Journal::new(part).under_way())
        .collect()
}

impl Journal {
    fn under_way(&self) -> Vec<u64> {
        let mut requests = Vec::new();
        for first in (0..super::layout::MAX_SIZE).step_by(usize::from(SOME)) {
            let mut used = false;
            for head in first..first.saturating_add(SOME) {
                used |= self.slot(head).load(at::COUNTER) != 0;
                let unique = self.slot(head).load(at::UNIQUE);
                if unique != 0 && self.outcome(head).is_none() {
                    requests.push(unique);
                }
            }
            if !used {
                break;
            }
        }
        requests
    }

    /// How many words of what is kept of a queue are the journal's: a slot for each head that
    /// there may be.
    pub const WORDS: usize = SLOT * (super::layout::MAX_SIZE as usize);

    /// The journal that is in the words of a queue.
    #[must_use]
    pub fn new(part: QueuePart) -> Self {
        Self(part)
    }

    #[inline]
    fn slot(&self, head: u16) -> Slot<'_> {
        let first = SLOT.saturating_mul(usize::from(head));
        Slot(self.0.words(first, SLOT).unwrap_or_default())
    }

    /// Begins the slot anew for a head about to be marked as in flight with `counter`.
    #[inline]
    pub(super) fn begin(&self, head: u16, counter: u64) {
        let slot = self.slot(head);
        // Until the counter stands there too, these are of the taking before, which is over.
        slot.store(at::UNIQUE, 0);
        slot.store(at::OUTCOME, 0);
        // What is behind the first word of an intent means nothing without it.
        slot.store(at::INTENT, 0);
        slot.store(at::COUNTER, stamp(counter));
    }

    /// Whether the slot is that of the taking that `counter` names.
    pub(super) fn is_of(&self, head: u16, counter: u64) -> bool {
        self.slot(head).load(at::COUNTER) == stamp(counter)
    }

    pub(super) fn note_unique(&self, head: u16, unique: u64) {
        self.slot(head).store(at::UNIQUE, unique);
    }

    /// The reply of `len` bytes is in the guest's memory.
    pub(super) fn done(&self, head: u16, len: u32) {
        self.slot(head).store(at::OUTCOME, DONE | u64::from(len));
    }

    /// The length of the reply, if it is in the guest's memory.
    pub(super) fn outcome(&self, head: u16) -> Option<u32> {
        let outcome = self.slot(head).load(at::OUTCOME);
        if outcome & DONE == 0 {
            return None;
        }
        u32::try_from(outcome ^ DONE).ok()
    }

    pub(super) fn set_intent(&self, head: u16, intent: [u64; INTENT]) {
        let [first, second, third, fourth] = intent;
        let slot = self.slot(head);
        slot.store(at::INTENT, 0);
        if first != 0 {
            for (word, value) in (at::INTENT..).zip([0, second, third, fourth]).skip(1) {
                slot.store(word, value);
            }
            // Last: it shows the others.
            slot.store(at::INTENT, first);
        }
    }

    pub(super) fn previous(&self, head: u16) -> Previous {
        let slot = self.slot(head);
        let mut intent = [0; INTENT];
        for (word, value) in (at::INTENT..).zip(&mut intent) {
            *value = slot.load(word);
        }
        if intent.first() == Some(&0) {
            intent = [0; INTENT];
        }
        Previous {
            unique: slot.load(at::UNIQUE),
            intent,
        }
    }
}

fn stamp(counter: u64) -> u64 {
    counter.wrapping_add(1)
}
