//! A small S3 client: SigV4 in the header and presigned, and every framing of a body. It shares no code with the
//! server, so that an error of the server's shows.

use std::fmt::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sha2::{Digest, Sha256};

use crate::support::cluster::{Cluster, Setup};
use crate::support::commands::now;
use crate::support::http_client::{Answer, Conn, LAST_CHUNK, chunks, target};

/// The port of the first master's S3 endpoint.
pub const PORT: u16 = 3900;

/// A key for everything, a key that only reads, and a key for one bucket. Setup::s3 makes them known.
pub const OWNER: Key = Key { access: "AKIAMKVOWNER00000001", secret: "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY" };
pub const READER: Key = Key { access: "AKIAMKVREADER0000001", secret: "readerreaderreaderreaderreaderreaderread" };
pub const TENANT: Key = Key { access: "AKIAMKVTENANT0000001", secret: "tenanttenanttenanttenanttenanttenanttena" };
pub const TENANTS_BUCKET: &str = "tenants-bucket";

pub const UNSIGNED: &str = "UNSIGNED-PAYLOAD";

const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

#[derive(Clone, Copy)]
pub struct Key {
    pub access: &'static str,
    pub secret: &'static str,
}

/// The content of -s3keys.
pub fn keys_file() -> String {
    let line = |key: Key, rest: &str| format!("{} {}{rest}\n", key.access, key.secret);
    line(OWNER, "") + &line(READER, " ro") + &line(TENANT, &format!(" {TENANTS_BUCKET}"))
}

/// How a body is sent.
#[derive(Clone)]
pub enum Payload {
    /// With its SHA-256.
    Hash,
    /// As it is, with this in x-amz-content-sha256.
    Plain(String),
    AwsChunked(AwsChunked),
}

/// aws-chunked.
#[derive(Clone, Default)]
pub struct AwsChunked {
    pub signed: bool,
    /// The name and value of a trailer.
    pub trailer: Option<(String, String)>,
    /// The lengths of the chunks, repeated as needed; empty: one chunk.
    pub sizes: Vec<usize>,
    /// Inside a chunked transfer, without a Content-Length.
    pub transfer: bool,
    /// The length that is announced, if it is not the body's.
    pub announced: Option<String>,
}

/// Starts a store with an S3 endpoint, and makes a bucket called bucket.
pub fn store(setup: Setup) -> (Cluster, Client) {
    let c = setup.s3().start();
    let s3 = c.s3();
    s3.put("/bucket", "").expect(200);
    (c, s3)
}

/// An endpoint, and the key to sign with.
#[derive(Clone)]
pub struct Client {
    pub address: String,
    /// The Host field.
    pub host: String,
    pub key: Option<Key>,
}

impl Cluster {
    pub fn s3_address(&self) -> String {
        format!("{}:{PORT}", self.host)
    }

    /// A client of the first master that may do everything.
    pub fn s3(&self) -> Client {
        // http_client sends this host.
        Client { address: self.s3_address(), host: "mkv.test".into(), key: Some(OWNER) }
    }
}

impl Client {
    pub fn with_key(&self, key: impl Into<Option<Key>>) -> Client {
        Client { key: key.into(), ..self.clone() }
    }

    pub fn at(&self, address: &str) -> Client {
        Client { address: address.into(), ..self.clone() }
    }

    /// `path`: /bucket/key, not encoded.
    pub fn request(&self, method: &str, path: impl AsRef<[u8]>) -> Request {
        Request {
            client: self.clone(),
            method: method.into(),
            path: target(path),
            sent_path: None,
            query: Vec::new(),
            headers: Vec::new(),
            unsigned: Vec::new(),
            body: Vec::new(),
            payload: Payload::Hash,
            time: now(),
            region: "us-east-1".into(),
        }
    }

    #[track_caller]
    pub fn ask(&self, method: &str, path: impl AsRef<[u8]>) -> Answer {
        self.request(method, path).send()
    }

    #[track_caller]
    pub fn get(&self, path: impl AsRef<[u8]>) -> Answer {
        self.ask("GET", path)
    }

