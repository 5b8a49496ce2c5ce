//! Records the progress of each request in flight, in a slot for each head.
//!
//! The in-flight region tells the next server process which heads are in flight, but not what was
//! done for them. A slot says which request is at the head, what its server intended to do, and
//! whether the reply is in the guest's memory already. In that case the chain is returned with that
//! reply and the request is not served again. The invariant: a slot is valid only while its head is
//! in flight, and only for the use of the head that its counter names.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::state::{QueuePart, Table};

/// Words of a slot, which fill one cache line.
const SLOT: usize = 8;

/// Positions of the words in a slot.
mod word {
    pub(super) const UNIQUE: usize = 0;
    pub(super) const OUTCOME: usize = 1;
    pub(super) const INTENT: usize = 2;
    /// The counter of the in-flight region's entry, plus one; 0 marks a slot that was never used.
    pub(super) const COUNTER: usize = 6;
}

/// Set in the outcome once the reply is in place; the low half is the reply's length.
const REPLIED: u64 = 1 << 63;

/// Words of an intent.
pub(crate) const INTENT: usize = 4;

/// What a slot records of a request that was in flight when its server ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Previous {
    /// The number of the FUSE request; 0 if it was not recorded, in which case nothing was done for
    /// it.
    pub unique: u64,
    /// The intent of [`Chain::record_intent`](super::Chain::record_intent); the first word is 0 if
    /// there is none.
    pub intent: [u64; INTENT],
}

/// The slots of one queue.
#[derive(Clone, Debug)]
pub struct Journal(QueuePart);

/// The slot of one head; empty if the table were too small, and then records nothing.
struct Slot<'a>(&'a [AtomicU64]);

impl Slot<'_> {
    #[inline]
    fn load(&self, word: usize) -> u64 {
        let word = self.0.get(word);
        // Relaxed: see `SharedWords::load`.
        word.map_or(0, |word| u64::from_le(word.load(Ordering::Relaxed)))
    }

    #[inline]
    fn store(&self, word: usize, value: u64) {
        #[cfg(test)]
        if !crate::guest_memory::crash_injection::store_takes_effect() {
            return;
        }
        if let Some(word) = self.0.get(word) {
            // Release: see `SharedWords::store`.
            word.store(value.to_le(), Ordering::Release);
        }
    }
}

/// Slots that are scanned before the scan may end. Drivers use low heads first, so a block of
/// unused slots ends it.
const SCAN_BLOCK: u16 = 1024;

/// Returns the numbers of the requests, on all queues with a journal in `table`, that the previous
/// process had started and not replied to when it ended.
#[must_use]
pub fn unanswered_requests(table: &Arc<Table>) -> Vec<u64> {
    let parts = (0..=u16::MAX).map_while(|index| table.queue(index));
    parts
        .flat_map(|part| Journal::new(part).unanswered_requests())
        .collect()
}

impl Journal {
    fn unanswered_requests(&self) -> Vec<u64> {
        let mut requests = Vec::new();
        for first in (0..super::layout::MAX_SIZE).step_by(usize::from(SCAN_BLOCK)) {
            let mut used = false;
            for head in first..first.saturating_add(SCAN_BLOCK) {
                used |= self.slot(head).load(word::COUNTER) != 0;
                let unique = self.slot(head).load(word::UNIQUE);
                if unique != 0 && self.reply_len(head).is_none() {
                    requests.push(unique);
                }
            }
            if !used {
                break;
            }
        }
        requests
    }

    /// Words that the journal takes of a queue's part of the table: a slot for each possible head.
    pub const WORDS: usize = SLOT * (super::layout::MAX_SIZE as usize);

    /// The journal in a queue's part of the table.
    #[must_use]
    pub fn new(part: QueuePart) -> Self {
        Self(part)
    }

    #[inline]
    fn slot(&self, head: u16) -> Slot<'_> {
        let first = SLOT.saturating_mul(usize::from(head));
        Slot(self.0.words(first, SLOT).unwrap_or_default())
    }

    /// Clears the slot of a head that is about to be marked as in flight with `counter`.
    #[inline]
    pub(super) fn begin(&self, head: u16, counter: u64) {
        let slot = self.slot(head);
        // Until the counter is stored, the slot still belongs to the previous use of the head,
        // which has ended.
        slot.store(word::UNIQUE, 0);
        slot.store(word::OUTCOME, 0);
        // The other words of an intent are ignored if the first one is 0.
        slot.store(word::INTENT, 0);
        slot.store(word::COUNTER, stamp(counter));
    }

    /// Whether the slot belongs to the use of the head that `counter` names.
    pub(super) fn belongs_to(&self, head: u16, counter: u64) -> bool {
        self.slot(head).load(word::COUNTER) == stamp(counter)
    }

    /// Records the number of the request at `head`.
    pub(super) fn record_unique(&self, head: u16, unique: u64) {
        self.slot(head).store(word::UNIQUE, unique);
    }

    /// Records that the reply of `len` bytes is in the guest's memory.
    pub(super) fn record_reply(&self, head: u16, len: u32) {
        self.slot(head)
            .store(word::OUTCOME, REPLIED | u64::from(len));
    }

    /// Returns the length of the reply, if it is in the guest's memory.
    pub(super) fn reply_len(&self, head: u16) -> Option<u32> {
        let outcome = self.slot(head).load(word::OUTCOME);
        if outcome & REPLIED == 0 {
            return None;
        }
        u32::try_from(outcome ^ REPLIED).ok()
    }

    /// Records an intent; one whose first word is 0 clears it.
    pub(super) fn record_intent(&self, head: u16, intent: [u64; INTENT]) {
        let [first, second, third, fourth] = intent;
        let slot = self.slot(head);
        slot.store(word::INTENT, 0);
        if first != 0 {
            for (at, value) in (word::INTENT..).zip([0, second, third, fourth]).skip(1) {
                slot.store(at, value);
            }
            // Last, because it makes the others valid.
            slot.store(word::INTENT, first);
        }
    }

    /// Returns what the slot records.
    pub(super) fn previous(&self, head: u16) -> Previous {
        let slot = self.slot(head);
        let mut intent = [0; INTENT];
        for (at, value) in (word::INTENT..).zip(&mut intent) {
            *value = slot.load(at);
        }
        if intent.first() == Some(&0) {
            intent = [0; INTENT];
        }
        Previous {
            unique: slot.load(word::UNIQUE),
            intent,
        }
    }
}

/// The value of the counter's word, which is never 0 in practice.
fn stamp(counter: u64) -> u64 {
    counter.wrapping_add(1)
}
