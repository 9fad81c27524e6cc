//! What is wrong with one key: its record and debris compared with the blobs on the volumes.

use std::cmp::Ordering;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use rayon::prelude::*;

use super::scan::Blob;
use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::record::{Debris, Hash, Record};
use crate::index::Index;
use crate::store::{Store, now};

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

/// What the index holds for a key: its record and its debris by version.
pub type State = (Option<Record>, Vec<(u64, Debris)>);

/// What one look at a key showed: its state, and what is wrong.
type Look = (State, Vec<Finding>);

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

    /// Asks the volumes themselves about suspects, and asks again as long as the index changes meanwhile: a write of a
    /// running master is no finding. Returns those with findings.
    pub fn look_again<'a>(&self, mut left: Vec<&'a Suspect>) -> Result<Vec<(&'a Suspect, Vec<Finding>)>> {
        let mut confirmed = Vec::new();
        // What the last look at a key showed, and how many looks in a row showed it.
        let mut last: HashMap<&[u8], (Look, u64)> = HashMap::new();
        let mut pause = Duration::from_millis(if self.running { 100 } else { 0 });
        for round in 0..ROUNDS {
            if left.is_empty() {
                break;
            }
            if round > 0 {
                std::thread::sleep(pause);
            }
            self.store.index.catch_up()?;
            let look = |suspect: &&'a Suspect| Ok((*suspect, self.look(suspect)?));
            let looked: Vec<_> = left.par_iter().map(look).collect::<Result<_>>()?;
            self.store.index.catch_up()?;
            left.clear();
            for (suspect, look) in looked.into_iter().filter(|(_, (_, findings))| !findings.is_empty()) {
                let key = &suspect.0[..];
                let before = last.remove(key).filter(|(before, _)| *before == look).map_or(0, |(_, times)| times);
                let times = before + u64::from(self.state(key)? == look.0);
                let silent = look.1.iter().any(|finding| finding.kind == Kind::Silent);
                let needed = match (silent, self.running) {
                    (true, _) => TRIES,
                    (false, true) => STEADY,
                    (false, false) => 1,
                };
                if times >= needed {
                    confirmed.push((suspect, look.1));
                    continue;
                }
                if silent {
                    pause = Duration::from_secs(1);
                }
                left.push(suspect);
                last.insert(key, (look, times));
            }
        }
        Ok(confirmed)
    }

    fn state(&self, key: &[u8]) -> Result<State> {
        Ok((self.store.index.get(key)?, self.store.index.debris(key)?))
    }

    /// The blob on this replica; `None` if it is missing or cannot be read. Fails if the volume does not answer, which
    /// is no sign that the blob is missing.
    pub fn blob(&self, key: &[u8], version: u64, replica: &str) -> Result<Option<Blob>> {
        // A volume that hangs would otherwise cost each key a time-out.
        if self.store.volumes.is_down(replica) {
            let why = "it did not answer a moment ago".into();
            return Err(Error::Unreachable { volume: replica.into(), why, maybe_done: false });
        }
        let size = match self.store.volumes.head(replica, &path(key, version), self.store.own_auth()) {
            Err(error @ Error::Unreachable { .. }) => return Err(error),
            answer => self.readable(replica, answer)?,
        };
        Ok(size.map(|size| Blob { replica: replica.into(), version, size, time: 0 }))
    }

    /// Turns an error into `None` if the volume answers other requests: a file that cannot be read is no replica.
    fn readable<T>(&self, replica: &str, answer: Result<Option<T>>) -> Result<Option<T>> {
        let login = || self.store.volumes.accepts_login(replica, self.store.own_auth());
        answer.or_else(|error| if login() == Ok(true) { Ok(None) } else { Err(error) })
    }

    /// Asks the volumes about every blob of a key that the index or a listing names.
    fn look(&self, (key, listed): &Suspect) -> Result<Look> {
        let state = self.state(key)?;
        let named = state.0.iter().map(|record| (record.version, &record.replicas));
        let named = named.chain(state.1.iter().map(|(version, debris)| (*version, &debris.replicas)));
        let mut places: BTreeSet<(u64, &String)> = listed.iter().map(|blob| (blob.version, &blob.replica)).collect();
        for (version, replicas) in named {
            places.extend(replicas.iter().map(|replica| (version, replica)));
        }
        let (mut blobs, mut silent) = (Vec::new(), Vec::new());
        for (version, replica) in places {
            match self.blob(key, version, replica) {
                Err(Error::Unreachable { .. }) => silent.push((version, replica.clone())),
                blob => blobs.extend(blob?),
            }
        }
        let findings = self.examine(key, &blobs, &silent, &state)?;
        Ok((state, findings))
    }

    /// What is wrong with a key that has these blobs, `silent` being the places that could not be asked.
    pub fn examine(
        &self,
        key: &[u8],
        blobs: &[Blob],
        silent: &[(u64, String)],
        (record, debris): &State,
    ) -> Result<Vec<Finding>> {
        let mut findings = BTreeSet::new();
        let mut add = |kind, version, replica: &str| {
            findings.insert(Finding { kind, version, replica: replica.to_string() });
        };
        let is_record = |version, replica: &str| record.as_ref().is_some_and(|r| r.is_at(version, replica));
        for (version, replica) in silent {
            add(Kind::Silent, *version, replica);
        }
        // What rests until later is wanted: parts of uploads, and replicas that a rebalance has replaced.
        for (version, entry) in debris.iter().filter(|(_, entry)| entry.keep_until <= now()) {
            for replica in entry.replicas.iter().filter(|replica| !is_record(*version, replica)) {
                add(Kind::Debris, *version, replica);
            }
        }
        for Blob { version, replica, .. } in blobs {
            if is_record(*version, replica) || is_debris(debris, *version, replica) {
                continue;
            }
            let kind = match record.as_ref().map(|record| version.cmp(&record.version)) {
                Some(Ordering::Equal) => Kind::Surplus,
                Some(Ordering::Greater) => Kind::Newer,
                Some(Ordering::Less) => Kind::Stale,
                None => Kind::Unknown,
            };
            add(kind, *version, replica);
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
            match blobs.iter().find(|blob| blob.version == record.version && blob.replica == *replica) {
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
            let bad = self.wrong_bytes(key, record, sound.iter().map(|blob| &blob.replica))?;
            wrong.extend(bad.into_iter().map(|replica| (Kind::WrongBytes, replica)));
        }
        Ok(wrong)
    }

    /// Reads the replicas and returns those whose md5 is not the record's or, if the record has none, not that of the
    /// majority.
    pub fn wrong_bytes<'a>(
        &self,
        key: &[u8],
        record: &Record,
        replicas: impl IntoIterator<Item = &'a String>,
    ) -> Result<Vec<String>> {
        let mut digests: HashMap<Option<Hash>, Vec<String>> = HashMap::new();
        let blob = path(key, record.version);
        for replica in replicas {
            let digest = self.store.volumes.digest(replica, &blob, self.store.own_auth());
            let digest = self.readable(replica, digest)?;
            digests.entry(digest.map(|(hash, _)| hash)).or_default().push(replica.clone());
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
        replicas: impl IntoIterator<Item = &'a String>,
    ) -> Result<Vec<String>> {
        let mut present = Vec::new();
        for replica in replicas {
            match self.blob(key, record.version, replica) {
                Err(Error::Unreachable { .. }) => {}
                blob => present.extend(blob?.map(|blob| blob.replica)),
            }
        }
        Ok(present)
    }
}

/// Whether debris names the blob of this version on this replica.
pub fn is_debris(debris: &[(u64, Debris)], version: u64, replica: &String) -> bool {
    debris.iter().any(|(v, debris)| *v == version && debris.replicas.contains(replica))
}
