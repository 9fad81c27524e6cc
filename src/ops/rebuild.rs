//! `mkv rebuild`: from the volumes to a fresh index.
//!
//! The new index is built in `index.new/` beside the old one, which is only read, and takes its
//! place in one step when it is whole. From the old index come what no blob tells: unlinked states,
//! hashes, and debris, without which deleted and unfinished values would come back to life.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::api::auth::Credentials;
use crate::cli::Options;
use crate::error::{Error, Result};
use crate::format::placement::{path, place};
use crate::format::record::{Hash, Record, volume_of};
use crate::index::{Index, decode, folder, lock_dir};
use crate::ops::scan::{Blob, Findings, Found, scan};
use crate::threads::lock;
use crate::volumes::Volumes;

pub fn run(options: &Options) -> Result<()> {
    let begun = Instant::now();
    let _lock = lock_dir(&options.db, true)?;
    let (index, fresh) = (folder(&options.db)?, options.db.join("index.new"));
    let old = old_index(options, &index)?;
    let unread = old.is_none() && index.exists();
    remove(&fresh)?;
    let rebuild = Rebuild {
        options,
        volumes: Volumes::new(options.voltimeout),
        auth: options
            .userpass
            .as_ref()
            .and_then(|text| Some(Credentials::new(text.as_bytes())?.header)),
        new: Index::fresh(&fresh)?,
        old,
        listed: Mutex::default(),
        findings: Findings::new(options.verbose),
        replicas: AtomicU64::new(0),
        under: AtomicU64::new(0),
    };
    rebuild.volumes.check_distinct(options.volumes.iter().filter(|v| !options.is_lost(v)))?;
    rebuild.carry_debris()?;
    let there: Vec<String> =
        options.volumes.iter().filter(|volume| !options.is_lost(volume)).cloned().collect();
    scan(&rebuild.volumes, &there, rebuild.auth.as_deref(), |found| rebuild.index(found))?;
    rebuild.check_empty_volumes()?;
    rebuild.keep_lost_keys()?;
    rebuild.new.sync()?;
    let (keys, failed) = rebuild.report(begun)?;
    drop(rebuild);
    swap(&options.db, &index, &fresh)?;
    println!("the new index holds {keys} keys");
    if failed || unread {
        Err(Error::Failed("the index is rebuilt, but see what is named above".into()))
    } else {
        Ok(())
    }
}

/// The index to carry over from. One that does not open is what `rebuild` is for; one that was
/// asked for by name has to.
fn old_index(options: &Options, index: &Path) -> Result<Option<Index>> {
    if let Some(from) = &options.from {
        return Index::follow(&folder(from)?).map(Some);
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

fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::Failed(format!("{}: {e}", folder.display())))
        }
        _ => Ok(()),
    }
}

/// Makes `fresh` the index, in one step; the one before it becomes `index.old`.
fn swap(db: &Path, index: &Path, fresh: &Path) -> Result<()> {
    let wrong = |e: std::io::Error| {
        Error::Failed(format!("{} could not become the index: {e}", fresh.display()))
    };
    if index.exists() {
        renameat_with(CWD, fresh, CWD, index, RenameFlags::EXCHANGE)
            .map_err(|e| wrong(e.into()))?;
        let kept = db.join("index.old");
        remove(&kept)?;
        std::fs::rename(fresh, kept).map_err(wrong)?;
    } else {
        std::fs::rename(fresh, index).map_err(wrong)?;
    }
    std::fs::File::open(db).and_then(|dir| dir.sync_all()).map_err(wrong)
}

// What it finds.
const STRAYS: &str = "names that are no blob, not indexed";
const STALE: &str = "other versions of keys, not indexed";
const CONFLICTS: &str = "replicas of different lengths under one name, the majority taken";
const DOUBTFUL: &str = "blobs that -from calls unfinished or deleted, not indexed and left alone";
const LOST: &str = "keys that no blob was found for, their records kept";
const UNHASHED: &str = "keys whose blobs cannot be read for their md5, or do not agree on it";

struct Rebuild<'a> {
    options: &'a Options,
    volumes: std::sync::Arc<Volumes>,
    auth: Option<String>,
    new: Index,
    old: Option<Index>,
    /// The volumes and subvolumes on which a blob was listed.
    listed: Mutex<HashSet<String>>,
    findings: Findings,
    replicas: AtomicU64,
    /// Keys with fewer replicas than asked for.
    under: AtomicU64,
}

