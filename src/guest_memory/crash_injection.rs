//! Simulates a killed process in tests: suppresses a thread's stores to memory that outlives the
//! process, after a given number of them.
//!
//! The invariant: the stores of a thread take effect up to the simulated kill, and none after it.

use std::cell::Cell;

thread_local! {
    /// Stores that still take effect; unlimited if `None`.
    static REMAINING: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Counts a store, and returns whether it takes effect. Called before each store.
pub(crate) fn store_takes_effect() -> bool {
    REMAINING.with(|left| match left.get() {
        None => true,
        Some(0) => false,
        Some(remaining) => {
            left.set(Some(remaining - 1));
            true
        }
    })
}

/// Whether the simulated process is still alive.
pub(crate) fn is_alive() -> bool {
    REMAINING.with(Cell::get) != Some(0)
}

/// Runs `process` and simulates its kill after `stores` stores. Returns whether it was killed.
pub(crate) fn kill_after(stores: usize, process: impl FnOnce()) -> bool {
    REMAINING.with(|left| left.set(Some(stores)));
    process();
    REMAINING.with(Cell::take) == Some(0)
}