    #[track_caller]
    pub fn put(&self, path: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Answer {
        self.request("PUT", path).body(value).send()
    }

    /// A request with a query such as `list-type=2&prefix=a%2Fb`, whose values are encoded.
    #[track_caller]
    pub fn query(&self, method: &str, path: impl AsRef<[u8]>, query: &str, body: impl AsRef<[u8]>) -> Answer {
        self.request(method, path).queries(query).body(body).send()
    }

    /// Starts a multipart upload and returns its id.
    #[track_caller]
    pub fn create_upload(&self, path: &str) -> String {
        self.query("POST", path, "uploads", "").expect(200).element("UploadId")
    }

    /// Sends a part and returns its ETag.
    #[track_caller]
    pub fn put_part(&self, path: &str, upload: &str, number: usize, value: impl AsRef<[u8]>) -> String {
        let query = format!("partNumber={number}&uploadId={upload}");
        let answer = self.query("PUT", path, &query, value).expect(200);
        answer.header("ETag").expect("a part has an ETag").to_string()
    }

    pub fn complete_request(&self, path: &str, upload: &str, parts: &[(usize, String)]) -> Request {
        self.request("POST", path).query("uploadId", upload).body(complete_xml(parts))
    }

    #[track_caller]
    pub fn complete(&self, path: &str, upload: &str, parts: &[(usize, String)]) -> Answer {
        self.complete_request(path, upload, parts).send()
    }

    /// Uploads these parts and completes them.
    #[track_caller]
    pub fn multipart(&self, path: &str, parts: &[&[u8]]) -> Answer {
        let upload = self.create_upload(path);
        let sent: Vec<_> =
            parts.iter().enumerate().map(|(n, part)| (n + 1, self.put_part(path, &upload, n + 1, part))).collect();
        self.complete(path, &upload, &sent).expect(200)
    }
}

pub fn complete_xml(parts: &[(usize, String)]) -> String {
    let part =
        |(number, etag): &(usize, String)| format!("<Part><ETag>{etag}</ETag><PartNumber>{number}</PartNumber></Part>");
    let parts: String = parts.iter().map(part).collect();
    format!(
        "<CompleteMultipartUpload xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">{parts}</CompleteMultipartUpload>"
    )
}

#[derive(Clone)]
pub struct Request {
    client: Client,
    pub method: String,
    /// As it is signed.
    path: String,
    /// As it is sent, if that differs.
    sent_path: Option<String>,
    query: Vec<(String, String)>,
    headers: Vec<(String, String)>,
    unsigned: Vec<(String, String)>,
    body: Vec<u8>,
    payload: Payload,
    time: u64,
    region: String,
}

impl Request {
    pub fn query(mut self, name: &str, value: impl AsRef<str>) -> Request {
        self.query.push((name.into(), value.as_ref().into()));
        self
    }

    pub fn queries(mut self, query: &str) -> Request {
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = percent_encoding::percent_decode_str(value).decode_utf8().expect("a query is UTF-8");
            self.query.push((name.into(), value.into()));
        }
        self
    }

    pub fn header(mut self, name: &str, value: impl AsRef<str>) -> Request {
        self.headers.push((name.into(), value.as_ref().into()));
        self
    }

    /// A header that is not signed.
    pub fn unsigned_header(mut self, name: &str, value: impl AsRef<str>) -> Request {
        self.unsigned.push((name.into(), value.as_ref().into()));
        self
    }

    pub fn body(mut self, body: impl AsRef<[u8]>) -> Request {
        self.body = body.as_ref().to_vec();
        self
    }

    pub fn payload(mut self, payload: Payload) -> Request {
        self.payload = payload;
        self
    }

    pub fn aws_chunked(self, chunked: AwsChunked) -> Request {
        self.payload(Payload::AwsChunked(chunked))
    }

    /// Sends this path and signs the canonical one.
    pub fn sent_as(mut self, path: &str) -> Request {
        self.sent_path = Some(path.into());
        self
    }

    /// Signs as of a time, in seconds since 1970.
    pub fn at(mut self, time: u64) -> Request {
        self.time = time;
        self
    }

    pub fn region(mut self, region: &str) -> Request {
        self.region = region.into();
        self
    }

    #[track_caller]
    pub fn send(&self) -> Answer {
        let (head, body) = self.bytes();
        let mut conn = Conn::open(&self.client.address);
        // The server may refuse the body and close before it has read all of it.
        let _ = conn.try_send(&[head, body].concat());
        conn.answer_to(&self.method)
    }

    /// Sends the head alone.
    #[track_caller]
    pub fn start(&self) -> Conn {
        let mut conn = Conn::open(&self.client.address);
        conn.send(self.bytes().0);
        conn
    }

