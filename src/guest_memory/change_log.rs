//! What records changes of guest memory.
//!
//! The invariant: a change is recorded after it was made.

use std::fmt;

use super::GuestAddress;

/// Records which guest memory the device has changed.
pub trait ChangeLog: fmt::Debug + Send + Sync {
    /// Records a change of `guest..guest + len`. Called on the device's threads, often.
    fn mark(&self, guest: GuestAddress, len: u64);
}
