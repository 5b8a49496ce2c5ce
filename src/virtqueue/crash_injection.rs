//! A process that is killed, without one: after so many stores of a thread to memory that outlives
//! the process, no further one is made.

use std::cell::Cell;

thread_local! {
    /// Stores that are still made; without end where there is none.
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Whether a store is made; asked before each.
pub(super) fn is_alive() -> bool {
    LEFT.with(|left| match left.get() {
        None => true,
        Some(0) => false,
        Some(more) => {
            left.set(Some(more - 1));
            true
        }
    })
}

/// Whether the next store is made.
pub(super) fn is_running() -> bool {
    LEFT.with(Cell::get) != Some(0)
}

/// Does `act` as a process that is killed after `stores`; whether it was.
pub(super) fn after(stores: usize, act: impl FnOnce()) -> bool {
    LEFT.with(|left| left.set(Some(stores)));
    act();
    LEFT.with(Cell::take) == Some(0)
}
