//! Progress of a long command: a bar on a terminal, a line every ten seconds elsewhere.

use std::io::IsTerminal;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

const EVERY: Duration = Duration::from_secs(10);

pub struct Progress {
    bar: ProgressBar,
    /// The lines end with it.
    _lines: Sender<()>,
}

impl Progress {
    /// `total` may be an estimate.
    pub fn new(total: u64, unit: &'static str) -> Progress {
        let bar = ProgressBar::new(total);
        let style = format!(
            "[{{elapsed_precise}}] {{wide_bar}} {{human_pos}}/{{human_len}} {unit}, {{per_sec}}, {{eta}} left"
        );
        bar.set_style(
            ProgressStyle::with_template(&style).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        let (lines, end) = channel();
        if !std::io::stderr().is_terminal() {
            let bar = bar.clone();
            std::thread::spawn(move || {
                while end.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
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

    /// A line of its own, above the bar.
    pub fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    pub fn end(self) {
        self.bar.finish_and_clear();
    }
}
