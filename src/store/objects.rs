//! Objects: reading and writing for S3, where writers of a key pass each other.
//!
//! A PUT holds the key's lock to choose its version and again to flip, not while the value comes. The steps and their
//! crashes are those of `write.rs`; only the lock is shorter. Conditions are judged at the flip. A key, its record and
//! lists come from the index alone.

use super::write::{CONFLICT, LOST_ANSWER, PROTECTED, Watched, taken_for_dead};
use super::{Store, now};
use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::record::{Record, State};
use crate::format::{is_own, quoted};
use crate::index::{Draft, Judge, record_of};
use crate::volumes::Opened;
use crate::volumes::upload::{PutFailed, PutOptions, Stored, Upload};

/// Give up on a value after this many flips that another writer overtook.
const FLIPS: usize = 5;

/// Where a scan continues.
#[derive(Debug, PartialEq)]
pub enum Step {
    Next,
    /// At this key, or at the first one behind it. It has to be behind the key that was shown.
    SkipTo(Vec<u8>),
    Stop,
}

impl Store {
    /// The record of a live key.
    pub fn object(&self, key: &[u8]) -> Result<Option<Record>> {
        Ok(self.index.get(key)?.filter(Record::live))
    }

    /// Stores a value. `meta` makes what is kept beside it and is called once the value was received. `judge` can refuse
    /// to replace what is there. Fails with `BadRequest` if the value is not as long as the client said, or has another
    /// digest, and with `Locked` if a native request writes the key.
    pub fn put_object(
        &self,
        key: &[u8],
        upload: Upload,
        meta: impl FnOnce() -> String,
        judge: Judge,
    ) -> Result<Record> {
        self.write_object(key, upload, meta, None, judge)
    }

    /// The same. `completes`: the multipart upload that has to be there at the flip.
    pub(super) fn write_object(
        &self,
        key: &[u8],
        upload: Upload,
        meta: impl FnOnce() -> String,
        completes: Option<u64>,
        judge: Judge,
    ) -> Result<Record> {
        let judge = |old: Option<&Record>| {
            if self.config.protect && old.is_some_and(Record::live) { Err(PROTECTED) } else { judge(old) }
        };
        // Refuse before the value is sent.
        judge(self.index.get(key)?.as_ref())?;
        let replicas = self.place(key);
        let (draft, mut record) = self.write_draft(key, &replicas, upload)?;
        record.meta = meta();
        self.flip_draft(draft, record, completes, &judge)
    }

    /// Sends a value to these replicas as a draft. Returns the draft, and its record without metadata.
    pub(super) fn write_draft(&self, key: &[u8], replicas: &[String], upload: Upload) -> Result<(Draft<'_>, Record)> {
        self.volumes.check_silent(replicas, self.own_auth())?;
        let draft = self.index.draft(key, replicas)?;
        let (version, options) = (draft.entry.version, PutOptions { time: now(), md5sum: true, empty: true });
        let mut reader = Watched { reader: upload.reader, is_lost: || draft.is_lost() };
        let upload = Upload { reader: &mut reader, ..upload };
        match self.volumes.put(replicas, &path(key, version), upload, options, self.own_auth()) {
            Ok(Stored { size, hash }) => {
                let (time, replicas) = (Some(options.time), replicas.to_vec());
                let record = Record { hash, size: Some(size), time, version, replicas, ..Record::default() };
                Ok((draft, record))
            }
            Err(failed) => Err(self.abandon_draft(draft, failed)),
        }
    }

