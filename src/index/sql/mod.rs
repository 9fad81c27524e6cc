//! PostgreSQL: an index that several masters share.
//!
//! - `write.rs`, `change.rs`, `debris.rs`, `drafts.rs`: the verbs of the store's protocols, each one statement
//! - `lookup.rs`: reads of many threads in one statement
//! - `session.rs`: which masters live, and takeover
//! - `statements.rs`: tables and SQL
//! - `pool.rs`, `connection.rs`, `url.rs`: the way to the database; only `connection.rs` names postgres-protocol, rustls
//!
//! This file opens the index and reads it. Several masters write at once; between them a key's lock is its row in
//! `writing`, and the locks in memory only order the requests of one master. Nothing is a snapshot: a scan reads pages.
//!
//! Every wait for the database ends, after seconds. `docs/scale.md` says what the database has to promise.

mod change;
mod connection;
mod debris;
mod drafts;
mod lookup;
mod pool;
mod session;
mod statements;
mod url;
mod write;

use std::ops::Deref;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use connection::Arg::{Bytes, Int, Text};
use connection::Row;
pub use debris::boot_time;
use lookup::Lookups;
use pool::{Failure, Pool};
pub use session::Peer;
use session::{Sessions, Undo};
use statements as sql;
pub use url::Url;
pub use write::Trace;

use super::locks::Locks;
use super::scrub::Scrub;
use super::{Entry, Stage, record_of};
use crate::error::{Error, Result};
use crate::format::quoted;
use crate::format::record::{Debris, Record};

/// The format of the tables.
const FORMAT: i64 = 1;

/// Rows that are read at a time, at first and at most: a list that steps over prefixes reads few of each.
const FIRST_PAGE: i64 = 8;
const PAGE: i64 = 1000;

/// A session of this process on the database; it ends when this value is dropped.
pub struct Sql(Arc<Engine>);

pub struct Engine {
    url: Url,
    /// What this process is, and where; for the operators of the others.
    name: String,
    flags: String,
    pool: Pool,
    locks: Locks,
    lookups: Mutex<Lookups>,
    sessions: Mutex<Sessions>,
    /// With `sessions`: there is something to undo, or the session ends.
    woken: Condvar,
    undo: Mutex<Vec<Undo>>,
    /// Whether the database can lose what it has acknowledged.
    warning: Mutex<Option<String>>,
}

impl Deref for Sql {
    type Target = Engine;

    fn deref(&self) -> &Engine {
        &self.0
    }
}

impl Drop for Sql {
    fn drop(&mut self) {
        self.retire();
    }
}

impl Sql {
    /// Opens the index for reading.
    pub fn open_to_read(url: &Url) -> Result<Sql> {
        let sql = Sql::new(url, "", "")?;
        sql.check_format(false)?;
        Ok(sql)
    }

    /// Opens the index as one of those that write it. `create`: makes the tables if there are none.
    pub fn open(url: &Url, name: &str, flags: &str, create: bool) -> Result<Sql> {
        let sql = Sql::new(url, name, flags)?;
        sql.check_format(create)?;
        sql.enlist()?;
        sql.tend_once()?;
        sql.check_standbys()?;
        let engine = sql.0.clone();
        let thread = std::thread::Builder::new().name("mkv-session".into()).spawn(move || engine.tend());
        thread.map_err(|e| Error::Failed(format!("no thread can be started: {e}")))?;
        Ok(sql)
    }

    /// Opens an index that is being filled.
    pub fn filling(url: &Url) -> Result<Sql> {
        Sql::new(url, "", "")
    }

    /// Closes an empty index that nobody uses to masters, until `filled`.
    pub fn fill(url: &Url) -> Result<()> {
        let sql = Sql::new(url, "", "")?;
        sql.check_format(true)?;
        if !sql.is_empty()? {
            return Err(Error::Failed(format!("{url} is not empty: make a new database and give it as -db")));
        }
        if sql.pool.query(sql::FILL, &[])?.is_empty() {
            return Err(Error::Failed(format!("a master, or another command, uses {url}: stop it first")));
        }
        Ok(())
    }

