//! `mkv verify`: the index against the volumes, and repair.
//!
//! First every listing is compared with the index, then what is in the index and in no listing is
//! asked for. The suspects are looked at again, some thousands at a time, after the index has caught
//! up with a running master: only what is still wrong is a finding. With `-repair`, whole replicas
//! are restored first; what is too much of a key goes only when all replicas of its record were just
//! seen whole, and nothing goes that is newer than the index or that the index does not know, but
//! for `-strays`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::mem::take;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rayon::prelude::*;

use crate::cli::Options;
use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::record::{Debris, Hash, Record, volume_of};
use crate::index::{Index, decode, folder, is_locked, lock_dir};
use crate::ops::progress::Progress;
use crate::ops::rebuild::name;
use crate::ops::scan::{Blob, Findings, scan, threads};
use crate::store::{Store, now};
use crate::threads::lock;

/// Keys that are looked at together, and how many of them at the same time.
const BATCH: usize = 4096;
const WIDTH: usize = 16;

/// How often a key is looked at that changes while it is looked at, and how often running a finding
/// has to be the same where a master runs: the same key may be written again and again.
const ROUNDS: u64 = 50;
const STEADY: u64 = 5;

/// How often a volume is asked for a blob before its silence ends the run: a disk may be slow.
const TRIES: usize = 5;

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

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    kind: Kind,
    version: u64,
    replica: String,
}

const STRAYS: &str = "names that are no blob";
const NOT_REPAIRED: &str = "keys that are not repaired";

/// A key to look at again, and the blobs that were listed for it and that its record does not name.
type Suspect = (Vec<u8>, Vec<Blob>);

struct Verify {
    store: Arc<Store>,
    /// A master holds the index.
    running: bool,
    /// When the index was last written, in seconds since 1970.
    newest: u64,
    /// A blob that is newer than the index: it is an old copy, or another store's.
    ahead: Mutex<Option<String>>,
    /// Keys with a blob in some listing that their record names.
    seen: AtomicU64,
    /// Keys with other blobs only, debris left aside.
    unknown: AtomicU64,
    suspects: Mutex<BTreeMap<Vec<u8>, Vec<Blob>>>,
    findings: Findings,
}

pub fn run(options: Options) -> Result<()> {
    let index = folder(&options.db)?;
    let running = !options.repair && is_locked(&options.db);
    // Held to the end: no master starts while something is repaired.
    let _lock = if options.repair { Some(lock_dir(&options.db, false)?) } else { None };
    let index =
        if options.repair { Index::open(&index, false, false)? } else { Index::follow(&index)? };
    let (records, newest) = age(&index)?;
    if options.repair && records == 0 {
        return Err(Error::Failed("-repair: the index is empty, so every blob would look superfluous: check -db, or run mkv rebuild".into()));
    }
    let verify = Verify::new(options, index, running, newest);
    verify.store.volumes.check_distinct(verify.store.options.volumes.iter())?;
    threads(WIDTH)?.install(|| verify.all(records))
}

/// The number of records, and the latest time in them or in debris, in seconds since 1970.
fn age(index: &Index) -> Result<(u64, u64)> {
    let (mut records, mut newest) = (0, 0);
    let view = index.view();
    view.records(b"", b"", |key, text| {
        let record = decode(key, Record::decode(text), text)?;
        newest = newest.max(record.time.unwrap_or(0)).max(record.version / 1_000_000);
        records += 1;
        Ok(true)
    })?;
    view.debris(b"", |_, version, _| {
        newest = newest.max(version / 1_000_000);
        Ok(())
    })?;
    // A clock that was ahead must not make what is written now look old.
    Ok((records, newest.min(now())))
}

impl Verify {
    fn new(options: Options, index: Index, running: bool, newest: u64) -> Verify {
        Verify {
            running,
            newest,
            ahead: Mutex::default(),
            seen: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
            suspects: Mutex::default(),
            findings: Findings::new(options.verbose),
            store: Store::new(options, index),
        }
    }

