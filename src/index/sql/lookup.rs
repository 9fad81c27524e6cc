//! Lookups of many threads, sent together.
//!
//! A statement costs the database some 17 µs and both sides a wake-up; another key in it costs little. So only a few
//! threads ask at the same time. Each takes along the keys of those that wait, and then lets one of them ask next.

use std::collections::{HashMap, VecDeque};
use std::iter::once;
use std::sync::{Arc, Mutex};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use super::connection::Arg;
use super::statements as sql;
use super::{Engine, bytes};
use crate::error::{Error, Result};
use crate::threads::lock;

/// Threads that ask at the same time.
const LEADERS: usize = 4;

/// The most keys in a statement.
const BATCH: usize = 64;

/// How long a thread waits for one that asks.
const PATIENCE: Duration = Duration::from_secs(5);

/// The text of a record, if there is one.
type Found = Option<::bytes::Bytes>;

#[derive(Default)]
pub struct Lookups {
    waiting: VecDeque<Arc<Lookup>>,
    /// Threads that ask, or have been told to.
    leaders: usize,
}

struct Lookup {
    key: Vec<u8>,
    thread: Thread,
    progress: Mutex<Progress>,
}

enum Progress {
    Waits,
    Leads,
    Done(Result<Found>),
}

impl Engine {
    /// The text of a key's record.
    pub fn look_up(&self, key: &[u8]) -> Result<Found> {
        let (begun, progress) = (Instant::now(), Mutex::new(Progress::Waits));
        let own = Arc::new(Lookup { key: key.into(), thread: thread::current(), progress });
        let leads = {
            let mut lookups = lock(&self.lookups);
            let leads = lookups.leaders < LEADERS;
            if leads {
                lookups.leaders += 1
            } else {
                lookups.waiting.push_back(own.clone())
            }
            leads
        };
        if leads {
            return self.lead(own);
        }
        loop {
            let progress = std::mem::replace(&mut *lock(&own.progress), Progress::Waits);
            match progress {
                Progress::Done(result) => return result,
                Progress::Leads if begun.elapsed() < PATIENCE => return self.lead(own),
                Progress::Leads => {
                    self.hand_over();
                    break;
                }
                Progress::Waits if begun.elapsed() < PATIENCE => thread::park_timeout(PATIENCE - begun.elapsed()),
                Progress::Waits => {
                    let mut lookups = lock(&self.lookups);
                    let before = lookups.waiting.len();
                    lookups.waiting.retain(|waiting| !Arc::ptr_eq(waiting, &own));
                    if lookups.waiting.len() < before || !matches!(*lock(&own.progress), Progress::Leads) {
                        break;
                    }
                }
            }
        }
        Err(Error::Unavailable("the database does not answer".into()))
    }

    /// Asks for this thread's key and those that wait.
    fn lead(&self, own: Arc<Lookup>) -> Result<Found> {
        let batch: Vec<_> = {
            let mut lookups = lock(&self.lookups);
            let count = lookups.waiting.len().min(BATCH - 1);
            once(own).chain(lookups.waiting.drain(..count)).collect()
        };
        let result = self.ask(&batch);
        let found =
            |lookup: &Lookup| result.as_ref().map(|found| found.get(&lookup.key[..]).cloned()).map_err(Error::clone);
        for other in &batch[1..] {
            *lock(&other.progress) = Progress::Done(found(other));
            other.thread.unpark();
        }
        self.hand_over();
        found(&batch[0])
    }

    fn hand_over(&self) {
        let mut lookups = lock(&self.lookups);
        match lookups.waiting.pop_front() {
            Some(next) => {
                *lock(&next.progress) = Progress::Leads;
                next.thread.unpark();
            }
            None => lookups.leaders -= 1,
        }
    }

    fn ask<'a>(&self, batch: &'a [Arc<Lookup>]) -> Result<HashMap<&'a [u8], ::bytes::Bytes>> {
        let value = |row: &super::Row, n: usize| row[n].clone().unwrap_or_default();
        if let [one] = batch {
            let rows = self.pool.read(sql::GET, &[Arg::Bytes(&one.key)])?;
            return Ok(rows.first().map(|row| (&one.key[..], value(row, 0))).into_iter().collect());
        }
        let keys: Vec<&[u8]> = batch.iter().map(|lookup| &lookup.key[..]).collect();
        let rows = self.pool.read(sql::GET_MANY, &[Arg::Keys(&keys)])?;
        let known = |row: &super::Row| keys.iter().find(|key| **key == bytes(row, 0)).map(|key| (*key, value(row, 1)));
        Ok(rows.iter().filter_map(known).collect())
    }
}
