//! Which history an index is a part of: `index/history.json`, beside RocksDB's files.
//!
//! RocksDB numbers all changes. After a power cut the last ones may be lost, and their numbers are used again. So each
//! process that may write begins a run: it notes a random id, and the number of the last change before it. A follower
//! keeps the list of its master's runs. Its copy is a part of the master's index if the master knows the follower's last
//! run and began no later run before the follower's last change.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::directory::replace_file;
use crate::error::{Error, Result};

const NAME: &str = "history.json";

/// The most runs that are kept.
const RUNS: usize = 1000;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Run {
    id: String,
    /// The number of the last change before it.
    start: u64,
}

/// The runs of an index, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct History(Vec<Run>);

impl History {
    /// The history of the database in this folder. One that was never opened by a master has none.
    pub fn read(folder: &Path) -> Result<History> {
        let wrong = |e: &dyn std::fmt::Display| Error::Index(format!("{}: {e}", folder.join(NAME).display()));
        match fs::read(folder.join(NAME)) {
            Ok(text) => serde_json::from_slice(&text).map_err(|e| wrong(&e)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(History::default()),
            Err(e) => Err(wrong(&e)),
        }
    }

    /// Replaces the history in this folder, on the disk when this returns.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let (file, text) = (folder.join(NAME), serde_json::to_string(self).unwrap_or_default());
        replace_file(&file, &text).map_err(|e| Error::Index(format!("{}: {e}", file.display())))
    }

    /// Whether there is one in this folder.
    pub fn exists(folder: &Path) -> bool {
        folder.join(NAME).exists()
    }

    /// Begins a run after this change.
    pub fn begin(&mut self, start: u64) {
        self.0.push(Run { id: format!("{:016x}", fastrand::u64(..)), start });
        let surplus = self.0.len().saturating_sub(RUNS);
        self.0.drain(..surplus);
    }

    /// The id of the last run; empty if there is none.
    pub fn last(&self) -> &str {
        self.0.last().map_or("", |run| &run.id)
    }

    /// Whether a copy that has this last run and this last change is a part of this history.
    pub fn contains(&self, run: &str, change: u64) -> bool {
        let known = self.0.iter().position(|known| known.id == run);
        known.is_some_and(|n| self.0[n + 1..].iter().all(|later| change <= later.start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_a_part_of_a_history_up_to_the_first_change_that_was_lost() {
        let mut history = History::default();
        history.begin(0);
        let first = history.last().to_string();
        assert!(history.contains(&first, 1000));
        // A power cut takes the changes from 901 on.
        history.begin(900);
        let second = history.last().to_string();
        assert!(history.contains(&first, 900) && !history.contains(&first, 901));
        assert!(history.contains(&second, 1000));
        // A worse one, which takes changes of the first run too.
        history.begin(850);
        assert!(history.contains(&first, 850) && !history.contains(&first, 851) && !history.contains(&second, 851));
        assert!(!history.contains("", 0) && !history.contains("0123456789abcdef", 0));
        assert!(!History::default().contains("", 0));
    }

    #[test]
    fn a_history_does_not_grow_for_ever() {
        let mut history = History::default();
        (0..RUNS as u64 + 5).for_each(|start| history.begin(start));
        assert_eq!((history.0.len(), history.0[0].start), (RUNS, 5));
    }
}
