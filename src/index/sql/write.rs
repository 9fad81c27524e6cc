//! Writes of blobs: the verbs that begin and end them, each one statement that can be repeated.
//!
//! 1. `begin` inserts a row into `writing`: this session writes this version of the key to these replicas. The database
//!    chooses the version, above all that the key has, so that no blob's path was ever another one's.
//! 2. `flip` locks that row if it is still this session's, changes the record if it still is what was read, deletes the
//!    row and makes the old blob debris. A takeover deletes the same row first, so only one of the two commits.
//! 3. `abandon` makes what a failed write may have left debris.
//!
//! A rebalance writes the version that the record has. It takes its row first and reads the debris then, and copies to
//! no replica that an entry names: `debris.rs` says why. If it was fenced, it makes its copies debris only under a new
//! claim: without one, another rebalance may be making the same copies.

use std::time::{Duration, Instant};

use super::connection::Arg::{Bool, Bytes, Int, Text};
use super::pool::Failure;
use super::session::Undo;
use super::statements as sql;
use super::{Engine, entry, flag, int, signed};
use crate::error::{Error, Result};
use crate::format::quoted;
use crate::format::record::{Debris, Record};
use crate::index::locks::{KeyLock, Owner};
use crate::index::{Deleted, Entry, Held, Judge, Stage, Writing, record_of};

/// How long a flip is tried while the database is away: a failover may take a minute.
pub const FLIP: Duration = Duration::from_secs(60);

/// The pause before the next attempt.
pub const PAUSE: Duration = Duration::from_millis(300);

/// How often a change is tried on a record that others change meanwhile.
pub const TURNS: u32 = 20;

/// The row of a write. If it is dropped before it has ended, the row becomes debris.
pub struct Trace<'a> {
    engine: &'a Engine,
    key: Vec<u8>,
    version: i64,
    session: i64,
    pub ended: bool,
}

impl<'a> Trace<'a> {
    pub fn new(engine: &'a Engine, key: &[u8], version: i64) -> Trace<'a> {
        Trace { engine, key: key.into(), version, session: engine.session(), ended: false }
    }
}

impl Trace<'_> {
    pub fn name(&self) -> [super::connection::Arg<'_>; 3] {
        [Bytes(&self.key), Int(self.version), Int(self.session)]
    }

    /// Ends a write that left no blob.
    fn end(mut self) {
        self.ended = self.engine.pool.query(sql::END, &self.name()).is_ok();
    }

    /// Makes the blobs of a write debris, for so many seconds one that a 404 does not clear.
    pub fn abandon(mut self, until: i64) {
        let [key, version, session] = self.name();
        self.ended = self.engine.pool.query(sql::ABANDON, &[key, version, session, Int(until)]).is_ok();
    }

    /// Ends a write that failed, whose blobs on these replicas were deleted as far as possible.
    pub fn give_up(self, entry: &Entry, replicas: &[String], deleted: &Deleted) {
        if replicas.iter().all(|replica| deleted.gone.contains(replica)) {
            self.end();
        } else {
            self.abandon(entry.debris.doubtful_until.saturating_sub(super::now()) as i64);
        }
    }

    /// Whether its session is no longer that of this process.
    pub fn is_lost(&self) -> bool {
        self.engine.is_lost(self.session)
    }
}

impl Drop for Trace<'_> {
    fn drop(&mut self) {
        if !self.ended {
            let (key, version) = (std::mem::take(&mut self.key), Some(self.version));
            self.engine.undo_later(Undo { key, version, session: self.session });
        }
    }
}

/// What a flip does beside the new record.
#[derive(Default)]
pub struct Terms {
    /// The replicas of the old record that are not needed any more, and how long they are kept.
    pub surplus: Vec<String>,
    pub keep: Option<Duration>,
    /// The multipart upload that has to be there, or 0.
    pub upload: i64,
}

/// What a flip has come to.
enum Flip {
    Done,
    /// The record is not what it was.
    Changed,
    /// The row is no longer this session's.
    Fenced,
}

