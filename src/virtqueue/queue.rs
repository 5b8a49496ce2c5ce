//! Takes chains off the available ring.
//!
//! A [`Queue`] owns the position in the ring. Chains that a previous server process left in flight
//! come first. The invariant: each check reads the ring's index once, and an index that no correct
//! driver writes yields no chains instead of invalid ones.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::QueueIndex;
use super::bad_chain::BadChain;
use super::chain::{Chain, Table};
use super::inflight::{InflightError, InflightPart, Resumed};
use super::journal::Journal;
use super::layout;
use super::sync::Window;
use super::used::{Call, UsedRing};
use crate::guest_memory::Memory;

/// The negotiated virtio features that concern a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// `VIRTIO_F_RING_EVENT_IDX`.
    pub event_idx: bool,
    /// `VIRTIO_F_RING_INDIRECT_DESC`.
    pub indirect: bool,
}

/// Addresses of the parts of a ring, in the front end's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
    /// The guest address of the used ring for the dirty log, if its changes are to be logged.
    pub log: Option<u64>,
}

/// Why a queue can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The size is no power of two, or too large.
    #[error(
        "queue {0} can't have {1} entries: the size must be a power of two up to {max}",
        max = layout::MAX_SIZE
    )]
    Size(QueueIndex, u32),
    /// Part of the ring is outside the memory that the front end has shared.
    #[error(
        "the {part} of queue {index} at {address:#x} is outside the memory that the VMM has shared: \
         share all of the VM's memory with this server (QEMU: share=on, Cloud Hypervisor: shared=on)"
    )]
    NotShared {
        /// The queue.
        index: QueueIndex,
        /// The part of the ring.
        part: &'static str,
        /// Its address.
        address: u64,
    },
    /// Part of the ring exceeds the end of a region, or is not aligned.
    #[error("the {part} of queue {index} at {address:#x} is not aligned within guest memory")]
    Address {
        /// The queue.
        index: QueueIndex,
        /// The part of the ring.
        part: &'static str,
        /// Its address.
        address: u64,
    },
    /// The requests in flight can't be recovered.
    #[error("recovering the requests in flight of queue {index}")]
    Inflight {
        /// The queue.
        index: QueueIndex,
        /// The cause.
        #[source]
        source: InflightError,
    },
}

/// The parameters of a queue.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// The queue.
    pub index: QueueIndex,
    /// Number of entries.
    pub size: u16,
    /// The negotiated features.
    pub features: Features,
    /// The addresses of its parts.
    pub addresses: RingAddresses,
    /// The available index to start at, unless the tracked requests in flight determine another.
    pub next: u16,
}

/// The records that track a queue, so that another process can resume it when this one ends, for
/// whatever reason.
#[derive(Clone, Debug)]
pub struct Tracking {
    /// Marks the heads in flight.
    pub inflight: InflightPart,
    /// Records the progress of each request in flight.
    pub journal: Option<Journal>,
}

/// The side of a queue that takes chains off the ring; owned by one task.
#[derive(Debug)]
pub struct Queue {
    size: u16,
    features: Features,
    next: u16,
    /// The available index as it was read last. The guest's processor keeps writing to its cache
    /// line, so it is read again only when all chains that it includes are taken.
    seen: u16,
    table: Arc<Table>,
    available: Arc<Window>,
    used: Arc<UsedRing>,
    /// Chains that were in flight when the previous server process ended, the last one first.
    resumed: Vec<Resumed>,
    /// The last invalid index of the available ring, so that it is logged once.
    bad_index: Option<u16>,
}

impl Queue {
    /// The largest number of entries.
    pub const MAX_SIZE: u16 = layout::MAX_SIZE;

