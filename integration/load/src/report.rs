//! One case's result: as data, as a line of JSON, as a row of a table.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::histogram::Histogram;
use crate::process::Usage;

/// A result.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Measurement {
    /// The server's name.
    pub(crate) server: String,
    /// The case, written in full.
    pub(crate) case: String,
    pub(crate) seconds: f64,
    pub(crate) operations: u64,
    pub(crate) operations_per_second: f64,
    /// Items of an operation: the entries of a listing.
    pub(crate) items: u32,
    pub(crate) mib_per_second: f64,
    /// Microseconds.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
    /// What the server used, if its process is known.
    pub(crate) used: Option<Used>,
    /// The part of a CPU for each driving thread that the generator used.
    pub(crate) generator_busy: f64,
    pub(crate) verified: bool,
    /// A remark on the result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
}

/// What the server used.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Used {
    /// Microseconds of CPU time for an operation.
    pub(crate) cpu: f64,
    /// The part of one CPU.
    pub(crate) busy: f64,
    /// Context switches for an operation.
    pub(crate) switches: f64,
    pub(crate) switches_per_second: f64,
    pub(crate) threads: u64,
    /// KiB without the guest's memory.
    pub(crate) memory: u64,
}

/// The raw numbers of a measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Raw<'a> {
    pub(crate) latencies: &'a Histogram,
    pub(crate) elapsed: Duration,
    pub(crate) server: Option<Usage>,
    /// Nanoseconds.
    pub(crate) own_cpu: u64,
    pub(crate) threads: usize,
    /// Bytes that an operation transfers.
    pub(crate) bytes: u32,
    /// Operations in flight at any time.
    pub(crate) in_flight: u32,
}

/// With fewer operations than this, one more that ends in time would change the rate.
const FEW: u64 = 200;

impl Measurement {
    /// Computes the result. If there were few operations, as of listings, their rate is the number in
    /// flight divided by the time of one, and parts of operations count too.
    pub(crate) fn new(server: &str, case: String, items: u32, raw: &Raw<'_>) -> Self {
        let seconds = raw.elapsed.as_secs_f64().max(1e-9);
        let operations = raw.latencies.count();
        let rate = match raw.latencies.mean() {
            Some(mean) if operations < FEW => f64::from(raw.in_flight) * 1e9 / mean.max(1.0),
            _ => operations as f64 / seconds,
        };
        let each = (rate * seconds).max(1.0);
        let micros = |nanos: u64| nanos as f64 / 1e3;
        let used = |usage: Usage| Used {
            cpu: micros(usage.cpu) / each,
            busy: usage.cpu as f64 / 1e9 / seconds,
            switches: usage.switches as f64 / each,
            switches_per_second: usage.switches as f64 / seconds,
            threads: usage.threads,
            memory: usage.memory,
        };
        Self {
            server: server.to_owned(),
            case,
            seconds,
            operations,
            operations_per_second: rate,
            items,
            mib_per_second: rate * f64::from(raw.bytes) / f64::from(1 << 20),
            p50: micros(raw.latencies.quantile(500)),
            p99: micros(raw.latencies.quantile(990)),
            p999: micros(raw.latencies.quantile(999)),
            max: micros(raw.latencies.largest()),
            used: raw.server.map(used),
            generator_busy: raw.own_cpu as f64 / 1e9 / seconds / raw.threads.max(1) as f64,
            verified: false,
            note: None,
        }
    }

    /// A line of JSON.
    pub(crate) fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// A row of the table.
    pub(crate) fn row(&self) -> String {
        let used = self.used.map_or_else(
            || format!("{:>8} {:>6} {:>8} {:>7} {:>8}", "-", "-", "-", "-", "-"),
            |used| {
                format!(
                    "{:>8} {:>6} {:>8} {:>7} {:>8.1}",
                    figures(used.cpu),
                    format!("{:.0}%", used.busy * 100.0),
                    figures(used.switches),
                    used.threads,
                    used.memory as f64 / 1024.0
                )
            },
        );
        let note = self
            .note
            .as_ref()
            .map_or(String::new(), |note| format!("  {note}"));
        format!(
            "{:<26} {:>9} {:>8} {:>8} {:>8} {:>8} {used} {:>5}%{}{note}",
            self.case,
            figures(self.operations_per_second),
            figures(self.mib_per_second),
            figures(self.p50),
            figures(self.p99),
            figures(self.p999),
            format!("{:.0}", self.generator_busy * 100.0),
            if self.verified { "  verified" } else { "" },
        )
    }
}

/// The head of the table.
pub(crate) fn heading() -> String {
    let first = format!(
        "{:<26} {:>9} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6} {:>8} {:>7} {:>8} {:>6}",
        "case",
        "ops/s",
        "MiB/s",
        "p50",
        "p99",
        "p99.9",
        "CPU/op",
        "busy",
        "sw./op",
        "threads",
        "memory",
        "load",
    );
    let second = format!(
        "{:<26} {:>9} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6} {:>8} {:>7} {:>8} {:>6}",
        "", "", "", "µs", "µs", "µs", "µs", "", "", "", "MiB", "busy",
    );
    format!("{first}\n{second}")
}

/// A number with three figures, or all of those before the point.
pub(crate) fn figures(value: f64) -> String {
    let decimals = match value.abs() {
        value if value == 0.0 || value >= 99.95 => 0,
        value if value >= 9.995 => 1,
        value if value >= 0.9995 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_figures_are_kept() {
        for (value, text) in [
            (0.0, "0"),
            (0.1234, "0.123"),
            (1.234, "1.23"),
            (12.34, "12.3"),
        ] {
            assert_eq!(figures(value), text);
        }
        assert_eq!(figures(123_456.7), "123457");
    }

    #[test]
    fn parts_of_few_operations_count() {
        let mut latencies = Histogram::new();
        for _ in 0..3 {
            latencies.record(300_000_000);
        }
        let raw = Raw {
            latencies: &latencies,
            elapsed: Duration::from_millis(1190),
            server: None,
            own_cpu: 0,
            threads: 1,
            bytes: 0,
            in_flight: 1,
        };
        let measured = Measurement::new("s", "readdirplus@1".to_owned(), 1, &raw);
        assert!((measured.operations_per_second - 1.0 / 0.3).abs() < 1e-9);
    }

    #[test]
    fn a_line_of_json_reads_back() {
        let mut latencies = Histogram::new();
        for _ in 0..1000 {
            latencies.record(20_000);
        }
        let raw = Raw {
            latencies: &latencies,
            elapsed: Duration::from_secs(2),
            server: Some(Usage {
                cpu: 5_000_000,
                switches: 100,
                threads: 3,
                memory: 2048,
                private: 1024,
            }),
            own_cpu: 1_000_000_000,
            threads: 1,
            bytes: 4096,
            in_flight: 1,
        };
        let measured = Measurement::new("s", "read/4k@1".to_owned(), 1, &raw);
        let again: Measurement = serde_json::from_str(&measured.json()).unwrap();
        assert_eq!(again.json(), measured.json());
        assert!((again.operations_per_second - 500.0).abs() < 1e-9);
        let used = again.used.unwrap();
        assert!((used.cpu - 5.0).abs() < 1e-9 && (used.switches - 0.1).abs() < 1e-9);
        assert!((again.generator_busy - 0.5).abs() < 1e-9);
    }
}
