//! How numbers of inodes are hashed. The invariant: equal numbers have equal hashes, within one
//! process; nothing is written down that goes by them.

use std::hash::{BuildHasherDefault, Hasher};

/// Mixes a few integers. The numbers come from the host's file systems and from a counter, so
/// nobody can choose them to collide on purpose.
#[derive(Default)]
pub(super) struct Mixer(u64);

impl Hasher for Mixer {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, word: u64) {
        // The low half of a product depends on the low half of its factors alone; folding the
        // high half in makes each bit of the word reach all of them.
        let product = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ product >> 32;
    }
}

/// Hashes with [`Mixer`].
pub(super) type Mix = BuildHasherDefault<Mixer>;
