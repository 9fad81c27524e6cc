//! Writing: PUT, REPLACE, DELETE, UNLINK, RELINK. The write protocol:
//!
//! 1. `begin` locks the key, chooses a version that it never had and writes a debris entry: these replicas may hold a
//!    blob of that version. *A crash from here on leaves the entry, and the cleaner deletes what it names.*
//! 2. The value streams to all replicas at the same time. nginx publishes a file by rename when its body is complete,
//!    so a volume has the whole value or nothing. *A crash leaves some blobs and the entry.*
//! 3. If a replica fails, the client goes away, or length or digest are wrong, the blobs are deleted and then the
//!    entry. If a volume may have stored the value without telling us, the entry says that for an hour a 404 does not
//!    prove that the blob is gone. *A crash leaves the entry.*
//! 4. `flip`, one batch: the record names the new blob, the new version is no debris any more, the old version is.
//!    *A crash before it leaves the old value; a crash after it the new one, and debris for the cleaner.*
//!
//! DELETE is one batch too: the record is gone and its version is debris. Then the blobs are deleted, all volumes at
//! the same time. The answer is 204 if all are gone; otherwise the key already reads 404 and the cleaner goes on.
//! UNLINK and RELINK change the record's state and touch no blob.

use std::io::{self, Read};

use super::{Store, now};
use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::record::{Record, State};
use crate::format::{is_own, quoted};
use crate::index::{Deleted, Entry, Held, Stage, Writing};
use crate::volumes::Auth;
use crate::volumes::upload::{PutFailed, PutOptions, Upload};

/// How long a 404 proves nothing after a whole body was sent and no answer came, in seconds.
pub(super) const LOST_ANSWER: u64 = 3600;

/// How long the plain name of a key is avoided after a volume could not use it, in seconds.
pub(super) const CONFLICT: u64 = 60;

pub(super) const PROTECTED: Error = Error::Forbidden("this server protects keys: UNLINK it first");

impl Store {
    /// Stores a value under a key that is not live or, with `replace`, under any key.
    pub fn put(&self, key: &[u8], replace: bool, upload: Upload, auth: Auth) -> Result<()> {
        if upload.length == Some(0) {
            return Err(Error::NoValue);
        }
        let replicas = self.place(key);
        let over_live = replace && !self.config.protect;
        let writing = self.index.begin(key, replicas.clone(), over_live, |old| {
            self.check_put(key, old, replace)?;
            self.volumes.check_silent(&replicas, auth)
        })?;
        let (version, options) =
            (writing.entry.version, PutOptions { time: now(), md5sum: self.config.md5sum, empty: false });
        let mut reader = Watched { reader: upload.reader, is_lost: || writing.is_lost() };
        let upload = Upload { reader: &mut reader, ..upload };
        match self.volumes.put(&replicas, &path(key, version), upload, options, auth) {
            Err(failed) if writing.is_lost() => {
                self.abandon(writing, failed, auth);
                Err(taken_for_dead())
            }
            Err(failed) => Err(self.abandon(writing, failed, auth)),
            Ok(stored) => {
                let record = Record {
                    state: State::Live,
                    hash: stored.hash.filter(|_| self.config.md5sum),
                    size: Some(stored.size),
                    time: Some(options.time),
                    version,
                    meta: String::new(),
                    replicas,
                };
                let old = writing.held.record.as_ref().map(|old| old.replicas.clone());
                let replaced = old.is_some();
                self.index.flip(writing, &record, old.unwrap_or_default(), None)?;
                if replaced {
                    self.wake_cleaner();
                }
                Ok(())
            }
        }
    }

    fn check_put(&self, key: &[u8], old: Option<&Record>, replace: bool) -> Result<()> {
        match old {
            Some(old) if old.live() && !replace => {
                Err(Error::Forbidden("the key exists: delete it first, or use REPLACE"))
            }
            Some(old) if old.live() && self.config.protect && !is_own(key) => Err(PROTECTED),
            _ => Ok(()),
        }
    }

    /// Ends a write that failed: deletes the blobs that it may have left. Returns the error for the client.
    pub(super) fn abandon(&self, mut writing: Writing, failed: PutFailed, auth: Auth) -> Error {
        let mut left = false;
        let ended = self.note_doubt(&mut writing, &failed).and_then(|()| {
            self.index.abandon(writing, |held, entry, replicas| {
                let deleted = self.delete_unwanted(held, entry, replicas, false, auth);
                left = deleted.failed.is_some();
                deleted
            })
        });
        if left {
            self.wake_cleaner();
        }
        ended.err().unwrap_or(failed.error)
    }

    /// Records for how long a failed write makes a 404 doubtful.
    pub(super) fn note_doubt(&self, writing: &mut Writing, failed: &PutFailed) -> Result<()> {
        // A folder lies where the plain name belongs: while the entry stays, another attempt gets a version.
        let conflict = writing.entry.version == 0 && matches!(failed.error, Error::Refused { status: 409, .. });
        if !failed.maybe_stored.is_empty() {
            self.index.doubt(writing, now() + LOST_ANSWER)
        } else if conflict {
            self.index.doubt(writing, now() + CONFLICT)
        } else {
            Ok(())
        }
    }

