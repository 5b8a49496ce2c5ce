//! The locks, fences and ring memory of this module: those of the standard library and the guest,
//! or loom's models of them, with which a test checks all interleavings (`RUSTFLAGS="--cfg
//! ringfsd_loom"`).
//!
//! The invariant: code that uses this module is the same in both configurations.

#[cfg(not(ringfsd_loom))]
pub(super) use {
    crate::guest_memory::Window,
    std::sync::{Condvar, Mutex, MutexGuard, atomic::fence},
};

#[cfg(ringfsd_loom)]
pub(super) use {
    loom::sync::{Condvar, Mutex, MutexGuard, atomic::fence},
    model::Window,
};

#[cfg(ringfsd_loom)]
mod model {
    use std::sync::Arc;

    use loom::sync::atomic::{AtomicU16, Ordering};

    use crate::guest_memory::Memory;

    /// Models part of a ring as 16-bit atomics of loom.
    #[derive(Debug)]
    pub(in crate::virtqueue) struct Window(Box<[AtomicU16]>);

    impl Window {
        pub(in crate::virtqueue) fn new(
            _memory: &Arc<Memory>,
            _user: u64,
            len: u64,
            _align: u64,
        ) -> Option<Self> {
            Some(Self::of_len(usize::try_from(len).ok()?))
        }

        pub(in crate::virtqueue) fn of_len(len: usize) -> Self {
            Self((0..len.div_ceil(2)).map(|_| AtomicU16::new(0)).collect())
        }

        pub(in crate::virtqueue) fn read(&self, offset: usize, into: &mut [u8]) {
            for (at, pair) in into.chunks_mut(2).enumerate() {
                let number = self.load_u16(offset + 2 * at, Ordering::Relaxed);
                pair.copy_from_slice(&number.to_le_bytes()[..pair.len()]);
            }
        }

        pub(in crate::virtqueue) fn write(&self, offset: usize, from: &[u8]) {
            for (at, pair) in from.chunks(2).enumerate() {
                let number = u16::from_le_bytes([pair[0], pair[1]]);
                self.store_u16(offset + 2 * at, number, Ordering::Relaxed);
            }
        }

        pub(in crate::virtqueue) fn prefetch(&self, _offset: usize) {}

        pub(in crate::virtqueue) fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
            self.0[offset / 2].load(order)
        }

        pub(in crate::virtqueue) fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
            self.0[offset / 2].store(value, order);
        }
    }
}
