//! The host's memory of one region, which another part of the process has mapped.
//!
//! Such memory isn't watched for SIGBUS: whoever mapped it decides about the process's signals. The
//! invariant: a region keeps the whole memory that it is part of, and so its mapping.

use std::fmt;
use std::sync::Arc;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The host's memory of one region, and what keeps it mapped.
#[derive(Clone)]
pub(super) struct Borrowed {
    start: *mut u8,
    len: usize,
    _guard: Arc<dyn Send + Sync>,
}

// SAFETY: the pointer is to memory that the guest changes at any time, of which no reference is ever
// made; and the guard, which keeps it mapped on whatever thread, is itself `Send`.
unsafe impl Send for Borrowed {}
// SAFETY: as above, and the guard is `Sync`.
unsafe impl Sync for Borrowed {}

impl Borrowed {
    /// The memory of `slice`, which stays valid as long as `guard` exists.
    ///
    /// # Safety
    ///
    /// `guard` owns what the slice was borrowed from.
    pub(super) unsafe fn new<B: BitmapSlice>(
        slice: &VolatileSlice<'_, B>,
        guard: Arc<dyn Send + Sync>,
    ) -> Self {
        Self {
            start: slice.ptr_guard_mut().as_ptr(),
            len: slice.len(),
            _guard: guard,
        }
    }

    /// The `len` bytes at `start`.
    ///
    /// # Safety
    ///
    /// They are mapped for reading and writing, without a reference to them, as long as `guard` exists.
    pub(super) unsafe fn from_raw(start: *mut u8, len: usize, guard: Arc<dyn Send + Sync>) -> Self {
        Self {
            start,
            len,
            _guard: guard,
        }
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

impl fmt::Debug for Borrowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Borrowed")
            .field("start", &self.start)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}