impl Engine {
    /// `replace`: also over a live record. `pass`: also while others write the key; the last flip wins.
    pub fn begin(
        &self,
        key: &[u8],
        replicas: Vec<String>,
        replace: bool,
        pass: bool,
        check: impl FnOnce(Option<&Record>) -> Result<()>,
    ) -> Result<Writing<'_>> {
        let (lock, session) = (self.lock(key, pass)?, self.session());
        let args = [Bytes(key), Int(session), Text(&replicas.join(",")), Bool(replace), Bool(pass)];
        let row = match self.pool.query(sql::BEGIN, &args) {
            Ok(rows) => rows.into_iter().next().unwrap_or_else(|| vec![None; 3]),
            Err(Failure::Doubt(why)) => {
                lock.keep();
                self.undo_later(Undo { key: key.into(), version: None, session });
                return Err(Error::Unavailable(format!("the database gave no answer ({why}): nothing is stored")));
            }
            Err(failure) => return Err(failure.into()),
        };
        let version = int(&row, 0);
        let trace = (version != 0).then(|| Trace { engine: self, key: key.into(), version, session, ended: false });
        let record = row[1].as_deref().map(|text| record_of(key, text)).transpose()?;
        let held = Held { lock, record };
        match (check(held.record.as_ref()), trace) {
            (Err(error), trace) => {
                if let Some(trace) = trace {
                    trace.end();
                }
                Err(error)
            }
            (Ok(()), None) if flag(&row, 2) => Err(Error::Locked),
            (Ok(()), None) => Err(self.lost_session()),
            (Ok(()), trace) => {
                let debris = Debris { replicas: replicas.clone(), ..Debris::default() };
                let entry = Entry { key: key.into(), version: version as u64, debris, stage: Stage::Due };
                Ok(Writing { held, entry, replicas, replace, trace })
            }
        }
    }

    pub fn lock(&self, key: &[u8], passing: bool) -> Result<KeyLock<'_>> {
        self.locks.lock(key, if passing { Owner::Passing } else { Owner::Client }).ok_or(Error::Locked)
    }

    pub fn lost_session(&self) -> Error {
        Error::Unavailable("another master took this one for dead: try again in a moment".into())
    }

    pub fn claim(&self, key: &[u8]) -> Result<Writing<'_>> {
        let lock = self.lock(key, false)?;
        let record = self.get(key)?.ok_or(Error::NOT_FOUND)?;
        let entry = Entry { key: key.into(), version: record.version, debris: Debris::default(), stage: Stage::Due };
        let held = Held { lock, record: Some(record) };
        Ok(Writing { held, entry, replicas: Vec::new(), replace: true, trace: None })
    }

    pub fn claim_copies<'a>(&'a self, writing: &mut Writing<'a>, copies: &[String]) -> Result<()> {
        let key = writing.held.key();
        writing.trace = Some(self.claim_row(key, writing.entry.version, copies)?);
        writing.entry.debris.replicas = copies.to_vec();
        writing.replicas = copies.to_vec();
        // Only now: what a takeover made debris before is in it.
        let version = Int(signed(key, writing.entry.version)?);
        let rows = self.pool.query(sql::ENTRY, &[Bytes(key), version])?;
        let is_copy = |replica: &String| copies.contains(replica);
        if rows.iter().any(|row| entry(key, 0, row).debris.replicas.iter().any(is_copy)) {
            if let Some(trace) = writing.trace.take() {
                trace.end();
            }
            let text = "a deletion on a volume that it belongs on may still be carried out: try again in an hour";
            return Err(Error::Unavailable(text.into()));
        }
        Ok(())
    }

    /// Takes the row for copies of the record's blob.
    pub fn claim_row(&self, key: &[u8], version: u64, replicas: &[String]) -> Result<Trace<'_>> {
        let mut trace = Trace::new(self, key, signed(key, version)?);
        let ([name, version, session], id) = (trace.name(), trace.session);
        let args = [name, version, session, Text(&replicas.join(","))];
        match self.pool.query(sql::CLAIM, &args) {
            Ok(rows) if rows.is_empty() => {
                trace.ended = true;
                Err(if self.is_lost(id) { self.lost_session() } else { Error::Locked })
            }
            Ok(_) => Ok(trace),
            Err(failure) => {
                trace.ended = !matches!(failure, Failure::Doubt(_));
                Err(failure.into())
            }
        }
    }

    pub fn doubt(&self, writing: &mut Writing, until: u64) -> Result<()> {
        let debris = &mut writing.entry.debris;
        debris.doubtful_until = debris.doubtful_until.max(until);
        Ok(())
    }

    /// Copies have the record's version: their blobs are the cleaner's to delete.
    pub fn abandon(&self, writing: Writing, delete: impl FnOnce(&Held, &Entry, &[String]) -> Deleted) -> Result<()> {
        let Writing { held, entry, replicas, trace, .. } = writing;
        let Some(trace) = trace else { return Ok(()) };
        let is_copy = held.record.as_ref().is_some_and(|record| record.version == entry.version);
        let deleted = if is_copy { Deleted::default() } else { delete(&held, &entry, &replicas) };
        trace.give_up(&entry, &replicas, &deleted);
        Ok(())
    }

    pub fn flip(&self, writing: Writing, new: &Record, surplus: Vec<String>, keep: Option<Duration>) -> Result<()> {
        // A later writer was faster: this value was there for an instant, before that one.
        let overtaken = self.flip_judged(writing, new, Terms { surplus, keep, upload: 0 }, &|_| Ok(()))?;
        overtaken.into_iter().for_each(|trace| trace.abandon(0));
        Ok(())
    }

    /// `judge`: whether the record that is found may be replaced. Gives the row back if the record has a higher version.
    pub fn flip_judged<'a>(
        &'a self,
        mut writing: Writing<'a>,
        new: &Record,
        terms: Terms,
        judge: Judge,
    ) -> Result<Option<Trace<'a>>> {
        let trace = match writing.trace.take() {
            Some(trace) => trace,
            // A rebalance that copies nothing.
            None => self.claim_row(writing.held.key(), new.version, &new.replicas)?,
        };
        let (begun, mut old) = (Instant::now(), writing.held.record.take());
        let is_copy = old.as_ref().is_some_and(|old| old.version == new.version);
        let mut turns = 0;
        loop {
            match judge(old.as_ref()) {
                Err(Error::Unavailable(_)) if begun.elapsed() < FLIP => {
                    std::thread::sleep(PAUSE);
                    continue;
                }
                Err(refused) => {
                    trace.abandon(0);
                    return Err(refused);
                }
                Ok(()) => {}
            }
            if old.as_ref().is_some_and(|old| old.version > new.version) {
                return Ok(Some(trace));
            }
            // An upload replaces the whole blob of the record that it finds.
            let surplus = match &old {
                Some(old) if !is_copy => old.replicas.join(","),
                _ => terms.surplus.join(","),
            };
            match self.flip_once(&trace, old.as_ref(), new, &surplus, &terms) {
                Ok(Flip::Done) => {
                    trace.forget();
                    return Ok(None);
                }
                Ok(Flip::Fenced) => {
                    return self.fenced(trace, new, &writing.replicas, is_copy, begun).map(|()| None);
                }
                Ok(Flip::Changed) => match self.get(writing.held.key()) {
                    Ok(found) => {
                        turns += 1;
                        let is_forbidden = found.as_ref().is_some_and(|found| found.live() && !writing.replace);
                        if is_copy || is_forbidden || turns > TURNS {
                            trace.abandon(0);
                            return Err(Error::Locked);
                        }
                        old = found;
                    }
                    Err(Error::Unavailable(_)) if begun.elapsed() < FLIP => std::thread::sleep(PAUSE),
                    Err(error) => return Err(error),
                },
                Err(failure) if failure.is_temporary() && begun.elapsed() < FLIP => std::thread::sleep(PAUSE),
                Err(failure) => return Err(in_doubt(&failure)),
            }
        }
    }

    fn flip_once(
        &self,
        trace: &Trace,
        old: Option<&Record>,
        new: &Record,
        surplus: &str,
        terms: &Terms,
    ) -> std::result::Result<Flip, Failure> {
        let ([key, version, session], new, upload) = (trace.name(), new.encode(), Int(terms.upload));
        let rows = match old {
            None => self.pool.query(sql::FLIP_NEW, &[key, version, session, Text(&new), upload])?,
            Some(old) => {
                let keep = Int(terms.keep.map_or(-1, |keep| keep.as_secs() as i64));
                let (old_version, old) = (Int(old.version as i64), old.encode());
                let args = [key, version, session, Text(&new), old_version, Text(&old), Text(surplus), keep, upload];
                self.pool.query(sql::FLIP, &args)?
            }
        };
        Ok(match rows.first().map(|row| (flag(row, 0), flag(row, 1))) {
            Some((_, true)) => Flip::Done,
            Some((true, false)) => Flip::Changed,
            _ => Flip::Fenced,
        })
    }

    /// A flip found the row gone: it was carried out before and its answer was lost, or another master took over.
    fn fenced(&self, trace: Trace, new: &Record, replicas: &[String], is_copy: bool, begun: Instant) -> Result<()> {
        let key = trace.key.clone();
        let found = loop {
            match self.get(&key) {
                Err(Error::Unavailable(_)) if begun.elapsed() < FLIP => std::thread::sleep(PAUSE),
                found => break found?,
            }
        };
        let (version, mut trace) = (trace.version, trace);
        trace.ended = true;
        if found.as_ref().is_some_and(|found| found.version == new.version && (!is_copy || found == new)) {
            // A commit that is acknowledged: the one before it is on the standby, too.
            self.beat().map_err(|failure| in_doubt(&failure))?;
            return Ok(());
        }
        if is_copy {
            // Without a claim another rebalance may be making these copies: then they are left alone.
            if let Ok(trace) = self.claim_row(&key, new.version, replicas) {
                trace.abandon(self.late());
            }
        } else {
            let args = [Bytes(&key), Int(version), Int(self.late()), Text(&replicas.join(","))];
            if let Err(failure) = self.pool.query(sql::ADD, &args).or_else(|_| self.pool.query(sql::ADD, &args)) {
                log::warn!("blobs of {} may be left: {failure}", quoted(&key));
            }
        }
        Err(Error::Unavailable("in doubt: another master has taken over this write: read the key, or try again".into()))
    }
}

impl Trace<'_> {
    /// Ends a write whose row is gone.
    pub fn forget(mut self) {
        self.ended = true;
    }
}

pub fn in_doubt(failure: &Failure) -> Error {
    Error::Unavailable(format!("in doubt: the change may have been made or not ({failure}): ask for the key"))
}
