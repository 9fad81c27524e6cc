//! Drafts and multipart uploads on PostgreSQL.
//!
//! A draft is a row of `writing` like that of any write, begun so that it passes other rows of its key. When it becomes a
//! part, one statement deletes the row, adds the part and makes its blob debris that rests. The row of the upload is
//! locked meanwhile: the end of an upload finds either the part or the draft.

use std::time::Instant;

use super::connection::Arg::{Bytes, Int, Text};
use super::pool::Failure;
use super::statements as sql;
use super::write::{FLIP, PAUSE, Terms, Trace, in_doubt};
use super::{Engine, bytes, entry, flag, int, now, signed};
use crate::error::{Error, Result};
use crate::format::record::{Debris, Record};
use crate::index::drafts::{Draft, Judge, MultipartUpload, Part, newest};
use crate::index::{Deleted, Entry, Held, Stage, Writing, record_of};

/// Uploads that are read at a time.
const PAGE: i64 = 1000;

impl Engine {
    pub fn draft(&self, key: &[u8], replicas: &[String]) -> Result<Draft<'_>> {
        let Writing { entry, trace, .. } = self.begin(key, replicas.to_vec(), true, true, |_| Ok(()))?;
        Ok(Draft { entry, trace, noted: None })
    }

    pub fn flip_draft<'a>(
        &'a self,
        draft: Draft<'a>,
        new: &Record,
        upload: Option<u64>,
        judge: Judge,
    ) -> Result<Option<Draft<'a>>> {
        let Draft { entry, trace, .. } = draft;
        let lock = self.lock(&entry.key, true)?;
        let record = self.get(&entry.key)?;
        let (given, replicas) = (entry.clone(), entry.debris.replicas.clone());
        let writing = Writing { held: Held { lock, record }, entry, replicas, replace: true, trace };
        let judge = |old: Option<&Record>| match upload {
            Some(id) if self.find_upload(id)?.is_none() => Err(Error::NoSuchUpload),
            _ => judge(old),
        };
        let terms = Terms { upload: upload.unwrap_or(0) as i64, ..Terms::default() };
        let overtaken = self.flip_judged(writing, new, terms, &judge)?;
        Ok(overtaken.map(|trace| Draft { entry: given, trace: Some(trace), noted: None }))
    }

    pub fn abandon_draft(&self, draft: Draft, delete: impl FnOnce(&Entry) -> Deleted) -> Result<()> {
        let Draft { entry, trace, .. } = draft;
        if let Some(trace) = trace {
            let deleted = delete(&entry);
            trace.give_up(&entry, &entry.debris.replicas, &deleted);
        }
        Ok(())
    }

    pub fn create_upload(&self, upload: &MultipartUpload) -> Result<()> {
        let args = [Int(upload.id as i64), Bytes(&upload.key), Text(&upload.encode())];
        Ok(self.pool.query(sql::CREATE_UPLOAD, &args).map(drop)?)
    }

    pub fn find_upload(&self, id: u64) -> Result<Option<MultipartUpload>> {
        let rows = self.pool.read(sql::FIND_UPLOAD, &[Int(id as i64)])?;
        rows.first().map(|row| MultipartUpload::decode(id, bytes(row, 0))).transpose()
    }

    pub fn uploads(&self, mut f: impl FnMut(MultipartUpload) -> Result<()>) -> Result<()> {
        let mut last = -1;
        loop {
            let rows = self.pool.read(sql::UPLOADS, &[Int(last), Int(PAGE)])?;
            let Some(row) = rows.last() else { return Ok(()) };
            last = int(row, 0);
            for row in &rows {
                f(MultipartUpload::decode(int(row, 0) as u64, bytes(row, 1))?)?;
            }
        }
    }

    pub fn parts(&self, id: u64) -> Result<Vec<Part>> {
        let rows = self.pool.read(sql::PARTS, &[Int(id as i64)])?;
        let part = |row: &super::Row| {
            let record = record_of(&id.to_be_bytes(), bytes(row, 1))?;
            Ok(Part { number: int(row, 0) as u16, record })
        };
        Ok(newest(rows.iter().map(part).collect::<Result<_>>()?))
    }

    pub fn keep_part(&self, draft: Draft, id: u64, part: &Part, until: u64) -> Result<()> {
        let Draft { entry, trace: Some(trace), .. } = draft else { return Err(self.lost_session()) };
        let (begun, record, replicas) = (Instant::now(), part.record.encode(), entry.debris.replicas.join(","));
        let wait = until.saturating_sub(now()) as i64;
        loop {
            let [key, version, session] = trace.name();
            let (id, number) = (Int(id as i64), Int(part.number.into()));
            let args = [key, version, session, id, number, Text(&record), Int(wait), Text(&replicas)];
            let row = match self.pool.query(sql::KEEP_PART, &args) {
                Ok(rows) => rows.into_iter().next().unwrap_or_default(),
                Err(failure) if failure.is_temporary() && begun.elapsed() < FLIP => {
                    std::thread::sleep(PAUSE);
                    continue;
                }
                Err(failure) => return Err(in_doubt(&failure)),
            };
            return match (flag(&row, 0), flag(&row, 1)) {
                (_, true) => {
                    trace.forget();
                    Ok(())
                }
                (true, false) => {
                    trace.abandon(0);
                    Err(Error::NoSuchUpload)
                }
                // It was kept before and the answer was lost, or another master took over.
                (false, false) if !self.pool.read(sql::PART, &[id, number, version])?.is_empty() => {
                    trace.forget();
                    Ok(())
                }
                (false, false) => Err(self.lost_session()),
            };
        }
    }

    /// Adds a part whose blob has its debris entry.
    pub fn add_part(&self, id: u64, part: &Part) -> Result<()> {
        let (id, number) = (Int(id as i64), Int(part.number.into()));
        let args = [id, number, Int(signed(b"", part.record.version)?), Text(&part.record.encode())];
        Ok(self.pool.query(sql::ADD_PART, &args).map(drop)?)
    }

    pub fn claim_part(&self, upload: &MultipartUpload, part: &Part, copies: &[String]) -> Result<Draft<'_>> {
        let (key, version) = (&upload.key, signed(&upload.key, part.record.version)?);
        let mut replicas = part.record.replicas.clone();
        replicas.extend(copies.iter().filter(|copy| !part.record.replicas.contains(copy)).cloned());
        let mut trace = Trace::new(self, key, version);
        let [name, number, session] = trace.name();
        let args = [name, number, session, Text(&replicas.join(",")), Int(upload.id as i64)];
        match self.pool.query(sql::CLAIM_PART, &args) {
            Ok(rows) if rows.is_empty() => {
                trace.ended = true;
                let is_claimed = self.find_upload(upload.id)?.is_some() && self.rests(key, version)?;
                Err(if is_claimed { Error::Locked } else { Error::NoSuchUpload })
            }
            Ok(_) => {
                let debris = Debris { replicas, ..Debris::default() };
                let entry = Entry { key: key.clone(), version: version as u64, debris, stage: Stage::Due };
                Ok(Draft { entry, trace: Some(trace), noted: None })
            }
            Err(failure) => {
                trace.ended = !matches!(failure, Failure::Doubt(_));
                Err(failure.into())
            }
        }
    }

    /// Whether the blobs of this version are to be left alone.
    fn rests(&self, key: &[u8], version: i64) -> Result<bool> {
        let rows = self.pool.read(sql::ENTRY, &[Bytes(key), Int(version)])?;
        Ok(rows.iter().any(|row| entry(key, version, row).debris.keep_until > now()))
    }

    pub fn end_upload(&self, upload: &MultipartUpload) -> Result<()> {
        // The first statement ends claims of parts. The second one sees those that were made before.
        self.pool.query(sql::END_UPLOAD, &[Int(upload.id as i64)])?;
        Ok(self.pool.query(sql::END_PARTS, &[Int(upload.id as i64), Bytes(&upload.key)]).map(drop)?)
    }
}
