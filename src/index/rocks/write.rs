//! The verbs of the store's protocols on RocksDB.
//!
//! One process writes this index, so a key's lock is a lock in memory, and so is what is known of deletions without an
//! answer. The trace of a write is its debris entry, written before the first byte is sent. Each verb is one batch.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Rocks;
use crate::error::{Error, Result};
use crate::format::record::{Debris, Record};
use crate::index::locks::{Clearing, Owner};
use crate::index::{Deleted, Entry, Held, Stage, Writing};

/// How many generations in a row choose different versions.
const GENERATIONS: u64 = 16;

impl Rocks {
    pub fn begin(
        &self,
        key: &[u8],
        replicas: Vec<String>,
        replace: bool,
        check: impl FnOnce(Option<&Record>) -> Result<()>,
    ) -> Result<Writing<'_>> {
        let held = self.hold(key, Owner::Client)?.ok_or(Error::Locked)?;
        check(held.record.as_ref())?;
        let version = self.new_version(key, held.record.as_ref())?;
        let debris = Debris { replicas: replicas.clone(), ..Debris::default() };
        let entry = Entry { key: key.into(), version, debris, stage: Stage::Due };
        self.put_entry(&entry)?;
        Ok(Writing { held, entry, replicas, replace, trace: None })
    }

    pub fn claim(&self, key: &[u8]) -> Result<Writing<'_>> {
        let held = self.hold(key, Owner::Client)?.ok_or(Error::Locked)?;
        let version = held.record.as_ref().ok_or(Error::NOT_FOUND)?.version;
        let debris = self.debris_entry(key, version)?;
        let entry = Entry { key: key.into(), version, debris, stage: Stage::Due };
        Ok(Writing { held, entry, replicas: Vec::new(), replace: true, trace: None })
    }

    pub fn claim_copies(&self, writing: &mut Writing, copies: &[String]) -> Result<()> {
        let key = writing.held.key();
        if self.locks.is_clearing(key, writing.entry.version) {
            return Err(Error::Locked);
        }
        if self.locks.has_unconfirmed_delete(key) {
            let text = "a deletion of this key got no answer: try again in an hour";
            return Err(Error::Unavailable(text.into()));
        }
        writing.entry.debris.merge(&Debris { replicas: copies.to_vec(), ..Debris::default() });
        writing.replicas = copies.to_vec();
        self.put_entry(&writing.entry)
    }

    pub fn doubt(&self, writing: &mut Writing, until: u64) -> Result<()> {
        let debris = &mut writing.entry.debris;
        debris.doubtful_until = debris.doubtful_until.max(until);
        self.put_entry(&writing.entry)
    }

    pub fn abandon(&self, writing: Writing, delete: impl FnOnce(&Held, &Entry, &[String]) -> Deleted) -> Result<()> {
        let Writing { held, mut entry, replicas, .. } = writing;
        let deleted = delete(&held, &entry, &replicas);
        self.forget(&held, &mut entry, &deleted)
    }

    pub fn flip(&self, writing: Writing, new: &Record, surplus: Vec<String>, keep: Option<Duration>) -> Result<()> {
        let Writing { held, entry: Entry { key, version, mut debris, .. }, .. } = writing;
        let keep_until = keep.map_or(0, |keep| now().as_secs() + keep.as_secs());
        debris.replicas.retain(|replica| !new.replicas.contains(replica));
        let mut batch = self.batch().put(&key, new);
        if let Some(old) = held.record.as_ref().filter(|_| !surplus.is_empty()) {
            let surplus = Debris { keep_until, replicas: surplus, ..Debris::default() };
            if old.version == version {
                debris.merge(&surplus);
            } else {
                let mut entry = self.debris_entry(&key, old.version)?;
                entry.merge(&surplus);
                batch = batch.set_debris(&key, old.version, &entry);
            }
        }
        batch.set_debris(&key, version, &debris).commit()
    }

    pub fn remove(
        &self,
        key: &[u8],
        passing: bool,
        check: impl FnOnce(&Record) -> Result<()>,
    ) -> Result<(Held<'_>, Vec<Entry>)> {
        let mut held = self.hold(key, owner(passing))?.ok_or(Error::Locked)?;
        let entry = |(version, debris)| Entry { key: key.into(), version, debris, stage: Stage::Due };
        let Some(record) = held.record.take() else {
            // In this order: a draft rests as a part before it is a draft no more.
            let (drafts, now) = (self.locks.drafts_of(key), now().as_secs());
            let is_due = |entry: &Entry| entry.debris.keep_until <= now && !drafts.contains(&entry.version);
            let entries: Vec<Entry> = self.debris(key)?.into_iter().map(entry).filter(is_due).collect();
            return if entries.is_empty() { Err(Error::NOT_FOUND) } else { Ok((held, entries)) };
        };
        check(&record)?;
        let version = record.version;
        let mut debris = self.debris_entry(key, version)?;
        debris.merge(&Debris { replicas: record.replicas, ..Debris::default() });
        // The value is gone, so none of its replicas has to rest.
        debris.keep_until = 0;
        self.batch().remove(key).set_debris(key, version, &debris).commit()?;
        Ok((held, vec![entry((version, debris))]))
    }

    pub fn update(&self, key: &[u8], passing: bool, change: impl Fn(Option<Record>) -> Result<Record>) -> Result<()> {
        let mut held = self.hold(key, owner(passing))?.ok_or(Error::Locked)?;
        self.batch().put(key, &change(held.record.take())?).commit()
    }

    pub fn due(&self, mut f: impl FnMut(Entry) -> Result<()>) -> Result<()> {
        let now = now().as_secs();
        self.view().entries().try_for_each(|entry| {
            let entry = entry?;
            if entry.debris.keep_until <= now { f(entry) } else { Ok(()) }
        })
    }

    pub fn hold_to_clean(&self, entry: &mut Entry) -> Result<Option<Held<'_>>> {
        let Some(held) = self.hold(&entry.key, Owner::Cleaner)? else { return Ok(None) };
        // In this order: a draft rests as a part before it is a draft no more.
        let is_draft = self.locks.is_draft(&entry.key, entry.version);
        entry.debris = self.debris_entry(&entry.key, entry.version)?;
        let rests = entry.debris.keep_until > now().as_secs();
        Ok((!is_draft && !rests).then_some(held))
    }

    pub fn release(&self, held: Held, entry: &Entry) -> Clearing<'_> {
        let guard = self.locks.clear(held.key(), entry.version);
        drop(held);
        guard
    }

    pub fn forget(&self, held: &Held, entry: &mut Entry, deleted: &Deleted) -> Result<()> {
        let version = entry.version;
        let is_record = |replica: &String| held.record.as_ref().is_some_and(|r| r.is_at(version, replica));
        self.drop_replicas(entry, |replica| deleted.gone.contains(replica) || is_record(replica))
    }

    pub(super) fn drop_replicas(&self, entry: &mut Entry, is_gone: impl Fn(&String) -> bool) -> Result<()> {
        let before = entry.debris.replicas.len();
        entry.debris.replicas.retain(|replica| !is_gone(replica));
        if entry.debris.replicas.len() < before { self.put_entry(entry) } else { Ok(()) }
    }

    pub fn put_entry(&self, Entry { key, version, debris, .. }: &Entry) -> Result<()> {
        self.batch().set_debris(key, *version, debris).commit()
    }

    pub fn note_unconfirmed_delete(&self, key: &[u8]) {
        self.locks.note_unconfirmed_delete(key);
    }

    pub fn suspect_after_crash(&self, until: u64) -> Result<()> {
        for entry in self.view().entries() {
            let mut entry = entry?;
            self.locks.note_crash();
            entry.debris.doubtful_until = entry.debris.doubtful_until.max(until);
            self.put_entry(&entry)?;
        }
        Ok(())
    }

    /// How many entries of debris are due.
    pub fn left(&self) -> Result<u64> {
        let mut left = 0;
        self.due(|_| {
            left += 1;
            Ok(())
        })?;
        Ok(left)
    }

    pub fn forget_lost(&self, is_lost: impl Fn(&str) -> bool) -> Result<u64> {
        let mut keep_until = 0;
        for entry in self.view().entries() {
            let mut entry = entry?;
            keep_until = keep_until.max(entry.debris.keep_until);
            self.drop_replicas(&mut entry, |replica| is_lost(replica))?;
        }
        Ok(keep_until)
    }

    pub fn locked(&self) -> usize {
        self.locks.count()
    }

    pub(super) fn hold(&self, key: &[u8], owner: Owner) -> Result<Option<Held<'_>>> {
        let Some(lock) = self.locks.lock(key, owner) else { return Ok(None) };
        Ok(Some(Held { lock, record: self.get(key)? }))
    }

    /// The version of a blob that is about to be written. No path ever holds two values: the plain name is used only if
    /// no blob of the key can lie anywhere; otherwise the version is one that the key never had. Masters of two
    /// generations may not know of each other: only the first one uses plain names, and the last bits of a version are
    /// the generation's.
    pub(super) fn new_version(&self, key: &[u8], old: Option<&Record>) -> Result<u64> {
        let (debris, generation) = (self.debris(key)?, self.generation());
        let versions = debris.iter().map(|(version, _)| *version).chain(old.map(|old| old.version));
        let highest = match versions.max() {
            Some(highest) => highest,
            None if generation > 0 || self.locks.is_plain_name_unsafe(key) => 0,
            None => return Ok(0),
        };
        let version = (now().as_micros() as u64).max(highest + 1);
        Ok(version + generation.wrapping_sub(version) % GENERATIONS)
    }
}

fn owner(passing: bool) -> Owner {
    if passing { Owner::Passing } else { Owner::Client }
}

/// The time since 1970.
pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
