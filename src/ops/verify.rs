//! `mkv verify`: compares the index with the volumes, and repairs with `-repair`.
//!
//! First every listing is compared with the index; then the volumes are asked for what is in the index and in no
//! listing. The suspects are looked at again, some thousands at a time, after the index has caught up with a running
//! master: only what is still wrong is a finding.
//!
//! Without `-repair` nothing is changed but `verify.json` in `-db`, the result of a run that has seen the whole store.
//! With it the master is stopped, and nothing is removed that is newer than the index or that the index does not know,
//! except with `-strays`.

use std::collections::BTreeMap;
use std::mem::take;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::examine::{Examiner, Finding, Kind, Suspect, is_debris};
use super::report::{Progress, Report};
use super::scan::{Blob, PrefixListing, scan, threads};
use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::quoted;
use crate::index::scrub::Scrub;
use crate::index::{Index, LOG, Location};
use crate::store::{self, Store, now};
use crate::threads::lock;
use crate::volumes::Volumes;

/// Keys that are looked at together, and how many of them at the same time.
const BATCH: usize = 4096;
const WIDTH: usize = 16;

// Kinds of findings that concern no key, or what was done about a key.
const FOREIGN: &str = "names that are no blob";
const UNREADABLE: &str = "folders that a volume does not list";
const NOT_REPAIRED: &str = "keys that are not repaired";

pub struct Config {
    pub db: Location,
    /// Whether to read every blob.
    pub deep: bool,
    pub repair: bool,
    /// Whether to remove blobs of unknown keys that are older than `grace`.
    pub strays: bool,
    pub grace: Duration,
    pub verbose: bool,
}

pub fn run(config: Config, store: store::Config, volumes: Arc<Volumes>) -> Result<()> {
    let running = config.db.is_shared() || (!config.repair && config.db.is_in_use()?);
    // No master starts during a repair.
    let index = if config.repair { config.db.open(false, false, LOG)? } else { config.db.open_to_read()? };
    let (records, newest) = count_and_age(&index)?;
    if config.repair && records == 0 {
        return Err(Error::Failed(
            "-repair: the index is empty, so every blob would look superfluous: check -db, or run mkv rebuild".into(),
        ));
    }
    let store = Store::new(store, index, volumes);
    store.check_volumes()?;
    let examiner = Examiner { store, running, deep: config.deep };
    let (found, report, begun) = (Mutex::default(), Report::new(config.verbose), Instant::now());
    let verify = Verify { config, examiner, records, newest, found, report, begun };
    threads(WIDTH)?.install(|| verify.all())
}

/// The number of records, and the latest time (seconds since 1970) in them or in debris.
fn count_and_age(index: &Index) -> Result<(u64, u64)> {
    let (mut records, mut newest) = (0, 0);
    let view = index.view();
    for row in view.all_records() {
        let (_, record) = row?;
        newest = newest.max(record.time.unwrap_or(0)).max(record.version / 1_000_000);
        records += 1;
    }
    for entry in view.entries() {
        newest = newest.max(entry?.version / 1_000_000);
    }
    // A clock that was ahead must not make new blobs look old.
    Ok((records, newest.min(now())))
}

struct Verify {
    config: Config,
    examiner: Examiner,
    records: u64,
    /// When the index was last written, in seconds since 1970.
    newest: u64,
    found: Mutex<Found>,
    report: Report,
    begun: Instant,
}

/// What the comparison of the listings with the index has found.
#[derive(Default)]
struct Found {
    /// Keys with a listed blob that their record names.
    seen: u64,
    /// Keys with other listed blobs only, debris left aside.
    unknown: u64,
    /// A blob that is newer than the index, which is therefore an old copy or another store's.
    ahead: Option<String>,
    /// Keys to look at again.
    suspects: BTreeMap<Vec<u8>, Vec<Blob>>,
}

