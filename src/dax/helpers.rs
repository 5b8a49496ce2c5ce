//! Threads that ask the VMM for something that no request of the guest waits for.
//!
//! The invariant: each thread that was started is joined, or belongs to a process that ends.

use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

/// The threads of a window.
#[derive(Debug, Default)]
pub(super) struct Helpers(Mutex<Vec<JoinHandle<()>>>);

impl Helpers {
    /// Runs `work` on a thread of its own.
    pub(super) fn start(&self, work: impl FnOnce() + Send + 'static) {
        let mut threads = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| !thread.is_finished());
        match Builder::new().name("dax".to_owned()).spawn(work) {
            Ok(thread) => threads.push(thread),
            Err(error) => log::warn!("DAX: no thread to tidy the window: {error}"),
        }
    }

    /// Waits for all of them.
    pub(super) fn join(&self) {
        let threads = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.join().is_err() {
                log::error!("DAX: a thread has panicked");
            }
        }
    }
}
