//! CopyObject and UploadPartCopy: the master streams the source from a volume into the new value.

use super::address::{copy_source, key};
use super::answer::{Answer, Fault, LONG, Outcome, iso, kept_alive, unread, xml};
use super::conditions::{Conditions, Verdict};
use super::failure::{Code, Failure};
use super::get::Object;
use super::head::digits;
use super::meta::{Meta, etag};
use super::xml::Document;
use super::{Call, S3, denied};
use crate::error::Error;
use crate::format::record::{Hash, Record};
use crate::volumes::Opened;
use crate::volumes::upload::Upload;

/// The object that a request names as its source.
struct Source {
    bucket: String,
    key: Vec<u8>,
    conditions: Conditions,
}

impl Source {
    fn of(call: &Call) -> Outcome<Source> {
        let (bucket, object) = copy_source(call.amz("x-amz-copy-source").unwrap_or_default())?;
        if !call.may(false, &bucket) {
            return Err(denied().into());
        }
        let key = key(&bucket, &object);
        Ok(Source { bucket, key, conditions: Conditions::of_source(call.head) })
    }

    fn judge(&self, etag: &str, time: u64) -> Outcome<(), Error> {
        if self.conditions.verdict(etag, time) == Verdict::Go { Ok(()) } else { Err(Error::Precondition) }
    }
}

impl S3 {
    pub(super) fn copy<'a>(&'a self, call: &Call) -> Answer<'a> {
        let (source, conditions) = (Source::of(call)?, Conditions::of(call.head));
        self.check_bucket(call)?;
        let given = match call.amz("x-amz-metadata-directive").map(str::to_ascii_lowercase).as_deref() {
            None | Some("copy") => None,
            Some("replace") => Some(Meta::of_request(call.head, call.query)?),
            Some(_) => return Err(Fault::new(Code::InvalidArgument, "x-amz-metadata-directive is COPY or REPLACE")),
        };
        let key = call.route.key();
        if key == source.key {
            let Some(given) = given else {
                let text = "a copy of an object onto itself has to change its metadata: send REPLACE";
                return Err(Fault::new(Code::InvalidRequest, text));
            };
            return self.replace_meta(&source, &conditions, given);
        }
        if conditions.is_any() {
            conditions.judge(self.store.object(&key)?.as_ref())?;
        }
        let (object, opened) = self.open_source(&source, |_| Ok(None))?;
        let mut meta = given.unwrap_or_else(|| object.meta.of_client());
        // One of a multipart upload, with a -N, is no checksum of the bytes.
        meta.set_checksum(object.meta.checksum().filter(|(_, value)| !value.contains('-')));
        let (bucket, hash) = (call.route.bucket.clone(), object.record.hash);
        let work = move || {
            let judge = move |old: Option<&Record>| self.judge(&bucket, &conditions, old);
            let record =
                transfer(opened, hash, |upload| self.store.put_object(&key, upload, || meta.encode(), &judge))?;
            copied("CopyObjectResult", &record)
        };
        kept_alive(call, object.size >= LONG, work)
    }

    /// Changes the headers and metadata of an object; its value stays where it is.
    fn replace_meta<'a>(&'a self, source: &Source, conditions: &Conditions, given: Meta) -> Answer<'a> {
        let changed = self.store.update_object(&source.key, |record| {
            let old = Meta::decode(&record.meta)?;
            source.judge(&etag(&record, &old), record.time.unwrap_or_default())?;
            conditions.judge(Some(&record))?;
            let mut meta = given.clone();
            meta.extend(old.of_value());
            Ok(Record { meta: meta.encode(), ..record })
        });
        if matches!(changed, Err(Error::NotFound(_))) {
            return Err(self.missing(&source.bucket)?.into());
        }
        changed?;
        let record = self.store.object(&source.key)?.ok_or(Error::NOT_FOUND)?;
        Ok(xml(200, copied("CopyObjectResult", &record)?))
    }

    pub(super) fn upload_part_copy<'a>(&'a self, call: &Call) -> Answer<'a> {
        let (source, number) = (Source::of(call)?, call.part_number()?);
        let upload = self.upload(call)?;
        let text = call.amz("x-amz-copy-source-range").map(String::from);
        let (object, opened) = self.open_source(&source, |object| match &text {
            Some(text) => source_range(text, object.size).map(Some),
            None => Ok(None),
        })?;
        let (size, hash) = (opened.length, object.record.hash.filter(|_| text.is_none()));
        let work = move || {
            let part = transfer(opened, hash, |data| self.store.put_part(&upload, number, data, String::new))?;
            copied("CopyPartResult", &part.record)
        };
        kept_alive(call, size >= LONG, work)
    }

    /// The source and its bytes, or those of a range.
    fn open_source(
        &self,
        source: &Source,
        range: impl Fn(&Object) -> Outcome<Option<(u64, u64)>, Failure>,
    ) -> Outcome<(Object, Opened)> {
        self.read(&source.bucket, &source.key, |object| {
            source
                .judge(&object.etag, object.time)
                .map_err(|_| Fault::new(Code::PreconditionFailed, "a condition of the source does not hold"))?;
            let range = range(&object)?;
            let opened = self.store.open_object(&source.key, &object.record, range)?;
            Ok((object, opened))
        })
    }
}

/// Lets `store` keep the bytes of a source, which have this md5 if it is known.
fn transfer<T>(
    opened: Opened,
    content_md5: Option<Hash>,
    store: impl FnOnce(Upload) -> crate::error::Result<T>,
) -> Outcome<T> {
    let Opened { length, mut body, .. } = opened;
    store(Upload { reader: &mut body, length: Some(length), content_md5 }).map_err(|error| unread(error).into())
}

fn copied(root: &'static str, record: &Record) -> Outcome<String> {
    let (mut result, etag) = (Document::new(root), etag(record, &Meta::decode(&record.meta)?));
    result.element("LastModified", iso(record.time.unwrap_or_default())).element("ETag", format!("\"{etag}\""));
    Ok(result.finish())
}

/// Parses `bytes=FIRST-LAST`, which has to be inside the source.
fn source_range(text: &str, size: u64) -> Outcome<(u64, u64), Failure> {
    let range = text.strip_prefix("bytes=").and_then(|range| range.split_once('-'));
    match range.and_then(|(first, last)| Some((digits(first)?, digits(last)?))) {
        Some((first, last)) if first <= last && last < size => Ok((first, last)),
        Some((first, last)) if first <= last => {
            Err(Failure::new(Code::InvalidRange, format!("the source has {size} bytes")))
        }
        _ => Err(Failure::new(Code::InvalidArgument, "x-amz-copy-source-range is bytes=FIRST-LAST")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_lies_inside_the_source() {
        let code = |text, size| source_range(text, size).map_err(|failure| failure.code);
        assert_eq!(code("bytes=0-4", 5), Ok((0, 4)));
        assert_eq!(code("bytes=0-5", 5), Err(Code::InvalidRange));
        assert_eq!(code("bytes=0-0", 0), Err(Code::InvalidRange));
        for text in ["bytes=2-1", "bytes=2-", "bytes=-2", "2-3", "bytes=+1-2", "bytes=0-1,2-3", ""] {
            assert_eq!(code(text, 5), Err(Code::InvalidArgument), "{text}");
        }
    }
}