impl Rebuild<'_> {
    fn carry_debris(&self) -> Result<()> {
        let Some(old) = &self.old else { return Ok(()) };
        old.view().debris(b"", |key, version, mut entry| {
            entry.replicas.retain(|replica| !self.options.is_lost(replica));
            self.new.change().set_debris(key, version, &entry).commit()
        })
    }

    /// Writes the records of one prefix.
    fn index(&self, found: Found) -> Result<()> {
        for stray in found.strays {
            self.findings.add(STRAYS, stray);
        }
        let mut change = self.new.change();
        for (key, blobs) in found.keys {
            {
                let mut listed = lock(&self.listed);
                for blob in &blobs {
                    if !listed.contains(&blob.replica) {
                        listed.insert(blob.replica.clone());
                    }
                }
            }
            if let Some(record) = self.record(&key, blobs)? {
                self.replicas.fetch_add(record.replicas.len() as u64, Ordering::Relaxed);
                if record.replicas.len() < self.options.replicas {
                    self.under.fetch_add(1, Ordering::Relaxed);
                    log::info!("{} has fewer replicas than asked for", name(&key));
                }
                change = change.put(&key, &record);
            }
        }
        change.commit()
    }

    /// The record of a key with these blobs; `None`: they are all debris.
    fn record(&self, key: &[u8], blobs: Vec<Blob>) -> Result<Option<Record>> {
        let old = self.old.as_ref().map_or(Ok(None), |old| old.get(key))?;
        // No value is empty: this is what a power cut leaves.
        let (empty, mut blobs): (Vec<_>, Vec<_>) = blobs.into_iter().partition(|b| b.size == 0);
        for Blob { replica, version, .. } in empty {
            self.findings.add(STRAYS, format!("{replica}{} is empty", path(key, version)));
        }
        for (version, entry) in self.old.as_ref().map_or(Ok(Vec::new()), |old| old.debris(key))? {
            let kept = old.as_ref().filter(|old| old.version == version);
            let is_there = |replica: &&String| {
                blobs.iter().any(|blob| blob.version == version && blob.replica == **replica)
            };
            let lost = |replica: &&String| self.options.is_lost(replica);
            let (there, missing): (Vec<_>, Vec<_>) = entry.replicas.iter().partition(is_there);
            let complete = !there.is_empty() && missing.iter().all(lost);
            if self.options.from.is_some() && kept.is_none() && complete {
                // A write that was under way when an old copy was made, and is a value since? Or one
                // that never ended? The cleaner must not be the one to decide.
                self.findings.add(DOUBTFUL, format!("{} {}", name(key), path(key, version)));
                self.new.change().drop_debris(key, version).commit()?;
            }
            blobs.retain(|blob| {
                blob.version != version
                    || !entry.replicas.contains(&blob.replica)
                    || kept.is_some_and(|old| old.replicas.contains(&blob.replica))
            });
        }
        let mut versions: BTreeMap<u64, Vec<Blob>> = BTreeMap::new();
        for blob in blobs {
            versions.entry(blob.version).or_default().push(blob);
        }
        // The old record's version wins. Where no blob has it, the old index is an old copy: a newer
        // version is what came after it, an older one is stale. Without an old record it is the
        // version with the most replicas, then the newest.
        let known = old.as_ref().map(|old| old.version);
        let ranked =
            versions.iter().filter(|(version, _)| known.is_none_or(|known| **version > known));
        let ranked = ranked
            .max_by_key(|(version, blobs)| (blobs.len(), **version))
            .map(|(version, _)| *version);
        // A whole newer version is what replaced that of an old copy.
        let replaced = ranked.filter(|version| {
            self.options.from.is_some() && versions[version].len() >= self.options.replicas
        });
        let there = replaced.or(known.filter(|known| versions.contains_key(known))).or(ranked);
        let version = there.or(known).unwrap_or(0);
        let old = old.filter(|old| old.version == version);
        let chosen = versions.remove(&version);
        for version in versions.into_keys() {
            self.findings.add(STALE, format!("{} {}", name(key), path(key, version)));
        }
        let Some(blobs) = chosen else { return Ok(None) };
        // Under a plain name an old copy's record may be that of another value of the same length.
        let old = old.filter(|old| {
            let as_old = |time| blobs.iter().any(|blob| blob.time == time);
            self.options.from.is_none() || old.time.is_none_or(as_old)
        });
        let (size, time, mut replicas) = self.agree(key, blobs, old.as_ref());
        let wanted =
            place(key, &self.options.volumes, self.options.replicas, self.options.subvolumes);
        let order =
            |replica: &String| wanted.iter().position(|w| w == replica).unwrap_or(wanted.len());
        replicas.sort_by(|a, b| order(a).cmp(&order(b)).then(a.cmp(b)));
        let same = old.filter(|old| old.size.is_none_or(|known| known == size));
        let mut record = Record {
            state: same.as_ref().map(|old| old.state).unwrap_or_default(),
            hash: same.as_ref().and_then(|old| old.hash),
            size: Some(size),
            time: same.as_ref().and_then(|old| old.time).or(Some(time)),
            version,
            replicas,
        };
        if self.options.rehash && record.hash.is_none() {
            record.hash = self.hash(key, &record)?;
        }
        Ok(Some(record))
    }

    /// The value's length and time, and the replicas that hold it. Different lengths under one name
    /// are different values: the old record's length counts, otherwise the majority's, then the newest.
    fn agree(&self, key: &[u8], blobs: Vec<Blob>, old: Option<&Record>) -> (u64, u64, Vec<String>) {
        let mut sizes: BTreeMap<u64, Vec<Blob>> = BTreeMap::new();
        for blob in blobs {
            sizes.entry(blob.size).or_default().push(blob);
        }
        let known = old.and_then(|old| old.size);
        if sizes.len() > 1 || known.is_some_and(|known| !sizes.contains_key(&known)) {
            let text = sizes.iter().flat_map(|(size, blobs)| {
                blobs.iter().map(move |b| format!(" {} on {}", size, b.replica))
            });
            let text = text.chain(known.map(|size| format!(" {size} in the old index")));
            let text = format!("{}:{}", name(key), text.collect::<Vec<_>>().join(","));
            self.findings.add(CONFLICTS, text);
        }
        let newest = |blobs: &[Blob]| blobs.iter().map(|blob| blob.time).max().unwrap_or(0);
        let rank = |size: u64, blobs: &[Blob]| (known == Some(size), blobs.len(), newest(blobs));
        let best = sizes.into_iter().max_by_key(|(size, blobs)| rank(*size, blobs));
        let (size, blobs) = best.unwrap_or_default();
        let oldest = blobs.iter().map(|blob| blob.time).min().unwrap_or(0);
        (size, oldest, blobs.into_iter().map(|blob| blob.replica).collect())
    }

    /// The md5 of a record's blob, on which two replicas have to agree: one alone may have rotted.
    /// Where only one can be read it is that one's.
    fn hash(&self, key: &[u8], record: &Record) -> Result<Option<Hash>> {
        let (blob, mut read) = (path(key, record.version), Vec::new());
        for replica in &record.replicas {
            match self.volumes.digest(replica, &blob, self.auth.as_deref()) {
                Ok(Some((hash, _))) if read.contains(&hash) => return Ok(Some(hash)),
                Ok(Some((hash, size))) if Some(size) == record.size => read.push(hash),
                Ok(_) => {}
                Err(error) => eprintln!("{error}"),
            }
        }
        if let [hash] = read[..] {
            return Ok(Some(hash));
        }
        self.findings.add(UNHASHED, name(key));
        Ok(None)
    }

    /// A disk that is not mounted lists nothing, just as an empty one does: that must not cost keys.
    fn check_empty_volumes(&self) -> Result<()> {
        let Some(old) = &self.old else { return Ok(()) };
        let listed = lock(&self.listed);
        let mut empty = BTreeSet::new();
        old.view().records(b"", b"", |key, text| {
            for replica in decode(key, Record::decode(text), text)?.replicas {
                if !listed.contains(&replica) && !self.options.is_lost(&replica) {
                    empty.insert(replica);
                }
            }
            Ok(true)
        })?;
        let Some(first) = empty.first() else { return Ok(()) };
        let unknown = !self.options.volumes.iter().any(|volume| volume == volume_of(first));
        let why =
            if unknown { "is not in -volumes." } else { "lists no blob: is its disk mounted?" };
        let lost: Vec<String> = empty.iter().map(|replica| format!("-lost {replica}")).collect();
        let lost = lost.join(" ");
        Err(Error::Failed(format!(
            "{first} {why} (The old index names it. If it is gone for good: {lost})"
        )))
    }

    /// Keys of the old index that no blob was found for keep their record: they are known to be lost.
    fn keep_lost_keys(&self) -> Result<()> {
        let Some(old) = &self.old else { return Ok(()) };
        old.view().records(b"", b"", |key, text| {
            if self.new.get(key)?.is_none() {
                let record = decode(key, Record::decode(text), text)?;
                self.new.change().put(key, &record).commit()?;
                self.findings.add(LOST, name(key));
            }
            Ok(true)
        })
    }

    /// Prints the summary: the number of keys, and whether something asks for a bad exit status.
    fn report(&self, begun: Instant) -> Result<(u64, bool)> {
        let findings = &self.findings;
        findings.show();
        let mut keys = 0;
        self.new.view().records(b"", b"", |_, _| {
            keys += 1;
            Ok(true)
        })?;
        println!(
            "{keys} keys, {} replicas, {} under-replicated, {} skipped, {:.1} s",
            self.replicas.load(Ordering::Relaxed),
            self.under.load(Ordering::Relaxed),
            findings.count(STRAYS) + findings.count(STALE),
            begun.elapsed().as_secs_f64()
        );
        Ok((keys, [LOST, UNHASHED, DOUBTFUL].iter().any(|kind| findings.count(kind) > 0)))
    }
}

/// A key as it is shown to people.
pub fn name(key: &[u8]) -> String {
    format!("\"{}\"", key.escape_ascii())
}
