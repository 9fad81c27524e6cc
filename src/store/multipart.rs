//! Multipart uploads.
//!
//! Each part is a blob of the final key under a version of its own, on two volumes. Its debris entry names it, so the
//! cleaner deletes it whatever happens, but not before the upload has expired. An upload of one part ends without a copy:
//! the missing replicas are made, then the part's blob becomes the value. Several parts are read one after the other
//! into one new blob on all replicas. Until the flip the parts stay, so an upload that was interrupted while it ended can
//! be ended again; a Complete that finds at its flip that another one was faster changes nothing.

use std::io::{self, Read};
use std::time::Duration;

use super::{Store, now};
use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::quoted;
use crate::format::record::Record;
use crate::index::{Judge, MultipartUpload, Part};
use crate::volumes::upload::{PutOptions, Upload};

/// How many volumes hold a part.
const REPLICAS: usize = 2;

/// How long the blobs of parts outlive their upload, in seconds, so that a purge that is late finds them.
const SLACK: u64 = 24 * 3600;

impl Store {
    /// Begins an upload. `meta`: what will be kept beside the value.
    pub fn create_upload(&self, key: &[u8], meta: String) -> Result<MultipartUpload> {
        // A signed number, for databases.
        let upload = MultipartUpload { id: fastrand::u64(1..1 << 63), key: key.to_vec(), time: now(), meta };
        self.index.create_upload(&upload)?;
        Ok(upload)
    }

    /// The upload of this key with this id.
    pub fn find_upload(&self, key: &[u8], id: u64) -> Result<Option<MultipartUpload>> {
        Ok(self.index.find_upload(id)?.filter(|upload| upload.key == key))
    }

    /// The uploads under way of keys that begin with `prefix`, by key and id, without what is kept beside their values.
    pub fn uploads(&self, prefix: &[u8]) -> Result<Vec<MultipartUpload>> {
        let mut uploads = Vec::new();
        self.index.uploads(|upload| {
            if upload.key.starts_with(prefix) {
                uploads.push(MultipartUpload { meta: String::new(), ..upload });
            }
            Ok(())
        })?;
        uploads.sort_by(|a, b| (&a.key, a.id).cmp(&(&b.key, b.id)));
        Ok(uploads)
    }

    /// The parts of an upload, by number.
    pub fn parts(&self, upload: &MultipartUpload) -> Result<Vec<Part>> {
        self.index.parts(upload.id)
    }

    /// Stores a part, which replaces an earlier one of the same number. `meta`: what is kept beside it. Fails with
    /// `NoSuchUpload` if the upload has ended meanwhile.
    pub fn put_part(
        &self,
        upload: &MultipartUpload,
        number: u16,
        data: Upload,
        meta: impl FnOnce() -> String,
    ) -> Result<Part> {
        let mut replicas = self.place(&upload.key);
        replicas.truncate(REPLICAS);
        let (draft, mut record) = self.write_draft(&upload.key, &replicas, data)?;
        record.meta = meta();
        let (part, until) = (Part { number, record }, upload.time + self.config.uploads.as_secs() + SLACK);
        let kept = self.index.keep_part(draft, upload.id, &part, until.max(now() + SLACK));
        if kept.is_err() {
            self.wake_cleaner();
        }
        kept.map(|()| part)
    }

    /// Makes these parts, in this order, the value of the upload's key, and ends the upload. `judge` can refuse to replace
    /// what is there. It takes as long as it takes to copy several parts.
    pub fn complete_upload(
        &self,
        upload: &MultipartUpload,
        parts: &[Part],
        meta: String,
        judge: Judge,
    ) -> Result<Record> {
        judge(self.index.get(&upload.key)?.as_ref())?;
        let record = match parts {
            [part] => self.complete_one(upload, part, meta, judge)?,
            parts => {
                let length = parts.iter().map(|part| part.record.size.unwrap_or_default()).sum();
                let mut reader = Joined { store: self, key: &upload.key, parts: parts.iter(), open: None };
                let joined = Upload { reader: &mut reader, length: Some(length), content_md5: None };
                self.write_object(&upload.key, joined, || meta, Some(upload.id), judge)?
            }
        };
        // The value is there: what is left of the upload is purged with the others, should this fail.
        if let Err(error) = self.index.end_upload(upload) {
            log::warn!("the upload of {} is complete, but its parts stay for now: {error}", quoted(&upload.key));
        }
        self.wake_cleaner();
        Ok(record)
    }

    /// Makes the blob of a part the value.
    fn complete_one(&self, upload: &MultipartUpload, part: &Part, meta: String, judge: Judge) -> Result<Record> {
        let (key, old, replicas) = (&upload.key, &part.record, self.place(&upload.key));
        let copies: Vec<String> = replicas.iter().filter(|replica| !old.replicas.contains(replica)).cloned().collect();
        let mut draft = self.index.claim_part(upload, part, &copies)?;
        if !copies.is_empty() {
            let mut opened = self.open_object(key, old, None)?;
            let data = Upload { reader: &mut opened.body, length: old.size, content_md5: old.hash };
            let options = PutOptions { time: old.time.unwrap_or_else(now), md5sum: false, empty: true };
            if let Err(failed) = self.volumes.put(&copies, &path(key, old.version), data, options, self.own_auth()) {
                // The draft ends here and the part stays, so that the upload can be completed later.
                self.index.doubt_draft(&mut draft, now() + super::write::LOST_ANSWER)?;
                return Err(match failed.error {
                    Error::BadRequest(why) => Error::Unavailable(format!("a part could not be read: {why}")),
                    error => error,
                });
            }
        }
        self.flip_draft(draft, Record { meta, replicas, ..old.clone() }, Some(upload.id), judge)
    }

    /// Ends an upload and deletes its parts.
    pub fn abort_upload(&self, upload: &MultipartUpload) -> Result<()> {
        self.index.end_upload(upload)?;
        self.wake_cleaner();
        Ok(())
    }

    /// Aborts the uploads that have expired, every `interval`, for ever.
    pub fn purge_uploads(&self, interval: Duration) {
        loop {
            if self.index.leads()
                && let Err(error) = self.purge_once()
            {
                log::error!("multipart uploads: {error}");
            }
            std::thread::sleep(interval);
        }
    }

    fn purge_once(&self) -> Result<()> {
        let oldest = now().saturating_sub(self.config.uploads.as_secs());
        self.index.uploads(|upload| {
            if upload.time >= oldest {
                return Ok(());
            }
            log::info!("the upload of {} has expired", quoted(&upload.key));
            self.abort_upload(&upload)
        })
    }
}

/// The bytes of parts, one after the other. A replica that ends early ends the whole with an error.
struct Joined<'a> {
    store: &'a Store,
    key: &'a [u8],
    parts: std::slice::Iter<'a, Part>,
    open: Option<Box<dyn Read + Send>>,
}

impl Read for Joined<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(open) = &mut self.open {
                match open.read(buffer)? {
                    0 => self.open = None,
                    count => return Ok(count),
                }
            }
            let Some(part) = self.parts.next() else { return Ok(0) };
            let opened = self.store.open_object(self.key, &part.record, None);
            self.open = Some(opened.map_err(|e| io::Error::other(e.to_string()))?.body);
        }
    }
}
