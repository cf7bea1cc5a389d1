//! Numbers from a seed: the same on every machine.

/// A xorshift generator, seeded through a SplitMix64 step.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        let mixed = seed.wrapping_add(0x9E37_79B9_7F4A_7C15).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mut random = Self((mixed ^ (mixed >> 29)) | 1);
        (0..4).for_each(|_| {
            random.next();
        });
        random
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11
    }

    /// From `low` up to `high`, without it; `low` where there is nothing between.
    pub(super) fn between(&mut self, low: u64, high: u64) -> u64 {
        if high <= low { low } else { low + self.next() % (high - low) }
    }

    /// Whether something that happens in `percent` of all cases happens now.
    pub(super) fn percent(&mut self, percent: u64) -> bool {
        self.between(0, 1_000) < percent * 10
    }
}
