//! The S3 endpoint: bucket `b`, object `o` is the store's key `/b/o`.
//!
//! - `address.rs`: buckets and objects in paths; `route.rs`: method and address to operation
//! - `conditions.rs`: If-Match and the like; `meta.rs`: META and ETags
//! - `buckets.rs`, `lists.rs`, `objects.rs`, `get.rs`, `copy.rs`, `multipart.rs`: the operations
//! - `front.rs`: GET through the front or by redirect; `answer.rs`: results and errors as responses
//! - `head.rs`, `claim.rs`, `sigv4.rs`, `sigv2.rs`, `keys.rs`: who sent a request, and what its key allows
//! - `payload.rs`, `declared.rs`, `chunked.rs`, `checksum.rs`: bodies; `xml.rs`, `failure.rs`: XML and error codes
//!
//! A request is judged by its head alone - signature, key, operation, name, conditions - before the client is told to send
//! the body, before a lock and before a byte is read. The store carries the operation out; this room does not decide where
//! a value lies. It may use http, store and format. It does not use `api/`, and `api/` does not use it.

mod address;
mod answer;
mod buckets;
mod checksum;
mod chunked;
mod claim;
mod conditions;
mod copy;
mod declared;
#[cfg(test)]
mod examples;
mod failure;
mod front;
mod get;
pub mod head;
pub mod keys;
mod lists;
mod meta;
mod multipart;
mod objects;
pub mod payload;
mod route;
mod sigv2;
pub mod sigv4;
pub mod xml;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::http::{Body, Handler, Refusal, Request, Response};
use crate::logging;
use crate::store::Store;
use answer::{Answer, Fault, Outcome, refusal};
use failure::{Code, Failure};
use head::{Head, Query};
use keys::Keys;
use route::{Operation, Route, route};
use sigv4::Signed;

#[derive(Debug, Clone)]
pub struct Config {
    /// The file of keys. `None`: everybody may do everything.
    pub keys: Option<PathBuf>,
    /// Whether to redirect a GET to a volume where the client is known to follow.
    pub redirect: bool,
    /// Whether to let the front fetch blobs for the requests that come through it.
    pub accel: bool,
    /// How long the signature of a link to a volume is valid.
    pub linktime: Duration,
}

/// Counts a request: method, status, the store's error if there was one, and the time that it took.
pub type Observe = Box<dyn Fn(&str, u16, Option<&Error>, Duration) + Send + Sync>;

pub struct S3 {
    store: Arc<Store>,
    config: Config,
    /// `None`: there is no file of keys.
    keys: RwLock<Option<Arc<Keys>>>,
    observe: Observe,
    /// The number in the last request's id.
    requests: AtomicU64,
    /// Bytes of XML that are being read.
    xml: AtomicU64,
}

/// A request that its key allows.
struct Call<'a> {
    head: &'a Head<'a>,
    query: &'a Query,
    route: &'a Route,
    /// `None`: the endpoint is open.
    signed: Option<&'a Signed<'a>>,
    /// The request's id.
    id: &'a str,
    /// Whether the response can be chunked, which HTTP/1.0 does not know.
    can_chunk: bool,
}

impl Call<'_> {
    /// A header of S3's, which presigned URLs may have in the query.
    fn amz(&self, name: &str) -> Option<&str> {
        amz(self.head, self.query, name)
    }

    /// Whether the key may do this to a bucket.
    fn may(&self, writes: bool, bucket: &str) -> bool {
        self.signed.is_none_or(|signed| signed.key.may(writes, Some(bucket)))
    }
}

fn amz<'a>(head: &'a Head, query: &'a Query, name: &str) -> Option<&'a str> {
    let queried =
        || query.0.iter().find(|(given, _)| given.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str());
    head.header(name).or_else(queried)
}

impl Handler for S3 {
    fn handle<'a>(&'a self, request: &Request<'_>, body: &mut Body<'_>) -> Response<'a> {
        let (begun, id) = (Instant::now(), self.next_id());
        let answer = self.answer(request, body, &id);
        if answer.is_ok() {
            // Without 100 Continue, a client that waits for it would take the next response for one to this request.
            let _ = body.accept();
        }
        let path = request.target.split('?').next().unwrap_or_default();
        self.finish(request.method, path, id, answer, begun.elapsed())
    }

    fn refuse(&self, why: Refusal) -> Response<'_> {
        self.finish("-", "-", self.next_id(), Err(refusal(why).into()), Duration::ZERO)
    }
}

impl S3 {
    /// Fails if the file of keys cannot be read.
    pub fn new(store: Arc<Store>, config: Config, observe: Observe) -> Result<S3> {
        let keys = config.keys.as_ref().map(|path| read_keys(path)).transpose()?;
        let start = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
        Ok(S3 { store, config, keys: RwLock::new(keys), observe, requests: start.into(), xml: AtomicU64::new(0) })
    }

    /// Reads the file of keys again. If it cannot be read, the keys stay as they are.
    pub fn reload_keys(&self) {
        let Some(path) = &self.config.keys else { return };
        match read_keys(path) {
            Ok(keys) => *self.keys.write().unwrap_or_else(|e| e.into_inner()) = Some(keys),
            Err(error) => log::error!("the keys stay as they were: {error}"),
        }
    }