    /// Makes a draft the value, and returns its record. The last flip wins: where a record of a higher version is there
    /// meanwhile, the value is copied under a version above it. The cleaner deletes what is replaced or refused.
    pub(super) fn flip_draft<'a>(
        &'a self,
        draft: Draft<'a>,
        record: Record,
        completes: Option<u64>,
        judge: Judge,
    ) -> Result<Record> {
        let flipped = self.flip_last(draft, record, completes, judge);
        self.wake_cleaner();
        flipped
    }

    fn flip_last<'a>(
        &'a self,
        mut draft: Draft<'a>,
        mut record: Record,
        completes: Option<u64>,
        judge: Judge,
    ) -> Result<Record> {
        let key = draft.entry.key.clone();
        for _ in 0..FLIPS {
            // The draft that was overtaken keeps its blobs until they are copied.
            let Some(overtaken) = self.index.flip_draft(draft, &record, completes, judge)? else { return Ok(record) };
            let mut opened = self.open_object(&key, &record, None)?;
            let upload = Upload { reader: &mut opened.body, length: record.size, content_md5: record.hash };
            let (copy, copied) = self.write_draft(&key, &self.place(&key), upload)?;
            drop(overtaken);
            draft = copy;
            record = Record { meta: record.meta, ..copied };
        }
        Err(Error::Locked)
    }

    /// Ends a draft that failed: deletes the blobs that it may have left. Returns the error for the client.
    pub(super) fn abandon_draft(&self, mut draft: Draft, failed: PutFailed) -> Error {
        let conflict = draft.entry.version == 0 && matches!(failed.error, Error::Refused { status: 409, .. });
        let doubt = match (failed.maybe_stored.is_empty(), conflict) {
            (false, _) => Some(LOST_ANSWER),
            (true, true) => Some(CONFLICT),
            (true, false) => None,
        };
        let error = if draft.is_lost() { taken_for_dead() } else { failed.error };
        let doubted = doubt.map_or(Ok(()), |seconds| self.index.doubt_draft(&mut draft, now() + seconds));
        let mut left = None;
        let ended = doubted.and_then(|()| {
            self.index.abandon_draft(draft, |entry| {
                let deleted = self.delete_blobs(entry, entry.debris.replicas.clone(), false, self.own_auth());
                left = deleted.failed.clone();
                deleted
            })
        });
        if let Some(left) = left {
            log::warn!("blobs of an upload stay for now: {left}");
            self.wake_cleaner();
        }
        ended.err().unwrap_or(error)
    }

    /// Deletes a key, or does nothing if there is none. The cleaner deletes the blobs: to a client the key is gone.
    pub fn delete_object(&self, key: &[u8], judge: Judge) -> Result<()> {
        let check = |record: &Record| {
            if self.config.protect && record.live() { Err(PROTECTED) } else { judge(Some(record)) }
        };
        match self.index.remove(key, true, check) {
            Err(Error::NotFound(_)) => judge(None),
            Err(error) => Err(error),
            Ok(_) => {
                self.wake_cleaner();
                Ok(())
            }
        }
    }

    /// Changes what is kept beside a value; no blob moves. Fails with `NotFound`.
    pub fn update_object(&self, key: &[u8], change: impl Fn(Record) -> Result<Record>) -> Result<()> {
        self.index.update(key, true, |record| {
            let record = record.filter(Record::live).ok_or(Error::NOT_FOUND)?;
            if self.config.protect { Err(PROTECTED) } else { change(record) }
        })
    }

    /// Opens a value, or the range from its first to its last byte, inclusive. Replicas are tried in random order until
    /// one has the value in its full length. Fails with `Gone` if none has it: the key may have been replaced since its
    /// record was read.
    pub fn open_object(&self, key: &[u8], record: &Record, range: Option<(u64, u64)>) -> Result<Opened> {
        let (blob, mut failed) = (path(key, record.version), Error::Gone);
        let length = range.map_or(record.size, |(first, last)| Some(last - first + 1));
        for replica in self.volumes.shuffled(&record.replicas) {
            match self.volumes.read_range(&replica, &blob, range, self.own_auth()) {
                Ok(Some(opened)) if length.is_none_or(|length| length == opened.length) => return Ok(opened),
                Ok(found) => {
                    let found = found.map_or("has no blob".into(), |opened| format!("has {} bytes", opened.length));
                    log::warn!("{}: {replica} {found}", quoted(key));
                }
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    /// Calls `f` with the live keys that begin with `prefix` and are not below `start`, in order, and their records, as
    /// long as it wants. The master's own keys are left out.
    pub fn scan(&self, prefix: &[u8], start: &[u8], mut f: impl FnMut(&[u8], Record) -> Result<Step>) -> Result<()> {
        let (view, mut next) = (self.index.view(), Some(start.to_vec()));
        while let Some(start) = next.take() {
            view.records(prefix, &start, |key, text| {
                if State::of(text) != State::Live || is_own(key) {
                    return Ok(true);
                }
                match f(key, record_of(key, text)?)? {
                    Step::Next => return Ok(true),
                    Step::SkipTo(key) => next = Some(key),
                    Step::Stop => {}
                }
                Ok(false)
            })?;
        }
        Ok(())
    }
}
