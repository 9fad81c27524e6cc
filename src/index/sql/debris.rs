//! Debris: what the cleaner deletes.
//!
//! An entry shrinks or ends only if its row still is what was read before the DELETEs were sent. Several masters may
//! work on one entry: to delete a blob twice does no harm, because no version comes back.
//!
//! But for a record's own version, which a rebalance may bring back to a volume. Before such blobs are deleted their
//! entry is marked, which keeps it for as long as the DELETEs may be carried out, and these are sent soon after the
//! mark. A rebalance copies to no replica that an entry names. After that time the entry ends if no blob is there.

use std::time::Duration;

use super::connection::Arg::{self, Bool, Bytes, Int, Text};
use super::statements as sql;
use super::{Engine, entry, now, signed};
use crate::error::{Error, Result};
use crate::format::record::Record;
use crate::index::locks::{Clearing, Owner};
use crate::index::{Deleted, Entry, Held, Stage};

/// The longest time between two attempts to delete what may still appear, in seconds.
const POSTPONE: u64 = 30;

impl Engine {
    pub fn due(&self, mut f: impl FnMut(Entry) -> Result<()>) -> Result<()> {
        self.entry_pages(sql::DUE, b"").try_for_each(|entry| f(entry?))
    }

    pub fn hold_to_clean(&self, found: &mut Entry) -> Result<Option<Held<'_>>> {
        let Some(lock) = self.locks.lock(&found.key, Owner::Cleaner) else { return Ok(None) };
        let version = found.version as i64;
        let rows = self.pool.read(sql::ENTRY, &[Bytes(&found.key), Int(version)])?;
        let Some(row) = rows.first() else { return Ok(None) };
        let entry = entry(&found.key, version, row);
        // It was due when it was listed. It can rest since.
        let rests = entry.debris.keep_until > now();
        if rests || entry.stage == Stage::Deleted && entry.debris.doubtful_until > 0 {
            return Ok(None);
        }
        // Read after the entry: a flip that made the record's blobs debris meanwhile is in both, or in the record alone.
        let record = self.get(&found.key)?;
        *found = entry;
        Ok(Some(Held { lock, record }))
    }

    pub fn mark(&self, entry: &mut Entry, record: Option<&Record>) -> Result<bool> {
        let is_unwanted = |replica: &String| record.is_some_and(|r| !r.is_at(entry.version, replica));
        if record.is_none_or(|r| r.version != entry.version) || !entry.debris.replicas.iter().any(is_unwanted) {
            return Ok(true);
        }
        let (at, text) = (boot_time(), entry.debris.replicas.join(","));
        let args = [Bytes(&entry.key), Int(entry.version as i64), Text(&text), Int(self.late() + self.late() / 60)];
        let marked = !self.pool.query(sql::MARK, &args)?.is_empty();
        entry.stage = Stage::Marked { at };
        Ok(marked)
    }

    pub fn release(&self, held: Held, entry: &Entry) -> Clearing<'_> {
        let guard = self.locks.clear(held.key(), entry.version);
        drop(held);
        guard
    }

    pub fn forget(&self, entry: &mut Entry, deleted: &Deleted) -> Result<()> {
        let mut row = entry.debris.replicas.join(",");
        let name = [Bytes(&entry.key), Int(entry.version as i64)];
        let query = |statement, row: &str, args: &[Arg]| {
            self.pool.query(statement, &[&[name[0], name[1], Text(row)], args].concat())
        };
        if let Stage::Marked { .. } = entry.stage {
            if deleted.failed.is_none() {
                query(sql::GONE, &row, &[])?;
            }
            return Ok(());
        }
        let is_left = |replica: &&String| deleted.asked.contains(replica) && !deleted.gone.contains(replica);
        let left: Vec<String> = entry.debris.replicas.iter().filter(is_left).cloned().collect();
        if left.is_empty() {
            query(sql::FORGET, &row, &[Bool(entry.stage == Stage::Deleted)])?;
        } else if left.len() < entry.debris.replicas.len() {
            query(sql::SHRINK, &row, &[Text(&left.join(","))])?;
            row = left.join(",");
        }
        if !left.is_empty() && deleted.failed.is_none() {
            let pause = entry.debris.doubtful_until.saturating_sub(now()).clamp(1, POSTPONE);
            query(sql::POSTPONE, &row, &[Int(pause as i64)])?;
        }
        entry.debris.replicas = left;
        Ok(())
    }

    /// Makes a blob debris that neither a record nor debris names. One of the record's version needs a claim.
    pub fn condemn(&self, key: &[u8], version: u64, replica: &str) -> Result<()> {
        if self.get(key)?.is_some_and(|record| record.version == version) {
            self.claim_row(key, version, &[replica.to_string()])?.abandon(0);
            return Ok(());
        }
        let args = [Bytes(key), Int(signed(key, version)?), Int(0), Text(replica)];
        Ok(self.pool.query(sql::ADD, &args).map(drop)?)
    }

    pub fn forget_lost(&self, is_lost: impl Fn(&str) -> bool) -> Result<u64> {
        let mut keep_until = 0;
        for found in self.entry_pages(sql::DUE_LATER, b"") {
            let mut found = found?;
            keep_until = keep_until.max(found.debris.keep_until);
            let (lost, asked): (Vec<_>, Vec<_>) = found.debris.replicas.iter().cloned().partition(|r| is_lost(r));
            if !lost.is_empty() {
                let failed = Some(Error::Gone);
                self.forget(&mut found, &Deleted { asked, failed, ..Deleted::default() })?;
            }
        }
        Ok(keep_until)
    }
}

/// Time since the machine started, with the time in which it was suspended.
pub fn boot_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