    fn all(&self, records: u64) -> Result<()> {
        self.look_at_listings()?;
        self.look_at_index(records)?;
        let options = &self.store.options;
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let (seen, unknown) = (get(&self.seen), get(&self.unknown));
        let ahead = lock(&self.ahead).take().filter(|_| options.repair);
        if let Some(blob) = &ahead {
            eprintln!(
                "the volumes hold what is newer than this index, http://{blob} for one: check -db. Nothing is removed"
            );
        } else if options.strays && unknown > seen {
            // An index that knows fewer keys than it does not is not the index of these volumes.
            return Err(Error::Failed(format!(
                "-strays: the index knows {seen} of the {} keys on the volumes: nothing is removed; check -db",
                seen + unknown
            )));
        }
        let mut suspects = take(&mut *lock(&self.suspects));
        let progress = Progress::new(suspects.len() as u64, "keys to look at again");
        let mut wrong = 0;
        while !suspects.is_empty() {
            let batch: Vec<_> = (0..BATCH).map_while(|_| suspects.pop_first()).collect();
            match self.look_and_mend(&batch, ahead.is_some(), &progress) {
                Ok(count) => wrong += count,
                Err(error) => {
                    self.findings.show();
                    println!(
                        "ended early: {} keys are still to be looked at",
                        batch.len() + suspects.len()
                    );
                    return Err(error);
                }
            }
        }
        progress.end();
        self.report(records, wrong)
    }

    /// Notes what is wrong with these keys, and is still after a repair; the number of keys.
    fn look_and_mend(&self, batch: &[Suspect], ahead: bool, progress: &Progress) -> Result<usize> {
        let options = &self.store.options;
        let mut found = self.look_again(batch.iter().collect())?;
        let suspects = found.iter().map(|(suspect, _)| *suspect).collect();
        progress.add((batch.len() - if options.repair { found.len() } else { 0 }) as u64);
        if options.repair {
            let mend = |(suspect, findings): &(&Suspect, Vec<Finding>)| {
                progress.add(1);
                match self.repair(suspect, findings, ahead) {
                    // As in the listings, a volume that is down ends the run.
                    Err(Error::Unreachable { volume, why, maybe_done })
                        if !self.answers(&volume) =>
                    {
                        Err(Error::Unreachable { volume, why, maybe_done })
                    }
                    Err(error) => {
                        self.findings.add(NOT_REPAIRED, format!("{}: {error}", name(&suspect.0)));
                        Ok(())
                    }
                    Ok(()) => Ok(()),
                }
            };
            found.par_iter().try_for_each(mend)?;
            found = self.look_again(suspects)?;
        } else if self.running && !found.is_empty() {
            // RocksDB's follower may miss what was deleted just before a master's restart.
            let index = Index::follow(&folder(&options.db)?)?;
            found = Verify::new(options.clone(), index, true, self.newest).look_again(suspects)?;
        }
        Ok(found.iter().filter(|(suspect, findings)| self.note(&suspect.0, findings)).count())
    }

    /// The listings come first: what they show of a key is kept.
    fn suspect(&self, key: &[u8], blobs: Vec<Blob>) {
        lock(&self.suspects).entry(key.to_vec()).or_insert(blobs);
    }

