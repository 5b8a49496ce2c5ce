//! The content of the files: different at each offset, so that a byte in the wrong place is
//! detected.
//!
//! The invariant: the content at an offset depends on the seed and the offset only, whatever the
//! sizes in which it is made.

/// Which content: a file's own, or one of two that mark written data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seed(pub(crate) u64);

impl Seed {
    /// The initial content of the large files.
    pub(crate) const MADE: Self = Self(1 << 40);
    /// The content of writes to them.
    pub(crate) const WRITTEN: Self = Self(2 << 40);

    /// The content of the small file with this number.
    pub(crate) fn of_file(number: u32) -> Self {
        Self(u64::from(number))
    }

    /// Fills `bytes` with the content at `offset`, a multiple of 8.
    pub(crate) fn fill(self, offset: u64, bytes: &mut [u8]) {
        for (index, chunk) in (0..).zip(bytes.chunks_mut(8)) {
            let word = self.word(offset / 8 + index).to_le_bytes();
            chunk.copy_from_slice(word.get(..chunk.len()).unwrap_or(&word));
        }
    }

    /// Where `bytes` first differ from the content at `offset`, a multiple of 8.
    pub(crate) fn difference(self, offset: u64, bytes: &[u8]) -> Option<u64> {
        for (index, chunk) in (0..).zip(bytes.chunks(8)) {
            let word = self.word(offset / 8 + index).to_le_bytes();
            if word.get(..chunk.len()) != Some(chunk) {
                let within = chunk.iter().zip(&word).position(|(a, b)| a != b);
                return Some(offset + index * 8 + within.unwrap_or(0) as u64);
            }
        }
        None
    }

    /// SplitMix64, of which each word is a bijection of its index.
    fn word(self, index: u64) -> u64 {
        let mixed = (self.0 ^ index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_does_not_depend_on_the_pieces() {
        let mut whole = [0; 100];
        Seed::MADE.fill(4096, &mut whole);
        let mut part = [0; 20];
        Seed::MADE.fill(4096 + 16, &mut part);
        assert_eq!(part, whole[16..36]);
        assert_eq!(Seed::MADE.difference(4096, &whole), None);
    }

    #[test]
    fn a_wrong_byte_and_a_wrong_place_are_found() {
        let mut bytes = [0; 64];
        Seed::MADE.fill(0, &mut bytes);
        assert_eq!(Seed::MADE.difference(8, &bytes), Some(8));
        assert!(Seed::WRITTEN.difference(0, &bytes).is_some());
        bytes[37] ^= 1;
        assert_eq!(Seed::MADE.difference(0, &bytes), Some(37));
    }
}
