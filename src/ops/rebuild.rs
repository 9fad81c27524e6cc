//! `mkv rebuild`: a new index from the files on the volumes.
//!
//! The new index is built in `index.new/` beside the old one, which is only read, and replaces it in one step when it is
//! complete. The old index gives what no blob tells: unlinked states, hashes, and debris, without which deleted and
//! unfinished values would come back to life.
//!
//! If a volume or a listing cannot be read, rebuild stops and the old index is as it was. A volume that the old index
//! names and that lists nothing stops it too, because an unmounted disk looks the same.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::report::Report;
use super::scan::{Blob, PrefixListing, scan};
use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::quoted;
use crate::format::record::{Hash, Record, volume_of};
use crate::index::{Index, database, lock_dir, record_of};
use crate::store::{self, is_lost};
use crate::threads::lock;
use crate::volumes::Volumes;

pub struct Config {
    pub db: PathBuf,
    pub store: store::Config,
    /// Another `-db` to carry over from; by default the one that is rebuilt.
    pub from: Option<PathBuf>,
    /// Whether to read blobs whose md5 is not known.
    pub rehash: bool,
    pub verbose: bool,
}

pub fn run(config: Config, volumes: Arc<Volumes>) -> Result<()> {
    let begun = Instant::now();
    let _lock = lock_dir(&config.db, true)?;
    let (index, fresh) = (database(&config.db)?, config.db.join("index.new"));
    let old = old_index(&config, &index)?;
    let unread = old.is_none() && index.exists();
    check_lost(&config.store, old.as_ref())?;
    remove(&fresh)?;
    let rebuild = Rebuild {
        volumes,
        new: Index::create(&fresh)?,
        old,
        listed: Mutex::default(),
        report: Report::new(config.verbose),
        replicas: AtomicU64::new(0),
        under_replicated: AtomicU64::new(0),
        config: &config,
    };
    let keys = rebuild.fill(begun)?;
    let failed = [LOST, UNHASHED, DOUBTFUL].iter().any(|kind| rebuild.report.count(kind) > 0);
    drop(rebuild);
    swap(&config.db, &index, &fresh)?;
    println!("the new index holds {keys} keys");
    if failed || unread {
        Err(Error::Failed("the index is rebuilt, but see what is named above".into()))
    } else {
        Ok(())
    }
}

/// The index to carry over from. One that `-from` names must open; a damaged one in `-db` is what rebuild is for.
fn old_index(config: &Config, index: &Path) -> Result<Option<Index>> {
    if let Some(from) = &config.from {
        return Index::follow(&database(from)?).map(Some);
    }
    if !index.exists() {
        return Ok(None);
    }
    match Index::follow(index) {
        Err(Error::Index(text)) => {
            eprintln!("{text}: its unlinked states, hashes and debris are lost");
            Ok(None)
        }
        opened => opened.map(Some),
    }
}

/// Fails if `-lost` names a volume that neither `-volumes` nor the old index knows: it is probably mistyped.
fn check_lost(config: &store::Config, old: Option<&Index>) -> Result<()> {
    let volumes = &config.placement.volumes;
    let mut unknown: BTreeSet<&String> =
        config.lost.iter().filter(|lost| !volumes.iter().any(|v| v == volume_of(lost))).collect();
    if let Some(old) = old.filter(|_| !unknown.is_empty()) {
        let mut meet = |replica: &String| {
            unknown.retain(|lost| *lost != replica && *lost != volume_of(replica));
        };
        let view = old.view();
        view.records(b"", b"", |key, text| {
            record_of(key, text)?.replicas.iter().for_each(&mut meet);
            Ok(true)
        })?;
        view.debris(b"", |_, _, debris| {
            debris.replicas.iter().for_each(&mut meet);
            Ok(())
        })?;
    }
    let Some(name) = unknown.first() else { return Ok(()) };
    Err(Error::Failed(format!(
        "-lost {name}: neither -volumes nor the old index has a volume of this name: check its spelling"
    )))
}

fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::Failed(format!("{}: {e}", folder.display()))),
        _ => Ok(()),
    }
}

/// Makes `fresh` the index in one step; the one before it becomes `index.old`.
fn swap(db: &Path, index: &Path, fresh: &Path) -> Result<()> {
    let wrong = |e: std::io::Error| Error::Failed(format!("{} could not become the index: {e}", fresh.display()));
    if index.exists() {
        renameat_with(CWD, fresh, CWD, index, RenameFlags::EXCHANGE).map_err(|e| wrong(e.into()))?;
        let kept = db.join("index.old");
        remove(&kept)?;
        std::fs::rename(fresh, kept).map_err(wrong)?;
    } else {
        std::fs::rename(fresh, index).map_err(wrong)?;
    }
    std::fs::File::open(db).and_then(|dir| dir.sync_all()).map_err(wrong)
}

