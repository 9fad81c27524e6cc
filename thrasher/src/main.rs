//! A load tester: writes, reads and deletes keys on many threads, compares every byte, and says
//! how long it took. It is a client like any other and shares no code with the server.
//!
//! ```text
//! options.rs   the command line
//! main.rs      the cycles on their threads, and the report
//! client.rs    the requests; the values, and how they are compared
//! ```

mod client;
mod options;

use client::{Client, Operation, Value};
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use options::{Options, USAGE};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

/// How many failures are told one by one.
const TOLD: usize = 10;

/// The run is given up when so many cycles in a row have failed.
const HOPELESS: u64 = 100;

fn main() -> ExitCode {
    let options = match Options::from_args(std::env::args_os().skip(1).collect()) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(e) => {
            eprintln!("thrasher: {e}");
            return ExitCode::from(2);
        }
    };
    if !options.json {
        println!("starting thrasher, seed {}", options.seed);
    }
    let outcome = run(&options);
    if options.json {
        println!("{}", outcome.json(&options));
    } else if outcome.done + outcome.failed > 0 {
        outcome.print(&options);
    }
    outcome.errors.iter().for_each(|e| eprintln!("thrasher: {e}"));
    if outcome.errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What the threads share.
struct Run<'a> {
    options: &'a Options,
    /// The number of the next key; at the count the threads end.
    next: AtomicU64,
    bar: ProgressBar,
    started: Instant,
    outcome: Mutex<Outcome>,
}

/// What came of a run so far.
#[derive(Default)]
struct Outcome {
    /// Cycles without a failure.
    done: u64,
    failed: u64,
    failed_in_a_row: u64,
    /// When the last cycle without a failure ended, from the start on.
    last_done: Duration,
    /// The first TOLD of them, then why the run was given up; empty if nothing went wrong.
    errors: Vec<String>,
    given_up: Option<String>,
    elapsed: Duration,
    /// By Operation.
    tallies: [Tally; 3],
}

/// All of the run; nothing of it when a target cannot be reached.
fn run(options: &Options) -> Outcome {
    let bar = ProgressBar::new(options.count);
    // indicatif draws nothing where stderr is no terminal.
    if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} {per_sec} {eta}") {
        bar.set_style(style);
    }
    let reached = Client::new(options).reach();
    let (next, started, outcome) = (AtomicU64::new(0), Instant::now(), Mutex::default());
    let run = Run { options, next, bar, started, outcome };
    if let Err(e) = reached {
        run.give_up(e);
    }
    thread::scope(|scope| {
        for _ in 0..options.threads {
            if let Err(e) = thread::Builder::new().spawn_scoped(scope, || run.cycles()) {
                return run.give_up(format!("cannot start a thread: {e}"));
            }
        }
    });
    run.bar.finish_and_clear();
    let mut outcome = run.outcome.into_inner().unwrap_or_else(|e| e.into_inner());
    outcome.elapsed = started.elapsed();
    outcome.errors.extend(outcome.given_up.take());
    outcome
}

impl Run<'_> {
    /// One thread's cycles.
    fn cycles(&self) {
        let (options, client) = (self.options, Client::new(self.options));
        let (written, tallies) = Default::default();
        let mut thread = Thread { options, client, written, tallies };
        loop {
            let key = self.next.fetch_add(1, Relaxed);
            if key >= options.count {
                break;
            }
            self.ended(thread.cycle(key));
        }
        self.outcome().tallies.iter_mut().zip(thread.tallies).for_each(|(all, of)| all.add(of));
    }

    /// Counts a cycle. Gives up when only failures come: many, or from a server that hangs, slow.
    fn ended(&self, result: Result<(), String>) {
        self.bar.inc(1);
        let mut outcome = self.outcome();
        let Err(e) = result else {
            outcome.done += 1;
            outcome.failed_in_a_row = 0;
            outcome.last_done = self.started.elapsed();
            return;
        };
        outcome.failed += 1;
        outcome.failed_in_a_row += 1;
        if outcome.errors.len() < TOLD {
            outcome.errors.push(e);
        }
        let in_a_row = outcome.failed_in_a_row;
        let slow = self.started.elapsed() - outcome.last_done >= self.options.timeout;
        drop(outcome);
        if in_a_row == if slow { 2 } else { HOPELESS } {
            self.give_up(format!("given up after {in_a_row} failures in a row"));
        }
    }

    /// Lets the threads end with the cycles that they are at.
    fn give_up(&self, why: String) {
        self.next.store(self.options.count, Relaxed);
        self.outcome().given_up = Some(why);
    }

    fn outcome(&self) -> MutexGuard<'_, Outcome> {
        self.outcome.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// What a thread has for itself.
