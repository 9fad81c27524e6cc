//! Drafts: writes of S3, where writers of a key pass each other. The key is locked to choose the version and again to
//! flip, not while the value comes; the last flip wins. A draft that another one has overtaken is copied to a new one.
//!
//! A draft that becomes a part of a multipart upload keeps its debris entry, which rests until the upload has expired.
//! So the blobs of a part are deleted even if nothing else remembers it. The upload and its parts are rows of their
//! own: an id, then number and version. A part that is sent again adds a row, and the highest version counts.

use percent_encoding::percent_decode_str;

use super::locks::Noted;
use super::{Deleted, Entry, Index, sql, undecodable};
use crate::error::Result;
use crate::format::percent_encoded;
use crate::format::record::{Record, number};

/// Decides about a write from the record that it would replace. It is called at the flip, perhaps more than once.
pub type Judge<'a> = &'a dyn Fn(Option<&Record>) -> Result<()>;

/// A write under way. If it is dropped before it has ended, the cleaner deletes its blobs.
pub struct Draft<'a> {
    /// The debris of the version being written. It names every replica that may hold a blob of it.
    pub entry: Entry,
    /// Its row in a database.
    pub(super) trace: Option<sql::Trace<'a>>,
    /// Keeps the cleaner of this process away.
    pub(super) noted: Option<Noted<'a>>,
}

impl Draft<'_> {
    /// Whether it cannot be completed: another master takes this one for dead.
    pub fn is_lost(&self) -> bool {
        self.trace.as_ref().is_some_and(sql::Trace::is_lost)
    }
}

/// A multipart upload: its key, its time and what S3 keeps beside the value.
#[derive(Debug, Clone, PartialEq)]
pub struct MultipartUpload {
    pub id: u64,
    pub key: Vec<u8>,
    /// Seconds since 1970.
    pub time: u64,
    pub meta: String,
}

impl MultipartUpload {
    /// The text of its row: `16hex " " percent-encoded key [ " " meta ]`.
    pub(super) fn encode(&self) -> String {
        format!("{:016x} {} {}", self.time, percent_encoded(&self.key), self.meta).trim_end().into()
    }

    /// Decodes the text of a row.
    pub(super) fn decode(id: u64, text: &[u8]) -> Result<MultipartUpload> {
        let upload = std::str::from_utf8(text).ok().and_then(|text| {
            let mut words = text.splitn(3, ' ');
            let (time, key) = (number(words.next()?)?, percent_decode_str(words.next()?).collect());
            Some(MultipartUpload { id, key, time, meta: words.next().unwrap_or_default().into() })
        });
        upload.ok_or_else(|| undecodable(&id.to_be_bytes(), text))
    }
}

/// A part of a multipart upload; the record is that of its blob, which has the upload's key.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    pub number: u16,
    pub record: Record,
}

/// The part with the highest version of each number. `parts` are in the order of number and version.
pub(super) fn newest(parts: Vec<Part>) -> Vec<Part> {
    let mut newest: Vec<Part> = Vec::with_capacity(parts.len());
    for part in parts {
        match newest.last_mut().filter(|last| last.number == part.number) {
            Some(last) => *last = part,
            None => newest.push(part),
        }
    }
    newest
}

