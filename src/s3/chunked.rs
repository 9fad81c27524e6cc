//! aws-chunked: the framing that clients put around a body to sign it piece by piece, or to send its checksum last.
//!
//! ```text
//! body      = *( size [ signature ] CRLF data CRLF ) last *trailer [ trailer-signature ] [ CRLF ] [ CRLF ]
//! size      = 1*16HEXDIG                                         ; in bytes, over 0
//! signature = ";chunk-signature=" 64OCTET                        ; in a signed body, and only there
//! last      = 1*16"0" [ signature ] CRLF
//! trailer   = name ":" value CRLF                                ; at most one
//! trailer-signature = "x-amz-trailer-signature:" 64OCTET CRLF    ; in a signed body that may have trailers
//! ```
//!
//! It lies inside of HTTP's framing, which may be chunked itself. Senders differ in the CRLFs at the end.

use std::io::{self, BufRead, BufReader, Read};

use sha2::{Digest, Sha256};

use super::failure::{Code, Failure};
use super::sigv4::{Signer, check};

/// The longest size line and the longest trailer, in bytes, with CRLF.
const SIZE_MAX: u64 = 128;
const TRAILER_MAX: u64 = 1 << 10;

/// For lines. Reads of larger pieces pass it by.
const BUFFER: usize = 1 << 10;

pub(super) struct Chunked<'a> {
    input: BufReader<&'a mut dyn Read>,
    framing: Framing,
    /// Verifies a signed body. `None`: its signatures are not verified.
    signer: Option<Signer>,
    /// The bytes of the chunk that is being read, if they are signed, and their signature.
    sha256: Sha256,
    signature: String,
    /// How many bytes of a chunk are left. `None`: a size line follows.
    left: Option<u64>,
    trailer: Option<(String, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Framing {
    pub signed: bool,
    pub trailers: bool,
}

impl<'a> Chunked<'a> {
    pub fn new(body: &'a mut dyn Read, framing: Framing, signer: Option<Signer>) -> Chunked<'a> {
        Chunked {
            input: BufReader::with_capacity(BUFFER, body),
            framing,
            signer,
            sha256: Sha256::new(),
            signature: String::new(),
            left: None,
            trailer: None,
        }
    }

    /// Reads data. Returns 0 once, when all has been read, nothing lies behind it and all signatures are right. Data of
    /// a chunk is given out before its signature is verified, and nothing behind a chunk whose signature is wrong.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == Some(0) {
            match self.read_line(2)?.as_str() {
                "\r\n" => {}
                "" => return Err(cut().into()),
                _ => return Err(malformed("the data of a chunk is longer than its size").into()),
            }
            self.check_chunk()?;
            self.left = None;
        }
        let left = match self.left {
            Some(left) => left,
            None => self.read_size()?,
        };
        if left == 0 {
            self.check_chunk()?;
            self.read_end()?;
            return Ok(0);
        }
        let most = buffer.len().min(left.try_into().unwrap_or(usize::MAX));
        let count = self.input.read(&mut buffer[..most])?;
        if count == 0 {
            return Err(cut().into());
        }
        if self.signer.is_some() {
            self.sha256.update(&buffer[..count]);
        }
        self.left = Some(left - count as u64);
        Ok(count)
    }

    /// The trailer, once all has been read: its name in lower case, and its value.
    pub fn trailer(&mut self) -> Option<(String, String)> {
        self.trailer.take()
    }

    /// Reads a line, with its CRLF. Returns an empty one at the end of the input.
    fn read_line(&mut self, limit: u64) -> io::Result<String> {
        let mut line = Vec::new();
        self.input.by_ref().take(limit).read_until(b'\n', &mut line)?;
        if !line.is_empty() && !line.ends_with(b"\r\n") {
            let is_cut = (line.len() as u64) < limit && !line.ends_with(b"\n");
            return Err(if is_cut { cut() } else { malformed("a line is too long, or does not end in CRLF") }.into());
        }
        String::from_utf8(line).map_err(|_| malformed("a line is not UTF-8").into())
    }

    fn read_size(&mut self) -> io::Result<u64> {
        let line = self.read_line(SIZE_MAX)?;
        let line = line.strip_suffix("\r\n").ok_or_else(cut)?;
        let (size, signature) = match line.split_once(";chunk-signature=") {
            Some((size, signature)) if self.framing.signed && signature.len() == 64 => (size, signature),
            None if !self.framing.signed => (line, ""),
            _ => return Err(malformed("a chunk lacks its signature, or has one in a body without signatures").into()),
        };
        self.signature = signature.to_string();
        let is_size = (1..=16).contains(&size.len()) && size.bytes().all(|byte| byte.is_ascii_hexdigit());
        let size = u64::from_str_radix(size, 16).ok().filter(|_| is_size);
        size.ok_or_else(|| malformed("the size of a chunk is no hexadecimal number").into())
    }

    /// Verifies the signature of the chunk that has been read.
    fn check_chunk(&mut self) -> Result<(), Failure> {
        match &mut self.signer {
            Some(signer) => check(signer.chunk(std::mem::take(&mut self.sha256)), &self.signature),
            None => Ok(()),
        }
    }

    /// Reads what follows the last chunk, up to the end of the input.
    fn read_end(&mut self) -> io::Result<()> {
        let mut signature = None;
        let mut line = self.read_line(TRAILER_MAX)?;
        while !matches!(line.as_str(), "" | "\r\n") {
            let (name, value) = line.split_once(':').ok_or_else(|| malformed("a trailer is not NAME:VALUE"))?;
            let (name, value) = (name.to_ascii_lowercase(), value.trim().to_string());
            if !self.framing.trailers || signature.is_some() {
                return Err(malformed("there is a trailer where none may be").into());
            } else if self.framing.signed && name == "x-amz-trailer-signature" {
                signature = Some(value);
            } else if self.trailer.replace((name, value)).is_some() {
                return Err(malformed("there are several trailers").into());
            }
            line = self.read_line(TRAILER_MAX)?;
        }
        if self.framing.signed && self.framing.trailers {
            let signature = signature.ok_or_else(|| malformed("there is no x-amz-trailer-signature"))?;
            let signed = self.trailer.as_ref().map_or(String::new(), |(name, value)| format!("{name}:{value}\n"));
            self.signer.as_mut().map_or(Ok(()), |signer| check(signer.trailer(&signed), &signature))?;
        }
        let mut rest = Vec::new();
        self.input.by_ref().take(3).read_to_end(&mut rest)?;
        match &rest[..] {
            b"" | b"\r\n" => Ok(()),
            _ => Err(malformed("there is something behind its end").into()),
        }
    }
}

