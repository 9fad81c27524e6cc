//! Results and errors as responses: the one place that turns an error of the store into a code of S3.

use std::fmt::{self, Display};
use std::io::{self, Write};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};

use super::Call;
use super::failure::{Code, Failure};
use super::xml::{DECLARATION, Document};
use crate::error::Error;
use crate::http::{Content, Refusal, Response};

pub type Outcome<T, E = Fault> = Result<T, E>;

pub type Answer<'a> = Outcome<Response<'a>>;

/// The error of a request whose bucket does not exist.
pub const NO_BUCKET: Error = Error::NotFound("no such bucket");

/// Send a client that waits for a long operation a space this often: SDKs give up after a minute of silence.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// An operation that copies this many bytes or more is long.
pub const LONG: u64 = 32 << 20;

/// Why a request failed.
#[derive(Debug)]
pub enum Fault {
    /// The request is at fault, as S3 sees it.
    Failure(Failure),
    /// The store could not carry it out.
    Store(Error),
}

impl From<Failure> for Fault {
    fn from(failure: Failure) -> Fault {
        Fault::Failure(failure)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        Fault::Store(error)
    }
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Fault::Failure(failure) => failure.fmt(f),
            Fault::Store(error) => error.fmt(f),
        }
    }
}

impl Fault {
    pub fn new(code: Code, message: impl Into<String>) -> Fault {
        Fault::Failure(Failure::new(code, message))
    }

    pub fn failure(&self) -> Failure {
        let error = match self {
            Fault::Failure(failure) => return failure.clone(),
            Fault::Store(error) => error,
        };
        Failure::new(code(error), error.to_string())
    }

    /// HEAD and 304 have no body.
    pub fn response<'a>(&self, method: &str, path: &str, id: &str) -> Response<'a> {
        let failure = self.failure();
        match method {
            "HEAD" => empty(failure.status()),
            _ => xml(failure.status(), failure.body(path, id)),
        }
    }
}

/// SDKs repeat a request after 500 and 503, and never after 409.
fn code(error: &Error) -> Code {
    match error {
        Error::Usage(_) | Error::BadRequest(_) | Error::TooMany => Code::InvalidRequest,
        Error::Unauthorized | Error::Forbidden(_) => Code::AccessDenied,
        _ if *error == NO_BUCKET => Code::NoSuchBucket,
        Error::NotFound(_) => Code::NoSuchKey,
        Error::NoSuchUpload => Code::NoSuchUpload,
        Error::Method => Code::MethodNotAllowed,
        Error::NoValue => Code::MissingContentLength,
        Error::Precondition => Code::PreconditionFailed,
        Error::KeyTooLong(_) => Code::KeyTooLongError,
        Error::Locked => Code::SlowDown,
        Error::Unreachable { .. } | Error::Unavailable(_) => Code::ServiceUnavailable,
        Error::Gone | Error::Refused { .. } | Error::Index(_) | Error::Failed(_) => Code::InternalError,
    }
}

/// The error of a copy: a body that ends early came from a volume, so it is no error of the request.
pub fn unread(error: Error) -> Error {
    match error {
        Error::BadRequest(text) => Error::Unavailable(format!("the source could not be read: {text}")),
        error => error,
    }
}

/// The failure of a request that the server refuses by itself.
pub fn refusal(refusal: Refusal) -> Failure {
    match refusal {
        Refusal::Malformed(why) => Failure::new(Code::InvalidRequest, why),
        Refusal::HeadTimeout => Failure::new(Code::RequestTimeout, "the head of the request was not complete in time"),
        Refusal::HeadTooLarge => {
            Failure::new(Code::InvalidRequest, "the head of the request is over 64 KiB or 100 fields")
        }
        Refusal::TooManyConnections => Failure::new(Code::SlowDown, "too many connections: try again later"),
        Refusal::Stopping => Failure::new(Code::ServiceUnavailable, "the master is stopping: try again later"),
        Refusal::Version => Failure::new(Code::InvalidRequest, "use version 1.1 of HTTP"),
    }
}

/// A response without a body.
pub fn empty<'a>(status: u16) -> Response<'a> {
    Response { status, headers: Vec::new(), extra: Vec::new(), content: Content::Empty }
}

