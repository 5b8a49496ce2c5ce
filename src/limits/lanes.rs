//! The requests that one worker holds back.
//!
//! There is one lane for each queue, or for each kind of request of a queue where kinds have limits
//! of their own. Only the requests at the front of a lane have taken tokens: as many as take the
//! lane's buckets a moment. The next ones take theirs when these are served, and get those that come
//! after what all other lanes, also of other workers, have taken meanwhile. So lanes take turns. The
//! invariant: the requests of a lane are served in the order in which they came.

use std::collections::VecDeque;

use super::buckets::{Buckets, Kind, Load};
use super::clock::{MILLISECOND, Ticks};

/// How much of the buckets' time a lane takes in one turn; always one request.
const TURN: Ticks = MILLISECOND;

/// The requests that are held back. `Q` names a queue.
#[derive(Debug)]
pub(crate) struct Lanes<Q, T> {
    lanes: Vec<Lane<Q, T>>,
    /// The lane whose turn it is.
    next: usize,
    len: usize,
}

#[derive(Debug)]
struct Lane<Q, T> {
    queue: Q,
    kind: Option<Kind>,
    requests: VecDeque<Request<T>>,
    /// How many requests at the front have taken their tokens.
    granted: usize,
}

#[derive(Debug)]
struct Request<T> {
    load: Load,
    /// When it may be served, if it has taken its tokens.
    due: Ticks,
    item: T,
}

impl<Q, T> Default for Lanes<Q, T> {
    fn default() -> Self {
        Self {
            lanes: Vec::new(),
            next: 0,
            len: 0,
        }
    }
}

impl<Q: Copy + PartialEq, T> Lanes<Q, T> {
    /// Whether no request is held back.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns a request of `queue` that may be served at once, or holds it back.
    pub(crate) fn submit(
        &mut self,
        buckets: &Buckets,
        queue: Q,
        load: Load,
        item: T,
        now: Ticks,
    ) -> Option<T> {
        let lane = self.lane(queue, buckets.by_kind().then_some(load.kind));
        let mut due = 0;
        if lane.requests.is_empty() {
            due = buckets.take(load, now);
            if due <= now {
                return Some(item);
            }
            lane.granted = 1;
        }
        lane.requests.push_back(Request { load, due, item });
        self.len += 1;
        None
    }

    /// Returns the next request that may be served by now.
    pub(crate) fn pop_due(&mut self, buckets: &Buckets, now: Ticks) -> Option<T> {
        let count = self.lanes.len();
        for at in (0..count).map(|n| (self.next + n) % count) {
            let lane = &mut self.lanes[at];
            lane.grant(buckets, now);
            if lane
                .requests
                .front()
                .is_none_or(|request| request.due > now)
            {
                continue;
            }
            let Some(request) = lane.requests.pop_front() else {
                continue;
            };
            lane.granted -= 1;
            self.len -= 1;
            self.next = if lane.granted == 0 { at + 1 } else { at };
            return Some(request.item);
        }
        None
    }

    /// When the next request may be served, after [`pop_due`](Self::pop_due) has returned none.
    pub(crate) fn next_due(&self) -> Option<Ticks> {
        let fronts = self.lanes.iter().filter_map(|lane| lane.requests.front());
        fronts.map(|request| request.due).min()
    }

    /// Lets all requests take their tokens from other buckets.
    pub(crate) fn forget_tokens(&mut self) {
        for lane in &mut self.lanes {
            lane.granted = 0;
        }
    }

    /// Removes all requests of a queue, which are to be served at once. They take their tokens.
    pub(crate) fn take_queue(&mut self, buckets: &Buckets, queue: Q, now: Ticks) -> Vec<T> {
        let mut taken = Vec::new();
        self.lanes.retain_mut(|lane| {
            if lane.queue != queue {
                return true;
            }
            for (n, request) in lane.requests.drain(..).enumerate() {
                if n >= lane.granted {
                    buckets.take(request.load, now);
                }
                taken.push(request.item);
            }
            false
        });
        self.next = 0;
        self.len -= taken.len();
        taken
    }

    /// Removes all requests.
    pub(crate) fn take_all(&mut self) -> Vec<T> {
        self.len = 0;
        let lanes = self.lanes.drain(..);
        lanes
            .flat_map(|lane| lane.requests)
            .map(|request| request.item)
            .collect()
    }

    /// Removes the first request that `is_wanted` accepts, and puts back its tokens.
    pub(crate) fn remove(
        &mut self,
        buckets: &Buckets,
        is_wanted: impl Fn(&T) -> bool,
    ) -> Option<T> {
        for lane in &mut self.lanes {
            let position = (lane.requests.iter()).position(|request| is_wanted(&request.item));
            let Some((at, request)) = position.and_then(|at| Some((at, lane.requests.remove(at)?)))
            else {
                continue;
            };
            if at < lane.granted {
                lane.granted -= 1;
                buckets.put_back(request.load);
            }
            self.len -= 1;
            return Some(request.item);
        }
        None
    }

