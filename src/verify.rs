//! `mkv verify`: the index against the volumes, and repair.
//!
//! First every listing is compared with the index, then what is in the index and in no listing is
//! asked for. Each suspect is looked at again, after the index has caught up with a running master:
//! only what is still wrong is a finding. With `-repair`, whole replicas are restored first; what is
//! too much of a key goes only when all replicas of its record were just seen whole, and nothing
//! goes that is newer than the index or that the index does not know, but for `-strays`.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::index::{Index, decode, folder, is_locked, lock_dir};
use crate::options::Options;
use crate::placement::path;
use crate::rebuild::name;
use crate::record::{Debris, Hash, Record};
use crate::scan::{Blob, scan, show};
use crate::store::{Store, now};

/// Keys of the index that are asked for at the same time.
const BATCH: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Missing,
    WrongSize,
    WrongHash,
    Debris,
    Surplus,
    Stale,
    Newer,
    Unknown,
}

impl Kind {
    fn title(self) -> &'static str {
        match self {
            Kind::Missing => "replicas missing",
            Kind::WrongSize => "replicas of the wrong size",
            Kind::WrongHash => "replicas with the wrong bytes",
            Kind::Debris => "debris",
            Kind::Surplus => "surplus replicas",
            Kind::Stale => "stale versions",
            Kind::Newer => "versions newer than the index",
            Kind::Unknown => "blobs of keys that the index does not know",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    kind: Kind,
    key: Vec<u8>,
    version: u64,
    replica: String,
}

struct Verify {
    store: Arc<Store>,
    /// Keys of the index with a blob in some listing.
    seen: AtomicU64,
    unknown: AtomicU64,
    /// Keys to look at again, and the blobs that were listed for them.
    suspects: Mutex<HashMap<Vec<u8>, Vec<Blob>>>,
    strays: Mutex<BTreeSet<String>>,
}

pub fn run(options: Options) -> Result<()> {
    let index = folder(&options.db)?;
    let running = !options.repair && is_locked(&options.db);
    // Held to the end: no master starts while something is repaired.
    let _lock = if options.repair { Some(lock_dir(&options.db, false)?) } else { None };
    let index =
        if options.repair { Index::open(&index, false, false)? } else { Index::follow(&index)? };
    let mut records = 0u64;
    index.view().records(b"", b"", |_, _| {
        records += 1;
        Ok(true)
    })?;
    if options.repair && records == 0 {
        return Err(Error::Failed("-repair: the index is empty, so every blob would look superfluous: check -db, or run mkv rebuild".into()));
    }
    let verify = Verify {
        store: Store::new(options, index),
        seen: AtomicU64::new(0),
        unknown: AtomicU64::new(0),
        suspects: Mutex::default(),
        strays: Mutex::default(),
    };
    verify.look_at_listings()?;
    verify.look_at_index(records)?;
    let mut findings = verify.look_again()?;
    if verify.store.options.repair && !findings.is_empty() {
        verify.repair(&findings)?;
        findings = verify.look_again()?;
    }
    verify.report(&findings, records, running)
}

impl Verify {
    fn suspect(&self, key: &[u8], blobs: Vec<Blob>) {
        let mut suspects = self.suspects.lock().unwrap_or_else(|e| e.into_inner());
        suspects.entry(key.to_vec()).or_default().extend(blobs);
    }

    fn look_at_listings(&self) -> Result<()> {
        let options = &self.store.options;
        scan(&self.store.volumes, &options.volumes, self.store.own_auth(), |found| {
            if !found.strays.is_empty() {
                self.strays.lock().unwrap_or_else(|e| e.into_inner()).extend(found.strays);
            }
            for (key, blobs) in found.keys {
                let record = self.store.index.get(&key)?;
                let count = if record.is_some() { &self.seen } else { &self.unknown };
                count.fetch_add(1, Ordering::Relaxed);
                let sound = record.is_some_and(|record| {
                    self.examine(&key, &blobs, Some(&record), &[]).is_ok_and(|f| f.is_empty())
                });
                if !sound {
                    self.suspect(&key, blobs);
                }
            }
            Ok(())
        })
    }

    /// What no listing has shown: records without any blob, and debris.
    fn look_at_index(&self, records: u64) -> Result<()> {
        let view = self.store.index.view();
        view.debris(b"", |key, _, _| {
            self.suspect(key, Vec::new());
            Ok(())
        })?;
        if self.seen.load(Ordering::Relaxed) == records {
            return Ok(());
        }
        let ask = |batch: &mut Vec<(Vec<u8>, Record)>| -> Result<()> {
            let absent = batch.par_iter().map(|(key, record)| {
                let blob = path(key, record.version);
                for replica in &record.replicas {
                    if self.store.volumes.head(replica, &blob, self.store.own_auth())?.is_some() {
                        return Ok(());
                    }
                }
                self.suspect(key, Vec::new());
                Ok(())
            });
            absent.collect::<Result<()>>()?;
            batch.clear();
            Ok(())
        };
        let mut batch = Vec::new();
        view.records(b"", b"", |key, text| {
            batch.push((key.to_vec(), decode(key, Record::decode(text), text)?));
            if batch.len() == BATCH {
                ask(&mut batch)?;
            }
            Ok(true)
        })?;
        ask(&mut batch)
    }

