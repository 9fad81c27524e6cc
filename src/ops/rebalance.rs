//! REBALANCE and `mkv rebalance`: replicas to where placement wants them.
//!
//! One key: what exists is asked for, what is missing is copied from a replica whose bytes match the
//! record while they stream, then one batch makes the record name the new replicas and the surplus
//! ones debris. A crash before that batch leaves the copies as debris, one after it the surplus.
//! The surplus waits until the copies have surely reached their disks.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::record::{Debris, Record, volume_of};
use crate::index::decode;
use crate::ops::progress::Progress;
use crate::ops::scan::threads;
use crate::store::{NOT_FOUND, Store, now};
use crate::threads::lock;
use crate::volumes::upload::{PutOptions, Upload};

/// Keys that are worked on at the same time.
const WIDTH: usize = 16;

/// Keys that could not be rebalanced and are listed without `-v`.
const LISTED: u64 = 100;

/// Keys that are read from the index before they are worked on.
const BATCH: usize = 4096;

/// What one key needs.
pub struct Plan {
    /// Replicas of the record that are there, in the right length.
    sources: Vec<String>,
    length: u64,
    /// Where placement wants a replica and the record's is not, or not whole.
    copies: Vec<String>,
    wanted: Vec<String>,
}

impl Plan {
    fn is_needed(&self, record: &Record) -> bool {
        !self.copies.is_empty() || self.wanted != record.replicas
    }
}

impl Store {
    /// Moves one key's replicas to where placement wants them. `None`: there was nothing to do.
    pub fn rebalance(&self, key: &[u8], auth: Option<&str>) -> Result<Option<Plan>> {
        let _lock = self.index.lock(key).ok_or(Error::Locked)?;
        let record = self.index.get(key)?.ok_or(NOT_FOUND)?;
        let plan = self.plan(key, &record, auth)?;
        if !plan.is_needed(&record) {
            return Ok(None);
        }
        self.secure(key, &record, &plan, auth)?;
        let mut copied = self.index.debris_entry(key, record.version)?.unwrap_or_default();
        copied
            .replicas
            .retain(|replica| !plan.wanted.contains(replica) && !self.options.is_lost(replica));
        let surplus: Vec<String> = self.surplus(&record, &plan).cloned().collect();
        if !surplus.is_empty() {
            copied.grow(&Debris {
                until: 0,
                wait: now() + self.options.settle.as_secs(),
                replicas: surplus,
            });
        }
        let change = self.index.change().set_debris(key, record.version, &copied);
        change.put(key, &Record { replicas: plan.wanted.clone(), ..record }).commit()?;
        Ok(Some(plan))
    }

    /// Copies what is missing: from the first source whose bytes are the record's.
    pub fn restore(
        &self,
        key: &[u8],
        record: &Record,
        sources: &[String],
        copies: &[String],
        auth: Option<&str>,
    ) -> Result<()> {
        let blob = path(key, record.version);
        self.check_agree(key, record, sources, auth)?;
        let mut failed = Error::Gone;
        for source in sources {
            let opened = match self.volumes.read(source, &blob, auth) {
                Ok(Some(opened)) if record.size.is_none_or(|size| size == opened.length) => opened,
                Ok(_) => continue,
                Err(error) => {
                    failed = error;
                    continue;
                }
            };
            let mut body = opened.body;
            let upload =
                Upload { reader: &mut body, length: Some(opened.length), content_md5: record.hash };
            let time = record.time.or(opened.time).unwrap_or_else(now);
            let options = PutOptions { time, md5sum: false };
            match self.write_blob(key, record.version, copies, upload, options, auth) {
                Ok(_) => return Ok(()),
                // The source ended early or has other bytes: another one may be good.
                Err(Error::BadRequest(why)) => {
                    failed = Error::Failed(format!(
                        "{source} is no good source for \"{}\": {why}",
                        key.escape_ascii()
                    ));
                    log::warn!("{failed}");
                }
                Err(error) => return Err(error),
            }
        }
        Err(failed)
    }

