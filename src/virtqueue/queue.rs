//! Taking chains off the available ring.
//!
//! The invariant: the ring's index is read once for each look, and an index that no right
//! driver writes yields nothing rather than garbage. Where a server before this one has left
//! chains in flight, they come first.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::QueueIndex;
use super::bad_chain::BadChain;
use super::chain::{Chain, Table};
use super::inflight::{InflightError, InflightPart, Resumed};
use super::journal::Journal;
use super::layout;
use super::memory::Memory;
use super::sync::Window;
use super::used::{Call, UsedRing};

/// What of virtio was negotiated that a ring must know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// `VIRTIO_F_RING_EVENT_IDX`.
    pub event_idx: bool,
    /// `VIRTIO_F_RING_INDIRECT_DESC`.
    pub indirect: bool,
}

/// Where the front end says that the parts of a ring lie, in its own addresses.
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

/// Why a queue can't be served.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Not a power of two, or too many entries.
    #[error("queue {0} can't have {1} entries: a power of two up to {max}", max = layout::MAX_SIZE)]
    Size(QueueIndex, u32),
    /// A part of the ring is not in what the front end has shared of the guest's memory.
    #[error(
        "the {part} of queue {index} at {address:#x} is in no memory that the VMM has shared: all of \
         the VM's memory has to be shared with this server (QEMU: share=on, Cloud Hypervisor: \
         shared=on)"
    )]
    NotShared {
        /// Which queue.
        index: QueueIndex,
        /// Which part of it.
        part: &'static str,
        /// The address given.
        address: u64,
    },
    /// A part of the ring runs over a region's end, or is not aligned.
    #[error("the {part} of queue {index} at {address:#x} is not aligned within guest memory")]
    Address {
        /// Which queue.
        index: QueueIndex,
        /// Which part of it.
        part: &'static str,
        /// The address given.
        address: u64,
    },
    /// What is said to be in flight can't be.
    #[error("what was in flight of queue {index}")]
    Inflight {
        /// Which queue.
        index: QueueIndex,
        /// Why not.
        #[source]
        source: InflightError,
    },
}

/// A queue as it is set up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Which queue.
    pub index: QueueIndex,
    /// Entries.
    pub size: u16,
    /// What a ring must know of what was negotiated.
    pub features: Features,
    /// Where its parts are.
    pub addresses: RingAddresses,
    /// The available entry to go on at, unless the past of the queue says another.
    pub next: u16,
}

/// By what a queue is tracked, so that another server can go on where this one ends, however it
/// ends.
#[derive(Clone, Debug)]
pub struct Tracking {
    /// Where heads in flight are marked.
    pub inflight: InflightPart,
    /// What became of each, if that is kept.
    pub journal: Option<Journal>,
}

/// The side of a queue that takes chains off the ring; owned by one task.
#[derive(Debug)]
pub struct Queue {
    size: u16,
    features: Features,
    next: u16,
    table: Arc<Table>,
    available: Arc<Window>,
    used: Arc<UsedRing>,
    /// What was in flight as the server before ended, the last one first.
    resumed: Vec<Resumed>,
    /// The last index seen that can't be, so that one fault is reported once.
    bad_index: Option<u16>,
}

impl Queue {
    /// Makes the queue `index` of `size` entries ready, to go on at the available entry `next`;
    /// the used ring goes on where its own index stands.
    ///
    /// # Errors
    ///
    /// The size can't be, or part of the ring is not in `memory`.
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

    /// Makes a queue ready that is tracked. If it has a past, chains in flight come once more, in
    /// the order in which they were taken, and before what is new; and the guest is called for
    /// what it may have been shown last.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new); and what is said to be in flight can't be.
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
        if let Some(Tracking { inflight, journal }) = tracking.filter(|it| it.reaches(index, size))
        {
            // Acquire: as in `on_ring`.
            let there = available.load_u16(layout::INDEX, Ordering::Acquire);
            let found = inflight
                .recover(size, used.returned(), there)
                .map_err(|source| QueueError::Inflight { index, source })?;
            used.track(found.inflight, journal);
            if let Some(past) = found.past {
                // No more heads than entries.
                let in_flight = u16::try_from(past.len()).unwrap_or(size);
                next = used.returned().wrapping_add(in_flight);
                resumed = past;
                resumed.reverse();
                used.call_again();
                if in_flight != 0 {
                    log::info!("queue {index} goes on with {in_flight} requests in flight");
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
            table: Arc::new(table),
            available,
            used,
            resumed,
            bad_index: None,
        })
    }

