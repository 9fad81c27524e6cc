//! The cleaner: deletes in the background what no record names any more.
//!
//! Before it deletes a blob it flushes the index, so that no power cut can bring back the record that named the blob.
//! It gives way to writers and holds no key's lock while it asks volumes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::write::unwanted;
use super::{Store, now};
use crate::error::Result;
use crate::format::placement::path;
use crate::format::quoted;
use crate::format::record::Record;
use crate::index::{Deleted, Entry, Stage};

/// How long a 404 proves nothing for debris that a crash left, in seconds.
const AFTER_CRASH: u64 = 10;

/// How often the cleaner tries again what it could not delete.
const INTERVAL: Duration = Duration::from_secs(5);

/// How many keys the cleaner works on at the same time.
const WIDTH: usize = 32;

impl Store {
    /// Distrusts 404s for a while: writes from before a crash may still land.
    pub fn suspect_after_crash(&self) -> Result<()> {
        self.index.suspect_after_crash(now() + AFTER_CRASH)
    }

    /// Warns if the index is empty and a volume is not: with a mistyped `-db` a PUT would replace another store's blob.
    /// Volumes that do not answer are skipped.
    pub fn warn_if_index_lost(&self) {
        let is_empty = || self.index.is_empty() == Ok(true);
        if !is_empty() {
            return;
        }
        for name in &self.config.placement.volumes {
            let found = self.volumes.has_blobs(name, self.own_auth());
            // The index is asked again because the blobs may be this store's first ones.
            if found == Ok(true) && is_empty() {
                log::warn!(
                    "the index is empty, but volume {name} has folders of blobs: if a store lies \
                     there, stop, and check -db or run mkv rebuild"
                );
            }
        }
    }

    /// The cleaner's thread. It never ends.
    pub fn clean(self: &Arc<Store>) {
        loop {
            let begun = Instant::now();
            // A panic is in the log; it ends this round and not the cleaner.
            if let Ok(Err(error)) = catch_unwind(AssertUnwindSafe(|| self.clean_once())) {
                log::error!("cleaner: {error}");
            }
            while self.woken.recv_timeout(INTERVAL).is_err() && !self.index.leads() {}
            // Take deletions that come one by one together.
            std::thread::sleep(Duration::from_millis(20).min(begun.elapsed()));
        }
    }

    /// One round over all debris that is due.
    pub fn clean_once(self: &Arc<Store>) -> Result<()> {
        let mut batch = Vec::new();
        self.index.due(|entry| {
            batch.push(entry);
            if batch.len() >= WIDTH { self.clean_batch(&mut batch) } else { Ok(()) }
        })?;
        self.clean_batch(&mut batch)
    }

    fn clean_batch(self: &Arc<Store>, batch: &mut Vec<Entry>) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        self.index.sync()?;
        let store = self.clone();
        let clean = move |mut entry: Entry| {
            // One key that cannot be cleaned does not keep the cleaner from the others.
            if let Err(error) = store.clean_entry(&mut entry) {
                log::error!("cleaner: {}: {error}", quoted(&entry.key));
            }
        };
        self.volumes.pool.each(std::mem::take(batch), clean);
        Ok(())
    }

    fn clean_entry(&self, entry: &mut Entry) -> Result<()> {
        let Some(held) = self.index.hold_to_clean(entry)? else { return Ok(()) };
        let targets = unwanted(&held, entry, &entry.debris.replicas);
        let successor = held.record.clone().filter(|record| record.version == entry.version);
        let clearing = self.index.release(held, entry);
        if entry.stage == Stage::Deleted && successor.is_some() && self.are_absent(entry, &targets)? {
            let deleted = Deleted { asked: targets.clone(), gone: targets, ..Deleted::default() };
            return self.index.forget_released(clearing, entry, &deleted);
        }
        // A power cut on a volume may have cost the copies that replace surplus replicas.
        let needed = successor.as_ref().filter(|_| entry.debris.keep_until > 0);
        if needed.is_some_and(|record| !self.is_whole(&entry.key, record)) {
            log::info!("surplus of {} stays: a replica is missing", quoted(&entry.key));
            return Ok(());
        }
        if !self.index.mark(entry, successor.as_ref())? {
            return Ok(());
        }
        let deleted = self.delete_blobs(entry, targets, false, self.own_auth());
        if let Some(error) = &deleted.failed {
            log::info!("debris of {} stays for now: {error}", quoted(&entry.key));
        }
        // If a writer has come meanwhile, the next round sees that the blobs are gone.
        self.index.forget_released(clearing, entry, &deleted)
    }

    /// Whether none of these replicas has the entry's blob. Fails if a volume does not answer.
    fn are_absent(&self, entry: &Entry, replicas: &[String]) -> Result<bool> {
        let blob = path(&entry.key, entry.version);
        for replica in replicas {
            if self.volumes.head(replica, &blob, self.own_auth())?.is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether all replicas of a record are seen to be there.
    fn is_whole(&self, key: &[u8], record: &Record) -> bool {
        let silent = record.replicas.iter().any(|replica| self.volumes.is_down(replica));
        !silent
            && self
                .present(key, record, record.replicas.iter(), self.own_auth())
                .is_ok_and(|present| present.len() == record.replicas.len())
    }
}
