//! Times as people and file names show them, in UTC.

use jiff::Timestamp;

/// `20261125-042236` for these seconds since 1970: in the order of time, and part of a file's name.
pub fn stamp(seconds: u64) -> String {
    formatted(seconds, "%Y%m%d-%H%M%S")
}

/// `2026-11-25 04:22:36` for these seconds since 1970.
pub fn readable(seconds: u64) -> String {
    formatted(seconds, "%Y-%m-%d %H:%M:%S")
}

fn formatted(seconds: u64, format: &str) -> String {
    let time = seconds.try_into().ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    time.unwrap_or(Timestamp::MAX).strftime(format).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        assert_eq!(stamp(0), "19700101-000000");
        assert_eq!(readable(951_782_399), "2000-02-28 23:59:59");
        assert_eq!(readable(1_795_580_958), "2026-11-25 04:29:18");
        assert_eq!(&readable(u64::MAX)[..4], "9999");
    }
}
