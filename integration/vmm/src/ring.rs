//! The driver's side of a split virtqueue (virtio 1.2, 2.7).
//!
//! A [`Queue`] puts chains on the available ring, kicks, and takes completions off the used ring.
//! It knows nothing of vhost-user and nothing of the content of chains. It allocates nothing after
//! it has been made. The invariant: a descriptor is free, or part of exactly one chain in flight,
//! whatever the device writes to the used ring.

mod areas;
mod options;
mod raw;
mod wait;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::event::Event;
use crate::memory::{Buf, Gpa, Memory};
pub use areas::{Addresses, Descriptor};
use areas::{Areas, Tables};
pub use options::{QueueOptions, RingError};

/// Bit of the used ring's flags: the device wants no kick (2.7.10).
pub const USED_NO_NOTIFY: u16 = 1;
/// Bit of the available ring's flags: the driver wants no call (2.7.7).
pub const AVAIL_NO_INTERRUPT: u16 = 1;

/// A chain that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The token that was passed to [`Queue::push`].
    pub token: u64,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// The driver's side of one virtqueue.
#[derive(Debug)]
pub struct Queue {
    areas: Areas,
    tables: Option<Tables>,
    event_idx: bool,
    kick: Arc<Event>,
    call: Arc<Event>,
    /// For each descriptor the next one of its chain, or of the free list.
    next: Box<[u16]>,
    slots: Box<[Slot]>,
    free_head: u16,
    free: u16,
    in_flight: u16,
    /// Available index after all that is staged.
    staged: u16,
    /// Available index at the last decision whether to kick.
    kicked: u16,
    /// Used index up to which completions were taken.
    taken: u16,
    /// Used index last seen, so that a batch loads it once.
    seen: u16,
}

/// The record of a chain in flight, by its head.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    token: u64,
    tail: u16,
    descriptors: u16,
}

