//! Tests of the counters, from the recorders of threads to the sums.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::{
    Count, Ended, Interruption, Process, Recorder, Registry, Row, Server, Shape, SharedFile,
    Snapshot,
};

fn operation(number: u32) -> Option<String> {
    let names = [(3, "getattr"), (15, "read"), (16, "write")];
    let found = names.into_iter().find(|(known, _)| *known == number);
    found.map(|(_, name)| name.to_owned())
}

fn shape(workers: usize, queues: usize) -> Shape {
    Shape {
        workers,
        queues,
        operation,
    }
}

fn registry() -> Arc<Registry> {
    Registry::for_this_process(shape(2, 3)).unwrap()
}

fn open(file: &SharedFile, shape: Shape) -> Arc<Registry> {
    Registry::in_file(duplicate(file), shape).unwrap()
}

fn duplicate(file: &SharedFile) -> OwnedFd {
    file.as_fd().try_clone_to_owned().unwrap()
}

/// The process serves after a pause of this length.
fn interrupt(metrics: &Registry, process: Process, pause: Duration) {
    let since = Duration::from_secs(100);
    metrics.set_interruption(Some(Interruption { process, since }));
    metrics.serves(since + pause);
    metrics.serves(since + pause * 2);
}

/// Serves one request on a thread, and returns the recorder's snapshot.
fn serve(metrics: &Arc<Registry>, thread: usize, ended: Ended) {
    let recorder = metrics.recorder(thread);
    recorder.begin_row(Row::SLOW);
    let begun = recorder.begin();
    assert_eq!(metrics.snapshot().in_flight, 1);
    recorder.end(begun, &ended);
    recorder.end_row();
}

fn read(queue: u16) -> Ended {
    Ended {
        opcode: 15,
        queue,
        read: 4096,
        ..Ended::default()
    }
}

fn counts(snapshot: &Snapshot) -> Vec<(&str, u64, u64)> {
    let operations = snapshot.operations.iter();
    operations
        .map(|stats| (&*stats.operation, stats.requests, stats.errors))
        .collect()
}

#[test]
fn threads_are_added_up() {
    let metrics = registry();
    for thread in 0..3 {
        serve(&metrics, thread, read(1));
    }
    let write = Ended {
        opcode: 16,
        written: 100,
        ..Ended::default()
    };
    serve(&metrics, 1, write);
    let snapshot = metrics.snapshot();
    assert_eq!(counts(&snapshot), [("read", 3, 0), ("write", 1, 0)]);
    assert_eq!(
        (snapshot.bytes_read, snapshot.bytes_written),
        (3 * 4096, 100)
    );
    assert_eq!(snapshot.in_flight, 0);
    assert_eq!(snapshot.requests(), 4);
}

#[test]
fn unknown_opcodes_are_counted_together() {
    let metrics = registry();
    for opcode in [0, 1, 63, 64, 4096, u32::MAX] {
        let errno = 38;
        let ended = Ended {
            opcode,
            errno,
            ..Ended::default()
        };
        serve(&metrics, 1, ended);
    }
    assert_eq!(counts(&metrics.snapshot()), [("unknown", 6, 6)]);
}

#[test]
fn errors_are_counted_by_operation_and_errno_within_bounds() {
    let metrics = registry();
    for thread in [1, 2] {
        for errno in 1..=400 {
            let ended = Ended {
                opcode: 3,
                errno,
                ..Ended::default()
            };
            serve(&metrics, thread, ended);
        }
    }
    let snapshot = metrics.snapshot();
    let (others, known): (Vec<_>, Vec<_>) = snapshot
        .errors
        .iter()
        .partition(|error| error.operation == "any");
    assert_eq!(known.len(), 127);
    assert!(
        known
            .iter()
            .all(|error| error.operation == "getattr" && error.count == 2)
    );
    assert_eq!(others.len(), 1);
    assert_eq!((others[0].errno, others[0].count), (0, 2 * (400 - 127)));
}

