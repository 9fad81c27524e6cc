//! AWS's Signature Version 4: who sent a request, and that nobody changed it.
//!
//! ```text
//! canonical = method LF path LF query LF *( name ":" values LF ) LF signed-headers LF payload
//! scope     = date "/" region "/" service "/aws4_request"
//! to-sign   = "AWS4-HMAC-SHA256" LF timestamp LF scope LF hex(sha256(canonical))
//! key       = hmac(hmac(hmac(hmac("AWS4" secret, date), region), service), "aws4_request")
//! signature = hex(hmac(key, to-sign))
//! ```
//!
//! Path and query are decoded and encoded again, so it does not matter which characters the client encoded. `payload` is
//! what the client says of the body (`x-amz-content-sha256`); `payload.rs` holds the body to it. The rules are AWS's:
//! docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-authenticating-requests.html.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use hmac::{Hmac, KeyInit, Mac};
use jiff::civil::DateTime;
use jiff::{Timestamp, tz::TimeZone};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::failure::{Code, Failure};
use super::head::{Head, Query, parameters, query};
use super::keys::{Key, Keys};
use super::sigv2;

const ALGORITHM: &str = "AWS4-HMAC-SHA256";

/// How far the clock of a client may be from ours.
const SKEW: Duration = Duration::from_secs(15 * 60);

/// The longest life of a presigned URL, in seconds: a week.
const EXPIRES_MAX: u64 = 604_800;

const IN_QUERY: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
const IN_PATH: AsciiSet = IN_QUERY.remove(b'/');

/// A request whose signature is right.
#[derive(Debug)]
pub struct Signed<'k> {
    pub key: &'k Key,
    /// Verifies the chunks of the body. `None`: the request bears a signature of version 2, which has no chunks.
    pub signer: Option<Signer>,
}

/// Who sent the request. `None`: it bears no signature. It judges the head alone: the body is still to be held to
/// `x-amz-content-sha256` (`Payload`), and the key to what it may do (`Key::may`).
pub fn authenticate<'k>(head: &Head, keys: &'k Keys, now: SystemTime) -> Result<Option<Signed<'k>>, Failure> {
    let query = query(head.target)?;
    let has = |names: &[&str]| names.iter().any(|name| query.get(name).is_some());
    let in_query = has(&["X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Signature"]);
    let in_query_v2 = has(&["AWSAccessKeyId", "Signature"]);
    let in_header = head.header("Authorization").filter(|value| !value.is_empty());
    match (in_header, in_query, in_query_v2) {
        (None, false, false) => Ok(None),
        (Some(value), false, false) => from_header(head, value)?.verify(head, keys, now).map(Some),
        (None, true, false) => from_query(head, &query)?.verify(head, keys, now).map(Some),
        (None, false, true) => sigv2::authenticate(head, &query, keys, now).map(Some),
        _ => Err(Failure::new(Code::InvalidArgument, "a request may be signed in one way only")),
    }
}

/// What a request says of its signature.
struct Claim {
    /// Access key, date, region, service, `aws4_request`.
    credential: String,
    signed_headers: String,
    signature: String,
    /// The time of the request, and how it is signed: as `20130524T000000Z`.
    time: SystemTime,
    timestamp: String,
    payload: String,
    /// The life of a presigned URL.
    expires: Option<Duration>,
    /// For a claim that makes no sense.
    malformed: Code,
}

