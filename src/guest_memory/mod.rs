//! The guest's memory: mapped from the front end's files, or by a VMM in this process; and the log of
//! the pages changed there.
//!
//! A [`Memory`] is an immutable snapshot of the memory table. A change of the table makes a new
//! snapshot, and the old mappings are removed when the last chain that points into them has been
//! returned. The invariant: the memory behind a pointer that this module returns is completely
//! within a mapping that the snapshot keeps alive.
//!
//! The front end can truncate the files at any time, so the mappings of this module are watched: lost
//! memory reads as zeros, and is reported through the [`MemoryLostEvent`]. Memory that another part of
//! the process has mapped isn't.
//!
//! `vm-memory`'s `GuestMemoryMmap` isn't used, for two reasons: the rings resolve addresses once
//! instead of at each access, and the dirty log of `vhost-user-backend`, which would be its bitmap,
//! can't be constructed outside that crate. The mapping itself is `vm-memory`'s.

#![allow(unsafe_code, reason = "guest memory is accessed through raw pointers")]
#![allow(
    clippy::arithmetic_side_effects,
    reason = "no region wraps around, as mapping it checks; all other addresses are within one"
)]
#![deny(clippy::indexing_slicing)]

mod borrowed;
mod change_log;
#[cfg(test)]
pub(crate) mod crash_injection;
mod dirty_log;
mod error;
mod mapping;
mod of_vmm;
mod region;
mod sigbus;
mod slice;
mod table;
#[cfg(test)]
#[allow(clippy::indexing_slicing, reason = "tests may fail by panicking")]
mod tests;
#[cfg(not(ringfsd_loom))]
mod window;

pub use self::change_log::ChangeLog;
pub(crate) use self::dirty_log::DirtyLog;
pub use self::error::MemoryError;
pub use self::region::{Region, RegionDescription};
pub use self::sigbus::MemoryLostEvent;
pub use self::table::Memory;

pub(crate) use self::mapping::Mapping;
pub(crate) use self::slice::Slice;
pub(crate) use self::table::buffer;
#[cfg(not(ringfsd_loom))]
pub(crate) use self::window::Window;

/// An address in the guest's physical memory.
pub type GuestAddress = u64;