    /// The head and the body as they are sent.
    pub fn bytes(&self) -> (Vec<u8>, Vec<u8>) {
        let mut headers = self.headers.clone();
        headers.push(("host".into(), self.client.host.clone()));
        let hash = match &self.payload {
            Payload::Hash => hex(&Sha256::digest(&self.body)),
            Payload::Plain(word) => word.clone(),
            Payload::AwsChunked(chunked) => {
                let length = chunked.announced.clone().unwrap_or_else(|| self.body.len().to_string());
                headers.push(("x-amz-decoded-content-length".into(), length));
                headers.extend(chunked.trailer.iter().map(|(name, _)| ("x-amz-trailer".into(), name.clone())));
                chunked.kind().into()
            }
        };
        let mut seed = String::new();
        if let Some(key) = self.client.key {
            headers.push(("x-amz-date".into(), self.date()));
            headers.push(("x-amz-content-sha256".into(), hash.clone()));
            let (names, signature) = self.sign(key, &headers, &self.query, &hash);
            let scope = self.scope();
            let credential = format!("AWS4-HMAC-SHA256 Credential={}/{scope}", key.access);
            let value = format!("{credential}, SignedHeaders={names}, Signature={signature}");
            headers.push(("Authorization".into(), value));
            seed = signature;
        }
        let (body, length) = self.body_as_sent(&seed);
        headers.extend(self.unsigned.iter().cloned());
        headers.extend(length);
        headers.retain(|(name, _)| name != "host");
        let headers: Vec<(&str, &str)> = headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        (crate::support::http_client::head(&self.method, &self.target(&self.query), &headers), body)
    }

    /// The body, and the header that announces its length.
    fn body_as_sent(&self, seed: &str) -> (Vec<u8>, Option<(String, String)>) {
        let length = |body: &[u8]| Some(("Content-Length".into(), body.len().to_string()));
        let Payload::AwsChunked(chunked) = &self.payload else {
            let needed = !self.body.is_empty() || matches!(self.method.as_str(), "PUT" | "POST");
            return (self.body.clone(), length(&self.body).filter(|_| needed));
        };
        let framed = self.framed(chunked, seed);
        if !chunked.transfer {
            let length = length(&framed);
            return (framed, length);
        }
        let body = [&chunks(&framed, &[100, 7, 8000]), LAST_CHUNK].concat();
        (body, Some(("Transfer-Encoding".into(), "chunked".into())))
    }

    fn framed(&self, chunked: &AwsChunked, seed: &str) -> Vec<u8> {
        let mut framed = Vec::new();
        let mut signature = seed.to_string();
        let mut rest = &self.body[..];
        let mut sizes = chunked.sizes.iter().cycle();
        loop {
            let size = sizes.next().map_or(rest.len(), |size| rest.len().min(*size));
            let (chunk, tail) = rest.split_at(size);
            framed.extend(format!("{size:X}").bytes());
            if chunked.signed {
                let hashes = format!("{}\n{}", hex(&Sha256::digest("")), hex(&Sha256::digest(chunk)));
                signature = self.chain("AWS4-HMAC-SHA256-PAYLOAD", &signature, &hashes);
                framed.extend(format!(";chunk-signature={signature}").bytes());
            }
            framed.extend(b"\r\n");
            framed.extend(chunk);
            rest = tail;
            if size == 0 {
                break;
            }
            framed.extend(b"\r\n");
        }
        if let Some((name, value)) = &chunked.trailer {
            framed.extend(format!("{name}:{value}\r\n").bytes());
            if chunked.signed {
                let hash = hex(&Sha256::digest(format!("{name}:{value}\n")));
                signature = self.chain("AWS4-HMAC-SHA256-TRAILER", &signature, &hash);
                framed.extend(format!("x-amz-trailer-signature:{signature}\r\n").bytes());
            }
        }
        framed.extend(b"\r\n");
        framed
    }

    fn chain(&self, kind: &str, before: &str, hashes: &str) -> String {
        let Some(key) = self.client.key else { return String::new() };
        let text = format!("{kind}\n{}\n{}\n{before}\n{hashes}", self.date(), self.scope());
        hex(&hmac(&self.signing_key(key), &text))
    }

