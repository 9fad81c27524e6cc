//! One key's replicas: which exist, which are right, and how missing ones are made.
//!
//! A rebalance of a key claims it, asks which replicas exist, copies what is missing from a replica whose bytes match
//! the record while they stream, and flips the record to the replicas that placement wants. A crash before the flip
//! leaves the copies as debris; a crash after it leaves the surplus replicas as debris. The surplus stays for
//! `Config::settle`, because nginx does not fsync and the copies may not be on disk yet.
//!
//! Nothing of a value is removed unless its bytes are known to be right somewhere else: without a hash that means that
//! all replicas agree.

use std::collections::HashSet;

use super::{Store, now};
use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::quoted;
use crate::format::record::Record;
use crate::index::Writing;
use crate::volumes::upload::{PutFailed, PutOptions, Upload};
use crate::volumes::{Auth, Opened};

/// What a rebalance of one key has to do.
pub struct Plan {
    /// Replicas of the record that exist in the right length.
    sources: Vec<String>,
    /// Bytes of the value.
    pub length: u64,
    /// The replicas to be made: placement wants them, and they are missing or not in the right length.
    pub copies: Vec<String>,
    wanted: Vec<String>,
}

impl Plan {
    pub fn is_needed(&self, record: &Record) -> bool {
        !self.copies.is_empty() || self.wanted != record.replicas
    }
}

impl Store {
    /// Moves one key's replicas to where placement wants them. `None`: they are there.
    pub fn rebalance(&self, key: &[u8], auth: Auth) -> Result<Option<Plan>> {
        let mut writing = self.index.claim(key)?;
        let record = writing.held.record.clone().ok_or(Error::NOT_FOUND)?;
        let plan = self.plan(key, &record, auth)?;
        if !plan.is_needed(&record) {
            return Ok(None);
        }
        let is_surplus = |r: &&String| !plan.wanted.contains(r) && !self.is_lost(r);
        let surplus: Vec<String> = record.replicas.iter().filter(is_surplus).cloned().collect();
        if plan.copies.is_empty() {
            self.check_before_delete(key, &record, &plan, &surplus, auth)?;
        } else {
            writing = self.copy(writing, &record, &plan.sources, &plan.copies, auth)?;
        }
        let new = Record { replicas: plan.wanted.clone(), ..record };
        self.index.flip(writing, &new, surplus, Some(self.config.settle))?;
        self.wake_cleaner();
        Ok(Some(plan))
    }

    /// Makes missing replicas of a record, or replaces bad ones, on a key that nobody else writes.
    pub fn restore(&self, key: &[u8], sources: &[String], bad: &[String]) -> Result<()> {
        let writing = self.index.claim(key)?;
        let record = writing.held.record.clone().ok_or(Error::NOT_FOUND)?;
        let writing = self.copy(writing, &record, sources, bad, self.own_auth())?;
        self.index.flip(writing, &record, Vec::new(), None)
    }