    /// Lets masters open an index that was filled.
    pub fn filled(url: &Url) -> Result<()> {
        Ok(Sql::new(url, "", "")?.pool.query(sql::FILLED, &[]).map(drop)?)
    }

    fn new(url: &Url, name: &str, flags: &str) -> Result<Sql> {
        let (url, name, flags, pool) = (url.clone(), name.into(), flags.into(), Pool::new(url.clone())?);
        let (locks, sessions, woken) = (Locks::default(), Mutex::default(), Condvar::new());
        let (lookups, undo, warning) = Default::default();
        Ok(Sql(Arc::new(Engine { url, name, flags, pool, locks, lookups, sessions, woken, undo, warning })))
    }
}

impl Engine {
    /// Checks the format of the tables, and makes them if there are none and `create` is set.
    fn check_format(&self, create: bool) -> Result<()> {
        let exists = self.pool.read(sql::HAS_SCHEMA, &[])?.first().is_some_and(|row| flag(row, 0));
        if !exists && !create {
            return Err(Error::Failed(format!("{} has no tables of mkv: check -db, or start a master", self.url)));
        }
        if !exists {
            for statement in sql::SCHEMA {
                // Two masters that start together can both try to make a table: the second attempt finds it.
                let make = || self.pool.with(|connection| connection.run(statement));
                make().or_else(|_| make())?;
            }
        }
        match self.pool.read(sql::FORMAT, &[])?.first().map(|row| int(row, 0)) {
            Some(FORMAT) => Ok(()),
            Some(0) => Err(self.being_filled()),
            found => {
                let found = found.map_or("none".into(), |n| n.to_string());
                Err(Error::Failed(format!("{}: its format is {found}, this mkv knows {FORMAT}", self.url)))
            }
        }
    }

    /// Warns of a database that may lose what it has acknowledged.
    fn check_standbys(&self) -> Result<()> {
        let names = self.pool.read(sql::STANDBYS, &[]).map(|rows| rows.first().and_then(|row| text(row, 0)));
        // Other servers of the protocol do not know the setting.
        if matches!(names, Ok(Some(names)) if names.is_empty()) {
            let warning = "synchronous_standby_names is empty: a failover of the database can lose values";
            log::warn!("{warning}");
            *crate::threads::lock(&self.warning) = Some(warning.into());
        }
        Ok(())
    }

