//! URLs that are presigned with Signature Version 2: boto3 and aws-cli make such ones for an endpoint of one's own.
//!
//! ```text
//! to-sign   = method LF md5 LF type LF expires LF *( name ":" values LF ) path [ "?" sub *( "&" sub ) ]
//! sub       = name [ "=" decoded-value ]     ; the parameters of the list below, sorted
//! signature = base64(hmac-sha1(secret, to-sign))
//! ```
//!
//! `expires` is in seconds since 1970. Presigning moves Content-MD5, Content-Type and the `x-amz-` headers into the query;
//! they count as headers. docs.aws.amazon.com/AmazonS3/latest/userguide/RESTAuthentication.html.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha1::Sha1;

use super::failure::{Code, Failure};
use super::head::{Head, Query, is_amz, parameters};
use super::keys::Keys;
use super::sigv4::{Signed, check, expired, unknown_key};

/// The parameters that are signed, but for `response-…`.
const SUB_RESOURCES: &str = "accelerate acl analytics cors defaultObjectAcl delete inventory lifecycle location logging \
                             metrics notification object-lock partNumber policy replication requestPayment restore \
                             select select-type storageClass tagging torrent uploadId uploads versionId versioning \
                             versions website";

pub(super) fn authenticate<'k>(
    head: &Head,
    query: &Query,
    keys: &'k Keys,
    now: SystemTime,
) -> Result<Signed<'k>, Failure> {
    let get = |name: &str| {
        let missing = || Failure::new(Code::AccessDenied, format!("a presigned URL needs {name}"));
        query.get(name).ok_or_else(missing)
    };
    let (access, expires, signature) = (get("AWSAccessKeyId")?, get("Expires")?, get("Signature")?);
    let key = keys.get(access).ok_or_else(unknown_key)?;
    let until =
        expires.parse().ok().and_then(|seconds| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)));
    let until = until.ok_or_else(|| Failure::new(Code::AccessDenied, "Expires is no number of seconds"))?;
    if now > until {
        return Err(expired());
    }
    // Only lower case is signed, and handlers take either.
    if query.0.iter().any(|(name, _)| is_amz(name) && *name != name.to_lowercase()) {
        return Err(Failure::new(Code::SignatureDoesNotMatch, "write the x-amz- parameters in lower case"));
    }
    let check_with = |end| {
        let mut hmac = Hmac::<Sha1>::new_from_slice(key.secret.as_bytes()).expect("HMAC takes keys of any length");
        hmac.update(&to_sign(head, query, expires, end));
        check(&STANDARD.encode(hmac.finalize().into_bytes()), signature)
    };
    let is_bucket = !head.path().get(1..).is_some_and(|path| path.contains('/'));
    // Of the path /bucket botocore signs /bucket/, unless the name cannot be part of a host's.
    check_with("").or_else(|wrong| if is_bucket { check_with("/") } else { Err(wrong) })?;
    Ok(Signed { key, signer: None })
}

