//! GET and HEAD. HEAD is answered from the index alone. A GET's bytes come by way of the front, by a redirect
//! (`front.rs`), or through the master. The headers are made from the record, never from the volume's response.

use std::io::{self, Read, Write};

use super::answer::{Answer, Fault, Outcome, empty, http_date};
use super::conditions::{Conditions, Verdict, seconds, unquoted};
use super::failure::{Code, Failure};
use super::head::digits;
use super::meta::{DEFAULT_TYPE, KEPT, Meta, etag, is_text};
use super::route::Operation;
use super::{Call, S3};
use crate::error::Result;
use crate::format::record::Record;
use crate::http::{Content, Response};
use crate::volumes::Opened;

/// Bytes of the buffer between a volume and a client.
const PIECE: usize = 64 << 10;

/// A live object.
pub struct Object {
    pub record: Record,
    pub meta: Meta,
    pub etag: String,
    /// Bytes.
    pub size: u64,
    /// When it was written, in seconds since 1970.
    pub time: u64,
}

/// The part of a value that a request asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Range {
    Whole,
    /// The first and the last byte.
    Part(u64, u64),
    /// No byte of the value is in it.
    Unsatisfiable,
}

impl Range {
    /// Parses a Range header (RFC 9110, section 14.2). If it is malformed or names several ranges, it is ignored.
    pub fn parse(text: &str, size: u64) -> Range {
        let Some((first, last)) = text.trim().strip_prefix("bytes=").and_then(|range| range.split_once('-')) else {
            return Range::Whole;
        };
        match (first.trim(), last.trim()) {
            ("", "") => Range::Whole,
            ("", count) => match digits(count) {
                None => Range::Whole,
                Some(0) => Range::Unsatisfiable,
                Some(_) if size == 0 => Range::Unsatisfiable,
                Some(count) => Range::Part(size.saturating_sub(count), size - 1),
            },
            (first, last) => match (digits(first), digits(last)) {
                (Some(first), None) if last.is_empty() => Range::of(first, u64::MAX, size),
                (Some(first), Some(last)) if first <= last => Range::of(first, last, size),
                _ => Range::Whole,
            },
        }
    }

    fn of(first: u64, last: u64, size: u64) -> Range {
        if first < size { Range::Part(first, last.min(size - 1)) } else { Range::Unsatisfiable }
    }
}

impl S3 {
    /// The object of a key. `None`: there is none.
    pub(super) fn find(&self, key: &[u8]) -> Result<Option<Object>> {
        let Some(record) = self.store.object(key)? else { return Ok(None) };
        let meta = Meta::decode(&record.meta)?;
        let size = match record.size {
            Some(size) => size,
            // A record of a Go master.
            None => self.store.open_object(key, &record, None)?.length,
        };
        let (etag, time) = (etag(&record, &meta), record.time.unwrap_or_default());
        Ok(Some(Object { record, meta, etag, size, time }))
    }

    /// Calls `act` with an object. If that fails because the object was overwritten or deleted meanwhile, tries again.
    pub(super) fn read<T>(&self, bucket: &str, key: &[u8], mut act: impl FnMut(Object) -> Outcome<T>) -> Outcome<T> {
        loop {
            let Some(object) = self.find(key)? else { return Err(self.missing(bucket)?.into()) };
            let record = object.record.clone();
            match act(object) {
                Err(Fault::Store(error)) if self.store.object(key)?.as_ref() == Some(&record) => {
                    return Err(error.into());
                }
                Err(Fault::Store(_)) => {}
                result => return result,
            }
        }
    }

    pub(super) fn get<'a>(&'a self, call: &Call) -> Answer<'a> {
        let key = call.route.key();
        let conditions = Conditions::of(call.head);
        self.read(&call.route.bucket, &key, |object| {
            match conditions.verdict(&object.etag, object.time) {
                Verdict::Go => {}
                Verdict::Failed => return Err(Fault::new(Code::PreconditionFailed, "a condition does not hold")),
                Verdict::NotModified => return Ok(not_modified(&object)),
            }
            let range = wanted_range(call, &object);
            if range == Range::Unsatisfiable {
                return Ok(unsatisfiable(call, &object));
            }
            let headers = describe(call, &object, range)?;
            if call.route.operation == Operation::Head || object.size == 0 {
                return Ok(respond(headers, &object, range, |_| Ok(())));
            }
            if let Some(response) = self.send_to_volume(call, &key, &object, range, &headers)? {
                return Ok(response);
            }
            let part = if let Range::Part(first, last) = range { Some((first, last)) } else { None };
            let opened = self.store.open_object(&key, &object.record, part)?;
            Ok(respond(headers, &object, range, |out| send(opened, out)))
        })
    }
}

