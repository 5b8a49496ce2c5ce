//! Reports that a signal asks for, on the thread that waits for the VMM.
//!
//! The signal makes the socket readable by which the server is stopped, so no thread waits for it
//! alone. The invariant: what asks the server to end is never taken for a request to report.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::control::Handler;

/// Logs reports.
pub(super) struct Reporter {
    stop: UnixStream,
    /// Set before the socket is readable, if the server is to end.
    ending: Arc<AtomicBool>,
    handlers: Mutex<Box<dyn Handler>>,
}

impl Reporter {
    pub(super) fn new(
        stop: UnixStream,
        ending: Arc<AtomicBool>,
        handlers: impl Handler + 'static,
    ) -> Self {
        Self {
            stop,
            ending,
            handlers: Mutex::new(Box::new(handlers)),
        }
    }

    /// Logs a report if that is what the socket has become readable for. Returns whether it is.
    pub(super) fn report(&self) -> bool {
        if self.is_ending() || !self.drain() || self.is_ending() {
            return false;
        }
        let handlers = self.handlers.lock();
        handlers.unwrap_or_else(PoisonError::into_inner).report();
        true
    }

    fn is_ending(&self) -> bool {
        // Acquire: pairs with the handler's store, which precedes what it writes to the socket.
        self.ending.load(Ordering::Acquire)
    }

    /// Takes what is in the socket. Returns whether there was something.
    fn drain(&self) -> bool {
        let mut bytes = [0; 64];
        let mut any = false;
        loop {
            match rustix::net::recv(&self.stop, &mut bytes[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(Errno::AGAIN) => return any,
                Ok(_) => any = true,
                Err(Errno::INTR) => {}
                Err(_) => return any,
            }
        }
    }
}

impl std::fmt::Debug for Reporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reporter").finish_non_exhaustive()
    }
}