    /// Sets up the queue `index` of `size` entries. It starts at the available index `next`, and at
    /// the used index that the used ring has.
    ///
    /// # Errors
    ///
    /// Fails if the size is invalid, or if part of the ring is outside `memory`.
    pub fn new(
        index: QueueIndex,
        size: u16,
        features: Features,
        addresses: RingAddresses,
        memory: &Arc<Memory>,
        next: u16,
        call: Arc<Call>,
    ) -> Result<Self, QueueError> {
        let setup = Setup {
            index,
            size,
            features,
            addresses,
            next,
        };
        Self::tracked(&setup, memory, call, None)
    }

    /// Sets up a queue with optional tracking. Chains that a previous process left in flight come
    /// first, in the order in which they were taken. The guest is called once in that case, because
    /// it may have missed the call for the last published chains.
    ///
    /// # Errors
    ///
    /// Fails as [`new`](Self::new) does, or if the requests in flight can't be recovered.
    pub fn tracked(
        setup: &Setup,
        memory: &Arc<Memory>,
        call: Arc<Call>,
        tracking: Option<Tracking>,
    ) -> Result<Self, QueueError> {
        let Setup {
            index,
            size,
            features,
            addresses,
            mut next,
        } = *setup;
        Self::check_size(index, u32::from(size))?;
        let window = |part, address, len, align| {
            if memory.guest_address(address).is_none() {
                return Err(QueueError::NotShared {
                    index,
                    part,
                    address,
                });
            }
            Window::new(memory, address, len, align).ok_or(QueueError::Address {
                index,
                part,
                address,
            })
        };
        let descriptors = window(
            "descriptor table",
            addresses.descriptors,
            layout::descriptors_len(size),
            layout::DESCRIPTOR_ALIGN,
        )?;
        let available = Arc::new(window(
            "available ring",
            addresses.available,
            layout::available_len(size),
            layout::AVAILABLE_ALIGN,
        )?);
        let used = window(
            "used ring",
            addresses.used,
            layout::used_len(size),
            layout::USED_ALIGN,
        )?;
        let log = addresses
            .log
            .filter(|_| memory.is_logging())
            .map(|guest| (Arc::clone(memory), guest));
        let mut used = UsedRing::new(
            index,
            size,
            features.event_idx,
            used,
            Arc::clone(&available),
            log,
            call,
        );
        let mut resumed = Vec::new();
        if let Some(Tracking { inflight, journal }) =
            tracking.filter(|it| it.has_room_for(index, size))
        {
            // Acquire: as in `on_ring`.
            let available_index = available.load_u16(layout::INDEX, Ordering::Acquire);
            let recovered = inflight
                .recover(size, used.published_index(), available_index)
                .map_err(|source| QueueError::Inflight { index, source })?;
            used.track(recovered.inflight, journal);
            if let Some(heads) = recovered.heads {
                // There are no more heads than entries.
                let in_flight = u16::try_from(heads.len()).unwrap_or(size);
                next = used.published_index().wrapping_add(in_flight);
                resumed = heads;
                resumed.reverse();
                used.signal_call();
                if in_flight != 0 {
                    log::info!("queue {index} resumes with {in_flight} requests in flight");
                }
            }
        }
        let used = Arc::new(used);
        let table = Table {
            size,
            descriptors,
            memory: Arc::clone(memory),
            used: Arc::clone(&used),
        };
        Ok(Self {
            size,
            features,
            next,
            seen: next,
            table: Arc::new(table),
            available,
            used,
            resumed,
            bad_index: None,
        })
    }

    /// Checks that a queue may have `size` entries.
    ///
    /// # Errors
    ///
    /// Fails if the size is no power of two, or too large.
    pub fn check_size(index: QueueIndex, size: u32) -> Result<(), QueueError> {
        if size.is_power_of_two() && size <= u32::from(layout::MAX_SIZE) {
            Ok(())
        } else {
            Err(QueueError::Size(index, size))
        }
    }

    /// Returns the index of the queue.
    #[must_use]
    pub fn index(&self) -> QueueIndex {
        self.used.index()
    }

    /// Returns the number of entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Returns the next available index, which is the reply to GET_VRING_BASE.
    #[must_use]
    pub fn next_available(&self) -> u16 {
        self.next
    }