fn wanted_range(call: &Call, object: &Object) -> Range {
    let Some(range) = call.head.header("range") else { return Range::Whole };
    let same = |validator: &str| match seconds(validator) {
        Some(time) => time == object.time,
        None => unquoted(validator) == object.etag,
    };
    match call.head.header("if-range").is_none_or(same) {
        true => Range::parse(range, object.size),
        false => Range::Whole,
    }
}

/// The headers that describe an object, with names in lower case.
pub type Headers = Vec<(String, String)>;

fn describe(call: &Call, object: &Object, range: Range) -> Outcome<Headers, Failure> {
    let mut headers: Headers = Vec::new();
    let mut add = |name: &str, value: &str| headers.push((name.to_string(), value.to_string()));
    add("etag", &format!("\"{}\"", object.etag));
    add("last-modified", &http_date(object.time));
    for name in KEPT {
        let given = call.query.get(&format!("response-{name}"));
        if given.is_some_and(|value| !is_text(value)) {
            return Err(Failure::new(Code::InvalidArgument, format!("response-{name} has a control character")));
        }
        let default = (name == "content-type").then_some(DEFAULT_TYPE);
        if let Some(value) = given.or(object.meta.get(name)).or(default) {
            add(name, value);
        }
    }
    object.meta.user().for_each(|(name, value)| add(name, value));
    let mode = call.amz("x-amz-checksum-mode").is_some_and(|mode| mode.eq_ignore_ascii_case("enabled"));
    // Clients compare a checksum with the bytes that they read.
    if let Some((algorithm, value)) = object.meta.checksum().filter(|_| mode && range == Range::Whole) {
        add(algorithm.header(), value);
    }
    Ok(headers)
}

/// The response with these headers; `write` writes the bytes of the range.
fn respond<'a>(
    extra: Headers,
    object: &Object,
    range: Range,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()> + 'a,
) -> Response<'a> {
    let mut headers = vec![("Accept-Ranges", "bytes".to_string())];
    let (status, length) = match range {
        Range::Part(first, last) => {
            headers.push(("Content-Range", format!("bytes {first}-{last}/{}", object.size)));
            (206, last - first + 1)
        }
        _ => (200, object.size),
    };
    Response { status, headers, extra, content: Content::Stream { length, write: Box::new(write) } }
}

fn not_modified<'a>(object: &Object) -> Response<'a> {
    let headers = vec![("ETag", format!("\"{}\"", object.etag)), ("Last-Modified", http_date(object.time))];
    Response { headers, ..empty(304) }
}

fn unsatisfiable<'a>(call: &Call, object: &Object) -> Response<'a> {
    let failure = Fault::new(Code::InvalidRange, format!("the object has {} bytes", object.size));
    let mut response = failure.response(call.head.method, call.head.path(), call.id);
    response.headers.push(("Content-Range", format!("bytes */{}", object.size)));
    response
}

/// Copies the bytes of a volume's response to the client.
fn send(mut opened: Opened, out: &mut dyn Write) -> io::Result<()> {
    let (mut left, mut piece) = (opened.length, vec![0; PIECE.min(opened.length as usize)]);
    while left > 0 {
        let most = piece.len().min(left as usize);
        let count = opened.body.read(&mut piece[..most])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        out.write_all(&piece[..count])?;
        left -= count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_range_of_bytes_is_a_part_of_the_value() {
        for (text, range) in [
            ("bytes=0-0", Range::Part(0, 0)),
            ("bytes=2-", Range::Part(2, 9)),
            ("bytes=2-99999999999999999", Range::Part(2, 9)),
            ("bytes=-3", Range::Part(7, 9)),
            ("bytes=-30", Range::Part(0, 9)),
            ("bytes=9-9", Range::Part(9, 9)),
            ("bytes=10-", Range::Unsatisfiable),
            ("bytes=10-12", Range::Unsatisfiable),
            ("bytes=-0", Range::Unsatisfiable),
            ("bytes=3-2", Range::Whole),
            ("bytes=-", Range::Whole),
            ("bytes=0-1,3-4", Range::Whole),
            ("bytes=+1-2", Range::Whole),
            ("bytes=a-2", Range::Whole),
            ("bytes=99999999999999999999-", Range::Whole),
            ("rows=1-2", Range::Whole),
            ("", Range::Whole),
        ] {
            assert_eq!(Range::parse(text, 10), range, "{text}");
        }
        for text in ["bytes=0-", "bytes=-1", "bytes=0-0"] {
            assert_eq!(Range::parse(text, 0), Range::Unsatisfiable, "{text}");
        }
    }
}
