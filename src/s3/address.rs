//! Addresses: the bucket and object that a path or a copy's source names, and the rules for names.
//!
//! They are path style: `/BUCKET` or `/BUCKET/OBJECT`, percent-encoded.

use std::net::Ipv4Addr;

use percent_encoding::percent_decode_str;

use super::failure::{Code, Failure};
use crate::format::placement::KEY_MAX;

/// The longest name of an object, in bytes.
pub const OBJECT_MAX: usize = 1024;

/// The folder of the master's own keys.
pub const OWN: &str = ".mkv";

/// The message for a request that names a version.
pub const NO_VERSIONS: &str = "objects have no versions, but for the version null";

/// The store's key of an object. That of the empty object is the bucket's marker and the prefix of its keys.
pub fn key(bucket: &str, object: &[u8]) -> Vec<u8> {
    [b"/", bucket.as_bytes(), b"/", object].concat()
}

/// The bucket and object of a path, which begins with a slash.
pub fn address(path: &str) -> Result<(String, Vec<u8>), Failure> {
    let wrong = |text| Failure::new(Code::InvalidURI, text);
    let decoded = decode(path).ok_or_else(|| wrong("a % is not followed by two hex digits: send a % as %25"))?;
    let path = decoded.strip_prefix(b"/").ok_or_else(|| wrong("the request target does not begin with /"))?;
    let end = path.iter().position(|byte| *byte == b'/').unwrap_or(path.len());
    let bucket = String::from_utf8_lossy(&path[..end]).into_owned();
    Ok((bucket, path.get(end + 1..).unwrap_or_default().to_vec()))
}

/// Checks what the store could not hold.
pub fn check_object(bucket: &str, object: &[u8]) -> Result<(), Failure> {
    // A bucket that was made natively may have a name over 63 bytes.
    let most = OBJECT_MAX.min((KEY_MAX - 2).saturating_sub(bucket.len()));
    if object.len() > most {
        let text = format!("the key has {} bytes, {most} are allowed", object.len());
        return Err(Failure::new(Code::KeyTooLongError, text));
    }
    match object.is_empty() || is_reachable(bucket) {
        true => Ok(()),
        false => Err(Failure::new(Code::NoSuchBucket, "no bucket can have this name")),
    }
}

/// The bucket and object of `x-amz-copy-source`: with or without a slash in front, percent-encoded once.
pub fn copy_source(text: &str) -> Result<(String, Vec<u8>), Failure> {
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    if !matches!(query, "" | "versionId=" | "versionId=null") {
        return Err(Failure::new(Code::InvalidArgument, NO_VERSIONS));
    }
    let path = if path.starts_with(['/', '%']) && decode(path).is_some_and(|path| path.starts_with(b"/")) {
        path.to_string()
    } else {
        format!("/{path}")
    };
    let (bucket, object) = address(&path)?;
    if bucket.is_empty() || object.is_empty() {
        return Err(Failure::new(Code::InvalidArgument, "x-amz-copy-source is BUCKET/KEY, percent-encoded"));
    }
    if bucket == OWN {
        return Err(Failure::new(Code::AccessDenied, "keys below /.mkv/ are the master's own"));
    }
    check_object(&bucket, &object)?;
    Ok((bucket, object))
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let bytes = text.as_bytes();
    let hex = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_hexdigit);
    let whole = bytes.iter().enumerate().all(|(at, byte)| *byte != b'%' || hex(at + 1) && hex(at + 2));
    whole.then(|| percent_decode_str(text).collect())
}

/// Whether keys below this name are a bucket: what the native API has made can be read whatever S3 thinks of the name.
pub fn is_reachable(bucket: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=255).contains(&bucket.len()) && bucket != OWN && bucket.bytes().all(fits)
}

/// Whether a bucket of this name may be made: AWS's rules for general purpose buckets.
pub fn is_valid_bucket(bucket: &str) -> bool {
    let edge = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_address = bucket.parse::<Ipv4Addr>().is_ok();
    let labels = || {
        bucket.split('.').all(|label| label.bytes().next().is_some_and(edge) && label.bytes().last().is_some_and(edge))
    };
    (3..=63).contains(&bucket.len())
        && bucket.bytes().all(|byte| edge(byte) || byte == b'.' || byte == b'-')
        && labels()
        && !is_address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_decoded_once() {
        for (text, object) in [
            ("bucket/a", b"a".as_slice()),
            ("/bucket/a", b"a"),
            ("%2Fbucket%2Fa", b"a"),
            ("bucket/a%2520b+c", b"a%20b+c"),
            ("bucket/%3FversionId", b"?versionId"),
            ("bucket/a?versionId=null", b"a"),
            ("bucket//a", b"/a"),
        ] {
            assert_eq!(copy_source(text), Ok(("bucket".to_string(), object.to_vec())), "{text}");
        }
        for text in ["", "/", "bucket", "bucket/", "bucket/a?versionId=7", ".mkv/a", "bucket/%z"] {
            assert!(copy_source(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_of_new_buckets_follow_the_rules() {
        for name in ["abc", "a-b.c9", "0ab", &"a".repeat(63)] {
            assert!(is_valid_bucket(name), "{name}");
        }
        for name in ["ab", "Abc", "a_b", "a..b", "-ab", "ab-", "a.-b", ".ab", "1.2.3.4", &"a".repeat(64)] {
            assert!(!is_valid_bucket(name), "{name}");
        }
        assert!(is_reachable("A_b") && !is_reachable(".mkv") && !is_reachable("") && !is_reachable("a b"));
    }
}
