//! A load tester: writes, reads and deletes keys from many threads, compares every byte, and
//! reports throughput and latencies. It is an ordinary client and shares no code with the server.
//!
//! ```text
//! options.rs   the command line
//! main.rs      runs the cycles on their threads
//! client.rs    sends the requests; makes and compares the values
//! report.rs    collects the results and prints them
//! ```

mod client;
mod options;
mod report;

use client::{Client, Operation, Value};
use indicatif::{ProgressBar, ProgressStyle};
use options::{Options, Server, USAGE};
use report::{OPERATIONS, Report, Tally};
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::Instant;

/// Further errors are only counted.
const ERRORS_SHOWN: usize = 10;

/// The run ends after this many failed cycles in a row.
const MAX_FAILURES_IN_A_ROW: u64 = 100;

/// A shell reports a process that SIGPIPE has ended with this status.
const BROKEN_PIPE: u8 = 128 + 13;

fn main() -> ExitCode {
    match thrash(&mut io::stdout()) {
        Ok(status) => ExitCode::from(status),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => ExitCode::from(BROKEN_PIPE),
        Err(e) => {
            print_error(&format!("cannot write the output: {e}"));
            ExitCode::FAILURE
        }
    }
}

/// Returns the exit status. An error means that `out` could not be written.
fn thrash(out: &mut impl Write) -> io::Result<u8> {
    let options = match Options::from_args(std::env::args_os().skip(1).collect()) {
        Ok(Some(options)) => options,
        Ok(None) => return out.write_all(USAGE.as_bytes()).map(|()| 0),
        Err(e) => {
            print_error(&e);
            return Ok(2);
        }
    };
    if !options.json {
        writeln!(out, "starting thrasher, seed {}", options.seed)?;
    }
    let report = run(&options);
    if options.json {
        writeln!(out, "{}", report.json(&options))?;
    } else if report.done + report.failed > 0 {
        report.print(&options, out)?;
    }
    report.errors.iter().for_each(|e| print_error(e));
    Ok(u8::from(!report.errors.is_empty()))
}

/// Prints to stderr, where eprintln would panic if stderr is closed.
fn print_error(message: &str) {
    let _ = writeln!(io::stderr(), "thrasher: {message}");
}

/// The state that the threads of a run share.
struct Run<'a> {
    options: &'a Options,
    /// The number of the next key. The threads end when it reaches `options.count`.
    next: AtomicU64,
    bar: ProgressBar,
    started: Instant,
    report: Mutex<Report>,
}

/// Runs all cycles, or none if a server cannot be reached.
fn run(options: &Options) -> Report {
    let bar = ProgressBar::new(options.count);
    // indicatif draws nothing if stderr is not a terminal.
    if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} {per_sec} {eta}") {
        bar.set_style(style);
    }
    let reached = Client::new(options).check_servers();
    let (next, started, report) = (AtomicU64::new(0), Instant::now(), Mutex::default());
    let run = Run { options, next, bar, started, report };
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
    let mut report = run.report.into_inner().unwrap_or_else(|e| e.into_inner());
    report.elapsed = started.elapsed();
    report.errors.extend(report.given_up.take());
    report
}