    /// The path and query of a presigned URL, valid for so many seconds.
    pub fn presigned(&self, expires: u64) -> String {
        let key = self.client.key.expect("a presigned URL has a key");
        let mut headers = self.headers.clone();
        headers.push(("host".into(), self.client.host.clone()));
        let mut query = self.query.clone();
        for (name, value) in [
            ("Algorithm", "AWS4-HMAC-SHA256".to_string()),
            ("Credential", format!("{}/{}", key.access, self.scope())),
            ("Date", self.date()),
            ("Expires", expires.to_string()),
            ("SignedHeaders", canonical_headers(&headers).1),
        ] {
            query.push((format!("X-Amz-{name}"), value));
        }
        let signature = self.sign(key, &headers, &query, UNSIGNED).1;
        query.push(("X-Amz-Signature".into(), signature));
        self.target(&query)
    }

    fn target(&self, query: &[(String, String)]) -> String {
        let mut target = self.sent_path.clone().unwrap_or_else(|| self.path.clone());
        for (n, (name, value)) in query.iter().enumerate() {
            target.push(if n == 0 { '?' } else { '&' });
            target.push_str(&encode(name));
            if !value.is_empty() {
                let _ = write!(target, "={}", encode(value));
            }
        }
        target
    }

    /// The names of the signed headers, and the signature.
    fn sign(&self, key: Key, headers: &[(String, String)], query: &[(String, String)], hash: &str) -> (String, String) {
        let mut pairs: Vec<_> = query.iter().map(|(n, v)| (encode(n), encode(v))).collect();
        pairs.sort();
        let pairs: Vec<_> = pairs.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let (headers, names) = canonical_headers(headers);
        let canonical = format!("{}\n{}\n{}\n{headers}\n{names}\n{hash}", self.method, self.path, pairs.join("&"));
        let digest = hex(&Sha256::digest(canonical));
        let text = format!("AWS4-HMAC-SHA256\n{}\n{}\n{digest}", self.date(), self.scope());
        (names, hex(&hmac(&self.signing_key(key), &text)))
    }

    fn date(&self) -> String {
        let time = jiff::Timestamp::from_second(self.time as i64).expect("a time of this era");
        time.strftime("%Y%m%dT%H%M%SZ").to_string()
    }

    fn scope(&self) -> String {
        format!("{}/{}/s3/aws4_request", &self.date()[..8], self.region)
    }

    fn signing_key(&self, key: Key) -> Vec<u8> {
        let seed = format!("AWS4{}", key.secret).into_bytes();
        let scope = self.scope();
        scope.split('/').fold(seed, |key, word| hmac(&key, word))
    }
}

/// The canonical headers, and the list of their names.
fn canonical_headers(headers: &[(String, String)]) -> (String, String) {
    let words = |value: &str| value.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
    let mut headers: Vec<_> = headers.iter().map(|(n, v)| (n.to_ascii_lowercase(), words(v))).collect();
    headers.sort();
    let names: Vec<&str> = headers.iter().map(|(name, _)| name.as_str()).collect();
    (headers.iter().map(|(name, value)| format!("{name}:{value}\n")).collect(), names.join(";"))
}

impl AwsChunked {
    fn kind(&self) -> &'static str {
        match (self.signed, self.trailer.is_some()) {
            (true, false) => "STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
            (true, true) => "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER",
            (false, _) => "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
        }
    }
}

