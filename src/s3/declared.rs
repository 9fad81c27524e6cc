//! What the head of a request says of its body: the framing, the length, the checksum.

use super::checksum::{Algorithm, Hasher};
use super::chunked::Framing;
use super::failure::{Code, Failure};
use super::head::{Head, digits};

/// What `x-amz-content-sha256` says. Content-Encoding does not count: restic sends aws-chunked without it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Plain,
    /// In hexadecimal digits.
    Sha256(String),
    Chunked(Framing),
}

impl Kind {
    pub fn of(content_sha256: Option<&str>) -> Result<Kind, Failure> {
        match content_sha256.unwrap_or("UNSIGNED-PAYLOAD") {
            "UNSIGNED-PAYLOAD" => Ok(Kind::Plain),
            "STREAMING-UNSIGNED-PAYLOAD-TRAILER" => Ok(Kind::Chunked(Framing { signed: false, trailers: true })),
            "STREAMING-AWS4-HMAC-SHA256-PAYLOAD" => Ok(Kind::Chunked(Framing { signed: true, trailers: false })),
            "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER" => Ok(Kind::Chunked(Framing { signed: true, trailers: true })),
            text if text.starts_with("STREAMING-") => {
                Err(Failure::new(Code::NotImplemented, format!("a body of {text} is not implemented")))
            }
            text if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                Ok(Kind::Sha256(text.into()))
            }
            _ => {
                let text = "x-amz-content-sha256 is not UNSIGNED-PAYLOAD, STREAMING-… or 64 hexadecimal digits";
                Err(Failure::new(Code::InvalidArgument, text))
            }
        }
    }
}

/// The length of an aws-chunked body without its framing, in bytes.
pub(super) fn decoded_length(head: &Head) -> Result<Option<u64>, Failure> {
    let Some(text) = head.header("x-amz-decoded-content-length") else {
        return Ok(None);
    };
    let wrong = || Failure::new(Code::InvalidArgument, "x-amz-decoded-content-length is no number of bytes");
    digits(text).map(Some).ok_or_else(wrong)
}

/// A checksum that the client sends, and the body's own so far.
pub(super) struct Checksum {
    pub algorithm: Algorithm,
    pub hasher: Hasher,
    /// As the client sent it, and decoded. `None`: it comes in the trailer.
    pub sent: Option<(String, Vec<u8>)>,
}

impl Checksum {
    fn new(algorithm: Algorithm) -> Checksum {
        Checksum { algorithm, hasher: Hasher::new(algorithm), sent: None }
    }

    /// The checksum in the head. `x-amz-checksum-type`, `-mode` and `-algorithm` are none.
    pub fn of_head(head: &Head) -> Result<Option<Checksum>, Failure> {
        let others = ["x-amz-checksum-type", "x-amz-checksum-mode", "x-amz-checksum-algorithm"];
        let is_checksum = |name: &String| name.starts_with("x-amz-checksum-") && !others.contains(&name.as_str());
        let names: Vec<String> = head.amz_names().filter(is_checksum).collect();
        match &names[..] {
            [] => Ok(None),
            [name] => {
                let mut checksum = Checksum::new(algorithm(name)?);
                checksum.take(head.header(name).unwrap_or_default())?;
                Ok(Some(checksum))
            }
            _ => Err(Failure::new(Code::InvalidRequest, "a request may have one checksum only")),
        }
    }

    /// The checksum that the head announces for the trailer.
    pub fn of_trailer(head: &Head, kind: &Kind) -> Result<Option<Checksum>, Failure> {
        let has_trailers = matches!(kind, Kind::Chunked(Framing { trailers: true, .. }));
        let announced = match head.header("x-amz-trailer") {
            Some(_) if !has_trailers => {
                let text = "x-amz-trailer needs x-amz-content-sha256: STREAMING-…-TRAILER";
                return Err(Failure::new(Code::InvalidRequest, text));
            }
            Some(name) => Some(algorithm(&name.to_ascii_lowercase())?),
            None => head.header("x-amz-sdk-checksum-algorithm").and_then(Algorithm::parse).filter(|_| has_trailers),
        };
        Ok(announced.map(Checksum::new))
    }

    /// Takes the checksum that the client sent.
    fn take(&mut self, text: &str) -> Result<(), Failure> {
        let wrong = || format!("{} is no such checksum in base64", self.algorithm.header());
        let digest = self.algorithm.decode(text).ok_or_else(|| Failure::new(Code::BadDigest, wrong()))?;
        self.sent = Some((text.to_string(), digest));
        Ok(())
    }

    /// Compares the checksum that the client sent with the body's own. `trailer`: its name, in lower case, and value.
    pub fn verify(&mut self, trailer: Option<(String, String)>) -> Result<(), Failure> {
        match trailer {
            Some((name, value)) if self.sent.is_none() && name == self.algorithm.header() => self.take(&value)?,
            None if self.sent.is_some() => {}
            _ => {
                let text = "the trailer is not the one checksum that the head announces";
                return Err(Failure::new(Code::MalformedTrailerError, text));
            }
        }
        let own = std::mem::replace(&mut self.hasher, Hasher::new(self.algorithm)).finish();
        if self.sent.as_ref().is_some_and(|(_, sent)| *sent == own) {
            return Ok(());
        }
        let text = format!("the {} of the body is not the one that the client sent", self.algorithm.name());
        Err(Failure::new(Code::BadDigest, text))
    }
}

