//! `mkv rebalance`: moves all keys to the volumes where placement wants them.
//!
//! First all keys are rebalanced, sixteen at a time; then the replicas that this made surplus are deleted, after the
//! copies have rested for `-settle`. A volume that does not answer stops its keys and not the run: they are counted and
//! listed, and the exit status is 1.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rayon::prelude::*;

use super::report::Progress;
use super::scan::threads;
use crate::error::{Error, Result};
use crate::format::quoted;
use crate::format::record::{Record, volume_of};
use crate::index::record_of;
use crate::store::{Plan, Store, now};
use crate::threads::lock;

/// Keys that are worked on at the same time.
const WIDTH: usize = 16;

/// Keys that are read from the index before they are worked on.
const BATCH: usize = 4096;

/// Failed keys that are listed without `-v`.
const LISTED: u64 = 100;

pub fn run(store: &Arc<Store>, dry_run: bool, verbose: bool) -> Result<()> {
    store.check_volumes()?;
    let run = Rebalance {
        store,
        dry_run,
        verbose,
        progress: Progress::new(store.index.estimate(), "keys"),
        keys: AtomicU64::new(0),
        moved: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        volumes: Mutex::default(),
    };
    run.all_keys()?;
    run.show();
    let failed = run.failed.load(Ordering::Relaxed);
    let left = if dry_run { 0 } else { delete_surplus(store)? };
    match (failed, left) {
        (0, 0) => Ok(()),
        (0, left) => Err(Error::Failed(format!(
            "{left} keys have debris that could not be deleted: run this again, or start the master"
        ))),
        (failed, _) => Err(Error::Failed(format!(
            "{failed} keys could not be rebalanced: mend what is named above and run this again"
        ))),
    }
}

struct Rebalance<'a> {
    store: &'a Arc<Store>,
    dry_run: bool,
    verbose: bool,
    progress: Progress,
    keys: AtomicU64,
    moved: AtomicU64,
    failed: AtomicU64,
    /// Copies and bytes for each volume.
    volumes: Mutex<BTreeMap<String, (u64, u64)>>,
}

impl Rebalance<'_> {
    fn all_keys(&self) -> Result<()> {
        let threads = threads(WIDTH)?;
        let mut batch: Vec<(Vec<u8>, Record)> = Vec::new();
        let work = |batch: &mut Vec<(Vec<u8>, Record)>| {
            let one = |(key, record): &(Vec<u8>, Record)| self.one_key(key, record);
            threads.install(|| batch.par_iter().for_each(one));
            batch.clear();
        };
        self.store.index.view().records(b"", b"", |key, text| {
            match record_of(key, text) {
                Ok(record) => batch.push((key.to_vec(), record)),
                Err(error) => self.fail(&error.to_string()),
            }
            if batch.len() == BATCH {
                work(&mut batch);
            }
            Ok(true)
        })?;
        work(&mut batch);
        Ok(())
    }

    fn one_key(&self, key: &[u8], record: &Record) {
        self.keys.fetch_add(1, Ordering::Relaxed);
        self.progress.add(1);
        let auth = self.store.own_auth();
        let moved = if self.dry_run {
            let plan = self.store.plan(key, record, auth);
            plan.map(|plan| Some(plan).filter(|plan| plan.is_needed(record)))
        } else {
            self.store.rebalance(key, auth)
        };
        match moved {
            Ok(None) => {}
            Ok(Some(plan)) => self.count(&plan),
            Err(error) => self.fail(&format!("{}: {error}", quoted(key))),
        }
    }

    fn count(&self, plan: &Plan) {
        self.moved.fetch_add(1, Ordering::Relaxed);
        let mut volumes = lock(&self.volumes);
        for copy in &plan.copies {
            let (copies, bytes) = volumes.entry(volume_of(copy).to_string()).or_default();
            (*copies, *bytes) = (*copies + 1, *bytes + plan.length);
        }
    }

    fn fail(&self, text: &str) {
        if self.failed.fetch_add(1, Ordering::Relaxed) < LISTED || self.verbose {
            self.progress.say(text);
        }
    }

    fn show(&self) {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let volumes = lock(&self.volumes);
        let add = |sum: (u64, u64), one: &(u64, u64)| (sum.0 + one.0, sum.1 + one.1);
        let (copies, bytes) = volumes.values().fold((0, 0), add);
        let (keys, moved, failed) = (get(&self.keys), get(&self.moved), get(&self.failed));
        let verb = if self.dry_run { "to move" } else { "moved" };
        self.progress.clear();
        println!("{keys} keys: {moved} {verb}, {copies} copies, {bytes} bytes, {failed} failed");
        for (volume, (copies, bytes)) in &*volumes {
            println!("  {volume}: {copies} copies, {bytes} bytes");
        }
        if failed > LISTED && !self.verbose {
            eprintln!("{} more failed: -v shows all", failed - LISTED);
        }
    }
}

/// Deletes the surplus replicas, once the copies that replace them have had time to reach their disks. Returns how many
/// entries of debris are left.
fn delete_surplus(store: &Arc<Store>) -> Result<u64> {
    store.index.sync()?;
    let until = store.index.forget_lost(|replica| store.is_lost(replica))?;
    let wait = until.saturating_sub(now()).min(store.config.settle.as_secs());
    if wait > 0 {
        println!("waiting {wait} s before what was replaced is deleted");
        std::thread::sleep(Duration::from_secs(wait));
    }
    store.clean_once()?;
    let mut left = 0;
    store.index.view().debris(b"", |_, _, _| {
        left += 1;
        Ok(())
    })?;
    Ok(left)
}
