//! Pseudo-random numbers for what the program makes up.

/// Uniform pseudo-random numbers, the same in every run (SplitMix64).
pub struct Noise(pub u64);

impl Noise {
    /// A number from 0 to `limit` - 1.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        ((z as u128 * limit as u128) >> 64) as usize
    }
}