fn hmac(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("a key of any length");
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn encode(text: &str) -> String {
    utf8_percent_encode(text, UNRESERVED).to_string()
}

/// A checksum as S3 writes it. `name`: crc32, crc32c, crc64nvme, sha1 or sha256.
pub fn checksum(name: &str, bytes: &[u8]) -> String {
    let value = match name {
        "crc32" => crc(0xedb8_8320, 32, bytes)[4..].to_vec(),
        "crc32c" => crc(0x82f6_3b78, 32, bytes)[4..].to_vec(),
        "crc64nvme" => crc(0x9a6c_9329_ac4b_c9b5, 64, bytes).to_vec(),
        "sha1" => sha1::Sha1::digest(bytes).to_vec(),
        "sha256" => Sha256::digest(bytes).to_vec(),
        other => panic!("{other} is no checksum"),
    };
    STANDARD.encode(value)
}

/// A CRC that is reflected and inverted at both ends.
fn crc(polynomial: u64, bits: u32, bytes: &[u8]) -> [u8; 8] {
    let ones = u64::MAX >> (64 - bits);
    let step = |crc: u64| if crc & 1 == 1 { crc >> 1 ^ polynomial } else { crc >> 1 };
    let sum = bytes.iter().fold(ones, |crc, byte| (0..8).fold(crc ^ u64::from(*byte), |crc, _| step(crc)));
    (sum ^ ones).to_be_bytes()
}

impl Answer {
    /// The texts of all elements of this name, in order.
    pub fn elements(&self, name: &str) -> Vec<String> {
        let text = self.text();
        let mut found = Vec::new();
        let mut rest = &text[..];
        while let Some(start) = rest.find(&format!("<{name}>")) {
            rest = &rest[start + name.len() + 2..];
            let end = rest.find(&format!("</{name}>")).unwrap_or_else(|| panic!("<{name}> does not end: {text}"));
            found.push(unescape(&rest[..end]));
            rest = &rest[end..];
        }
        found
    }

    /// The text of the only element of this name.
    #[track_caller]
    pub fn element(&self, name: &str) -> String {
        let found = self.elements(name);
        assert_eq!(found.len(), 1, "<{name}> in {}", self.text());
        found.into_iter().next().unwrap()
    }

    /// An S3 error with this code. Its text is XML, and names the request as the header does.
    #[track_caller]
    pub fn expect_code(self, status: u16, code: &str) -> Answer {
        let answer = self.expect(status);
        assert_eq!(answer.elements("Code"), [code], "{}", answer.text());
        assert!(answer.text().starts_with("<?xml"), "{}", answer.text());
        assert_eq!(answer.header("Content-Type"), Some("application/xml"));
        assert!(!answer.element("Message").is_empty());
        assert_eq!(answer.header("x-amz-request-id"), Some(answer.element("RequestId").as_str()));
        answer
    }

    /// The ETag, in its quotes.
    #[track_caller]
    pub fn etag(&self) -> String {
        let etag = self.header("ETag").expect("the answer has an ETag");
        assert!(etag.len() > 2 && etag.starts_with('"') && etag.ends_with('"'), "{etag}");
        etag.to_string()
    }
}

fn unescape(text: &str) -> String {
    let pairs = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#34;", "\""), ("&apos;", "'"), ("&#39;", "'")];
    let text = pairs.iter().fold(text.to_string(), |text, (from, to)| text.replace(from, to));
    text.replace("&#13;", "\r").replace("&#xD;", "\r").replace("&amp;", "&")
}

/// The example of AWS's documents: a PUT of 65 KiB of `a` in signed chunks, and the same with a trailer.
#[test]
fn the_client_signs_as_the_documents_do() {
    let key = Key { access: "AKIAIOSFODNN7EXAMPLE", secret: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY" };
    let client = Client { address: String::new(), host: "s3.amazonaws.com".into(), key: Some(key) };
    // 2013-05-24, midnight.
    let request = client.request("PUT", "/examplebucket/chunkObject.txt").body([b'a'; 66560]).at(1_369_353_600);
    let seed = "106e2a8a18243abcf37539882f36619c00e2dfc72633413f02d3b74544bfeb8e";
    let chunked = |trailer: Option<(String, String)>| AwsChunked {
        signed: true,
        sizes: vec![65536, 1024],
        trailer,
        ..AwsChunked::default()
    };
    let framed = String::from_utf8(request.framed(&chunked(None), seed)).unwrap();
    let signatures: Vec<&str> = framed.split("chunk-signature=").skip(1).map(|rest| &rest[..64]).collect();
    for (signature, (start, end)) in
        signatures.iter().zip([("b474d886", "5aa2"), ("1c1344b1", "e5c7"), ("2ca2aba2", "f992")])
    {
        assert!(signature.starts_with(start) && signature.ends_with(end), "{signature}");
    }
    let trailer = ("x-amz-checksum-crc32c".to_string(), "sOO8/Q==".to_string());
    let framed = String::from_utf8(request.framed(&chunked(Some(trailer)), seed)).unwrap();
    let last = "x-amz-trailer-signature:d81f82fc3505edab99d459891051a732e8730629a2e4a59689829ca17fe2e435\r\n\r\n";
    assert!(framed.ends_with(last), "{framed}");
    for (name, sum) in [("crc32", "y/Q5Jg=="), ("crc32c", "4waSgw=="), ("crc64nvme", "rosUhgp5mIg=")] {
        assert_eq!(checksum(name, b"123456789"), sum);
    }
}
