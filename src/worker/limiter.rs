//! What one worker holds back of a guest that is limited.
//!
//! It decides for each chain whether it may be served now, and knows when the next one may. The
//! invariant: a request is held back by the worker that owns its queue, so that stopping the queue
//! finds it.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use super::limited_transport::LimitedTransport;
use crate::limits::{Buckets, Clock, Lanes};
use crate::metrics::Recorder;
use crate::virtqueue::{Chain, QueueIndex};

/// The most INTERRUPTs that are kept because their request may still arrive.
const MAX_EARLY_INTERRUPTS: usize = 64;

/// The requests that a worker holds back, and the buckets from which they take tokens.
#[derive(Debug)]
pub(super) struct Limiter {
    buckets: Arc<Buckets>,
    clock: Clock,
    lanes: Lanes<QueueIndex, LimitedTransport>,
    /// The numbers of requests that were interrupted and weren't held back.
    early_interrupts: VecDeque<u64>,
}

impl Limiter {
    pub(super) fn new(buckets: Arc<Buckets>, clock: Clock) -> Self {
        Self {
            buckets,
            clock,
            lanes: Lanes::default(),
            early_interrupts: VecDeque::new(),
        }
    }

    /// Replaces the buckets, also for the requests that are held back.
    pub(super) fn replace(&mut self, buckets: Arc<Buckets>) {
        if !Arc::ptr_eq(&self.buckets, &buckets) {
            self.buckets = buckets;
            self.lanes.forget_tokens();
        }
    }

    /// Returns a request that may be served now. Holds back or interrupts any other.
    pub(super) fn admit(
        &mut self,
        chain: Chain,
        recorder: &Rc<Recorder>,
    ) -> Option<LimitedTransport> {
        let request = LimitedTransport::new(chain, recorder);
        let Some(load) = request.load() else {
            return Some(request);
        };
        let now = self.clock.ticks(Instant::now());
        let request = request.pays(&self.buckets);
        if request.is_resumed() {
            // The guest has waited for this one long enough.
            self.buckets.take(load, now);
            return Some(request);
        }
        if !self.early_interrupts.is_empty() {
            let unique = request.unique();
            if let Some(at) = self.early_interrupts.iter().position(|it| *it == unique) {
                self.early_interrupts.remove(at);
                request.interrupt();
                return None;
            }
        }
        let queue = request.used().index();
        self.lanes.submit(&self.buckets, queue, load, request, now)
    }

    /// Returns a request of another worker's queue, which has to be served now.
    pub(super) fn admit_stolen(&self, chain: Chain, recorder: &Rc<Recorder>) -> LimitedTransport {
        let request = LimitedTransport::new(chain, recorder);
        if let Some(load) = request.load() {
            self.buckets.take(load, self.clock.ticks(Instant::now()));
        }
        request.pays(&self.buckets)
    }

    /// Returns the next request that was held back and may be served now.
    pub(super) fn pop_due(&mut self) -> Option<LimitedTransport> {
        if self.lanes.is_empty() {
            return None;
        }
        let now = self.clock.ticks(Instant::now());
        let request = self.lanes.pop_due(&self.buckets, now)?;
        Some(request.pays(&self.buckets))
    }

    /// When the next request may be served, if one is held back.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.lanes.next_due().map(|due| self.clock.instant(due))
    }

    /// Returns all requests of a queue. They pay, and have to be served now.
    pub(super) fn take_queue(&mut self, index: QueueIndex) -> Vec<LimitedTransport> {
        let now = self.clock.ticks(Instant::now());
        self.lanes.take_queue(&self.buckets, index, now)
    }

    /// Returns all requests, because nothing is limited any more.
    pub(super) fn take_all(mut self) -> Vec<LimitedTransport> {
        self.lanes.take_all()
    }

    /// Ends the wait of the request `unique`, or remembers that it isn't to be held back. Returns
    /// the request, if it was held back.
    pub(super) fn interrupt(&mut self, unique: u64) -> Option<LimitedTransport> {
        let found = (self.lanes).remove(&self.buckets, |request| request.unique() == unique);
        if found.is_none() {
            if self.early_interrupts.len() == MAX_EARLY_INTERRUPTS {
                self.early_interrupts.pop_front();
            }
            self.early_interrupts.push_back(unique);
        }
        found
    }
}
