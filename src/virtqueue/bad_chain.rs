//! What can be wrong with a chain, and the limits on the pieces of memory that chains consist of.
//!
//! The invariant: every limit that a guest can exceed is named by the error that it gets.

/// The most pieces of memory that a chain may be made of: no queue has more entries, and no chain
/// may be longer than its queue (virtio 1.2, section 2.7.5.3.1). A request of 1 MiB in pages has 260.
/// Each piece costs the server 24 bytes as long as the chain is in flight.
pub(super) const MOST_PIECES: usize = 1 << 15;

/// The most pieces that the chains in flight of one queue may have together: 1,024 requests of
/// 1 MiB, twice.
pub(super) const MOST_IN_FLIGHT: usize = 1 << 19;

/// What can be wrong with a chain; the guest's fault in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadChain {
    /// A head or a `next` names no descriptor of its table.
    #[error("a descriptor index beyond its table")]
    Index,
    /// More descriptors than the table has: the chain runs in a circle.
    #[error("a chain longer than its table: it runs in a circle")]
    Loop,
    /// INDIRECT where it was not negotiated.
    #[error("an indirect descriptor, which was not negotiated")]
    IndirectNotNegotiated,
    /// An indirect table inside an indirect table.
    #[error("an indirect table inside an indirect table")]
    NestedIndirect,
    /// INDIRECT together with NEXT (virtio 1.2, section 2.7.5.3.1).
    #[error("an indirect descriptor that is not the chain's last")]
    IndirectNext,
    /// The length of an indirect table is 0, too large, or not whole descriptors.
    #[error("an indirect table of an impossible length")]
    IndirectLength,
    /// A buffer or a table that is not all in guest memory.
    #[error("an address outside of guest memory")]
    Address,
    /// A readable descriptor behind a writable one (virtio 1.2, section 2.7.4.2).
    #[error("a readable descriptor behind a writable one")]
    Order,
    /// More bytes than 2³² - 1.
    #[error("more than 4 GiB in one chain")]
    TooLong,
    /// More pieces of memory than any request needs.
    #[error("a chain of more than {MOST_PIECES} pieces of memory")]
    Pieces,
    /// Chains in flight with more pieces of memory than any driver needs.
    #[error("chains in flight with more than {MOST_IN_FLIGHT} pieces of memory")]
    PiecesInFlight,
    /// More chains in flight than the queue has entries.
    #[error("more chains in flight than the queue has entries")]
    TooMany,
    /// The head of a chain that is in flight, made available once more.
    #[error("a chain that is in flight already")]
    Twice,
}
