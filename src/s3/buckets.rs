//! Buckets. The marker of bucket `b` is an empty value under the key `/b/`; a bucket exists if its marker or any key below
//! it does, so what the native API has written is in buckets too.

use super::address::{is_reachable, is_valid_bucket, key};
use super::answer::{Answer, Fault, NO_BUCKET, Outcome, document, empty, iso, xml};
use super::failure::Code;
use super::route::Operation;
use super::xml::{self, Document};
use super::{Call, S3};
use crate::error::Result;
use crate::http::{Body, Response};
use crate::store::Step;
use crate::volumes::upload::Upload;

/// The owner of all buckets and objects.
pub const OWNER: &str = "mkv";

/// The region of all buckets.
const REGION: &str = "us-east-1";

impl S3 {
    pub(super) fn list_buckets<'a>(&'a self, call: &Call) -> Answer<'a> {
        let mut list = Document::new("ListAllMyBucketsResult");
        owner(&mut list, "Owner");
        list.open("Buckets");
        self.store.scan(b"/", b"/", |key, record| {
            let Some((bucket, next)) = bucket_of(key) else { return Ok(Step::Next) };
            if call.may(false, bucket) {
                list.open("Bucket").element("Name", bucket);
                list.element("CreationDate", iso(record.time.unwrap_or_default())).close();
            }
            Ok(Step::SkipTo(next))
        })?;
        document(list)
    }

    pub(super) fn create_bucket<'a>(&'a self, call: &Call, body: &mut Body) -> Answer<'a> {
        let bucket = &call.route.bucket;
        if !is_valid_bucket(bucket) && !self.bucket_exists(bucket)? {
            let text = "a bucket has 3 to 63 lower-case letters, digits, dots and hyphens";
            return Err(Fault::new(Code::InvalidBucketName, text));
        }
        xml::parse_create_bucket(&self.read_text(call, body, true)?)?;
        let marker = call.route.key();
        if self.store.object(&marker)?.is_none() {
            let upload = Upload { reader: &mut std::io::empty(), length: Some(0), content_md5: None };
            self.store.put_object(&marker, upload, String::new, &|_| Ok(()))?;
        }
        Ok(Response { headers: vec![("Location", format!("/{bucket}"))], ..empty(200) })
    }

    pub(super) fn head_bucket<'a>(&'a self, call: &Call) -> Answer<'a> {
        self.check_bucket(call)?;
        Ok(Response { headers: vec![("x-amz-bucket-region", REGION.to_string())], ..empty(200) })
    }

    pub(super) fn delete_bucket<'a>(&'a self, call: &Call) -> Answer<'a> {
        self.check_bucket(call)?;
        let marker = call.route.key();
        self.check_empty(&marker)?;
        self.store.delete_object(&marker, &|_| Ok(()))?;
        Ok(empty(204))
    }

    /// Fails if the bucket has objects or uploads.
    fn check_empty(&self, marker: &[u8]) -> Outcome<()> {
        let mut is_empty = true;
        self.store.scan(marker, marker, |key, _| {
            is_empty = key == marker;
            Ok(if is_empty { Step::Next } else { Step::Stop })
        })?;
        match is_empty && self.store.uploads(marker)?.is_empty() {
            true => Ok(()),
            false => Err(Fault::new(Code::BucketNotEmpty, "the bucket has objects, or multipart uploads under way")),
        }
    }

    /// Answers a GET of a bucket's setting.
    pub(super) fn bucket_setting<'a>(&'a self, call: &Call) -> Answer<'a> {
        self.check_bucket(call)?;
        match call.route.operation {
            Operation::BucketAcl => Ok(xml(200, acl())),
            // An empty element stands for us-east-1.
            Operation::Location => document(Document::new("LocationConstraint")),
            Operation::Absent(code) => Err(Fault::new(code, "the bucket has none")),
            _ => document(Document::new("VersioningConfiguration")),
        }
    }

    pub(super) fn bucket_exists(&self, bucket: &str) -> Result<bool> {
        let marker = key(bucket, b"");
        let mut exists = self.store.object(&marker)?.is_some();
        if !exists {
            self.store.scan(&marker, &marker, |_, _| {
                exists = true;
                Ok(Step::Stop)
            })?;
        }
        Ok(exists)
    }

    /// Fails with `NoSuchBucket` if the request's bucket does not exist.
    pub(super) fn check_bucket(&self, call: &Call) -> Result<()> {
        if self.bucket_exists(&call.route.bucket)? { Ok(()) } else { Err(NO_BUCKET) }
    }
}

/// The bucket of a key, and the first key that can follow those of the bucket.
fn bucket_of(key: &[u8]) -> Option<(&str, Vec<u8>)> {
    let rest = key.strip_prefix(b"/")?;
    let end = rest.iter().position(|byte| *byte == b'/')?;
    let bucket = std::str::from_utf8(&rest[..end]).ok().filter(|bucket| is_reachable(bucket))?;
    Some((bucket, [b"/", bucket.as_bytes(), b"0"].concat()))
}

pub fn owner(document: &mut Document, tag: &'static str) {
    document.open(tag).element("ID", OWNER).element("DisplayName", OWNER).close();
}

/// The access control list of every bucket and object: the owner may do all.
pub fn acl() -> String {
    let mut list = Document::new("AccessControlPolicy");
    owner(&mut list, "Owner");
    list.open("AccessControlList").open("Grant");
    list.open("Grantee xmlns:xsi=\"http://www.w3.org/2001/XMLSchema-instance\" xsi:type=\"CanonicalUser\"");
    list.element("ID", OWNER).element("DisplayName", OWNER).close();
    list.element("Permission", "FULL_CONTROL");
    list.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_with_two_slashes_is_in_a_bucket() {
        assert_eq!(bucket_of(b"/b/"), Some(("b", b"/b0".to_vec())));
        assert_eq!(bucket_of(b"/b.c/d/e"), Some(("b.c", b"/b.c0".to_vec())));
        for key in [b"/b".as_slice(), b"//a", b"/.mkv/a", b"/b c/d", b"/\xff/d"] {
            assert_eq!(bucket_of(key), None);
        }
        assert!(b"/b/\xff\xff".as_slice() < b"/b0".as_slice() && b"/b0".as_slice() < b"/b00/a".as_slice());
    }
}
