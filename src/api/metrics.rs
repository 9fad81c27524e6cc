//! What the master counts, as Prometheus text (exposition format 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::samples::Totals;
use super::status::KINDS;
use crate::histogram::Histogram;
use crate::http::Counters;
use crate::index::scrub::Scrub;
use crate::store::Store;
use crate::threads::lock;
use crate::volumes::space::Disk;
use crate::volumes::{Auth, Snapshot};

/// Debris is counted up to this number of entries.
const DEBRIS_MAX: usize = 100_000;

pub struct Metrics {
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    latencies: Mutex<BTreeMap<&'static str, Histogram>>,
    errors: Mutex<BTreeMap<&'static str, u64>>,
    /// Uploads under way.
    pub uploads: AtomicU64,
    /// What the HTTP server counts.
    counters: Arc<Counters>,
}

/// What is read from the store when somebody asks.
pub struct Gauges {
    pub volumes: Vec<Snapshot>,
    /// The disks of each volume.
    pub disks: Vec<(String, Arc<Vec<Disk>>)>,
    /// Keys that are being written.
    pub locked: u64,
    /// An estimate.
    pub keys: u64,
    pub debris: u64,
    pub connections: u64,
    /// When the newest backup on the volumes was made, in seconds since 1970; 0: there is none.
    pub backup: u64,
    /// The last verify.
    pub scrub: Option<Scrub>,
    /// How many promotions led to the index.
    pub generation: u64,
    /// Of a follower: seconds since its index was last known to be current, and how many changes the master was ahead.
    pub follows: Option<(f64, u64)>,
}

impl Metrics {
    /// Reads the gauges. It asks the volumes for their disks, at most every 10 s.
    pub fn gauges(&self, store: &Store, auth: Auth) -> Gauges {
        let Store { index, volumes, config, .. } = store;
        let names = &config.placement.volumes;
        let disks = names.iter().cloned().zip(volumes.disks(names, auth)).collect();
        // An index that cannot be read is told by `?health`.
        let debris = index.count_debris(DEBRIS_MAX).unwrap_or(0) as u64;
        Gauges {
            volumes: volumes.snapshot(),
            disks,
            locked: index.locked() as u64,
            keys: index.estimate(),
            debris,
            connections: self.counters.connections.load(Ordering::Relaxed) as u64,
            backup: store.last_backup().unwrap_or(0),
            scrub: index.last_verify(),
            generation: index.generation(),
            follows: index.following().map(|following| (following.age().as_secs_f64(), following.behind())),
        }
    }

    /// The counters, for the page's charts.
    pub fn totals(&self) -> Totals {
        let requests = lock(&self.requests).values().sum();
        let errors = lock(&self.errors);
        let errors = KINDS.map(|(kind, _)| errors.get(kind).copied().unwrap_or(0));
        let (received, sent) = (get(&self.counters.received), get(&self.counters.sent));
        Totals { requests, received, sent, uploads: get(&self.uploads), errors }
    }

    pub fn new(counters: Arc<Counters>) -> Metrics {
        Metrics {
            requests: Mutex::default(),
            latencies: Mutex::default(),
            errors: Mutex::default(),
            uploads: AtomicU64::new(0),
            counters,
        }
    }

    /// Counts an answered request.
    pub fn count(&self, method: &str, status: u16, error: Option<&'static str>, time: Duration) {
        const METHODS: [&str; 8] = ["GET", "HEAD", "PUT", "REPLACE", "DELETE", "UNLINK", "RELINK", "REBALANCE"];
        let method = METHODS.into_iter().find(|known| *known == method).unwrap_or("other");
        *lock(&self.requests).entry((method, status)).or_default() += 1;
        lock(&self.latencies).entry(method).or_default().observe(time);
        if let Some(kind) = error {
            *lock(&self.errors).entry(kind).or_default() += 1;
        }
    }

    /// All metrics.
    pub fn text(&self, gauges: &Gauges) -> String {
        let mut text = String::new();
        self.write_requests(&mut text);
        let Gauges { connections, locked, keys, debris, backup, generation, .. } = *gauges;
        for (name, kind, help, value) in [
            ("received_bytes_total", "counter", "Bytes of values received.", get(&self.counters.received)),
            ("sent_bytes_total", "counter", "Bytes of responses sent.", get(&self.counters.sent)),
            ("uploads", "gauge", "Uploads under way.", get(&self.uploads)),
            ("connections", "gauge", "Connections of clients.", connections),
            ("locks", "gauge", "Keys that are being written.", locked),
            ("keys", "gauge", "Keys in the index, an estimate.", keys),
            ("debris", "gauge", "Entries of debris, counted up to 100,000.", debris),
            ("generation", "gauge", "How many promotions led to the index.", generation),
            ("backup_timestamp_seconds", "gauge", "When the newest backup on the volumes was made; 0: none.", backup),
        ] {
            write_head(&mut text, &format!("mkv_{name}"), kind, help);
            let _ = writeln!(text, "mkv_{name} {value}");
        }
        write_following(&mut text, gauges.follows);
        write_volumes(&mut text, &gauges.volumes);
        write_disks(&mut text, &gauges.disks);
        write_scrub(&mut text, gauges.scrub.as_ref().unwrap_or(&Scrub::default()));
        text
    }

