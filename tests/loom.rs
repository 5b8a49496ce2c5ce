//! Models of what threads share by atomics of our own, the scheduler's channel and the ring's
//! alarm, under every interleaving: `cargo xtask test loom`.
//!
//! A binary of its own: it is built with `--cfg ringfsd_loom`, without which it is empty.

#![cfg(ringfsd_loom)]

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use loom::future::block_on;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use ringfsd::scheduler::{Receiver, channel};

#[path = "../src/io/engine/uring/poll_waker.rs"]
mod poll_waker;

use poll_waker::PollWaker;

/// Runs `model` in every order of events with at most two preemptions, which is where nearly all
/// known faults of this kind lie; without a bound the larger models take hours.
fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(2));
    builder.check(model);
}

/// Registers a receiver among the waiters without blocking, then drops it.
fn wait_and_give_up<T>(receiver: &Receiver<T>) -> Option<T> {
    let mut recv = pin!(receiver.recv());
    match recv.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(item) => item,
        Poll::Pending => {
            thread::yield_now();
            None
        }
    }
}

#[test]
fn two_producers_and_two_consumers_lose_nothing() {
    explore(|| {
        let (sender, receiver) = channel();
        let producers: Vec<_> = [1, 2]
            .map(|item| {
                let sender = sender.clone();
                thread::spawn(move || sender.send(item).unwrap())
            })
            .into();
        drop(sender);
        let other = receiver.clone();
        let consumer = thread::spawn(move || block_on(other.recv()).unwrap_or_default());
        let mut sum = block_on(receiver.recv()).unwrap_or_default();
        sum += consumer.join().unwrap();
        producers.into_iter().for_each(|p| p.join().unwrap());
        assert_eq!(sum, 3);
    });
}

#[test]
fn a_batch_wakes_a_receiver_for_each_item() {
    explore(|| {
        let (sender, receiver) = channel();
        let other = receiver.clone();
        let consumer = thread::spawn(move || block_on(other.recv()).unwrap());
        let producer = thread::spawn(move || {
            sender.send_batch([1, 2]).unwrap();
            sender
        });
        let sum = block_on(receiver.recv()).unwrap() + consumer.join().unwrap();
        assert_eq!(sum, 3);
        drop(producer.join().unwrap());
    });
}

#[test]
fn a_woken_receiver_that_goes_away_wakes_another() {
    explore(|| {
        let (sender, receiver) = channel();
        let impatient = receiver.clone();
        let gives_up = thread::spawn(move || wait_and_give_up(&impatient));
        let patient = thread::spawn(move || block_on(receiver.recv()));
        let producer = thread::spawn(move || {
            sender.send(1).unwrap();
            sender
        });
        let sender = producer.join().unwrap();
        match gives_up.join().unwrap() {
            // It was there in time; the other one needs an item of its own.
            Some(item) => {
                assert_eq!(item, 1);
                sender.send(2).unwrap();
                assert_eq!(patient.join().unwrap(), Some(2));
            }
            None => assert_eq!(patient.join().unwrap(), Some(1)),
        }
    });
}

#[test]
fn closing_ends_every_receiver_and_loses_no_item() {
    explore(|| {
        let (sender, receiver) = channel();
        let other = receiver.clone();
        let consumer = thread::spawn(move || {
            let first = block_on(other.recv());
            let second = if first.is_some() {
                block_on(other.recv())
            } else {
                None
            };
            first.unwrap_or(0) + second.unwrap_or(0)
        });
        let closer = thread::spawn(move || {
            let sent = sender.send(1).is_ok();
            sender.close();
            assert!(sender.send(2).is_err());
            sent
        });
        let first = block_on(receiver.recv());
        let mine = first.unwrap_or(0);
        let theirs = consumer.join().unwrap();
        assert!(closer.join().unwrap());
        assert_eq!(mine + theirs, 1);
        assert_eq!(block_on(receiver.recv()), None);
    });
}

#[test]
fn close_from_the_receiving_end_races_with_send() {
    explore(|| {
        let (sender, receiver) = channel();
        let closer = receiver.clone();
        let closing = thread::spawn(move || closer.close());
        let sending = thread::spawn(move || sender.send(1).is_ok());
        let received = block_on(receiver.recv());
        closing.join().unwrap();
        let sent = sending.join().unwrap();
        let received = received.or_else(|| receiver.try_recv());
        assert_eq!(received.is_some(), sent);
    });
}

/// A runtime that remembers whether it was woken.
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn a_wake_while_a_future_is_polled_is_seen_or_passed_on() {
    explore(|| {
        let runtime = Arc::new(Woken(AtomicBool::new(false)));
        let poll_waker = PollWaker::new(Waker::from(Arc::clone(&runtime)));
        let work = loom::sync::Arc::new(AtomicBool::new(false));
        let other = {
            let (work, waker) = (work.clone(), Waker::from(Arc::clone(&poll_waker)));
            thread::spawn(move || {
                work.store(true, Ordering::Relaxed);
                waker.wake();
            })
        };
        let mut seen = false;
        assert!(
            poll_waker
                .run(|| {
                    seen = work.load(Ordering::Relaxed);
                    Poll::<()>::Pending
                })
                .is_pending()
        );
        if !seen {
            other.join().unwrap();
            assert!(runtime.0.load(Ordering::Acquire), "the wake is lost");
        }
    });
}
