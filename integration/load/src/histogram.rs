//! Latencies, counted in buckets whose width grows with the value, as in HdrHistogram.
//!
//! The invariant: recording touches one counter and allocates nothing, and a quantile is at most
//! one part in 64 off.

/// Buckets for each power of two, as a power of two.
const PRECISION: u32 = 6;
/// Values are limited to 2 to the power of this less one: 18 minutes in nanoseconds.
const LARGEST: u32 = 40;
const BUCKETS: usize = ((LARGEST - PRECISION + 1) << PRECISION) as usize;

/// A histogram of nanoseconds.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    counters: Box<[u64]>,
    count: u64,
    sum: u64,
    largest: u64,
}

impl Histogram {
    /// An empty histogram.
    pub(crate) fn new() -> Self {
        Self {
            counters: vec![0; BUCKETS].into(),
            count: 0,
            sum: 0,
            largest: 0,
        }
    }

    /// Counts one value.
    pub(crate) fn record(&mut self, value: u64) {
        if let Some(counter) = self.counters.get_mut(bucket(value)) {
            *counter += 1;
        }
        self.count += 1;
        self.sum += value;
        self.largest = self.largest.max(value);
    }

    /// Adds another histogram's counts.
    pub(crate) fn merge(&mut self, other: &Self) {
        for (counter, more) in self.counters.iter_mut().zip(&other.counters) {
            *counter += more;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.largest = self.largest.max(other.largest);
    }

    /// The number of values.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The mean of all values; none if there are no values.
    pub(crate) fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum as f64 / self.count as f64)
    }

    /// The largest value.
    pub(crate) fn largest(&self) -> u64 {
        self.largest
    }

    /// The value below which `per_thousand` of a thousand values are; 0 if there are no values.
    pub(crate) fn quantile(&self, per_thousand: u64) -> u64 {
        let rank = (self.count * per_thousand).div_ceil(1000).max(1);
        let mut seen = 0;
        for (index, counter) in (0..).zip(&self.counters) {
            seen += counter;
            if seen >= rank {
                return middle(index).min(self.largest);
            }
        }
        self.largest
    }
}

/// The bucket of a value.
fn bucket(value: u64) -> usize {
    let value = value.min((1 << LARGEST) - 1);
    let shift = value
        .checked_ilog2()
        .map_or(0, |log| log.saturating_sub(PRECISION));
    // A value with `shift` 0 has a bucket of its own; each further power of two has 64 more.
    let bucket = (u64::from(shift) << PRECISION) + (value >> shift);
    usize::try_from(bucket).unwrap_or(BUCKETS - 1)
}

/// The value in the middle of a bucket.
fn middle(index: u64) -> u64 {
    let shift = (index >> PRECISION).saturating_sub(1);
    let value = (index - (shift << PRECISION)) << shift;
    value + ((1 << shift) >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bucket_holds_its_middle() {
        for index in 0..BUCKETS {
            assert_eq!(bucket(middle(index as u64)), index);
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn buckets_are_narrow_and_in_order() {
        let mut last = 0;
        for value in (0..100_000).chain((1 << 20..1 << 30).step_by(99_991)) {
            let index = bucket(value);
            assert!(index >= last);
            last = index;
            let off = middle(index as u64).abs_diff(value);
            assert!(off * 64 <= value, "{value} is off by {off}");
        }
    }

    #[test]
    fn quantiles_are_where_they_belong() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.quantile(500), 0);
        for value in 1..=1000 {
            histogram.record(value * 1000);
        }
        for (per_thousand, value) in [(500, 500_000), (990, 990_000), (1000, 1_000_000)] {
            let found = histogram.quantile(per_thousand);
            assert!(found.abs_diff(value) * 64 <= value, "{found} for {value}");
        }
        let mut twice = histogram.clone();
        twice.merge(&histogram);
        assert_eq!(twice.count(), 2000);
        assert_eq!(twice.quantile(990), histogram.quantile(990));
        assert_eq!(twice.largest(), 1_000_000);
    }
}
