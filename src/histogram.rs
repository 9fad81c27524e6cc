//! A histogram of durations: fixed buckets and a sum.
//!
//! The volumes and the API observe into it; `api/metrics.rs` gives it its text form. It does no
//! locking of its own.

use std::time::Duration;

/// Upper bounds of the buckets, in seconds.
const BOUNDS: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 5.0, 30.0, 120.0];

#[derive(Debug, Default, Clone)]
pub struct Histogram {
    /// Observations in each bucket; the last one has no upper bound.
    counts: [u64; BOUNDS.len() + 1],
    /// The sum of all observations.
    pub seconds: f64,
}

impl Histogram {
    pub fn observe(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        self.counts[BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len())] += 1;
        self.seconds += seconds;
    }

    /// The observations since an earlier state of this histogram.
    pub fn since(&self, earlier: &Histogram) -> Histogram {
        let counts = std::array::from_fn(|n| self.counts[n].saturating_sub(earlier.counts[n]));
        Histogram { counts, seconds: (self.seconds - earlier.seconds).max(0.0) }
    }

    /// The time, in seconds, below which this part of the observations lies, from 0 to 1; `None` if there are none.
    /// Within a bucket they count as evenly spread; beyond the last bound the answer is that bound.
    pub fn quantile(&self, part: f64) -> Option<f64> {
        let all: u64 = self.counts.iter().sum();
        let rank = part * all as f64;
        let (mut low, mut below) = (0.0, 0.0);
        for (bound, count) in BOUNDS.into_iter().zip(self.counts) {
            let count = count as f64;
            if count > 0.0 && below + count >= rank {
                return Some(low + (bound - low) * (rank - below) / count);
            }
            (low, below) = (bound, below + count);
        }
        (all > 0).then_some(low)
    }

    /// For each bucket its upper bound in seconds and the number of observations at or below it.
    /// The last bound is infinite, its number is that of all observations.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let mut sum = 0;
        BOUNDS.into_iter().chain([f64::INFINITY]).zip(self.counts).map(move |(bound, count)| {
            sum += count;
            (bound, sum)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_cumulative() {
        let mut histogram = Histogram::default();
        for millis in [0, 1, 2, 200_000] {
            histogram.observe(Duration::from_millis(millis));
        }
        let counts: Vec<_> = histogram.cumulative().collect();
        assert_eq!(counts[..3], [(0.0005, 1), (0.001, 2), (0.0025, 3)]);
        assert_eq!(counts[11..], [(120.0, 3), (f64::INFINITY, 4)]);
        assert_eq!(histogram.seconds, 200.003);
    }

    #[test]
    fn quantiles_are_those_of_the_observations_since() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), None);
        histogram.observe(Duration::from_secs(200));
        assert_eq!(histogram.quantile(0.99), Some(120.0));
        let earlier = histogram.clone();
        (0..4).for_each(|_| histogram.observe(Duration::from_millis(4)));
        let recent = histogram.since(&earlier);
        assert_eq!((recent.quantile(0.5), recent.quantile(1.0)), (Some(0.00375), Some(0.005)));
    }
}
