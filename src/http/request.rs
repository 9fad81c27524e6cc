//! A request's head (RFC 9112, sections 2 to 6): method, target, fields, and where its body ends.
//!
//! httparse parses the syntax. This file adds the checks that httparse leaves to its caller, and is always strict:
//! at most one field may say where the body ends, and it may appear only once. A request borrows the head's bytes.

use std::mem::MaybeUninit;
use std::str::from_utf8;

use httparse::{Error, Header, Status};

use super::Refusal;

/// The longest head, in bytes.
pub const HEAD_MAX: usize = 64 << 10;

/// The most fields of a head.
pub const FIELDS_MAX: usize = 100;

/// The longest body, in bytes: the largest file of ext4.
const LENGTH_MAX: u64 = 1 << 44;

/// Room for a head's fields. Filling it with empty ones would cost a few percent of a short request.
pub type Fields<'a> = [MaybeUninit<Header<'a>>; FIELDS_MAX];

pub const NO_FIELDS: Fields = [const { MaybeUninit::uninit() }; FIELDS_MAX];

#[derive(Debug)]
pub struct Request<'a> {
    pub method: &'a str,
    pub target: &'a str,
    /// The body's length in bytes. `None`: it is chunked.
    pub length: Option<u64>,
    /// The client waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
    /// The minor version of HTTP/1.
    pub minor: u8,
    /// The connection is to be closed after the response.
    pub close: bool,
    fields: &'a [Header<'a>],
}

/// Fields that may appear only once: a proxy could use the first of two, and this server the last.
const ONCE: [&str; 5] = ["Host", "Content-Length", "Transfer-Encoding", "Expect", "Authorization"];

impl<'a> Request<'a> {
    /// Parses a head, which ends with its empty line.
    pub(super) fn parse(head: &'a [u8], fields: &'a mut Fields<'a>) -> Result<Request<'a>, Refusal> {
        let mut parsed = httparse::Request::new(&mut []);
        let status = parsed.parse_with_uninit_headers(head, fields);
        let (Ok(Status::Complete(_)), Some(method), Some(target), Some(minor)) =
            (status, parsed.method, parsed.path, parsed.version)
        else {
            return Err(why(status, head));
        };
        let fields: &[Header] = parsed.headers;
        let (mut once, mut close, mut keep) = ([None; ONCE.len()], false, false);
        for field in fields {
            let value = from_utf8(field.value).map_err(|_| Refusal::Malformed("a header's value is not UTF-8"))?;
            let is = |name: &&str| field.name.eq_ignore_ascii_case(name);
            if let Some(n) = ONCE.iter().position(is) {
                if once[n].replace(value).is_some() {
                    return Err(Refusal::Malformed("a header that may appear only once appears twice"));
                }
            } else if is(&"Connection") {
                let has = |word| value.split(',').any(|w| w.trim().eq_ignore_ascii_case(word));
                (close, keep) = (close || has("close"), keep || has("keep-alive"));
            }
        }
        let [host, length, encoding, expect, _] = once;
        check_host(host, minor)?;
        let expects = expect.is_some_and(|value| value.eq_ignore_ascii_case("100-continue"));
        Ok(Request {
            method,
            target,
            length: body_length(length, encoding, minor)?,
            expects_continue: expects && minor > 0,
            minor,
            close: close || minor == 0 && !keep,
            fields,
        })
    }

    /// The first header with this name. The case of the name does not matter.
    pub fn header(&self, name: &str) -> Option<&'a str> {
        let field = self.fields.iter().find(|field| field.name.eq_ignore_ascii_case(name))?;
        from_utf8(field.value).ok()
    }

    /// All headers, in the order in which they came.
    pub fn headers(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.fields.iter().filter_map(|field| Some((field.name, from_utf8(field.value).ok()?)))
    }
}

/// Why a head cannot be parsed.
fn why(status: Result<Status<usize>, Error>, head: &[u8]) -> Refusal {
    match status {
        Err(Error::TooManyHeaders) => Refusal::HeadTooLarge,
        Err(Error::Version) if has_other_version(head) => Refusal::Version,
        Err(Error::HeaderName) => Refusal::Malformed("a header's name is not a token and a colon"),
        Err(Error::HeaderValue) => Refusal::Malformed("a header's value has a control character"),
        _ => Refusal::Malformed("the request line is not a method, a target and a version"),
    }
}

