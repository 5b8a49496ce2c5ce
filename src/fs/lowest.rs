//! The lowest of many numbers, for lists that are shown page by page.
//!
//! The invariant: it keeps one number more than the page has, however many it is given.

use std::collections::BinaryHeap;

/// Collects the lowest values.
#[derive(Debug)]
pub(crate) struct Lowest<T> {
    limit: usize,
    /// The highest one first.
    values: BinaryHeap<T>,
}

impl<T: Ord + Copy> Lowest<T> {
    /// Collects `limit` values, and the one after them.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            values: BinaryHeap::new(),
        }
    }

    pub(crate) fn add(&mut self, value: T) {
        if self.values.len() <= self.limit {
            self.values.push(value);
        } else if let Some(mut highest) = self.values.peek_mut()
            && value < *highest
        {
            *highest = value;
        }
    }

    /// The values in ascending order, and the one after them.
    pub(crate) fn take(self) -> (Vec<T>, Option<T>) {
        let mut values = self.values.into_sorted_vec();
        let next = (values.len() > self.limit).then(|| values.pop()).flatten();
        (values, next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_cover_all_values_in_order() {
        let all: Vec<u64> = (0..100).map(|n| n * 37 % 101).collect();
        let (mut from, mut seen) = (Some(0), Vec::new());
        while let Some(start) = from {
            let mut lowest = Lowest::new(7);
            let rest = all.iter().filter(|value| **value >= start);
            rest.for_each(|value| lowest.add(*value));
            let (values, next) = lowest.take();
            assert!(values.len() <= 7);
            seen.extend(values);
            from = next;
        }
        let mut sorted = all;
        sorted.sort_unstable();
        assert_eq!(seen, sorted);
    }
}
