//! The faults of a chain, and the limits on the memory segments that chains consist of.
//!
//! The invariant: each limit that a guest can exceed has a variant of [`BadChain`].

/// The most memory segments of one chain: no queue has more entries, and no chain may be longer
/// than its queue (virtio 1.2, section 2.7.5.3.1). A request of 1 MiB in pages has 260. Each
/// segment takes 24 bytes of the server's memory while the chain is in flight.
pub(super) const MAX_SEGMENTS: usize = 1 << 15;

/// The most memory segments of all chains in flight of one queue: twice those of 1,024 requests of
/// 1 MiB.
pub(super) const MAX_SEGMENTS_IN_FLIGHT: usize = 1 << 19;

/// A fault in a chain, always caused by the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadChain {
    /// A head or a `next` is beyond the end of its table.
    #[error("a descriptor index beyond its table")]
    Index,
    /// The chain has more descriptors than the table, so it contains a loop.
    #[error("a chain that is longer than its table, so it contains a loop")]
    Loop,
    /// INDIRECT was used without having been negotiated.
    #[error("an indirect descriptor, which was not negotiated")]
    IndirectNotNegotiated,
    /// An indirect table contains an indirect descriptor.
    #[error("an indirect table inside an indirect table")]
    NestedIndirect,
    /// INDIRECT was combined with NEXT (virtio 1.2, section 2.7.5.3.1).
    #[error("an indirect descriptor that is not the chain's last")]
    IndirectNext,
    /// The length of an indirect table is 0, too large, or no multiple of a descriptor's length.
    #[error("an indirect table of an invalid length")]
    IndirectLength,
    /// An indirect table, or the first buffer to read or to write, is not completely in guest memory.
    #[error("an address outside of guest memory")]
    Address,
    /// A readable descriptor follows a writable one (virtio 1.2, section 2.7.4.2).
    #[error("a readable descriptor behind a writable one")]
    Order,
    /// The chain has more than 2³² - 1 bytes.
    #[error("more than 4 GiB in one chain")]
    TooLong,
    /// The chain has more memory segments than any request needs.
    #[error("a chain of more than {MAX_SEGMENTS} memory segments")]
    TooManySegments,
    /// The chains in flight have more memory segments than any driver needs.
    #[error("chains in flight with more than {MAX_SEGMENTS_IN_FLIGHT} memory segments")]
    TooManySegmentsInFlight,
    /// More chains are in flight than the queue has entries.
    #[error("more chains in flight than the queue has entries")]
    TooMany,
    /// The driver made the head of a chain available that is in flight.
    #[error("a chain that is already in flight")]
    Twice,
}
