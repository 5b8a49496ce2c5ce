//! Adds up the counters of all threads.
//!
//! The invariant: no memory is read that no thread has used, as reading would allocate it.

use std::collections::BTreeMap;

use super::buckets::BUCKETS;
use super::layout::{
    Count, Gauge, Layout, MAX_QUEUES, OPCODES, OTHERS, PROCESS, Process, ROW, Section, Server,
    error_of,
};
use super::snapshot::{
    ErrorCount, GuestFaults, Histogram, OperationStats, QueueStats, Recoveries, Restarts, Snapshot,
    ThreadStats,
};

/// Reads counters.
pub(super) struct Reader<'a, R> {
    pub(super) layout: &'a Layout,
    pub(super) word: R,
}

impl<R: Fn(usize) -> u64> Reader<'_, R> {
    /// Reads everything that is in the shared memory.
    pub(super) fn read(&self, operation: fn(u32) -> Option<String>) -> Snapshot {
        let name = |row: usize| {
            let number = u32::try_from(row).unwrap_or(0);
            operation(number).unwrap_or_else(|| "unknown".to_owned())
        };
        let errors = self.errors(name);
        let requests = self.sums(Section::Requests);
        let rows = self.rows(Section::OpcodeLatency, Gauge::Opcodes, OPCODES);
        let mut operations = Vec::new();
        for (row, requests) in requests.into_iter().enumerate() {
            if requests != 0 {
                let operation = name(row);
                let failed = errors.iter().filter(|error| error.operation == operation);
                operations.push(OperationStats {
                    errors: failed.map(|error| error.count).sum(),
                    latency: rows.get(&row).cloned().unwrap_or_default(),
                    operation,
                    requests,
                });
            }
        }
        let queues = self.rows(Section::QueueLatency, Gauge::Queues, MAX_QUEUES);
        let queues = queues.into_iter().map(|(queue, latency)| QueueStats {
            queue: u16::try_from(queue).unwrap_or(u16::MAX),
            latency,
        });
        let counts = self.sums(Section::Counts);
        let count = |count: Count| counts.get(count as usize).copied().unwrap_or(0);
        let batch_sizes = self.sums(Section::Batches);
        let server = |count: Server| {
            let part = self.layout.part(Section::Server);
            (self.word)(part.first + count as usize)
        };
        Snapshot {
            began: server(Server::Began),
            operations,
            queues: queues.collect(),
            errors,
            bytes_read: count(Count::BytesRead),
            bytes_written: count(Count::BytesWritten),
            in_flight: self.sums(Section::Gauges)[Gauge::InFlight as usize],
            threads: ThreadStats {
                kicks: count(Count::Kicks),
                calls: count(Count::Calls),
                batches: batch_sizes.iter().sum(),
                published_chains: count(Count::PublishedChains),
                found_chains: count(Count::FoundChains),
                offloaded: count(Count::Offloaded),
                stolen: count(Count::Stolen),
                deferred: count(Count::Deferred),
            },
            batch_sizes,
            queue_depths: self.sums(Section::Depths),
            guest_faults: GuestFaults {
                malformed_requests: count(Count::Malformed),
                faulty_chains: count(Count::FaultyChains),
                dropped_requests: count(Count::Dropped),
            },
            connections: server(Server::Connections),
            recoveries: Recoveries {
                resumed_sessions: server(Server::Resumed),
                engine_fallbacks: server(Server::EngineFallbacks),
                restarts: self.process(Process::Recovery),
                upgrades: self.process(Process::Upgrade),
                failed_upgrades: self.process(Process::FailedUpgrade),
            },
            ..Snapshot::default()
        }
    }

    /// The sums of a section's words.
    fn sums(&self, section: Section) -> Vec<u64> {
        let mut sums = vec![0_u64; self.layout.part(section).words];
        for start in self.layout.starts(section) {
            for (at, sum) in (start..).zip(&mut sums) {
                *sum = sum.wrapping_add((self.word)(at));
            }
        }
        sums
    }

    /// The sums of the histograms that are marked as in use, of `count` rows.
    fn rows(&self, section: Section, marks: Gauge, count: usize) -> BTreeMap<usize, Histogram> {
        let mut rows = BTreeMap::<usize, Histogram>::new();
        let count = count.min(self.layout.part(section).words / ROW);
        let blocks = self.layout.starts(section);
        for (start, gauges) in blocks.zip(self.layout.starts(Section::Gauges)) {
            let is_marked = |row: &usize| {
                let word = (self.word)(gauges + marks as usize + row / 64);
                word >> (row % 64) & 1 != 0
            };
            for row in (0..count).filter(is_marked) {
                rows.entry(row)
                    .or_default()
                    .add(&self.histogram(start + row * ROW));
            }
        }
        rows
    }

    fn histogram(&self, first: usize) -> Histogram {
        Histogram {
            sum: (self.word)(first),
            buckets: (first + 1..).take(BUCKETS).map(&self.word).collect(),
        }
    }

    fn process(&self, process: Process) -> Restarts {
        let first = self.layout.part(Section::Processes).first + process as usize * PROCESS;
        Restarts {
            count: (self.word)(first),
            pauses: self.histogram(first + 1),
        }
    }

    fn errors(&self, name: impl Fn(usize) -> String) -> Vec<ErrorCount> {
        let mut errors = BTreeMap::<u64, u64>::new();
        for start in self.layout.starts(Section::Errors) {
            for at in (start..start + self.layout.part(Section::Errors).words).step_by(2) {
                let key = (self.word)(at);
                if key != 0 {
                    let sum = errors.entry(key).or_default();
                    *sum = sum.wrapping_add((self.word)(at + 1));
                }
            }
        }
        let count = |(key, count)| {
            let (row, errno) = error_of(key);
            ErrorCount {
                operation: match key {
                    OTHERS => "any".to_owned(),
                    _ => name(row),
                },
                errno,
                count,
            }
        };
        errors.into_iter().map(count).collect()
    }
}