    /// Without a hash all replicas have to hold the same bytes: to copy a rotten one, or to remove one
    /// of those that are right, could make a majority of the rotten.
    fn check_agree(
        &self,
        key: &[u8],
        record: &Record,
        replicas: &[String],
        auth: Option<&str>,
    ) -> Result<()> {
        if record.hash.is_some() || replicas.len() < 2 {
            return Ok(());
        }
        let (blob, mut digests) = (path(key, record.version), HashSet::new());
        for replica in replicas {
            digests.insert(self.volumes.digest(replica, &blob, auth)?);
        }
        if digests.len() == 1 {
            return Ok(());
        }
        Err(Error::Failed(format!(
            "the replicas of \"{}\" differ, and no hash tells which is right: see mkv verify -deep",
            key.escape_ascii()
        )))
    }

    /// Sees to it that the value is whole where it is to be, before anything else of it may go: by
    /// copies from a good source or, where there is nothing to copy, by reading what stays.
    fn secure(&self, key: &[u8], record: &Record, plan: &Plan, auth: Option<&str>) -> Result<()> {
        if !plan.copies.is_empty() {
            if self.may_be_deleted(key) {
                let text = "a deletion of this key got no answer: try again in an hour";
                return Err(Error::Unavailable(text.into()));
            }
            return self.restore(key, record, &plan.sources, &plan.copies, auth);
        }
        if self.surplus(record, plan).next().is_none() {
            return Ok(());
        }
        if record.hash.is_none() {
            return self.check_agree(key, record, &plan.sources, auth);
        }
        let blob = path(key, record.version);
        for replica in &plan.wanted {
            let digest = self.volumes.digest(replica, &blob, auth)?;
            if digest.map(|(hash, _)| hash) == record.hash {
                return Ok(());
            }
        }
        Err(Error::Failed("what stays has other bytes: mkv verify -deep -repair mends it".into()))
    }

    /// The replicas that the plan has no more use for.
    fn surplus<'a>(&self, record: &'a Record, plan: &Plan) -> impl Iterator<Item = &'a String> {
        record.replicas.iter().filter(|r| !plan.wanted.contains(r) && !self.options.is_lost(r))
    }

    /// Those of the replicas that have the record's blob, in its length, with that length.
    pub fn whole<'a>(
        &self,
        key: &[u8],
        record: &Record,
        replicas: impl Iterator<Item = &'a String>,
        auth: Option<&str>,
    ) -> Result<Vec<(String, u64)>> {
        let (blob, mut there) = (path(key, record.version), Vec::new());
        for replica in replicas {
            if let Some(length) = self.volumes.head(replica, &blob, auth)?
                && record.size.is_none_or(|size| size == length)
            {
                there.push((replica.clone(), length));
            }
        }
        Ok(there)
    }

    /// Finds out which replicas exist and what has to be copied. A volume that gives no answer is an
    /// error, unless it is lost.
    fn plan(&self, key: &[u8], record: &Record, auth: Option<&str>) -> Result<Plan> {
        let wanted = self.place(key);
        let named = || record.replicas.iter().filter(|replica| !self.options.is_lost(replica));
        self.volumes.check_distinct(named().chain(&wanted))?;
        let there = self.whole(key, record, named(), auth)?;
        let Some(&(_, length)) = there.first() else { return Err(Error::Gone) };
        // Without a digest and a size, the replicas have to agree on what the value is.
        if record.hash.is_none() && there.iter().any(|(_, other)| *other != length) {
            let text = format!(
                "the replicas of \"{}\" differ in length, and no hash tells which is right",
                key.escape_ascii()
            );
            return Err(Error::Failed(text));
        }
        let sources: Vec<String> = there.into_iter().map(|(replica, _)| replica).collect();
        let copies = wanted.iter().filter(|replica| !sources.contains(replica)).cloned().collect();
        Ok(Plan { sources, length, copies, wanted })
    }
}

/// The counts of a run.
#[derive(Default)]
struct Counts {
    keys: AtomicU64,
    moved: AtomicU64,
    copies: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    /// Copies and bytes for each volume.
    volumes: Mutex<BTreeMap<String, (u64, u64)>>,
}

impl Counts {
    fn fail(&self, progress: &Progress, all: bool, text: &str) {
        if self.failed.fetch_add(1, Ordering::Relaxed) < LISTED || all {
            progress.say(text);
        }
    }
}

