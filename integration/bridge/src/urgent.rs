//! The high-priority queue, which all lanes share.
//!
//! Its requests have no reply, so no lane waits for one: an area that the server has returned is
//! found when the next one is needed. The invariant: an area belongs to a lane, to the server, or
//! is free.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use vmm::memory::MemoryError;
use vmm::ring::RingError;
use vmm::{Buf, Memory, Queue};

use crate::request::Request;
use crate::slot::Area;

/// Requests that may be on the queue.
pub(crate) const AREAS: u16 = 64;

/// How long the server may take for one request.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The high-priority queue.
#[derive(Debug)]
pub(crate) struct Urgent {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    queue: Queue,
    /// Areas that the server may be using, by token.
    in_flight: Vec<Option<Area>>,
    free_areas: Vec<Area>,
    bufs: Vec<Buf>,
}

impl Urgent {
    /// Makes the queue's sender.
    pub(crate) fn new(memory: &Memory, queue: Queue) -> Result<Self, MemoryError> {
        let free_areas: Result<_, _> = (0..AREAS).map(|_| Area::new(memory)).collect();
        let inner = Inner {
            queue,
            in_flight: vec![None; usize::from(AREAS)],
            free_areas: free_areas?,
            bufs: Vec::new(),
        };
        Ok(Self {
            inner: Mutex::new(inner),
        })
    }

    /// Sends the request in `area`, and replaces it by another area.
    pub(crate) fn send(&self, request: &Request, area: &mut Area) -> Result<(), RingError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let inner = &mut *inner;
        inner.reclaim_used()?;
        if inner.free_areas.is_empty() {
            inner.queue.wait(TIMEOUT)?;
            inner.reclaim_used()?;
        }
        let free = inner.in_flight.iter().position(Option::is_none);
        let (Some(free_area), Some(token)) = (inner.free_areas.pop(), free) else {
            let in_flight = inner.queue.in_flight();
            return Err(RingError::TimedOut { in_flight });
        };
        area.readable(request, &mut inner.bufs);
        inner.queue.push(&inner.bufs, &[], token as u64)?;
        inner.queue.kick()?;
        inner.in_flight[token] = Some(std::mem::replace(area, free_area));
        Ok(())
    }

    /// Waits until the server has returned everything that was sent, as a guest does before it sends
    /// DESTROY: a FORGET after the next INIT would be counted against the inodes known then.
    pub(crate) fn settle(&self) -> Result<(), RingError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.reclaim_used()?;
        while inner.queue.in_flight() > 0 {
            inner.queue.wait(TIMEOUT)?;
            inner.reclaim_used()?;
        }
        Ok(())
    }
}

impl Inner {
    fn reclaim_used(&mut self) -> Result<(), RingError> {
        while let Some(used) = self.queue.pop()? {
            let token = usize::try_from(used.token).unwrap_or(usize::MAX);
            self.free_areas
                .extend(self.in_flight.get_mut(token).and_then(Option::take));
        }
        Ok(())
    }
}
