//! `mkv rebalance`: moves all keys to the volumes where placement wants them.
//!
//! First all keys are rebalanced, sixteen at a time; then the replicas that this made surplus are deleted, after the
//! copies have rested for `-settle`. A volume that does not answer stops its keys and not the run: they are counted and
//! listed, and the exit status is 1.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rayon::prelude::*;

use super::report::Progress;
use super::scan::threads;
use crate::error::{Error, Result};
use crate::format::quoted;
use crate::format::record::volume_of;
use crate::index::record_of;
use crate::store::{Plan, Store, now};
use crate::threads::lock;

/// Keys that are worked on at the same time.
const WIDTH: usize = 16;

/// Failed keys that are listed without `-v`.
const LISTED: u64 = 100;

pub fn run(store: &Arc<Store>, dry_run: bool, verbose: bool) -> Result<()> {
    store.check_volumes()?;
    let progress = Progress::new(store.index.estimate(), "keys");
    let run = Rebalance { store, dry_run, verbose, progress, totals: Mutex::default() };
    threads(WIDTH)?.install(|| {
        store.index.view().texts().par_bridge().try_for_each(|row| -> Result<()> {
            let (key, text) = row?;
            run.rebalance(&key, &text);
            Ok(())
        })
    })?;
    let failed = run.show();
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
    store: &'a Store,
    dry_run: bool,
    verbose: bool,
    progress: Progress,
    totals: Mutex<Totals>,
}

#[derive(Default)]
struct Totals {
    /// Keys whose record could be read.
    keys: u64,
    moved: u64,
    failed: u64,
    /// Copies and bytes for each volume.
    volumes: BTreeMap<String, (u64, u64)>,
}

impl Rebalance<'_> {
    /// Rebalances one key and counts what came of it.
    fn rebalance(&self, key: &[u8], text: &[u8]) {
        self.progress.add(1);
        let record = match record_of(key, text) {
            Ok(record) => record,
            Err(error) => return self.fail(&error.to_string()),
        };
        let auth = self.store.own_auth();
        let moved = if self.dry_run {
            let plan = self.store.plan(key, &record, auth);
            plan.map(|plan| Some(plan).filter(|plan| plan.is_needed(&record)))
        } else {
            self.store.rebalance(key, auth)
        };
        lock(&self.totals).keys += 1;
        match moved {
            Ok(None) => {}
            Ok(Some(plan)) => self.count(&plan),
            Err(error) => self.fail(&format!("{}: {error}", quoted(key))),
        }
    }

    fn count(&self, plan: &Plan) {
        let mut totals = lock(&self.totals);
        totals.moved += 1;
        for copy in &plan.copies {
            let (copies, bytes) = totals.volumes.entry(volume_of(copy).to_string()).or_default();
            *copies += 1;
            *bytes += plan.length;
        }
    }

    fn fail(&self, text: &str) {
        let mut totals = lock(&self.totals);
        totals.failed += 1;
        if totals.failed <= LISTED || self.verbose {
            self.progress.say(text);
        }
    }

    /// Prints what was done, and returns the number of keys that failed.
    fn show(&self) -> u64 {
        self.progress.clear();
        let Totals { keys, moved, failed, volumes } = &*lock(&self.totals);
        let verb = if self.dry_run { "to move" } else { "moved" };
        let copies: u64 = volumes.values().map(|(copies, _)| copies).sum();
        let bytes: u64 = volumes.values().map(|(_, bytes)| bytes).sum();
        println!("{keys} keys: {moved} {verb}, {copies} copies, {bytes} bytes, {failed} failed");
        for (volume, (copies, bytes)) in volumes {
            println!("  {volume}: {copies} copies, {bytes} bytes");
        }
        if *failed > LISTED && !self.verbose {
            eprintln!("{} more failed: -v shows all", failed - LISTED);
        }
        *failed
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
    store.index.left()
}