    /// Returns the used ring of the queue.
    #[must_use]
    pub fn used(&self) -> &Arc<UsedRing> {
        &self.used
    }

    /// Takes the next chain off the ring. A faulty chain has been returned empty already, and its
    /// fault is the result.
    pub fn pop(&mut self) -> Option<Result<Chain, BadChain>> {
        while let Some(resumed) = self.resumed.pop() {
            let chain = Chain::resume(&self.table, resumed, self.features.indirect);
            if chain.is_some() {
                return chain;
            }
        }
        if self.seen == self.next && self.on_ring() == 0 {
            return None;
        }
        let head = self.entry(self.next);
        self.next = self.next.wrapping_add(1);
        if self.seen != self.next {
            let next = layout::descriptor_at(self.entry(self.next));
            self.table.descriptors.prefetch(next);
        }
        Some(Chain::from_head(
            &self.table,
            head,
            self.features.indirect,
            false,
        ))
    }

    /// Returns the head in the entry of the available ring that `at` stands for, which `seen`
    /// includes.
    fn entry(&self, at: u16) -> u16 {
        let entry = layout::available_entry(at, self.size);
        // Relaxed: `on_ring` acquired the index that includes this entry.
        self.available.load_u16(entry, Ordering::Relaxed)
    }

    /// Whether there is a chain to take.
    #[must_use]
    pub fn has_more(&mut self) -> bool {
        self.waiting() != 0
    }

    /// Whether there are chains to take that a previous process left in flight. As they are still
    /// in flight, all of them must be taken before the queue stops.
    #[must_use]
    pub fn is_resuming(&self) -> bool {
        !self.resumed.is_empty()
    }

    /// Returns the number of chains to take.
    #[must_use]
    pub fn waiting(&mut self) -> u16 {
        let resumed = u16::try_from(self.resumed.len()).unwrap_or(u16::MAX);
        self.on_ring().saturating_add(resumed)
    }

    /// Returns the number of chains on the available ring.
    fn on_ring(&mut self) -> u16 {
        // Acquire: pairs with the driver's release (its write barrier) of the index, and makes the
        // entries and descriptors that it includes visible.
        let index = self.available.load_u16(layout::INDEX, Ordering::Acquire);
        let waiting = index.wrapping_sub(self.next);
        if waiting <= self.size {
            self.seen = index;
            return waiting;
        }
        if self.bad_index.replace(index) != Some(index) {
            log::warn!(
                "queue {}: the guest's available index jumped from {} to {index}, more than the {} \
                 entries; no chain is taken until the index is valid again",
                self.index(),
                self.next,
                self.size,
            );
        }
        0
    }

    /// Asks the guest to send no kicks, for the time in which chains are being taken.
    pub fn disable_notifications(&mut self) {
        self.used.request_kick(None);
    }

    /// Asks the guest for a kick at the next chain. Returns true if there is a chain already, for
    /// which no kick may come.
    #[must_use]
    pub fn enable_notifications(&mut self) -> bool {
        self.used.request_kick(Some(self.next));
        self.waiting() != 0
    }

    /// Asks the guest for a kick when more than an eighth of the queue is full. Without EVENT_IDX
    /// this can't be requested, and no kick comes. Returns true if the queue is that full already.
    #[must_use]
    pub fn enable_notifications_when_filled(&mut self) -> bool {
        let threshold = self.size / 8;
        self.used.request_kick_at(self.next.wrapping_add(threshold));
        self.waiting() > threshold
    }
}

impl Tracking {
    /// Whether the part has room for a queue of `size` entries; logs a warning if not.
    fn has_room_for(&self, index: QueueIndex, size: u16) -> bool {
        let entries = self.inflight.entries();
        if size > entries {
            log::warn!(
                "queue {index} is not tracked, as it has {size} entries and the in-flight region \
                 {entries}: requests in flight are lost if the server ends"
            );
        }
        size <= entries
    }
}