    /// Copies a claimed key's blob to these replicas, from the first source whose bytes are the record's. Gives the
    /// claim back for the flip.
    fn copy<'a>(
        &'a self,
        mut writing: Writing<'a>,
        record: &Record,
        sources: &[String],
        copies: &[String],
        auth: Auth,
    ) -> Result<Writing<'a>> {
        let key = writing.entry.key.clone();
        self.check_agreement(&key, record, sources, auth)?;
        self.index.claim_copies(&mut writing, copies)?;
        let mut failed = PutFailed { error: Error::Gone, maybe_stored: Vec::new() };
        // Volumes that do not answer come last.
        for source in self.volumes.shuffled(sources) {
            let mut blob = match self.open(&key, record, &source, auth) {
                Ok(blob) => blob,
                Err(error) => {
                    failed.error = error;
                    continue;
                }
            };
            let (reader, length) = (&mut blob.body, Some(blob.length));
            let upload = Upload { reader, length, content_md5: record.hash };
            let time = record.time.or(blob.time).unwrap_or_else(now);
            let options = PutOptions { time, md5sum: false, empty: true };
            let target = path(&key, record.version);
            match self.volumes.put(copies, &target, upload, options, auth) {
                Ok(_) => return Ok(writing),
                Err(attempt) => failed = attempt,
            }
            self.note_doubt(&mut writing, &failed)?;
            // The source ended early or has other bytes: another one may be good.
            let Error::BadRequest(why) = &failed.error else { break };
            let text = format!("{source} is no good source for {}: {why}", quoted(&key));
            log::warn!("{text}");
            failed.error = Error::Failed(text);
        }
        Err(self.abandon(writing, failed, auth))
    }

    /// Opens the blob of one replica, which must have the record's length.
    fn open(&self, key: &[u8], record: &Record, source: &str, auth: Auth) -> Result<Opened> {
        let blob = self.volumes.read(source, &path(key, record.version), auth)?;
        blob.filter(|blob| record.size.is_none_or(|size| size == blob.length)).ok_or(Error::Gone)
    }

    /// Without a hash, fails unless all these replicas hold the same bytes: to copy a rotten one, or to remove one of
    /// those that are right, could make a majority of the rotten ones.
    fn check_agreement(&self, key: &[u8], record: &Record, replicas: &[String], auth: Auth) -> Result<()> {
        if record.hash.is_some() || replicas.len() < 2 {
            return Ok(());
        }
        let (blob, mut digests) = (path(key, record.version), HashSet::new());
        for replica in replicas {
            digests.insert(self.volumes.digest(replica, &blob, auth)?);
        }
        if digests.len() == 1 {
            return Ok(());
        }
        Err(Error::Failed(format!(
            "the replicas of {} differ, and no hash tells which is right: see mkv verify -deep",
            quoted(key)
        )))
    }

    /// Before surplus replicas are removed and nothing was copied: fails unless the value is whole where it stays.
    fn check_before_delete(
        &self,
        key: &[u8],
        record: &Record,
        plan: &Plan,
        surplus: &[String],
        auth: Auth,
    ) -> Result<()> {
        if surplus.is_empty() {
            return Ok(());
        }
        if record.hash.is_none() {
            return self.check_agreement(key, record, &plan.sources, auth);
        }
        let blob = path(key, record.version);
        for replica in &plan.wanted {
            let digest = self.volumes.digest(replica, &blob, auth)?;
            if digest.map(|(hash, _)| hash) == record.hash {
                return Ok(());
            }
        }
        Err(Error::Failed("what stays has other bytes: mkv verify -deep -repair mends it".into()))
    }

    /// Those of the replicas that hold the record's blob in the right length, with that length in bytes.
    pub fn present<'a>(
        &self,
        key: &[u8],
        record: &Record,
        replicas: impl Iterator<Item = &'a String>,
        auth: Auth,
    ) -> Result<Vec<(String, u64)>> {
        let (blob, mut present) = (path(key, record.version), Vec::new());
        for replica in replicas {
            if let Some(length) = self.volumes.head(replica, &blob, auth)?
                && record.size.is_none_or(|size| size == length)
            {
                present.push((replica.clone(), length));
            }
        }
        Ok(present)
    }

    /// Finds out which replicas exist and what has to be copied. A volume that does not answer is an error, unless it is
    /// lost.
    pub fn plan(&self, key: &[u8], record: &Record, auth: Auth) -> Result<Plan> {
        let wanted = self.place(key);
        let named = || record.replicas.iter().filter(|replica| !self.is_lost(replica));
        self.volumes.check_distinct(named().chain(&wanted))?;
        let present = self.present(key, record, named(), auth)?;
        let Some(&(_, length)) = present.first() else { return Err(Error::Gone) };
        if record.hash.is_none() && present.iter().any(|(_, other)| *other != length) {
            return Err(Error::Failed(format!(
                "the replicas of {} differ in length, and no hash tells which is right",
                quoted(key)
            )));
        }
        let sources: Vec<String> = present.into_iter().map(|(replica, _)| replica).collect();
        let copies = wanted.iter().filter(|replica| !sources.contains(replica)).cloned().collect();
        Ok(Plan { sources, length, copies, wanted })
    }
}
