//! `mkv rebuild`: a new index from the files on the volumes.
//!
//! The new index is built in `index.new/` beside the old one, which is only read, and replaces it in one step when it
//! is complete. The old index provides what no blob shows: unlinked states, hashes, and debris, without which deleted
//! and unfinished values would come back to life.
//!
//! If a volume or a listing cannot be read, rebuild stops and the old index is as it was. A volume that the old index
//! names and that lists nothing stops it too, because an unmounted disk looks the same.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::carry_over::{Old, old_index};
use super::report::Report;
use super::scan::{Blob, PrefixListing, scan};
use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::quoted;
use crate::format::record::{Hash, Record, volume_of};
use crate::index::{Index, Location};
use crate::store::{self, Store};
use crate::threads::lock;
use crate::volumes::Volumes;

pub struct Config {
    pub db: Location,
    /// Another `-db`, or a backup's file, to carry over from; by default the `-db` that is rebuilt.
    pub from: Option<Location>,
    /// Whether to leave out the backups on the volumes.
    pub nobackup: bool,
    /// Whether to read blobs whose md5 is not known.
    pub rehash: bool,
    pub verbose: bool,
}

pub fn run(config: &Config, store: store::Config, volumes: Arc<Volumes>) -> Result<()> {
    let begun = Instant::now();
    let replacement = config.db.replace()?;
    let Old { index: old, is_copy, is_lost } = old_index(config, &store, &volumes)?;
    check_lost(&store, old.as_ref())?;
    let rebuild = Rebuild {
        store: Store::new(store, replacement.create()?, volumes),
        old,
        is_copy,
        totals: Mutex::default(),
        report: Report::new(config.verbose),
        config,
    };
    rebuild.fill()?;
    let keys = rebuild.show(begun);
    let failed = [LOST, UNHASHED, DOUBTFUL].iter().any(|kind| rebuild.report.count(kind) > 0);
    // Closes the indexes: their folders are renamed now.
    drop(rebuild);
    replacement.publish(false)?;
    config.db.remove_scratch()?;
    println!("the new index holds {keys} keys");
    if failed || is_lost {
        return Err(Error::Failed("the index is rebuilt, but see what is named above".into()));
    }
    Ok(())
}

/// Fails if `-lost` names a volume that neither `-volumes` nor the old index knows: it is probably mistyped.
fn check_lost(config: &store::Config, old: Option<&Index>) -> Result<()> {
    let volumes = &config.placement.volumes;
    let mut unknown: Vec<&String> =
        config.lost.iter().filter(|lost| !volumes.iter().any(|v| v == volume_of(lost))).collect();
    if let Some(old) = old.filter(|_| !unknown.is_empty()) {
        let mut named = named_replicas(old)?;
        for entry in old.view().entries() {
            named.extend(entry?.debris.replicas);
        }
        unknown.retain(|lost| !named.iter().any(|replica| *lost == replica || *lost == volume_of(replica)));
    }
    let Some(name) = unknown.first() else { return Ok(()) };
    Err(Error::Failed(format!(
        "-lost {name}: neither -volumes nor the old index has a volume of this name: check its spelling"
    )))
}

/// All replicas that the records of an index name.
fn named_replicas(index: &Index) -> Result<BTreeSet<String>> {
    let mut named = BTreeSet::new();
    for row in index.view().all_records() {
        named.extend(row?.1.replicas);
    }
    Ok(named)
}

// The kinds of findings.
const FOREIGN: &str = "names that are no blob, not indexed";
const EMPTY: &str = "empty blobs, not indexed: S3 objects or buckets if it is in use, or what a power cut left";
const STALE: &str = "other versions of keys, not indexed";
const CONFLICTS: &str = "replicas of different lengths under one name, the majority taken";
const DOUBTFUL: &str = "blobs that the copy calls unfinished or deleted, not indexed and left alone";
const LOST: &str = "keys that no blob was found for, their records kept";
const UNHASHED: &str = "keys whose blobs cannot be read for their md5, or do not agree on it";

