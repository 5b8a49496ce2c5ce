//! The counters as OpenMetrics text.
//!
//! Durations are given by powers of two of nanoseconds, a quarter as fine as they are counted, which is
//! what a scrape has to carry for each operation. The invariant: a name, once published, keeps its
//! meaning; `docs/metrics.md` has all of them.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{self, Unit};

use super::buckets::end_of;
use super::errno::name_of;
use super::snapshot::{Histogram, SessionState, Snapshot, Usage};

/// The media type of the text.
pub(super) const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Requests are counted from 1 µs to 17 s, with powers of two of nanoseconds.
const REQUESTS: std::ops::RangeInclusive<u32> = 10..=34;
/// Pauses of the service, from 1 ms to 17 s.
const PAUSES: std::ops::RangeInclusive<u32> = 20..=34;

impl Snapshot {
    /// The counters as [OpenMetrics] text, as `--metrics` serves it.
    ///
    /// [OpenMetrics]: https://prometheus.io/docs/specs/om/open_metrics_spec/
    #[must_use]
    pub fn to_open_metrics(&self) -> String {
        text_of(self.clone())
    }
}

/// The text of a snapshot.
pub(super) fn text_of(snapshot: Snapshot) -> String {
    let labels = [("share".into(), snapshot.share.clone().into())];
    let mut registry = registry::Registry::with_prefix_and_labels("ringfsd", labels.into_iter());
    registry.register_collector(Box::new(Exposition(snapshot)));
    let mut text = String::new();
    // Writing to a string doesn't fail.
    let _ = encode(&mut text, &registry);
    text
}

/// A limited resource: its name, its help, and how much is in use, or its limit.
type UsageGauge = (&'static str, &'static str, fn(&Usage) -> Option<u64>);

/// What is known of limited resources.
const GAUGES: [UsageGauge; 6] = [
    ("inodes", "Inodes that the guest knows", |usage| {
        usage.inodes
    }),
    (
        "inodes_limit",
        "The most inodes that the guest may know",
        |usage| usage.max_inodes,
    ),
    (
        "handles",
        "Files, directories and locks that the guest has open",
        |usage| usage.handles,
    ),
    (
        "handles_limit",
        "The most that the guest may have open",
        |usage| usage.max_handles,
    ),
    (
        "descriptors",
        "Descriptors that are open for the guest",
        |usage| usage.descriptors,
    ),
    (
        "descriptors_limit",
        "The most descriptors that may be open for the guest",
        |usage| usage.max_descriptors,
    ),
];

#[derive(Debug)]
struct Exposition(Snapshot);

/// Writes the metrics, one family after the other.
struct Writer<'a>(DescriptorEncoder<'a>);

impl Writer<'_> {
    fn family(
        &mut self,
        kind: MetricType,
        name: &str,
        unit: Option<&Unit>,
        help: &str,
        write: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result,
    ) -> fmt::Result {
        write(&mut self.0.encode_descriptor(name, help, unit, kind)?)
    }

    /// Counters with labels.
    fn counters<'a>(
        &mut self,
        name: &str,
        help: &str,
        counters: impl IntoIterator<Item = (Vec<(&'static str, &'a str)>, u64)>,
    ) -> fmt::Result {
        self.family(MetricType::Counter, name, None, help, |metric| {
            for (labels, value) in counters {
                metric
                    .encode_family(&labels)?
                    .encode_counter::<NoLabelSet, u64, f64>(&value, None)?;
            }
            Ok(())
        })
    }

    fn counter(&mut self, name: &str, unit: Option<&Unit>, help: &str, value: u64) -> fmt::Result {
        self.family(MetricType::Counter, name, unit, help, |metric| {
            metric.encode_counter::<NoLabelSet, u64, f64>(&value, None)
        })
    }

    fn gauge(&mut self, name: &str, unit: Option<&Unit>, help: &str, value: u64) -> fmt::Result {
        self.family(MetricType::Gauge, name, unit, help, |metric| {
            metric.encode_gauge(&value)
        })
    }

    /// A value of each mount.
    fn by_mount(&mut self, name: &str, help: &str, values: Vec<(&str, u64)>) -> fmt::Result {
        self.family(MetricType::Gauge, name, None, help, |metric| {
            for (mount, value) in values {
                metric
                    .encode_family(&[("mount", mount)])?
                    .encode_gauge(&value)?;
            }
            Ok(())
        })
    }

    /// Durations by a label.
    fn durations<'a>(
        &mut self,
        name: &str,
        help: &str,
        powers: &std::ops::RangeInclusive<u32>,
        histograms: impl IntoIterator<Item = (&'static str, &'a str, &'a Histogram)>,
    ) -> fmt::Result {
        let kind = MetricType::Histogram;
        self.family(kind, name, Some(&Unit::Seconds), help, |metric| {
            for (label, value, histogram) in histograms {
                metric
                    .encode_family(&[(label, value)])?
                    .encode_histogram::<NoLabelSet>(
                        seconds(histogram.sum),
                        histogram.count(),
                        &by_powers(histogram, powers.clone()),
                        None,
                    )?;
            }
            Ok(())
        })
    }

    /// Numbers of chains.
    fn chains(&mut self, name: &str, help: &str, counts: &[u64], sum: u64) -> fmt::Result {
        self.family(MetricType::Histogram, name, None, help, |metric| {
            let last = counts.len().saturating_sub(1);
            let bound = |at: usize| match at {
                at if at == last => f64::INFINITY,
                at => ((1_u64 << at) - 1) as f64,
            };
            let buckets = counts.iter().enumerate();
            let buckets: Vec<_> = buckets.map(|(at, count)| (bound(at), *count)).collect();
            metric.encode_histogram::<NoLabelSet>(sum as f64, counts.iter().sum(), &buckets, None)
        })
    }
}