    /// Deletes a key and its blobs. If a volume still holds a blob, the key is deleted all the same and the error says
    /// so.
    pub fn delete(&self, key: &[u8], auth: Auth) -> Result<()> {
        let check = |record: &Record| match record.live() && self.config.protect {
            true => Err(PROTECTED),
            false => Ok(()),
        };
        let (held, entries) = self.index.remove(key, false, check)?;
        let mut failed = None;
        for mut entry in entries {
            match self.clear(&held, &mut entry, true, auth) {
                Ok(()) => {}
                Err(error @ Error::Index(_)) => return Err(error),
                Err(error) => failed = Some(error),
            }
        }
        drop(held);
        let Some(error) = failed else { return Ok(()) };
        self.wake_cleaner();
        Err(Error::Unavailable(format!("the key is deleted, but not all its blobs: {error}")))
    }

    /// Hides a live key and keeps its value.
    pub fn unlink(&self, key: &[u8]) -> Result<()> {
        self.index.update(key, false, |record| {
            let record = record.filter(Record::live).ok_or(Error::NOT_FOUND)?;
            Ok(Record { state: State::Unlinked, ..record })
        })
    }

    /// Shows an unlinked key again, if a volume still has its value.
    pub fn relink(&self, key: &[u8], auth: Auth) -> Result<()> {
        self.index.update(key, false, |record| {
            let record = record.filter(|record| record.state == State::Unlinked);
            let record = record.ok_or(Error::NotFound("no unlinked key of this name"))?;
            self.find(key, &record, auth, &[])?;
            Ok(Record { state: State::Live, ..record })
        })
    }

    /// Deletes the blobs of an entry and takes their replicas from it. Never touches a blob that the record names.
    /// `patient`: also asks volumes that did not answer a moment ago. Fails if a volume refuses or does not answer; a
    /// 404 that proves nothing yet is no failure, the replica just stays in the entry.
    pub fn clear(&self, held: &Held, entry: &mut Entry, patient: bool, auth: Auth) -> Result<()> {
        if !self.index.mark(entry, held.record.as_ref())? {
            return Ok(());
        }
        let deleted = self.delete_unwanted(held, entry, &entry.debris.replicas, patient, auth);
        self.index.forget(held, entry, &deleted)?;
        deleted.failed.map_or(Ok(()), Err)
    }

    /// Sends the DELETEs for these replicas of an entry, but for blobs that the record names.
    fn delete_unwanted(&self, held: &Held, entry: &Entry, replicas: &[String], patient: bool, auth: Auth) -> Deleted {
        let deleted = self.delete_blobs(entry, unwanted(held, entry, replicas), patient, auth);
        if let Some(error) = &deleted.failed {
            log::warn!("debris of {} stays for now: {error}", quoted(&entry.key));
        }
        deleted
    }

    /// Deletes all debris of a key that is due at this time (seconds since 1970).
    pub fn clear_due(&self, key: &[u8], now: u64) -> Result<()> {
        for (version, debris) in self.index.debris(key)? {
            let mut entry = Entry { key: key.into(), version, debris, stage: Stage::Due };
            if entry.debris.keep_until <= now
                && let Some(held) = self.index.hold_to_clean(&mut entry)?
            {
                self.clear(&held, &mut entry, true, self.own_auth())?;
            }
        }
        Ok(())
    }

    /// Sends the DELETEs.
    pub(super) fn delete_blobs(&self, entry: &Entry, replicas: Vec<String>, patient: bool, auth: Auth) -> Deleted {
        let blob = path(&entry.key, entry.version);
        let outcomes = self.volumes.delete_all(&replicas, &blob, patient, auth);
        let mut deleted = Deleted { asked: replicas.clone(), ..Deleted::default() };
        if !entry.may_delete() {
            deleted.failed = Some(Error::Unavailable("the volumes are asked again later".into()));
            return deleted;
        }
        for (replica, outcome) in replicas.into_iter().zip(outcomes) {
            match outcome {
                // It is not there now, but it may still appear.
                Ok(false) if now() < entry.debris.doubtful_until => {}
                Ok(_) => deleted.gone.push(replica),
                Err(error) => {
                    if matches!(error, Error::Unreachable { maybe_done: true, .. }) {
                        self.index.note_unconfirmed_delete(&entry.key);
                    }
                    deleted.failed = Some(error);
                }
            }
        }
        deleted
    }
}

pub(super) fn taken_for_dead() -> Error {
    Error::Unavailable("another master took this one for dead: try again".into())
}

/// The body of an upload. It ends in an error once the write cannot be completed any more.
pub(super) struct Watched<'a, F> {
    pub reader: &'a mut dyn Read,
    pub is_lost: F,
}

impl<F: Fn() -> bool> Read for Watched<'_, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if (self.is_lost)() {
            return Err(io::Error::other("another master took this one for dead"));
        }
        self.reader.read(buffer)
    }
}

/// Those of the replicas that the entry names and the record does not.
pub(super) fn unwanted(held: &Held, entry: &Entry, replicas: &[String]) -> Vec<String> {
    let is_record = |replica: &str| held.record.as_ref().is_some_and(|r| r.is_at(entry.version, replica));
    let is_debris = |replica: &&String| entry.debris.replicas.contains(replica);
    replicas.iter().filter(|r| is_debris(r) && !is_record(r)).cloned().collect()
}