impl Run<'_> {
    /// Runs cycles on one thread until no key is left.
    fn cycles(&self) {
        let (options, client) = (self.options, Client::new(self.options));
        let (written, tallies) = Default::default();
        let mut worker = Worker { options, client, written, tallies };
        loop {
            let key = self.next.fetch_add(1, Relaxed);
            if key >= options.count {
                break;
            }
            self.count(worker.cycle(key));
        }
        self.report().tallies.iter_mut().zip(worker.tallies).for_each(|(all, own)| all.add(own));
    }

    /// Counts a cycle. Ends the run after too many failures in a row, or after two in a row if no
    /// cycle has succeeded for as long as the timeout.
    fn count(&self, result: Result<(), String>) {
        self.bar.inc(1);
        let mut report = self.report();
        let Err(e) = result else {
            report.done += 1;
            report.failed_in_a_row = 0;
            report.last_done = self.started.elapsed();
            return;
        };
        report.failed += 1;
        report.failed_in_a_row += 1;
        if report.errors.len() < ERRORS_SHOWN {
            report.errors.push(e);
        }
        let in_a_row = report.failed_in_a_row;
        let hangs = self.started.elapsed() - report.last_done >= self.options.timeout;
        drop(report);
        if in_a_row == if hangs { 2 } else { MAX_FAILURES_IN_A_ROW } {
            self.give_up(format!("stopped after {in_a_row} failures in a row"));
        }
    }

    /// Lets every thread end after its current cycle.
    fn give_up(&self, reason: String) {
        self.next.store(self.options.count, Relaxed);
        self.report().given_up = Some(reason);
    }

    /// Ignores poisoning: the report is consistent after every statement.
    fn report(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The state of one thread.
struct Worker<'a> {
    options: &'a Options,
    client: Client<'a>,
    /// The keys for additional reads: with `--keep` all that this thread has written, without it
    /// only the key of the current cycle.
    written: Vec<u64>,
    tallies: [Tally; 3],
}

impl Worker<'_> {
    fn cycle(&mut self, key: u64) -> Result<(), String> {
        self.time(Operation::Write, key)?;
        self.written.push(key);
        let read = self.reads(key);
        if self.options.keep {
            return read;
        }
        // Delete the key even if the read has failed, so that the run leaves nothing behind.
        self.written.clear();
        read.and(self.time(Operation::Delete, key))
    }

    fn reads(&mut self, key: u64) -> Result<(), String> {
        self.time(Operation::Read, key)?;
        (0..self.options.additional_reads(fastrand::f64()))
            .try_for_each(|_| self.time(Operation::Read, self.written[fastrand::usize(..self.written.len())]))
    }

    /// Performs an operation and records its latency. An error names the operation and the key.
    fn time(&mut self, operation: Operation, key: u64) -> Result<(), String> {
        let (name, value) = key_and_value(self.options, key);
        let started = Instant::now();
        let performed = self.client.perform(operation, &name, &value);
        performed.map_err(|e| format!("{} {name}: {e}", OPERATIONS[operation as usize]))?;
        let bytes = if let Operation::Delete = operation { 0 } else { value.len() };
        self.tallies[operation as usize].record(started.elapsed(), bytes);
        Ok(())
    }
}

/// Returns the name of the key with this number, and its value. Both depend only on the options.
fn key_and_value(options: &Options, key: u64) -> (String, Value) {
    // Multiplying by an odd number maps different keys of a run to different seeds.
    let seed = options.seed ^ key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut random = fastrand::Rng::with_seed(seed);
    let value = Value::new(random.u64(..), random.u64(options.size.clone()));
    let name = format!("/thrasher-{}-{key}", options.seed);
    if options.server != Server::Volumes {
        return (name, value);
    }
    // Use as many folders as a master would, because a single one would slow the file system down.
    (format!("/{:02x}/{:02x}{name}", random.u8(..), random.u8(..)), value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &str) -> Options {
        let args = line.split_whitespace().map(Into::into).collect();
        Options::from_args(args).expect(line).expect("no --help in the line")
    }

    #[test]
    fn a_seed_determines_the_keys_and_the_sizes() {
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
    fn direct_keys_have_two_levels_of_folders() {
        let (name, _) = key_and_value(&options("--seed 7 --direct"), 3);
        let parts: Vec<usize> = name.split('/').map(str::len).collect();
        assert_eq!(parts, [0, 2, 2, "thrasher-7-3".len()]);
    }

    #[test]
    fn additional_reads_have_the_requested_share() {
        for (line, expected) in [("", 0.0), ("--reads 0.9", 18.0), ("--reads 0.9 --keep", 9.0), ("--reads 0.2", 0.5)] {
            let options = options(line);
            let reads: u64 = (0..1000).map(|i| options.additional_reads(i as f64 / 1000.0)).sum();
            assert!((reads as f64 / 1000.0 - expected).abs() < 0.01, "{line}: {reads}");
        }
    }
}
