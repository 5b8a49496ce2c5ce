//! The bump allocator: which addresses have been allocated. It never accesses the memory.

use super::{Gpa, Region};

/// One cursor for each region: the next address to give out, and the region's end.
#[derive(Clone, Debug)]
pub(super) struct Bump {
    cursors: Vec<Cursor>,
}

#[derive(Clone, Copy, Debug)]
struct Cursor {
    next: u64,
    end: u64,
}

impl Cursor {
    fn alloc(&mut self, len: u64, align: u64) -> Option<Gpa> {
        let at = self.next.checked_next_multiple_of(align.max(1))?;
        let next = at.checked_add(len).filter(|&next| next <= self.end)?;
        self.next = next;
        Some(Gpa(at))
    }
}

/// A state of the allocator, from [`super::Memory::mark`].
#[derive(Clone, Debug)]
pub struct Mark(Vec<u64>);

impl Bump {
    pub(super) fn new(regions: &[Region]) -> Self {
        let cursor = |region: &Region| Cursor {
            next: region.gpa,
            end: region.gpa.saturating_add(region.len),
        };
        Self {
            cursors: regions.iter().map(cursor).collect(),
        }
    }

    pub(super) fn alloc(&mut self, len: u64, align: u64) -> Option<Gpa> {
        self.cursors
            .iter_mut()
            .find_map(|cursor| cursor.alloc(len, align))
    }

    pub(super) fn alloc_in(&mut self, region: usize, len: u64, align: u64) -> Option<Gpa> {
        self.cursors.get_mut(region)?.alloc(len, align)
    }

    pub(super) fn mark(&self) -> Mark {
        Mark(self.cursors.iter().map(|cursor| cursor.next).collect())
    }

    pub(super) fn reset_to(&mut self, mark: &Mark) {
        for (cursor, &next) in self.cursors.iter_mut().zip(&mark.0) {
            cursor.next = cursor.next.min(next);
        }
    }
}
