//! What the master counts, as Prometheus text (exposition format 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::threads::lock;

/// Upper bounds of the buckets, in seconds.
const BOUNDS: [f64; 12] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 5.0, 30.0, 120.0];

/// A latency histogram.
#[derive(Default, Clone)]
pub struct Histogram {
    /// Observations at or below each bound, and above all of them.
    counts: [u64; BOUNDS.len() + 1],
    seconds: f64,
}

impl Histogram {
    pub fn observe(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        self.counts[BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len())] += 1;
        self.seconds += seconds;
    }

    /// Its lines; `labels` as `a="b"`.
    pub fn write(&self, text: &mut String, name: &str, labels: &str) {
        let mut sum = 0;
        for (n, count) in self.counts.iter().enumerate() {
            sum += count;
            let bound = BOUNDS.get(n).map_or("+Inf".into(), f64::to_string);
            let _ = writeln!(text, "{name}_bucket{{{labels},le=\"{bound}\"}} {sum}");
        }
        let seconds = self.seconds;
        let _ = writeln!(text, "{name}_sum{{{labels}}} {seconds}\n{name}_count{{{labels}}} {sum}");
    }
}

#[derive(Default)]
pub struct Metrics {
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    latencies: Mutex<BTreeMap<&'static str, Histogram>>,
    errors: Mutex<BTreeMap<&'static str, u64>>,
    /// Bytes of values received, and of answers sent.
    pub received: AtomicU64,
    pub sent: AtomicU64,
    /// Gauges.
    pub uploads: AtomicU64,
    pub connections: AtomicU64,
}

impl Metrics {
    /// Counts an answered request.
    pub fn count(&self, method: &str, status: u16, error: Option<&'static str>, time: Duration) {
        const METHODS: [&str; 8] =
            ["GET", "HEAD", "PUT", "REPLACE", "DELETE", "UNLINK", "RELINK", "REBALANCE"];
        let method = METHODS.into_iter().find(|known| *known == method).unwrap_or("other");
        *lock(&self.requests).entry((method, status)).or_default() += 1;
        lock(&self.latencies).entry(method).or_default().observe(time);
        if let Some(kind) = error {
            *lock(&self.errors).entry(kind).or_default() += 1;
        }
    }

    pub fn write(&self, text: &mut String) {
        head(text, "mkv_requests_total", "counter", "Requests answered.");
        for ((method, status), count) in &*lock(&self.requests) {
            let _ = writeln!(
                text,
                "mkv_requests_total{{method=\"{method}\",status=\"{status}\"}} {count}"
            );
        }
        head(text, "mkv_request_seconds", "histogram", "From a request's head to its answer.");
        for (method, histogram) in &*lock(&self.latencies) {
            histogram.write(text, "mkv_request_seconds", &format!("method=\"{method}\""));
        }
        head(text, "mkv_errors_total", "counter", "Errors answered, by kind.");
        for (kind, count) in &*lock(&self.errors) {
            let _ = writeln!(text, "mkv_errors_total{{kind=\"{kind}\"}} {count}");
        }
        let get = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let (received, sent) = (get(&self.received), get(&self.sent));
        plain(text, "mkv_received_bytes_total", "counter", "Bytes of values received.", received);
        plain(text, "mkv_sent_bytes_total", "counter", "Bytes of answers sent.", sent);
        plain(text, "mkv_uploads", "gauge", "Uploads under way.", get(&self.uploads));
        plain(text, "mkv_connections", "gauge", "Connections of clients.", get(&self.connections));
    }
}

/// A metric's first lines.
pub fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// A metric of one number.
pub fn plain(text: &mut String, name: &str, kind: &str, help: &str, value: u64) {
    head(text, name, kind, help);
    let _ = writeln!(text, "{name} {value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_cumulative() {
        let mut histogram = Histogram::default();
        for millis in [0, 1, 2, 200_000] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut text = String::new();
        histogram.write(&mut text, "x", "a=\"b\"");
        for line in [
            "le=\"0.0005\"} 1",
            "le=\"0.001\"} 2",
            "le=\"0.0025\"} 3",
            "le=\"120\"} 3",
            "le=\"+Inf\"} 4",
            "x_count{a=\"b\"} 4",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
}