/// `mkv rebalance`: all keys, then the surplus.
pub fn run(store: &Arc<Store>) -> Result<()> {
    store.volumes.check_distinct(store.options.volumes.iter())?;
    let counts = Counts::default();
    let progress = Progress::new(store.index.estimate(), "keys");
    let threads = threads(WIDTH)?;
    let mut batch: Vec<(Vec<u8>, Record)> = Vec::new();
    let work = |batch: &mut Vec<(Vec<u8>, Record)>| {
        threads.install(|| {
            batch.par_iter().for_each(|(key, record)| store.one(key, record, &counts, &progress))
        });
        batch.clear();
    };
    store.index.view().records(b"", b"", |key, text| {
        match decode(key, Record::decode(text), text) {
            Ok(record) => batch.push((key.to_vec(), record)),
            Err(error) => counts.fail(&progress, store.options.verbose, &error.to_string()),
        }
        if batch.len() == BATCH {
            work(&mut batch);
        }
        Ok(true)
    })?;
    work(&mut batch);
    progress.end();
    let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let verb = if store.options.dry_run { "to move" } else { "moved" };
    println!(
        "{} keys: {} {verb}, {} copies, {} bytes, {} failed",
        get(&counts.keys),
        get(&counts.moved),
        get(&counts.copies),
        get(&counts.bytes),
        get(&counts.failed)
    );
    for (volume, (copies, bytes)) in &*lock(&counts.volumes) {
        println!("  {volume}: {copies} copies, {bytes} bytes");
    }
    if get(&counts.failed) > LISTED && !store.options.verbose {
        eprintln!("{} more failed: -v shows all", get(&counts.failed) - LISTED);
    }
    let left = if store.options.dry_run { 0 } else { store.settle()? };
    match (get(&counts.failed), left) {
        (0, 0) => Ok(()),
        (0, left) => Err(Error::Failed(format!(
            "{left} keys have debris that could not be deleted: run this again, or start the master"
        ))),
        (failed, _) => Err(Error::Failed(format!(
            "{failed} keys could not be rebalanced: mend what is named above and run this again"
        ))),
    }
}

impl Store {
    fn one(&self, key: &[u8], record: &Record, counts: &Counts, progress: &Progress) {
        counts.keys.fetch_add(1, Ordering::Relaxed);
        progress.add(1);
        let auth = self.own_auth();
        let moved = if self.options.dry_run {
            self.plan(key, record, auth)
                .map(|plan| Some(plan).filter(|plan| plan.is_needed(record)))
        } else {
            self.rebalance(key, auth)
        };
        match moved {
            Ok(None) => {}
            Ok(Some(plan)) => {
                counts.moved.fetch_add(1, Ordering::Relaxed);
                counts.copies.fetch_add(plan.copies.len() as u64, Ordering::Relaxed);
                counts.bytes.fetch_add(plan.length * plan.copies.len() as u64, Ordering::Relaxed);
                let mut volumes = lock(&counts.volumes);
                for copy in &plan.copies {
                    let entry = volumes.entry(volume_of(copy).to_string()).or_default();
                    *entry = (entry.0 + 1, entry.1 + plan.length);
                }
            }
            Err(error) => {
                let text = format!("\"{}\": {error}", key.escape_ascii());
                counts.fail(progress, self.options.verbose, &text);
            }
        }
    }

    /// The last pass: what the run made surplus is deleted, once the copies that take its place have
    /// surely been written back. Returns the number of keys with debris that stays.
    fn settle(self: &Arc<Store>) -> Result<u64> {
        self.index.sync()?;
        let mut until = 0;
        let mut lost = Vec::new();
        self.index.view().debris(b"", |key, version, mut entry| {
            let before = entry.replicas.len();
            entry.replicas.retain(|replica| !self.options.is_lost(replica));
            until = until.max(entry.wait);
            if entry.replicas.len() < before {
                lost.push((key.to_vec(), version, entry));
            }
            Ok(())
        })?;
        for (key, version, entry) in lost {
            self.index.change().set_debris(&key, version, &entry).commit()?;
        }
        let wait = until.saturating_sub(now()).min(self.options.settle.as_secs());
        if wait > 0 {
            println!("waiting {wait} s before what was replaced is deleted");
            std::thread::sleep(std::time::Duration::from_secs(wait));
        }
        self.clean_once()?;
        let mut left = 0;
        self.index.view().debris(b"", |_, _, _| {
            left += 1;
            Ok(())
        })?;
        Ok(left)
    }
}