/// Whether the request line ends in a version, as `HTTP/2.0`.
fn has_other_version(head: &[u8]) -> bool {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let [_, _, version] = line.split(|byte| *byte == b' ').collect::<Vec<_>>()[..] else {
        return false;
    };
    matches!(version, [b'H', b'T', b'T', b'P', b'/', major, b'.', minor]
        if major.is_ascii_digit() && minor.is_ascii_digit())
}

/// Section 3.2: HTTP/1.1 has one Host.
fn check_host(host: Option<&str>, minor: u8) -> Result<(), Refusal> {
    let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%:[]".contains(&byte);
    match host {
        Some("") => Err(Refusal::Malformed("Host is empty")),
        None if minor > 0 => Err(Refusal::Malformed("the Host header is missing")),
        Some(host) if host.starts_with([':', '.']) || !host.bytes().all(is_host) => {
            Err(Refusal::Malformed("Host is no host"))
        }
        _ => Ok(()),
    }
}

/// Section 6: the length of a request's body; `None`: it is chunked.
fn body_length(length: Option<&str>, encoding: Option<&str>, minor: u8) -> Result<Option<u64>, Refusal> {
    match (length, encoding) {
        (None, None) => Ok(Some(0)),
        (Some(_), Some(_)) => Err(Refusal::Malformed("there are both Content-Length and Transfer-Encoding")),
        (Some(text), None) => {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            let length = text.parse().ok().filter(|length| digits && *length <= LENGTH_MAX);
            let wrong = "Content-Length is not a number of bytes, or over 16 TiB";
            length.map(Some).ok_or(Refusal::Malformed(wrong))
        }
        (None, Some(_)) if minor == 0 => Err(Refusal::Malformed("HTTP/1.0 has no Transfer-Encoding")),
        (None, Some(text)) if text.eq_ignore_ascii_case("chunked") => Ok(None),
        (None, Some(_)) => Err(Refusal::Malformed("a Transfer-Encoding other than chunked")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses a request of these lines, separated by `|`, and returns what `see` returns for it.
    fn parse<T>(lines: &str, see: impl Fn(&Request) -> T) -> Result<T, Refusal> {
        let head = format!("{}\r\n\r\n", lines.replace('|', "\r\n"));
        let mut fields = NO_FIELDS;
        Request::parse(head.as_bytes(), &mut fields).map(|request| see(&request))
    }

    fn is_malformed(lines: &str) -> bool {
        matches!(parse(lines, |_| ()), Err(Refusal::Malformed(_)))
    }

    #[test]
    fn a_head_is_method_target_and_fields() {
        let lines = "PUT /a%20b?c HTTP/1.1|host: x:1|x-one:\t 1 2 |X-Two:|X-One: 3";
        let seen = parse(lines, |request| {
            let fields = ["X-One", "x-two", "x-three"].map(|name| request.header(name).map(String::from));
            (request.method.to_string(), request.target.to_string(), fields)
        });
        let fields = [Some("1 2".to_string()), Some(String::new()), None];
        assert_eq!(seen, Ok(("PUT".to_string(), "/a%20b?c".to_string(), fields)));
    }

    #[test]
    fn the_body_ends_where_one_field_says() {
        for (lines, length) in [
            ("", Some(0)),
            ("|Content-Length: 7", Some(7)),
            ("|content-length: 0007", Some(7)),
            ("|Content-Length: 17592186044416", Some(1 << 44)),
            ("|Transfer-Encoding: chunked", None),
            ("|transfer-encoding:  CHUNKED ", None),
        ] {
            let lines = format!("PUT / HTTP/1.1|Host: x{lines}");
            assert_eq!(parse(&lines, |request| request.length), Ok(length), "{lines}");
        }
        for lines in [
            "Content-Length: 7|Content-Length: 7",
            "Content-Length: 7|Transfer-Encoding: chunked",
            "Transfer-Encoding: chunked|Transfer-Encoding: chunked",
            "Content-Length:",
            "Content-Length: +7",
            "Content-Length: 7,7",
            "Content-Length: 7 7",
            "Content-Length: 0x7",
            "Content-Length: 17592186044417",
            "Content-Length: 18446744073709551623",
            "Transfer-Encoding: gzip, chunked",
            "Transfer-Encoding: chunked, chunked",
            "Transfer-Encoding:",
            "Transfer-Encoding: xchunked",
        ] {
            assert!(is_malformed(&format!("PUT / HTTP/1.1|Host: x|{lines}")), "{lines}");
        }
        assert!(is_malformed("PUT / HTTP/1.0|Transfer-Encoding: chunked"));
    }

    #[test]
    fn a_head_with_two_meanings_is_malformed() {
        for lines in [
            "",
            "GET /",
            "GET  / HTTP/1.1|Host: x",
            "GET / HTTP/1.1 |Host: x",
            "GET / HTTP/1.1 x|Host: x",
            "GET /a b HTTP/1.1|Host: x",
            " GET / HTTP/1.1|Host: x",
            "G(T / HTTP/1.1|Host: x",
            "GET / HTTP/1.1",
            "GET / HTTP/1.1|Host: x|Host: x",
            "GET / HTTP/1.1|Host: x/y",
            "GET / HTTP/1.1|Host:",
            "GET / HTTP/1.1|Host: :80",
            "GET / HTTP/1.1|Host: x|X : y",
            "GET / HTTP/1.1|Host: x| X: y",
            "GET / HTTP/1.1|Host: x|X: y| folded",
            "GET / HTTP/1.1|Host: x|X",
            "GET / HTTP/1.1|Host: x|: y",
            "GET / HTTP/1.1|Host: x|X\0: y",
            "GET / HTTP/1.1|Host: x|X: \0",
            "GET / HTTP/1.1|Host: x|X: a\rb",
            "GET / HTTP/1.1|Host: x|Authorization: a|Authorization: b",
            "GET / HTTP/11|Host: x",
            "GET / http/1.1|Host: x",
        ] {
            assert!(is_malformed(lines), "{lines:?}");
        }
    }

    #[test]
    fn a_version_is_1_0_or_1_1() {
        for version in ["2.0", "1.2", "0.9", "9.9"] {
            let lines = format!("GET / HTTP/{version}|Host: x");
            assert_eq!(parse(&lines, |_| ()), Err(Refusal::Version), "{version}");
        }
        assert_eq!(parse("GET / HTTP/1.0", |request| request.minor), Ok(0));
    }

    #[test]
    fn a_connection_stays_unless_a_side_ends_it() {
        for (lines, close) in [
            ("1.1", false),
            ("1.1|Connection: close", true),
            ("1.1|Connection: x, Close|Connection: keep-alive", true),
            ("1.1|Connection: closed", false),
            ("1.0", true),
            ("1.0|Connection: Keep-Alive", false),
            ("1.0|Connection: close, keep-alive", true),
        ] {
            let lines = format!("GET / HTTP/{lines}|Host: x");
            assert_eq!(parse(&lines, |request| request.close), Ok(close), "{lines}");
        }
    }

    #[test]
    fn only_http_1_1_can_expect_100_continue() {
        let expects = |lines: &str| parse(lines, |request| request.expects_continue);
        assert_eq!(expects("PUT / HTTP/1.1|Host: x|Expect: 100-Continue"), Ok(true));
        assert_eq!(expects("PUT / HTTP/1.1|Host: x|Expect: something"), Ok(false));
        assert_eq!(expects("PUT / HTTP/1.0|Expect: 100-continue"), Ok(false));
    }

    #[test]
    fn a_hundred_fields_are_the_most() {
        let lines = |count: usize| format!("GET / HTTP/1.1|Host: x{}", "|X: y".repeat(count - 1));
        assert!(parse(&lines(100), |_| ()).is_ok());
        assert_eq!(parse(&lines(101), |_| ()), Err(Refusal::HeadTooLarge));
    }
}
