//! Pseudo-random numbers for offsets and choices: xorshift64*, the same in every run.

/// A generator. Each slot has one of its own.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// The generator with this number.
    pub(crate) fn new(number: u64) -> Self {
        Self((number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `bound`, which is not 0.
    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let upper = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        u32::try_from((upper * u64::from(bound)) >> 32).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_spread_over_all_that_is_below_the_bound() {
        let mut seen = [0_u32; 10];
        let mut random = Random::new(3);
        for _ in 0..10_000 {
            seen[random.below(10) as usize] += 1;
        }
        assert!(
            seen.iter().all(|&count| (800..1200).contains(&count)),
            "{seen:?}"
        );
    }
}
