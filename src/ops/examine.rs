//! What is wrong with one key: its record and debris compared with the blobs on the volumes.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use rayon::prelude::*;

use super::scan::Blob;
use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::record::{Debris, Hash, Record};
use crate::index::Index;
use crate::store::Store;

/// Give up after this many looks at a key that keeps changing.
const ROUNDS: u64 = 50;

/// How many looks in a row must give the same finding beside a running master: the key may be written again and again.
const STEADY: u64 = 5;

/// How often a volume is asked for a blob before it counts as silent: a disk may be slow.
const TRIES: u64 = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Missing,
    WrongSize,
    WrongBytes,
    Silent,
    Debris,
    Surplus,
    Stale,
    Newer,
    Unknown,
}

impl Kind {
    pub fn title(self) -> &'static str {
        match self {
            Kind::Missing => "replicas missing",
            Kind::WrongSize => "replicas of the wrong size",
            Kind::WrongBytes => "replicas with the wrong bytes",
            Kind::Silent => "replicas on a volume that does not answer",
            Kind::Debris => "debris",
            Kind::Surplus => "surplus replicas",
            Kind::Stale => "stale versions",
            Kind::Newer => "versions newer than the index",
            Kind::Unknown => "blobs of keys that the index does not know",
        }
    }
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    pub kind: Kind,
    pub version: u64,
    pub replica: String,
}

/// A key to look at again, and the blobs that were listed for it and that its record does not name.
pub type Suspect = (Vec<u8>, Vec<Blob>);

/// Looks at keys, through an index and the volumes.
pub struct Examiner {
    pub store: Arc<Store>,
    /// A master is writing the index meanwhile.
    pub running: bool,
    /// Whether to read every blob.
    pub deep: bool,
}

impl Examiner {
    /// The same examiner on another view of the same index.
    pub fn with_index(&self, index: Index) -> Examiner {
        let store = Store::new(self.store.config.clone(), index, self.store.volumes.clone());
        Examiner { store, ..*self }
    }