    fn answer<'a>(&'a self, request: &Request, body: &mut Body, id: &str) -> Answer<'a> {
        let headers: Vec<_> = request.headers().collect();
        let head = Head { method: request.method, target: origin(request.target), headers: &headers };
        let keys = self.keys.read().unwrap_or_else(|e| e.into_inner()).clone();
        let signed = match &keys {
            Some(keys) => Some(sigv4::authenticate(&head, keys, SystemTime::now())?.ok_or_else(unsigned)?),
            None => None,
        };
        let query = head::query(head.target)?;
        let copies = amz(&head, &query, "x-amz-copy-source").is_some();
        let route = route(head.method, head.path(), &query, copies)?;
        check_headers(&head, &query)?;
        let can_chunk = request.minor > 0;
        // Every operation with another method changes something, which keys with `ro` may not.
        let writes = !matches!(head.method, "GET" | "HEAD");
        let call = Call { head: &head, query: &query, route: &route, signed: signed.as_ref(), id, can_chunk };
        if !route.bucket.is_empty() && !call.may(writes, &route.bucket) {
            return Err(denied().into());
        }
        if writes {
            self.store.check_master()?;
        }
        self.run(&call, body)
    }

    fn run<'a>(&'a self, call: &Call, body: &mut Body) -> Answer<'a> {
        match call.route.operation {
            Operation::ListBuckets => self.list_buckets(call),
            Operation::CreateBucket => self.create_bucket(call, body),
            Operation::HeadBucket => self.head_bucket(call),
            Operation::DeleteBucket => self.delete_bucket(call),
            Operation::ListObjects => self.list_objects(call, false),
            Operation::ListObjectsV2 => self.list_objects(call, true),
            Operation::ListUploads => self.list_uploads(call),
            Operation::DeleteObjects => self.delete_objects(call, body),
            Operation::BucketAcl | Operation::Location | Operation::Versioning | Operation::Absent(_) => {
                self.bucket_setting(call)
            }
            Operation::Get | Operation::Head => self.get(call),
            Operation::Put => self.put(call, body),
            Operation::Copy => self.copy(call),
            Operation::Delete => self.delete(call),
            Operation::ObjectAcl | Operation::ObjectTagging => self.object_setting(call),
            Operation::CreateUpload => self.create_upload(call),
            Operation::UploadPart => self.upload_part(call, body),
            Operation::UploadPartCopy => self.upload_part_copy(call),
            Operation::Complete => self.complete(call, body),
            Operation::Abort => self.abort(call),
            Operation::ListParts => self.list_parts(call),
        }
    }

    /// The id of a new request: the microsecond of the start and one more for each request, so another start repeats none.
    fn next_id(&self) -> String {
        format!("{:016X}", self.requests.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Makes the response to a request that took this time, counts it and logs it. The query is not logged.
    fn finish<'a>(&self, method: &str, path: &str, id: String, answer: Answer<'a>, time: Duration) -> Response<'a> {
        let (mut response, fault) = match answer {
            Ok(response) => (response, None),
            Err(fault) => (fault.response(method, path, &id), Some(fault)),
        };
        let status = response.status;
        let error = match &fault {
            Some(Fault::Store(error)) => Some(error),
            _ => None,
        };
        (self.observe)(method, status, error, time);
        let is_error = status >= 500 && status != 501;
        let level = if is_error { log::Level::Error } else { log::Level::Info };
        let text = fault.filter(|_| is_error).map(|fault| format!("{fault} (request {id})"));
        logging::Request { method, path, status, time, id: &id, error: text.as_deref() }.log(level);
        response.headers.push(("x-amz-request-id", id));
        response
    }
}

fn read_keys(path: &std::path::Path) -> Result<Arc<Keys>> {
    let (keys, warning) = Keys::read(path).map_err(Error::Usage)?;
    if let Some(warning) = warning {
        log::warn!("{warning}");
    }
    Ok(Arc::new(keys))
}

/// The path and query of a target, which may be in absolute form.
fn origin(target: &str) -> &str {
    let Some(rest) = target.strip_prefix("http://") else { return target };
    rest.find('/').map_or("/", |at| &rest[at..])
}

fn unsigned() -> Failure {
    Failure::new(Code::AccessDenied, "the request is not signed")
}

fn denied() -> Failure {
    Failure::new(Code::AccessDenied, "this key may not do that")
}

/// A request with one of these headers is refused: its client relies on what the header asks for.
const NOT_IMPLEMENTED: [&str; 11] = [
    "x-amz-server-side-encryption",
    "x-amz-server-side-encryption-customer-algorithm",
    "x-amz-server-side-encryption-customer-key",
    "x-amz-copy-source-server-side-encryption-customer-algorithm",
    "x-amz-tagging",
    "x-amz-object-lock-mode",
    "x-amz-object-lock-retain-until-date",
    "x-amz-object-lock-legal-hold",
    "x-amz-website-redirect-location",
    "x-amz-write-offset-bytes",
    "x-amz-rename-source",
];

fn check_headers(head: &Head, query: &Query) -> Outcome<(), Failure> {
    let value = |name: &str| amz(head, query, name).filter(|value| !value.is_empty());
    if let Some(name) = NOT_IMPLEMENTED.into_iter().find(|name| value(name).is_some()) {
        return Err(Failure::new(Code::NotImplemented, format!("mkv has no {name}")));
    }
    match amz(head, query, "x-amz-bucket-object-lock-enabled") {
        Some(on) if !on.eq_ignore_ascii_case("false") => {
            Err(Failure::new(Code::NotImplemented, "mkv has no object lock"))
        }
        _ => Ok(()),
    }
}
