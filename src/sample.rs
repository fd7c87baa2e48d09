//! The choice of the next token.

use std::cmp::Ordering;

use crate::reader::Sampling;

/// The token that `sampling` takes from `logits` as the `index`th of an answer: the likeliest (of equals the one of
/// smaller id) at temperature 0, else a draw. `None` if a logit is not a number or infinitely large, or all are infinitely small.
///
/// `kernels/sample.cu` does the same on a GPU.
pub fn sample(logits: &[f32], sampling: &Sampling, index: usize) -> Option<u32> {
    let wrong = |logit: &f32| logit.is_nan() || *logit == f32::INFINITY;
    if logits.iter().any(wrong) || logits.iter().all(|logit| *logit == f32::NEG_INFINITY) {
        return None;
    }
    // Comparable, as none is NaN; of -0 and 0 none is larger.
    let likelier = |a: &u32, b: &u32| {
        let order = logits[*b as usize].partial_cmp(&logits[*a as usize]);
        order.unwrap_or(Ordering::Equal).then(a.cmp(b))
    };
    let ids = 0..logits.len() as u32;
    if sampling.temperature == 0.0 {
        return ids.min_by(likelier);
    }
    let mut order: Vec<u32> = ids.collect();
    order.sort_unstable_by(likelier);
    let max = logits[order[0] as usize];
    let weight = |id: &u32| (((logits[*id as usize] - max) / sampling.temperature) as f64).exp();
    let total: f64 = order.iter().map(weight).sum();
    let mut mass = 0.0;
    let nucleus = order
        .iter()
        .position(|id| {
            mass += weight(id);
            mass >= sampling.top_p as f64 * total
        })
        .map_or(order.len(), |last| last + 1);
    let mut left = uniform(sampling.seed, index as u64) * mass;
    order[..nucleus]
        .iter()
        .copied()
        .find(|id| {
            left -= weight(id);
            left < 0.0
        })
        .or(Some(order[nucleus - 1]))
}

/// A number in [0, 1) that depends on nothing but `seed` and `index` (two rounds of the SplitMix64 finaliser), so that
/// every device can draw the same.
fn uniform(seed: u64, index: u64) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let bits = mix(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(index));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(temperature: f32, top_p: f32, seed: u64) -> Sampling {
        Sampling { temperature, top_p, seed, ..Sampling::default() }
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(sample(&[0.0, 2.0, 2.0], &with(0.0, 1.0, 0), 0), Some(1));
        assert_eq!(sample(&[-1.0, -0.0, 0.0], &with(0.0, 1.0, 0), 0), Some(1));
        assert_eq!(sample(&[0.0, f32::NAN], &with(0.0, 1.0, 0), 0), None);
        assert_eq!(sample(&[0.0, f32::INFINITY], &with(0.0, 1.0, 0), 0), None);
        assert_eq!(sample(&[f32::NEG_INFINITY; 2], &with(1.0, 1.0, 0), 0), None);
    }

    #[test]
    fn draws_follow_the_probabilities_within_the_nucleus() {
        // Probabilities 0.6, 0.3, 0.1.
        let logits = [0.6f32.ln(), 0.1f32.ln(), 0.3f32.ln()];
        let mut counts = [0; 3];
        for index in 0..10_000 {
            counts[sample(&logits, &with(1.0, 0.85, 7), index).unwrap() as usize] += 1;
        }
        assert_eq!(counts[1], 0, "outside the nucleus of 0.6 + 0.3");
        assert!((counts[0] as f64 / 10_000.0 - 2.0 / 3.0).abs() < 0.02, "{counts:?}");
    }

    #[test]
    fn a_seed_repeats_its_draws() {
        let draw = |seed| -> Vec<_> { (0..50).map(|i| sample(&[0.0; 100], &with(1.0, 1.0, seed), i)).collect() };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}