pub fn xml<'a>(status: u16, text: String) -> Response<'a> {
    let headers = vec![("Content-Type", "application/xml".to_string())];
    Response { headers, content: Content::Text(text), ..empty(status) }
}

pub fn document<'a>(document: Document) -> Answer<'a> {
    Ok(xml(200, document.finish()))
}

/// Answers with the XML that `work` makes. If it is long, the response begins at once and spaces keep the client waiting;
/// an error then comes as XML after a 200, as AWS sends it.
pub fn kept_alive<'a>(
    call: &Call,
    is_long: bool,
    work: impl FnOnce() -> Result<String, Fault> + Send + 'a,
) -> Answer<'a> {
    if !is_long || !call.can_chunk {
        return Ok(xml(200, work()?));
    }
    let (path, id) = (call.head.path().to_string(), call.id.to_string());
    let write = move |out: &mut dyn Write| {
        let text = wait(out, KEEP_ALIVE, work)?.unwrap_or_else(|fault| {
            log::error!("{path}: {} (request {id})", fault.failure());
            fault.failure().body(&path, &id)
        });
        out.write_all(text.strip_prefix(DECLARATION).unwrap_or(&text).as_bytes())
    };
    Ok(Response { content: Content::Chunked(Box::new(write)), ..xml(200, String::new()) })
}

/// Runs `work` on a thread of its own and writes spaces meanwhile. The work goes on if the client goes away.
fn wait<T: Send>(out: &mut dyn Write, every: Duration, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let (done, outcome) = bounded(1);
    std::thread::scope(|scope| {
        let run = move || {
            let _ = done.send(work());
        };
        std::thread::Builder::new().name("mkv-s3".into()).spawn_scoped(scope, run)?;
        out.write_all(DECLARATION.as_bytes())?;
        loop {
            out.flush()?;
            match outcome.recv_timeout(every) {
                Ok(result) => return Ok(result),
                Err(RecvTimeoutError::Timeout) => out.write_all(b" ")?,
                Err(RecvTimeoutError::Disconnected) => return Err(io::Error::other("the work has panicked")),
            }
        }
    })
}

/// A time as XML has it: `2026-11-28T19:00:00.000Z`.
pub fn iso(seconds: u64) -> String {
    crate::format::time::readable(seconds).replace(' ', "T") + ".000Z"
}

/// A time as headers have it (RFC 9110, section 5.6.7).
pub fn http_date(seconds: u64) -> String {
    // httpdate panics above the year 9999.
    let seconds = seconds.min(253_402_300_799);
    httpdate::fmt_http_date(std::time::UNIX_EPOCH + Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_instant_is_shown_in_xml_and_in_headers() {
        assert_eq!(iso(1_700_000_000), "2023-11-14T22:13:20.000Z");
        assert_eq!(http_date(1_700_000_000), "Tue, 14 Nov 2023 22:13:20 GMT");
        assert_eq!(&http_date(u64::MAX)[..16], "Fri, 31 Dec 9999");
    }

    #[test]
    fn errors_that_pass_have_codes_that_sdks_repeat() {
        for (error, code, status) in [
            (Error::Locked, "SlowDown", 503),
            (Error::Unavailable("x".into()), "ServiceUnavailable", 503),
            (Error::Gone, "InternalError", 500),
            (Error::Forbidden("x"), "AccessDenied", 403),
            (NO_BUCKET, "NoSuchBucket", 404),
            (Error::NOT_FOUND, "NoSuchKey", 404),
            (Error::Precondition, "PreconditionFailed", 412),
        ] {
            let failure = Fault::Store(error).failure();
            assert_eq!((failure.code.name(), failure.status()), (code, status));
        }
    }

    #[test]
    fn a_client_that_waits_for_a_long_operation_gets_spaces() {
        let (mut out, millisecond) = (Vec::new(), Duration::from_millis(1));
        let work = || {
            std::thread::sleep(50 * millisecond);
            7
        };
        assert_eq!(wait(&mut out, millisecond, work).unwrap(), 7);
        let text = String::from_utf8(out).unwrap();
        let spaces = text.strip_prefix(DECLARATION).unwrap();
        assert!(spaces.len() > 3 && spaces.trim_start().is_empty(), "{text:?}");
    }
}