/// `end` follows the path.
fn to_sign(head: &Head, query: &Query, expires: &str, end: &str) -> Vec<u8> {
    let value = |name: &str| head.header(name).or_else(|| query.get(name).map(str::trim)).unwrap_or_default();
    let mut text = format!("{}\n{}\n{}\n{expires}\n", head.method, value("content-md5"), value("content-type"));
    let moved = query.0.iter().filter(|(name, _)| name.starts_with("x-amz-"));
    let mut amz: BTreeMap<String, Vec<&str>> = moved.map(|(name, value)| (name.clone(), vec![value.trim()])).collect();
    for name in head.amz_names() {
        let values = head.values(&name).collect();
        amz.insert(name, values);
    }
    for (name, values) in amz {
        text.push_str(&format!("{name}:{}\n", values.join(",")));
    }
    text.push_str(head.path());
    text.push_str(end);
    let is_signed = |name: &[u8]| {
        name.starts_with(b"response-") || SUB_RESOURCES.split(' ').any(|resource| resource.as_bytes() == name)
    };
    let mut signed: Vec<_> = parameters(head.target).filter(|(name, _)| is_signed(name)).collect();
    signed.sort();
    let mut bytes = text.into_bytes();
    for (n, (name, value)) in signed.into_iter().enumerate() {
        bytes.push(if n == 0 { b'?' } else { b'&' });
        bytes.extend(name);
        if let Some(value) = value {
            bytes.push(b'=');
            bytes.extend(value);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::s3::examples::{after, keys};
    use crate::s3::sigv4::authenticate;

    fn judge(method: &str, target: &str, headers: &[(&str, &str)], now: i64) -> Result<(), Code> {
        let keys = keys();
        let signed = authenticate(&Head { method, target, headers }, &keys, after(now));
        signed.map(|signed| assert!(signed.unwrap().signer.is_none())).map_err(|failure| failure.code)
    }

    /// The first is AWS's, the others are botocore's (HmacV1QueryAuth).
    #[test]
    fn golden_urls_are_right_until_they_expire() {
        let old = "/johnsmith/photos/puppy.jpg?AWSAccessKeyId=AKIAIOSFODNN7EXAMPLE&Expires=1175139620\
                   &Signature=NpgCjnDzrM%2BWFzoENXmpNDUsSn8%3D";
        assert_eq!(judge("GET", old, &[], -200_000_000), Ok(()));
        assert_eq!(judge("GET", old, &[], 0), Err(Code::AccessDenied));
        let key = "AWSAccessKeyId=AKIAIOSFODNN7EXAMPLE&Expires=1369353700&Signature=";
        let sent = [("x-amz-meta-a", "b c"), ("Content-Type", "text/x"), ("X-Amz-Acl", "private")];
        for (method, target, headers) in [
            ("GET", format!("/b-b?list-type=2&{key}Nh1O6joq5rX1ZJdOKyBFZVvKoOc%3D"), &[][..]),
            ("GET", format!("/B_b?list-type=2&{key}FPlqFiyWPF04Bt7uWF1N0vMDHdE%3D"), &[]),
            (
                "PUT",
                format!(
                    "/b/a%20%C3%A9?partNumber=3&uploadId=%2Fx&{key}IE94g5Bd5xP6f%2FNS0TIcEQgZijw%3D\
                     &content-type=text%2Fx&x-amz-meta-a=b%20c&x-amz-acl=private"
                ),
                &sent,
            ),
        ] {
            assert_eq!(judge(method, &target, headers, 100), Ok(()), "{target}");
            assert_eq!(judge(method, &target, headers, 101), Err(Code::AccessDenied));
            let wrong = Err(Code::SignatureDoesNotMatch);
            assert_eq!(judge("DELETE", &target, headers, 0), wrong);
            assert_eq!(judge(method, &format!("{target}&acl"), headers, 0), wrong);
            assert_eq!(judge(method, &target.replacen('?', "/?", 1), headers, 0).is_ok(), target.starts_with("/b-b"));
            assert_eq!(judge(method, &target, &[("x-amz-acl", "public-read")], 0), wrong);
            assert_eq!(judge(method, &target.replace("AKIA", "BKIA"), headers, 0), Err(Code::InvalidAccessKeyId));
            for (from, to) in
                [("Expires=", "expires="), ("Expires=", "Expires=x"), ("=1369353700", "=99999999999999999999")]
            {
                assert_eq!(judge(method, &target.replace(from, to), headers, 0), Err(Code::AccessDenied));
            }
        }
    }

    #[test]
    fn what_is_signed_is_what_the_rules_say() {
        let headers =
            [("X-Amz-Meta-B", " b "), ("Content-Type", "text/x"), ("x-amz-meta-a", "1"), ("X-Amz-Meta-B", "c")];
        let target =
            "/b/a%20b?x-amz-acl=private&uploadId=%2Fx&content-md5=m&list-type=2&response-expires=a%20b&acl&Expires=7";
        let query = crate::s3::head::query(target).unwrap();
        let text = to_sign(&Head { method: "PUT", target, headers: &headers }, &query, "7", "");
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "PUT\nm\ntext/x\n7\nx-amz-acl:private\nx-amz-meta-a:1\nx-amz-meta-b:b,c\n\
             /b/a%20b?acl&response-expires=a b&uploadId=/x"
        );
    }
}
