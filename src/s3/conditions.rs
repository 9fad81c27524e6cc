//! Conditions of a request: `If-Match`, `If-None-Match`, `If-Modified-Since`, `If-Unmodified-Since` (RFC 9110, section
//! 13), and the same of a copy's source. Clients send ETags with and without quotes.

use super::head::Head;
use super::meta::{self, Meta};
use crate::error::{Error, Result};
use crate::format::record::Record;

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conditions {
    matches: Option<String>,
    none_match: Option<String>,
    /// Seconds since 1970; a date that does not parse is ignored.
    modified_since: Option<u64>,
    unmodified_since: Option<u64>,
}

/// How a read ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    Go,
    NotModified,
    Failed,
}

impl Conditions {
    /// The conditions on the object that a request names.
    pub fn of(head: &Head) -> Conditions {
        Conditions::named(head, "")
    }

    /// The conditions on a copy's source.
    pub fn of_source(head: &Head) -> Conditions {
        Conditions::named(head, "x-amz-copy-source-")
    }

    /// The condition that the object has this ETag.
    pub fn matching(etag: &str) -> Conditions {
        Conditions { matches: Some(etag.to_string()), ..Conditions::default() }
    }

    fn named(head: &Head, prefix: &str) -> Conditions {
        let header = |name: &str| head.header(&format!("{prefix}{name}"));
        let date = |name| header(name).and_then(seconds);
        Conditions {
            matches: header("if-match").map(String::from),
            none_match: header("if-none-match").map(String::from),
            modified_since: date("if-modified-since"),
            unmodified_since: date("if-unmodified-since"),
        }
    }

    /// Judges a read of an object with this ETag and time. A condition on the ETag overrides one on the date.
    pub fn verdict(&self, etag: &str, time: u64) -> Verdict {
        let is_other = match (&self.matches, self.unmodified_since) {
            (Some(list), _) => !names_etag(list, etag),
            (None, since) => since.is_some_and(|since| time > since),
        };
        let is_known = match (&self.none_match, self.modified_since) {
            (Some(list), _) => names_etag(list, etag),
            (None, since) => since.is_some_and(|since| time <= since),
        };
        match (is_other, is_known) {
            (true, _) => Verdict::Failed,
            (false, true) => Verdict::NotModified,
            (false, false) => Verdict::Go,
        }
    }

    /// Judges a write over this record. `If-Match` without an object is `NotFound`, all else `Precondition`.
    pub fn judge(&self, old: Option<&Record>) -> Result<()> {
        let Some(old) = old.filter(|old| old.live()) else {
            return if self.matches.is_some() { Err(Error::NOT_FOUND) } else { Ok(()) };
        };
        let etag = meta::etag(old, &Meta::decode(&old.meta)?);
        match self.verdict(&etag, old.time.unwrap_or_default()) {
            Verdict::Go => Ok(()),
            _ => Err(Error::Precondition),
        }
    }

    /// Whether there are any.
    pub fn is_any(&self) -> bool {
        *self != Conditions::default()
    }
}

/// Whether a list of ETags has this one.
fn names_etag(list: &str, etag: &str) -> bool {
    list.trim() == "*" || list.split(',').any(|given| unquoted(given) == etag)
}

/// An ETag without quotes.
pub fn unquoted(etag: &str) -> &str {
    let etag = etag.trim();
    let etag = etag.strip_prefix("W/").unwrap_or(etag);
    etag.strip_prefix('"').and_then(|etag| etag.strip_suffix('"')).unwrap_or(etag)
}

/// An HTTP date, in seconds since 1970.
pub fn seconds(text: &str) -> Option<u64> {
    let time = httpdate::parse_http_date(text).ok()?;
    Some(time.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATES: [&str; 3] =
        ["Tue, 14 Nov 2023 22:13:19 GMT", "Tue, 14 Nov 2023 22:13:20 GMT", "Tue, 14 Nov 2023 22:13:21 GMT"];

    fn of(headers: &[(&str, &str)]) -> Conditions {
        Conditions::of(&Head { method: "GET", target: "/b/a", headers })
    }

    #[test]
    fn a_condition_on_the_etag_overrides_one_on_the_date() {
        let [before, same, after] = DATES;
        for (headers, verdict) in [
            (&[][..], Verdict::Go),
            (&[("If-None-Match", "\"abc\"")], Verdict::NotModified),
            (&[("if-none-match", "abc")], Verdict::NotModified),
            (&[("If-None-Match", "\"x\", W/\"abc\"")], Verdict::NotModified),
            (&[("If-None-Match", "*")], Verdict::NotModified),
            (&[("If-None-Match", "\"x\""), ("If-Modified-Since", same)], Verdict::Go),
            (&[("If-Modified-Since", before)], Verdict::Go),
            (&[("If-Modified-Since", same)], Verdict::NotModified),
            (&[("If-Modified-Since", after)], Verdict::NotModified),
            (&[("If-Modified-Since", "yesterday")], Verdict::Go),
            (&[("If-Match", "\"x\", \"abc\"")], Verdict::Go),
            (&[("If-Match", "abcd")], Verdict::Failed),
            (&[("If-Match", "\"x\""), ("If-None-Match", "\"abc\"")], Verdict::Failed),
            (&[("If-Match", "*"), ("If-Unmodified-Since", before)], Verdict::Go),
            (&[("If-Unmodified-Since", before)], Verdict::Failed),
            (&[("If-Unmodified-Since", same)], Verdict::Go),
        ] {
            assert_eq!(of(headers).verdict("abc", 1_700_000_000), verdict, "{headers:?}");
        }
        let headers = [("x-amz-copy-source-if-match", "x")];
        let head = Head { method: "PUT", target: "/b/a", headers: &headers };
        assert_eq!(Conditions::of_source(&head).verdict("abc", 0), Verdict::Failed);
        assert_eq!(Conditions::of(&head), Conditions::default());
    }

    #[test]
    fn a_write_is_judged_by_the_record_that_it_replaces() {
        let record = Record { hash: Some([0xab; 16]), time: Some(1), ..Record::default() };
        let unlinked = Record { state: crate::format::record::State::Unlinked, ..record.clone() };
        let etag = "ab".repeat(16);
        for (header, value, none, live) in [
            ("If-None-Match", "*", Ok(()), Err(Error::Precondition)),
            ("If-None-Match", "x", Ok(()), Ok(())),
            ("If-Match", etag.as_str(), Err(Error::NOT_FOUND), Ok(())),
            ("If-Match", "x", Err(Error::NOT_FOUND), Err(Error::Precondition)),
            ("If-Match", "*", Err(Error::NOT_FOUND), Ok(())),
            ("If-Unmodified-Since", DATES[0], Ok(()), Ok(())),
        ] {
            let conditions = of(&[(header, value)]);
            assert_eq!(conditions.judge(None), none, "{header}: {value}");
            assert_eq!(conditions.judge(Some(&unlinked)), none, "{header}: {value}");
            assert_eq!(conditions.judge(Some(&record)), live, "{header}: {value}");
        }
    }
}