impl Index {
    /// Chooses a version of a key, and records that these replicas may hold a blob of it. Fails with `Locked` if a write
    /// that is no draft holds the key for too long.
    pub fn draft(&self, key: &[u8], replicas: &[String]) -> Result<Draft<'_>> {
        engine!(self, draft(key, replicas))
    }

    /// Records that blobs of a draft may still appear until this time (seconds since 1970), although no volume
    /// confirmed them.
    pub fn doubt_draft(&self, draft: &mut Draft, until: u64) -> Result<()> {
        let debris = &mut draft.entry.debris;
        debris.doubtful_until = debris.doubtful_until.max(until);
        match self {
            Index::Rocks(rocks) => rocks.put_entry(&draft.entry),
            // It is written when the draft is abandoned.
            Index::Sql(_) => Ok(()),
        }
    }

    /// Ends a draft: `new` becomes the record unless `judge` refuses, and the blobs of the old one become debris. Gives
    /// the draft back if the record has a higher version meanwhile: versions of a record only go up. `upload`: what is
    /// completed; fails with `NoSuchUpload` if it has ended, by another Complete perhaps.
    pub fn flip_draft<'a>(
        &'a self,
        draft: Draft<'a>,
        new: &Record,
        upload: Option<u64>,
        judge: Judge,
    ) -> Result<Option<Draft<'a>>> {
        engine!(self, flip_draft(draft, new, upload, judge))
    }

    /// Ends a draft that failed. `delete` deletes its blobs; what it cannot delete is left to the cleaner.
    pub fn abandon_draft(&self, draft: Draft, delete: impl FnOnce(&Entry) -> Deleted) -> Result<()> {
        engine!(self, abandon_draft(draft, delete))
    }

    /// Begins a multipart upload.
    pub fn create_upload(&self, upload: &MultipartUpload) -> Result<()> {
        engine!(self, create_upload(upload))
    }

    pub fn find_upload(&self, id: u64) -> Result<Option<MultipartUpload>> {
        engine!(self, find_upload(id))
    }

    /// Calls `f` with each upload, by id: there can be many, with long metadata.
    pub fn uploads(&self, f: impl FnMut(MultipartUpload) -> Result<()>) -> Result<()> {
        engine!(self, uploads(f))
    }

    /// The parts of an upload, by number.
    pub fn parts(&self, id: u64) -> Result<Vec<Part>> {
        engine!(self, parts(id))
    }

    /// Takes over the multipart uploads of another index, and their parts. Their debris is not among them.
    pub fn take_uploads(&self, other: &Index) -> Result<()> {
        other.uploads(|upload| {
            self.create_upload(&upload)?;
            other.parts(upload.id)?.iter().try_for_each(|part| engine!(self, add_part(upload.id, part)))
        })
    }

    /// Makes a draft a part of an upload; the cleaner leaves it alone until this time (seconds since 1970). Fails with
    /// `NoSuchUpload` if the upload has ended.
    pub fn keep_part(&self, draft: Draft, id: u64, part: &Part, until: u64) -> Result<()> {
        engine!(self, keep_part(draft, id, part, until))
    }

    /// Makes a draft of a part that is to become the value, and records that its blob is about to be copied to these
    /// replicas. Fails with `Locked` while another request does the same, and with `NoSuchUpload` if the part is gone.
    pub fn claim_part(&self, upload: &MultipartUpload, part: &Part, copies: &[String]) -> Result<Draft<'_>> {
        engine!(self, claim_part(upload, part, copies))
    }

    /// Ends an upload. The cleaner deletes the blobs of all its parts, but for one that has become the value.
    pub fn end_upload(&self, upload: &MultipartUpload) -> Result<()> {
        engine!(self, end_upload(upload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upload_is_decoded_as_it_was_encoded() {
        for (key, meta) in [(b"/b/a b\xff%".to_vec(), ""), (b"/b/".to_vec(), "type=text%2Fplain&x=")] {
            let upload = MultipartUpload { id: 7, key, time: 1_700_000_000, meta: meta.into() };
            assert_eq!(MultipartUpload::decode(7, upload.encode().as_bytes()), Ok(upload));
        }
        assert!(MultipartUpload::decode(7, b"12 /a").is_err());
    }

    #[test]
    fn a_part_that_is_sent_again_replaces_the_first_one() {
        let part = |number, version| Part { number, record: Record { version, ..Record::default() } };
        let parts = vec![part(1, 5), part(2, 3), part(2, 9), part(7, 1)];
        assert_eq!(newest(parts), [part(1, 5), part(2, 9), part(7, 1)]);
    }
}
