//! Lists: pages of keys as JSON.
//!
//! `{"next":"","keys":["/a","/b"]}`: `next` is the first key of the next page, and empty on the last page. A page is read
//! twice from one view of the index, once for its `next` and its length in bytes and once to be written, so that its
//! memory does not grow with it. Where the view is no snapshot, the keys of the first reading are kept. The master's own
//! keys are listed only below a prefix of theirs.

use std::collections::BTreeSet;
use std::io::{self, Write};

use super::Store;
use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::record::{Record, State};
use crate::format::{is_own, percent_encoded};
use crate::index::{View, record_of};

/// The longest list without a limit, in keys.
const MAX_KEYS: usize = 1_000_000;

/// The most bytes of keys that are kept for a page.
const KEPT_MAX: usize = 256 << 20;

/// Which page of keys.
#[derive(Debug, Clone, PartialEq)]
pub struct List {
    pub of: Listed,
    pub prefix: Vec<u8>,
    /// The page begins with this key or, if it does not exist, with the next one.
    pub start: Vec<u8>,
    /// The most keys of the page; 0: all.
    pub limit: usize,
    /// Whether keys are percent-encoded in the JSON.
    pub url: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Listed {
    Live,
    Unlinked,
    /// Keys with debris.
    Writing,
}

pub struct Page<'a> {
    view: View<'a>,
    list: List,
    next: String,
    count: usize,
    /// The keys, if the view is no snapshot.
    kept: Option<Vec<Vec<u8>>>,
    /// Bytes of the JSON text.
    pub length: u64,
}

impl Store {
    /// A page of keys. Fails with `TooMany` if a list without a limit is longer than 1,000,000 keys.
    pub fn page(&self, list: List) -> Result<Page<'_>> {
        let view = self.index.view();
        let kept = (!view.is_snapshot()).then(Vec::new);
        let mut page = Page { view, list, next: "\"\"".into(), count: 0, kept, length: 0 };
        page.measure()?;
        Ok(page)
    }
}

/// A key, live or unlinked, and what the index holds for it.
pub struct Detail {
    pub key: Vec<u8>,
    pub record: Record,
    /// The blob's path below each replica.
    pub path: String,
    /// Whether the value lies where placement wants it.
    pub balanced: bool,
}

impl Store {
    /// The first keys, `limit` at most, that begin with `prefix` and are not below `start`, and the key after them.
    pub fn details(&self, prefix: &[u8], start: &[u8], limit: usize) -> Result<(Vec<Detail>, Option<Vec<u8>>)> {
        let (mut details, mut next) = (Vec::new(), None);
        self.index.view().records(prefix, start, |key, text| {
            if details.len() == limit {
                next = Some(key.to_vec());
                return Ok(false);
            }
            let record = record_of(key, text)?;
            let (path, balanced) = (path(key, record.version), record.replicas == self.place(key));
            details.push(Detail { key: key.to_vec(), record, path, balanced });
            Ok(true)
        })?;
        Ok((details, next))
    }
}

impl Page<'_> {
    fn measure(&mut self) -> Result<()> {
        let (mut kept, list, page) = (self.kept.take(), &self.list, &*self);
        let (mut count, mut bytes, mut next) = (0, 0, None);
        page.keys(&mut |key| {
            if list.limit > 0 && count == list.limit {
                next = Some(key.to_vec());
                return Ok(false);
            }
            if list.limit == 0 && count == MAX_KEYS {
                return Err(Error::TooMany);
            }
            count += 1;
            bytes += page.text(key).len();
            if let Some(kept) = &mut kept {
                kept.push(key.to_vec());
                if bytes > KEPT_MAX {
                    return Err(Error::TooMany);
                }
            }
            Ok(true)
        })?;
        self.kept = kept;
        if let Some(next) = next {
            if !list.url && std::str::from_utf8(&next).is_err() {
                return Err(Error::BadRequest(
                    "the next page starts with a key that is not UTF-8: add &encoding=url".into(),
                ));
            }
            self.next = self.text(&next);
        }
        self.count = count;
        let commas = count.saturating_sub(1);
        self.length = (r#"{"next":,"keys":[]}"#.len() + self.next.len() + bytes + commas) as u64;
        Ok(())
    }

    /// Writes the JSON text, `length` bytes.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        write!(out, r#"{{"next":{},"keys":["#, self.next)?;
        let (mut count, mut failed) = (0, None);
        let read = self.keys(&mut |key| {
            if count == self.count {
                return Ok(false);
            }
            let comma = if count > 0 { "," } else { "" };
            count += 1;
            failed = write!(out, "{comma}{}", self.text(key)).err();
            Ok(failed.is_none())
        });
        read.map_err(|e| io::Error::other(e.to_string()))?;
        failed.map_or(Ok(()), Err)?;
        out.write_all(b"]}")
    }

    /// A key as a JSON string.
    fn text(&self, key: &[u8]) -> String {
        if self.list.url {
            format!("\"{}\"", percent_encoded(key))
        } else {
            serde_json::Value::from(String::from_utf8_lossy(key)).to_string()
        }
    }

    /// Calls `f` with the keys from the page's start on, until it returns `false`.
    fn keys(&self, f: &mut dyn FnMut(&[u8]) -> Result<bool>) -> Result<()> {
        if let Some(kept) = &self.kept {
            kept.iter().try_for_each(|key| f(key).map(drop))?;
            return Ok(());
        }
        let wanted = match self.list.of {
            Listed::Live => State::Live,
            Listed::Unlinked => State::Unlinked,
            Listed::Writing => {
                for key in self.writing()? {
                    if !f(&key)? {
                        break;
                    }
                }
                return Ok(());
            }
        };
        let shows_own = is_own(&self.list.prefix);
        self.view.records(&self.list.prefix, &self.list.start, |key, text| {
            // The first pass has decoded all records.
            let state = if self.length > 0 { State::of(text) } else { record_of(key, text)?.state };
            if state == wanted && (shows_own || !is_own(key)) { f(key) } else { Ok(true) }
        })
    }

    /// The keys with debris of a page, and one more. Debris is not in the order of keys.
    fn writing(&self) -> Result<BTreeSet<Vec<u8>>> {
        let most = if self.list.limit == 0 { MAX_KEYS } else { self.list.limit };
        let mut keys = BTreeSet::new();
        self.view.debris(&self.list.prefix, |key, _, _| {
            if key >= self.list.start.as_slice() {
                keys.insert(key.to_vec());
                if keys.len() > most.saturating_add(1) {
                    keys.pop_last();
                }
            }
            Ok(())
        })?;
        Ok(keys)
    }
}
