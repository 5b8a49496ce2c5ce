//! The entries of a merged directory, collected.
//!
//! The invariant: a listing doesn't change, so that a position in it is an offset.

use std::ffi::CString;

/// The entries of a merged directory.
#[derive(Debug)]
pub(super) struct Listing(pub(super) Vec<Listed>);

/// One of them.
#[derive(Debug)]
pub(super) struct Listed {
    /// The inode number.
    pub(super) number: u64,
    /// `DT_*` of `readdir(3)`.
    pub(super) kind: u8,
    /// The name.
    pub(super) name: CString,
}
