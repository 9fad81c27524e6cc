//! META: what S3 keeps of an object beside its value, in the object's record.
//!
//! ```text
//! meta = pair *( "&" pair )
//! pair = name "=" value            ; both percent-encoded but for letters, digits, "-", ".", "_" and "~"
//! ```
//!
//! | name | value |
//! | --- | --- |
//! | `content-type`, `cache-control`, `content-disposition`, `content-encoding`, `content-language`, `expires` | the header that came with the object |
//! | `x-amz-meta-…` | metadata of the client's own |
//! | `etag` | the ETag without quotes, if it is not the value's md5: that of a multipart upload |
//! | `upload` | the id of the multipart upload that made the object |
//! | `crc32`, `crc32c`, `crc64nvme`, `sha1`, `sha256` | the checksum that the client sent, in base64 |

use percent_encoding::{percent_decode_str, utf8_percent_encode};

use super::answer::Outcome;
use super::checksum::Algorithm;
use super::failure::{Code, Failure};
use super::head::{Head, Query, UNRESERVED};
use crate::error::{Error, Result};
use crate::format::record::{Record, hex};

/// The headers that are kept. `response-NAME` in a query overrides them.
pub const KEPT: [&str; 6] =
    ["content-type", "cache-control", "content-disposition", "content-encoding", "content-language", "expires"];

pub const USER: &str = "x-amz-meta-";

/// The type of an object that came without one.
pub const DEFAULT_TYPE: &str = "binary/octet-stream";

/// The most bytes of a client's metadata: names without `x-amz-meta-`, and values.
const USER_MAX: usize = 2 << 10;

/// The most bytes of the other kept headers: as many as AWS allows a head.
const KEPT_MAX: usize = 8 << 10;

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Meta {
    pairs: Vec<(String, String)>,
}

impl Meta {
    /// What a request says of an object: its headers, and those that a presigned URL has in its query.
    pub fn of_request(head: &Head, query: &Query) -> Outcome<Meta, Failure> {
        let mut meta = Meta::default();
        let queried = query.0.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let queried = queried.filter(|(name, _)| is_user(name));
        for (name, value) in head.headers.iter().map(|(name, value)| (*name, value.trim())).chain(queried) {
            let name = name.to_ascii_lowercase();
            if is_user(&name) || KEPT.contains(&name.as_str()) && !value.is_empty() {
                meta.add(name, value);
            }
        }
        meta.strip_aws_chunked();
        meta.check()?;
        Ok(meta)
    }

    /// A header that comes twice is one list.
    fn add(&mut self, name: String, value: &str) {
        match self.pairs.iter_mut().find(|(known, _)| *known == name) {
            Some((_, list)) => *list = format!("{list},{value}"),
            None => self.pairs.push((name, value.to_string())),
        }
    }

    /// Removes `aws-chunked`, which is the framing of the request's body and no encoding of the object.
    fn strip_aws_chunked(&mut self) {
        let Some(value) = self.get("content-encoding") else { return };
        let is_framing = |coding: &&str| coding.trim().eq_ignore_ascii_case("aws-chunked");
        if !value.split(',').any(|coding| is_framing(&coding)) {
            return;
        }
        let left: Vec<_> = value.split(',').filter(|coding| !is_framing(coding)).map(str::trim).collect();
        let left = left.join(", ");
        self.pairs.retain(|(name, _)| name != "content-encoding");
        if !left.is_empty() {
            self.set("content-encoding", left);
        }
    }

    fn check(&self) -> Outcome<(), Failure> {
        if self.pairs.iter().any(|(name, value)| !is_token(name) || !is_text(value)) {
            return Err(Failure::new(Code::InvalidArgument, "metadata has a control character or no name"));
        }
        let bytes = |of_user: bool| -> usize {
            let pairs = self.pairs.iter().filter(|(name, _)| is_user(name) == of_user);
            pairs.map(|(name, value)| name.strip_prefix(USER).unwrap_or(name).len() + value.len()).sum()
        };
        for (what, bytes, most) in [("metadata has", bytes(true), USER_MAX), ("headers have", bytes(false), KEPT_MAX)] {
            if bytes > most {
                let text = format!("the {what} {bytes} bytes, {most} are allowed");
                return Err(Failure::new(Code::MetadataTooLarge, text));
            }
        }
        Ok(())
    }