struct Thread<'a> {
    options: &'a Options,
    client: Client<'a>,
    /// The keys to read: with `keep` all that the thread wrote, without it the cycle's own.
    written: Vec<u64>,
    tallies: [Tally; 3],
}

impl Thread<'_> {
    fn cycle(&mut self, key: u64) -> Result<(), String> {
        self.time(Operation::Write, key)?;
        self.written.push(key);
        let read = self.reads(key);
        if self.options.keep {
            return read;
        }
        // Also after a failed read: a run should leave nothing behind.
        self.written.clear();
        read.and(self.time(Operation::Delete, key))
    }

    fn reads(&mut self, key: u64) -> Result<(), String> {
        self.time(Operation::Read, key)?;
        (0..self.options.additional_reads(fastrand::f64())).try_for_each(|_| {
            self.time(Operation::Read, self.written[fastrand::usize(..self.written.len())])
        })
    }

    /// Does an operation and tallies it. The error says which and of what key.
    fn time(&mut self, operation: Operation, key: u64) -> Result<(), String> {
        let (name, value) = key_and_value(self.options, key);
        let started = Instant::now();
        let performed = self.client.perform(operation, &name, &value);
        performed.map_err(|e| format!("{} {name}: {e}", OPERATIONS[operation as usize]))?;
        let tally = &mut self.tallies[operation as usize];
        tally.micros.saturating_record(started.elapsed().as_micros() as u64);
        tally.bytes += if let Operation::Delete = operation { 0 } else { value.len() };
        Ok(())
    }
}

/// The name of the key with this number, and its value: both follow from the options alone.
fn key_and_value(options: &Options, key: u64) -> (String, Value) {
    // An odd factor keeps the seeds of one run's keys apart.
    let seed = options.seed ^ key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut random = fastrand::Rng::with_seed(seed);
    let value = Value::new(random.u64(..), random.u64(options.size.clone()));
    let name = format!("/thrasher-{}-{key}", options.seed);
    if !options.direct {
        return (name, value);
    }
    // As many folders as a master would make: one for all would grow huge.
    (format!("/{:02x}/{:02x}{name}", random.u8(..), random.u8(..)), value)
}

const OPERATIONS: [&str; 3] = ["write", "read", "delete"];

/// The successes of one operation.
struct Tally {
    /// Latencies in microseconds.
    micros: Histogram<u64>,
    bytes: u64,
}

impl Default for Tally {
    fn default() -> Tally {
        const HOUR: u64 = 3_600_000_000;
        Tally { micros: Histogram::new_with_max(HOUR, 3).expect("allowed bounds"), bytes: 0 }
    }
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.micros += other.micros;
        self.bytes += other.bytes;
    }

    /// p50, p90, p99 and the longest, in microseconds.
    fn percentiles(&self) -> [u64; 4] {
        [0.5, 0.9, 0.99, 1.0].map(|q| self.micros.value_at_quantile(q))
    }
}

impl Outcome {
    fn per_second(&self, n: u64) -> f64 {
        n as f64 / self.elapsed.as_secs_f64()
    }

