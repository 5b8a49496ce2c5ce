//! Ranges of the window: whether one is valid, and which mappings it touches.
//!
//! Has no state. The invariant: a [`Range`] has whole pages, at least one, and lies within the
//! window.

use std::collections::BTreeMap;

use rustix::io::Errno;

use super::page_size;

/// Part of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Range {
    /// Checks a range that the guest has sent.
    pub(super) fn new(offset: u64, len: u64, window: u64) -> Result<Self, Errno> {
        let end = offset.checked_add(len).ok_or(Errno::INVAL)?;
        let is_aligned = (offset | len).is_multiple_of(page_size());
        if len == 0 || !is_aligned || end > window {
            return Err(Errno::INVAL);
        }
        Ok(Self { offset, len })
    }

    /// A range from the table.
    pub(super) fn recorded(offset: u64, len: u64) -> Self {
        Self { offset, len }
    }

    fn end(self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    /// Whether all of `other` is within it.
    pub(super) fn contains(self, other: Self) -> bool {
        self.offset <= other.offset && other.end() <= self.end()
    }
}

/// The values of `map` whose ranges overlap `range`. The keys are the offsets of ranges that don't
/// overlap each other, and `range_of` returns them.
pub(super) fn overlapping<T: Clone>(
    map: &BTreeMap<u64, T>,
    range: Range,
    range_of: impl Fn(&T) -> Range,
) -> Vec<T> {
    let before = map.range(..range.offset).next_back();
    let within = map.range(range.offset..range.end());
    before
        .into_iter()
        .chain(within)
        .map(|(_, value)| value)
        .filter(|value| range_of(value).overlaps(range))
        .cloned()
        .collect()
}