impl Verify {
    fn all(&self) -> Result<()> {
        let store = &self.examiner.store;
        scan(&store.volumes, &store.config.placement.volumes, store.own_auth(), |listing| self.compare(listing))?;
        let (seen, unknown) = self.counts();
        if seen == 0 && unknown > 0 && self.records > 0 {
            return Err(self.wrong_index("nothing is compared further"));
        }
        self.look_at_unlisted()?;
        let mut suspects = take(&mut lock(&self.found).suspects);
        let ahead = lock(&self.found).ahead.take().filter(|_| self.config.repair);
        if let Some(blob) = &ahead {
            eprintln!(
                "the volumes hold what is newer than this index, http://{blob} for one: check -db. Nothing is removed"
            );
        } else if self.config.strays && unknown > seen {
            return Err(self.wrong_index("nothing is removed"));
        }
        let progress = Progress::new(suspects.len() as u64, "keys to look at again");
        let mut wrong = 0;
        while !suspects.is_empty() {
            let batch: Vec<_> = (0..BATCH).map_while(|_| suspects.pop_first()).collect();
            wrong += self.look_and_repair(&batch, ahead.is_some(), &progress).inspect_err(|_| {
                self.report.show();
                println!("ended early: {} keys are still to be looked at", batch.len() + suspects.len());
            })?;
        }
        progress.clear();
        self.conclude(wrong)
    }

    fn counts(&self) -> (u64, u64) {
        let found = lock(&self.found);
        (found.seen, found.unknown)
    }

    /// An index that knows fewer of the keys on the volumes than it does not know is not their index.
    fn wrong_index(&self, consequence: &str) -> Error {
        let (seen, unknown) = self.counts();
        Error::Failed(format!(
            "the index knows {seen} of the {} keys on the volumes: {consequence}; check -db",
            seen + unknown
        ))
    }

    /// Compares the listing of one prefix with the index, and notes what has to be looked at again.
    fn compare(&self, listing: PrefixListing) -> Result<()> {
        for name in listing.foreign {
            self.report.add(FOREIGN, name);
        }
        for folder in listing.unreadable {
            self.report.add(UNREADABLE, folder);
        }
        for (key, blobs) in listing.keys {
            self.compare_key(key, blobs)?;
        }
        Ok(())
    }

    fn compare_key(&self, key: Vec<u8>, mut blobs: Vec<Blob>) -> Result<()> {
        let index = &self.examiner.store.index;
        let state = (index.get(&key)?, Vec::new());
        let findings = self.examiner.examine(&key, &blobs, &[], &state);
        let (record, listed) = (state.0, blobs.len());
        blobs.retain(|blob| !record.as_ref().is_some_and(|record| record.is_at(blob.version, &blob.replica)));
        let seen = blobs.len() < listed;
        lock(&self.found).seen += u64::from(seen);
        if findings.is_ok_and(|findings| findings.is_empty()) {
            return Ok(());
        }
        blobs.shrink_to_fit();
        let debris = index.debris(&key)?;
        let unknown: Vec<&Blob> = blobs.iter().filter(|b| !is_debris(&debris, b.version, &b.replica)).collect();
        let is_ahead = |blob: &&&Blob| match &record {
            Some(record) => blob.version > record.version,
            None => blob.time >= self.newest,
        };
        // A running master may have written the key since its record was read.
        let is_there = |blob: &&&Blob| match self.examiner.running {
            true => {
                matches!(index.get(&key), Ok(now) if now == record)
                    && matches!(self.examiner.blob(&key, blob.version, &blob.replica), Ok(Some(_)))
            }
            false => true,
        };
        let ahead = unknown
            .iter()
            .find(|blob| is_ahead(blob) && is_there(blob))
            .map(|blob| format!("{}{}", blob.replica, path(&key, blob.version)));
        let is_unknown = !seen && !unknown.is_empty();
        let mut found = lock(&self.found);
        found.unknown += u64::from(is_unknown);
        found.ahead = found.ahead.take().or(ahead);
        found.suspects.insert(key, blobs);
        Ok(())
    }

