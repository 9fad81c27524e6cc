//! The command line: one struct, its defaults, and all of it checked before the first request.

use crate::client::Target;
use pico_args::Arguments;
use std::{ffi::OsString, ops::RangeInclusive, time::Duration};

pub const USAGE: &str = "\
thrasher: a load tester for mkv and minikeyvalue

A cycle writes a new key, reads it back through the master's redirect, checks every byte, and
deletes it. Exit status: 0; 1 if anything went wrong; 2 for a wrong option.

usage: thrasher [options]        one dash or two, a value after a space or a =

  --url URL          the master (http://localhost:3000)
  --count N          cycles (10000)
  --threads N        cycles under way at the same time (16)
  --size SIZE        bytes of a value, or a range like 1K-10M, from which each key's size is
                     drawn evenly; K, M and G are powers of 1024 (25)
  --reads SHARE      additional reads: on average this share, from 0 to below 1, of the operations
                     that follow the write. The cycle's own read and delete are the rest, so 0.9
                     means 18 additional reads a cycle, or 9 with --keep (0)
  --keep             delete nothing; the additional reads are then of any key that the thread has
                     written in this run, without --keep of the cycle's own key
  --userpass U:P     basic authorization for the master, or with --direct for the volumes
  --direct           no master: --url is a comma-separated list of nginx volumes; a write or delete
                     goes to each of them in turn, a read to one of them at random
  --timeout SECONDS  the longest wait for a connection, or for the next bytes on it (30)
  --seed N           keys are /thrasher-N-0, /thrasher-N-1 and so on, and their values depend only
                     on N and --size (random)
  --json             print one JSON object and nothing else
  --help             print this
";

/// What a run is to do. A run need not check any of it again.
#[derive(Debug)]
pub struct Options {
    /// The master, or with `direct` the volumes; never empty.
    pub targets: Vec<Target>,
    pub count: u64,
    pub threads: u64,
    /// Bytes of a value: at least 1, as the API refuses an empty value.
    pub size: RangeInclusive<u64>,
    /// From 0 to below 1, see USAGE.
    pub reads: f64,
    pub keep: bool,
    pub direct: bool,
    pub timeout: Duration,
    pub seed: u64,
    pub json: bool,
}

impl Options {
    /// The options in the arguments after the program's name; `None` for `--help`. An error is one
    /// line that names the option.
    pub fn from_args(args: Vec<OsString>) -> Result<Option<Options>, String> {
        let mut args = Arguments::from_vec(args.into_iter().map(with_two_dashes).collect());
        if args.contains(["-h", "--help"]) {
            return Ok(None);
        }
        let url = option(&mut args, "--url", "http://localhost:3000".into(), |s| Ok(s.to_owned()))?;
        let userpass = option(&mut args, "--userpass", None, userpass)?;
        let options = Options {
            targets: url
                .split(',')
                .map(|url| Target::new(url, userpass.as_deref()))
                .collect::<Result<_, _>>()
                .map_err(|e| format!("--url: {e}"))?,
            count: option(&mut args, "--count", 10_000, |s| integer(s, 1..=1 << 48))?,
            threads: option(&mut args, "--threads", 16, |s| integer(s, 1..=4096))?,
            size: option(&mut args, "--size", 25..=25, size_range)?,
            reads: option(&mut args, "--reads", 0.0, share)?,
            timeout: Duration::from_secs(option(&mut args, "--timeout", 30, |s| {
                integer(s, 1..=86_400)
            })?),
            seed: option(&mut args, "--seed", fastrand::u64(..1 << 32), |s| {
                integer(s, 0..=u64::MAX)
            })?,
            keep: args.contains("--keep"),
            direct: args.contains("--direct"),
            json: args.contains("--json"),
        };
        if let Some(unknown) = args.finish().first() {
            return Err(format!("{}: no such option, see --help", unknown.display()));
        }
        if options.targets.len() > 1 && !options.direct {
            return Err("--url: more than one needs --direct".into());
        }
        Ok(Some(options))
    }

    /// How many additional reads one cycle makes, for a `chance` from 0 to below 1: with `k`
    /// operations of its own after the write, reads / (k + reads) is the share on average.
    pub fn additional_reads(&self, chance: f64) -> u64 {
        let own = if self.keep { 1.0 } else { 2.0 };
        // A little more than rounding errors can take away.
        (own * self.reads / (1.0 - self.reads) + chance + 1e-9) as u64
    }
}

/// pico-args takes `-url` only as `--url`.
fn with_two_dashes(arg: OsString) -> OsString {
    match arg.as_encoded_bytes() {
        [b'-', first, _, ..] if first.is_ascii_alphabetic() => {
            let mut long = OsString::from("-");
            long.push(arg);
            long
        }
        _ => arg,
    }
}

/// The value of the last `name` among the arguments, as Go's flags have it.
fn option<T>(
    args: &mut Arguments,
    name: &'static str,
    default: T,
    parse: fn(&str) -> Result<T, String>,
) -> Result<T, String> {
    let values = args.values_from_fn(name, parse).map_err(|e| format!("{name}: {e}"))?;
    Ok(values.into_iter().next_back().unwrap_or(default))
}

fn integer(s: &str, range: RangeInclusive<u64>) -> Result<u64, String> {
    s.parse()
        .ok()
        .filter(|n| range.contains(n))
        .ok_or_else(|| format!("expected an integer from {} to {}", range.start(), range.end()))
}

fn share(s: &str) -> Result<f64, String> {
    let share = s.parse().ok().filter(|share| (0.0..1.0).contains(share));
    share.ok_or_else(|| "expected a number from 0 to below 1".into())
}

fn userpass(s: &str) -> Result<Option<String>, String> {
    if s.contains(':') { Ok(Some(s.to_owned())) } else { Err("expected user:password".into()) }
}

/// `1K`: 1024 bytes.
fn size(s: &str) -> Option<u64> {
    let digits = s.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match s[digits.len()..].to_ascii_uppercase().as_str() {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit).filter(|bytes| *bytes > 0)
}

fn size_range(s: &str) -> Result<RangeInclusive<u64>, String> {
    let (low, high) = s.split_once('-').unwrap_or((s, s));
    match (size(low), size(high)) {
        (Some(low), Some(high)) if low <= high => Ok(low..=high),
        _ => Err("expected a size like 1024 or 10M, or a range like 1K-10M".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        let args = line.split_whitespace().map(OsString::from).collect();
        Options::from_args(args).map(|options| options.expect("no --help in the line"))
    }

    #[test]
    fn sizes_have_units_of_1024() {
        for (text, bytes) in [("1", 1), ("25", 25), ("1K", 1024), ("3m", 3 << 20), ("2G", 2 << 30)]
        {
            assert_eq!(size_range(text), Ok(bytes..=bytes), "{text}");
        }
        assert_eq!(size_range("1K-10M"), Ok(1024..=10 << 20));
    }

    #[test]
    fn sizes_that_mean_nothing_are_refused() {
        for text in ["", "0", "K", "-1", "1-", "-", "2K-1K", "1T", "1.5K", "1KB", "99999999999G"] {
            assert!(size_range(text).is_err(), "{text}");
        }
    }

    #[test]
    fn one_dash_or_two_and_space_or_equals_mean_the_same() {
        for line in ["--size 1K --keep", "-size 1K -keep", "--size=1K --keep", "-keep -size=1K"] {
            let options = parse(line).expect(line);
            assert_eq!((options.size, options.keep), (1024..=1024, true), "{line}");
        }
        assert_eq!(parse("-count 1 -count=2").expect("twice").count, 2);
    }

    #[test]
    fn a_wrong_option_is_named() {
        for (line, name) in [
            ("--size 1X", "--size"),
            ("--size", "--size"),
            ("--count=0", "--count"),
            ("--threads 5000", "--threads"),
            ("--reads 1", "--reads"),
            ("--reads NaN", "--reads"),
            ("--timeout 0", "--timeout"),
            ("--userpass joe", "--userpass"),
            ("--url https://host", "--url"),
            ("--url a:1,b:2", "--url"),
            ("--url host/?list", "--url"),
            ("--url a:1,,b:2 --direct", "--url"),
            ("--sise 1", "--sise"),
            ("extra", "extra"),
        ] {
            let error = parse(line).expect_err(line);
            assert!(error.starts_with(name) && !error.contains('\n'), "{line}: {error}");
        }
    }
}