    fn lane(&mut self, queue: Q, kind: Option<Kind>) -> &mut Lane<Q, T> {
        let is_own = |lane: &Lane<Q, T>| lane.queue == queue && lane.kind == kind;
        let at = self.lanes.iter().position(is_own).unwrap_or_else(|| {
            self.lanes.push(Lane {
                queue,
                kind,
                requests: VecDeque::new(),
                granted: 0,
            });
            self.lanes.len() - 1
        });
        &mut self.lanes[at]
    }
}

impl<Q, T> Lane<Q, T> {
    /// Lets the lane's first requests take tokens, unless those that have are still there.
    fn grant(&mut self, buckets: &Buckets, now: Ticks) {
        if self.granted != 0 {
            return;
        }
        let mut turn: Ticks = 0;
        for request in &mut self.requests {
            turn = turn.saturating_add(buckets.time_for(request.load));
            if self.granted != 0 && turn > TURN {
                break;
            }
            request.due = buckets.take(request.load, now);
            self.granted += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;
    use crate::limits::clock::{LONGEST, SECOND};
    use crate::limits::{Rate, Settings};

    const START: Ticks = LONGEST + 1000 * SECOND;

    const READ: Load = Load {
        kind: Kind::Read,
        bytes: 0,
    };

    const LOOKUP: Load = Load {
        kind: Kind::Metadata,
        bytes: 0,
    };

    fn rate(per_second: u64) -> Option<Rate> {
        NonZeroU64::new(per_second).map(Rate::of)
    }

    fn operations(per_second: u64) -> Settings {
        Settings {
            operations: rate(per_second),
            ..Settings::default()
        }
    }

    fn empty_buckets(settings: &Settings) -> Buckets {
        Buckets::replacing(settings, None, START).unwrap()
    }

    /// A worker of a simulation. Each queue always has `depth` requests on its ring or held back.
    struct Worker {
        held: Lanes<usize, usize>,
        /// Each queue and its depth.
        queues: Vec<(usize, usize)>,
        /// How late its timer wakes it each time, in turn.
        lateness: Vec<Ticks>,
        wakes: usize,
        at: Ticks,
    }

    impl Worker {
        fn new(queues: &[(usize, usize)], lateness: &[Ticks]) -> Self {
            Self {
                held: Lanes::default(),
                queues: queues.to_vec(),
                lateness: lateness.to_vec(),
                wakes: 0,
                at: START,
            }
        }

        /// Submits until the request is held back.
        fn submit(&mut self, buckets: &Buckets, queue: usize, served: &mut [u64]) {
            while let Some(queue) = self.held.submit(buckets, queue, READ, queue, self.at) {
                served[queue] += 1;
            }
        }

        /// Works at the time that it has, and sets the time of its next work.
        fn work(&mut self, buckets: &Buckets, served: &mut [u64]) {
            if self.wakes == 0 {
                for (queue, depth) in self.queues.clone() {
                    (0..depth).for_each(|_| self.submit(buckets, queue, served));
                }
            }
            while let Some(queue) = self.held.pop_due(buckets, self.at) {
                served[queue] += 1;
                // The guest sends the next one at once.
                self.submit(buckets, queue, served);
            }
            let late = self.lateness[self.wakes % self.lateness.len()];
            self.wakes += 1;
            self.at = self.held.next_due().unwrap() + late;
        }
    }

    /// How many requests of each queue are served in 5 seconds.
    fn simulate(buckets: &Buckets, queues: usize, workers: &mut [Worker]) -> Vec<u64> {
        let mut served = vec![0; queues];
        loop {
            let next = workers.iter_mut().min_by_key(|worker| worker.at).unwrap();
            if next.at > START + 5 * SECOND {
                return served;
            }
            next.work(buckets, &mut served);
        }
    }

    #[test]
    fn rate_is_kept_to_two_percent_by_late_timers() {
        for per_second in [100, 1000, 10_000, 100_000] {
            let late = [0, 3, 1, 4, 1, 5, 9, 2, 6].map(|n| n * MILLISECOND / 4);
            let mut workers = [
                Worker::new(&[(0, 32), (1, 1)], &late),
                Worker::new(&[(2, 128)], &late[3..]),
            ];
            // As at the start of a server.
            let buckets = Buckets::full(&operations(per_second)).unwrap();
            let served: u64 = simulate(&buckets, 3, &mut workers).iter().sum();
            let error = served.abs_diff(5 * per_second);
            assert!(error * 50 <= 5 * per_second, "{per_second}: {served}");
        }
    }

    #[test]
    fn busy_queues_of_one_worker_get_the_same() {
        for per_second in [100, 10_000, 100_000] {
            let queues = [(0, 128), (1, 256), (2, 1024)];
            let mut workers = [Worker::new(&queues, &[MILLISECOND])];
            let served = simulate(&empty_buckets(&operations(per_second)), 3, &mut workers);
            let fair = 5 * per_second / 3;
            for count in &served {
                assert!(
                    count.abs_diff(fair) * 20 <= fair,
                    "{per_second}: {served:?}"
                );
            }
        }
    }

    #[test]
    fn busy_queues_of_different_workers_get_the_same() {
        for per_second in [100, 10_000, 100_000] {
            // The first one always wakes before the second.
            let mut workers = [
                Worker::new(&[(0, 256)], &[MILLISECOND / 8]),
                Worker::new(&[(1, 256)], &[MILLISECOND]),
            ];
            let served = simulate(&empty_buckets(&operations(per_second)), 2, &mut workers);
            let fair = 5 * per_second / 2;
            for count in &served {
                assert!(
                    count.abs_diff(fair) * 10 <= fair,
                    "{per_second}: {served:?}"
                );
            }
        }
    }

    #[test]
    fn lone_request_does_not_wait_behind_backlog_of_another_queue() {
        let buckets = empty_buckets(&operations(1000));
        let mut held = Lanes::default();
        for n in 0..500 {
            assert_eq!(held.submit(&buckets, 1, READ, n, START), None);
        }
        assert_eq!(held.submit(&buckets, 2, READ, 1000, START), None);
        let mut order = Vec::new();
        for n in 1..=3 {
            let now = START + n * MILLISECOND;
            order.extend(std::iter::from_fn(|| held.pop_due(&buckets, now)));
        }
        assert_eq!(order, [0, 1000, 1]);
    }

    #[test]
    fn kind_without_limit_passes_kinds_that_wait() {
        let reads = Settings {
            reads: rate(10),
            ..Settings::default()
        };
        let buckets = empty_buckets(&reads);
        let mut held = Lanes::default();
        assert_eq!(held.submit(&buckets, 1, READ, 'r', START), None);
        assert_eq!(held.submit(&buckets, 1, LOOKUP, 'l', START), Some('l'));
        // Where only all kinds together have a limit, requests keep their order.
        let buckets = empty_buckets(&operations(10));
        let mut held = Lanes::default();
        assert_eq!(held.submit(&buckets, 1, READ, 'r', START), None);
        assert_eq!(held.submit(&buckets, 1, LOOKUP, 'l', START), None);
        let later = START + SECOND;
        assert_eq!(held.pop_due(&buckets, later), Some('r'));
        assert_eq!(held.pop_due(&buckets, later), Some('l'));
        assert_eq!(held.pop_due(&buckets, later), None);
        assert_eq!(held.next_due(), None);
        assert!(held.is_empty());
    }

    #[test]
    fn removed_request_puts_its_tokens_back() {
        let buckets = empty_buckets(&operations(10));
        let mut held = Lanes::default();
        for n in 0..3 {
            assert_eq!(held.submit(&buckets, 1, READ, n, START), None);
        }
        assert_eq!(held.remove(&buckets, |item| *item == 0), Some(0));
        assert_eq!(held.remove(&buckets, |item| *item == 2), Some(2));
        assert_eq!(held.remove(&buckets, |item| *item == 2), None);
        assert_eq!(held.pop_due(&buckets, START), None);
        assert_eq!(held.next_due(), Some(START + SECOND / 10));
        assert_eq!(held.pop_due(&buckets, START + SECOND / 10), Some(1));
    }

    #[test]
    fn requests_of_stopped_queue_are_paid_for() {
        let buckets = empty_buckets(&operations(10));
        let mut held = Lanes::default();
        for n in 0..10 {
            assert_eq!(held.submit(&buckets, n % 2, READ, n, START), None);
        }
        assert_eq!(held.take_queue(&buckets, 0, START), [0, 2, 4, 6, 8]);
        // One of the other queue has its token, and five are owed.
        assert_eq!(held.pop_due(&buckets, START + SECOND), Some(1));
        assert_eq!(held.pop_due(&buckets, START + SECOND / 2), None);
        assert_eq!(held.next_due(), Some(START + 7 * SECOND / 10));
        assert_eq!(held.take_all(), [3, 5, 7, 9]);
        assert!(held.is_empty());
    }

    #[test]
    fn new_buckets_apply_to_requests_that_wait() {
        let slow = empty_buckets(&operations(1));
        let mut held = Lanes::default();
        for n in 0..100 {
            assert_eq!(held.submit(&slow, 1, READ, n, START), None);
        }
        let fast = Buckets::replacing(&operations(1000), Some(&slow), START).unwrap();
        held.forget_tokens();
        let served = std::iter::from_fn(|| held.pop_due(&fast, START + 50 * MILLISECOND));
        assert_eq!(served.count(), 50);
    }
}
