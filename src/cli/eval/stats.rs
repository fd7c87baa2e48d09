//! Means and how far to trust them.

use super::super::noise::Noise;

/// A mean, and the interval that holds 95 of 100 means of cases drawn anew from the same (percentile bootstrap).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

const RESAMPLES: usize = 10_000;
/// Of these in a thousand lie below the interval, and as many above.
const TAIL: usize = 25;

impl Interval {
    /// The mean over groups of the mean of each, and its interval: cases are drawn within their groups. The same in
    /// every run. `None` if a group, or all, is empty.
    pub fn of(groups: &[&[f64]]) -> Option<Interval> {
        if groups.is_empty() || groups.iter().any(|group| group.is_empty()) {
            return None;
        }
        let over_groups = |means: &mut dyn Iterator<Item = f64>| means.sum::<f64>() / groups.len() as f64;
        let mean = over_groups(&mut groups.iter().map(|group| group.iter().sum::<f64>() / group.len() as f64));
        let mut noise = Noise(0);
        let mut drawn =
            |group: &[f64]| (0..group.len()).map(|_| group[noise.below(group.len())]).sum::<f64>() / group.len() as f64;
        let mut means: Vec<f64> =
            (0..RESAMPLES).map(|_| over_groups(&mut groups.iter().map(|group| drawn(group)))).collect();
        means.sort_by(f64::total_cmp);
        let below = RESAMPLES * TAIL / 1000;
        Some(Interval { mean, low: means[below], high: means[RESAMPLES - 1 - below] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The interval of the normal approximation, 1.96 standard errors to each side, is what the bootstrap comes to in
    /// large samples.
    #[test]
    fn an_interval_is_that_of_the_standard_error() {
        let values: Vec<f64> = (0..400).map(|index| f64::from(u8::from(index % 4 == 0))).collect();
        let Interval { mean, low, high } = Interval::of(&[&values]).unwrap();
        assert_eq!(mean, 0.25);
        let half = 1.96 * (0.25 * 0.75 / 400.0f64).sqrt();
        assert!((low - (0.25 - half)).abs() < 0.006 && (high - (0.25 + half)).abs() < 0.006, "{low} {high}");
        assert_eq!(Interval::of(&[&values]), Interval::of(&[&values]));
    }

    /// Groups count alike whatever their size, and what differs between them does not widen the interval.
    #[test]
    fn groups_are_resampled_apart() {
        let (zeros, ones) = (vec![0.0; 3], vec![1.0; 30]);
        assert_eq!(Interval::of(&[&zeros, &ones]), Some(Interval { mean: 0.5, low: 0.5, high: 0.5 }));
        assert_eq!(Interval::of(&[&zeros, &[]]), None);
        assert_eq!(Interval::of(&[]), None);
    }
}
