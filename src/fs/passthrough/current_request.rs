//! Which request the calling thread serves: so that what it changes can carry the request's number
//! in the state table.
//!
//! A thread serves a request's call of the file system from beginning to end, and one at a time.
//! The invariant: what a thread does outside of any request has the number 0, which no request has.

use std::cell::Cell;

thread_local! {
    static UNIQUE: Cell<u64> = const { Cell::new(0) };
}

/// The calling thread serves the request `unique` from now on; 0 for none.
pub(super) fn set(unique: u64) {
    UNIQUE.set(unique);
}

/// The request that the calling thread serves.
pub(super) fn unique() -> u64 {
    UNIQUE.get()
}