#[test]
fn durations_are_measured_only_on_request() {
    let metrics = registry();
    serve(&metrics, 1, read(1));
    let snapshot = metrics.snapshot();
    assert_eq!(snapshot.latency().count(), 0);
    assert!(snapshot.queues.is_empty());
    metrics.set_timed(true);
    serve(&metrics, 1, read(2));
    serve(&metrics, 2, read(9));
    let snapshot = metrics.snapshot();
    let read = snapshot.operation("read").unwrap();
    assert_eq!((read.requests, read.latency.count()), (3, 2));
    assert!(read.latency.sum > 0 && read.latency.quantile(0.5).is_some());
    let queues = snapshot.queues.iter();
    // A queue that doesn't exist counts as the last one.
    let queues: Vec<_> = queues.map(|it| (it.queue, it.latency.count())).collect();
    assert_eq!(queues, [(2, 2)]);
}

/// A long row of requests that take little time.
const LONG: Row = Row {
    requests: 64,
    is_fast: true,
};

/// Serves requests of these opcodes one after the other, and returns how many were timed.
fn serve_row(recorder: &Recorder, row: Row, opcodes: impl IntoIterator<Item = u32>) -> usize {
    recorder.begin_row(row);
    let mut timed = 0;
    for opcode in opcodes {
        let begun = recorder.begin();
        timed += usize::from(begun.is_timed());
        let ended = Ended {
            opcode,
            queue: 1,
            ..Ended::default()
        };
        recorder.end(begun, &ended);
    }
    recorder.end_row();
    timed
}

#[test]
fn each_request_of_a_short_or_slow_row_is_timed() {
    let metrics = registry();
    metrics.set_timed(true);
    let recorder = metrics.recorder(1);
    let row = |requests, is_fast| Row { requests, is_fast };
    for (row, count) in [(row(4, true), 4), (row(64, false), 64)] {
        assert_eq!(serve_row(&recorder, row, vec![15; count]), count);
    }
    assert_eq!(metrics.snapshot().latency().count(), 68);
}

#[test]
fn part_of_a_long_row_is_timed_and_stands_for_all() {
    let metrics = registry();
    metrics.set_timed(true);
    let recorder = metrics.recorder(1);
    let (mut timed, mut before) = (0, metrics.snapshot());
    for row in 1..=1000 {
        // Two of three are GETATTR.
        timed += serve_row(&recorder, LONG, (0..60).map(|n| [3, 15, 3][n % 3]));
        let snapshot = metrics.snapshot();
        for stats in &snapshot.operations {
            let counted = stats.latency.count();
            let earlier = before.operation(&stats.operation);
            let earlier = earlier.map_or(0, |earlier| earlier.latency.count());
            assert!(
                counted >= earlier && counted <= stats.requests,
                "{row}: {stats:?}"
            );
            // Until one of its requests was timed, nothing is known of an operation.
            assert!(counted == stats.requests || counted == 0, "{stats:?}");
        }
        before = snapshot;
    }
    assert_eq!(before.operation("getattr").unwrap().latency.count(), 40_000);
    assert_eq!(before.operation("read").unwrap().latency.count(), 20_000);
    assert_eq!(before.queues[0].latency, before.latency());
    // One in eight: six standard deviations are less than 500.
    assert!((7_000..8_000).contains(&timed), "{timed}");
}

#[test]
fn durations_of_a_sample_are_those_of_all_requests() {
    let metrics = registry();
    metrics.set_timed(true);
    let recorder = metrics.recorder(1);
    // Where in a row a request is, and how long those beside it take, makes no difference.
    let is_slow = |at: usize| at.is_multiple_of(10);
    for _ in 0..400 {
        recorder.begin_row(LONG);
        for at in 0..60 {
            let begun = recorder.begin();
            if is_slow(at) {
                let start = std::time::Instant::now();
                while start.elapsed() < Duration::from_micros(20) {}
            }
            recorder.end(
                begun,
                &Ended {
                    opcode: 3,
                    queue: 1,
                    ..Ended::default()
                },
            );
        }
        recorder.end_row();
    }
    let latency = metrics.snapshot().latency();
    assert_eq!(latency.count(), 24_000);
    let slow: u64 = (0..)
        .zip(&latency.buckets)
        .filter(|(bucket, _)| *bucket >= super::buckets::bucket_of(20_000))
        .map(|it| it.1)
        .sum();
    // 2,400 requests are slow; 300 of them are timed, and a sixth is three standard deviations.
    assert!((1_900..3_000).contains(&slow), "{slow}");
}