    /// What an operator should know about the database and the other masters.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings: Vec<String> = crate::threads::lock(&self.warning).iter().cloned().collect();
        for peer in self.peers().iter().filter(|peer| peer.flags != self.flags) {
            warnings.push(format!("{} has other flags: {}", peer.name, peer.flags));
        }
        warnings
    }

    /// How long a request without an answer may still be carried out, in seconds.
    fn late(&self) -> i64 {
        self.url.late.as_secs() as i64
    }

    pub fn get(&self, key: &[u8]) -> Result<Option<Record>> {
        self.look_up(key)?.map(|text| record_of(key, &text)).transpose()
    }

    pub fn debris(&self, key: &[u8]) -> Result<Vec<(u64, Debris)>> {
        let rows = self.pool.read(sql::DEBRIS, &[Bytes(key)])?;
        Ok(rows.iter().map(|row| (int(row, 0) as u64, entry(key, 0, &row[1..]).debris)).collect())
    }

    pub fn last_verify(&self) -> Option<Scrub> {
        let rows = self.pool.read(sql::VERIFY, &[]).ok()?;
        Scrub::decode(text(rows.first()?, 0)?.as_bytes())
    }

    pub fn keep_verify(&self, scrub: &Scrub) -> Result<()> {
        Ok(self.pool.query(sql::KEEP_VERIFY, &[Text(&scrub.encode())]).map(drop)?)
    }

    pub fn catch_up(&self) -> Result<()> {
        Ok(())
    }

    /// What was committed before is on the standby too once a later commit is.
    pub fn sync(&self) -> Result<()> {
        if self.session() == 0 { Ok(()) } else { self.probe() }
    }

    pub fn probe(&self) -> Result<()> {
        Ok(self.beat().map(drop)?)
    }

    pub fn estimate(&self) -> u64 {
        let rows = self.pool.read(sql::ESTIMATE, &[]);
        rows.ok().and_then(|rows| rows.first().map(|row| int(row, 0) as u64)).unwrap_or(0)
    }

    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.pool.read(sql::IS_EMPTY, &[])?.first().is_some_and(|row| flag(row, 0)))
    }

    pub fn left(&self) -> Result<u64> {
        Ok(self.pool.read(sql::LEFT, &[])?.first().map_or(0, |row| int(row, 0) as u64))
    }

    /// Whether a session is open.
    pub fn is_in_use(&self) -> Result<bool> {
        Ok(!self.pool.read(sql::LOOK, &[])?.is_empty())
    }

    pub fn locked(&self) -> usize {
        self.locks.count()
    }

    pub fn close(&self) {
        self.retire();
    }

    /// The keys that begin with `prefix`, from `start` on, with the texts of their records.
    pub fn rows<'a>(
        &'a self,
        prefix: &[u8],
        start: &[u8],
    ) -> impl Iterator<Item = Result<super::Row>> + Send + use<'a> {
        let (mut next, end, mut size) = (start.max(prefix).to_vec(), end_of(prefix), FIRST_PAGE);
        pages(move || {
            let args = [Bytes(&next), Int(size), Bytes(end.as_deref().unwrap_or_default())];
            size = (size * 5).min(PAGE);
            let rows = match end {
                Some(_) => self.pool.read(sql::PAGE_BEFORE, &args)?,
                None => self.pool.read(sql::PAGE, &args[..2])?,
            };
            if let Some(last) = rows.last() {
                next = [bytes(last, 0), &[0]].concat();
            }
            Ok(rows.iter().map(|row| (bytes(row, 0).into(), bytes(row, 1).into())).collect())
        })
    }

    /// All debris and all writes under way from this key on.
    pub fn entries<'a>(&'a self, start: &[u8]) -> impl Iterator<Item = Result<Entry>> + Send + use<'a> {
        self.entry_pages(sql::ALL_DEBRIS, start)
    }

    fn entry_pages<'a>(
        &'a self,
        statement: &'static str,
        start: &[u8],
    ) -> impl Iterator<Item = Result<Entry>> + Send + use<'a> {
        let (mut key, mut version) = (start.to_vec(), -1);
        pages(move || {
            let rows = self.pool.read(statement, &[Bytes(&key), Int(version), Int(PAGE)])?;
            if let Some(last) = rows.last() {
                (key, version) = (bytes(last, 0).to_vec(), int(last, 1));
            }
            Ok(rows.iter().map(|row| entry(bytes(row, 0), int(row, 1), &row[2..])).collect())
        })
    }
}

/// The items of pages, until one is empty.
fn pages<T: Send>(mut fetch: impl FnMut() -> Result<Vec<T>> + Send) -> impl Iterator<Item = Result<T>> + Send {
    let (mut page, mut failed) = (Vec::new().into_iter(), false);
    std::iter::from_fn(move || {
        if let Some(item) = page.next() {
            return Some(Ok(item));
        }
        if failed {
            return None;
        }
        match fetch() {
            Ok(items) => page = items.into_iter(),
            Err(error) => {
                failed = true;
                return Some(Err(error));
            }
        }
        page.next().map(Ok)
    })
}

/// The first key behind all that begin with this prefix; `None`: there is none.
fn end_of(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|byte| *byte < 0xff)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}

/// Rows for a bulk load.
pub struct Batch<'a> {
    engine: &'a Engine,
    records: Vec<(Vec<u8>, u64, String)>,
    debris: Vec<(Vec<u8>, u64, Debris)>,
}

