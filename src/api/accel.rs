//! GET and HEAD through the front (`-accel`): nginx fetches the blob, and the client sees one address.
//!
//! The response names the location `@volume` of `deploy/front.conf` in `X-Accel-Redirect`, and tells it in headers of its
//! own what to fetch and what to say of it; nginx drops both before it answers the client:
//!
//! ```text
//! X-Mkv-Blob           the URL of the blob, without http://, with an address and a signature
//! X-Mkv-Replica        the replica and the blob's path. The front collects those that failed in X-Mkv-Failed, and asks
//!                      the master again
//! X-Mkv-Range          the range to ask for, if there is one
//! X-Mkv-Authorization  the client's login, for volumes that check passwords
//! X-Mkv-Etag, X-Mkv-Md5    what the client gets as ETag and Content-Md5
//! ```
//!
//! A volume's ETag is made of time and length, so that two values written within one second can share one. The ETag here
//! is the value's md5; therefore conditions (RFC 9110, section 13) are judged here, and not by the volume. It judges
//! the range.

use std::time::Duration;

use super::auth::Credentials;
use super::status;
use crate::error::Result;
use crate::format::record::{Record, hex};
use crate::http::{Request, Response};
use crate::store::{Located, Store};

/// Whether the request came through the front, which sets and overwrites this header.
pub fn is_from_front(request: &Request) -> bool {
    request.header("X-Mkv-Front").is_some()
}

/// The replicas, each with the blob's path, that the front could not read.
pub fn failed<'a>(request: &Request<'a>) -> Vec<&'a str> {
    request.header("X-Mkv-Failed").unwrap_or_default().split_whitespace().collect()
}

/// The response that lets the front fetch the blob, or a 304 or 412. `linktime`: how long the front's signature is
/// valid.
pub fn response<'a>(
    store: &Store,
    Located { record, replica, path, .. }: &Located,
    request: &Request,
    client: Option<&Credentials>,
    linktime: Duration,
) -> Result<Response<'a>> {
    let etag = etag(record);
    let conditions = Conditions { etag: etag.as_deref(), time: record.time };
    if let Some(status) = conditions.refusal(|name| request.header(name)) {
        let headers = etag.map(|etag| ("ETag", etag)).into_iter().collect();
        return Ok(Response { headers, ..status::empty(status) });
    }
    let mut headers = vec![
        ("X-Accel-Redirect", "@volume".to_string()),
        ("X-Mkv-Blob", store.volumes.link_by_address(replica, path, linktime)?),
        ("X-Mkv-Replica", format!("{replica}{path}")),
    ];
    let range = request.header("Range").filter(|_| conditions.takes_range(request.header("If-Range")));
    headers.extend(range.map(|range| ("X-Mkv-Range", range.to_string())));
    headers.extend(client.map(|client| ("X-Mkv-Authorization", client.header.clone())));
    headers.extend(etag.map(|etag| ("X-Mkv-Etag", etag)));
    // It is the digest of the whole value.
    let md5 = record.hash.filter(|_| range.is_none());
    headers.extend(md5.map(|hash| ("X-Mkv-Md5", hex(&hash))));
    Ok(Response { headers, ..status::empty(200) })
}

/// The value's ETag. It is a weak one without a hash: a value written within the same second may share it.
fn etag(record: &Record) -> Option<String> {
    match (&record.hash, record.time, record.size) {
        (Some(hash), ..) => Some(format!("\"{}\"", hex(hash))),
        (None, Some(time), Some(size)) => Some(format!("W/\"{:x}-{time:x}-{size:x}\"", record.version)),
        _ => None,
    }
}

/// What a request's conditions are compared with.
struct Conditions<'a> {
    etag: Option<&'a str>,
    /// When the value was written, in seconds since 1970.
    time: Option<u64>,
}