#[test]
fn request_that_waits_is_counted_when_it_has_ended() {
    let metrics = registry();
    metrics.set_timed(true);
    let recorder = metrics.recorder(1);
    serve_row(&recorder, LONG, [15; 64]);
    recorder.begin_row(LONG);
    let waiting: Vec<_> = (0..32).map(|_| recorder.begin()).collect();
    waiting.iter().for_each(|_| recorder.begin_wait());
    recorder.end_row();
    for begun in waiting {
        recorder.end(begun, &read(1));
        recorder.end_wait();
    }
    let snapshot = metrics.snapshot();
    assert_eq!((snapshot.requests(), snapshot.latency().count()), (96, 96));
    assert_eq!(snapshot.in_flight, 0);
}

#[test]
fn requests_that_end_while_nothing_is_timed_are_never_counted_as_timed() {
    let metrics = registry();
    let recorder = metrics.recorder(1);
    for counted in [64, 128] {
        metrics.set_timed(true);
        serve_row(&recorder, LONG, [15; 64]);
        metrics.set_timed(false);
        serve_row(&recorder, LONG, [15; 64]);
        let snapshot = metrics.snapshot();
        let latency = snapshot.latency().count();
        assert_eq!((snapshot.requests(), latency), (counted * 2, counted));
    }
}

#[test]
fn requests_that_wait_are_in_flight_besides_the_one_that_is_served() {
    let metrics = registry();
    let recorder = metrics.recorder(1);
    recorder.begin_row(Row::SLOW);
    recorder.begin_wait();
    recorder.begin_wait();
    assert_eq!(metrics.snapshot().in_flight, 3);
    recorder.end_row();
    assert_eq!(metrics.snapshot().in_flight, 2);
    recorder.end_wait();
    recorder.end_wait();
    let snapshot = metrics.snapshot();
    assert_eq!((snapshot.in_flight, snapshot.threads.deferred), (0, 2));
}

#[test]
fn what_is_always_timed_stays_so() {
    let metrics = registry();
    metrics.set_timed(true);
    metrics.set_timed(false);
    assert!(!metrics.is_timed());
    metrics.keep_timed();
    metrics.set_timed(false);
    assert!(metrics.is_timed());
}

#[test]
fn request_that_began_untimed_stays_untimed() {
    let metrics = registry();
    let recorder = metrics.recorder(1);
    recorder.begin_row(Row::SLOW);
    let begun = recorder.begin();
    metrics.set_timed(true);
    recorder.end(begun, &read(1));
    assert_eq!(metrics.snapshot().latency().count(), 0);
}

#[test]
fn batches_and_depths_are_counted_by_powers_of_two() {
    let metrics = registry();
    let recorder = metrics.recorder(1);
    recorder.published(0, false);
    for (chains, called) in [(1, true), (3, false), (4, true)] {
        recorder.published(chains, called);
    }
    for chains in [0, 1, 64, usize::MAX] {
        recorder.found(chains);
    }
    let snapshot = metrics.snapshot();
    assert_eq!((snapshot.threads.batches, snapshot.threads.calls), (3, 2));
    assert_eq!(snapshot.batch_sizes[..5], [0, 1, 1, 1, 0]);
    let depths: Vec<_> = (0..)
        .zip(&snapshot.queue_depths)
        .filter(|it| *it.1 != 0)
        .collect();
    assert_eq!(depths, [(0, &1), (1, &1), (7, &1), (15, &1)]);
}

