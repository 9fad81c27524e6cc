//! The body of a request, as a reader that decodes aws-chunked and verifies length, hash, checksum and signatures.
//!
//! Hashes and signatures are known only at the end, so bytes are given out before they are verified. `Ok(0)` means that
//! everything is right: until then the caller must not complete the value.

use std::io::{self, Read};

use sha2::{Digest, Sha256};

use super::checksum::Algorithm;
use super::chunked::Chunked;
use super::declared::{Checksum, Kind, decoded_length};
use super::failure::{Code, Failure};
use super::head::Head;
use super::sigv4::{Signed, hex};

pub struct Payload<'a> {
    source: Source<'a>,
    state: State,
    /// The bytes given out, and those that the head announces.
    count: u64,
    length: Option<u64>,
    /// The hash of the body so far, and the one in `x-amz-content-sha256`.
    sha256: Option<(Sha256, String)>,
    checksum: Option<Checksum>,
    failure: Option<Failure>,
}

enum Source<'a> {
    Plain(&'a mut dyn Read),
    Chunked(Box<Chunked<'a>>),
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Reading,
    Ended,
    /// A read has failed.
    Broken,
}

impl<'a> Payload<'a> {
    /// Fails if the head makes no sense. `signed`: what `authenticate` returned; without it signatures of chunks are not
    /// verified. `length`: the Content-Length in bytes; `None`: the body is chunked.
    pub fn new(
        head: &Head,
        signed: Option<&Signed>,
        length: Option<u64>,
        body: &'a mut dyn Read,
    ) -> Result<Payload<'a>, Failure> {
        let in_head = Checksum::of_head(head)?;
        let mut payload = Payload::without_checksum(head, signed, length, body)?;
        if in_head.is_some() && payload.checksum.is_some() {
            return Err(Failure::new(Code::InvalidRequest, "a request may have one checksum only"));
        }
        payload.checksum = payload.checksum.or(in_head);
        Ok(payload)
    }

    /// As `new`, for CompleteMultipartUpload: a checksum in its head is the object's, not the body's.
    pub fn without_checksum(
        head: &Head,
        signed: Option<&Signed>,
        length: Option<u64>,
        body: &'a mut dyn Read,
    ) -> Result<Payload<'a>, Failure> {
        let kind = Kind::of(head.content_sha256().as_deref())?;
        let checksum = Checksum::of_trailer(head, &kind)?;
        let (source, length, sha256) = match kind {
            Kind::Plain => (Source::Plain(body), length, None),
            Kind::Sha256(sent) => (Source::Plain(body), length, Some((Sha256::new(), sent))),
            Kind::Chunked(framing) => {
                let signer = signed.filter(|_| framing.signed).map(|signed| {
                    let wrong = || Failure::new(Code::InvalidRequest, "signed chunks need a signature of version 4");
                    signed.signer.clone().ok_or_else(wrong)
                });
                let chunked = Chunked::new(body, framing, signer.transpose()?);
                (Source::Chunked(Box::new(chunked)), decoded_length(head)?, None)
            }
        };
        Ok(Payload { source, state: State::Reading, count: 0, length, sha256, checksum, failure: None })
    }

    /// The length in bytes that the head announces for the decoded body. `None`: it announces none.
    pub fn length(&self) -> Option<u64> {
        self.length
    }

    /// Whether it was read to its end and is what the client said.
    pub(super) fn has_ended(&self) -> bool {
        self.state == State::Ended
    }

    /// Whether a read has failed.
    pub(super) fn is_broken(&self) -> bool {
        self.state == State::Broken
    }

    /// Why the body is refused, after a read that failed. `None`: the body under this one failed.
    pub fn failure(&mut self) -> Option<Failure> {
        self.failure.take()
    }

    /// The checksum that the client sent, as base64. It is verified once a read has returned `Ok(0)`.
    pub fn checksum(&self) -> Option<(Algorithm, &str)> {
        let checksum = self.checksum.as_ref()?;
        checksum.sent.as_ref().map(|(text, _)| (checksum.algorithm, text.as_str()))
    }

    fn advance(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = match &mut self.source {
            Source::Plain(body) => body.read(buffer)?,
            Source::Chunked(chunked) => chunked.read(buffer)?,
        };
        self.count += count as u64;
        if self.length.is_some_and(|length| self.count > length || count == 0 && self.count < length) {
            let text = "the body has not as many bytes as the head announces";
            return Err(Failure::new(Code::IncompleteBody, text).into());
        }
        if count == 0 {
            self.end()?;
        }
        if let Some((sha256, _)) = &mut self.sha256 {
            sha256.update(&buffer[..count]);
        }
        if let Some(checksum) = &mut self.checksum {
            checksum.hasher.update(&buffer[..count]);
        }
        Ok(count)
    }

    /// Verifies the hash and the checksum.
    fn end(&mut self) -> Result<(), Failure> {
        if let Some((sha256, sent)) = self.sha256.take()
            && !hex(&sha256.finalize()).eq_ignore_ascii_case(&sent)
        {
            let text = "the sha256 of the body is not the one in x-amz-content-sha256";
            return Err(Failure::new(Code::XAmzContentSHA256Mismatch, text));
        }
        let trailer = match &mut self.source {
            Source::Chunked(chunked) => chunked.trailer(),
            Source::Plain(_) => None,
        };
        match (&mut self.checksum, trailer) {
            (None, None) => Ok(()),
            (Some(checksum), trailer) => checksum.verify(trailer),
            (None, Some(_)) => {
                Err(Failure::new(Code::MalformedTrailerError, "there is a trailer that the head does not announce"))
            }
        }
    }
}