impl Collector for Exposition {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut writer = Writer(encoder);
        self.server(&mut writer)?;
        self.requests(&mut writer)?;
        self.rings(&mut writer)?;
        self.usage(&mut writer)?;
        self.interruptions(&mut writer)
    }
}

impl Exposition {
    fn server(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let Self(snapshot) = self;
        let version = env!("CARGO_PKG_VERSION");
        let labels = [("version", version), ("runtime", &*snapshot.runtime)];
        writer.family(
            MetricType::Info,
            "build",
            None,
            "Version and engine of the server",
            |it| it.encode_info(&labels),
        )?;
        let began = "When the counters began, as seconds since 1970";
        writer.gauge("began", Some(&Unit::Seconds), began, snapshot.began)?;
        let workers = "Threads that serve request queues";
        writer.gauge("workers", None, workers, snapshot.workers as u64)?;
        let state = "The state of the session: 1 for that which it is in";
        writer.family(MetricType::Gauge, "session_state", None, state, |metric| {
            for (name, state) in [
                ("waiting", SessionState::Waiting),
                ("connected", SessionState::Connected),
                ("mounted", SessionState::Mounted),
            ] {
                let value = u64::from(snapshot.session == state);
                metric
                    .encode_family(&[("state", name)])?
                    .encode_gauge(&value)?;
            }
            Ok(())
        })?;
        let connections = "Connections of VMMs";
        writer.counter("connections", None, connections, snapshot.connections)
    }

    fn requests(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let Self(snapshot) = self;
        let operations = || snapshot.operations.iter();
        writer.counters(
            "requests",
            "Requests that have ended, by operation",
            operations().map(|it| (vec![("operation", &*it.operation)], it.requests)),
        )?;
        let errors: Vec<_> = snapshot
            .errors
            .iter()
            .map(|it| (it, name_of(it.errno)))
            .collect();
        writer.counters(
            "errors",
            "Requests that have failed, by operation and errno",
            errors.iter().map(|(it, errno)| {
                (
                    vec![("operation", &*it.operation), ("errno", &**errno)],
                    it.count,
                )
            }),
        )?;
        let timed = operations().filter(|it| !it.latency.buckets.is_empty());
        writer.durations(
            "request_duration",
            "From when a worker begins to serve a request to its reply, by operation",
            &REQUESTS,
            timed.map(|it| ("operation", &*it.operation, &it.latency)),
        )?;
        let queues = snapshot.queues.iter();
        let queues: Vec<_> = queues
            .map(|it| (it.queue.to_string(), &it.latency))
            .collect();
        writer.durations(
            "queue_request_duration",
            "As request_duration, by queue; 0 is the high-priority queue",
            &REQUESTS,
            queues
                .iter()
                .map(|(queue, latency)| ("queue", &**queue, *latency)),
        )?;
        let bytes = Some(&Unit::Bytes);
        writer.counter(
            "read",
            bytes,
            "Bytes that READ has returned",
            snapshot.bytes_read,
        )?;
        writer.counter(
            "written",
            bytes,
            "Bytes that WRITE has written",
            snapshot.bytes_written,
        )?;
        let in_flight = "Requests that are being served";
        writer.gauge("requests_in_flight", None, in_flight, snapshot.in_flight)?;
        let deferred = "Requests that had to wait for the host";
        writer.counter(
            "deferred_requests",
            None,
            deferred,
            snapshot.threads.deferred,
        )?;
        let dropped =
            "Requests that were dropped without a reply and got EIO: faults of the server";
        let faults = &snapshot.guest_faults;
        writer.counter("dropped_requests", None, dropped, faults.dropped_requests)?;
        writer.counters(
            "guest_faults",
            "What the guest's driver did wrong, by kind",
            [
                (
                    vec![("kind", "malformed_request")],
                    faults.malformed_requests,
                ),
                (vec![("kind", "faulty_chain")], faults.faulty_chains),
            ],
        )
    }