fn from_header(head: &Head, value: &str) -> Result<Claim, Failure> {
    let malformed = |why: &str| Failure::new(Code::AuthorizationHeaderMalformed, format!("Authorization {why}"));
    let Some(fields) = value.strip_prefix(ALGORITHM).filter(|rest| rest.starts_with(' ')) else {
        return Err(match value.split(' ').next() {
            Some("AWS") => Failure::new(Code::InvalidRequest, format!("sign with {ALGORITHM}: SigV2 is not supported")),
            Some(ALGORITHM) => malformed("has no Credential"),
            _ => Failure::new(Code::InvalidArgument, format!("sign with {ALGORITHM}")),
        });
    };
    let mut found = [const { None }; 3];
    for field in fields.split(',') {
        let (name, value) = field.trim().split_once('=').ok_or_else(|| malformed("is not made of NAME=VALUE"))?;
        let place = ["Credential", "SignedHeaders", "Signature"].iter().position(|its| *its == name);
        let place = place.ok_or_else(|| malformed("has an unknown field"))?;
        if found[place].replace(value.to_string()).is_some() {
            return Err(malformed("has a field twice"));
        }
    }
    let [Some(credential), Some(signed_headers), Some(signature)] = found else {
        return Err(malformed("needs Credential, SignedHeaders and Signature"));
    };
    let payload = head
        .content_sha256()
        .ok_or_else(|| Failure::new(Code::InvalidRequest, "a signed request needs the header x-amz-content-sha256"))?;
    let no_time = || Failure::new(Code::AccessDenied, "a signed request needs a valid x-amz-date or Date");
    let (time, timestamp) = timestamp(head).ok_or_else(no_time)?;
    Ok(Claim {
        credential,
        signed_headers,
        signature,
        time,
        timestamp,
        payload,
        expires: None,
        malformed: Code::AuthorizationHeaderMalformed,
    })
}

/// The time of a request, as it is signed.
fn timestamp(head: &Head) -> Option<(SystemTime, String)> {
    let text = head.header("x-amz-date").or_else(|| head.header("Date"))?;
    match httpdate::parse_http_date(text) {
        Ok(time) => Some((time, Timestamp::try_from(time).ok()?.strftime("%Y%m%dT%H%M%SZ").to_string())),
        Err(_) => Some((parse_timestamp(text)?, text.to_string())),
    }
}

fn parse_timestamp(text: &str) -> Option<SystemTime> {
    let time = DateTime::strptime("%Y%m%dT%H%M%SZ", text).ok().filter(|_| text.len() == 16)?;
    time.to_zoned(TimeZone::UTC).ok().map(|time| time.timestamp().into())
}

fn from_query(head: &Head, query: &Query) -> Result<Claim, Failure> {
    let malformed = |why: &str| Failure::new(Code::AuthorizationQueryParametersError, why);
    let get = |name: &str| {
        let missing = || malformed(&format!("a presigned URL needs {name}"));
        query.get(name).map(String::from).ok_or_else(missing)
    };
    if get("X-Amz-Algorithm")? != ALGORITHM {
        return Err(malformed("X-Amz-Algorithm is not AWS4-HMAC-SHA256"));
    }
    let timestamp = get("X-Amz-Date")?;
    let time = parse_timestamp(&timestamp);
    let expires = get("X-Amz-Expires")?.parse().ok().filter(|seconds| (1..=EXPIRES_MAX).contains(seconds));
    let expires = expires.ok_or_else(|| malformed("X-Amz-Expires is not one of 1 to 604800 seconds"))?;
    Ok(Claim {
        credential: get("X-Amz-Credential")?,
        signed_headers: get("X-Amz-SignedHeaders")?,
        signature: get("X-Amz-Signature")?,
        time: time.ok_or_else(|| malformed("X-Amz-Date is no time such as 20130524T000000Z"))?,
        timestamp,
        payload: head.content_sha256().unwrap_or_else(|| "UNSIGNED-PAYLOAD".into()),
        expires: Some(Duration::from_secs(expires)),
        malformed: Code::AuthorizationQueryParametersError,
    })
}

