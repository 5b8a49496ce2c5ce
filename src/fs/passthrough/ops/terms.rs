//! What INIT has negotiated.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::fs::passthrough::open_files::IMPLICIT;
use crate::fs::{Handle, HandleKind, NegotiatedTerms};

/// The [`NegotiatedTerms`] in force. They change only while no request is running, so accesses to
/// them order nothing.
#[derive(Debug, Default)]
pub(crate) struct CurrentTerms {
    collects_writes: AtomicBool,
    no_open: AtomicBool,
    no_opendir: AtomicBool,
    idmapped: AtomicBool,
}

impl CurrentTerms {
    pub(crate) fn set(&self, terms: &NegotiatedTerms) {
        self.collects_writes
            .store(terms.collects_writes, Ordering::Relaxed);
        self.no_open.store(terms.no_open, Ordering::Relaxed);
        self.no_opendir.store(terms.no_opendir, Ordering::Relaxed);
        self.idmapped.store(terms.idmapped, Ordering::Relaxed);
    }

    pub(crate) fn collects_writes(&self) -> bool {
        self.collects_writes.load(Ordering::Relaxed)
    }

    pub(crate) fn no_open(&self) -> bool {
        self.no_open.load(Ordering::Relaxed)
    }

    pub(crate) fn no_opendir(&self) -> bool {
        self.no_opendir.load(Ordering::Relaxed)
    }

    pub(crate) fn idmapped(&self) -> bool {
        self.idmapped.load(Ordering::Relaxed)
    }

    /// Whether `handle` refers to a file that the guest opened without OPEN.
    pub(crate) fn is_implicit(&self, handle: Handle, kind: HandleKind) -> bool {
        handle == IMPLICIT
            && match kind {
                HandleKind::File => self.no_open(),
                HandleKind::Directory => self.no_opendir(),
            }
    }

    /// `handle`, unless it refers to a file that was opened without OPEN.
    pub(crate) fn explicit(&self, handle: Option<Handle>) -> Option<Handle> {
        let implicit = |handle| {
            self.is_implicit(handle, HandleKind::File)
                || self.is_implicit(handle, HandleKind::Directory)
        };
        handle.filter(|handle| !implicit(*handle))
    }
}
