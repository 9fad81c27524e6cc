//! Outcomes as HTTP responses: the one place that turns an error into a status.

use std::fmt::{self, Display};

use crate::error::Error;
use crate::http::{Content, Refusal, Response};

const METHODS: &str = "GET, HEAD, PUT, REPLACE, DELETE, UNLINK, RELINK, REBALANCE";

/// The status (RFC 9110) for an error.
pub fn status(error: &Error) -> u16 {
    match error {
        Error::Usage(_) | Error::BadRequest(_) => 400,
        Error::Unauthorized => 401,
        Error::Forbidden(_) => 403,
        Error::NotFound(_) | Error::NoSuchUpload => 404,
        Error::Method => 405,
        Error::Locked => 409,
        Error::Gone => 410,
        Error::NoValue => 411,
        Error::Precondition => 412,
        Error::TooMany => 413,
        Error::KeyTooLong(_) => 414,
        Error::Refused { .. } | Error::Index(_) | Error::Failed(_) => 500,
        Error::Unreachable { .. } | Error::Unavailable(_) => 503,
    }
}

/// The kinds of errors in the metrics, and what they mean.
pub const KINDS: [(&str, &str); 7] = [
    ("client", "wrong requests and missing keys"),
    ("locked", "two requests wrote one key"),
    ("volume_unreachable", "a volume gave no answer"),
    ("volume_refused", "a volume answered with an error"),
    ("no_replica", "no volume has the value"),
    ("unavailable", "not possible at that time"),
    ("index", "the index failed"),
];

/// The `kind` label of an error in the metrics.
pub fn kind(error: &Error) -> &'static str {
    match error {
        Error::Refused { .. } => "volume_refused",
        Error::Unreachable { .. } => "volume_unreachable",
        Error::Index(_) => "index",
        Error::Locked => "locked",
        Error::Gone => "no_replica",
        Error::Unavailable(_) | Error::Failed(_) => "unavailable",
        _ => "client",
    }
}

/// A response without a body.
pub fn empty<'a>(status: u16) -> Response<'a> {
    Response { status, headers: Vec::new(), extra: Vec::new(), content: Content::Empty }
}

pub fn text<'a>(status: u16, content_type: &str, text: String) -> Response<'a> {
    let headers = vec![("Content-Type", content_type.to_string())];
    Response { status, headers, extra: Vec::new(), content: Content::Text(text) }
}

/// A page of HTML, which is never kept and runs nothing but what `policy` (Content-Security-Policy) allows.
pub fn html<'a>(status: u16, policy: String, page: String) -> Response<'a> {
    let mut response = text(status, "text/html; charset=utf-8", page);
    let fixed =
        [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")];
    response.headers.extend(fixed.map(|(name, value)| (name, value.to_string())));
    response.headers.push(("Content-Security-Policy", policy));
    response
}

/// The 404 for a browser that asks for `/`, which is no key: the way to the page.
pub fn welcome<'a>() -> Response<'a> {
    let page = "<!DOCTYPE html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"color-scheme\" content=\"light dark\">\
                <title>mkv</title><h1>mkv</h1><p>This is a key-value store, and <code>/</code> is not a key in it. \
                <a href=\"/?status\">Look at the store</a></p></html>\n";
    html(404, "default-src 'none'".into(), page.into())
}

/// What tells a request from others, in the log and in the text of its error.
#[derive(Debug, Clone, Copy)]
pub enum RequestId<'a> {
    /// From the client's `X-Request-Id`.
    Given(&'a str),
    /// The microsecond in which the master started, and one more for each request: another start repeats none.
    Own(u64),
}

impl<'a> RequestId<'a> {
    /// The id that a client gives is used if it is 1 to 64 letters, digits, `-`, `_`, `.` and `:`.
    pub fn new(given: Option<&'a str>, number: u64) -> RequestId<'a> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
        match given {
            Some(id) if (1..=64).contains(&id.len()) && id.bytes().all(allowed) => RequestId::Given(id),
            _ => RequestId::Own(number),
        }
    }
}

impl Display for RequestId<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            RequestId::Given(id) => f.write_str(id),
            RequestId::Own(number) => write!(f, "{number:x}"),
        }
    }
}

/// The response to a request that failed.
pub fn failure<'a>(error: &Error, id: RequestId) -> Response<'a> {
    plain(status(error), &error.to_string(), id)
}

/// The response to a request that the server refuses by itself.
pub fn refusal<'a>(refusal: Refusal, id: RequestId) -> Response<'a> {
    let (status, line) = match refusal {
        Refusal::Malformed(why) => (400, why),
        Refusal::HeadTimeout => (408, "the head of the request was not complete in time"),
        Refusal::HeadTooLarge => (431, "the head of the request is over 64 KiB or 100 fields"),
        Refusal::TooManyConnections => (503, "too many connections: try again later"),
        Refusal::Stopping => (503, "the master is stopping: try again later"),
        Refusal::Version => (505, "use version 1.1 of HTTP"),
    };
    plain(status, line, id)
}

fn plain<'a>(status: u16, line: &str, id: RequestId) -> Response<'a> {
    let mut response = text(status, "text/plain; charset=utf-8", format!("{line} (request {id})\n"));
    response.headers.extend(match status {
        401 => Some(("WWW-Authenticate", "Basic realm=\"mkv\"".to_string())),
        405 => Some(("Allow", METHODS.to_string())),
        503 => Some(("Retry-After", "5".to_string())),
        _ => None,
    });
    response
}