    fn rings(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let Self(snapshot) = self;
        let threads = &snapshot.threads;
        writer.counter("kicks", None, "Wake-ups by the guest", threads.kicks)?;
        writer.counter("calls", None, "Notifications of the guest", threads.calls)?;
        let offloaded = "Chains that a worker with a backlog has passed on";
        writer.counter("offloaded_chains", None, offloaded, threads.offloaded)?;
        let stolen = "Chains that a worker has served for another one";
        writer.counter("stolen_chains", None, stolen, threads.stolen)?;
        let batches = "How many chains were returned to the guest together";
        let sum = threads.published_chains;
        writer.chains("batch_chains", batches, &snapshot.batch_sizes, sum)?;
        let depths = "How many chains a worker has found on a ring after a kick or a poll";
        let sum = threads.found_chains;
        writer.chains("queue_depth_chains", depths, &snapshot.queue_depths, sum)
    }

    fn usage(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let usage = &self.0.usage;
        for (name, help, value) in GAUGES {
            if let Some(value) = value(usage) {
                writer.gauge(name, None, help, value)?;
            }
        }
        for (name, help, value) in GAUGES {
            let mounts = self.0.mounts.iter();
            let known: Vec<_> = mounts
                .filter_map(|it| Some((&*it.mount, value(&it.usage)?)))
                .collect();
            if !known.is_empty() {
                writer.by_mount(&format!("mount_{name}"), help, known)?;
            }
        }
        let evictions = "Descriptors of inodes that were closed because there were too many";
        writer.counter("evictions", None, evictions, usage.evictions)
    }

    fn interruptions(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let recoveries = &self.0.recoveries;
        let resumed = "Sessions that another process has resumed";
        writer.counter(
            "resumed_sessions",
            None,
            resumed,
            recoveries.resumed_sessions,
        )?;
        let fallbacks = "Sessions that use threads because there is no io_uring any more";
        writer.counter(
            "engine_fallbacks",
            None,
            fallbacks,
            recoveries.engine_fallbacks,
        )?;
        let reasons = [
            ("killed", &recoveries.restarts),
            ("upgrade", &recoveries.upgrades),
            ("failed_upgrade", &recoveries.failed_upgrades),
        ];
        writer.counters(
            "restarts",
            "Serving processes that have followed another one, by reason",
            reasons.map(|(reason, restarts)| (vec![("reason", reason)], restarts.count)),
        )?;
        writer.durations(
            "pause_duration",
            "For how long no process served, by the reason of the restart",
            &PAUSES,
            reasons.map(|(reason, restarts)| ("reason", reason, &restarts.pauses)),
        )
    }
}

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

/// Buckets with powers of two of nanoseconds as their bounds.
fn by_powers(histogram: &Histogram, powers: std::ops::RangeInclusive<u32>) -> Vec<(f64, u64)> {
    let mut counts = histogram.buckets.iter().copied().enumerate().peekable();
    let bounds = powers.map(|power| Some(1_u64 << power)).chain([None]);
    let bucket = |bound: Option<u64>| {
        let mut sum = 0_u64;
        while let Some((_, count)) = counts.next_if(|(bucket, _)| match (end_of(*bucket), bound) {
            (_, None) => true,
            (None, Some(_)) => false,
            (Some(end), Some(bound)) => end <= bound,
        }) {
            sum = sum.wrapping_add(count);
        }
        (bound.map_or(f64::INFINITY, seconds), sum)
    };
    bounds.map(bucket).collect()
}

#[cfg(test)]
mod tests {
    use super::super::buckets::{BUCKETS, bucket_of};
    use super::*;

    #[test]
    fn bounds_are_powers_of_two_and_no_duration_is_lost() {
        let mut histogram = Histogram {
            sum: 0,
            buckets: vec![0; BUCKETS],
        };
        for nanoseconds in [0, 300, 1023, 1024, 1025, 2047, 2048, 1 << 40] {
            histogram.buckets[bucket_of(nanoseconds)] += 1;
        }
        let buckets = by_powers(&histogram, REQUESTS);
        assert_eq!(buckets[0], (1.024e-6, 3));
        assert_eq!(buckets[1], (2.048e-6, 3));
        assert_eq!(buckets[2], (4.096e-6, 1));
        assert_eq!(buckets.last(), Some(&(f64::INFINITY, 1)));
        assert_eq!(buckets.iter().map(|(_, count)| count).sum::<u64>(), 8);
    }

    #[test]
    fn text_is_complete_and_label_is_escaped() {
        let mut snapshot = Snapshot {
            share: "a\"b\\c\nd".to_owned(),
            batch_sizes: vec![0, 2, 1],
            ..Snapshot::default()
        };
        snapshot.threads.published_chains = 5;
        let text = text_of(snapshot);
        assert!(text.ends_with("# EOF\n"), "{text}");
        let label = r#"share="a\"b\\c\nd""#;
        assert!(
            text.contains(&format!("ringfsd_kicks_total{{{label}}} 0\n")),
            "{text}"
        );
        assert!(
            text.contains(&format!("ringfsd_batch_chains_sum{{{label}}} 5.0\n")),
            "{text}"
        );
        assert!(
            text.contains(r#"le="1.0"} 2"#) || text.contains(r#"le="1.0","#),
            "{text}"
        );
    }
}