    fn write_requests(&self, text: &mut String) {
        write_head(text, "mkv_requests_total", "counter", "Requests answered.");
        for ((method, status), count) in &*lock(&self.requests) {
            let _ = writeln!(text, "mkv_requests_total{{method=\"{method}\",status=\"{status}\"}} {count}");
        }
        write_head(text, "mkv_request_seconds", "histogram", "From a request's head to its response.");
        for (method, histogram) in &*lock(&self.latencies) {
            write_histogram(text, "mkv_request_seconds", &format!("method=\"{method}\""), histogram);
        }
        write_head(text, "mkv_errors_total", "counter", "Errors answered, by kind.");
        for (kind, count) in &*lock(&self.errors) {
            let _ = writeln!(text, "mkv_errors_total{{kind=\"{kind}\"}} {count}");
        }
    }
}

fn get(value: &AtomicU64) -> u64 {
    value.load(Ordering::Relaxed)
}

/// How far a follower is behind. A master has none of these.
fn write_following(text: &mut String, follows: Option<(f64, u64)>) {
    let Some((age, behind)) = follows else { return };
    write_head(text, "mkv_follower_age_seconds", "gauge", "Since the index was last known to be current.");
    let _ = writeln!(text, "mkv_follower_age_seconds {age}");
    write_head(text, "mkv_follower_behind", "gauge", "Changes that the master was ahead when it last answered.");
    let _ = writeln!(text, "mkv_follower_behind {behind}");
}

/// The state of each volume that was asked for something.
fn write_volumes(text: &mut String, volumes: &[Snapshot]) {
    write_head(text, "mkv_volume_up", "gauge", "Whether the volume answered when last asked.");
    for Snapshot { name, up, .. } in volumes {
        let _ = writeln!(text, "mkv_volume_up{{volume=\"{name}\"}} {}", u8::from(*up));
    }
    write_head(text, "mkv_volume_seconds", "histogram", "From a request to its answer's head.");
    for Snapshot { name, latency, .. } in volumes {
        write_histogram(text, "mkv_volume_seconds", &format!("volume=\"{name}\""), latency);
    }
}

/// How full the disks are, where that is known.
fn write_disks(text: &mut String, volumes: &[(String, Arc<Vec<Disk>>)]) {
    type Figure = fn(&Disk) -> u64;
    let figures: [(&str, &str, Figure); 2] = [
        ("mkv_volume_size_bytes", "Size of a disk of a volume; disk=\".\" is the volume's folder.", |disk| disk.size),
        ("mkv_volume_free_bytes", "Free bytes of a disk of a volume.", |disk| disk.free),
    ];
    for (name, help, figure) in figures {
        write_head(text, name, "gauge", help);
        for (volume, disks) in volumes {
            for disk in disks.iter() {
                let _ = writeln!(text, "{name}{{volume=\"{volume}\",disk=\"{}\"}} {}", disk.name, figure(disk));
            }
        }
    }
}

/// The result of the last verify.
fn write_scrub(text: &mut String, scrub: &Scrub) {
    for (name, help, value) in [
        ("timestamp_seconds", "When the last verify ended; 0: never.", scrub.time),
        ("seconds", "How long the last verify took.", scrub.seconds),
        ("findings", "Keys and names with a finding in the last verify.", scrub.findings),
        ("deep", "Whether the last verify read every blob.", u64::from(scrub.deep)),
        ("deep_timestamp_seconds", "When the last verify ended that read every blob; 0: never.", scrub.deep_time),
    ] {
        write_head(text, &format!("mkv_verify_{name}"), "gauge", help);
        let _ = writeln!(text, "mkv_verify_{name} {value}");
    }
}

/// A histogram's lines; `labels` as `a="b"`.
fn write_histogram(text: &mut String, name: &str, labels: &str, histogram: &Histogram) {
    let mut count = 0;
    for (bound, sum) in histogram.cumulative() {
        let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".into() };
        let _ = writeln!(text, "{name}_bucket{{{labels},le=\"{bound}\"}} {sum}");
        count = sum;
    }
    let seconds = histogram.seconds;
    let _ = writeln!(text, "{name}_sum{{{labels}}} {seconds}\n{name}_count{{{labels}}} {count}");
}

fn write_head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_written_with_cumulative_counts() {
        let mut histogram = Histogram::default();
        for millis in [0, 1, 2, 200_000] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut text = String::new();
        write_histogram(&mut text, "x", "a=\"b\"", &histogram);
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