/// The algorithm of the header with this name, in lower case.
fn algorithm(header: &str) -> Result<Algorithm, Failure> {
    let algorithm = header.strip_prefix("x-amz-checksum-").and_then(Algorithm::parse);
    algorithm.ok_or_else(|| Failure::new(Code::NotImplemented, format!("the checksum {header} is not implemented")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head<T>(headers: &[(&str, &str)], see: impl Fn(&Head) -> Result<T, Failure>) -> Result<T, Code> {
        see(&Head { method: "PUT", target: "/b/k", headers }).map_err(|failure| failure.code)
    }

    #[test]
    fn the_kinds_of_bodies_are_told_apart() {
        let kind = |text: Option<&str>| Kind::of(text).map_err(|failure| failure.code);
        let chunked = |signed, trailers| Ok(Kind::Chunked(Framing { signed, trailers }));
        let digits = "0123456789abcdefABCDEF".repeat(3);
        for (text, expected) in [
            (None, Ok(Kind::Plain)),
            (Some("UNSIGNED-PAYLOAD"), Ok(Kind::Plain)),
            (Some("STREAMING-UNSIGNED-PAYLOAD-TRAILER"), chunked(false, true)),
            (Some("STREAMING-AWS4-HMAC-SHA256-PAYLOAD"), chunked(true, false)),
            (Some("STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"), chunked(true, true)),
            (Some("STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD"), Err(Code::NotImplemented)),
            (Some("unsigned-payload"), Err(Code::InvalidArgument)),
            (Some(""), Err(Code::InvalidArgument)),
            (Some(&digits[..63]), Err(Code::InvalidArgument)),
            (Some(&format!("{}+1", &digits[..62])), Err(Code::InvalidArgument)),
            (Some(&"é".repeat(32)), Err(Code::InvalidArgument)),
        ] {
            assert_eq!(kind(text), expected, "{text:?}");
        }
        assert_eq!(kind(Some(&digits[..64])), Ok(Kind::Sha256(digits[..64].into())));
    }

    #[test]
    fn the_length_is_a_number() {
        let length = |text| head(&[("X-Amz-Decoded-Content-Length", text)], decoded_length);
        assert_eq!((length("0"), length("18446744073709551615")), (Ok(Some(0)), Ok(Some(u64::MAX))));
        for wrong in ["", "+1", "-1", "1x", "18446744073709551616"] {
            assert_eq!(length(wrong), Err(Code::InvalidArgument));
        }
        assert_eq!(head(&[], decoded_length), Ok(None));
    }

    #[test]
    fn a_head_names_at_most_one_checksum_that_is_known() {
        let of =
            |headers: &[(&str, &str)]| head(headers, Checksum::of_head).map(|found| found.map(|its| its.algorithm));
        let crc32 = ("X-Amz-Checksum-Crc32", "AAAAAA==");
        assert_eq!(of(&[("x-amz-checksum-type", "FULL_OBJECT"), ("x-amz-checksum-mode", "ENABLED")]), Ok(None));
        assert_eq!(of(&[crc32, ("x-amz-checksum-algorithm", "CRC32")]), Ok(Some(Algorithm::Crc32)));
        assert_eq!(of(&[crc32, ("x-amz-checksum-sha1", "x")]), Err(Code::InvalidRequest));
        assert_eq!(of(&[crc32, crc32]), Err(Code::InvalidRequest));
        assert_eq!(of(&[("x-amz-checksum-crc32", "AAAA")]), Err(Code::BadDigest));
        assert_eq!(of(&[("x-amz-checksum-sha512", "AAAA")]), Err(Code::NotImplemented));
    }

    #[test]
    fn a_head_announces_the_checksum_in_the_trailer() {
        let of = |signed, trailers, headers: &[(&str, &str)]| {
            let kind = Kind::Chunked(Framing { signed, trailers });
            head(headers, |head| Checksum::of_trailer(head, &kind)).map(|found| found.map(|its| its.algorithm))
        };
        let (trailer, sdk) = (("X-Amz-Trailer", "X-Amz-Checksum-Sha1"), ("x-amz-sdk-checksum-algorithm", "CRC64NVME"));
        assert_eq!(of(false, true, &[trailer, sdk]), Ok(Some(Algorithm::Sha1)));
        assert_eq!(of(true, true, &[sdk]), Ok(Some(Algorithm::Crc64nvme)));
        assert_eq!((of(true, true, &[]), of(true, false, &[sdk])), (Ok(None), Ok(None)));
        assert_eq!(of(true, false, &[trailer]), Err(Code::InvalidRequest));
        assert_eq!(of(false, true, &[("x-amz-trailer", "x-amz-checksum-md5")]), Err(Code::NotImplemented));
        assert_eq!(of(false, true, &[("x-amz-trailer", "x-other")]), Err(Code::NotImplemented));
    }
}
