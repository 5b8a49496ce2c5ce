//! The buckets of one share, one for each limit.
//!
//! The invariant: a request takes from each bucket that concerns it, or puts back what it took.

use super::bucket::Bucket;
use super::clock::Ticks;
use super::settings::Settings;

/// The kind of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Reads a file.
    Read,
    /// Writes to a file, copies to it, or allocates space for it.
    Write,
    /// Everything else.
    Metadata,
}

/// What a request takes from the buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    /// Its kind.
    pub(crate) kind: Kind,
    /// The bytes that it asks to transfer.
    pub(crate) bytes: u64,
}

/// The buckets.
#[derive(Debug)]
pub(crate) struct Buckets {
    /// In the order of [`Settings::rates`].
    buckets: [Option<Bucket>; 7],
    /// Whether requests of some kind have a limit of their own.
    by_kind: bool,
}

/// The position of the buckets for bytes.
const BYTES: usize = 4;

impl Buckets {
    /// Full buckets; `None` if nothing is limited.
    pub(super) fn full(settings: &Settings) -> Option<Self> {
        Self::replacing(settings, None, 0)
    }

    /// Buckets that replace `others` at `now`. Those whose rate stays are as full as before, and the
    /// others are empty.
    pub(super) fn replacing(
        settings: &Settings,
        others: Option<&Self>,
        now: Ticks,
    ) -> Option<Self> {
        if settings.is_empty() {
            return None;
        }
        let rates = settings.rates();
        let bucket = |at: usize| {
            let rate = rates[at]?;
            let before = others.and_then(|others| others.buckets[at].as_ref());
            let taken = before.filter(|bucket| bucket.rate() == rate);
            Some(Bucket::new(rate, taken.map_or(now, Bucket::taken)))
        };
        Some(Self {
            buckets: std::array::from_fn(bucket),
            by_kind: [1, 2, 3, 5, 6].iter().any(|at| rates[*at].is_some()),
        })
    }

    /// Whether requests of one kind must not wait behind those of another.
    pub(super) fn by_kind(&self) -> bool {
        self.by_kind
    }

    /// Takes what a request needs, and returns when it may be served.
    pub(crate) fn take(&self, load: Load, now: Ticks) -> Ticks {
        let mut due = 0;
        for (bucket, units) in self.of(load, load.bytes) {
            due = due.max(bucket.take(units, now));
        }
        due
    }

    /// How long the tokens that a request needs take to come.
    pub(super) fn time_for(&self, load: Load) -> Ticks {
        let times = self.of(load, load.bytes);
        times
            .map(|(bucket, units)| bucket.time_for(units))
            .max()
            .unwrap_or(0)
    }

    /// Puts back what was taken for a request that isn't served.
    pub(super) fn put_back(&self, load: Load) {
        for (bucket, units) in self.of(load, load.bytes) {
            bucket.put_back(units);
        }
    }

    /// Corrects what was taken for a request by the bytes that it has transferred.
    pub(crate) fn correct(&self, load: Load, transferred: u64) {
        let difference = load.bytes.abs_diff(transferred);
        if difference == 0 {
            return;
        }
        for bucket in self.of_bytes(load.kind) {
            if transferred < load.bytes {
                bucket.put_back(difference);
            } else {
                bucket.take_late(difference);
            }
        }
    }

    /// The buckets that a request of `bytes` takes from, and how much.
    fn of(&self, load: Load, bytes: u64) -> impl Iterator<Item = (&Bucket, u64)> {
        let own = 1 + load.kind as usize;
        let operations = [&self.buckets[0], &self.buckets[own]];
        let operations = operations.into_iter().flatten().map(|bucket| (bucket, 1));
        let transfers = self.of_bytes(load.kind).map(move |bucket| (bucket, bytes));
        operations.chain(transfers.filter(|(_, units)| *units != 0))
    }

    /// The buckets for the bytes of a request.
    fn of_bytes(&self, kind: Kind) -> impl Iterator<Item = &Bucket> {
        let [all, own] = match kind {
            Kind::Read => [&self.buckets[BYTES], &self.buckets[BYTES + 1]],
            Kind::Write => [&self.buckets[BYTES], &self.buckets[BYTES + 2]],
            Kind::Metadata => [&None, &None],
        };
        [all, own].into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;
    use crate::limits::Rate;
    use crate::limits::clock::{LONGEST, SECOND};

    const NOW: Ticks = LONGEST + 1000 * SECOND;

    fn rate(per_second: u64, burst: u64) -> Option<Rate> {
        Some(Rate {
            per_second: NonZeroU64::new(per_second).unwrap(),
            burst: NonZeroU64::new(burst),
        })
    }

    fn load(kind: Kind, bytes: u64) -> Load {
        Load { kind, bytes }
    }

    #[test]
    fn request_waits_for_the_slowest_of_its_limits() {
        let settings = Settings {
            operations: rate(100, 1),
            writes: rate(10, 1),
            bytes: rate(1000, 1),
            ..Settings::default()
        };
        let buckets = Buckets::replacing(&settings, None, NOW).unwrap();
        assert!(buckets.by_kind());
        let metadata = load(Kind::Metadata, 0);
        assert_eq!(buckets.take(metadata, NOW), NOW + SECOND / 100);
        assert_eq!(buckets.take(load(Kind::Write, 0), NOW), NOW + SECOND / 10);
        buckets.take(load(Kind::Read, 2000), NOW);
        assert!(buckets.take(load(Kind::Write, 1), NOW) > NOW + 2 * SECOND);
        // Metadata take no bytes.
        assert!(buckets.take(metadata, NOW) < NOW + SECOND / 10);
    }

    #[test]
    fn unused_bytes_are_put_back_and_unforeseen_ones_taken() {
        let settings = Settings {
            bytes_read: rate(1000, 1000),
            ..Settings::default()
        };
        let buckets = Buckets::full(&settings).unwrap();
        let read = load(Kind::Read, 1000);
        buckets.take(read, NOW);
        buckets.correct(read, 0);
        assert!(buckets.take(read, NOW) <= NOW);
        buckets.correct(read, 3000);
        assert_eq!(
            buckets.take(load(Kind::Read, 1), NOW),
            NOW + 2001 * SECOND / 1000
        );
        assert!(buckets.take(load(Kind::Write, 1 << 40), NOW) <= NOW);
    }

    #[test]
    fn replaced_buckets_keep_what_is_unchanged() {
        let before = Settings {
            reads: rate(10, 10),
            writes: rate(10, 10),
            ..Settings::default()
        };
        let buckets = Buckets::full(&before).unwrap();
        let after = Settings {
            writes: rate(20, 10),
            ..before
        };
        let buckets = Buckets::replacing(&after, Some(&buckets), NOW).unwrap();
        assert!(buckets.take(load(Kind::Read, 0), NOW) <= NOW);
        assert_eq!(buckets.take(load(Kind::Write, 0), NOW), NOW + SECOND / 20);
        assert!(Buckets::replacing(&Settings::default(), Some(&buckets), NOW).is_none());
    }
}