    /// Decodes META. Fails with `Index` if a header could not be made of it.
    pub fn decode(text: &str) -> Result<Meta> {
        let wrong = || Error::Index(format!("META does not decode: {text}"));
        let plain = |text: &str| percent_decode_str(text).decode_utf8().map(|text| text.into_owned());
        let mut pairs = Vec::new();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').ok_or_else(wrong)?;
            let (name, value) = (plain(name).map_err(|_| wrong())?, plain(value).map_err(|_| wrong())?);
            if !is_token(&name) || !is_text(&value) {
                return Err(wrong());
            }
            pairs.push((name, value));
        }
        Ok(Meta { pairs })
    }

    pub fn encode(&self) -> String {
        let encode = |text| utf8_percent_encode(text, UNRESERVED);
        let pairs = self.pairs.iter().map(|(name, value)| format!("{}={}", encode(name), encode(value)));
        pairs.collect::<Vec<_>>().join("&")
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.pairs.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub fn set(&mut self, name: &str, value: impl Into<String>) {
        self.pairs.retain(|(known, _)| known != name);
        self.pairs.push((name.to_string(), value.into()));
    }

    /// Adds the checksum that a client has sent with the value.
    pub fn set_checksum(&mut self, checksum: Option<(Algorithm, impl Into<String>)>) {
        if let Some((algorithm, value)) = checksum {
            self.set(algorithm.name(), value);
        }
    }

    /// The checksum that was sent with the value.
    pub fn checksum(&self) -> Option<(Algorithm, &str)> {
        self.pairs.iter().find_map(|(name, value)| Some((Algorithm::parse(name)?, value.as_str())))
    }

    /// The client's metadata, with whole names.
    pub fn user(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs.iter().filter(|(name, _)| is_user(name)).map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// What describes the value itself, and stays when a request replaces the headers and metadata.
    pub fn of_value(&self) -> Meta {
        Meta { pairs: self.pairs.iter().filter(|(name, _)| !is_of_client(name)).cloned().collect() }
    }

    /// The headers and metadata, without what describes the value.
    pub fn of_client(&self) -> Meta {
        Meta { pairs: self.pairs.iter().filter(|(name, _)| is_of_client(name)).cloned().collect() }
    }

    pub fn extend(&mut self, other: Meta) {
        other.pairs.into_iter().for_each(|(name, value)| self.set(&name, value));
    }
}

fn is_user(name: &str) -> bool {
    name.len() > USER.len() && name.get(..USER.len()).is_some_and(|start| start.eq_ignore_ascii_case(USER))
}

/// Whether it is a header or metadata that the client sent.
fn is_of_client(name: &str) -> bool {
    KEPT.contains(&name) || is_user(name)
}

/// Whether a header can have this name (RFC 9110, section 5.6.2).
fn is_token(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

/// Whether a header can have this value.
pub fn is_text(value: &str) -> bool {
    value.bytes().all(|byte| !byte.is_ascii_control() || byte == b'\t')
}

/// An object's ETag, without quotes: the md5 of its value, or that of its multipart upload. A value without a hash gets
/// one of version, time and size, which says with its `-` that it is no md5.
pub fn etag(record: &Record, meta: &Meta) -> String {
    match (meta.get("etag"), &record.hash) {
        (Some(etag), _) => etag.to_string(),
        (None, Some(hash)) => hex(hash),
        (None, None) => {
            let (time, size) = (record.time.unwrap_or_default(), record.size.unwrap_or_default());
            format!("{:x}-{time:x}-{size:x}", record.version)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta_of(headers: &[(&str, &str)]) -> Outcome<Meta, Code> {
        let head = Head { method: "PUT", target: "/b/a", headers };
        Meta::of_request(&head, &Query(Vec::new())).map_err(|failure| failure.code)
    }

    #[test]
    fn kept_headers_and_metadata_survive_the_record() {
        let meta = meta_of(&[
            ("Content-Type", "text/plain; a=\"b&c\""),
            ("Content-Language", ""),
            ("Host", "x"),
            ("X-Amz-Meta-Mtime", " 12.5 "),
            ("x-amz-meta-empty", ""),
            ("x-amz-meta-é", "ü"),
            ("x-amz-meta-mtime", "7"),
        ]);
        assert_eq!(meta, Err(Code::InvalidArgument), "a name is a token");
        let mut meta = meta_of(&[
            ("Content-Type", "text/plain; a=\"b&c\""),
            ("Content-Language", ""),
            ("X-Amz-Meta-Mtime", " 12.5 "),
            ("x-amz-meta-empty", ""),
            ("x-amz-meta-mtime", "ü"),
        ])
        .unwrap();
        meta.set("etag", "abc-2");
        let text = "content-type=text%2Fplain%3B%20a%3D%22b%26c%22&x-amz-meta-mtime=12.5%2C%C3%BC&x-amz-meta-empty=&etag=abc-2";
        assert_eq!(meta.encode(), text);
        assert_eq!(Meta::decode(text), Ok(meta.clone()));
        assert_eq!(meta.user().collect::<Vec<_>>(), [("x-amz-meta-mtime", "12.5,ü"), ("x-amz-meta-empty", "")]);
        assert_eq!(meta.of_value().encode(), "etag=abc-2");
        assert_eq!(meta.of_client().get("etag"), None);
        assert_eq!(Meta::decode("").unwrap().encode(), "");
    }

    #[test]
    fn meta_that_no_header_can_hold_does_not_decode() {
        for text in ["a", "=a", "a=%0d%0ab", "a=%ff", "a%20b=c", "a%0ab=c"] {
            assert!(Meta::decode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_framing_is_no_encoding_of_the_object() {
        for (sent, kept) in [
            ("gzip", Some("gzip")),
            ("deflate,  gzip", Some("deflate,  gzip")),
            ("gzip, aws-chunked", Some("gzip")),
            ("aws-chunked,gzip", Some("gzip")),
            ("AWS-chunked", None),
            ("aws-chunked, aws-chunked", None),
        ] {
            assert_eq!(meta_of(&[("Content-Encoding", sent)]).unwrap().get("content-encoding"), kept, "{sent}");
        }
    }

    #[test]
    fn two_kilobytes_of_metadata_are_the_most() {
        let of = |bytes: usize| meta_of(&[("x-amz-meta-ab", &"v".repeat(bytes - 2))]);
        assert!(of(USER_MAX).is_ok());
        assert_eq!(of(USER_MAX + 1), Err(Code::MetadataTooLarge));
        assert_eq!(meta_of(&[("Expires", &"x".repeat(KEPT_MAX))]), Err(Code::MetadataTooLarge));
    }

    #[test]
    fn an_object_without_a_hash_has_an_etag_that_is_no_md5() {
        let mut record = Record { time: Some(16), size: Some(1), version: 10, ..Record::default() };
        assert_eq!(etag(&record, &Meta::default()), "a-10-1");
        record.hash = Some([0xab; 16]);
        assert_eq!(etag(&record, &Meta::default()), "ab".repeat(16));
        assert_eq!(etag(&record, &Meta::decode("etag=x-2").unwrap()), "x-2");
    }
}
