//! Tests of waits for locks.

use std::time::Duration;

use super::*;
use crate::fuse::session::replay::RECORDED;

fn limited(limit: Duration) -> Guest {
    Guest::with_options(SessionOptions {
        lock_wait_limit: limit,
        ..SessionOptions::default()
    })
}

#[test]
fn wait_without_limit_records_no_intent() {
    let (mut transport, _) = MemoryTransport::new(Vec::new(), 0);
    let guest = limited(Duration::ZERO);
    assert_eq!(guest.session.wait_limit(&mut transport), None);
    assert_eq!(transport.recorded_intent(), None);
}

#[test]
fn replayed_wait_counts_from_its_first_start() {
    let hour = Duration::from_secs(3600);
    let guest = limited(hour);
    let (mut first, _) = MemoryTransport::new(Vec::new(), 0);
    assert_eq!(guest.session.wait_limit(&mut first), Some(hour));
    let intent = first.recorded_intent().unwrap();
    assert_eq!(intent[0], RECORDED);

    let mut replayed = MemoryTransport::with_previous_attempt(intent);
    assert!(guest.session.wait_limit(&mut replayed).unwrap() <= hour);
    assert_eq!(replayed.recorded_intent(), None, "it is unchanged");
    // The machine has been up for longer than a millisecond.
    let mut old = MemoryTransport::with_previous_attempt([RECORDED, 1, 0, 0]);
    let short = limited(Duration::from_millis(1));
    assert_eq!(short.session.wait_limit(&mut old), Some(Duration::ZERO));
    // Killed before it recorded the time, or the host has rebooted since.
    let mut silent = MemoryTransport::with_previous_attempt([0; 4]);
    assert_eq!(guest.session.wait_limit(&mut silent), Some(hour));
    assert!(silent.recorded_intent().is_some());
    let mut before_boot = MemoryTransport::with_previous_attempt([RECORDED, u64::MAX, 0, 0]);
    assert_eq!(guest.session.wait_limit(&mut before_boot), Some(hour));
}
