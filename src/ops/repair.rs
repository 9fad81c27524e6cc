//! Repair of one key, for `verify -repair`.
//!
//! 1. Replicas that are missing or wrong are made anew from one that is known to be right.
//! 2. Surplus replicas, stale versions and debris are removed, but only after all replicas of the record were just seen
//!    to be right.
//! 3. Blobs of keys that the index does not know are removed only with `-strays`, when they are older than `-grace`.
//!
//! A repair that is killed at any point is completed by the next one.

use super::examine::{Examiner, Finding, Kind, Suspect};
use super::scan::Blob;
use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::record::{Record, volume_of};
use crate::store::now;

impl Examiner {
    /// Makes missing and wrong replicas anew.
    pub fn restore(&self, key: &[u8], findings: &[Finding]) -> Result<()> {
        let Some(record) = self.store.index.get(key)? else { return Ok(()) };
        let of = |kinds: &[Kind]| -> Vec<String> {
            let found = findings.iter().filter(|finding| kinds.contains(&finding.kind));
            found.map(|finding| finding.replica.clone()).collect()
        };
        let mut bad = of(&[Kind::Missing, Kind::WrongSize, Kind::WrongBytes]);
        let named = record.replicas.iter().filter(|replica| !bad.contains(replica));
        let mut sources = self.present(key, &record, named)?;
        let any = !sources.is_empty() || !of(&[Kind::WrongSize, Kind::WrongBytes]).is_empty();
        // Before something is removed the bytes have to be right, not only the length.
        if !of(&[Kind::Surplus, Kind::Stale]).is_empty() && !self.deep {
            bad.extend(self.wrong_bytes(key, &record, &sources)?);
        }
        if bad.is_empty() {
            return Ok(());
        }
        sources.retain(|replica| !bad.contains(replica));
        if record.hash.is_some() {
            sources.extend(self.present(key, &record, &of(&[Kind::Surplus, Kind::Debris]))?);
        }
        match (sources.is_empty(), any) {
            (true, true) => Err(Error::Failed("none of its replicas is known to hold the right bytes".into())),
            (true, false) => Err(Error::Gone),
            (false, _) => self.store.restore(key, &sources, &bad),
        }
    }

    /// Removes surplus replicas, stale versions and debris of a key.
    pub fn remove(&self, key: &[u8], findings: &[Finding]) -> Result<()> {
        let mut surplus = findings.iter().filter(|f| matches!(f.kind, Kind::Surplus | Kind::Stale)).peekable();
        if surplus.peek().is_some()
            && let Some(record) = self.store.index.get(key)?
        {
            self.check_whole(key, &record)?;
            surplus.try_for_each(|finding| self.remove_surplus(key, &record, finding))?;
        }
        self.store.clear_due(key, now())
    }

    /// Fails unless all replicas of a record are right.
    fn check_whole(&self, key: &[u8], record: &Record) -> Result<()> {
        let volumes = &self.store.config.placement.volumes;
        let is_known = |replica: &&String| volumes.iter().any(|v| v == volume_of(replica));
        if let Some(stranger) = record.replicas.iter().find(|replica| !is_known(replica)) {
            return Err(Error::Failed(format!("its record names {stranger}, which is not in -volumes: check -db")));
        }
        let present = self.present(key, record, &record.replicas)?;
        if present.len() < record.replicas.len() || !self.wrong_bytes(key, record, &present)?.is_empty() {
            let text = "its replicas are still not whole, so nothing of it is removed";
            return Err(Error::Failed(text.into()));
        }
        Ok(())
    }

    /// Removes a surplus replica or a stale version of a key whose replicas are all right.
    fn remove_surplus(&self, key: &[u8], record: &Record, finding: &Finding) -> Result<()> {
        let (replica, is_surplus) = (&finding.replica, finding.kind == Kind::Surplus);
        // A newer index than this one may name it.
        if is_surplus && self.store.place(key).contains(replica) {
            let text = "a surplus replica lies where it is wanted: mkv rebalance takes it up";
            return Err(Error::Failed(text.into()));
        }
        let other = self.present(key, record, [replica])?;
        if is_surplus && other.is_empty() {
            return Ok(());
        }
        let all = record.replicas.iter().chain(&other);
        if record.hash.is_none() && !self.wrong_bytes(key, record, all)?.is_empty() {
            let text = "a surplus replica has other bytes, and no hash tells which are right";
            return Err(Error::Failed(text.into()));
        }
        self.delete(key, finding)
    }

    fn delete(&self, key: &[u8], finding: &Finding) -> Result<()> {
        if self.store.index.condemn(key, finding.version, &finding.replica)? {
            return Ok(());
        }
        let blob = path(key, finding.version);
        self.store.volumes.delete(&finding.replica, &blob, self.store.own_auth()).map(drop)
    }

    /// Removes blobs of a key that the index does not know and that are at least `grace` seconds old.
    pub fn remove_strays(&self, (key, listed): &Suspect, findings: &[Finding], grace: u64) -> Result<()> {
        for finding in findings.iter().filter(|finding| finding.kind == Kind::Unknown) {
            let is_found = |blob: &&Blob| blob.replica == finding.replica && blob.version == finding.version;
            if listed.iter().find(is_found).is_some_and(|blob| now().saturating_sub(blob.time) >= grace) {
                self.delete(key, finding)?;
            }
        }
        self.store.clear_due(key, now())
    }
}
