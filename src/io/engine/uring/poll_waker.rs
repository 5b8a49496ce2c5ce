//! A waker that knows whether what it wakes is running just now.
//!
//! A future that is woken while it runs is polled again by whoever runs it, at once: to go
//! through the runtime for that costs a look at epoll each time. The invariant: a wake that
//! comes while nothing runs, or that nobody sees in the end, is passed on.

use std::sync::Arc;
#[cfg(not(ringfsd_loom))]
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Poll, Wake, Waker};

#[cfg(ringfsd_loom)]
use loom::sync::atomic::{AtomicU8, Ordering};

/// Polls of one turn, before the runtime's other business has its turn.
const ROUNDS: usize = 4;

/// The future is being polled, and will be again if it is woken.
const RUNNING: u8 = 1;
/// It was woken since its last poll began.
const WOKEN: u8 = 2;

/// One future's waker.
#[derive(Debug)]
pub(super) struct Alarm {
    runtime: Waker,
    /// [`RUNNING`] and [`WOKEN`]. One word, so that a wake and the end of a run come one after
    /// the other; all changes are `AcqRel`, so a poll sees what it was woken for.
    state: AtomicU8,
}

impl Alarm {
    /// For a future whose runtime is woken by `runtime`.
    pub(super) fn new(runtime: Waker) -> Arc<Self> {
        Arc::new(Self {
            runtime,
            state: AtomicU8::new(0),
        })
    }

    /// Polls by `poll` while it is woken by what it does, a few times at most.
    pub(super) fn run<R>(&self, mut poll: impl FnMut() -> Poll<R>) -> Poll<R> {
        let mut polled = Poll::Pending;
        for _ in 0..ROUNDS {
            self.state.swap(RUNNING, Ordering::AcqRel);
            polled = poll();
            if polled.is_ready() || self.state.load(Ordering::Relaxed) & WOKEN == 0 {
                break;
            }
        }
        if self.state.swap(0, Ordering::AcqRel) & WOKEN != 0 {
            self.runtime.wake_by_ref();
        }
        polled
    }
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.fetch_or(WOKEN, Ordering::AcqRel) & RUNNING == 0 {
            self.runtime.wake_by_ref();
        }
    }
}

#[cfg(all(test, not(ringfsd_loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_wake_goes_on_unless_somebody_polls_for_it() {
        let count = Arc::new(Count::default());
        let wakes = || count.0.load(Ordering::Relaxed);
        let alarm = Alarm::new(Waker::from(Arc::clone(&count)));
        let waker = Waker::from(Arc::clone(&alarm));

        waker.wake_by_ref();
        assert_eq!(wakes(), 1, "nothing was running");

        let mut polls = 0;
        let polled = alarm.run(|| {
            polls += 1;
            if polls == 1 {
                waker.wake_by_ref();
            }
            Poll::<()>::Pending
        });
        assert_eq!((polled, polls, wakes()), (Poll::Pending, 2, 1));

        polls = 0;
        let polled = alarm.run(|| {
            polls += 1;
            waker.wake_by_ref();
            Poll::<()>::Pending
        });
        assert_eq!((polled, polls, wakes()), (Poll::Pending, ROUNDS, 2));

        let polled = alarm.run(|| {
            waker.wake_by_ref();
            Poll::Ready(7)
        });
        assert_eq!((polled, wakes()), (Poll::Ready(7), 3));
    }

    #[test]
    fn no_wake_of_another_thread_is_lost() {
        const WAKES: usize = 10_000;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let sent = Arc::new(AtomicUsize::new(0));
        let seen = Arc::new(AtomicUsize::new(0));
        let mut alarm = None;
        let mut other = None;
        runtime.block_on(std::future::poll_fn(|cx| {
            let alarm = alarm.get_or_insert_with(|| Alarm::new(cx.waker().clone()));
            other.get_or_insert_with(|| {
                let waker = Waker::from(Arc::clone(alarm));
                let (sent, seen) = (Arc::clone(&sent), Arc::clone(&seen));
                std::thread::spawn(move || {
                    for n in 1..=WAKES {
                        sent.store(n, Ordering::Relaxed);
                        waker.wake_by_ref();
                        // A wake that is lost leaves both waiting for ever.
                        while seen.load(Ordering::Acquire) < n {
                            std::thread::yield_now();
                        }
                    }
                })
            });
            alarm.run(|| {
                let n = sent.load(Ordering::Acquire);
                seen.store(n, Ordering::Release);
                if n == WAKES {
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            })
        }));
        other.unwrap().join().unwrap();
    }
}