    /// Looks at every suspect once more, asking the volumes themselves.
    fn look_again(&self) -> Result<BTreeSet<Finding>> {
        if !self.store.options.repair {
            self.store.index.catch_up()?;
        }
        let suspects = self.suspects.lock().unwrap_or_else(|e| e.into_inner());
        let all: Vec<Vec<Finding>> =
            suspects.par_iter().map(|(key, blobs)| self.look(key, blobs)).collect::<Result<_>>()?;
        Ok(all.into_iter().flatten().collect())
    }

    fn look(&self, key: &[u8], listed: &[Blob]) -> Result<Vec<Finding>> {
        let record = self.store.index.get(key)?;
        let debris = self.store.index.debris(key)?;
        let mut places: BTreeMap<(String, u64), u64> =
            listed.iter().map(|blob| ((blob.replica.clone(), blob.version), blob.time)).collect();
        let named = record.iter().map(|record| (record.version, &record.replicas));
        for (version, replicas) in
            named.chain(debris.iter().map(|(version, entry)| (*version, &entry.replicas)))
        {
            for replica in replicas {
                places.entry((replica.clone(), version)).or_default();
            }
        }
        let mut blobs = Vec::new();
        for ((replica, version), time) in places {
            if let Some(size) =
                self.store.volumes.head(&replica, &path(key, version), self.store.own_auth())?
            {
                blobs.push(Blob { replica, version, size, time });
            }
        }
        self.examine(key, &blobs, record.as_ref(), &debris)
    }

    /// What is wrong with a key that has these blobs.
    fn examine(
        &self,
        key: &[u8],
        blobs: &[Blob],
        record: Option<&Record>,
        debris: &[(u64, Debris)],
    ) -> Result<Vec<Finding>> {
        let mut findings = BTreeSet::new();
        let mut add = |kind, version, replica: &str| {
            findings.insert(Finding {
                kind,
                key: key.to_vec(),
                version,
                replica: replica.to_string(),
            });
        };
        for (version, entry) in debris {
            let kept = record.filter(|record| record.version == *version);
            for replica in &entry.replicas {
                if !kept.is_some_and(|record| record.replicas.contains(replica)) {
                    add(Kind::Debris, *version, replica);
                }
            }
        }
        let is_debris = |blob: &Blob| {
            debris
                .iter()
                .any(|(v, entry)| *v == blob.version && entry.replicas.contains(&blob.replica))
        };
        for blob in blobs {
            let kind = match record {
                Some(record)
                    if record.version == blob.version
                        && record.replicas.contains(&blob.replica) =>
                {
                    continue;
                }
                _ if is_debris(blob) => continue,
                Some(record) if record.version == blob.version => Kind::Surplus,
                Some(record) if record.version < blob.version => Kind::Newer,
                Some(_) => Kind::Stale,
                None => Kind::Unknown,
            };
            add(kind, blob.version, &blob.replica);
        }
        let Some(record) = record else { return Ok(findings.into_iter().collect()) };
        let mut sound = Vec::new();
        for replica in &record.replicas {
            match blobs
                .iter()
                .find(|blob| blob.version == record.version && blob.replica == *replica)
            {
                None => add(Kind::Missing, record.version, replica),
                Some(blob) if record.size.is_some_and(|size| size != blob.size) => {
                    add(Kind::WrongSize, record.version, replica);
                }
                Some(blob) => sound.push(blob),
            }
        }
        if self.store.options.deep {
            for replica in self.wrong_bytes(key, record, &sound)? {
                add(Kind::WrongHash, record.version, &replica);
            }
        }
        Ok(findings.into_iter().collect())
    }

    /// Reads the replicas: those whose md5 is not the record's or, where the record has none, not
    /// that of the majority.
    fn wrong_bytes(&self, key: &[u8], record: &Record, blobs: &[&Blob]) -> Result<Vec<String>> {
        let mut digests: HashMap<Option<Hash>, Vec<String>> = HashMap::new();
        for blob in blobs {
            let digest = self.store.volumes.digest(
                &blob.replica,
                &path(key, record.version),
                self.store.own_auth(),
            )?;
            digests.entry(digest.map(|(hash, _)| hash)).or_default().push(blob.replica.clone());
        }
        let right = record.hash.or_else(|| {
            let mut ranked: Vec<_> =
                digests.iter().map(|(hash, replicas)| (replicas.len(), *hash)).collect();
            ranked.sort();
            let (most, hash) = ranked.pop()?;
            ranked.last().is_none_or(|(second, _)| *second < most).then_some(hash).flatten()
        });
        digests.retain(|hash, _| hash.is_none() || *hash != right);
        Ok(digests.into_values().flatten().collect())
    }

