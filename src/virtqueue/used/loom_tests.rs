//! The used ring against a driver, under every order of events.
//!
//! The driver is played as Linux is: it stores its wish, makes a full barrier, and looks once
//! more before it sleeps. Whoever is forgotten sleeps for ever, which loom reports.

use loom::sync::Notify;
use loom::thread;

use super::*;

const SIZE: u16 = 4;

/// As for the channel: more preemptions than two take hours and have found nothing.
fn every_order(model: impl Fn() + Sync + Send + 'static) {
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
    let back = Return {
        head,
        len: 0,
        pieces: 0,
        marked: false,
    };
    ring.push(back, QueueStats::default());
}

fn take(ring: &UsedRing) {
    ring.take(0, 0, false).1.unwrap();
}

fn used_index(ring: &UsedRing) -> u16 {
    ring.used.load_u16(layout::INDEX, Ordering::Acquire)
}

fn head(ring: &UsedRing, index: u16) -> u16 {
    let at = layout::used_element(index, SIZE);
    ring.used.load_u16(at, Ordering::Relaxed)
}

/// The driver has seen the elements before `seen` and sleeps until there is another.
fn driver_sleeps(ring: &UsedRing, seen: u16, call: &Notify) {
    let at = layout::used_event(SIZE);
    ring.available.store_u16(at, seen, Ordering::Relaxed);
    ring.available
        .store_u16(layout::FLAGS, 0, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    // A sleep may end for nothing, so it is a loop.
    while used_index(ring) == seen {
        call.wait();
    }
}

#[test]
fn a_driver_that_sleeps_is_called() {
    for event_idx in [false, true] {
        every_order(move || {
            let ring = ring(event_idx);
            take(&ring);
            complete(&ring, 1);
            ring.show();
            let no_call = layout::NO_INTERRUPT;
            ring.available
                .store_u16(layout::FLAGS, no_call, Ordering::Relaxed);
            let call = Arc::new(Notify::new());
            let worker = {
                let (ring, call) = (Arc::clone(&ring), Arc::clone(&call));
                thread::spawn(move || {
                    take(&ring);
                    complete(&ring, 2);
                    if ring.show() {
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
fn two_workers_lose_no_element_and_show_none_too_early() {
    every_order(|| {
        let ring = ring(true);
        let workers = [1, 2].map(|head| {
            let ring = Arc::clone(&ring);
            thread::spawn(move || {
                take(&ring);
                complete(&ring, head);
                ring.show();
            })
        });
        for index in 0..used_index(&ring) {
            assert_ne!(head(&ring, index), 0, "shown before it was written");
        }
        for worker in workers {
            worker.join().unwrap();
        }
        assert_eq!((used_index(&ring), ring.in_flight()), (2, 0));
        assert_eq!(head(&ring, 0) + head(&ring, 1), 3);
    });
}

#[test]
fn draining_ends_with_the_last_chain_and_shows_it() {
    every_order(|| {
        let ring = ring(true);
        take(&ring);
        take(&ring);
        let workers = [1, 2].map(|head| {
            let ring = Arc::clone(&ring);
            thread::spawn(move || complete(&ring, head))
        });
        ring.wait_until_drained();
        ring.show();
        assert_eq!(used_index(&ring), 2);
        for worker in workers {
            worker.join().unwrap();
        }
    });
}

#[test]
fn a_worker_that_sleeps_is_kicked() {
    for event_idx in [false, true] {
        every_order(move || {
            let ring = ring(event_idx);
            // One chain has been taken, and no kick is wanted.
            ring.available
                .store_u16(layout::INDEX, 1, Ordering::Relaxed);
            ring.want_kick(None);
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
            ring.want_kick(Some(1));
            let there = || ring.available.load_u16(layout::INDEX, Ordering::Acquire);
            while there() == 1 {
                kick.wait();
            }
            driver.join().unwrap();
        });
    }
}