    /// Notes keys that no listing has shown: records without any blob, and debris.
    fn look_at_unlisted(&self) -> Result<()> {
        // What a listing has shown of a key is kept.
        let suspect = |key| {
            lock(&self.found).suspects.entry(key).or_default();
        };
        let view = self.examiner.store.index.view();
        for entry in view.entries() {
            suspect(entry?.key);
        }
        if self.counts().0 == self.records {
            return Ok(());
        }
        view.all_records().par_bridge().try_for_each(|row| {
            let (key, record) = row?;
            let exists = |replica: &String| matches!(self.examiner.blob(&key, record.version, replica), Ok(Some(_)));
            if !record.replicas.iter().any(exists) {
                suspect(key.into());
            }
            Ok(())
        })
    }

    /// Looks at these keys again, repairs them, and notes what is wrong at the end. Returns how many keys are wrong.
    fn look_and_repair(&self, batch: &[Suspect], ahead: bool, progress: &Progress) -> Result<usize> {
        let mut found = self.examiner.look_again(batch.iter().collect())?;
        let suspects = found.iter().map(|(suspect, _)| *suspect).collect();
        let done = batch.len() - if self.config.repair { found.len() } else { 0 };
        progress.add(done as u64);
        if self.config.repair {
            found.par_iter().for_each(|(suspect, findings)| {
                progress.add(1);
                if let Err(error) = self.repair(suspect, findings, ahead) {
                    self.report.add(NOT_REPAIRED, format!("{}: {error}", quoted(&suspect.0)));
                }
            });
            found = self.examiner.look_again(suspects)?;
        } else if self.examiner.running && !found.is_empty() {
            // RocksDB's follower may miss what was deleted just before a master's restart; a new follower does not.
            let index = self.config.db.open_to_read()?;
            found = self.examiner.with_index(index).look_again(suspects)?;
        }
        Ok(found.iter().filter(|(suspect, findings)| self.note(&suspect.0, findings)).count())
    }

    fn repair(&self, suspect: &Suspect, findings: &[Finding], ahead: bool) -> Result<()> {
        self.examiner.restore(&suspect.0, findings)?;
        if ahead {
            return Ok(());
        }
        self.examiner.remove(&suspect.0, findings)?;
        if self.config.strays {
            self.examiner.remove_strays(suspect, findings, self.config.grace.as_secs())?;
        }
        Ok(())
    }

    /// Notes what is wrong with a key. Returns whether that is a fault of the store.
    fn note(&self, key: &[u8], findings: &[Finding]) -> bool {
        for Finding { kind, version, replica } in findings {
            let text = format!("{} http://{replica}{}", quoted(key), path(key, *version));
            self.report.add(kind.title(), text);
        }
        findings.iter().any(|f| !(self.examiner.running && f.kind == Kind::Debris))
    }

    fn conclude(&self, wrong: usize) -> Result<()> {
        self.report.show();
        let (foreign, unreadable) = (self.report.count(FOREIGN), self.report.count(UNREADABLE));
        println!("{} keys in the index, {wrong} with findings, {foreign} names that are no blob", self.records);
        if self.examiner.running && self.report.count(Kind::Debris.title()) > 0 {
            println!("debris is the running master's to clear, and no fault");
        }
        self.keep_result((wrong + foreign + unreadable) as u64);
        if wrong + foreign + unreadable == 0 {
            println!("the store is whole");
            return Ok(());
        }
        let (seen, unknown) = self.counts();
        if unknown > seen {
            return Err(self.wrong_index("see above"));
        }
        Err(Error::Failed("the store is not whole: see above; mkv verify -repair mends what can be mended".into()))
    }

    /// Leaves the result in `-db`, for the master's metrics and page.
    fn keep_result(&self, findings: u64) {
        let Config { deep, repair, .. } = &self.config;
        let (time, seconds) = (now(), self.begun.elapsed().as_secs());
        let (keys, kinds) = (self.records, self.report.counts());
        let scrub = Scrub { time, seconds, deep: *deep, repair: *repair, keys, findings, kinds, ..Scrub::default() };
        if let Err(error) = self.examiner.store.index.keep_verify(scrub) {
            log::warn!("the master will not see this result: {error}");
        }
    }
}
