//! Direct access to the rings' fields, for tests that play a wrong or hostile driver.
//!
//! Nothing is accounted for here: a head that is pushed here comes back by [`Queue::pop_raw`] only.

use std::sync::atomic::Ordering;

use super::{Descriptor, Queue, RingError};

impl Queue {
    /// Removes a descriptor from the free list for good, to be written by hand.
    pub fn reserve(&mut self) -> Option<u16> {
        let left = self.free.checked_sub(1)?;
        let index = self.free_head;
        self.free_head = self.next_of(index);
        self.free = left;
        Some(index)
    }

    /// Writes a descriptor of the table. The index is reduced to the ring's size.
    pub fn write_desc(&mut self, index: u16, descriptor: Descriptor) {
        self.areas.write_descriptor(index, descriptor);
    }

    /// Reads a descriptor of the table. The index is reduced to the ring's size.
    #[must_use]
    pub fn read_desc(&self, index: u16) -> Descriptor {
        self.areas.descriptor(index)
    }

    /// Puts any number on the available ring as a head and publishes it, without a kick.
    pub fn push_head(&mut self, head: u16) {
        // Relaxed: ordered by the Release store in `publish`.
        let entry = self.areas.avail_entry(self.staged);
        entry.store(head, Ordering::Relaxed);
        self.staged = self.staged.wrapping_add(1);
        self.publish();
    }

    /// Sets the available index to any value. Later pushes continue from there.
    pub fn set_avail_idx(&mut self, index: u16) {
        self.staged = index;
        self.publish();
    }

    /// The available index, as the device sees it.
    #[must_use]
    pub fn avail_idx(&self) -> u16 {
        // Relaxed: only this side writes it.
        self.areas.avail_idx().load(Ordering::Relaxed)
    }

    /// Sets the available ring's flags.
    pub fn set_avail_flags(&mut self, flags: u16) {
        // Relaxed: a hint, nothing depends on when it is seen.
        self.areas.avail_flags().store(flags, Ordering::Relaxed);
    }

    /// Sets used_event, the used index after which the device is to call.
    pub fn set_used_event(&mut self, event: u16) {
        // Relaxed: as for the flags.
        self.areas.used_event().store(event, Ordering::Relaxed);
    }

    /// The used index.
    #[must_use]
    pub fn used_idx(&self) -> u16 {
        // Acquire: pairs with the device's Release store of it; the elements below it, and what
        // the device wrote to their buffers, are seen after it.
        self.areas.used_idx().load(Ordering::Acquire)
    }

    /// The used ring's flags.
    #[must_use]
    pub fn used_flags(&self) -> u16 {
        // Relaxed: a hint; where it matters a fence is before.
        self.areas.used_flags().load(Ordering::Relaxed)
    }

    /// avail_event: the available index after which the device wants a kick.
    #[must_use]
    pub fn avail_event(&self) -> u16 {
        // Relaxed: as for the flags.
        self.areas.avail_event().load(Ordering::Relaxed)
    }

    /// The used element in a slot: the head and the bytes written. The index is reduced to the
    /// ring's size.
    #[must_use]
    pub fn used_elem(&self, index: u16) -> (u32, u32) {
        self.areas.used_elem(index)
    }

    /// Takes the next used element whatever its content, without accounting for it.
    ///
    /// # Errors
    /// [`RingError::UsedIndex`].
    pub fn pop_raw(&mut self) -> Result<Option<(u32, u32)>, RingError> {
        if self.ready()? == 0 {
            return Ok(None);
        }
        let element = self.areas.used_elem(self.taken);
        self.taken = self.taken.wrapping_add(1);
        Ok(Some(element))
    }
}
