//! The head of a request, as its signature sees it: every byte as the client sent it.

use std::ops::RangeInclusive;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str};

use super::failure::{Code, Failure};

/// The characters that stay as they are when queries and META are percent-encoded: RFC 3986's unreserved ones.
pub(super) const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

pub struct Head<'a> {
    pub method: &'a str,
    /// The path and the query.
    pub target: &'a str,
    /// All fields, in order.
    pub headers: &'a [(&'a str, &'a str)],
}

impl<'a> Head<'a> {
    /// The first header with this name. The case of the name does not matter.
    pub fn header(&self, name: &str) -> Option<&'a str> {
        self.values(name).next()
    }

    /// The values of all headers with this name, without spaces around them.
    pub(super) fn values(&self, name: &str) -> impl Iterator<Item = &'a str> {
        self.headers.iter().filter(move |(its, _)| its.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }

    /// The names of the `x-amz-` headers, in lower case.
    pub(super) fn amz_names(&self) -> impl Iterator<Item = String> {
        self.headers.iter().map(|(name, _)| name.to_ascii_lowercase()).filter(|name| name.starts_with("x-amz-"))
    }

    /// The path, as sent.
    pub fn path(&self) -> &'a str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// What the client says of the body's hash. A presigned URL may say it, too.
    pub(super) fn content_sha256(&self) -> Option<String> {
        let mut parameters = parameters(self.target).filter(|(name, _)| name == b"X-Amz-Content-Sha256");
        let in_query = parameters.next().and_then(|(_, value)| String::from_utf8(value?).ok());
        in_query.or_else(|| self.header("x-amz-content-sha256").map(String::from))
    }
}

/// The parameters of a query, decoded.
#[derive(Debug)]
pub struct Query(pub Vec<(String, String)>);

impl Query {
    /// The first parameter of this name; names are case-sensitive.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(given, _)| given == name).map(|(_, value)| value.as_str())
    }

    /// A number in this range. A parameter without a value counts as absent.
    pub fn number(&self, name: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, Failure> {
        let Some(text) = self.get(name).filter(|text| !text.is_empty()) else { return Ok(None) };
        let number = text.parse().ok().filter(|number| range.contains(number));
        let wrong = || {
            let (least, most) = range.clone().into_inner();
            Failure::new(Code::InvalidArgument, format!("{name}={text} is not a number from {least} to {most}"))
        };
        number.map(Some).ok_or_else(wrong)
    }
}

/// The parameters of a target's query, in order and decoded. One without `=` has an empty value. Fails if one is not
/// UTF-8. Signatures are checked against these, so use them, and nothing else, to see what a request asks for.
pub fn query(target: &str) -> Result<Query, Failure> {
    let text = |bytes| {
        String::from_utf8(bytes).map_err(|_| Failure::new(Code::InvalidURI, "a parameter of the query is not UTF-8"))
    };
    let pairs: Result<Vec<_>, Failure> =
        parameters(target).map(|(name, value)| Ok((text(name)?, text(value.unwrap_or_default())?))).collect();
    pairs.map(Query)
}

/// The parameters as bytes. `None` for the value: there is no `=`.
pub(super) fn parameters(target: &str) -> impl Iterator<Item = (Vec<u8>, Option<Vec<u8>>)> {
    let query = target.split_once('?').map_or("", |(_, query)| query);
    query.split('&').filter(|piece| !piece.is_empty()).map(|piece| match piece.split_once('=') {
        Some((name, value)) => (decode(name), Some(decode(value))),
        None => (decode(piece), None),
    })
}

/// Whether it is the name of one of S3's headers, in letters of either case.
pub(super) fn is_amz(name: &str) -> bool {
    name.get(..6).is_some_and(|start| start.eq_ignore_ascii_case("x-amz-"))
}

/// Parses decimal digits; `str::parse` alone takes a sign, too.
pub(super) fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// In a query `+` is a space. Clients that mean a plus sign send `%2B`.
fn decode(text: &str) -> Vec<u8> {
    percent_decode_str(&text.replace('+', " ")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_decoded() {
        let pairs = |target| query(target).unwrap().0;
        assert_eq!(
            pairs("/b/a+b?a=1&&b=x%20y+z%2B=w&uploads&c=&a=2%zz"),
            [
                ("a".into(), "1".into()),
                ("b".into(), "x y z+=w".into()),
                ("uploads".into(), "".into()),
                ("c".into(), "".into()),
                ("a".into(), "2%zz".into()),
            ]
        );
        assert!(pairs("/b/k").is_empty() && pairs("/b/k?").is_empty() && pairs("").is_empty());
        assert_eq!(pairs("/b?prefix=%C3%A9?"), [("prefix".into(), "é?".into())]);
        assert_eq!(query("/b?prefix=%FF").unwrap_err().code, Code::InvalidURI);
    }

    #[test]
    fn headers_are_found_in_any_case() {
        let head =
            Head { method: "PUT", target: "/b/k?X-Amz-Content-Sha256=a%2Db", headers: &[("hOsT", " a "), ("x-a", "")] };
        assert_eq!((head.header("Host"), head.header("X-A"), head.header("x")), (Some("a"), Some(""), None));
        assert_eq!((head.path(), head.content_sha256().as_deref()), ("/b/k", Some("a-b")));
    }
}