impl Engine {
    pub fn batch(&self) -> Batch<'_> {
        Batch { engine: self, records: Vec::new(), debris: Vec::new() }
    }
}

impl Batch<'_> {
    /// The key must be a new one.
    pub fn put(mut self, key: &[u8], record: &Record) -> Self {
        self.records.push((key.into(), record.version, record.encode()));
        self
    }

    pub fn set_debris(mut self, key: &[u8], version: u64, debris: &Debris) -> Self {
        self.debris.push((key.into(), version, debris.clone()));
        self
    }

    /// Sends the records with one COPY, then the debris.
    pub fn commit(self) -> Result<()> {
        let mut copy = Vec::new();
        for (key, version, text) in &self.records {
            copy.extend_from_slice(b"\\\\x");
            key.iter().for_each(|byte| copy.extend_from_slice(format!("{byte:02x}").as_bytes()));
            let text = text.replace('\\', "\\\\");
            copy.extend_from_slice(format!("\t{}\t{text}\n", signed(key, *version)?).as_bytes());
        }
        if !copy.is_empty() {
            self.engine.pool.with(|connection| connection.copy(sql::COPY, &copy))?;
        }
        for (key, version, debris) in &self.debris {
            let name = [Bytes(key), Int(signed(key, *version)?)];
            if debris.replicas.is_empty() {
                self.engine.pool.query(sql::DROP_DEBRIS, &name)?;
                continue;
            }
            let until = debris.doubtful_until.saturating_sub(now()) as i64;
            let wait = if debris.keep_until > 0 { debris.keep_until.saturating_sub(now()) as i64 } else { -1 };
            let args = [name[0], name[1], Int(until), Int(wait), Text(&debris.replicas.join(","))];
            self.engine.pool.query(sql::PUT_DEBRIS, &args)?;
        }
        Ok(())
    }
}

/// A version as the database takes it.
fn signed(key: &[u8], version: u64) -> Result<i64> {
    let text = || format!("the version {version:016x} of {} is too large for PostgreSQL", quoted(key));
    i64::try_from(version).map_err(|_| Error::Failed(text()))
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

/// Decodes replicas, gone, and the seconds until `until` and `wait`, which become times of this process's clock.
fn entry(key: &[u8], version: i64, cells: &[Option<::bytes::Bytes>]) -> Entry {
    let cells = cells.to_vec();
    let later = |seconds: i64| now().saturating_add_signed(seconds);
    let until = int(&cells, 2);
    let debris = Debris {
        doubtful_until: if until > 0 { later(until) } else { 0 },
        keep_until: if cells[3].is_some() { later(int(&cells, 3)).max(1) } else { 0 },
        replicas: text(&cells, 0).unwrap_or_default().split(',').map(String::from).collect(),
    };
    let stage = if flag(&cells, 1) { Stage::Deleted } else { Stage::Due };
    Entry { key: key.into(), version: version as u64, debris, stage }
}

// The cells of a row. What a statement selects has the type that its reader expects.

fn bytes(row: &Row, n: usize) -> &[u8] {
    row.get(n).and_then(Option::as_deref).unwrap_or_default()
}

fn text(row: &Row, n: usize) -> Option<String> {
    row.get(n)?.as_deref().map(|text| String::from_utf8_lossy(text).into_owned())
}

fn int(row: &Row, n: usize) -> i64 {
    bytes(row, n).try_into().map_or(0, i64::from_be_bytes)
}

fn flag(row: &Row, n: usize) -> bool {
    bytes(row, n) == [1]
}

impl Failure {
    /// Whether the same statement may succeed later.
    fn is_temporary(&self) -> bool {
        !matches!(self, Failure::Refused(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_before_the_next_one() {
        for (prefix, end) in [(&b"/a"[..], Some(&b"/b"[..])), (b"/\xff\xff", Some(b"0")), (b"\xff", None), (b"", None)]
        {
            assert_eq!(end_of(prefix).as_deref(), end);
        }
    }
}
