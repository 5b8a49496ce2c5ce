//! Checks the used ring against a model of a driver under all interleavings.
//!
//! The driver behaves as Linux does: it requests a call, executes a full barrier, and checks the
//! index once more before it sleeps. A missed notification makes it sleep forever, which loom
//! reports.

use loom::sync::Notify;
use loom::thread;

use super::*;

const SIZE: u16 = 4;

/// Checks at most two preemptions, as the channel's tests do: more take hours and have found
/// nothing.
fn check_interleavings(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(2));
    builder.check(model);
}

fn ring(event_idx: bool) -> Arc<UsedRing> {
    let window = |len: u64| Window::of_len(usize::try_from(len).unwrap());
    Arc::new(UsedRing::new(
        QueueIndex(1),
        SIZE,
        event_idx,
        window(layout::used_len(SIZE)),
        Arc::new(window(layout::available_len(SIZE))),
        None,
        Arc::default(),
    ))
}

fn complete(ring: &UsedRing, head: u16) {
    let returned = Return {
        head,
        len: 0,
        segments: 0,
        marked: false,
    };
    ring.push(returned, QueueStats::default());
}

fn begin(ring: &UsedRing) {
    ring.begin(0, 0, false).1.unwrap();
}

fn used_index(ring: &UsedRing) -> u16 {
    ring.used.load_u16(layout::INDEX, Ordering::Acquire)
}

fn head(ring: &UsedRing, index: u16) -> u16 {
    let at = layout::used_element(index, SIZE);
    ring.used.load_u16(at, Ordering::Relaxed)
}

/// The driver has processed the elements before `seen`, and sleeps until there is another.
fn driver_sleeps(ring: &UsedRing, seen: u16, call: &Notify) {
    let at = layout::used_event(SIZE);
    ring.available.store_u16(at, seen, Ordering::Relaxed);
    ring.available
        .store_u16(layout::FLAGS, 0, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    // A wait may end spuriously.
    while used_index(ring) == seen {
        call.wait();
    }
}

#[test]
fn sleeping_driver_is_called() {
    for event_idx in [false, true] {
        check_interleavings(move || {
            let ring = ring(event_idx);
            begin(&ring);
            complete(&ring, 1);
            ring.publish_index();
            let no_call = layout::NO_INTERRUPT;
            ring.available
                .store_u16(layout::FLAGS, no_call, Ordering::Relaxed);
            let call = Arc::new(Notify::new());
            let worker = {
                let (ring, call) = (Arc::clone(&ring), Arc::clone(&call));
                thread::spawn(move || {
                    begin(&ring);
                    complete(&ring, 2);
                    if ring.publish_index().called {
                        call.notify();
                    }
                })
            };
            driver_sleeps(&ring, 1, &call);
            assert_eq!(head(&ring, 1), 2);
            worker.join().unwrap();
        });
    }
}

#[test]
fn concurrent_pushes_lose_no_element_and_publish_none_early() {
    check_interleavings(|| {
        let ring = ring(true);
        let workers = [1, 2].map(|head| {
            let ring = Arc::clone(&ring);
            thread::spawn(move || {
                begin(&ring);
                complete(&ring, head);
                ring.publish_index();
            })
        });
        for index in 0..used_index(&ring) {
            assert_ne!(head(&ring, index), 0, "published before it was written");
        }
        for worker in workers {
            worker.join().unwrap();
        }
        assert_eq!((used_index(&ring), ring.in_flight()), (2, 0));
        assert_eq!(head(&ring, 0) + head(&ring, 1), 3);
    });
}

#[test]
fn drain_ends_after_last_chain_and_publishes_it() {
    check_interleavings(|| {
        let ring = ring(true);
        begin(&ring);
        begin(&ring);
        let workers = [1, 2].map(|head| {
            let ring = Arc::clone(&ring);
            thread::spawn(move || complete(&ring, head))
        });
        ring.wait_until_drained();
        ring.publish_index();
        assert_eq!(used_index(&ring), 2);
        for worker in workers {
            worker.join().unwrap();
        }
    });
}

#[test]
fn sleeping_worker_is_kicked() {
    for event_idx in [false, true] {
        check_interleavings(move || {
            let ring = ring(event_idx);
            // One chain was taken, and no kick is requested.
            ring.available
                .store_u16(layout::INDEX, 1, Ordering::Relaxed);
            ring.request_kick(None);
            let kick = Arc::new(Notify::new());
            let driver = {
                let (ring, kick) = (Arc::clone(&ring), Arc::clone(&kick));
                thread::spawn(move || {
                    ring.available
                        .store_u16(layout::INDEX, 2, Ordering::Release);
                    fence(Ordering::SeqCst);
                    let wanted = if event_idx {
                        let at = layout::avail_event(SIZE);
                        layout::passes(ring.used.load_u16(at, Ordering::Relaxed), 2, 1)
                    } else {
                        ring.used.load_u16(layout::FLAGS, Ordering::Relaxed) == 0
                    };
                    if wanted {
                        kick.notify();
                    }
                })
            };
            ring.request_kick(Some(1));
            let available_index = || ring.available.load_u16(layout::INDEX, Ordering::Acquire);
            while available_index() == 1 {
                kick.wait();
            }
            driver.join().unwrap();
        });
    }
}
