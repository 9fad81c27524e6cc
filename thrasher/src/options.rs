//! The command line: options, defaults and checks. All of it is checked before the first request.

use crate::client::Target;
use pico_args::Arguments;
use std::{ffi::OsString, ops::RangeInclusive, time::Duration};

pub const USAGE: &str = "\
thrasher: a load tester for mkv and minikeyvalue

Each cycle writes a new key, reads it back, compares every byte, and deletes it. The exit status is
0, or 1 if a request failed or a value differed, or 2 for a wrong option.

usage: thrasher [options]        with one dash or two, and a space or = before a value

  --url URL          the master (http://localhost:3000)
  --count N          number of cycles (10000)
  --threads N        number of concurrent cycles (16)
  --size SIZE        size of a value in bytes, or a range such as 1K-10M from which each key's size
                     is drawn uniformly; K, M and G are powers of 1024 (25)
  --reads SHARE      additional reads, as an average share of the operations after the write, from 0
                     to below 1. A cycle's own read and delete make up the rest: 0.9 adds 18 reads
                     to each cycle, or 9 with --keep (0)
  --keep             delete nothing. The additional reads then read any key that the same thread has
                     written; without --keep they read the key of their own cycle
  --userpass U:P     basic authentication for the master, or for the servers of --direct or --filer
  --direct           use no master: --url is a comma-separated list of nginx volumes. A write or
                     delete goes to each volume in turn, a read to a random one
  --filer            use no master: --url is a server that returns the value itself instead of a
                     redirect, such as a SeaweedFS filer
  --timeout SECONDS  longest wait for a connection, or for the next bytes on it (30)
  --seed N           name the keys /thrasher-N-0, /thrasher-N-1 and so on; N and --size determine
                     the values (random)
  --json             print one JSON object and nothing else
  --help             print this text
";

/// The kind of server that the requests go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// Redirects a GET to the volume that has the value.
    Master,
    /// nginx volumes without a master. Keys are paths of files.
    Volumes,
    /// Answers a GET with the value.
    Filer,
}

/// The checked options of a run.
#[derive(Debug)]
pub struct Options {
    /// One server, or the volumes for `Server::Volumes`. Never empty.
    pub targets: Vec<Target>,
    pub server: Server,
    /// Number of cycles.
    pub count: u64,
    pub threads: u64,
    /// Size of a value in bytes, at least 1: mkv refuses empty values.
    pub size: RangeInclusive<u64>,
    /// From 0 to below 1, see `USAGE`.
    pub reads: f64,
    pub keep: bool,
    pub timeout: Duration,
    pub seed: u64,
    pub json: bool,
}

impl Options {
    /// Parses the arguments after the program's name. Returns `None` for `--help`. An error is one
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
            server: server(&mut args)?,
            count: option(&mut args, "--count", 10_000, |s| integer(s, 1..=1 << 48))?,
            threads: option(&mut args, "--threads", 16, |s| integer(s, 1..=4096))?,
            size: option(&mut args, "--size", 25..=25, size_range)?,
            reads: option(&mut args, "--reads", 0.0, share)?,
            timeout: Duration::from_secs(option(&mut args, "--timeout", 30, |s| integer(s, 1..=86_400))?),
            seed: option(&mut args, "--seed", fastrand::u64(..1 << 32), |s| integer(s, 0..=u64::MAX))?,
            keep: args.contains("--keep"),
            json: args.contains("--json"),
        };
        if let Some(unknown) = args.finish().first() {
            return Err(format!("{}: unknown option, see --help", unknown.display()));
        }
        if options.targets.len() > 1 && options.server != Server::Volumes {
            return Err("--url: several servers need --direct".into());
        }
        Ok(Some(options))
    }

    /// The number of additional reads in one cycle, where `random` is drawn from 0 to below 1. With
    /// `own` operations after the write, reads / (own + reads) is the share on average.
    pub fn additional_reads(&self, random: f64) -> u64 {
        let own = if self.keep { 1.0 } else { 2.0 };
        // 1e-9 makes up for rounding errors, which would turn 18.0 into 17.
        (own * self.reads / (1.0 - self.reads) + random + 1e-9) as u64
    }
}

/// pico-args knows `--url` but not `-url`.
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

/// Parses an option's value. The last one counts if the option is repeated, as in Go.
fn option<T>(
    args: &mut Arguments,
    name: &'static str,
    default: T,
    parse: fn(&str) -> Result<T, String>,
) -> Result<T, String> {
    let values = args.values_from_fn(name, parse).map_err(|e| format!("{name}: {e}"))?;
    Ok(values.into_iter().next_back().unwrap_or(default))
}

fn server(args: &mut Arguments) -> Result<Server, String> {
    match (args.contains("--direct"), args.contains("--filer")) {
        (false, false) => Ok(Server::Master),
        (true, false) => Ok(Server::Volumes),
        (false, true) => Ok(Server::Filer),
        (true, true) => Err("--direct and --filer exclude each other".into()),
    }
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

/// Parses a size such as `1K`, which is 1024 bytes.
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
        for (text, bytes) in [("1", 1), ("25", 25), ("1K", 1024), ("3m", 3 << 20), ("2G", 2 << 30)] {
            assert_eq!(size_range(text), Ok(bytes..=bytes), "{text}");
        }
        assert_eq!(size_range("1K-10M"), Ok(1024..=10 << 20));
    }

    #[test]
    fn invalid_sizes_are_refused() {
        for text in ["", "0", "K", "-1", "1-", "-", "2K-1K", "1T", "1.5K", "1KB", "99999999999G"] {
            assert!(size_range(text).is_err(), "{text}");
        }
    }

    #[test]
    fn one_or_two_dashes_and_space_or_equals_are_equivalent() {
        for line in ["--size 1K --keep", "-size 1K -keep", "--size=1K --keep", "-keep -size=1K"] {
            let options = parse(line).expect(line);
            assert_eq!((options.size, options.keep), (1024..=1024, true), "{line}");
        }
        assert_eq!(parse("-count 1 -count=2").expect("an option may be repeated").count, 2);
    }

    #[test]
    fn an_error_names_the_option() {
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
            ("--url a:1,b:2 --filer", "--url"),
            ("--direct --filer", "--direct"),
            ("--sise 1", "--sise"),
            ("extra", "extra"),
        ] {
            let error = parse(line).expect_err(line);
            assert!(error.starts_with(name) && !error.contains('\n'), "{line}: {error}");
        }
    }
}