impl Conditions<'_> {
    /// The status that a GET gets in place of the value, in the order of RFC 9110, section 13.2.2.
    fn refusal<'r>(&self, header: impl Fn(&str) -> Option<&'r str>) -> Option<u16> {
        // A date that does not parse is ignored, as is any date where the time of the value is not known.
        let newer_than = |name| Some(self.time? > date(header(name)?)?);
        let is_changed = match header("If-Match") {
            Some(list) => !self.matches(list, true),
            None => newer_than("If-Unmodified-Since") == Some(true),
        };
        let is_known = match header("If-None-Match") {
            Some(list) => self.matches(list, false),
            None => newer_than("If-Modified-Since") == Some(false),
        };
        if is_changed { Some(412) } else { is_known.then_some(304) }
    }

    /// Whether the list has the value's ETag. `strong`: weak ones do not count.
    fn matches(&self, list: &str, strong: bool) -> bool {
        let bare = |etag: &str| etag.trim().trim_start_matches("W/").to_string();
        let is_strong = |etag: &str| !etag.trim().starts_with("W/");
        list.trim() == "*"
            || self.etag.is_some_and(|own| {
                let same = |etag: &str| bare(etag) == bare(own) && (!strong || is_strong(etag) && is_strong(own));
                list.split(',').any(same)
            })
    }

    /// Whether a range is sent as such, and not the whole value. A date does not prove that the value is the same.
    fn takes_range(&self, if_range: Option<&str>) -> bool {
        if_range.is_none_or(|validator| validator.trim() != "*" && self.matches(validator, true))
    }
}

/// An HTTP date, in seconds since 1970.
fn date(text: &str) -> Option<u64> {
    let time = httpdate::parse_http_date(text).ok()?;
    Some(time.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATES: [&str; 3] =
        ["Tue, 14 Nov 2023 22:13:19 GMT", "Tue, 14 Nov 2023 22:13:20 GMT", "Tue, 14 Nov 2023 22:13:21 GMT"];

    /// The status for these headers, of a value of the second date.
    fn status_for(etag: Option<&str>, headers: &[(&str, &str)]) -> Option<u16> {
        let conditions = Conditions { etag, time: Some(1_700_000_000) };
        conditions.refusal(|name| headers.iter().find(|(given, _)| *given == name).map(|(_, value)| *value))
    }

    #[test]
    fn conditions_are_judged_in_their_order() {
        let own = Some("\"abc\"");
        let [before, same, after] = DATES;
        for (headers, status) in [
            (&[][..], None),
            (&[("If-None-Match", "\"abc\"")], Some(304)),
            (&[("If-None-Match", "\"x\", W/\"abc\"")], Some(304)),
            (&[("If-None-Match", "*")], Some(304)),
            (&[("If-None-Match", "\"x\""), ("If-Modified-Since", same)], None),
            (&[("If-Modified-Since", before)], None),
            (&[("If-Modified-Since", same)], Some(304)),
            (&[("If-Modified-Since", after)], Some(304)),
            (&[("If-Modified-Since", "yesterday")], None),
            (&[("If-Match", "\"x\", \"abc\"")], None),
            (&[("If-Match", "W/\"abc\"")], Some(412)),
            (&[("If-Match", "\"x\""), ("If-None-Match", "\"abc\"")], Some(412)),
            (&[("If-Match", "*"), ("If-Unmodified-Since", before)], None),
            (&[("If-Unmodified-Since", before)], Some(412)),
            (&[("If-Unmodified-Since", same)], None),
        ] {
            assert_eq!(status_for(own, headers), status, "{headers:?}");
        }
        assert_eq!(status_for(None, &[("If-None-Match", "\"abc\"")]), None);
        assert_eq!(status_for(Some("W/\"abc\""), &[("If-Match", "W/\"abc\"")]), Some(412));
        let unknown = Conditions { etag: None, time: None };
        assert_eq!(unknown.refusal(|name| (name == "If-Modified-Since").then_some(after)), None);
    }

    #[test]
    fn a_range_is_of_the_value_that_the_client_has() {
        let takes = |etag, if_range| Conditions { etag: Some(etag), time: Some(1_700_000_000) }.takes_range(if_range);
        assert!(takes("\"abc\"", None) && takes("\"abc\"", Some("\"abc\"")));
        for other in ["\"x\"", "W/\"abc\"", DATES[1], "*", ""] {
            assert!(!takes("\"abc\"", Some(other)), "{other}");
        }
        assert!(!takes("W/\"abc\"", Some("W/\"abc\"")));
    }
}