#[test]
fn next_process_continues_with_the_counters() {
    let file = SharedFile::create(&shape(2, 3)).unwrap();
    let first = open(&file, shape(2, 3));
    first.set_timed(true);
    serve(&first, 1, read(1));
    first.count(Server::Connections);
    // A request that was in flight when the process was killed.
    first.recorder(2).begin_wait();
    let began = first.snapshot().began;
    drop(first);
    let next = open(&file, shape(2, 3));
    interrupt(&next, Process::Recovery, Duration::from_millis(3));
    (1..=2).for_each(|thread| drop(next.recorder(thread)));
    serve(&next, 1, read(1));
    let snapshot = next.snapshot();
    assert_eq!(counts(&snapshot), [("read", 2, 0)]);
    assert_eq!(snapshot.latency().count(), 1);
    assert_eq!((snapshot.connections, snapshot.in_flight), (1, 0));
    assert_eq!(snapshot.began, began);
    let restarts = snapshot.recoveries.restarts;
    assert_eq!((restarts.count, restarts.pauses.sum), (1, 3_000_000));
    assert_eq!(restarts.pauses.count(), 1);
}

#[test]
fn evictions_continue_where_the_last_process_ended() {
    let file = SharedFile::create(&shape(1, 1)).unwrap();
    let evictions = |so_far| {
        let metrics = open(&file, shape(1, 1));
        metrics.set_usage(move || super::Usage {
            evictions: so_far,
            ..super::Usage::default()
        });
        assert_eq!(
            metrics.snapshot().usage.evictions,
            metrics.snapshot().usage.evictions
        );
        metrics.snapshot().usage.evictions
    };
    assert_eq!([evictions(5), evictions(0), evictions(7)], [5, 5, 12]);
}

#[test]
fn same_layout_is_continued_in_the_same_file() {
    let file = SharedFile::create(&shape(2, 3)).unwrap();
    serve(&open(&file, shape(2, 3)), 1, read(1));
    let next = SharedFile::take_over(&shape(2, 3), duplicate(&file)).unwrap();
    serve(&open(&next, shape(2, 3)), 1, read(1));
    assert_eq!(open(&file, shape(2, 3)).snapshot().requests(), 2);
}

#[test]
fn another_layout_begins_with_the_sums() {
    let file = SharedFile::create(&shape(2, 3)).unwrap();
    let metrics = open(&file, shape(2, 3));
    metrics.set_timed(true);
    for thread in 0..3 {
        serve(&metrics, thread, read(1));
        let errno = 2;
        let ended = Ended {
            opcode: 3,
            errno,
            ..Ended::default()
        };
        serve(&metrics, thread, ended);
        metrics.recorder(thread).count(Count::Kicks, 10);
    }
    // In flight in a process that has ended.
    metrics.recorder(1).begin_wait();
    metrics.count(Server::Connections);
    interrupt(&metrics, Process::Upgrade, Duration::from_secs(1));
    let before = Snapshot {
        in_flight: 0,
        timed: false,
        ..metrics.snapshot()
    };
    for other in [shape(5, 9), shape(1, 2)] {
        let next = SharedFile::take_over(&other, duplicate(&file)).unwrap();
        assert_eq!(open(&next, other).snapshot(), before);
    }
}

#[test]
fn file_that_is_no_counters_is_left_out() {
    let file = SharedFile::create(&shape(2, 3)).unwrap();
    serve(&open(&file, shape(2, 3)), 1, read(1));
    let version = duplicate(&file);
    rustix::io::pwrite(&version, &7_u64.to_ne_bytes(), 8).unwrap();
    let empty = std::fs::File::open("/dev/null").unwrap();
    for foreign in [version, empty.into()] {
        let next = SharedFile::take_over(&shape(2, 3), foreign).unwrap();
        assert_eq!(open(&next, shape(2, 3)).snapshot().requests(), 0);
    }
}

#[test]
fn file_can_t_be_truncated() {
    let file = SharedFile::create(&shape(2, 3)).unwrap();
    assert!(rustix::fs::ftruncate(file.as_fd(), 0).is_err());
}

#[test]
fn memory_that_no_thread_uses_is_not_allocated() {
    let file = SharedFile::create(&shape(64, 64)).unwrap();
    let metrics = open(&file, shape(64, 64));
    metrics.set_timed(true);
    serve(&metrics, 1, read(1));
    assert_eq!(metrics.snapshot().requests(), 1);
    let stat = rustix::fs::fstat(&file).unwrap();
    // The header, one page of each of 65 threads, and two or three of histograms.
    assert!(
        stat.st_blocks * 512 <= (2 + 65 + 4) * 4096,
        "{}",
        stat.st_blocks
    );
}
