//! The locks and atomics of this room: the standard library's, or loom's where a test runs
//! every order of events (`RUSTFLAGS="--cfg ringfsd_loom"`).

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