fn malformed(why: &str) -> Failure {
    Failure::new(Code::InvalidRequest, format!("the aws-chunked body is malformed: {why}"))
}

fn cut() -> Failure {
    Failure::new(Code::IncompleteBody, "the body ends in the middle of its aws-chunked framing")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::s3::examples::{after, example, fields, keys};
    use crate::s3::head::Head;
    use crate::s3::sigv4::authenticate;

    const PLAIN: Framing = Framing { signed: false, trailers: true };
    const SIGNED: Framing = Framing { signed: true, trailers: false };
    const BOTH: Framing = Framing { signed: true, trailers: true };

    /// Gives a body out in pieces of random lengths.
    struct Pieces<'a>(&'a [u8], fastrand::Rng);

    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let most = if self.1.bool() { 4 } else { 4096 };
            let (piece, rest) = self.0.split_at(self.1.usize(1..=most).min(buffer.len()).min(self.0.len()));
            buffer[..piece.len()].copy_from_slice(piece);
            self.0 = rest;
            Ok(piece.len())
        }
    }

    type Data = (Vec<u8>, Option<(String, String)>);

    /// Reads a body in pieces of random lengths. After an error: the data that was given out before.
    fn read(sent: &[u8], framing: Framing, signer: Option<Signer>, seed: u64) -> Result<Data, (Option<Code>, Vec<u8>)> {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut pieces = Pieces(sent, random.fork());
        let mut chunked = Chunked::new(&mut pieces, framing, signer);
        let mut data = Vec::new();
        loop {
            let most = if random.bool() { 4 } else { 4096 };
            let mut buffer = vec![0; random.usize(1..=most)];
            match chunked.read(&mut buffer) {
                Ok(0) => return Ok((data, chunked.trailer())),
                Ok(count) => data.extend_from_slice(&buffer[..count]),
                Err(error) => return Err((Failure::of(&error).map(|failure| failure.code), data)),
            }
        }
    }

    fn text(sent: &str, framing: Framing) -> Result<String, Code> {
        match read(sent.as_bytes(), framing, None, 7) {
            Ok((data, trailer)) => {
                let trailer = trailer.map_or(String::new(), |(name, value)| format!("|{name}={value}"));
                Ok(String::from_utf8(data).unwrap() + &trailer)
            }
            Err((code, _)) => Err(code.unwrap()),
        }
    }

    #[test]
    fn all_ends_that_clients_send_are_read() {
        let s = format!(";chunk-signature={}", "0".repeat(64));
        for end in ["", "\r\n", "\r\n\r\n"] {
            assert_eq!(text(&format!("3\r\nabc\r\n0\r\n{end}"), PLAIN).unwrap(), "abc");
            assert_eq!(
                text(&format!("0000000000000003\r\nabc\r\n00\r\nX-y: z \r\n{end}"), PLAIN).unwrap(),
                "abc|x-y=z"
            );
            assert_eq!(text(&format!("3{s}\r\nabc\r\n0{s}\r\n{end}"), SIGNED).unwrap(), "abc");
            let trailers = "x:y\r\nx-amz-trailer-signature:0\r\n";
            assert_eq!(text(&format!("0{s}\r\n{trailers}{end}"), BOTH).unwrap(), "|x=y");
        }
        assert_eq!(
            text(&format!("a\r\n{0}\r\nA\r\n{0}\r\n0\r\n", "0123456789"), PLAIN).unwrap(),
            "0123456789".repeat(2)
        );
    }

    #[test]
    fn a_cut_or_malformed_body_is_refused() {
        let s = format!(";chunk-signature={}", "0".repeat(64));
        let long = format!("{}3\r\nabc\r\n0\r\n", "0".repeat(200));
        let trailer = format!("0\r\nx:{}\r\n", "y".repeat(1024));
        for (sent, framing) in [
            ("x\r\nabc\r\n0\r\n", PLAIN),
            ("\r\nabc\r\n0\r\n", PLAIN),
            ("3\nabc\r\n0\r\n", PLAIN),
            ("3 \r\nabc\r\n0\r\n", PLAIN),
            ("+3\r\nabc\r\n0\r\n", PLAIN),
            ("0x3\r\nabc\r\n0\r\n", PLAIN),
            ("3;x=y\r\nabc\r\n0\r\n", PLAIN),
            ("3\r\nabcd\r\n0\r\n", PLAIN),
            ("3\r\nabc0\r\n", PLAIN),
            ("00000000000000003\r\nabc\r\n0\r\n", PLAIN),
            ("0\r\n\r\n\r\n\r\n", PLAIN),
            ("0\r\n\r\nx:y\r\n", PLAIN),
            ("0\r\nx\r\n", PLAIN),
            ("0\r\nx:y\n", PLAIN),
            ("0\r\nx:y\r\nx:y\r\n", PLAIN),
            (&long, PLAIN),
            (&trailer, PLAIN),
            (&format!("3{s}\r\nabc\r\n0\r\n"), PLAIN),
            (&format!("3\r\nabc\r\n0{s}\r\n"), SIGNED),
            (&format!("3{s}0\r\nabc\r\n0{s}\r\n"), SIGNED),
            (&format!("0{s}\r\nx:y\r\n"), SIGNED),
            (&format!("0{s}\r\nx:y\r\n"), BOTH),
            (&format!("0{s}\r\nx-amz-trailer-signature:0\r\nx:y\r\n"), BOTH),
        ] {
            assert_eq!(text(sent, framing), Err(Code::InvalidRequest), "{sent:?}");
        }
        let whole = "3\r\nabc\r\n0\r\n";
        for end in 0..whole.len() {
            assert_eq!(text(&whole[..end], PLAIN), Err(Code::IncompleteBody), "{end}");
        }
        assert_eq!(text("FFFFFFFFFFFFFFFF\r\nabc\r\n", PLAIN), Err(Code::IncompleteBody));
    }

    fn signer() -> Signer {
        let (method, target, headers) = example(5);
        let (head, keys) = (Head { method, target, headers: &fields(&headers) }, keys());
        authenticate(&head, &keys, after(0)).unwrap().unwrap().signer.unwrap()
    }

    /// A random body, and how a client would send it.
    fn make(random: &mut fastrand::Rng, framing: Framing) -> (Vec<u8>, Vec<u8>) {
        let (mut body, mut sent, mut signer) = (Vec::new(), Vec::new(), signer());
        let chunks = random.usize(..5);
        for n in 0..=chunks {
            let most = if random.bool() { 8 } else { 5000 };
            let data: Vec<u8> = (0..random.usize(1..=most)).map(|_| random.u8(..)).collect();
            let data = if n == chunks { &[][..] } else { &data };
            let signature = signer.chunk(Sha256::new_with_prefix(data));
            let signature = if framing.signed { format!(";chunk-signature={signature}") } else { String::new() };
            sent.extend(format!("{:x}{signature}\r\n", data.len()).bytes());
            if n < chunks {
                sent.extend([data, b"\r\n"].concat());
            }
            body.extend_from_slice(data);
        }
        if framing.trailers {
            sent.extend(b"x-trailer:v\r\n");
        }
        if framing == BOTH {
            sent.extend(format!("x-amz-trailer-signature:{}\r\n", signer.trailer("x-trailer:v\n")).bytes());
        }
        sent.extend(b"\r\n");
        (body, sent)
    }

    fn random() -> fastrand::Rng {
        let seed = std::env::var("MKV_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
        println!("MKV_SEED={seed}");
        fastrand::Rng::with_seed(seed)
    }

    #[test]
    fn any_split_into_pieces_gives_the_same_body_and_any_change_is_found() {
        let (mut random, signer) = (random(), signer());
        for _ in 0..300 {
            let framing = [PLAIN, SIGNED, BOTH][random.usize(..3)];
            let signer = framing.signed.then(|| signer.clone());
            let (body, mut sent) = make(&mut random, framing);
            let whole = (body, framing.trailers.then(|| ("x-trailer".to_string(), "v".to_string())));
            for _ in 0..3 {
                assert!(read(&sent, framing, signer.clone(), random.u64(..)).as_ref() == Ok(&whole));
            }
            let cut = random.usize(..sent.len() - 2);
            let (cut, of_signed) = (read(&sent[..cut], framing, signer.clone(), 7), framing.signed);
            assert!(!cut.is_ok_and(|(_, trailer)| of_signed || trailer.is_some()));
            let at = random.usize(..sent.len());
            sent[at] ^= 1 << random.u8(..8);
            match read(&sent, framing, signer, random.u64(..)) {
                // In an unsigned body the checksum, which payload.rs verifies, finds the changes of data and trailer.
                Ok(read) => assert!(!framing.signed || read == whole, "{:?}", sent.escape_ascii()),
                Err((code, _)) => assert!(code.is_some()),
            }
        }
    }

    #[test]
    fn nothing_is_given_out_behind_a_chunk_with_a_false_signature() {
        let mut random = random();
        for _ in 0..200 {
            let (body, mut sent) = make(&mut random, SIGNED);
            let first = sent.iter().position(|byte| *byte == b';').unwrap();
            let size = usize::from_str_radix(std::str::from_utf8(&sent[..first]).unwrap(), 16).unwrap();
            let at = first + 17 + random.usize(..64);
            sent[at] = if sent[at] == b'0' { b'1' } else { b'0' };
            let (code, data) = read(&sent, SIGNED, Some(signer()), random.u64(..)).unwrap_err();
            assert_eq!((code, &data[..]), (Some(Code::SignatureDoesNotMatch), &body[..size]));
        }
    }

    #[test]
    fn no_input_makes_it_panic() {
        let mut random = random();
        let signature = format!(";chunk-signature={}", "0".repeat(64));
        let parts: [&[u8]; 12] = [
            b"\r\n",
            b"0\r\n",
            b"3",
            b"ffffffffffffffff",
            b"abc\r\n",
            b"x:y\r\n",
            b"x-amz-trailer-signature:0\r\n",
            b"\n",
            b"\xFF",
            signature.as_bytes(),
            b":",
            b"3\r\nabc\r\n",
        ];
        let mut whole = 0;
        for _ in 0..20_000 {
            let framing = [PLAIN, SIGNED, BOTH][random.usize(..3)];
            let sent: Vec<&[u8]> = (0..random.usize(..8)).map(|_| parts[random.usize(..parts.len())]).collect();
            whole += read(&sent.concat(), framing, None, random.u64(..)).is_ok() as usize;
        }
        assert!(whole > 0);
    }
}
