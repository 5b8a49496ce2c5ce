//! The DAX window: a shared-memory region of the device, in which the VMM maps parts of files that
//! the guest then uses without requests.
//!
//! `window` keeps the table of the mappings and asks the VMM for each; `names` are patterns of the
//! files that are worth a mapping. Knows neither FUSE nor the file system, which opens the files. The
//! invariant: the table names every range that the VMM may have mapped.

mod helpers;
mod names;
mod overlap;
#[cfg(test)]
mod tests;
mod window;

pub use names::{NamePattern, NamePatternError, NamePatterns};
pub use window::{MapRequest, OpenToMap, Window};

/// The granularity of the window's size: what a Linux guest maps at once (`FUSE_DAX_SHIFT`).
pub const RANGE: u64 = 2 << 20;

/// The number of the window's shared-memory region (virtio 1.2, section 5.11.4:
/// `VIRTIO_FS_SHMCAP_ID_CACHE`).
pub const REGION: u8 = 0;

/// How files are offered for mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaxOptions {
    /// The size of the window, bytes; a multiple of [`RANGE`].
    pub window: u64,
    /// Regular files of this size and larger are marked for DAX, by which a guest decides unless
    /// its mount option does.
    pub marked_from: u64,
    /// The names of those that are marked.
    pub names: NamePatterns,
    /// Whether the guest may write to files.
    pub writable: bool,
}

/// The alignment of all offsets and lengths: the size of a page of the host, as only whole pages
/// can be mapped.
#[must_use]
pub fn page_size() -> u64 {
    u64::try_from(rustix::param::page_size()).unwrap_or(4096)
}
