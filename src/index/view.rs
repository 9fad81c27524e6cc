//! Scans of a whole index, and bulk loads.

use super::rocks;
use super::sql::{self, Sql};
use super::{Entry, Row, record_of};
use crate::error::Result;
use crate::format::record::{Debris, Record};

/// An index as it was at one moment, or as it is: see `is_snapshot`.
pub enum View<'a> {
    Rocks(rocks::View<'a>),
    Sql(&'a Sql),
}

impl View<'_> {
    /// Whether it shows the same whenever it is read.
    pub fn is_snapshot(&self) -> bool {
        matches!(self, View::Rocks(_))
    }

    /// Each key and the text of its record, by key.
    pub fn texts(&self) -> Box<dyn Iterator<Item = Result<Row>> + Send + '_> {
        match self {
            View::Rocks(view) => Box::new(view.texts()),
            View::Sql(sql) => Box::new(sql.rows(b"", b"")),
        }
    }

    /// Each key and its record, by key.
    pub fn all_records(&self) -> impl Iterator<Item = Result<(Box<[u8]>, Record)>> + Send {
        self.texts().map(|row| {
            let (key, text) = row?;
            let record = record_of(&key, &text)?;
            Ok((key, record))
        })
    }

    /// Each entry of debris. RocksDB has them in the order of key and version run together.
    pub fn entries(&self) -> Box<dyn Iterator<Item = Result<Entry>> + Send + '_> {
        match self {
            View::Rocks(view) => Box::new(view.entries()),
            View::Sql(sql) => Box::new(sql.entries(b"")),
        }
    }

    /// Calls `f` with each key that begins with `prefix` and is not below `start`, and the text of its record, in
    /// order, until `f` returns `false`.
    pub fn records(&self, prefix: &[u8], start: &[u8], mut f: impl FnMut(&[u8], &[u8]) -> Result<bool>) -> Result<()> {
        match self {
            View::Rocks(view) => view.records(prefix, start, f),
            View::Sql(sql) => {
                for row in sql.rows(prefix, start) {
                    let (key, text) = row?;
                    if !f(&key, &text)? {
                        break;
                    }
                }
                Ok(())
            }
        }
    }

    /// Calls `f` with the key, version and debris of each entry whose key begins with `prefix`.
    pub fn debris(&self, prefix: &[u8], mut f: impl FnMut(&[u8], u64, Debris) -> Result<()>) -> Result<()> {
        match self {
            View::Rocks(view) => view.debris(prefix, f),
            View::Sql(sql) => {
                let inside = |entry: &Result<Entry>| entry.as_ref().map_or(true, |entry| entry.key.starts_with(prefix));
                sql.entries(prefix).take_while(inside).try_for_each(|entry| {
                    let Entry { key, version, debris, .. } = entry?;
                    f(&key, version, debris)
                })
            }
        }
    }
}

/// Changes that are written together.
pub enum Batch<'a> {
    Rocks(rocks::Batch<'a>),
    Sql(sql::Batch<'a>),
}

impl Batch<'_> {
    pub fn put(self, key: &[u8], record: &Record) -> Self {
        match self {
            Batch::Rocks(batch) => Batch::Rocks(batch.put(key, record)),
            Batch::Sql(batch) => Batch::Sql(batch.put(key, record)),
        }
    }

    /// Replaces the debris of this key and version; debris without replicas is removed.
    pub fn set_debris(self, key: &[u8], version: u64, debris: &Debris) -> Self {
        match self {
            Batch::Rocks(batch) => Batch::Rocks(batch.set_debris(key, version, debris)),
            Batch::Sql(batch) => Batch::Sql(batch.set_debris(key, version, debris)),
        }
    }

    pub fn commit(self) -> Result<()> {
        match self {
            Batch::Rocks(batch) => batch.commit(),
            Batch::Sql(batch) => batch.commit(),
        }
    }
}
