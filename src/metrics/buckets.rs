//! The buckets of a latency histogram: four for each power of two of nanoseconds.
//!
//! A bucket is at most a quarter of its lower bound wide, so a quantile that is read from a histogram
//! is at most that far off. The invariant: each number of nanoseconds belongs to exactly one bucket.

/// Below 2 to this power all nanoseconds share the first bucket.
const FIRST_POWER: u32 = 8;
/// From 2 to this power on, more than 68 seconds, all share the last one.
const LAST_POWER: u32 = 36;
/// Buckets for each power of two, as a power of two.
const FINENESS: u32 = 2;

/// The number of buckets.
pub(crate) const BUCKETS: usize = ((LAST_POWER - FIRST_POWER) as usize) * (1 << FINENESS) + 2;

/// The bucket of so many nanoseconds.
#[inline]
pub(crate) fn bucket_of(nanoseconds: u64) -> usize {
    if nanoseconds < 1 << FIRST_POWER {
        return 0;
    }
    let power = 63 - nanoseconds.leading_zeros();
    if power >= LAST_POWER {
        return BUCKETS - 1;
    }
    let part = (nanoseconds >> (power - FINENESS)) & ((1 << FINENESS) - 1);
    // Both are small.
    1 + (((power - FIRST_POWER) << FINENESS) as usize) + usize::try_from(part).unwrap_or(0)
}

/// The first number of nanoseconds beyond a bucket; `None` for the last one, which has no end.
pub(crate) fn end_of(bucket: usize) -> Option<u64> {
    if bucket + 1 >= BUCKETS {
        return None;
    }
    let power = FIRST_POWER + u32::try_from(bucket >> FINENESS).ok()?;
    let part = (bucket & ((1 << FINENESS) - 1)) as u64;
    Some((1 << power) + (part << (power - FINENESS)))
}

/// The first number of nanoseconds of a bucket.
pub(crate) fn start_of(bucket: usize) -> u64 {
    bucket.checked_sub(1).and_then(end_of).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_is_within_the_bounds_of_its_bucket() {
        let around = (0..64).flat_map(|power| {
            let start = 1_u64 << power;
            [
                start - 1,
                start,
                start + 1,
                start + start / 4,
                start + start / 2,
            ]
        });
        for nanoseconds in around.chain([0, u64::MAX]) {
            let bucket = bucket_of(nanoseconds);
            assert!(bucket < BUCKETS, "{nanoseconds}");
            assert!(start_of(bucket) <= nanoseconds, "{nanoseconds}");
            assert!(
                end_of(bucket).is_none_or(|end| nanoseconds < end),
                "{nanoseconds}"
            );
        }
    }

    #[test]
    fn buckets_are_at_most_a_quarter_wide_and_leave_no_gap() {
        for bucket in 1..BUCKETS - 1 {
            let (start, end) = (start_of(bucket), end_of(bucket).unwrap());
            assert_eq!(bucket_of(start), bucket);
            assert_eq!(bucket_of(end), bucket + 1);
            assert!((end - start) * 4 <= start, "{bucket}");
        }
        assert_eq!(end_of(0), Some(256));
        assert_eq!(end_of(BUCKETS - 1), None);
    }
}