    /// Asks the volumes themselves about suspects, and asks again as long as the index changes meanwhile: what a running
    /// master writes just now is no finding. Returns those with findings.
    pub fn look_again<'a>(&self, mut left: Vec<&'a Suspect>) -> Result<Vec<(&'a Suspect, Vec<Finding>)>> {
        let mut confirmed = Vec::new();
        let state = |key: &[u8]| Ok((self.store.index.get(key)?, self.store.index.debris(key)?));
        let mut last: HashMap<&[u8], (_, _, u64)> = HashMap::new();
        let mut pause = Duration::from_millis(if self.running { 100 } else { 0 });
        for round in 0..ROUNDS {
            if round > 0 {
                std::thread::sleep(pause);
            }
            self.store.index.catch_up()?;
            let look = |suspect: &&'a Suspect| Ok((*suspect, state(&suspect.0)?, self.look(suspect)?));
            let looked: Vec<_> = left.par_iter().map(look).collect::<Result<_>>()?;
            self.store.index.catch_up()?;
            left.clear();
            for (suspect, before, findings) in looked {
                if findings.is_empty() {
                    continue;
                }
                let key = &suspect.0[..];
                let same = last.remove(key).filter(|(s, f, _)| *s == before && *f == findings);
                let unchanged = u64::from(state(key)? == before);
                let times = same.map_or(0, |(_, _, times)| times) + unchanged;
                let silent = findings.iter().any(|finding| finding.kind == Kind::Silent);
                let needed = if silent {
                    TRIES
                } else if self.running {
                    STEADY
                } else {
                    1
                };
                if times >= needed {
                    confirmed.push((suspect, findings));
                    continue;
                }
                if silent {
                    pause = Duration::from_secs(1);
                }
                left.push(suspect);
                last.insert(key, (before, findings, times));
            }
            if left.is_empty() {
                break;
            }
        }
        Ok(confirmed)
    }

    /// The length of the blob on this replica, in bytes; `None` if it is missing or cannot be read. Fails if the volume
    /// does not answer, which is no sign that the blob is missing.
    pub fn size(&self, replica: &str, blob: &str) -> Result<Option<u64>> {
        // A volume that hangs would otherwise cost each key a time-out.
        if self.store.volumes.is_down(replica) {
            let why = "it did not answer a moment ago".into();
            return Err(Error::Unreachable { volume: replica.into(), why, maybe_done: false });
        }
        let answer = self.store.volumes.head(replica, blob, self.store.own_auth());
        if matches!(answer, Err(Error::Unreachable { .. })) {
            return answer;
        }
        self.readable(replica, answer)
    }

    /// Turns an error into `None` if the volume answers other requests: a file that cannot be read is no replica.
    fn readable<T>(&self, replica: &str, answer: Result<Option<T>>) -> Result<Option<T>> {
        let login = || self.store.volumes.accepts_login(replica, self.store.own_auth());
        answer.or_else(|error| if login() == Ok(true) { Ok(None) } else { Err(error) })
    }

    fn look(&self, (key, listed): &Suspect) -> Result<Vec<Finding>> {
        let record = self.store.index.get(key)?;
        let debris = self.store.index.debris(key)?;
        let mut places: BTreeSet<(u64, &String)> = listed.iter().map(|blob| (blob.version, &blob.replica)).collect();
        let named = record.iter().map(|record| (record.version, &record.replicas));
        let entries = debris.iter().map(|(version, entry)| (*version, &entry.replicas));
        for (version, replicas) in named.chain(entries) {
            places.extend(replicas.iter().map(|replica| (version, replica)));
        }
        let (mut blobs, mut silent) = (Vec::new(), Vec::new());
        for (version, replica) in places {
            match self.size(replica, &path(key, version)) {
                Ok(None) => {}
                Ok(Some(size)) => {
                    blobs.push(Blob { replica: replica.clone(), version, size, time: 0 });
                }
                Err(Error::Unreachable { .. }) => silent.push((version, replica.clone())),
                Err(error) => return Err(error),
            }
        }
        self.examine(key, &blobs, &silent, record.as_ref(), &debris)
    }

    /// What is wrong with a key that has these blobs, `silent` being the places that could not be asked.
    pub fn examine(
        &self,
        key: &[u8],
        blobs: &[Blob],
        silent: &[(u64, String)],
        record: Option<&Record>,
        debris: &[(u64, Debris)],
    ) -> Result<Vec<Finding>> {
        let mut findings = BTreeSet::new();
        let mut add = |kind, version, replica: &str| {
            findings.insert(Finding { kind, version, replica: replica.to_string() });
        };
        for (version, replica) in silent {
            add(Kind::Silent, *version, replica);
        }
        for (version, entry) in debris {
            for replica in &entry.replicas {
                if !record.is_some_and(|record| record.is_at(*version, replica)) {
                    add(Kind::Debris, *version, replica);
                }
            }
        }
        for blob in blobs {
            let is_debris = |(v, entry): &(u64, Debris)| *v == blob.version && entry.replicas.contains(&blob.replica);
            let kind = match record {
                Some(record) if record.is_at(blob.version, &blob.replica) => continue,
                _ if debris.iter().any(is_debris) => continue,
                Some(record) if record.version == blob.version => Kind::Surplus,
                Some(record) if record.version < blob.version => Kind::Newer,
                Some(_) => Kind::Stale,
                None => Kind::Unknown,
            };
            add(kind, blob.version, &blob.replica);
        }
        if let Some(record) = record {
            for (kind, replica) in self.examine_replicas(key, record, blobs, silent)? {
                add(kind, record.version, &replica);
            }
        }
        Ok(findings.into_iter().collect())
    }

    /// What is wrong with the replicas that the record names.
    fn examine_replicas(
        &self,
        key: &[u8],
        record: &Record,
        blobs: &[Blob],
        silent: &[(u64, String)],
    ) -> Result<Vec<(Kind, String)>> {
        let (mut wrong, mut sound) = (Vec::new(), Vec::new());
        for replica in &record.replicas {
            let mut blobs = blobs.iter();
            match blobs.find(|blob| blob.version == record.version && blob.replica == *replica) {
                None if silent.contains(&(record.version, replica.clone())) => {}
                None => wrong.push((Kind::Missing, replica.clone())),
                // No value is empty.
                Some(blob) if record.size.map_or(blob.size == 0, |size| size != blob.size) => {
                    wrong.push((Kind::WrongSize, replica.clone()));
                }
                Some(blob) => sound.push(blob),
            }
        }
        let differ = sound.windows(2).any(|pair| pair[0].size != pair[1].size);
        if self.deep || differ {
            let bad = self.wrong_bytes(key, record, &sound)?;
            wrong.extend(bad.into_iter().map(|replica| (Kind::WrongBytes, replica)));
        }
        Ok(wrong)
    }

    /// Reads the replicas and returns those whose md5 is not the record's or, if the record has none, not that of the
    /// majority.
    pub fn wrong_bytes(&self, key: &[u8], record: &Record, blobs: &[&Blob]) -> Result<Vec<String>> {
        let mut digests: HashMap<Option<Hash>, Vec<String>> = HashMap::new();
        for blob in blobs {
            let (volumes, auth) = (&self.store.volumes, self.store.own_auth());
            let digest = volumes.digest(&blob.replica, &path(key, record.version), auth);
            let digest = self.readable(&blob.replica, digest)?;
            digests.entry(digest.map(|(hash, _)| hash)).or_default().push(blob.replica.clone());
        }
        let right = record.hash.or_else(|| {
            let mut ranked: Vec<_> = digests.iter().map(|(hash, replicas)| (replicas.len(), *hash)).collect();
            ranked.sort();
            let (most, hash) = ranked.pop()?;
            ranked.last().is_none_or(|(second, _)| *second < most).then_some(hash).flatten()
        });
        digests.retain(|hash, _| hash.is_none() || *hash != right);
        Ok(digests.into_values().flatten().collect())
    }

    /// Those of the replicas that have the record's blob, in any length. Volumes that do not answer are left out.
    pub fn present<'a>(
        &self,
        key: &[u8],
        record: &Record,
        replicas: impl Iterator<Item = &'a String>,
    ) -> Result<Vec<Blob>> {
        let (blob, version) = (path(key, record.version), record.version);
        let mut present = Vec::new();
        for replica in replicas {
            match self.size(replica, &blob) {
                Ok(Some(size)) => {
                    present.push(Blob { replica: replica.clone(), version, size, time: 0 });
                }
                Ok(None) | Err(Error::Unreachable { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(present)
    }
}