impl Claim {
    fn verify<'k>(self, head: &Head, keys: &'k Keys, now: SystemTime) -> Result<Signed<'k>, Failure> {
        let malformed = |why: &str| Failure::new(self.malformed, why);
        let fields: Vec<&str> = self.credential.split('/').collect();
        let [access, date, region, "s3", "aws4_request"] = fields[..] else {
            return Err(malformed("the credential is not ACCESS/DATE/REGION/s3/aws4_request"));
        };
        if self.timestamp.get(..8) != Some(date) || region.is_empty() {
            return Err(malformed("the date of the credential is not that of the request, or it has no region"));
        }
        let names: Vec<&str> = self.signed_headers.split(';').collect();
        if names.len() > head.headers.len() || names.iter().collect::<HashSet<_>>().len() < names.len() {
            return Err(malformed("a signed header is listed twice, or was not sent"));
        }
        if !names.contains(&"host") || !head.amz_names().all(|name| names.contains(&name.as_str())) {
            return Err(Failure::new(
                Code::AccessDenied,
                "There were headers present in the request which were not signed: sign host and every x-amz- header",
            ));
        }
        let key = keys.get(access).ok_or_else(unknown_key)?;
        self.check_time(now)?;
        let scope = self.credential[access.len() + 1..].to_string();
        let hash = hex(&Sha256::digest(self.canonical_request(head, &names)));
        let signing_key = [date, region, "s3", "aws4_request"]
            .iter()
            .fold(format!("AWS4{}", key.secret).into_bytes(), |key, text| hmac_sha256(&key, text).to_vec());
        let signature = hex(&hmac_sha256(&signing_key, &format!("{ALGORITHM}\n{}\n{scope}\n{hash}", self.timestamp)));
        check(&signature, &self.signature)?;
        Ok(Signed { key, signer: Some(Signer { signing_key, timestamp: self.timestamp, scope, previous: signature }) })
    }

    fn check_time(&self, now: SystemTime) -> Result<(), Failure> {
        let time = self.time;
        let is_early = time > now + SKEW;
        match self.expires {
            Some(expires) if now > time + expires => Err(expired()),
            Some(_) if is_early => Err(Failure::new(Code::AccessDenied, "Request is not valid yet")),
            None if is_early || now > time + SKEW => Err(Failure::new(
                Code::RequestTimeTooSkewed,
                "the time of the request is more than 15 minutes from the time of the server",
            )),
            _ => Ok(()),
        }
    }

    fn canonical_request(&self, head: &Head, names: &[&str]) -> String {
        let path: Vec<u8> = percent_decode_str(head.path()).collect();
        let encode = |text: Vec<u8>| percent_encode(&text, &IN_QUERY).to_string();
        let mut query: Vec<_> = parameters(head.target)
            .filter(|(name, _)| name != b"X-Amz-Signature")
            .map(|(name, value)| (encode(name), encode(value.unwrap_or_default())))
            .collect();
        query.sort();
        let query: Vec<String> = query.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut request = format!("{}\n{}\n{}\n", head.method, percent_encode(&path, &IN_PATH), query.join("&"));
        for name in names {
            let values: Vec<String> = head.values(name).map(single_spaces).collect();
            request.push_str(&format!("{name}:{}\n", values.join(",")));
        }
        request.push_str(&format!("\n{}\n{}", self.signed_headers, self.payload));
        request
    }
}

