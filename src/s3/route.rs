//! Request routing: method, path and query to an operation. Pure: no I/O.
//!
//! A query names the operation together with the method (`RULES`). A parameter that no rule has makes a request 501: a
//! sub-resource that mkv does not have must never be taken for the object itself.

use super::address::{NO_VERSIONS, OWN, address, check_object, is_reachable, key};
use super::failure::{Code, Failure};
use super::head::{Query, is_amz};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    ListBuckets,
    CreateBucket,
    HeadBucket,
    DeleteBucket,
    ListObjects,
    ListObjectsV2,
    ListUploads,
    DeleteObjects,
    BucketAcl,
    Location,
    Versioning,
    /// A setting that no bucket has.
    Absent(Code),
    Get,
    Head,
    Put,
    Copy,
    Delete,
    ObjectAcl,
    ObjectTagging,
    CreateUpload,
    UploadPart,
    UploadPartCopy,
    Complete,
    Abort,
    ListParts,
}

#[derive(Debug, PartialEq)]
pub struct Route {
    pub operation: Operation,
    /// Empty: the service itself.
    pub bucket: String,
    /// Empty: the bucket itself.
    pub object: Vec<u8>,
}

impl Route {
    /// The store's key of the object; for a bucket itself, of its marker.
    pub fn key(&self) -> Vec<u8> {
        key(&self.bucket, &self.object)
    }
}

/// What an address names.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Level {
    Service,
    Bucket,
    Object,
}

use Level::{Bucket, Object, Service};

