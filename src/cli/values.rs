//! The values of flags, as the types that the rooms take. An error names the flag and says what was expected.

use std::time::Duration;

use super::{Flags, usage};
use crate::error::{Error, Result};

impl Flags {
    /// Every value of a flag that may be repeated.
    pub(super) fn all(&self, name: &str) -> &[String] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// The value of a flag.
    pub(super) fn last(&self, name: &str) -> Option<&str> {
        self.all(name).last().map(String::as_str)
    }

    pub(super) fn parsed<T>(
        &self,
        name: &str,
        default: T,
        expected: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<T> {
        let Some(text) = self.last(name) else { return Ok(default) };
        read(text).ok_or_else(|| Error::Usage(format!("-{name}: expected {expected}, not {text:?}")))
    }

    pub(super) fn switch(&self, name: &str, default: bool) -> Result<bool> {
        self.parsed(name, default, "true or false", |text| match text {
            "true" | "1" | "t" | "T" | "TRUE" | "True" => Some(true),
            "false" | "0" | "f" | "F" | "FALSE" | "False" => Some(false),
            _ => None,
        })
    }

    pub(super) fn number<T: TryFrom<u64>>(&self, name: &str, default: T, low: u64, high: u64) -> Result<T> {
        let read = |text: &str| text.parse().ok().filter(|n| (low..=high).contains(n)).and_then(|n| n.try_into().ok());
        self.parsed(name, default, &format!("a number from {low} to {high}"), read)
    }

    /// `default`: seconds.
    pub(super) fn time(&self, name: &str, default: u64) -> Result<Duration> {
        self.parsed(name, Duration::from_secs(default), "a time as 500ms, 1s, 1m30s or 24h", duration)
    }

    /// A time that may not be zero. `default`: seconds.
    pub(super) fn timeout(&self, name: &str, default: u64) -> Result<Duration> {
        match self.time(name, default)? {
            Duration::ZERO => usage(format!("-{name}: 0 leaves no time to answer, {default}s is the default")),
            time => Ok(time),
        }
    }
}

/// Parses a duration as Go writes it: 500ms, 1s, 1m30s, 24h.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let (digits, tail) = rest.split_at(rest.find(|c: char| c.is_ascii_alphabetic())?);
        let (unit, tail) = tail.split_at(tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len()));
        let factor = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        seconds += digits.parse::<f64>().ok()? * factor;
        rest = tail;
    }
    let sane = text.len() > 1 && (0.0..1e9).contains(&seconds);
    sane.then(|| Duration::from_secs_f64(seconds))
}
