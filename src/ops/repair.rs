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
        let sound = self.present(key, &record, named)?;
        // Before something is removed the bytes have to be right, not only the length.
        if !of(&[Kind::Surplus, Kind::Stale]).is_empty() && !self.deep {
            bad.extend(self.wrong_bytes(key, &record, &sound.iter().collect::<Vec<_>>())?);
        }
        if bad.is_empty() {
            return Ok(());
        }
        let any = !sound.is_empty() || !of(&[Kind::WrongSize, Kind::WrongBytes]).is_empty();
        let mut sources: Vec<Blob> = sound.into_iter().filter(|blob| !bad.contains(&blob.replica)).collect();
        if record.hash.is_some() {
            let others = of(&[Kind::Surplus, Kind::Debris]);
            sources.extend(self.present(key, &record, others.iter())?);
        }
        if sources.is_empty() {
            let text = "none of its replicas is known to hold the right bytes";
            return Err(if any { Error::Failed(text.into()) } else { Error::Gone });
        }
        let sources: Vec<String> = sources.into_iter().map(|blob| blob.replica).collect();
        self.store.restore(key, &sources, &bad)
    }

    /// Removes surplus replicas, stale versions and debris of a key.
    pub fn remove(&self, key: &[u8], findings: &[Finding]) -> Result<()> {
        let is_surplus = |f: &&Finding| matches!(f.kind, Kind::Surplus | Kind::Stale);
        let surplus: Vec<&Finding> = findings.iter().filter(is_surplus).collect();
        if let Some(record) = self.store.index.get(key)?.filter(|_| !surplus.is_empty()) {
            let present = self.check_whole(key, &record)?;
            for finding in surplus {
                self.remove_surplus(key, &record, &present, finding)?;
            }
        }
        self.store.clear_due(key, now())
    }

    /// The replicas of a record, or an error if not all of them are right.
    fn check_whole(&self, key: &[u8], record: &Record) -> Result<Vec<Blob>> {
        let volumes = &self.store.config.placement.volumes;
        let is_known = |replica: &&String| volumes.iter().any(|v| v == volume_of(replica));
        if let Some(stranger) = record.replicas.iter().find(|replica| !is_known(replica)) {
            return Err(Error::Failed(format!("its record names {stranger}, which is not in -volumes: check -db")));
        }
        let present = self.present(key, record, record.replicas.iter())?;
        let wrong = self.wrong_bytes(key, record, &present.iter().collect::<Vec<_>>())?;
        if present.len() < record.replicas.len() || !wrong.is_empty() {
            let text = "its replicas are still not whole, so nothing of it is removed";
            return Err(Error::Failed(text.into()));
        }
        Ok(present)
    }

    fn remove_surplus(&self, key: &[u8], record: &Record, present: &[Blob], finding: &Finding) -> Result<()> {
        let (replica, is_surplus) = (&finding.replica, finding.kind == Kind::Surplus);
        // A newer index than this one may name it.
        if is_surplus && self.store.place(key).contains(replica) {
            let text = "a surplus replica lies where it is wanted: mkv rebalance takes it up";
            return Err(Error::Failed(text.into()));
        }
        let other = self.present(key, record, [replica].into_iter())?;
        if is_surplus && other.is_empty() {
            return Ok(());
        }
        let all: Vec<&Blob> = present.iter().chain(&other).collect();
        if record.hash.is_none() && !self.wrong_bytes(key, record, &all)?.is_empty() {
            let text = "a surplus replica has other bytes, and no hash tells which are right";
            return Err(Error::Failed(text.into()));
        }
        let blob = path(key, finding.version);
        self.store.volumes.delete(replica, &blob, self.store.own_auth()).map(drop)
    }

    /// Removes blobs of a key that the index does not know and that are at least `grace` seconds old.
    pub fn remove_strays(&self, (key, listed): &Suspect, findings: &[Finding], grace: u64) -> Result<()> {
        for finding in findings.iter().filter(|finding| finding.kind == Kind::Unknown) {
            let mut listed = listed.iter();
            let blob = listed.find(|b| b.replica == finding.replica && b.version == finding.version);
            let age = blob.map(|blob| now().saturating_sub(blob.time));
            if age.is_some_and(|age| age >= grace) {
                let blob = path(key, finding.version);
                self.store.volumes.delete(&finding.replica, &blob, self.store.own_auth())?;
            }
        }
        Ok(())
    }
}
