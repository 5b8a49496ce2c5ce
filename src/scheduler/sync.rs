//! The locks and atomics of this module: the standard library's, or loom's, with which a test
//! checks all interleavings (`RUSTFLAGS="--cfg ringfsd_loom"`).
//!
//! The invariant: code that uses this module is the same in both configurations.

#[cfg(not(ringfsd_loom))]
pub(super) use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicUsize, Ordering},
};

#[cfg(ringfsd_loom)]
pub(super) use loom::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicUsize, Ordering},
};
