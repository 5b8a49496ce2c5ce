//! A request that waits for the host.
//!
//! The invariant: it is counted as in flight until it has ended, also if it panics or is dropped.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Waker};

use super::completion_batch::InFlightGuard;
use crate::io::{self, spawn};

/// A request that waits for the host.
pub(super) struct Waiting {
    request: Pin<Box<dyn Future<Output = ()>>>,
    guard: InFlightGuard,
}

impl Waiting {
    /// `guard` counts `request` as in flight.
    pub(super) fn new(request: Pin<Box<dyn Future<Output = ()>>>, guard: InFlightGuard) -> Self {
        Self { request, guard }
    }

    /// Waits in a task of its own.
    pub(super) fn spawn(self) {
        let Self { request, guard } = self;
        spawn(async move {
            request.await;
            drop(guard);
        });
    }

    /// Waits in this thread, if the request allows that. Returns the request if it waits on.
    pub(super) fn wait_here(mut self) -> Option<Self> {
        let mut context = Context::from_waker(Waker::noop());
        let poll = || io::wait_here(|| self.request.as_mut().poll(&mut context));
        match catch_unwind(AssertUnwindSafe(poll)) {
            Ok(polled) => polled.is_pending().then_some(self),
            Err(_panic) => {
                log::error!("serving a request panicked");
                None
            }
        }
    }
}