    fn look_at_listings(&self) -> Result<()> {
        let options = &self.store.options;
        scan(&self.store.volumes, &options.volumes, self.store.own_auth(), |found| {
            for stray in found.strays {
                self.findings.add(STRAYS, stray);
            }
            for (key, mut blobs) in found.keys {
                let record = self.store.index.get(&key)?;
                let record = record.as_ref();
                let unnamed =
                    |b: &Blob| record.is_none_or(|record| !record.names(b.version, &b.replica));
                let seen = !blobs.iter().all(unnamed);
                self.seen.fetch_add(u64::from(seen), Ordering::Relaxed);
                if self.examine(&key, &blobs, record, &[]).is_ok_and(|found| found.is_empty()) {
                    continue;
                }
                blobs.retain(unnamed);
                blobs.shrink_to_fit();
                let mut unknown = false;
                for Blob { replica, version, time, .. } in &blobs {
                    let debris = self.store.index.debris_entry(&key, *version)?;
                    if debris.is_some_and(|entry| entry.replicas.contains(replica)) {
                        continue;
                    }
                    unknown = !seen;
                    if record.map_or(*time >= self.newest, |record| *version > record.version) {
                        *lock(&self.ahead) = Some(format!("{replica}{}", path(&key, *version)));
                    }
                }
                self.unknown.fetch_add(u64::from(unknown), Ordering::Relaxed);
                self.suspect(&key, blobs);
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
                    if self.size(replica, &blob)?.is_some() {
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

    /// Looks at suspects once more, asking the volumes themselves; and again as long as the index
    /// changes under it: what a running master writes just now is no finding.
    fn look_again<'a>(
        &self,
        mut left: Vec<&'a Suspect>,
    ) -> Result<Vec<(&'a Suspect, Vec<Finding>)>> {
        let mut confirmed = Vec::new();
        let state = |key: &[u8]| Ok((self.store.index.get(key)?, self.store.index.debris(key)?));
        let mut last: HashMap<&[u8], (_, _, u64)> = HashMap::new();
        let needed = if self.running { STEADY } else { 1 };
        for round in 0..ROUNDS {
            if self.running && round > 0 {
                std::thread::sleep(Duration::from_millis(100));
            }
            self.store.index.catch_up()?;
            let looked = left
                .par_iter()
                .map(|suspect| Ok((*suspect, (state(&suspect.0)?, self.look(suspect)?))));
            let looked: Vec<_> = looked.collect::<Result<_>>()?;
            self.store.index.catch_up()?;
            left.clear();
            for (suspect, (before, findings)) in
                looked.into_iter().filter(|(_, (_, findings))| !findings.is_empty())
            {
                let key = &suspect.0[..];
                let same = last
                    .remove(key)
                    .filter(|(state, found, _)| *state == before && *found == findings);
                let times =
                    same.map_or(0, |(_, _, times)| times) + u64::from(state(key)? == before);
                if times >= needed {
                    confirmed.push((suspect, findings));
                } else {
                    left.push(suspect);
                    last.insert(key, (before, findings, times));
                }
            }
            if left.is_empty() {
                break;
            }
        }
        Ok(confirmed)
    }

    /// The length of the blob on this replica, in bytes; `None`: it is not there, or not readable.
    fn size(&self, replica: &str, blob: &str) -> Result<Option<u64>> {
        let ask = || self.store.volumes.head(replica, blob, self.store.own_auth());
        let silent = |answer: &Result<_>| matches!(answer, Err(Error::Unreachable { .. }));
        let mut answer = ask();
        for _ in 1..TRIES {
            if silent(&answer) {
                answer = ask();
            }
        }
        // No answer is no sign that it is not there.
        if silent(&answer) { answer } else { self.readable(replica, answer) }
    }

    /// What a volume refuses, or breaks off, that answers else: a file that cannot be read is no
    /// replica, and no reason to look at nothing else.
    fn readable<T>(&self, replica: &str, answer: Result<Option<T>>) -> Result<Option<T>> {
        answer.or_else(|error| if self.answers(replica) { Ok(None) } else { Err(error) })
    }

    fn answers(&self, replica: &str) -> bool {
        self.store.volumes.accepts_login(replica, self.store.own_auth()) == Ok(true)
    }

    fn look(&self, (key, listed): &Suspect) -> Result<Vec<Finding>> {
        let record = self.store.index.get(key)?;
        let debris = self.store.index.debris(key)?;
        let mut places: BTreeSet<(u64, &String)> =
            listed.iter().map(|blob| (blob.version, &blob.replica)).collect();
        let entries = debris.iter().map(|(version, entry)| (*version, &entry.replicas));
        for (version, replicas) in
            record.iter().map(|record| (record.version, &record.replicas)).chain(entries)
        {
            places.extend(replicas.iter().map(|replica| (version, replica)));
        }
        let mut blobs = Vec::new();
        for (version, replica) in places {
            if let Some(size) = self.size(replica, &path(key, version))? {
                blobs.push(Blob { replica: replica.clone(), version, size, time: 0 });
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
            findings.insert(Finding { kind, version, replica: replica.to_string() });
        };
        for (version, entry) in debris {
            for replica in &entry.replicas {
                if !record.is_some_and(|record| record.names(*version, replica)) {
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
                Some(record) if record.names(blob.version, &blob.replica) => continue,
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
                // No value is empty.
                Some(blob) if record.size.map_or(blob.size == 0, |size| size != blob.size) => {
                    add(Kind::WrongSize, record.version, replica);
                }
                Some(blob) => sound.push(blob),
            }
        }
        let differ = sound.windows(2).any(|pair| pair[0].size != pair[1].size);
        if self.store.options.deep || differ {
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
            let (volumes, auth) = (&self.store.volumes, self.store.own_auth());
            let digest = volumes.digest(&blob.replica, &path(key, record.version), auth);
            let digest = self.readable(&blob.replica, digest)?;
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

    fn repair(&self, suspect: &Suspect, findings: &[Finding], ahead: bool) -> Result<()> {
        self.restore(&suspect.0, findings)?;
        if !ahead {
            self.remove(&suspect.0, findings)?;
            if self.store.options.strays {
                self.remove_strays(suspect, findings)?;
            }
        }
        Ok(())
    }

    /// Copies what is missing or wrong of a record's replicas, from one that is right or from a
    /// surplus one whose bytes are.
    fn restore(&self, key: &[u8], findings: &[Finding]) -> Result<()> {
        let (store, auth) = (&self.store, self.store.own_auth());
        let Some(record) = store.index.get(key)? else { return Ok(()) };
        let of = |kinds: &[Kind]| -> Vec<String> {
            findings.iter().filter(|f| kinds.contains(&f.kind)).map(|f| f.replica.clone()).collect()
        };
        let mut bad = of(&[Kind::Missing, Kind::WrongSize, Kind::WrongHash]);
        let sound =
            self.there(key, &record, record.replicas.iter().filter(|r| !bad.contains(r)))?;
        // Before something is removed the bytes count, not the length alone.
        if !of(&[Kind::Surplus, Kind::Stale]).is_empty() && !self.store.options.deep {
            bad.extend(self.wrong_bytes(key, &record, &sound.iter().collect::<Vec<_>>())?);
        }
        if bad.is_empty() {
            return Ok(());
        }
        let any = !sound.is_empty() || !of(&[Kind::WrongSize, Kind::WrongHash]).is_empty();
        let mut sources: Vec<Blob> =
            sound.into_iter().filter(|blob| !bad.contains(&blob.replica)).collect();
        if record.hash.is_some() {
            sources.extend(self.there(key, &record, of(&[Kind::Surplus, Kind::Debris]).iter())?);
        }
        if sources.is_empty() {
            let text = "none of its replicas is known to hold the right bytes";
            return Err(if any { Error::Failed(text.into()) } else { Error::Gone });
        }
        let sources: Vec<String> = sources.into_iter().map(|blob| blob.replica).collect();
        store.restore(key, &record, &sources, &bad, auth)?;
        store.forget(key, record.version, &[])
    }

    /// Those of the replicas that have the record's blob, in any length.
    fn there<'a>(
        &self,
        key: &[u8],
        record: &Record,
        replicas: impl Iterator<Item = &'a String>,
    ) -> Result<Vec<Blob>> {
        let blob = path(key, record.version);
        let mut there = Vec::new();
        for replica in replicas {
            if let Some(size) = self.size(replica, &blob)? {
                there.push(Blob {
                    replica: replica.clone(),
                    version: record.version,
                    size,
                    time: 0,
                });
            }
        }
        Ok(there)
    }

    /// Removes what is too much of a key, once all replicas of its record were seen whole.
    fn remove(&self, key: &[u8], findings: &[Finding]) -> Result<()> {
        let (store, auth) = (&self.store, self.store.own_auth());
        let surplus: Vec<_> =
            findings.iter().filter(|f| matches!(f.kind, Kind::Surplus | Kind::Stale)).collect();
        if let Some(record) = store.index.get(key)?.filter(|_| !surplus.is_empty()) {
            let known =
                |replica: &&String| store.options.volumes.iter().any(|v| v == volume_of(replica));
            if let Some(stranger) = record.replicas.iter().find(|replica| !known(replica)) {
                return Err(Error::Failed(format!(
                    "its record names {stranger}, which is not in -volumes: check -db"
                )));
            }
            let there = self.there(key, &record, record.replicas.iter())?;
            let wrong = self.wrong_bytes(key, &record, &there.iter().collect::<Vec<_>>())?;
            if there.len() < record.replicas.len() || !wrong.is_empty() {
                return Err(Error::Failed(
                    "its replicas are still not whole, so nothing of it is removed".into(),
                ));
            }
            for finding in surplus {
                // A newer index than this one may name it.
                if finding.kind == Kind::Surplus && store.place(key).contains(&finding.replica) {
                    return Err(Error::Failed(
                        "a surplus replica lies where it is wanted: mkv rebalance takes it up"
                            .into(),
                    ));
                }
                let other = self.there(key, &record, [&finding.replica].into_iter())?;
                if finding.kind == Kind::Surplus && other.is_empty() {
                    continue;
                }
                let all: Vec<_> = there.iter().chain(&other).collect();
                if record.hash.is_none() && !self.wrong_bytes(key, &record, &all)?.is_empty() {
                    return Err(Error::Failed(
                        "a surplus replica has other bytes, and no hash tells which are right"
                            .into(),
                    ));
                }
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

    /// Removes blobs of a key that the index does not know, once they are older than the grace.
    fn remove_strays(&self, (key, listed): &Suspect, findings: &[Finding]) -> Result<()> {
        for finding in findings.iter().filter(|f| f.kind == Kind::Unknown) {
            let mut listed = listed.iter();
            let blob =
                listed.find(|b| b.replica == finding.replica && b.version == finding.version);
            let age = blob.map(|blob| now().saturating_sub(blob.time));
            if age.is_some_and(|age| age >= self.store.options.grace.as_secs()) {
                let blob = path(key, finding.version);
                self.store.volumes.delete(&finding.replica, &blob, self.store.own_auth())?;
            }
        }
        Ok(())
    }

    /// Notes what is wrong with a key; whether something of it is a fault.
    fn note(&self, key: &[u8], findings: &[Finding]) -> bool {
        for Finding { kind, version, replica } in findings {
            let text = format!("{} http://{replica}{}", name(key), path(key, *version));
            self.findings.add(kind.title(), text);
        }
        findings.iter().any(|f| !(self.running && f.kind == Kind::Debris))
    }

    fn report(&self, records: u64, wrong: usize) -> Result<()> {
        self.findings.show();
        let strays = self.findings.count(STRAYS);
        println!(
            "{records} keys in the index, {wrong} with findings, {strays} names that are no blob"
        );
        if self.running && self.findings.count(Kind::Debris.title()) > 0 {
            println!("debris is the running master's to clear, and no fault");
        }
        if wrong == 0 && strays == 0 {
            println!("the store is whole");
            return Ok(());
        }
        Err(Error::Failed(
            "the store is not whole: see above; mkv verify -repair mends what can be mended".into(),
        ))
    }
}
