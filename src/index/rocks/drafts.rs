//! Drafts and multipart uploads on RocksDB.
//!
//! ```text
//! uploads   id (8 bytes)                                     the upload
//!           id (8 bytes) number (2 bytes) version (8 bytes)  the record of a part
//! ```
//!
//! Numbers are big-endian.

use rocksdb::{IteratorMode, PrefixRange, ReadOptions};

use super::write::now;
use super::{Rocks, UPLOADS, index_error};
use crate::error::{Error, Result};
use crate::format::record::{Debris, Record};
use crate::index::drafts::{Draft, Judge, MultipartUpload, Part, newest};
use crate::index::locks::Owner;
use crate::index::{Deleted, Entry, Stage, Writing, record_of};

const ID_BYTES: usize = 8;
const PART_BYTES: usize = ID_BYTES + 2 + 8;

impl Rocks {
    pub fn draft(&self, key: &[u8], replicas: &[String]) -> Result<Draft<'_>> {
        let held = self.hold(key, Owner::Passing)?.ok_or(Error::Locked)?;
        let version = self.new_version(key, held.record.as_ref())?;
        let debris = Debris { replicas: replicas.to_vec(), ..Debris::default() };
        let entry = Entry { key: key.into(), version, debris, stage: Stage::Due };
        // First the note: the cleaner sees the entry as soon as it is there.
        let noted = self.locks.draft(key, version);
        self.put_entry(&entry)?;
        Ok(Draft { entry, trace: None, noted: Some(noted) })
    }

    pub fn flip_draft<'a>(
        &'a self,
        draft: Draft<'a>,
        new: &Record,
        upload: Option<u64>,
        judge: Judge,
    ) -> Result<Option<Draft<'a>>> {
        let held = self.hold(&draft.entry.key, Owner::Passing)?.ok_or(Error::Locked)?;
        if let Some(id) = upload
            && self.find_upload(id)?.is_none()
        {
            return Err(Error::NoSuchUpload);
        }
        judge(held.record.as_ref())?;
        let surplus = match &held.record {
            Some(old) if old.version > new.version => return Ok(Some(draft)),
            Some(old) => old.replicas.clone(),
            None => Vec::new(),
        };
        let Draft { mut entry, noted, .. } = draft;
        // What is left of a part that became the value is debris like any other.
        entry.debris.keep_until = 0;
        let writing = Writing { held, entry, replicas: Vec::new(), replace: true, trace: None };
        let flipped = self.flip(writing, new, surplus, None);
        drop(noted);
        flipped.map(|()| None)
    }

    /// No record names the version of a draft, so the key need not be locked.
    pub fn abandon_draft(&self, draft: Draft, delete: impl FnOnce(&Entry) -> Deleted) -> Result<()> {
        let Draft { mut entry, noted, .. } = draft;
        let deleted = delete(&entry);
        let ended = self.drop_replicas(&mut entry, |replica| deleted.gone.contains(replica));
        drop(noted);
        ended
    }

    pub fn create_upload(&self, upload: &MultipartUpload) -> Result<()> {
        self.batch().set_upload(&upload.id.to_be_bytes(), Some(upload.encode())).commit()
    }

    pub fn find_upload(&self, id: u64) -> Result<Option<MultipartUpload>> {
        let Some(family) = self.db.cf_handle(UPLOADS) else { return Ok(None) };
        let found = self.db.get_cf(family, id.to_be_bytes()).map_err(index_error)?;
        found.map(|text| MultipartUpload::decode(id, &text)).transpose()
    }

    pub fn uploads(&self, mut f: impl FnMut(MultipartUpload) -> Result<()>) -> Result<()> {
        // A follower's database can be one without the family.
        let Some(family) = self.db.cf_handle(UPLOADS) else { return Ok(()) };
        let mut start = Vec::new();
        loop {
            // The parts of each upload are stepped over.
            let mode = IteratorMode::From(&start, rocksdb::Direction::Forward);
            let Some(row) = self.db.iterator_cf(family, mode).next() else { return Ok(()) };
            let (name, text) = row.map_err(index_error)?;
            let id = name.first_chunk::<ID_BYTES>().map(|id| u64::from_be_bytes(*id));
            let id = id.ok_or_else(|| Error::Index("an upload has no id".into()))?;
            if name.len() == ID_BYTES {
                f(MultipartUpload::decode(id, &text)?)?;
            }
            let Some(next) = id.checked_add(1) else { return Ok(()) };
            start = next.to_be_bytes().to_vec();
        }
    }

    pub fn parts(&self, id: u64) -> Result<Vec<Part>> {
        Ok(newest(self.all_parts(id)?))
    }

    /// The parts of an upload, also those that were replaced, by number and version.
    fn all_parts(&self, id: u64) -> Result<Vec<Part>> {
        let mut options = ReadOptions::default();
        options.set_iterate_range(PrefixRange(id.to_be_bytes()));
        let mut parts = Vec::new();
        for row in self.db.iterator_cf_opt(self.family(UPLOADS), options, IteratorMode::Start) {
            let (name, text) = row.map_err(index_error)?;
            if name.len() == PART_BYTES {
                let number = u16::from_be_bytes([name[ID_BYTES], name[ID_BYTES + 1]]);
                parts.push(Part { number, record: record_of(&name, &text)? });
            }
        }
        Ok(parts)
    }

    pub fn keep_part(&self, draft: Draft, id: u64, part: &Part, until: u64) -> Result<()> {
        let Draft { mut entry, noted, .. } = draft;
        let _uploads = self.locks.uploads();
        if self.find_upload(id)?.is_none() {
            return Err(Error::NoSuchUpload);
        }
        entry.debris.keep_until = until;
        let kept = self
            .batch()
            .set_upload(&part_name(id, part), Some(part.record.encode()))
            .set_debris(&entry.key, entry.version, &entry.debris)
            .commit();
        drop(noted);
        kept
    }

    /// Adds a part whose blob has its debris entry.
    pub fn add_part(&self, id: u64, part: &Part) -> Result<()> {
        self.batch().set_upload(&part_name(id, part), Some(part.record.encode())).commit()
    }

    pub fn claim_part(&self, upload: &MultipartUpload, part: &Part, copies: &[String]) -> Result<Draft<'_>> {
        let (key, version) = (&upload.key, part.record.version);
        let _uploads = self.locks.uploads();
        if self.locks.is_draft(key, version) {
            return Err(Error::Locked);
        }
        let mut debris = self.debris_entry(key, version)?;
        // One that does not rest any more is the cleaner's: its upload has expired.
        if debris.keep_until <= now().as_secs() || self.find_upload(upload.id)?.is_none() {
            return Err(Error::NoSuchUpload);
        }
        let noted = self.locks.draft(key, version);
        debris.merge(&Debris { replicas: copies.to_vec(), ..Debris::default() });
        let entry = Entry { key: key.clone(), version, debris, stage: Stage::Due };
        self.put_entry(&entry)?;
        Ok(Draft { entry, trace: None, noted: Some(noted) })
    }

    pub fn end_upload(&self, upload: &MultipartUpload) -> Result<()> {
        let _uploads = self.locks.uploads();
        let mut batch = self.batch().set_upload(&upload.id.to_be_bytes(), None);
        let value = self.get(&upload.key)?.map(|record| record.version);
        for part in self.all_parts(upload.id)? {
            batch = batch.set_upload(&part_name(upload.id, &part), None);
            let mut debris = self.debris_entry(&upload.key, part.record.version)?;
            // What rests of the value's own version has been replaced by a rebalance.
            if debris.keep_until > 0 && value != Some(part.record.version) {
                debris.keep_until = 0;
                batch = batch.set_debris(&upload.key, part.record.version, &debris);
            }
        }
        batch.commit()
    }
}

fn part_name(id: u64, part: &Part) -> Vec<u8> {
    [&id.to_be_bytes()[..], &part.number.to_be_bytes(), &part.record.version.to_be_bytes()].concat()
}
