//! Lists: pages of keys as JSON.
//!
//! `{"next":"","keys":["/a","/b"]}`: `next` is the key that the next page starts with, empty on the
//! last page. A page is read twice from one view of the index, once for its `next` and its length in
//! bytes and once to be written, so that its memory does not grow with it.

use std::collections::BTreeSet;
use std::io::Write;

use percent_encoding::percent_encode;

use crate::api::route::{KEY_SET, List, Listed};
use crate::error::{Error, Result};
use crate::format::record::{Record, State};
use crate::index::{Index, View, decode};

/// The most keys that a list without a limit gives.
const MOST: usize = 1_000_000;

pub struct Page<'a> {
    view: View<'a>,
    list: &'a List,
    next: String,
    count: usize,
    /// Bytes of the JSON text.
    pub length: u64,
}

impl<'a> Page<'a> {
    pub fn new(index: &'a Index, list: &'a List) -> Result<Page<'a>> {
        let mut page = Page { view: index.view(), list, next: "\"\"".into(), count: 0, length: 0 };
        let (mut count, mut bytes, mut next) = (0, 0, None);
        page.keys(&mut |key| {
            if list.limit > 0 && count == list.limit {
                next = Some(key.to_vec());
                return Ok(false);
            }
            if list.limit == 0 && count == MOST {
                return Err(Error::TooMany);
            }
            count += 1;
            bytes += page.text(key).len();
            Ok(true)
        })?;
        if let Some(next) = next {
            if !list.url && std::str::from_utf8(&next).is_err() {
                return Err(Error::BadRequest(
                    "the next page starts with a key that is not UTF-8: add &encoding=url".into(),
                ));
            }
            page.next = page.text(&next);
        }
        page.count = count;
        let commas = count.saturating_sub(1);
        page.length = (r#"{"next":,"keys":[]}"#.len() + page.next.len() + bytes + commas) as u64;
        Ok(page)
    }

    pub fn write(&self, out: &mut dyn Write) -> Result<()> {
        let broken =
            |e: std::io::Error| Error::Failed(format!("the client takes no more of the list: {e}"));
        write!(out, r#"{{"next":{},"keys":["#, self.next).map_err(broken)?;
        let mut count = 0;
        self.keys(&mut |key| {
            if count == self.count {
                return Ok(false);
            }
            let comma = if count > 0 { "," } else { "" };
            count += 1;
            write!(out, "{comma}{}", self.text(key)).map_err(broken)?;
            Ok(true)
        })?;
        out.write_all(b"]}").map_err(broken)
    }

    /// A key as a JSON string.
    fn text(&self, key: &[u8]) -> String {
        if self.list.url {
            format!("\"{}\"", percent_encode(key, KEY_SET))
        } else {
            serde_json::Value::from(String::from_utf8_lossy(key)).to_string()
        }
    }

    /// Calls `f` with the keys from the page's start on, until it says `false`.
    fn keys(&self, f: &mut dyn FnMut(&[u8]) -> Result<bool>) -> Result<()> {
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
        self.view.records(&self.list.prefix, &self.list.start, |key, text| {
            let record = decode(key, Record::decode(text), text)?;
            if record.state == wanted { f(key) } else { Ok(true) }
        })
    }

    /// The keys with debris of a page, and one more. Debris does not lie in the order of keys.
    fn writing(&self) -> Result<BTreeSet<Vec<u8>>> {
        let most = if self.list.limit == 0 { MOST } else { self.list.limit };
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