// The kinds of findings.
const FOREIGN: &str = "names that are no blob, not indexed";
const STALE: &str = "other versions of keys, not indexed";
const CONFLICTS: &str = "replicas of different lengths under one name, the majority taken";
const DOUBTFUL: &str = "blobs that -from calls unfinished or deleted, not indexed and left alone";
const LOST: &str = "keys that no blob was found for, their records kept";
const UNHASHED: &str = "keys whose blobs cannot be read for their md5, or do not agree on it";

struct Rebuild<'a> {
    config: &'a Config,
    volumes: Arc<Volumes>,
    new: Index,
    old: Option<Index>,
    /// The volumes and subvolumes that listed a blob.
    listed: Mutex<HashSet<String>>,
    report: Report,
    replicas: AtomicU64,
    /// Keys with fewer replicas than `-replicas`.
    under_replicated: AtomicU64,
}

impl Rebuild<'_> {
    /// Fills the new index, prints the report, and returns the number of keys.
    fn fill(&self, begun: Instant) -> Result<u64> {
        let store::Config { placement, auth, .. } = &self.config.store;
        let names: Vec<String> = placement.volumes.iter().filter(|volume| !self.is_lost(volume)).cloned().collect();
        self.volumes.check_distinct(names.iter())?;
        self.carry_debris()?;
        scan(&self.volumes, &names, auth.as_deref(), |listing| self.add(listing))?;
        self.check_empty_volumes()?;
        self.keep_lost_keys()?;
        self.new.sync()?;
        self.report.show();
        let mut keys = 0;
        self.new.view().records(b"", b"", |_, _| {
            keys += 1;
            Ok(true)
        })?;
        println!(
            "{keys} keys, {} replicas, {} under-replicated, {} skipped, {:.1} s",
            self.replicas.load(Ordering::Relaxed),
            self.under_replicated.load(Ordering::Relaxed),
            self.report.count(FOREIGN) + self.report.count(STALE),
            begun.elapsed().as_secs_f64()
        );
        Ok(keys)
    }

    fn is_lost(&self, replica: &str) -> bool {
        is_lost(&self.config.store.lost, replica)
    }

    fn carry_debris(&self) -> Result<()> {
        let Some(old) = &self.old else { return Ok(()) };
        old.view().debris(b"", |key, version, mut debris| {
            debris.replicas.retain(|replica| !self.is_lost(replica));
            self.new.batch().set_debris(key, version, &debris).commit()
        })
    }

    /// Adds the keys of one prefix.
    fn add(&self, listing: PrefixListing) -> Result<()> {
        if let Some(folder) = listing.unreadable.into_iter().next() {
            return Err(Error::Failed(folder));
        }
        for name in listing.foreign {
            self.report.add(FOREIGN, name);
        }
        let mut batch = self.new.batch();
        for (key, blobs) in listing.keys {
            self.note_listed(&blobs);
            if let Some(record) = self.record(&key, blobs)? {
                self.replicas.fetch_add(record.replicas.len() as u64, Ordering::Relaxed);
                if record.replicas.len() < self.config.store.placement.replicas {
                    self.under_replicated.fetch_add(1, Ordering::Relaxed);
                    log::info!("{} has fewer replicas than asked for", quoted(&key));
                }
                batch = batch.put(&key, &record);
            }
        }
        batch.commit()
    }

    fn note_listed(&self, blobs: &[Blob]) {
        let mut listed = lock(&self.listed);
        for blob in blobs {
            if !listed.contains(&blob.replica) {
                listed.insert(blob.replica.clone());
            }
        }
    }

    /// The record of a key with these blobs; `None` if they are all debris.
    fn record(&self, key: &[u8], blobs: Vec<Blob>) -> Result<Option<Record>> {
        let old = self.old.as_ref().map_or(Ok(None), |old| old.get(key))?;
        // No value is empty: a power cut leaves such files.
        let (empty, mut blobs): (Vec<_>, Vec<_>) = blobs.into_iter().partition(|b| b.size == 0);
        for Blob { replica, version, .. } in empty {
            self.report.add(FOREIGN, format!("{replica}{} is empty", path(key, version)));
        }
        self.drop_debris(key, old.as_ref(), &mut blobs)?;
        let mut versions: BTreeMap<u64, Vec<Blob>> = BTreeMap::new();
        for blob in blobs {
            versions.entry(blob.version).or_default().push(blob);
        }
        let version = self.choose_version(old.as_ref(), &versions);
        let old = old.filter(|old| old.version == version);
        let chosen = versions.remove(&version);
        for version in versions.into_keys() {
            self.report.add(STALE, format!("{} {}", quoted(key), path(key, version)));
        }
        let Some(blobs) = chosen else { return Ok(None) };
        // Under a plain name the record of an old copy may be that of another value of the same length.
        let old = old.filter(|old| {
            let has_time = |time| blobs.iter().any(|blob| blob.time == time);
            self.config.from.is_none() || old.time.is_none_or(has_time)
        });
        let (size, time, mut replicas) = self.agree(key, blobs, old.as_ref());
        let wanted = self.config.store.placement.place(key);
        let rank = |replica: &String| wanted.iter().position(|w| w == replica).unwrap_or(wanted.len());
        replicas.sort_by(|a, b| rank(a).cmp(&rank(b)).then(a.cmp(b)));
        let same = old.filter(|old| old.size.is_none_or(|known| known == size));
        let mut record = Record {
            state: same.as_ref().map(|old| old.state).unwrap_or_default(),
            hash: same.as_ref().and_then(|old| old.hash),
            size: Some(size),
            time: same.as_ref().and_then(|old| old.time).or(Some(time)),
            version,
            replicas,
        };
        if self.config.rehash && record.hash.is_none() {
            record.hash = self.hash(key, &record)?;
        }
        Ok(Some(record))
    }

    /// Removes from `blobs` what the old index calls debris.
    fn drop_debris(&self, key: &[u8], old: Option<&Record>, blobs: &mut Vec<Blob>) -> Result<()> {
        for (version, debris) in self.old.as_ref().map_or(Ok(Vec::new()), |old| old.debris(key))? {
            let record = old.filter(|old| old.version == version);
            let exists =
                |replica: &&String| blobs.iter().any(|blob| blob.version == version && blob.replica == **replica);
            let (present, missing): (Vec<_>, Vec<_>) = debris.replicas.iter().partition(exists);
            let complete = !present.is_empty() && missing.iter().all(|replica| self.is_lost(replica));
            if self.config.from.is_some() && record.is_none() && complete {
                // A write that was under way when an old copy was made may be a value since, or may never have ended.
                // The cleaner must not be the one to decide.
                self.report.add(DOUBTFUL, format!("{} {}", quoted(key), path(key, version)));
                self.new.batch().set_debris(key, version, &Default::default()).commit()?;
            }
            blobs.retain(|blob| {
                blob.version != version
                    || !debris.replicas.contains(&blob.replica)
                    || record.is_some_and(|old| old.replicas.contains(&blob.replica))
            });
        }
        Ok(())
    }

    /// The version that the key has. The old record's version wins. If no blob has it, the old index is an old copy: a
    /// newer version replaced that one, and an older one is stale. Without an old record it is the version with the most
    /// replicas, then the newest.
    fn choose_version(&self, old: Option<&Record>, versions: &BTreeMap<u64, Vec<Blob>>) -> u64 {
        let known = old.map(|old| old.version);
        let newer = versions.iter().filter(|(version, _)| known.is_none_or(|k| **version > k));
        let best = newer.max_by_key(|(version, blobs)| (blobs.len(), **version)).map(|(version, _)| *version);
        // A complete newer version replaced that of an old copy.
        let replaced = best.filter(|version| {
            self.config.from.is_some() && versions[version].len() >= self.config.store.placement.replicas
        });
        let present = known.filter(|known| versions.contains_key(known));
        replaced.or(present).or(best).or(known).unwrap_or(0)
    }

    /// The value's length and time, and the replicas that hold it. Different lengths under one name are different
    /// values: the old record's length wins, then the majority's, then the newest.
    fn agree(&self, key: &[u8], blobs: Vec<Blob>, old: Option<&Record>) -> (u64, u64, Vec<String>) {
        let mut sizes: BTreeMap<u64, Vec<Blob>> = BTreeMap::new();
        for blob in blobs {
            sizes.entry(blob.size).or_default().push(blob);
        }
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
            match self.volumes.digest(replica, &blob, self.config.store.auth.as_deref()) {
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

    /// Fails if a volume that the old index names listed nothing: a disk that is not mounted looks like an empty one.
    fn check_empty_volumes(&self) -> Result<()> {
        let Some(old) = &self.old else { return Ok(()) };
        let listed = lock(&self.listed);
        let mut empty = BTreeSet::new();
        old.view().records(b"", b"", |key, text| {
            for replica in record_of(key, text)?.replicas {
                if !listed.contains(&replica) && !self.is_lost(&replica) {
                    empty.insert(replica);
                }
            }
            Ok(true)
        })?;
        let Some(first) = empty.first() else { return Ok(()) };
        let volumes = &self.config.store.placement.volumes;
        let why = match volumes.iter().any(|volume| volume == volume_of(first)) {
            true => "lists no blob: is its disk mounted?",
            false => "is not in -volumes.",
        };
        let lost: Vec<String> = empty.iter().map(|replica| format!("-lost {replica}")).collect();
        let lost = lost.join(" ");
        Err(Error::Failed(format!("{first} {why} (The old index names it. If it is gone for good: {lost})")))
    }

    /// Keeps the records of keys that no blob was found for: the user should know that they are lost.
    fn keep_lost_keys(&self) -> Result<()> {
        let Some(old) = &self.old else { return Ok(()) };
        old.view().records(b"", b"", |key, text| {
            if self.new.get(key)?.is_none() {
                self.new.batch().put(key, &record_of(key, text)?).commit()?;
                self.report.add(LOST, quoted(key));
            }
            Ok(true)
        })
    }
}
