//! A thread-local value that holds while a function runs. The invariant: the previous value is
//! restored, also when the function unwinds.

use std::cell::Cell;
use std::thread::LocalKey;

/// Calls `body` while `cell` has `value`.
pub(crate) fn set_while<T, R>(
    cell: &'static LocalKey<Cell<T>>,
    value: T,
    body: impl FnOnce() -> R,
) -> R {
    let _restore = Restore(cell, Some(cell.replace(value)));
    body()
}

/// Restores the previous value.
struct Restore<T: 'static>(&'static LocalKey<Cell<T>>, Option<T>);

impl<T> Drop for Restore<T> {
    fn drop(&mut self) {
        if let Some(previous) = self.1.take() {
            self.0.set(previous);
        }
    }
}
