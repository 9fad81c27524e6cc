//! The results of a run, as text and as JSON.

use crate::options::Options;
use hdrhistogram::Histogram;
use std::io::{self, Write};
use std::time::Duration;

/// The names of the operations, in the order of `client::Operation`.
pub const OPERATIONS: [&str; 3] = ["write", "read", "delete"];

/// The results of a run so far.
#[derive(Default)]
pub struct Report {
    /// Number of successful cycles.
    pub done: u64,
    /// Number of failed cycles.
    pub failed: u64,
    pub failed_in_a_row: u64,
    /// When the last successful cycle ended, counted from the start of the run.
    pub last_done: Duration,
    /// The first errors, then the reason if the run ended early. Empty if all cycles succeeded.
    pub errors: Vec<String>,
    pub given_up: Option<String>,
    pub elapsed: Duration,
    /// Indexed by `client::Operation`.
    pub tallies: [Tally; 3],
}

/// The successful requests of one operation.
pub struct Tally {
    /// Latencies in microseconds.
    latencies: Histogram<u64>,
    /// Bytes of all values written or read.
    bytes: u64,
}

impl Default for Tally {
    fn default() -> Tally {
        const HOUR: u64 = 3_600_000_000;
        Tally { latencies: Histogram::new_with_max(HOUR, 3).expect("valid bounds"), bytes: 0 }
    }
}

impl Tally {
    pub fn record(&mut self, latency: Duration, bytes: u64) {
        self.latencies.saturating_record(latency.as_micros() as u64);
        self.bytes += bytes;
    }

    pub fn add(&mut self, other: Tally) {
        self.latencies += other.latencies;
        self.bytes += other.bytes;
    }

    /// p50, p90, p99 and the maximum, in microseconds.
    fn percentiles(&self) -> [u64; 4] {
        [0.5, 0.9, 0.99, 1.0].map(|q| self.latencies.value_at_quantile(q))
    }
}

impl Report {
    fn per_second(&self, n: u64) -> f64 {
        n as f64 / self.elapsed.as_secs_f64()
    }

    pub fn json(&self, options: &Options) -> serde_json::Value {
        let mut json = serde_json::json!({
            "seed": options.seed,
            "threads": options.threads,
            "done": self.done,
            "failed": self.failed,
            "errors": self.errors,
            "seconds": self.elapsed.as_secs_f64(),
            "per_second": self.per_second(self.done),
        });
        for (name, tally) in OPERATIONS.iter().zip(&self.tallies) {
            let [p50, p90, p99, max] = tally.percentiles();
            let (count, bytes) = (tally.latencies.len(), tally.bytes);
            json[name] = serde_json::json!({
                "count": count, "bytes": bytes,
                "p50_us": p50, "p90_us": p90, "p99_us": p99, "max_us": max,
            });
        }
        json
    }

    /// Prints the results as text. The first two lines are those of minikeyvalue's thrasher.
    pub fn print(&self, options: &Options, out: &mut impl Write) -> io::Result<()> {
        let cycle = if options.keep { "write/read" } else { "write/read/delete" };
        writeln!(out, "{} {cycle} in {:?}", self.done, self.elapsed)?;
        writeln!(out, "thats {:.2}/sec", self.per_second(self.done))?;
        if self.failed > 0 {
            writeln!(out, "{} failed", self.failed)?;
        }
        let tallies = OPERATIONS.iter().zip(&self.tallies);
        let tallies = tallies.filter(|(_, tally)| !tally.latencies.is_empty());
        let fastest = tallies.clone().map(|(_, t)| t.latencies.min()).min().unwrap_or(0);
        let slowest = tallies.clone().map(|(_, t)| t.latencies.max()).max().unwrap_or(0);
        let show = |micros| format!("{:.1?}", Duration::from_micros(micros));
        let (from, to) = (show(fastest), show(slowest));
        if slowest > 0 {
            let columns = "  MB/s     p50     p90     p99     max";
            writeln!(out, "\n{:17} {columns}   {from} to {to}", "")?;
        }
        for (name, tally) in tallies {
            let [p50, p90, p99, max] = tally.percentiles().map(show);
            let (n, rate) = (tally.latencies.len(), self.per_second(tally.bytes) / 1e6);
            let plot = plot(&tally.latencies, fastest, slowest);
            writeln!(out, "{name:6} {n:10} {rate:6.1} {p50:>7} {p90:>7} {p99:>7} {max:>7}   {plot}")?;
        }
        Ok(())
    }
}

/// Draws the latencies from `fastest` to `slowest` as bars on a logarithmic scale, two bars for
/// each doubling.
fn plot(latencies: &Histogram<u64>, fastest: u64, slowest: u64) -> String {
    let column = |micros: u64| ((micros.max(1) as f64).log2() * 2.0) as usize;
    let mut counts = vec![0; column(slowest) - column(fastest) + 1];
    for step in latencies.iter_recorded() {
        // A step is reported with the highest latency it covers, which may be above `slowest`.
        let latency = step.value_iterated_to().clamp(fastest, slowest);
        counts[column(latency) - column(fastest)] += step.count_since_last_iteration();
    }
    let highest = counts.iter().max().copied().unwrap_or(0).max(1);
    let height = |count: &u64| (count * 8).div_ceil(highest) as usize;
    counts.iter().map(|c| [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'][height(c)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_has_two_bars_for_each_doubling() {
        let mut tally = Tally::default();
        for micros in [1, 1, 2, 4, 4, 4, 4] {
            tally.record(Duration::from_micros(micros), 0);
        }
        assert_eq!(plot(&tally.latencies, 1, 8), "▄ ▂ █  ");
    }
}
