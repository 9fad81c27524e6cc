//! PUT, DELETE and DeleteObjects, and the bodies of requests.

use std::cell::RefCell;
use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use md5::{Digest, Md5};

use super::address::{NO_VERSIONS, OBJECT_MAX, key};
use super::answer::{Answer, Fault, NO_BUCKET, Outcome, document, empty, xml};
use super::buckets::acl;
use super::checksum::Algorithm;
use super::conditions::Conditions;
use super::failure::{Code, Failure};
use super::meta::{Meta, etag};
use super::payload::Payload;
use super::route::Operation;
use super::xml::{self, Document};
use super::{Call, S3};
use crate::error::{Error, Result};
use crate::format::record::{Hash, Record};
use crate::http::{Body, Response};
use crate::volumes::upload::Upload;

/// The longest XML of a request, in bytes.
const XML_MAX: u64 = 8 << 20;

/// The bytes of XML of all requests together, as long as one holds more than a piece.
const XML_TOTAL: u64 = 32 << 20;

/// Bytes of XML that are read at a time.
const PIECE: usize = 64 << 10;

/// The checksum that a client has sent with a value, once the value was read to its end.
pub type Checksum = Option<(Algorithm, String)>;

impl S3 {
    pub(super) fn put<'a>(&'a self, call: &Call, body: &mut Body) -> Answer<'a> {
        let (key, conditions) = (call.route.key(), Conditions::of(call.head));
        let mut meta = Meta::of_request(call.head, call.query)?;
        self.check_bucket(call)?;
        if conditions.is_any() {
            // Refuse now what the flip would refuse. Only the flip's answer is final.
            conditions.judge(self.store.object(&key)?.as_ref())?;
        }
        let record = receive(call, body, |upload, checksum| {
            let encode = || {
                meta.set_checksum(checksum());
                meta.encode()
            };
            self.store.put_object(&key, upload, encode, &|old| self.judge(&call.route.bucket, &conditions, old))
        })?;
        stored(&record)
    }

    /// Decides at the flip whether a write may replace this record.
    pub(super) fn judge(&self, bucket: &str, conditions: &Conditions, old: Option<&Record>) -> Result<()> {
        conditions.judge(old)?;
        // If there is an object to replace, there is a bucket.
        match old.is_some_and(Record::live) || self.bucket_exists(bucket)? {
            true => Ok(()),
            false => Err(NO_BUCKET),
        }
    }

    pub(super) fn delete<'a>(&'a self, call: &Call) -> Answer<'a> {
        self.check_bucket(call)?;
        let conditions = Conditions::of(call.head);
        self.store.delete_object(&call.route.key(), &|old| conditions.judge(old))?;
        Ok(empty(204))
    }

    pub(super) fn delete_objects<'a>(&'a self, call: &Call, body: &mut Body) -> Answer<'a> {
        self.check_bucket(call)?;
        let wanted = xml::parse_delete(&self.read_text(call, body, true)?)?;
        let mut result = Document::new("DeleteResult");
        for object in &wanted.objects {
            match self.delete_listed(&call.route.bucket, object) {
                Ok(()) if wanted.quiet => {}
                Ok(()) => {
                    result.open("Deleted").element("Key", &object.key).close();
                }
                Err(fault) => {
                    let failure = fault.failure();
                    result.open("Error").element("Key", &object.key).element("Code", failure.code.name());
                    result.element("Message", &failure.message).close();
                }
            }
        }
        document(result)
    }

    fn delete_listed(&self, bucket: &str, object: &xml::Object) -> Outcome<()> {
        if object.version.is_some() {
            return Err(Fault::new(Code::NoSuchVersion, NO_VERSIONS));
        }
        if object.key.len() > OBJECT_MAX {
            return Err(Fault::new(Code::KeyTooLongError, format!("a key has 1 to {OBJECT_MAX} bytes")));
        }
        let conditions = object.etag.as_deref().map_or(Conditions::default(), Conditions::matching);
        Ok(self.store.delete_object(&key(bucket, object.key.as_bytes()), &|old| conditions.judge(old))?)
    }

    /// Answers a GET of an object's setting.
    pub(super) fn object_setting<'a>(&'a self, call: &Call) -> Answer<'a> {
        if self.store.object(&call.route.key())?.is_none() {
            return Err(self.missing(&call.route.bucket)?.into());
        }
        if call.route.operation == Operation::ObjectAcl {
            return Ok(xml(200, acl()));
        }
        let mut tags = Document::new("Tagging");
        tags.open("TagSet");
        document(tags)
    }

    /// The error for a missing object: there is no such key, or no such bucket.
    pub(super) fn missing(&self, bucket: &str) -> Result<Error> {
        Ok(if self.bucket_exists(bucket)? { Error::NOT_FOUND } else { NO_BUCKET })
    }
}