impl Queue {
    /// Makes a queue with eventfds of its own.
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::Memory`] or [`RingError::Event`].
    pub fn new(memory: &Memory, options: &QueueOptions) -> Result<Self, RingError> {
        let kick = Arc::new(Event::new().map_err(RingError::Event)?);
        let call = Arc::new(Event::new().map_err(RingError::Event)?);
        Self::with_events(memory, options, kick, call)
    }

    /// Makes a queue that kicks and is called by these eventfds. Where several queues share a
    /// call, only one thread may wait for them.
    ///
    /// # Errors
    /// [`RingError::Size`] or [`RingError::Memory`].
    pub fn with_events(
        memory: &Memory,
        options: &QueueOptions,
        kick: Arc<Event>,
        call: Arc<Event>,
    ) -> Result<Self, RingError> {
        let size = options.size;
        if !size.is_power_of_two() {
            return Err(RingError::Size(size));
        }
        let addresses = match options.addresses {
            Some(addresses) => addresses,
            None => Addresses::alloc(memory, size)?,
        };
        let tables = if options.indirect && options.indirect_capacity > 0 {
            Some(Tables::alloc(memory, size, options.indirect_capacity)?)
        } else {
            None
        };
        let mut queue = Self {
            areas: Areas::new(memory, addresses, size)?,
            tables,
            event_idx: options.event_idx,
            kick,
            call,
            next: vec![0; usize::from(size)].into(),
            slots: vec![Slot::default(); usize::from(size)].into(),
            free_head: 0,
            free: size,
            in_flight: 0,
            staged: 0,
            kicked: 0,
            taken: 0,
            seen: 0,
        };
        queue.reset();
        Ok(queue)
    }

    /// Forgets everything and zeroes the rings, as a driver does after it has reset the device.
    pub fn reset(&mut self) {
        let size = self.size();
        for (next, after) in self.next.iter_mut().zip(1..=size) {
            *next = after & (size - 1);
        }
        self.slots.fill(Slot::default());
        self.free_head = 0;
        self.free = size;
        self.in_flight = 0;
        self.staged = 0;
        self.kicked = 0;
        self.taken = 0;
        self.seen = 0;
        // Relaxed: the device is stopped, and the message that starts it again orders these.
        self.areas.avail_flags().store(0, Ordering::Relaxed);
        self.areas.avail_idx().store(0, Ordering::Relaxed);
        self.areas.used_event().store(0, Ordering::Relaxed);
        self.areas.used_flags().store(0, Ordering::Relaxed);
        self.areas.used_idx().store(0, Ordering::Relaxed);
        self.areas.avail_event().store(0, Ordering::Relaxed);
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.areas.size()
    }

    /// The addresses of the areas in guest memory.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        self.areas.addresses()
    }

    /// Free descriptors.
    #[must_use]
    pub fn free(&self) -> u16 {
        self.free
    }

    /// Chains that were pushed and have not been popped.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// The longest chain that [`Queue::push`] can ever take.
    #[must_use]
    pub fn longest_chain(&self) -> usize {
        let indirect = self.tables.as_ref().map_or(0, Tables::capacity);
        usize::from(self.size().max(indirect))
    }

    /// The eventfd that wakes the device.
    #[must_use]
    pub fn kick_event(&self) -> &Arc<Event> {
        &self.kick
    }

    /// The eventfd by which the device calls.
    #[must_use]
    pub fn call_event(&self) -> &Arc<Event> {
        &self.call
    }

    /// Makes a chain of these buffers available at once; see [`Queue::kick`]. `token` comes back
    /// with it. Returns the chain's head.
    ///
    /// # Errors
    /// [`RingError::Full`] where too few descriptors are free, [`RingError::TooLong`] if there
    /// are never enough, [`RingError::EmptyChain`].
    pub fn push(
        &mut self,
        readable: &[Buf],
        writable: &[Buf],
        token: u64,
    ) -> Result<u16, RingError> {
        let head = self.stage(readable, writable, token)?;
        self.publish();
        Ok(head)
    }

    /// Prepares a chain that the device does not see before [`Queue::publish`] or
    /// [`Queue::kick`], so that a batch appears at once.
    ///
    /// # Errors
    /// As [`Queue::push`].
    pub fn stage(
        &mut self,
        readable: &[Buf],
        writable: &[Buf],
        token: u64,
    ) -> Result<u16, RingError> {
        let count = readable.len() + writable.len();
        let Some(last) = count.checked_sub(1) else {
            return Err(RingError::EmptyChain);
        };
        let indirect = match &self.tables {
            Some(tables) => last > 0 && count <= usize::from(tables.capacity()),
            None => false,
        };
        let needed = if indirect { 1 } else { count };
        if needed > usize::from(self.free) {
            return Err(self.refuse(needed));
        }
        let head = self.free_head;
        let buffers = readable.iter().map(|buf| (buf, 0));
        let buffers = buffers.chain(writable.iter().map(|buf| (buf, Descriptor::WRITE)));
        let tail = if indirect {
            self.write_indirect(head, buffers, last);
            head
        } else {
            self.write_direct(head, buffers, last)
        };
        // `needed` is at most `free`, so it fits.
        let descriptors = u16::try_from(needed).unwrap_or(self.free);
        self.free_head = self.next_of(tail);
        self.free -= descriptors;
        self.in_flight += 1;
        if let Some(slot) = self.slots.get_mut(usize::from(head)) {
            *slot = Slot {
                token,
                tail,
                descriptors,
            };
        }
        // Relaxed: the Release store of the index in `publish` orders it.
        let entry = self.areas.avail_entry(self.staged);
        entry.store(head, Ordering::Relaxed);
        self.staged = self.staged.wrapping_add(1);
        Ok(head)
    }

    /// Makes all that is staged available.
    pub fn publish(&mut self) {
        // Release: pairs with the device's Acquire load of the available index; the entries and
        // descriptors written before are seen by a thread that sees the index.
        self.areas.avail_idx().store(self.staged, Ordering::Release);
    }

    /// Publishes staged chains, and kicks the device if it wants a kick. True if it was kicked.
    ///
    /// # Errors
    /// [`RingError::Event`].
    pub fn kick(&mut self) -> Result<bool, RingError> {
        self.publish();
        let (old, new) = (self.kicked, self.staged);
        if old == new {
            return Ok(false);
        }
        self.kicked = new;
        // Pairs with the device's fence between its store of avail_event (or of the flag) and its
        // last look at the available index: one of the two sees what the other wrote.
        fence(Ordering::SeqCst);
        // Relaxed: ordered by the fence.
        let wanted = if self.event_idx {
            need_event(self.avail_event(), new, old)
        } else {
            self.used_flags() & USED_NO_NOTIFY == 0
        };
        if wanted {
            self.signal()?;
        }
        Ok(wanted)
    }

    /// Publishes staged chains, and kicks the device even if it wants no kick.
    ///
    /// # Errors
    /// [`RingError::Event`].
    pub fn kick_always(&mut self) -> Result<(), RingError> {
        self.publish();
        self.kicked = self.staged;
        self.signal()
    }

    /// Takes one completion, in the order in which the device returned them.
    ///
    /// # Errors
    /// [`RingError::UsedIndex`] and [`RingError::NotInFlight`] if the device returned what it
    /// was not given; the element is skipped in the latter case.
    pub fn pop(&mut self) -> Result<Option<Used>, RingError> {
        if self.ready()? == 0 {
            return Ok(None);
        }
        let (id, len) = self.areas.used_elem(self.taken);
        self.taken = self.taken.wrapping_add(1);
        let head = u16::try_from(id).ok().filter(|&head| head < self.size());
        let chain = head.and_then(|head| Some((head, self.take_slot(head)?)));
        let Some((head, slot)) = chain else {
            return Err(RingError::NotInFlight { id });
        };
        if let Some(next) = self.next.get_mut(usize::from(slot.tail)) {
            *next = self.free_head;
        }
        self.free_head = head;
        self.free += slot.descriptors;
        self.in_flight -= 1;
        Ok(Some(Used {
            token: slot.token,
            len,
        }))
    }

    /// How many completions wait to be popped.
    ///
    /// # Errors
    /// [`RingError::UsedIndex`] if the index is further than the ring is long.
    pub fn ready(&mut self) -> Result<u16, RingError> {
        if self.seen == self.taken {
            self.refresh()?;
        }
        Ok(self.seen.wrapping_sub(self.taken))
    }

    fn refresh(&mut self) -> Result<(), RingError> {
        let used = self.used_idx();
        if used.wrapping_sub(self.taken) > self.size() {
            let seen = self.taken;
            return Err(RingError::UsedIndex { used, seen });
        }
        self.seen = used;
        Ok(())
    }

    fn refuse(&self, needed: usize) -> RingError {
        let (longest, free) = (self.longest_chain(), self.free);
        if needed > longest {
            let buffers = needed;
            RingError::TooLong { buffers, longest }
        } else {
            RingError::Full { needed, free }
        }
    }

    fn signal(&self) -> Result<(), RingError> {
        self.kick.signal().map_err(RingError::Event)
    }

    fn next_of(&self, index: u16) -> u16 {
        self.next.get(usize::from(index)).copied().unwrap_or(0)
    }

    /// Removes and returns the chain in flight under `head`.
    fn take_slot(&mut self, head: u16) -> Option<Slot> {
        let slot = self.slots.get_mut(usize::from(head))?;
        (slot.descriptors > 0).then(|| std::mem::take(slot))
    }

    /// Writes a chain to descriptors of the free list, from `head` on. Returns its tail.
    fn write_direct<'a>(
        &mut self,
        head: u16,
        buffers: impl Iterator<Item = (&'a Buf, u16)>,
        last: usize,
    ) -> u16 {
        let mut index = head;
        for (position, (buf, write)) in buffers.enumerate() {
            let next = self.next_of(index);
            let more = position < last;
            let descriptor = Descriptor {
                addr: buf.gpa.0,
                len: buf.len,
                flags: write | if more { Descriptor::NEXT } else { 0 },
                next: if more { next } else { 0 },
            };
            self.areas.write_descriptor(index, descriptor);
            if more {
                index = next;
            }
        }
        index
    }

    /// Writes a chain to the indirect table of `head`, and the descriptor that points there.
    fn write_indirect<'a>(
        &mut self,
        head: u16,
        buffers: impl Iterator<Item = (&'a Buf, u16)>,
        last: usize,
    ) {
        let Some(tables) = &mut self.tables else {
            return;
        };
        let mut index = 0_u16;
        for (buf, write) in buffers {
            let more = usize::from(index) < last;
            let descriptor = Descriptor {
                addr: buf.gpa.0,
                len: buf.len,
                flags: write | if more { Descriptor::NEXT } else { 0 },
                next: if more { index + 1 } else { 0 },
            };
            tables.write(head, index, descriptor);
            index += 1;
        }
        let descriptor = Descriptor {
            addr: tables.table(head).0,
            len: u32::from(index) * 16,
            flags: Descriptor::INDIRECT,
            next: 0,
        };
        self.areas.write_descriptor(head, descriptor);
    }

    /// Guest address of the indirect table of the chain with this head, where there are tables.
    #[must_use]
    pub fn indirect_table(&self, head: u16) -> Option<Gpa> {
        self.tables.as_ref().map(|tables| tables.table(head))
    }
}

/// Whether moving an index from `old` to `new` passes `event` (virtio 1.2, 2.7.7.1).
fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
pub(crate) mod double;
#[cfg(test)]
mod tests;
