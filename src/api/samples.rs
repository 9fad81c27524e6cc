//! What the page's charts show: the counters of the last 15 minutes, and the volumes' latencies in them.
//!
//! A thread takes a sample every 5 s, also when nobody looks, so that the page can show what led to an incident. A
//! sample costs some microseconds and some 100 bytes.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

use super::status::KINDS;
use crate::histogram::Histogram;
use crate::threads::lock;
use crate::volumes::Snapshot;

/// Time between two samples.
pub const EVERY: Duration = Duration::from_secs(5);

/// How many samples are kept: 15 minutes, and the one before them.
pub const KEPT: usize = 181;

/// The latencies are kept of every minute.
const SAMPLES_A_MINUTE: usize = 12;
const MINUTES: usize = 15;

/// The counters at one time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Totals {
    pub requests: u64,
    pub received: u64,
    pub sent: u64,
    /// Uploads under way.
    pub uploads: u64,
    /// By kind, in the order of `KINDS`.
    pub errors: [u64; KINDS.len()],
}

#[derive(Default)]
pub struct Samples(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    taken: usize,
    totals: VecDeque<Totals>,
    latencies: VecDeque<Vec<(String, Histogram)>>,
}

impl Samples {
    /// Takes a sample. `volumes` is called once a minute.
    pub fn take(&self, totals: Totals, volumes: impl FnOnce() -> Vec<Snapshot>) {
        let mut kept = lock(&self.0);
        if kept.taken.is_multiple_of(SAMPLES_A_MINUTE) {
            push(&mut kept.latencies, volumes().into_iter().map(|v| (v.name, v.latency)).collect(), MINUTES);
        }
        push(&mut kept.totals, totals, KEPT);
        kept.taken += 1;
    }

    /// The kept samples, oldest first.
    pub fn totals(&self) -> Vec<Totals> {
        lock(&self.0).totals.iter().copied().collect()
    }

    /// The latencies of a volume in the last 15 minutes.
    pub fn latency(&self, volume: &Snapshot) -> Histogram {
        let kept = lock(&self.0);
        let oldest = kept.latencies.front().and_then(|volumes| volumes.iter().find(|(name, _)| *name == volume.name));
        oldest.map_or(volume.latency.clone(), |(_, before)| volume.latency.since(before))
    }
}

fn push<T>(kept: &mut VecDeque<T>, item: T, most: usize) {
    if kept.len() == most {
        kept.pop_front();
    }
    kept.push_back(item);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fifteen_minutes_are_kept() {
        let (samples, mut latency) = (Samples::default(), Histogram::default());
        let snapshot = |latency: &Histogram| Snapshot { name: "a:1".into(), up: true, latency: latency.clone() };
        for requests in 0..1000 {
            samples.take(Totals { requests, ..Totals::default() }, || vec![snapshot(&latency)]);
            latency.observe(Duration::from_millis(1));
        }
        let totals = samples.totals();
        assert_eq!((totals.len(), totals[0].requests, totals[180].requests), (KEPT, 819, 999));
        let recent = samples.latency(&snapshot(&latency)).cumulative().last().unwrap().1;
        assert!((168..=180).contains(&recent), "{recent}");
    }
}
