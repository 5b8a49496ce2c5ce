//! A waker that knows whether its future is being polled.
//!
//! A future that is woken while it is polled is polled again at once, because going through the
//! runtime for that would cost a look at epoll each time. The invariant: a wake that comes while
//! the future isn't being polled, or that no poll has seen in the end, is passed on to the runtime.

use std::sync::Arc;
#[cfg(not(ringfsd_loom))]
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Poll, Wake, Waker};

#[cfg(ringfsd_loom)]
use loom::sync::atomic::{AtomicU8, Ordering};

/// Maximum number of polls before the runtime gets its turn.
const MAX_POLLS: usize = 4;

/// The future is being polled, and is polled again if it is woken.
const RUNNING: u8 = 1;
/// It was woken since its last poll began.
const WOKEN: u8 = 2;

/// The waker of one future.
#[derive(Debug)]
pub(super) struct PollWaker {
    runtime: Waker,
    /// [`RUNNING`] and [`WOKEN`], in one word so that a wake and the end of a run are ordered. All
    /// changes are `AcqRel`, so a poll sees what it was woken for.
    state: AtomicU8,
}

impl PollWaker {
    /// Creates the waker of a future whose runtime is woken by `runtime`.
    pub(super) fn new(runtime: Waker) -> Arc<Self> {
        Arc::new(Self {
            runtime,
            state: AtomicU8::new(0),
        })
    }

    /// Calls `poll`, and again while it wakes itself, at most [`MAX_POLLS`] times.
    pub(super) fn run<R>(&self, mut poll: impl FnMut() -> Poll<R>) -> Poll<R> {
        let mut polled = Poll::Pending;
        for _ in 0..MAX_POLLS {
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

impl Wake for PollWaker {
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
    fn wake_reaches_runtime_unless_polled() {
        let count = Arc::new(Count::default());
        let wakes = || count.0.load(Ordering::Relaxed);
        let poll_waker = PollWaker::new(Waker::from(Arc::clone(&count)));
        let waker = Waker::from(Arc::clone(&poll_waker));

        waker.wake_by_ref();
        assert_eq!(wakes(), 1, "nothing was running");

        let mut polls = 0;
        let polled = poll_waker.run(|| {
            polls += 1;
            if polls == 1 {
                waker.wake_by_ref();
            }
            Poll::<()>::Pending
        });
        assert_eq!((polled, polls, wakes()), (Poll::Pending, 2, 1));

        polls = 0;
        let polled = poll_waker.run(|| {
            polls += 1;
            waker.wake_by_ref();
            Poll::<()>::Pending
        });
        assert_eq!((polled, polls, wakes()), (Poll::Pending, MAX_POLLS, 2));

        let polled = poll_waker.run(|| {
            waker.wake_by_ref();
            Poll::Ready(7)
        });
        assert_eq!((polled, wakes()), (Poll::Ready(7), 3));
    }

    #[test]
    fn wake_from_another_thread_is_not_lost() {
        const WAKES: usize = 10_000;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let sent = Arc::new(AtomicUsize::new(0));
        let seen = Arc::new(AtomicUsize::new(0));
        let mut poll_waker = None;
        let mut other = None;
        runtime.block_on(std::future::poll_fn(|cx| {
            let poll_waker = poll_waker.get_or_insert_with(|| PollWaker::new(cx.waker().clone()));
            other.get_or_insert_with(|| {
                let waker = Waker::from(Arc::clone(poll_waker));
                let (sent, seen) = (Arc::clone(&sent), Arc::clone(&seen));
                std::thread::spawn(move || {
                    for n in 1..=WAKES {
                        sent.store(n, Ordering::Relaxed);
                        waker.wake_by_ref();
                        // If a wake is lost, both threads wait forever.
                        while seen.load(Ordering::Acquire) < n {
                            std::thread::yield_now();
                        }
                    }
                })
            });
            poll_waker.run(|| {
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
