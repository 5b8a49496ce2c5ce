//! The counters at one moment, as plain data.
//!
//! The invariant: of two snapshots of one server, no counter of the later one is smaller.

use serde::{Deserialize, Serialize};

use super::buckets::{BUCKETS, end_of, start_of};

/// The counters of a server, and what is in use, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Snapshot {
    /// What is served: the tag, or the directory.
    pub share: String,
    /// The engine of the workers.
    pub runtime: String,
    /// The number of workers.
    pub workers: usize,
    /// Seconds since 1970 at which the counters began.
    pub began: u64,
    /// Whether the duration of requests is measured now.
    pub timed: bool,
    /// The session.
    pub session: SessionState,
    /// VMMs that have connected.
    pub connections: u64,
    /// Operations that were requested.
    pub operations: Vec<OperationStats>,
    /// Errors by operation and errno.
    pub errors: Vec<ErrorCount>,
    /// Queues that have had requests while durations were measured.
    pub queues: Vec<QueueStats>,
    /// Bytes that READ has returned.
    pub bytes_read: u64,
    /// Bytes that WRITE has written.
    pub bytes_written: u64,
    /// Requests that are being served.
    pub in_flight: u64,
    /// What the threads did besides.
    pub threads: ThreadStats,
    /// How many chains were returned to the guest together: entry *n* counts batches of less than 2ⁿ
    /// chains that aren't counted before. The last one is without a limit.
    pub batch_sizes: Vec<u64>,
    /// How many chains a worker has found when it looked at a ring; entries as above.
    pub queue_depths: Vec<u64>,
    /// What the guest did wrong.
    pub guest_faults: GuestFaults,
    /// Limited resources.
    pub usage: Usage,
    /// The same for each mount, if the share consists of several.
    #[serde(default)]
    pub mounts: Vec<MountUsage>,
    /// Restarts and upgrades.
    pub recoveries: Recoveries,
}

/// An operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct OperationStats {
    /// Its name; `unknown` for opcodes that don't exist.
    pub operation: String,
    /// Requests that have ended.
    pub requests: u64,
    /// Those of them that have failed.
    pub errors: u64,
    /// How long they took while durations were measured.
    pub latency: Histogram,
}

/// An operation and an errno.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ErrorCount {
    /// The operation; `any` for those that there was no room to count apart.
    pub operation: String,
    /// The errno, as Linux numbers it; 0 with `any`.
    pub errno: u32,
    /// How often that was returned.
    pub count: u64,
}

/// A queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct QueueStats {
    /// Its index; 0 is the high-priority queue.
    pub queue: u16,
    /// How long its requests took.
    pub latency: Histogram,
}

/// What the threads did besides serving requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ThreadStats {
    /// Wake-ups by a kick.
    pub kicks: u64,
    /// Calls of the guest.
    pub calls: u64,
    /// Batches of chains that were returned.
    pub batches: u64,
    /// Chains of these batches.
    pub published_chains: u64,
    /// Chains that workers have found when they looked at a ring.
    pub found_chains: u64,
    /// Chains that were passed on to other workers.
    pub offloaded: u64,
    /// Chains that were served for other workers.
    pub stolen: u64,
    /// Requests that had to wait for the host.
    pub deferred: u64,
}

/// What the guest did wrong, and what became of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct GuestFaults {
    /// Requests that could not be decoded.
    pub malformed_requests: u64,
    /// Chains that were returned empty.
    pub faulty_chains: u64,
    /// Requests that were dropped without a reply, which are faults of the server.
    pub dropped_requests: u64,
}

/// How much of the limited resources is in use, as far as the file system knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Inodes that the guest knows.
    pub inodes: Option<u64>,
    /// The most that it may know.
    pub max_inodes: Option<u64>,
    /// Open files and directories.
    pub handles: Option<u64>,
    /// The most that may be open, locks included.
    pub max_handles: Option<u64>,
    /// Descriptors that the server has open for the guest.
    pub descriptors: Option<u64>,
    /// The most that it may have.
    pub max_descriptors: Option<u64>,
    /// Descriptors of inodes that were closed because there were too many.
    pub evictions: u64,
}

/// What one of several file systems uses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountUsage {
    /// The path that it is mounted at.
    pub mount: String,
    /// What it uses.
    pub usage: Usage,
}

impl std::ops::Add for Usage {
    type Output = Self;

    /// What both use together. A file system that doesn't count something adds nothing to that, and
    /// where one that counts it has no limit, both together have none.
    fn add(self, other: Self) -> Self {
        let counts = |one: Option<u64>, other: Option<u64>| match (one, other) {
            (Some(one), Some(other)) => Some(one.saturating_add(other)),
            (one, other) => one.or(other),
        };
        let limits = |one: [Option<u64>; 2], other: [Option<u64>; 2]| match (one, other) {
            ([None, _], [_, limit]) | ([_, limit], [None, _]) => limit,
            ([_, one], [_, other]) => one.zip(other).map(|(one, other)| one.saturating_add(other)),
        };
        Self {
            inodes: counts(self.inodes, other.inodes),
            max_inodes: limits(
                [self.inodes, self.max_inodes],
                [other.inodes, other.max_inodes],
            ),
            handles: counts(self.handles, other.handles),
            max_handles: limits(
                [self.handles, self.max_handles],
                [other.handles, other.max_handles],
            ),
            descriptors: counts(self.descriptors, other.descriptors),
            max_descriptors: limits(
                [self.descriptors, self.max_descriptors],
                [other.descriptors, other.max_descriptors],
            ),
            evictions: self.evictions.saturating_add(other.evictions),
        }
    }
}