    /// Whether a queue may have `size` entries.
    ///
    /// # Errors
    ///
    /// It may not.
    pub fn check_size(index: QueueIndex, size: u32) -> Result<(), QueueError> {
        if size.is_power_of_two() && size <= u32::from(layout::MAX_SIZE) {
            Ok(())
        } else {
            Err(QueueError::Size(index, size))
        }
    }

    /// Which queue this is.
    #[must_use]
    pub fn index(&self) -> QueueIndex {
        self.used.index()
    }

    /// The available entry that comes next: what GET_VRING_BASE answers.
    #[must_use]
    pub fn next_available(&self) -> u16 {
        self.next
    }

    /// Where this queue's chains go back.
    #[must_use]
    pub fn used(&self) -> &Arc<UsedRing> {
        &self.used
    }

    /// Takes the next chain off the ring. A chain that can't be served has been returned
    /// empty already and comes as the fault in it.
    pub fn take(&mut self) -> Option<Result<Chain, BadChain>> {
        while let Some(resumed) = self.resumed.pop() {
            let chain = Chain::resume(&self.table, resumed, self.features.indirect);
            if chain.is_some() {
                return chain;
            }
        }
        if self.on_ring() == 0 {
            return None;
        }
        let entry = layout::available_entry(self.next, self.size);
        // Relaxed: `on_ring` acquired the index that covers this entry.
        let head = self.available.load_u16(entry, Ordering::Relaxed);
        self.next = self.next.wrapping_add(1);
        Some(Chain::take(
            &self.table,
            head,
            self.features.indirect,
            false,
        ))
    }

    /// Whether there is a chain to take.
    #[must_use]
    pub fn has_more(&mut self) -> bool {
        self.waiting() != 0
    }

    /// Whether there are chains to take that were in flight as the server before ended. As they are
    /// in flight all the time, a queue that stops has to be rid of them.
    #[must_use]
    pub fn is_resuming(&self) -> bool {
        !self.resumed.is_empty()
    }

    /// How many chains there are to take.
    #[must_use]
    pub fn waiting(&mut self) -> u16 {
        let resumed = u16::try_from(self.resumed.len()).unwrap_or(u16::MAX);
        self.on_ring().saturating_add(resumed)
    }

    /// How many chains there are on the ring.
    fn on_ring(&mut self) -> u16 {
        // Acquire: pairs with the driver's release (its write barrier) of the index; the
        // entries and descriptors behind it are visible after.
        let index = self.available.load_u16(layout::INDEX, Ordering::Acquire);
        let waiting = index.wrapping_sub(self.next);
        if waiting <= self.size {
            return waiting;
        }
        if self.bad_index.replace(index) != Some(index) {
            log::warn!(
                "queue {}: the guest's available index jumped from {} to {index}, past all {} \
                 entries; nothing is taken until it is right again",
                self.index(),
                self.next,
                self.size,
            );
        }
        0
    }

    /// Asks the guest for no kicks while chains are being taken.
    pub fn disarm(&mut self) {
        self.used.want_kick(None);
    }

    /// Asks the guest for a kick at the next chain. True if one has come meanwhile, for which
    /// there may be no kick: look again.
    #[must_use]
    pub fn arm(&mut self) -> bool {
        self.used.want_kick(Some(self.next));
        self.waiting() != 0
    }

    /// Asks the guest for a kick when more than an eighth of the queue is full, if it can be asked for
    /// that (EVENT_IDX): else for none. True if that much is there already.
    #[must_use]
    pub fn arm_for_many(&mut self) -> bool {
        let before_the_last = self.size / 8;
        self.used
            .want_kick_at(self.next.wrapping_add(before_the_last));
        self.waiting() > before_the_last
    }
}

impl Tracking {
    /// Whether a queue of `size` can be tracked by it.
    fn reaches(&self, index: QueueIndex, size: u16) -> bool {
        let entries = self.inflight.entries();
        if size > entries {
            log::warn!(
                "queue {index} has {size} entries, and there is room for {entries} in flight: it \
                 is not tracked, and what is in flight is lost if the server ends"
            );
        }
        size <= entries
    }
}
