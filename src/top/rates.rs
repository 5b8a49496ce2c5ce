//! What happened between two snapshots of one server's counters.
//!
//! The invariant: a server that was started again begins at zero, so no rate is negative.

use std::time::Duration;

use crate::metrics::{Histogram, Snapshot};

/// What a server did in a while, for each second.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Rates {
    pub(super) operations: f64,
    pub(super) errors: f64,
    pub(super) bytes_read: f64,
    pub(super) bytes_written: f64,
    /// Durations in nanoseconds, if there were requests and they are measured.
    pub(super) p50: Option<f64>,
    pub(super) p99: Option<f64>,
    pub(super) in_flight: u64,
    pub(super) by_operation: Vec<OperationRate>,
}

/// What a server did of one operation.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct OperationRate {
    pub(super) name: String,
    pub(super) operations: f64,
    pub(super) errors: f64,
    pub(super) p50: Option<f64>,
    pub(super) p99: Option<f64>,
    /// The time that all of its requests took together, in nanoseconds.
    pub(super) time: f64,
}

impl Rates {
    /// What happened from `before` to `now`, which took `time`.
    pub(super) fn between(before: &Snapshot, now: &Snapshot, time: Duration) -> Self {
        let seconds = time.as_secs_f64().max(0.001);
        let rate = |now: u64, before: u64| count(now.saturating_sub(before)) / seconds;
        let mut by_operation = Vec::new();
        let mut all = Histogram::default();
        for stats in &now.operations {
            let earlier = before.operation(&stats.operation);
            let (requests, errors) = earlier.map_or((0, 0), |it| (it.requests, it.errors));
            let latency = match earlier {
                Some(earlier) => stats.latency.since(&earlier.latency),
                None => stats.latency.clone(),
            };
            let operations = rate(stats.requests, requests);
            if operations > 0.0 {
                by_operation.push(OperationRate {
                    name: stats.operation.clone(),
                    operations,
                    errors: rate(stats.errors, errors),
                    p50: latency.quantile(0.5),
                    p99: latency.quantile(0.99),
                    time: count(latency.sum) / seconds,
                });
            }
            all.add(&latency);
        }
        by_operation.sort_by(|one, other| other.operations.total_cmp(&one.operations));
        Self {
            operations: by_operation.iter().map(|it| it.operations).sum(),
            errors: by_operation.iter().map(|it| it.errors).sum(),
            bytes_read: rate(now.bytes_read, before.bytes_read),
            bytes_written: rate(now.bytes_written, before.bytes_written),
            p50: all.quantile(0.5),
            p99: all.quantile(0.99),
            in_flight: now.in_flight,
            by_operation,
        }
    }
}

/// A count as a number to divide.
#[allow(
    clippy::cast_precision_loss,
    reason = "a rate is shown with three digits"
)]
pub(super) fn count(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(requests: u64, errors: u64, bytes: u64) -> Snapshot {
        let text = format!(
            r#"{{"operation":"read","requests":{requests},"errors":{errors},
            "latency":{{"sum":{requests},"buckets":[0,{requests}]}}}}"#
        );
        Snapshot {
            operations: vec![serde_json::from_str(&text).unwrap()],
            bytes_read: bytes,
            ..Snapshot::default()
        }
    }

    #[test]
    fn rates_are_for_each_second() {
        let (before, now) = (snapshot(100, 1, 0), snapshot(300, 2, 4096));
        let rates = Rates::between(&before, &now, Duration::from_secs(2));
        assert!((rates.operations - 100.0).abs() < 0.01);
        assert!((rates.errors - 0.5).abs() < 0.01);
        assert!((rates.bytes_read - 2048.0).abs() < 0.01);
        assert_eq!(rates.by_operation[0].name, "read");
        assert!(rates.p50.is_some() && rates.by_operation[0].p99.is_some());
    }

    #[test]
    fn server_that_was_started_again_has_no_negative_rate() {
        let (before, now) = (snapshot(1000, 9, 9), snapshot(10, 0, 0));
        let rates = Rates::between(&before, &now, Duration::from_secs(1));
        assert!(rates.operations.abs() < 0.01 && rates.bytes_read.abs() < 0.01);
        assert!(rates.by_operation.is_empty());
        let idle = Rates::between(&now, &now, Duration::from_secs(1));
        assert_eq!((idle.p50, idle.p99), (None, None));
    }
}