impl std::iter::Sum for Usage {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, usage| sum + usage)
    }
}

/// Restarts and upgrades.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Recoveries {
    /// Sessions that a process has resumed.
    pub resumed_sessions: u64,
    /// Sessions that use another engine than the chosen one, because it isn't available any more.
    pub engine_fallbacks: u64,
    /// Serving processes that were killed.
    pub restarts: Restarts,
    /// Switches to another program.
    pub upgrades: Restarts,
    /// Switches that have failed, after which the old program continues.
    pub failed_upgrades: Restarts,
}

/// Events that interrupt the service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Restarts {
    /// How often.
    pub count: u64,
    /// For how long no process served.
    pub pauses: Histogram,
}

/// The session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum SessionState {
    /// No VMM is connected.
    #[default]
    Waiting,
    /// A VMM is connected.
    Connected,
    /// The guest has mounted the share.
    Mounted,
}

impl SessionState {
    pub(super) fn of(number: u8) -> Self {
        match number {
            1 => Self::Connected,
            2 => Self::Mounted,
            _ => Self::Waiting,
        }
    }
}

/// Durations, counted in buckets of which each is at most a quarter of its lower bound wide.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// The sum of all durations, in nanoseconds.
    pub sum: u64,
    /// How many durations are in each bucket.
    pub buckets: Vec<u64>,
}

impl Histogram {
    /// The number of durations.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The duration in nanoseconds below which `part` (0 to 1) of all are, to a quarter; `None` without
    /// any.
    #[must_use]
    pub fn quantile(&self, part: f64) -> Option<f64> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let wanted = (part.clamp(0.0, 1.0) * count as f64).max(1.0);
        let mut before = 0_u64;
        for (bucket, &more) in self.buckets.iter().enumerate() {
            let all = before.saturating_add(more);
            if all as f64 >= wanted {
                let start = start_of(bucket) as f64;
                let Some(end) = end_of(bucket) else {
                    return Some(start);
                };
                let within = (wanted - before as f64) / more as f64;
                return Some(start + (end as f64 - start) * within);
            }
            before = all;
        }
        None
    }

    /// The mean in nanoseconds; `None` without any duration.
    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        let count = self.count();
        (count != 0).then(|| self.sum as f64 / count as f64)
    }

    /// Adds the durations of `other`.
    pub fn add(&mut self, other: &Self) {
        self.sum = self.sum.wrapping_add(other.sum);
        if self.buckets.len() < other.buckets.len() {
            self.buckets.resize(BUCKETS.max(other.buckets.len()), 0);
        }
        for (bucket, more) in self.buckets.iter_mut().zip(&other.buckets) {
            *bucket = bucket.wrapping_add(*more);
        }
    }

    /// The durations that came after `earlier`, an earlier state of the same histogram.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = earlier.buckets.iter().copied().chain(std::iter::repeat(0));
        let buckets = self.buckets.iter().zip(before);
        Self {
            sum: self.sum.wrapping_sub(earlier.sum),
            buckets: buckets
                .map(|(now, before)| now.saturating_sub(before))
                .collect(),
        }
    }
}

impl Snapshot {
    /// Requests of all operations.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.operations.iter().map(|stats| stats.requests).sum()
    }

    /// The durations of all operations.
    #[must_use]
    pub fn latency(&self) -> Histogram {
        let mut all = Histogram::default();
        for stats in &self.operations {
            all.add(&stats.latency);
        }
        all
    }

    /// The statistics of an operation, if it was requested.
    #[must_use]
    pub fn operation(&self, operation: &str) -> Option<&OperationStats> {
        let mut stats = self.operations.iter();
        stats.find(|stats| stats.operation == operation)
    }
}

#[cfg(test)]
mod tests {
    use super::super::buckets::bucket_of;
    use super::*;

    #[test]
    fn sum_of_usages_has_no_limit_that_one_of_them_lacks() {
        let usage = |handles, max_handles| Usage {
            handles,
            max_handles,
            evictions: 1,
            ..Usage::default()
        };
        let limited = usage(Some(3), Some(10));
        let sum = |other| {
            let sum = limited + other;
            assert_eq!((sum.evictions, other + limited), (2, sum));
            (sum.handles, sum.max_handles)
        };
        assert_eq!(sum(usage(Some(4), Some(20))), (Some(7), Some(30)));
        assert_eq!(sum(usage(Some(4), None)), (Some(7), None));
        assert_eq!(sum(usage(None, None)), (Some(3), Some(10)));
        assert_eq!([limited; 3].into_iter().sum::<Usage>().handles, Some(9));
    }

    #[test]
    fn quantiles_are_within_a_quarter() {
        let mut histogram = Histogram {
            sum: 0,
            buckets: vec![0; BUCKETS],
        };
        assert_eq!(histogram.quantile(0.5), None);
        for nanoseconds in (1..=1000).map(|n| n * 1000) {
            histogram.buckets[bucket_of(nanoseconds)] += 1;
            histogram.sum += nanoseconds;
        }
        for (part, expected) in [(0.5, 500e3), (0.99, 990e3), (1.0, 1e6), (0.0, 1e3)] {
            let found = histogram.quantile(part).unwrap();
            assert!((found / expected - 1.0).abs() < 0.25, "{part}: {found}");
        }
        assert_eq!(histogram.mean(), Some(500_500.0));
        let later = histogram.clone();
        assert_eq!(later.since(&histogram).count(), 0);
        assert_eq!(later.since(&Histogram::default()), later);
    }
}
