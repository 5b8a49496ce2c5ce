//! The request that the calling thread is serving, whose number goes into the records that it
//! changes.
//!
//! A thread serves one request at a time and each file system call of it from beginning to end. The
//! invariant: outside of a request the number is 0, which no request has.

use std::cell::Cell;

thread_local! {
    static UNIQUE: Cell<u64> = const { Cell::new(0) };
}

/// Sets the request that the calling thread serves; 0 for none.
pub(super) fn set(unique: u64) {
    UNIQUE.set(unique);
}

/// The request that the calling thread serves.
pub(super) fn unique() -> u64 {
    UNIQUE.get()
}