fn single_spaces(value: &str) -> String {
    value.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

pub(super) fn unknown_key() -> Failure {
    Failure::new(Code::InvalidAccessKeyId, "the server has no such access key")
}

pub(super) fn expired() -> Failure {
    Failure::new(Code::AccessDenied, "Request has expired")
}

/// Compares signatures in a time that does not tell how much of them is right.
pub(super) fn check(computed: &str, sent: &str) -> Result<(), Failure> {
    if computed.as_bytes().ct_eq(sent.as_bytes()).into() {
        return Ok(());
    }
    let text = "the signature is not the one that the server computed: check the secret key and the clock";
    Err(Failure::new(Code::SignatureDoesNotMatch, text))
}

/// Verifies the chunks of a body. Each signature covers the one before it, the first that of the head:
///
/// ```text
/// to-sign = "AWS4-HMAC-SHA256-" kind LF timestamp LF scope LF previous LF hash
/// hash    = hex(sha256("")) LF hex(sha256(data))     ; kind PAYLOAD
/// hash    = hex(sha256( *( name ":" value LF ) ))    ; kind TRAILER
/// ```
#[derive(Debug, Clone)]
pub struct Signer {
    signing_key: Vec<u8>,
    timestamp: String,
    scope: String,
    previous: String,
}

impl Signer {
    /// The signature of the next chunk.
    pub(super) fn chunk(&mut self, data: Sha256) -> &str {
        self.sign("PAYLOAD", format!("{}\n{}", hex(&Sha256::digest("")), hex(&data.finalize())))
    }

    /// The signature of the trailers, which follow the last chunk.
    pub(super) fn trailer(&mut self, lines: &str) -> &str {
        self.sign("TRAILER", hex(&Sha256::digest(lines)))
    }

    fn sign(&mut self, kind: &str, hash: String) -> &str {
        let text = format!("{ALGORITHM}-{kind}\n{}\n{}\n{}\n{hash}", self.timestamp, self.scope, self.previous);
        self.previous = hex(&hmac_sha256(&self.signing_key, &text));
        &self.previous
    }
}

fn hmac_sha256(key: &[u8], text: &str) -> [u8; 32] {
    let mut hmac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    hmac.update(text.as_bytes());
    hmac.finalize().into_bytes().into()
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    /// The key of AWS's examples.
    pub fn keys() -> Keys {
        Keys::parse("AKIAIOSFODNN7EXAMPLE wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY").unwrap()
    }

    /// So many seconds after the time of AWS's examples, 2013-05-24 00:00:00.
    pub fn after(seconds: i64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_369_353_600_i64.checked_add(seconds).unwrap() as u64)
    }

    /// The headers of a request, which signs all of them but Authorization. They are given sorted, separated by `|`.
    fn headers(text: &str, signature: &str) -> Vec<(String, String)> {
        let split = |field: &str| field.split_once(':').map(|(name, value)| (name.to_string(), value.to_string()));
        let mut headers: Vec<_> = text.split('|').filter_map(split).collect();
        let names: Vec<String> = headers.iter().map(|(name, _)| name.to_lowercase()).collect();
        let value = format!(
            "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,SignedHeaders={}, Signature={signature}",
            names.join(";")
        );
        headers.push(("Authorization".into(), value));
        headers
    }

    fn judge(method: &str, target: &str, headers: &[(String, String)], now: i64) -> Result<Option<Signer>, Code> {
        let headers: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let (head, keys) = (Head { method, target, headers: &headers }, keys());
        let signed = authenticate(&head, &keys, after(now)).map_err(|failure| failure.code)?;
        Ok(signed.and_then(|signed| signed.signer))
    }

    /// docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html and sigv4-streaming….html
    const EXAMPLES: [(&str, &str, &str, &str); 6] = [
        (
            "GET",
            "/test.txt",
            "Host:examplebucket.s3.amazonaws.com|Range:bytes=0-9|x-amz-content-sha256:EMPTY|x-amz-date:20130524T000000Z",
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        ),
        (
            "PUT",
            "/test$file.text",
            "Date:Fri, 24 May 2013 00:00:00 GMT|Host:examplebucket.s3.amazonaws.com|\
             x-amz-content-sha256:44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072|\
             x-amz-date:20130524T000000Z|x-amz-storage-class: REDUCED_REDUNDANCY ",
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
        ),
        (
            "GET",
            "/?lifecycle",
            "Host:examplebucket.s3.amazonaws.com|x-amz-content-sha256:EMPTY|x-amz-date:20130524T000000Z",
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
        ),
        (
            "GET",
            "/?prefix=%4A&max-keys=2",
            "Host:examplebucket.s3.amazonaws.com|x-amz-content-sha256:EMPTY|x-amz-date:20130524T000000Z",
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
        ),
        (
            "PUT",
            "/examplebucket/chunkObject.txt",
            "Content-Encoding:aws-chunked|Content-Length:66824|Host:s3.amazonaws.com|\
             x-amz-content-sha256:STREAMING-AWS4-HMAC-SHA256-PAYLOAD|x-amz-date:20130524T000000Z|\
             x-amz-decoded-content-length:66560|x-amz-storage-class:REDUCED_REDUNDANCY",
            "4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9",
        ),
        (
            "PUT",
            "/examplebucket/chunkObject.txt",
            "Content-Encoding:aws-chunked|Host:s3.amazonaws.com|\
             x-amz-content-sha256:STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER|x-amz-date:20130524T000000Z|\
             x-amz-decoded-content-length:66560|x-amz-storage-class:REDUCED_REDUNDANCY|\
             x-amz-trailer:x-amz-checksum-crc32c",
            "106e2a8a18243abcf37539882f36619c00e2dfc72633413f02d3b74544bfeb8e",
        ),
    ];

    /// The n-th of AWS's examples: method, target, headers.
    pub fn example(n: usize) -> (&'static str, &'static str, Vec<(String, String)>) {
        let (method, target, text, signature) = EXAMPLES[n];
        (method, target, headers(&text.replace("EMPTY", EMPTY), signature))
    }

    #[test]
    fn the_examples_of_aws_are_right_and_every_change_to_them_is_found() {
        for (n, (_, _, _, signature)) in EXAMPLES.iter().enumerate() {
            let (method, target, headers) = example(n);
            assert_eq!(judge(method, target, &headers, 0).unwrap().unwrap().previous, *signature);
            let wrong = Err(Code::SignatureDoesNotMatch);
            let code = |method: &str, target: &str, headers: &[_]| judge(method, target, headers, 0).map(|_| ());
            assert_eq!(code("DELETE", target, &headers), wrong);
            assert_eq!(code(method, &format!("{target}x"), &headers), wrong);
            assert_eq!(
                code(method, &format!("{target}{}x=", if target.contains('?') { '&' } else { '?' }), &headers),
                wrong
            );
            for at in 0..headers.len() - 1 {
                let mut changed = headers.clone();
                changed[at].1.push('0');
                assert!(code(method, target, &changed).is_err(), "{n} {at}");
                changed.remove(at);
                assert!(code(method, target, &changed).is_err(), "{n} {at}");
            }
            for unsigned in [("X-Amz-Acl", "public"), ("x-amz-meta-", "")] {
                let mut more = headers.clone();
                more.insert(0, (unsigned.0.into(), unsigned.1.into()));
                assert_eq!(code(method, target, &more), Err(Code::AccessDenied));
            }
        }
    }

    #[test]
    fn spaces_and_repeated_headers_are_signed_as_one_value() {
        let (method, target, mut headers) = example(1);
        headers[4].1 = "  REDUCED_REDUNDANCY  ".into();
        assert!(judge(method, target, &headers, 0).is_ok());
        let claim = Claim {
            credential: String::new(),
            signed_headers: "x-a;host".into(),
            signature: String::new(),
            time: after(0),
            timestamp: String::new(),
            payload: "UNSIGNED-PAYLOAD".into(),
            expires: None,
            malformed: Code::AuthorizationHeaderMalformed,
        };
        let headers = [("X-A", "  a   b "), ("Host", "h:80"), ("x-a", "c"), ("X-a", "")];
        let head = Head { method: "GET", target: "/%7Ea%2fb+%zz?b=&a-=+&a=%2b&a&X-Amz-Signature=x", headers: &headers };
        assert_eq!(
            claim.canonical_request(&head, &["x-a", "host"]),
            "GET\n/~a/b%2B%25zz\na=&a=%2B&a-=%20&b=\nx-a:a b,c,\nhost:h:80\n\nx-a;host\nUNSIGNED-PAYLOAD"
        );
    }

    #[test]
    fn the_time_of_a_request_may_be_15_minutes_off() {
        let (method, target, headers) = example(0);
        for (seconds, expected) in [(0, true), (900, true), (-900, true), (901, false), (-901, false)] {
            let result = judge(method, target, &headers, seconds).map(|_| ());
            assert_eq!(result, if expected { Ok(()) } else { Err(Code::RequestTimeTooSkewed) }, "{seconds}");
        }
        let date = |x_amz_date: Option<&str>, date: Option<&str>| {
            let headers: Vec<_> = [("x-amz-date", x_amz_date), ("date", date)].into_iter().collect();
            let headers: Vec<_> = headers.iter().filter_map(|(name, value)| Some((*name, (*value)?))).collect();
            let (time, text) = timestamp(&Head { method, target, headers: &headers })?;
            assert_eq!(time, after(0));
            Some(text)
        };
        assert_eq!(date(None, Some("Fri, 24 May 2013 00:00:00 GMT")).as_deref(), Some("20130524T000000Z"));
        assert_eq!(date(Some("20130524T000000Z"), Some("x")).as_deref(), Some("20130524T000000Z"));
        for wrong in ["", "20130524", "20130524T000000", "20130532T000000Z", "2013-05-24T00:00:00Z", "-0130524T000000Z"]
        {
            assert_eq!(date(Some(wrong), None), None, "{wrong}");
        }
        assert_eq!(date(None, None), None);
    }

    #[test]
    fn a_malformed_authorization_is_refused_with_its_code() {
        let good = "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,\
                    SignedHeaders=host;x-amz-content-sha256;x-amz-date,Signature=0";
        let malformed = Code::AuthorizationHeaderMalformed;
        for (from, to, code) in [
            ("", "", Code::SignatureDoesNotMatch),
            ("Signature=0", "Signature=", Code::SignatureDoesNotMatch),
            ("AKIAI", "BKIAI", Code::InvalidAccessKeyId),
            ("AWS4-HMAC-SHA256 ", "AWS ", Code::InvalidRequest),
            ("AWS4-HMAC-SHA256 ", "Basic ", Code::InvalidArgument),
            ("AWS4-HMAC-SHA256 ", "AWS4-HMAC-SHA256", Code::InvalidArgument),
            ("/s3/", "/ec2/", malformed),
            ("/us-east-1/", "//", malformed),
            ("/20130524/", "/2013052/", malformed),
            ("/20130524/", "/20130525/", malformed),
            ("aws4_request", "aws4_request/x", malformed),
            (",Signature=0", "", malformed),
            (",Signature=0", ",Signature=0,Signature=0", malformed),
            (",Signature=0", ",Signature=0,Other=0", malformed),
            ("host;", "host;host;", malformed),
            ("host;", "", Code::AccessDenied),
            (";x-amz-date", "", Code::AccessDenied),
            ("host;", "host;x-a;x-b;", malformed),
        ] {
            let value = good.replacen(from, to, 1);
            let fields = [
                ("Host", "a"),
                ("Authorization", &value),
                ("x-amz-date", "20130524T000000Z"),
                ("x-amz-content-sha256", EMPTY),
            ];
            let headers = fields.map(|(name, value)| (name.to_string(), value.to_string()));
            assert_eq!(judge("GET", "/b/k", &headers, 0).unwrap_err(), code, "{value}");
        }
        let fields = |text: &str| headers(text, "0");
        assert_eq!(
            judge("GET", "/", &fields("host:a|x-amz-date:20130524T000000Z"), 0).unwrap_err(),
            Code::InvalidRequest
        );
        assert_eq!(judge("GET", "/", &fields("host:a|x-amz-content-sha256:0"), 0).unwrap_err(), Code::AccessDenied);
        assert_eq!(judge("GET", "/?AWSAccessKeyId=a", &fields("host:a"), 0).unwrap_err(), Code::InvalidArgument);
        assert!(judge("GET", "/b/k?x=y", &[("host".into(), "a".into())], 0).unwrap().is_none());
    }

    /// docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
    #[test]
    fn a_presigned_url_lives_as_long_as_it_says() {
        let target = "/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1\
                      %2Fs3%2Faws4_request&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host\
                      &X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404";
        let judge = |from: &str, to: &str, more: &[(&str, &str)], now| {
            let fields = [&[("Host", "examplebucket.s3.amazonaws.com"), ("User-Agent", "x")], more].concat();
            let headers: Vec<_> = fields.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
            judge("GET", &target.replacen(from, to, 1), &headers, now).map(|signer| signer.is_some())
        };
        for seconds in [-900, 0, 86_400] {
            assert_eq!(judge("", "", &[], seconds), Ok(true));
        }
        let malformed = Code::AuthorizationQueryParametersError;
        for (from, to, seconds, code) in [
            ("", "", 86_401, Code::AccessDenied),
            ("", "", -901, Code::AccessDenied),
            ("Expires=86400", "Expires=86401", 0, Code::SignatureDoesNotMatch),
            ("Expires=86400", "Expires=604801", 0, malformed),
            ("Expires=86400", "Expires=0", 0, malformed),
            ("Expires=86400", "Expires=-1", 0, malformed),
            ("SHA256", "SHA1", 0, malformed),
            ("20130524T0", "20130524 0", 0, malformed),
            ("&X-Amz-Signature=", "&X-Amz-signature=", 0, malformed),
            ("&X-Amz-Signature=", "&Signature=x&X-Amz-Signature=", 0, Code::InvalidArgument),
            ("%2Fs3%2F", "%2Fs4%2F", 0, malformed),
            ("test", "Test", 0, Code::SignatureDoesNotMatch),
            ("aeeed", "Aeeed", 0, Code::SignatureDoesNotMatch),
            ("AKIA", "BKIA", 0, Code::InvalidAccessKeyId),
            ("=host", "=range", 0, Code::AccessDenied),
        ] {
            assert_eq!(judge(from, to, &[], seconds), Err(code), "{from} -> {to}, {seconds}");
        }
        assert_eq!(judge("", "", &[("x-amz-acl", "x")], 0), Err(Code::AccessDenied));
    }

    #[test]
    fn no_input_makes_it_panic() {
        let seed = std::env::var("MKV_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
        println!("MKV_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let parts = [
            "/",
            "?",
            "&",
            "=",
            ";",
            ",",
            ":",
            " ",
            "%",
            "%2",
            "%2F",
            "%C3%A9",
            "%FF",
            "é",
            "+",
            "host",
            "x-amz-date",
            "s3",
            "X-Amz-Algorithm=AWS4-HMAC-SHA256&",
            "X-Amz-Date=20130524T000000Z&",
            "X-Amz-Expires=9&",
            "X-Amz-Signature=0&",
            "X-Amz-Credential=",
            "X-Amz-SignedHeaders=host&",
            "AWS4-HMAC-SHA256 ",
            "Credential=",
            "SignedHeaders=",
            "Signature=0",
            "AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request",
            "AWSAccessKeyId=AKIAIOSFODNN7EXAMPLE&",
            "Expires=",
            "99999999999",
            "18446744073709551615",
            "&Signature=0",
            "x-amz-content-sha256",
            "Authorization",
            "20130524T000000Z",
        ];
        let keys = keys();
        let mut codes = HashSet::new();
        for _ in 0..50_000 {
            let mut text =
                |most| (0..random.usize(..most)).map(|_| parts[random.usize(..parts.len())]).collect::<String>();
            let (target, value, other) = (text(16), text(8), text(4));
            let headers = [
                ("Host", "x"),
                ("x-amz-date", "20130524T000000Z"),
                ("x-amz-content-sha256", "0"),
                ("Authorization", &value),
                (&other, &value),
            ];
            let head = Head { method: "GET", target: &target, headers: &headers[..random.usize(..=5)] };
            match authenticate(&head, &keys, after(0)) {
                Ok(Some(_)) => panic!("{target} {headers:?}"),
                Ok(None) => {}
                Err(failure) => _ = codes.insert(failure.code.name()),
            }
        }
        assert!(codes.len() >= 5, "{codes:?}");
    }
}