/// The response to an upload.
pub fn stored<'a>(record: &Record) -> Answer<'a> {
    let meta = Meta::decode(&record.meta)?;
    let mut response = Response { headers: vec![("ETag", format!("\"{}\"", etag(record, &meta)))], ..empty(200) };
    response.headers.extend(meta.checksum().map(|(algorithm, value)| (algorithm.header(), value.to_string())));
    Ok(response)
}

/// A body whose request was judged: the client gets 100 Continue before the first read, also for an empty body.
struct Accepted<'a, 'b>(&'a mut Body<'b>);

impl Read for Accepted<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.accept()?;
        self.0.read(buffer)
    }
}

/// A payload that the store reads while its checksum can be asked for.
struct Shared<'a, 'b>(&'a RefCell<Payload<'b>>);

impl Read for Shared<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.borrow_mut().read(buffer)
    }
}

/// Receives a value and lets `store` keep it; `store` can ask for the checksum once it has read the value.
pub fn receive<T>(
    call: &Call,
    body: &mut Body,
    store: impl FnOnce(Upload, &dyn Fn() -> Checksum) -> Result<T>,
) -> Outcome<T> {
    let length = body.length();
    if length == Some(0) && call.head.header("content-length").is_none() {
        return Err(Fault::new(Code::MissingContentLength, "send Content-Length"));
    }
    let content_md5 = content_md5(call)?;
    let mut accepted = Accepted(body);
    let payload = Payload::new(call.head, call.signed, length, &mut accepted)?;
    let length = payload.length();
    let payload = RefCell::new(payload);
    let mut reader = Shared(&payload);
    let upload = Upload { reader: &mut reader, length, content_md5 };
    let checksum = || payload.borrow().checksum().map(|(algorithm, value)| (algorithm, value.to_string()));
    store(upload, &checksum).map_err(|error| match error {
        Error::BadRequest(_) if payload.borrow().is_broken() => broken(&mut payload.borrow_mut()).into(),
        Error::BadRequest(_) if content_md5.is_some() && payload.borrow().has_ended() => bad_digest().into(),
        Error::BadRequest(text) => Fault::new(Code::IncompleteBody, text),
        error => error.into(),
    })
}

/// Why a payload could not be read to its end.
fn broken(payload: &mut Payload) -> Failure {
    let cut = || Failure::new(Code::IncompleteBody, "the body ended before its announced length, or came too slowly");
    payload.failure().unwrap_or_else(cut)
}

fn bad_digest() -> Failure {
    Failure::new(Code::BadDigest, "the body does not have the Content-MD5 that came with it")
}

fn content_md5(call: &Call) -> Outcome<Option<Hash>, Failure> {
    let Some(text) = call.head.header("content-md5") else { return Ok(None) };
    let hash = STANDARD.decode(text).ok().and_then(|hash| hash.try_into().ok());
    hash.map(Some).ok_or_else(|| Failure::new(Code::InvalidDigest, "Content-MD5 is no base64 of 16 bytes"))
}

impl S3 {
    /// Reads a body of XML. `is_checked`: the request's checksum is that of the body.
    pub(super) fn read_text(&self, call: &Call, body: &mut Body, is_checked: bool) -> Outcome<String> {
        let (length, md5) = (body.length(), content_md5(call)?);
        let mut accepted = Accepted(body);
        let open = if is_checked { Payload::new } else { Payload::without_checksum };
        let mut payload = open(call.head, call.signed, length, &mut accepted)?;
        if payload.length().is_some_and(|length| length > XML_MAX) {
            return Err(too_large());
        }
        let (mut bytes, mut piece, mut held) = (Vec::new(), vec![0; PIECE], Held { all: &self.xml, own: 0 });
        loop {
            let Ok(count) = payload.read(&mut piece) else { return Err(broken(&mut payload).into()) };
            if count == 0 {
                break;
            }
            held.take(count as u64)?;
            bytes.extend_from_slice(&piece[..count]);
        }
        if md5.is_some_and(|md5| Hash::from(Md5::digest(&bytes)) != md5) {
            return Err(bad_digest().into());
        }
        String::from_utf8(bytes).map_err(|_| Fault::new(Code::MalformedXML, "the body is not UTF-8"))
    }
}

/// The bytes of XML that a request holds in memory, until it is dropped.
struct Held<'a> {
    /// Those of all requests.
    all: &'a AtomicU64,
    own: u64,
}

impl Held<'_> {
    /// Fails if the request would hold too many, or all requests together and this one many of them.
    fn take(&mut self, count: u64) -> Outcome<()> {
        self.own += count;
        let all = self.all.fetch_add(count, Ordering::Relaxed) + count;
        if self.own > XML_MAX {
            return Err(too_large());
        }
        match all > XML_TOTAL && self.own > PIECE as u64 {
            true => Err(Fault::new(Code::SlowDown, "too much XML is being read at this time: try again")),
            false => Ok(()),
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(self.own, Ordering::Relaxed);
    }
}

fn too_large() -> Fault {
    Fault::new(Code::EntityTooLarge, format!("the XML has over {XML_MAX} bytes"))
}