impl Read for Payload<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.state {
            _ if buffer.is_empty() => return Ok(0),
            State::Ended => return Ok(0),
            State::Broken => return Err(io::Error::other("the body is broken")),
            State::Reading => self.state = State::Broken,
        }
        let result = self.advance(buffer);
        match &result {
            Ok(count) => self.state = if *count == 0 { State::Ended } else { State::Reading },
            Err(error) => self.failure = Failure::of(error).cloned(),
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::s3::examples::{after, example, fields, keys};
    use crate::s3::sigv4::authenticate;

    const ABC: &str = "x-amz-content-sha256|ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    const CHUNKED: &str = "x-amz-content-sha256|STREAMING-UNSIGNED-PAYLOAD-TRAILER\nx-amz-trailer|x-amz-checksum-crc32";

    /// Reads a body. `headers`: lines of `NAME|VALUE`. Returns it, its announced length, and the verified checksum.
    fn read(
        headers: &str,
        length: Option<u64>,
        mut sent: &[u8],
    ) -> Result<(String, Option<u64>, String), Option<Code>> {
        let headers: Vec<_> = headers.lines().filter_map(|line| line.split_once('|')).collect();
        let head = Head { method: "PUT", target: "/b/k", headers: &headers };
        let mut payload = Payload::new(&head, None, length, &mut sent).map_err(|failure| Some(failure.code))?;
        let (mut text, length) = (String::new(), payload.length());
        if payload.read_to_string(&mut text).is_err() {
            let code = payload.failure().map(|failure| failure.code);
            assert!(payload.read(&mut [0; 9]).is_err() && payload.failure().is_none());
            return Err(code);
        }
        assert_eq!(payload.read(&mut [0; 9]).unwrap(), 0);
        let checksum =
            payload.checksum().map_or(String::new(), |(algorithm, text)| format!("{} {text}", algorithm.name()));
        Ok((text, length, checksum))
    }

    #[test]
    fn a_plain_body_is_held_to_its_length_its_hash_and_its_checksum() {
        let abc = |checksum: &str| Ok(("abc".to_string(), Some(3), checksum.to_string()));
        assert_eq!(read("", Some(3), b"abc"), abc(""));
        assert_eq!(read("", None, b"abc"), Ok(("abc".into(), None, "".into())));
        assert_eq!(read(ABC, Some(3), b"abc"), abc(""));
        assert_eq!(read(ABC, Some(3), b"abd"), Err(Some(Code::XAmzContentSHA256Mismatch)));
        assert_eq!(read(ABC, Some(4), b"abc"), Err(Some(Code::IncompleteBody)));
        assert_eq!(read("", Some(2), b"abc"), Err(Some(Code::IncompleteBody)));
        assert_eq!(read("x-amz-checksum-crc32|NSRBwg==", Some(3), b"abc"), abc("crc32 NSRBwg=="));
        assert_eq!(read("x-amz-checksum-crc32|NSRBwg==", Some(3), b"abd"), Err(Some(Code::BadDigest)));
        assert_eq!(read("x-amz-checksum-crc32|NSRBwg=", Some(3), b"abc"), Err(Some(Code::BadDigest)));
        assert_eq!(read("x-amz-checksum-crc32|NSRBwg==", Some(0), b""), Err(Some(Code::BadDigest)));
        assert_eq!(read("x-amz-content-sha256|x", Some(3), b"abc"), Err(Some(Code::InvalidArgument)));
    }

    #[test]
    fn a_chunked_body_is_held_to_its_length_and_its_trailer() {
        let body = |trailer: &str| format!("1\r\na\r\n2\r\nbc\r\n0\r\n{trailer}\r\n");
        let right = body("x-amz-checksum-crc32:NSRBwg==\r\n");
        let of_3 = format!("{CHUNKED}\nx-amz-decoded-content-length|3");
        let crc = |length| Ok(("abc".to_string(), length, "crc32 NSRBwg==".to_string()));
        assert_eq!(read(&of_3, Some(63), right.as_bytes()), crc(Some(3)));
        assert_eq!(read(CHUNKED, None, right.as_bytes()), crc(None));
        for wrong in ["2", "4", "0"] {
            let headers = format!("{CHUNKED}\nx-amz-decoded-content-length|{wrong}");
            assert_eq!(read(&headers, None, right.as_bytes()), Err(Some(Code::IncompleteBody)), "{wrong}");
        }
        for (trailer, code) in [
            ("", Code::MalformedTrailerError),
            ("x-amz-checksum-crc32c:NSRBwg==\r\n", Code::MalformedTrailerError),
            ("x-amz-checksum-crc32:NSRBwh==\r\n", Code::BadDigest),
            ("x-amz-checksum-crc32:NSRBww==\r\n", Code::BadDigest),
        ] {
            assert_eq!(read(&of_3, None, body(trailer).as_bytes()), Err(Some(code)), "{trailer}");
        }
        let without = "x-amz-content-sha256|STREAMING-UNSIGNED-PAYLOAD-TRAILER";
        assert_eq!(read(without, None, right.as_bytes()), Err(Some(Code::MalformedTrailerError)));
        assert_eq!(read(without, None, body("").as_bytes()), Ok(("abc".into(), None, "".into())));
        let two = format!("{CHUNKED}\nx-amz-checksum-crc32|NSRBwg==");
        assert_eq!(read(&two, None, right.as_bytes()), Err(Some(Code::InvalidRequest)));
    }

    #[test]
    fn the_checksum_in_the_head_of_complete_is_not_the_bodys() {
        let headers = [("x-amz-checksum-crc32", "AAAAAA==-3")];
        let head = Head { method: "POST", target: "/b/k?uploadId=1", headers: &headers };
        let (mut sent, mut text) = (&b"abc"[..], String::new());
        let mut payload = Payload::without_checksum(&head, None, Some(3), &mut sent).unwrap();
        assert_eq!((payload.read_to_string(&mut text).unwrap(), payload.checksum()), (3, None));
        assert!(Payload::new(&head, None, Some(3), &mut &b"abc"[..]).is_err());
    }

    #[test]
    fn an_error_of_the_input_is_passed_on() {
        let mut failing = (&b"abc"[..]).chain(Failing);
        let head = Head { method: "PUT", target: "/b/k", headers: &[] };
        let mut payload = Payload::new(&head, None, None, &mut failing).unwrap();
        let error = payload.read_to_end(&mut Vec::new()).unwrap_err();
        assert!(error.kind() == io::ErrorKind::TimedOut && payload.failure().is_none());
        assert!(payload.read(&mut [0; 9]).is_err());
    }

    struct Failing;

    impl Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::TimedOut.into())
        }
    }

    /// The signatures of AWS's two examples, chunks of 65,536 and 1,024 `a`; that of the trailer was computed by hand.
    const SIGNATURES: [&[&str]; 2] = [
        &[
            "ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648",
            "0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497",
            "b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9",
        ],
        &[
            "b474d8862b1487a5145d686f57f013e54db672cee1c953b3010fb58501ef5aa2",
            "1c1344b170168f8e65b41376b44b20fe354e373826ccbbe2c1d40a8cae51e5c7",
            "2ca2aba2005185cf7159c6277faf83795951dd77a3a99e6e65d5c9f85863f992",
            "d81f82fc3505edab99d459891051a732e8730629a2e4a59689829ca17fe2e435",
        ],
    ];

    fn golden_body(signatures: &[&str]) -> String {
        let chunk =
            |size: usize, n: usize| format!("{size:x};chunk-signature={}\r\n{}", signatures[n], "a".repeat(size));
        let trailers = signatures.get(3).map_or(String::new(), |signature| {
            format!("x-amz-checksum-crc32c:sOO8/Q==\r\nx-amz-trailer-signature:{signature}\r\n")
        });
        format!("{}\r\n{}\r\n{}{trailers}\r\n", chunk(65_536, 0), chunk(1_024, 1), chunk(0, 2))
    }

    #[test]
    fn the_signed_bodies_of_aws_are_read_and_every_change_to_them_is_found() {
        for (n, signatures) in [(4, SIGNATURES[0]), (5, SIGNATURES[1])] {
            let (method, target, headers) = example(n);
            let (headers, keys) = (fields(&headers), keys());
            let head = Head { method, target, headers: &headers };
            let mut signed = authenticate(&head, &keys, after(0)).unwrap().unwrap();
            let read = |signed: Option<&Signed>, body: &str| {
                let (mut sent, mut text) = (body.as_bytes(), String::new());
                let mut payload =
                    Payload::new(&head, signed, Some(66_824), &mut sent).map_err(|failure| failure.code)?;
                let result = payload.read_to_string(&mut text);
                result.map_err(|_| payload.failure().unwrap().code)
            };
            let body = golden_body(signatures);
            assert_eq!((read(Some(&signed), &body), read(None, &body)), (Ok(66_560), Ok(66_560)));
            for from in signatures.iter().chain(&["aaa\r\n", "aaa\r\n0"]) {
                let wrong = body.replacen(from, &format!("x{}", &from[1..]), 1);
                assert_eq!(read(Some(&signed), &wrong), Err(Code::SignatureDoesNotMatch), "{from}");
            }
            signed.signer = None;
            assert_eq!(read(Some(&signed), &body), Err(Code::InvalidRequest));
        }
    }
}
