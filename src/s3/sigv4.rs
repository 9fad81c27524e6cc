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
use percent_encoding::{percent_decode_str, percent_encode};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::claim::{ALGORITHM, Claim};
use super::failure::{Code, Failure};
use super::head::{Head, UNRESERVED, parameters, query};
use super::keys::{Key, Keys};
use super::sigv2;
use crate::format::percent_encoded;

/// How far the clock of a client may be from ours.
const SKEW: Duration = Duration::from_secs(15 * 60);

/// A request whose signature is right.
#[derive(Debug)]
pub struct Signed<'k> {
    pub key: &'k Key,
    /// Verifies the chunks of the body. `None`: the signature is of version 2, which has no chunks.
    pub signer: Option<Signer>,
}

/// Verifies the signature of a request's head. `None`: it has none. The caller has to verify the body (`Payload`), and
/// whether the key allows the request (`Key::may`).
pub fn authenticate<'k>(head: &Head, keys: &'k Keys, now: SystemTime) -> Result<Option<Signed<'k>>, Failure> {
    let query = query(head.target)?;
    let has = |names: &[&str]| names.iter().any(|name| query.get(name).is_some());
    let in_query = has(&["X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Signature"]);
    let in_query_v2 = has(&["AWSAccessKeyId", "Signature"]);
    let in_header = head.header("Authorization").filter(|value| !value.is_empty());
    match (in_header, in_query, in_query_v2) {
        (None, false, false) => Ok(None),
        (Some(value), false, false) => Claim::of_header(head, value)?.verify(head, keys, now).map(Some),
        (None, true, false) => Claim::of_query(head, &query)?.verify(head, keys, now).map(Some),
        (None, false, true) => sigv2::authenticate(head, &query, keys, now).map(Some),
        _ => Err(Failure::new(Code::InvalidArgument, "a request may be signed in one way only")),
    }
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
        let encode = |text: Vec<u8>| percent_encode(&text, UNRESERVED).to_string();
        let mut query: Vec<_> = parameters(head.target)
            .filter(|(name, _)| name != b"X-Amz-Signature")
            .map(|(name, value)| (encode(name), encode(value.unwrap_or_default())))
            .collect();
        query.sort();
        let query: Vec<String> = query.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut request = format!("{}\n{}\n{}\n", head.method, percent_encoded(&path), query.join("&"));
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

/// Compares signatures in constant time.
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
mod tests {
    use super::*;
    use crate::s3::examples::{EMPTY, EXAMPLES, after, example, fields, headers, keys};

    fn judge(method: &str, target: &str, headers: &[(String, String)], now: i64) -> Result<Option<Signer>, Code> {
        let (head, keys) = (Head { method, target, headers: &fields(headers) }, keys());
        let signed = authenticate(&head, &keys, after(now)).map_err(|failure| failure.code)?;
        Ok(signed.and_then(|signed| signed.signer))
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
        let parts = "/|?|&|=|;|,|:| |%|%2|%2F|%C3%A9|%FF|é|+|host|x-amz-date|s3|\
                     X-Amz-Algorithm=AWS4-HMAC-SHA256&|X-Amz-Date=20130524T000000Z&|X-Amz-Expires=9&|\
                     X-Amz-Signature=0&|X-Amz-Credential=|X-Amz-SignedHeaders=host&|AWS4-HMAC-SHA256 |\
                     Credential=|SignedHeaders=|Signature=0|\
                     AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request|\
                     AWSAccessKeyId=AKIAIOSFODNN7EXAMPLE&|Expires=|99999999999|18446744073709551615|&Signature=0|\
                     x-amz-content-sha256|Authorization|20130524T000000Z";
        let parts: Vec<&str> = parts.split('|').collect();
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
