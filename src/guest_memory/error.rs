//! Why guest memory, an in-flight region or a dirty log can't be used.
//!
//! The invariant: each error names the addresses or the length that it is about.

use vm_memory::mmap::MmapRegionError;

use super::GuestAddress;

/// Why a memory table, an in-flight region or a dirty log can't be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The region can't be mapped.
    #[error("mapping {len:#x} bytes of guest memory at {guest:#x} (file offset {offset:#x})")]
    Map {
        /// Guest address of the region.
        guest: GuestAddress,
        /// Length of the region in bytes.
        len: u64,
        /// Offset of the region in the file.
        offset: u64,
        /// The cause.
        #[source]
        source: MmapRegionError,
    },
    /// The region is empty, or exceeds the end of the address space.
    #[error(
        "a memory region at {guest:#x} with {len:#x} bytes can't be mapped: it is empty or too large"
    )]
    Shape {
        /// Guest address of the region.
        guest: GuestAddress,
        /// Length of the region in bytes.
        len: u64,
    },
    /// The memory has no physical addresses.
    #[error("guest memory behind an IOMMU can't be used: the device addresses physical memory")]
    Iommu,
    /// A region of a VMM's memory is not mapped.
    #[error("the memory region at {guest:#x} with {len:#x} bytes has no address in this process")]
    NoHostAddress {
        /// Guest address of the region.
        guest: GuestAddress,
        /// Length of the region in bytes.
        len: u64,
        /// The cause.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// Two regions have addresses in common.
    #[error("the memory regions at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Guest address of the lower region.
        first: GuestAddress,
        /// Guest address of the upper region.
        second: GuestAddress,
    },
    /// There are too many regions.
    #[error("more than {max} memory regions")]
    TooMany {
        /// The limit.
        max: usize,
    },
    /// The mapping can't be watched.
    #[error("watching {len:#x} bytes of memory for a truncation of its file")]
    Watch {
        /// Length of the mapping in bytes.
        len: u64,
        /// The cause.
        #[source]
        source: rustix::io::Errno,
    },
    /// The region to remove doesn't exist.
    #[error("there is no memory region at {guest:#x} with {len:#x} bytes to remove")]
    Unknown {
        /// Guest address of the request.
        guest: GuestAddress,
        /// Length of the request.
        len: u64,
    },
    /// The in-flight region can't be mapped.
    #[error("mapping the in-flight region, {len:#x} bytes at file offset {offset:#x}")]
    MapInflight {
        /// Length of the region in bytes.
        len: u64,
        /// Offset of the region in the file.
        offset: u64,
        /// The cause.
        #[source]
        source: MmapRegionError,
    },
    /// The dirty log can't be mapped.
    #[error("mapping the dirty log, {len:#x} bytes at file offset {offset:#x}")]
    MapLog {
        /// Length of the log in bytes.
        len: u64,
        /// Offset of the log in the file.
        offset: u64,
        /// The cause.
        #[source]
        source: MmapRegionError,
    },
}