    fn repair(&self, findings: &BTreeSet<Finding>) -> Result<()> {
        let mut keys: BTreeMap<&[u8], Vec<&Finding>> = BTreeMap::new();
        for finding in findings {
            keys.entry(&finding.key).or_default().push(finding);
        }
        for (key, findings) in keys {
            if let Err(error) = self.repair_key(key, &findings) {
                eprintln!("{} is not repaired: {error}", name(key));
            }
        }
        if self.store.options.strays {
            self.remove_strays(findings)?;
        }
        Ok(())
    }

    fn repair_key(&self, key: &[u8], findings: &[&Finding]) -> Result<()> {
        let (store, auth) = (&self.store, self.store.own_auth());
        let of = |kinds: &[Kind]| {
            findings.iter().filter(|f| kinds.contains(&f.kind)).copied().collect::<Vec<_>>()
        };
        if let Some(record) = store.index.get(key)? {
            let bad: Vec<String> = of(&[Kind::Missing, Kind::WrongSize, Kind::WrongHash])
                .iter()
                .map(|f| f.replica.clone())
                .collect();
            let blob = path(key, record.version);
            let mut sound = Vec::new();
            for replica in record.replicas.iter().filter(|replica| !bad.contains(replica)) {
                if let Some(length) = store.volumes.head(replica, &blob, auth)? {
                    sound.push((replica.clone(), length));
                }
            }
            let Some(&(_, length)) = sound.first() else { return Err(Error::Gone) };
            if sound.iter().any(|(_, other)| *other != length) {
                return Err(Error::Failed(
                    "its replicas differ in length, and the index does not know which is right"
                        .into(),
                ));
            }
            if !bad.is_empty() {
                let sources: Vec<String> = sound.into_iter().map(|(replica, _)| replica).collect();
                store.restore(key, &record, &sources, length, &bad, auth)?;
                store.forget(key, record.version, &[])?;
            }
            // Nothing is removed of a key whose own replicas were not all seen just now.
            for replica in &record.replicas {
                if store.volumes.head(replica, &blob, auth)? != Some(length) {
                    return Err(Error::Failed(format!("{replica} is still not whole")));
                }
            }
            for finding in of(&[Kind::Surplus, Kind::Stale]) {
                store.volumes.delete(&finding.replica, &path(key, finding.version), auth)?;
            }
        }
        for (version, entry) in store.index.debris(key)? {
            if entry.wait <= now() {
                store.clear_now(key, version, &entry.replicas, true, auth)?;
            }
        }
        Ok(())
    }

    /// Removes blobs of unknown keys. An index that knows fewer keys than it does not is not the
    /// index of these volumes.
    fn remove_strays(&self, findings: &BTreeSet<Finding>) -> Result<()> {
        let (seen, unknown) =
            (self.seen.load(Ordering::Relaxed), self.unknown.load(Ordering::Relaxed));
        if unknown > seen {
            return Err(Error::Failed(format!(
                "-strays: the index knows {seen} of the {} keys on the volumes: nothing is removed; check -db",
                seen + unknown
            )));
        }
        let suspects = self.suspects.lock().unwrap_or_else(|e| e.into_inner());
        let old = |finding: &&Finding| {
            let listed = suspects.get(&finding.key).into_iter().flatten();
            let age = listed
                .filter(|b| b.replica == finding.replica && b.version == finding.version)
                .map(|b| now().saturating_sub(b.time));
            age.min().is_some_and(|age| age >= self.store.options.grace.as_secs())
        };
        for finding in findings.iter().filter(|f| f.kind == Kind::Unknown).filter(old) {
            let blob = path(&finding.key, finding.version);
            if let Err(error) =
                self.store.volumes.delete(&finding.replica, &blob, self.store.own_auth())
            {
                eprintln!("{} stays: {error}", name(&finding.key));
            }
        }
        Ok(())
    }

    fn report(&self, findings: &BTreeSet<Finding>, records: u64, running: bool) -> Result<()> {
        let all = self.store.options.verbose;
        let kinds: BTreeSet<Kind> = findings.iter().map(|finding| finding.kind).collect();
        for kind in &kinds {
            let line = |f: &Finding| {
                format!("{} http://{}{}", name(&f.key), f.replica, path(&f.key, f.version))
            };
            show(
                kind.title(),
                &findings.iter().filter(|f| f.kind == *kind).map(line).collect(),
                all,
            );
        }
        let strays = self.strays.lock().unwrap_or_else(|e| e.into_inner());
        show("names that are no blob", &strays, all);
        let wrong: HashSet<&[u8]> = findings
            .iter()
            .filter(|f| !(running && f.kind == Kind::Debris))
            .map(|f| f.key.as_slice())
            .collect();
        println!(
            "{records} keys in the index, {} with findings, {} names that are no blob",
            wrong.len(),
            strays.len()
        );
        if running && kinds.contains(&Kind::Debris) {
            println!("debris is the running master's to clear, and no fault");
        }
        if wrong.is_empty() && strays.is_empty() {
            println!("the store is whole");
            return Ok(());
        }
        Err(Error::Failed(
            "the store is not whole: see above; mkv verify -repair mends what can be mended".into(),
        ))
    }
}
