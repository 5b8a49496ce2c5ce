//! The atomics of this room: the standard library's, or loom's, with which a test checks all
//! interleavings (`RUSTFLAGS="--cfg ringfsd_loom"`).
//!
//! The invariant: code that uses this module is the same in both configurations.

#[cfg(not(ringfsd_loom))]
pub(super) use std::sync::atomic::{AtomicU64, Ordering};

#[cfg(ringfsd_loom)]
pub(super) use loom::sync::atomic::{AtomicU64, Ordering};