    fn json(&self, options: &Options) -> serde_json::Value {
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
            let (count, bytes) = (tally.micros.len(), tally.bytes);
            json[name] = serde_json::json!({
                "count": count, "bytes": bytes,
                "p50_us": p50, "p90_us": p90, "p99_us": p99, "max_us": max,
            });
        }
        json
    }

    /// The first two lines are those of the Go original.
    fn print(&self, options: &Options) {
        let cycle = if options.keep { "write/read" } else { "write/read/delete" };
        println!("{} {cycle} in {:?}", self.done, self.elapsed);
        println!("thats {:.2}/sec", self.per_second(self.done));
        if self.failed > 0 {
            println!("{} failed", self.failed);
        }
        let tallies = OPERATIONS.iter().zip(&self.tallies).filter(|(_, t)| !t.micros.is_empty());
        let fastest = tallies.clone().map(|(_, t)| t.micros.min()).min().unwrap_or(0);
        let slowest = tallies.clone().map(|(_, t)| t.micros.max()).max().unwrap_or(0);
        let show = |micros| format!("{:.1?}", Duration::from_micros(micros));
        let (from, to) = (show(fastest), show(slowest));
        if slowest > 0 {
            println!("\n{:17}   MB/s     p50     p90     p99     max   {from} to {to}", "");
        }
        for (name, tally) in tallies {
            let [p50, p90, p99, max] = tally.percentiles().map(show);
            let (n, rate) = (tally.micros.len(), self.per_second(tally.bytes) / 1e6);
            let plot = plot(&tally.micros, fastest, slowest);
            println!("{name:6} {n:10} {rate:6.1} {p50:>7} {p90:>7} {p99:>7} {max:>7}   {plot}");
        }
    }
}

/// The latencies from `fastest` to `slowest` as bars, two for each doubling.
fn plot(micros: &Histogram<u64>, fastest: u64, slowest: u64) -> String {
    let column = |micros: u64| ((micros.max(1) as f64).log2() * 2.0) as usize;
    let mut counts = vec![0; column(slowest) - column(fastest) + 1];
    for step in micros.iter_recorded() {
        // A step ends at the highest latency that it stands for, which may be above `slowest`.
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

    fn options(line: &str) -> Options {
        let args = line.split_whitespace().map(Into::into).collect();
        Options::from_args(args).expect(line).expect("no --help in the line")
    }

    #[test]
    fn the_same_seed_gives_the_same_keys_and_sizes_within_the_range() {
        let options = options("--seed 7 --size 10-20");
        let mut sizes: Vec<u64> = (0..1000)
            .map(|key| {
                let (name, value) = key_and_value(&options, key);
                assert_eq!(name, format!("/thrasher-7-{key}"));
                assert_eq!(value.len(), key_and_value(&options, key).1.len());
                value.len()
            })
            .collect();
        sizes.sort_unstable();
        sizes.dedup();
        assert_eq!(sizes, Vec::from_iter(10..=20));
    }

    #[test]
    fn direct_keys_lie_in_two_levels_of_folders() {
        let (name, _) = key_and_value(&options("--seed 7 --direct"), 3);
        let parts: Vec<usize> = name.split('/').map(str::len).collect();
        assert_eq!(parts, [0, 2, 2, "thrasher-7-3".len()]);
    }

    #[test]
    fn additional_reads_are_the_share_of_what_follows_the_write() {
        for (line, expected) in
            [("", 0.0), ("--reads 0.9", 18.0), ("--reads 0.9 --keep", 9.0), ("--reads 0.2", 0.5)]
        {
            let options = options(line);
            let reads: u64 = (0..1000).map(|i| options.additional_reads(i as f64 / 1000.0)).sum();
            assert!((reads as f64 / 1000.0 - expected).abs() < 0.01, "{line}: {reads}");
        }
    }

    #[test]
    fn a_plot_has_a_bar_for_each_half_of_a_doubling() {
        let mut tally = Tally::default();
        for micros in [1, 1, 2, 4, 4, 4, 4] {
            tally.micros.saturating_record(micros);
        }
        assert_eq!(plot(&tally.micros, 1, 8), "▄ ▂ █  ");
    }
}
