//! An allocator that counts, for tests that assert how much is allocated:
//!
//! ```
//! #[global_allocator]
//! static COUNTING: testing::allocations::Counting = testing::allocations::Counting;
//!
//! let before = testing::allocations::of_this_thread();
//! drop(Box::new(1));
//! assert_eq!(testing::allocations::of_this_thread(), before + 1);
//! ```
//!
//! The invariant: counting doesn't allocate.

#![expect(unsafe_code, reason = "an allocator can't be written without")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

thread_local! {
    static OF_THREAD: Cell<usize> = const { Cell::new(0) };
    static LEFT_OUT: Cell<bool> = const { Cell::new(false) };
}

static OF_ALL: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted.
#[derive(Clone, Copy, Debug)]
pub struct Counting;

// SAFETY: each method passes its arguments to `System`'s method of the same name, whose contract
// is the one that the caller upholds; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that ends may allocate after its variables are gone.
        let _ = OF_THREAD.try_with(|count| count.set(count.get() + 1));
        if LEFT_OUT.try_with(Cell::get) == Ok(false) {
            OF_ALL.fetch_add(1, Ordering::Relaxed);
        }
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller upholds `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller upholds `dealloc`'s contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Allocations of this thread so far.
#[must_use]
pub fn of_this_thread() -> usize {
    OF_THREAD.get()
}

/// Allocations so far of all threads but those that are left out.
#[must_use]
pub fn of_all_threads() -> usize {
    OF_ALL.load(Ordering::SeqCst)
}

/// Leaves this thread out of [`of_all_threads`] from now on.
pub fn leave_out_this_thread() {
    LEFT_OUT.set(true);
}

/// Bytes that are allocated now.
#[must_use]
pub fn bytes_in_use() -> usize {
    BYTES.load(Ordering::Relaxed)
}
