//! Comma-separated lists, as `-o` and the options of a source have them.
//!
//! The invariant: two commas stand for one comma within an item, as libvirt writes a path that has
//! one.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// The items of a list; empty ones are dropped.
pub(super) fn items(list: &OsStr) -> impl Iterator<Item = Vec<u8>> {
    let mut items = vec![Vec::new()];
    let mut bytes = list.as_bytes().iter().peekable();
    while let Some(byte) = bytes.next() {
        match (byte, items.last_mut()) {
            (b',', Some(item)) if bytes.next_if_eq(&&b',').is_some() => item.push(b','),
            (b',', _) => items.push(Vec::new()),
            (byte, Some(item)) => item.push(*byte),
            (_, None) => {}
        }
    }
    items.into_iter().filter(|item| !item.is_empty())
}
