//! Progress of a long command: a bar on a terminal, a line every ten seconds elsewhere.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

const EVERY: Duration = Duration::from_secs(10);

pub struct Progress {
    bar: ProgressBar,
    unit: &'static str,
    /// When a line was last written; `None`: the bar shows itself.
    said: Option<Mutex<Instant>>,
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
        let said = (!std::io::stderr().is_terminal()).then(|| Mutex::new(Instant::now()));
        Progress { bar, unit, said }
    }

    pub fn add(&self, n: u64) {
        self.bar.inc(n);
        if let Some(said) = &self.said
            && let Ok(mut said) = said.try_lock()
            && said.elapsed() >= EVERY
        {
            *said = Instant::now();
            let (done, total, eta) =
                (self.bar.position(), self.bar.length().unwrap_or(0), self.bar.eta().as_secs());
            eprintln!("{done} of about {total} {}, about {eta} s left", self.unit);
        }
    }

    /// A line of its own, above the bar.
    pub fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}