/// A method and the parameters that mark an operation, each of which must be there, and those that may be.
type Rule = (&'static str, Level, &'static [&'static str], &'static [&'static str], Operation);

const LIST: &[&str] = &["prefix", "delimiter", "max-keys", "encoding-type", "marker"];
const LIST_V2: &[&str] =
    &["prefix", "delimiter", "max-keys", "encoding-type", "start-after", "continuation-token", "fetch-owner"];
const LIST_UPLOADS: &[&str] =
    &["prefix", "delimiter", "max-uploads", "encoding-type", "key-marker", "upload-id-marker"];
const READ: &[&str] = &[
    "versionId",
    "response-content-type",
    "response-cache-control",
    "response-content-disposition",
    "response-content-encoding",
    "response-content-language",
    "response-expires",
];
const VERSION: &[&str] = &["versionId"];

const RULES: &[Rule] = &[
    ("GET", Service, &[], &[], Operation::ListBuckets),
    ("PUT", Bucket, &[], &[], Operation::CreateBucket),
    ("HEAD", Bucket, &[], &[], Operation::HeadBucket),
    ("DELETE", Bucket, &[], &[], Operation::DeleteBucket),
    ("POST", Bucket, &["delete"], &[], Operation::DeleteObjects),
    ("GET", Bucket, &[], LIST, Operation::ListObjects),
    ("GET", Bucket, &["list-type"], LIST_V2, Operation::ListObjectsV2),
    ("GET", Bucket, &["uploads"], LIST_UPLOADS, Operation::ListUploads),
    ("GET", Bucket, &["acl"], &[], Operation::BucketAcl),
    ("GET", Bucket, &["location"], &[], Operation::Location),
    ("GET", Bucket, &["versioning"], &[], Operation::Versioning),
    ("GET", Bucket, &["policy"], &[], Operation::Absent(Code::NoSuchBucketPolicy)),
    ("GET", Bucket, &["cors"], &[], Operation::Absent(Code::NoSuchCORSConfiguration)),
    ("GET", Bucket, &["lifecycle"], &[], Operation::Absent(Code::NoSuchLifecycleConfiguration)),
    ("GET", Bucket, &["tagging"], &[], Operation::Absent(Code::NoSuchTagSet)),
    ("GET", Bucket, &["encryption"], &[], Operation::Absent(Code::ServerSideEncryptionConfigurationNotFoundError)),
    ("GET", Object, &[], READ, Operation::Get),
    ("HEAD", Object, &[], READ, Operation::Head),
    ("GET", Object, &["acl"], VERSION, Operation::ObjectAcl),
    ("GET", Object, &["tagging"], VERSION, Operation::ObjectTagging),
    ("PUT", Object, &[], &[], Operation::Put),
    ("DELETE", Object, &[], VERSION, Operation::Delete),
    ("POST", Object, &["uploads"], &[], Operation::CreateUpload),
    ("PUT", Object, &["uploadId", "partNumber"], &[], Operation::UploadPart),
    ("POST", Object, &["uploadId"], &[], Operation::Complete),
    ("DELETE", Object, &["uploadId"], &[], Operation::Abort),
    ("GET", Object, &["uploadId"], &["max-parts", "part-number-marker", "encoding-type"], Operation::ListParts),
];

/// Parameters that every request may have: what SDKs add, and signatures. Those of `x-amz-` are headers in a query.
fn is_ignored(name: &str) -> bool {
    // botocore's presigned URLs of version 2 repeat headers in the query.
    is_amz(name)
        || matches!(name, "" | "x-id" | "AWSAccessKeyId" | "Signature" | "Expires" | "content-type" | "content-md5")
}

/// Parses a request. `path` is the target's, as it was sent. `copies`: the request names a source to copy.
pub fn route(method: &str, path: &str, query: &Query, copies: bool) -> Result<Route, Failure> {
    let (bucket, object) = address(path)?;
    let level = match (bucket.is_empty(), object.is_empty()) {
        (true, true) => Service,
        (true, false) => return Err(Failure::new(Code::InvalidBucketName, "the bucket has no name")),
        (false, true) => Bucket,
        (false, false) => Object,
    };
    if bucket == OWN {
        return Err(Failure::new(Code::AccessDenied, "keys below /.mkv/ are the master's own"));
    }
    let names: Vec<&str> = query.0.iter().map(|(name, _)| name.as_str()).filter(|name| !is_ignored(name)).collect();
    let fits = |(on, at, marks, options, _): &&Rule| {
        *on == method
            && *at == level
            && marks.iter().all(|mark| names.contains(mark))
            && names.iter().all(|name| marks.contains(name) || options.contains(name))
    };
    let Some((.., operation)) = RULES.iter().find(fits) else { return Err(unknown(method, &names)) };
    let operation = match operation {
        Operation::Put if copies => Operation::Copy,
        Operation::UploadPart if copies => Operation::UploadPartCopy,
        operation => *operation,
    };
    if level == Bucket && operation != Operation::CreateBucket && !is_reachable(&bucket) {
        return Err(Failure::new(Code::NoSuchBucket, "no bucket can have this name"));
    }
    check_object(&bucket, &object)?;
    if query.get("versionId").is_some_and(|id| !matches!(id, "" | "null")) {
        return Err(Failure::new(Code::InvalidArgument, NO_VERSIONS));
    }
    if operation == Operation::ListObjectsV2 && query.get("list-type") != Some("2") {
        return Err(Failure::new(Code::InvalidArgument, "list-type is 2 or absent"));
    }
    Ok(Route { operation, bucket, object })
}

fn unknown(method: &str, names: &[&str]) -> Failure {
    match method {
        "GET" | "HEAD" | "PUT" | "POST" | "DELETE" if names.is_empty() => {
            Failure::new(Code::MethodNotAllowed, format!("there is no {method} for this"))
        }
        "GET" | "HEAD" | "PUT" | "POST" | "DELETE" => {
            Failure::new(Code::NotImplemented, format!("mkv has no {method} with ?{}", names.join("&")))
        }
        _ => Failure::new(Code::MethodNotAllowed, "use GET, HEAD, PUT, POST or DELETE"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::s3::address::OBJECT_MAX;
    use crate::s3::head;

    fn routed(method: &str, target: &str) -> Result<Route, Code> {
        let (path, _) = target.split_once('?').unwrap_or((target, ""));
        let query = head::query(target).map_err(|failure| failure.code)?;
        route(method, path, &query, false).map_err(|failure| failure.code)
    }

    #[test]
    fn an_address_is_a_bucket_and_an_object() {
        for (target, bucket, object) in [
            ("/bucket/a", "bucket", b"a".as_slice()),
            ("/bucket//a//", "bucket", b"/a//"),
            ("/bucket/a%2Fb%20c%3f+", "bucket", b"a/b c?+"),
            ("/bucket/..", "bucket", b".."),
            ("/bucket/%00%ff", "bucket", b"\x00\xff"),
            ("/Old_Bucket/x", "Old_Bucket", b"x"),
        ] {
            let route = Route { operation: Operation::Get, bucket: bucket.into(), object: object.into() };
            assert_eq!(routed("GET", target), Ok(route), "{target}");
        }
        assert_eq!(routed("GET", "/bucket/a/b").unwrap().key(), b"/bucket/a/b");
        assert_eq!(routed("HEAD", "/bucket/").unwrap().key(), b"/bucket/");
        let long = format!("/bucket/{}", "k".repeat(OBJECT_MAX));
        assert!(routed("PUT", &long).is_ok());
        assert_eq!(routed("PUT", &format!("{long}k")), Err(Code::KeyTooLongError));
    }

    #[test]
    fn method_and_query_name_the_operation() {
        use Operation::*;
        for (method, target, operation) in [
            ("GET", "/", ListBuckets),
            ("GET", "/?x-id=ListBuckets", ListBuckets),
            ("PUT", "/bucket", CreateBucket),
            ("GET", "/bucket/?prefix=a&delimiter=/", ListObjects),
            ("GET", "/bucket?list-type=2&fetch-owner=true", ListObjectsV2),
            ("GET", "/bucket?uploads", ListUploads),
            ("POST", "/bucket?delete=", DeleteObjects),
            ("GET", "/bucket?policy", Absent(Code::NoSuchBucketPolicy)),
            ("GET", "/bucket/a?versionId=null&response-expires=x", Get),
            ("GET", "/bucket/a?X-Amz-Signature=x&x-amz-checksum-mode=ENABLED&x-id=GetObject", Get),
            ("HEAD", "/bucket/a", Head),
            ("POST", "/bucket/a?uploads=", CreateUpload),
            ("PUT", "/bucket/a?uploadId=x&partNumber=1", UploadPart),
            ("POST", "/bucket/a?uploadId=x", Complete),
            ("DELETE", "/bucket/a?uploadId=x&x-id=AbortMultipartUpload", Abort),
            ("GET", "/bucket/a?uploadId=x&max-parts=5", ListParts),
            ("GET", "/bucket/a?tagging", ObjectTagging),
        ] {
            assert_eq!(routed(method, target).map(|route| route.operation), Ok(operation), "{method} {target}");
        }
        let query = Query(Vec::new());
        assert_eq!(route("PUT", "/bucket/a", &query, true).unwrap().operation, Copy);
    }

    #[test]
    fn a_sub_resource_that_is_not_known_never_acts_on_the_object() {
        for (method, target) in [
            ("PUT", "/bucket/a?acl"),
            ("PUT", "/bucket/a?tagging"),
            ("DELETE", "/bucket/a?tagging"),
            ("DELETE", "/bucket?policy"),
            ("DELETE", "/bucket?anything=1"),
            ("PUT", "/bucket?versioning"),
            ("PUT", "/bucket/a?partNumber=1"),
            ("PUT", "/bucket/a?uploadId=x"),
            ("PUT", "/bucket/a?Acl"),
            ("PUT", "/bucket/a?versionId=null"),
            ("GET", "/bucket/a?partNumber=1"),
            ("GET", "/bucket/a?torrent"),
            ("GET", "/bucket?versions"),
            ("HEAD", "/bucket/a?acl"),
            ("POST", "/bucket/a?restore"),
            ("POST", "/bucket/a?select&select-type=2"),
            ("GET", "/bucket?start-after=a"),
            ("GET", "/?bucket-region=x"),
        ] {
            assert_eq!(routed(method, target), Err(Code::NotImplemented), "{method} {target}");
        }
    }

    #[test]
    fn wrong_requests_get_their_codes() {
        for (method, target, code) in [
            ("GET", "/.mkv/backup/1", Code::AccessDenied),
            ("PUT", "/.mkv", Code::AccessDenied),
            ("PUT", "/%2emkv/a", Code::AccessDenied),
            ("GET", "//a", Code::InvalidBucketName),
            ("GET", "/b%20c/a", Code::NoSuchBucket),
            ("GET", "/b%ff/", Code::NoSuchBucket),
            ("GET", "/bucket/%4", Code::InvalidURI),
            ("GET", "/bucket/a?versionId=3", Code::InvalidArgument),
            ("GET", "/bucket?list-type=3", Code::InvalidArgument),
            ("POST", "/bucket", Code::MethodNotAllowed),
            ("OPTIONS", "/bucket/a", Code::MethodNotAllowed),
            ("get", "/bucket/a", Code::MethodNotAllowed),
        ] {
            assert_eq!(routed(method, target), Err(code), "{method} {target}");
        }
    }
}
