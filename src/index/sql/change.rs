//! Changes of a record that write no blob: DELETE, UNLINK, RELINK.
//!
//! A record is read, and changed in one statement if it still is what was read, nobody writes the key and this session
//! lives. A change that got no answer is tried again; if the record then is what it was to become, it was carried out.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use super::connection::Arg::{Bool, Bytes, Int, Text};
use super::pool::Failure;
use super::statements as sql;
use super::write::{PAUSE, TURNS, in_doubt};
use super::{Engine, entry, flag, int, signed, text};
use crate::error::{Error, Result};
use crate::format::record::{Debris, Record};
use crate::index::{Entry, Held, Stage};

/// How long a change is tried that got no answer.
const CHANGE: Duration = Duration::from_secs(10);

/// What one attempt to change a record has come to.
enum Attempt<T> {
    Done(T),
    /// The record or the session is not what it was, or somebody writes the key. `lives`: the session is.
    Changed {
        lives: bool,
    },
    Failed(Failure),
}

impl Engine {
    pub fn remove(
        &self,
        key: &[u8],
        passing: bool,
        check: impl Fn(&Record) -> Result<()>,
    ) -> Result<(Held<'_>, Vec<Entry>)> {
        let held = Held { lock: self.lock(key, passing)?, record: None };
        let removed = self.change(key, |record, tried| {
            let Some(record) = record else {
                let rows = self.pool.read(sql::UNWANTED, &[Bytes(key)])?;
                let entries: Vec<_> = rows.iter().map(|row| entry(key, int(row, 0), &row[1..])).collect();
                return if entries.is_empty() && !tried { Err(Error::NOT_FOUND) } else { Ok(Attempt::Done(entries)) };
            };
            check(&record)?;
            let (version, value) = (signed(key, record.version)?, record.encode());
            let surplus = record.replicas.join(",");
            let args = [Bytes(key), Int(version), Int(self.session()), Text(&value), Text(&surplus), Bool(passing)];
            let row = match self.pool.query(sql::DELETE, &args) {
                Ok(rows) => rows.into_iter().next().unwrap_or_default(),
                Err(failure) => return Ok(Attempt::Failed(failure)),
            };
            let Some(replicas) = text(&row, 0) else { return Ok(Attempt::Changed { lives: flag(&row, 1) }) };
            let replicas = replicas.split(',').map(String::from).collect();
            let debris = Debris { replicas, ..Debris::default() };
            Ok(Attempt::Done(vec![Entry { key: key.into(), version: version as u64, debris, stage: Stage::Due }]))
        })?;
        Ok((held, removed))
    }

    pub fn update(&self, key: &[u8], passing: bool, change: impl Fn(Option<Record>) -> Result<Record>) -> Result<()> {
        let _lock = self.lock(key, passing)?;
        let tried = RefCell::new(None);
        self.change(key, |record, again| {
            // The answer to the first attempt was lost, and it was carried out.
            if again && record.is_some() && *tried.borrow() == record {
                return Ok(Attempt::Done(()));
            }
            let (old, new) = (record.clone(), change(record)?);
            let Some(old) = old else { return Err(Error::NOT_FOUND) };
            let (version, value, text) = (signed(key, old.version)?, old.encode(), new.encode());
            *tried.borrow_mut() = Some(new);
            let args = [Bytes(key), Int(version), Int(self.session()), Text(&value), Text(&text), Bool(passing)];
            match self.pool.query(sql::SET, &args) {
                Ok(rows) if rows.first().is_some_and(|row| flag(row, 0)) => Ok(Attempt::Done(())),
                Ok(rows) => Ok(Attempt::Changed { lives: rows.first().is_some_and(|row| flag(row, 1)) }),
                Err(failure) => Ok(Attempt::Failed(failure)),
            }
        })
    }

    /// Reads a record and lets `attempt` change it, until it succeeds or the record stays as it is. `attempt` is told
    /// whether an earlier one got no answer.
    fn change<T>(&self, key: &[u8], attempt: impl Fn(Option<Record>, bool) -> Result<Attempt<T>>) -> Result<T> {
        let (begun, mut doubt, mut last) = (Instant::now(), None, None);
        for _ in 0..TURNS {
            let record = match self.get(key) {
                Err(Error::Unavailable(_)) if doubt.is_some() && begun.elapsed() < CHANGE => {
                    std::thread::sleep(PAUSE);
                    continue;
                }
                Err(error @ Error::Unavailable(_)) => return Err(doubt.as_ref().map_or(error, in_doubt)),
                record => record?,
            };
            match attempt(record.clone(), doubt.is_some())? {
                Attempt::Done(result) => return Ok(result),
                Attempt::Changed { lives: false } => return Err(self.lost_session()),
                // Nothing has changed, so somebody writes the key.
                Attempt::Changed { .. } if last.as_ref() == Some(&record) => return Err(Error::Locked),
                Attempt::Changed { .. } => {}
                Attempt::Failed(failure @ Failure::Doubt(_)) if begun.elapsed() < CHANGE => doubt = Some(failure),
                Attempt::Failed(failure) => return Err(doubt.as_ref().map_or_else(|| failure.into(), in_doubt)),
            }
            last = Some(record);
        }
        Err(doubt.as_ref().map_or(Error::Locked, in_doubt))
    }
}