struct Rebuild<'a> {
    config: &'a Config,
    /// The store with its new index.
    store: Arc<Store>,
    old: Option<Index>,
    /// The old index may be older than the blobs.
    is_copy: bool,
    totals: Mutex<Totals>,
    report: Report,
}

#[derive(Default)]
struct Totals {
    /// Keys in the new index.
    keys: u64,
    replicas: usize,
    /// Keys with fewer replicas than `-replicas`.
    under_replicated: u64,
    /// The volumes and subvolumes that listed a blob.
    listed: HashSet<String>,
}

impl Rebuild<'_> {
    fn fill(&self) -> Result<()> {
        let Store { index, volumes, config, .. } = &*self.store;
        let names = config.placement.volumes.iter().filter(|volume| !self.store.is_lost(volume));
        let names: Vec<String> = names.cloned().collect();
        volumes.check_distinct(names.iter())?;
        if let Some(old) = &self.old {
            if !self.is_copy {
                index.take_uploads(old)?;
            }
            for entry in old.view().entries() {
                let mut entry = entry?;
                entry.debris.replicas.retain(|replica| !self.store.is_lost(replica));
                index.batch().set_debris(&entry.key, entry.version, &entry.debris).commit()?;
            }
        }
        scan(volumes, &names, self.store.own_auth(), |listing| self.add(listing))?;
        if let Some(old) = &self.old {
            self.check_empty_volumes(old)?;
            self.keep_lost_keys(old)?;
        }
        index.sync()
    }

    /// Prints the report and returns the number of keys.
    fn show(&self, begun: Instant) -> u64 {
        self.report.show();
        let Totals { keys, replicas, under_replicated, .. } = *lock(&self.totals);
        let skipped = [FOREIGN, EMPTY, STALE].iter().map(|kind| self.report.count(kind)).sum::<usize>();
        let seconds = begun.elapsed().as_secs_f64();
        println!(
            "{keys} keys, {replicas} replicas, {under_replicated} under-replicated, {skipped} skipped, {seconds:.1} s"
        );
        keys
    }

    /// Adds the keys of one prefix.
    fn add(&self, listing: PrefixListing) -> Result<()> {
        if let Some(folder) = listing.unreadable.into_iter().next() {
            return Err(Error::Failed(folder));
        }
        for name in listing.foreign {
            self.report.add(FOREIGN, name);
        }
        let mut batch = self.store.index.batch();
        for (key, blobs) in listing.keys {
            lock(&self.totals).listed.extend(blobs.iter().map(|blob| blob.replica.clone()));
            let Some(record) = self.record(&key, blobs)? else { continue };
            let mut totals = lock(&self.totals);
            totals.keys += 1;
            totals.replicas += record.replicas.len();
            if record.replicas.len() < self.store.config.placement.replicas {
                totals.under_replicated += 1;
                log::info!("{} has fewer replicas than asked for", quoted(&key));
            }
            batch = batch.put(&key, &record);
        }
        batch.commit()
    }

    /// The record of a key with these blobs; `None` if they are all debris.
    fn record(&self, key: &[u8], blobs: Vec<Blob>) -> Result<Option<Record>> {
        let old = self.old.as_ref().map_or(Ok(None), |old| old.get(key))?;
        let is_high = |blob: &Blob| blob.version > self.store.index.max_version();
        // A power cut leaves empty files, too: only the old index tells which ones are values.
        let is_empty = |blob: &Blob| {
            blob.size == 0 && !old.as_ref().is_some_and(|old| old.version == blob.version && old.size == Some(0))
        };
        let (high, blobs): (Vec<_>, Vec<_>) = blobs.into_iter().partition(is_high);
        let (empty, mut blobs): (Vec<_>, Vec<_>) = blobs.into_iter().partition(is_empty);
        for (kind, wrong, why) in [(FOREIGN, high, "has too high a version"), (EMPTY, empty, "is empty")] {
            for Blob { replica, version, .. } in wrong {
                self.report.add(kind, format!("{replica}{} {why}", path(key, version)));
            }
        }
        self.drop_debris(key, old.as_ref(), &mut blobs)?;
        let mut versions = group(blobs, |blob| blob.version);
        let version = self.choose_version(old.as_ref(), &versions);
        let chosen = versions.remove(&version);
        for version in versions.into_keys() {
            self.report.add(STALE, format!("{} {}", quoted(key), path(key, version)));
        }
        let Some(blobs) = chosen else { return Ok(None) };
        // Under a plain name the record of an old copy may be that of another value of the same length.
        let has_time = |time| blobs.iter().any(|blob| blob.time == time);
        let old = old.filter(|old| old.version == version && (!self.is_copy || old.time.is_none_or(has_time)));
        let (size, time, mut replicas) = self.agree(key, blobs, old.as_ref());
        let wanted = self.store.place(key);
        replicas.sort();
        replicas.sort_by_key(|replica| wanted.iter().position(|w| w == replica).unwrap_or(wanted.len()));
        let known = old.filter(|old| old.size.is_none_or(|known| known == size)).unwrap_or_default();
        let time = known.time.or(Some(time));
        let mut record = Record { size: Some(size), time, version, replicas, ..known };
        if self.config.rehash && record.hash.is_none() {
            record.hash = self.hash(key, &record)?;
        }
        Ok(Some(record))
    }

    /// Removes from `blobs` what the old index calls debris.
    fn drop_debris(&self, key: &[u8], old: Option<&Record>, blobs: &mut Vec<Blob>) -> Result<()> {
        let Some(index) = &self.old else { return Ok(()) };
        for (version, debris) in index.debris(key)? {
            let is_listed = |replica: &String| blobs.iter().any(|b| b.version == version && b.replica == *replica);
            let is_there = debris.replicas.iter().any(is_listed);
            if self.is_copy && old.is_none_or(|old| old.version != version) && is_there {
                // A write that was under way when an old copy was made may be a value since, even one that has lost
                // replicas, or may never have ended. The cleaner must not be the one to decide.
                self.report.add(DOUBTFUL, format!("{} {}", quoted(key), path(key, version)));
                self.store.index.batch().set_debris(key, version, &Default::default()).commit()?;
            }
            blobs.retain(|Blob { replica, version: v, .. }| {
                *v != version || !debris.replicas.contains(replica) || old.is_some_and(|old| old.is_at(*v, replica))
            });
        }
        Ok(())
    }

    /// The version that the key has. The old record's version wins. If no blob has it, the old index is an old copy: a
    /// newer version replaced that one, and an older one is stale. Without an old record it is the version with the
    /// most replicas, then the newest.
    fn choose_version(&self, old: Option<&Record>, versions: &BTreeMap<u64, Vec<Blob>>) -> u64 {
        let known = old.map(|old| old.version);
        let newer = versions.iter().filter(|(version, _)| known.is_none_or(|k| **version > k));
        let best = newer.max_by_key(|(version, blobs)| (blobs.len(), **version)).map(|(version, _)| *version);
        // A complete newer version replaced that of an old copy.
        let replaced =
            best.filter(|version| self.is_copy && versions[version].len() >= self.store.config.placement.replicas);
        let present = known.filter(|known| versions.contains_key(known));
        replaced.or(present).or(best).or(known).unwrap_or(0)
    }

    /// The value's length and time, and the replicas that hold it. Different lengths under one name are different
    /// values: the old record's length wins, then the majority's, then the newest.
    fn agree(&self, key: &[u8], blobs: Vec<Blob>, old: Option<&Record>) -> (u64, u64, Vec<String>) {
        let sizes = group(blobs, |blob| blob.size);
        let known = old.and_then(|old| old.size);
        if sizes.len() > 1 || known.is_some_and(|known| !sizes.contains_key(&known)) {
            let on = |(size, blobs): (&u64, &Vec<Blob>)| -> Vec<String> {
                blobs.iter().map(|blob| format!(" {size} on {}", blob.replica)).collect()
            };
            let text = sizes.iter().flat_map(on);
            let text = text.chain(known.map(|size| format!(" {size} in the old index")));
            let text = format!("{}:{}", quoted(key), text.collect::<Vec<_>>().join(","));
            self.report.add(CONFLICTS, text);
        }
        let newest = |blobs: &[Blob]| blobs.iter().map(|blob| blob.time).max().unwrap_or(0);
        let rank = |size: u64, blobs: &[Blob]| (known == Some(size), blobs.len(), newest(blobs));
        let best = sizes.into_iter().max_by_key(|(size, blobs)| rank(*size, blobs));
        let (size, blobs) = best.unwrap_or_default();
        let oldest = blobs.iter().map(|blob| blob.time).min().unwrap_or(0);
        (size, oldest, blobs.into_iter().map(|blob| blob.replica).collect())
    }

    /// The md5 of a record's blob. Two replicas have to agree on it, because one alone may have rotted; if only one can
    /// be read, its md5 is taken.
    fn hash(&self, key: &[u8], record: &Record) -> Result<Option<Hash>> {
        let (blob, mut read) = (path(key, record.version), Vec::new());
        for replica in &record.replicas {
            match self.store.volumes.digest(replica, &blob, self.store.own_auth()) {
                Ok(Some((hash, _))) if read.contains(&hash) => return Ok(Some(hash)),
                Ok(Some((hash, size))) if Some(size) == record.size => read.push(hash),
                Ok(_) => {}
                Err(error) => eprintln!("{error}"),
            }
        }
        if let [hash] = read[..] {
            return Ok(Some(hash));
        }
        self.report.add(UNHASHED, quoted(key));
        Ok(None)
    }

    /// Fails if a volume that the old index names listed nothing: a disk that is not mounted looks like an empty one. A
    /// volume that a copy names may have been emptied since: it counts only if one of its keys lacks a replica.
    fn check_empty_volumes(&self, old: &Index) -> Result<()> {
        let mut empty = BTreeSet::new();
        for row in old.view().all_records() {
            let (key, record) = row?;
            if !(self.is_copy && self.has_all_replicas(&key)?) {
                empty.extend(record.replicas);
            }
        }
        let totals = lock(&self.totals);
        empty.retain(|replica| !totals.listed.contains(replica) && !self.store.is_lost(replica));
        let Some(first) = empty.first() else { return Ok(()) };
        let volumes = &self.store.config.placement.volumes;
        let why = match volumes.iter().any(|volume| volume == volume_of(first)) {
            true => "lists no blob: is its disk mounted?",
            false => "is not in -volumes.",
        };
        let lost: Vec<String> = empty.iter().map(|replica| format!("-lost {replica}")).collect();
        let lost = lost.join(" ");
        Err(Error::Failed(format!("{first} {why} (The old index names it. If it is gone for good: {lost})")))
    }

    fn has_all_replicas(&self, key: &[u8]) -> Result<bool> {
        let record = self.store.index.get(key)?;
        Ok(record.is_some_and(|record| record.replicas.len() >= self.store.config.placement.replicas))
    }

    /// Keeps the records of keys that no blob was found for: the user should know that they are lost.
    fn keep_lost_keys(&self, old: &Index) -> Result<()> {
        for row in old.view().all_records() {
            let (key, record) = row?;
            if self.store.index.get(&key)?.is_none() {
                self.store.index.batch().put(&key, &record).commit()?;
                self.report.add(LOST, quoted(&key));
                lock(&self.totals).keys += 1;
            }
        }
        Ok(())
    }
}

fn group(blobs: Vec<Blob>, by: impl Fn(&Blob) -> u64) -> BTreeMap<u64, Vec<Blob>> {
    let mut groups: BTreeMap<u64, Vec<Blob>> = BTreeMap::new();
    for blob in blobs {
        groups.entry(by(&blob)).or_default().push(blob);
    }
    groups
}
