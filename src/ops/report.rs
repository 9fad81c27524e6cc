//! What a long command tells its user: progress on stderr, and a report of its findings on stdout.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use indicatif::{ProgressBar, ProgressStyle};

use crate::threads::lock;

/// How often progress is printed where stderr is no terminal.
const INTERVAL: Duration = Duration::from_secs(10);

/// How many findings of a kind are shown without `-v`.
const SHOWN: usize = 10;

/// A bar on a terminal, a line every ten seconds elsewhere.
pub struct Progress {
    bar: ProgressBar,
    /// Dropping it ends the thread that prints the lines.
    _lines: Sender<()>,
}

impl Progress {
    /// `total` may be an estimate.
    pub fn new(total: u64, unit: &'static str) -> Progress {
        let bar = ProgressBar::new(total);
        let style =
            format!("[{{elapsed_precise}}] {{wide_bar}} {{human_pos}}/{{human_len}} {unit}, {{per_sec}}, {{eta}} left");
        bar.set_style(ProgressStyle::with_template(&style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        let (lines, end) = bounded::<()>(0);
        if !std::io::stderr().is_terminal() {
            let bar = bar.clone();
            std::thread::spawn(move || {
                while end.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                    let (done, total) = (bar.position(), bar.length().unwrap_or(0));
                    let left = bar.eta().as_secs();
                    eprintln!("{done} of about {total} {unit}, about {left} s left");
                }
            });
        }
        Progress { bar, _lines: lines }
    }

    pub fn add(&self, n: u64) {
        self.bar.inc(n);
    }

    /// Prints a line above the bar.
    pub fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    /// Removes the bar.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

/// Findings by kind: how many, and their names or the first of them.
pub struct Report {
    verbose: bool,
    kinds: Mutex<BTreeMap<&'static str, (usize, BTreeSet<String>)>>,
}

impl Report {
    /// `verbose`: keeps and shows every name.
    pub fn new(verbose: bool) -> Report {
        Report { verbose, kinds: Mutex::default() }
    }

    pub fn add(&self, kind: &'static str, name: String) {
        let mut kinds = lock(&self.kinds);
        let (count, names) = kinds.entry(kind).or_default();
        *count += 1;
        names.insert(name);
        if !self.verbose && names.len() > SHOWN {
            names.pop_last();
        }
    }

    pub fn count(&self, kind: &str) -> usize {
        lock(&self.kinds).get(kind).map_or(0, |(count, _)| *count)
    }

    /// The number of findings of each kind.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        lock(&self.kinds).iter().map(|(kind, (count, _))| (kind.to_string(), *count as u64)).collect()
    }

    pub fn show(&self) {
        for (kind, (count, names)) in &*lock(&self.kinds) {
            println!("{kind}: {count}");
            for name in names {
                // A file's name could be made to look like a line of the report.
                println!("  {}", name.replace(char::is_control, "\u{fffd}"));
            }
            if *count > names.len() {
                println!("  … and {} more, -v shows all", count - names.len());
            }
        }
    }
}
