//! The result of the last `verify`: `verify` writes it, the metrics and the page show it. It lies beside a RocksDB in
//! `-db`, or in the database.
//!
//! The file is replaced in one step. A master that cannot read it, or finds another format, has no result to show.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::directory::replace_file;
use crate::error::{Error, Result};

const NAME: &str = "verify.json";

/// A `verify` that has seen the whole store.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Scrub {
    /// When it ended, in seconds since 1970.
    pub time: u64,
    /// How long it took.
    pub seconds: u64,
    /// Whether it read every blob.
    pub deep: bool,
    /// When the last one ended that read every blob; 0: never.
    pub deep_time: u64,
    pub repair: bool,
    /// Keys in the index.
    pub keys: u64,
    /// Keys and names with a finding at the end; 0: the store is whole.
    pub findings: u64,
    /// How many findings of each kind.
    pub kinds: BTreeMap<String, u64>,
}

impl Scrub {
    /// The same, with the time of the last deep one.
    pub(super) fn after(mut self, last: Option<Scrub>) -> Scrub {
        self.deep_time = if self.deep { self.time } else { last.map_or(0, |last| last.deep_time) };
        self
    }

    pub(super) fn encode(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    pub(super) fn decode(text: &[u8]) -> Option<Scrub> {
        serde_json::from_slice(text).ok()
    }

    /// The result in this `-db`, if there is one.
    pub(super) fn read(db: &Path) -> Option<Scrub> {
        Scrub::decode(&fs::read(db.join(NAME)).ok()?)
    }

    /// Replaces the result in this `-db`.
    pub(super) fn write(&self, db: &Path) -> Result<()> {
        let file = db.join(NAME);
        replace_file(&file, &self.encode()).map_err(|e| {
            Error::Failed(format!("{}: {e}: check the disk, and that this user may write there", file.display()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_replaces_the_last_one_and_keeps_the_time_of_a_deep_one() {
        let db = std::env::temp_dir().join(format!("mkv-scrub-{}", std::process::id()));
        fs::create_dir_all(&db).unwrap();
        assert_eq!(Scrub::read(&db), None);
        for scrub in [
            Scrub { time: 7, deep: true, keys: 3, ..Scrub::default() },
            Scrub { time: 9, findings: 1, ..Scrub::default() },
        ] {
            scrub.after(Scrub::read(&db)).write(&db).unwrap();
        }
        let last = Scrub::read(&db).unwrap();
        assert_eq!((last.time, last.deep, last.deep_time, last.findings), (9, false, 7, 1));
        fs::write(db.join(NAME), "no JSON").unwrap();
        assert_eq!(Scrub::read(&db), None);
        fs::remove_dir_all(&db).unwrap();
    }
}
