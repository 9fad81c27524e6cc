//! The index: what lies where, what must be deleted, and which keys are being written.
//!
//! This file offers the store the verbs of its protocols: begin a write, claim a record for copies, flip, remove,
//! update, hold debris, forget. Each verb changes the index at once or not at all. Locks, versions and deletions
//! without an answer live behind the verbs. Two engines have them:
//!
//! - `rocks.rs`: RocksDB, embedded, for one master; `directory.rs` is its folder, `-db`
//! - `sql/`: PostgreSQL, for several masters
//!
//! `location.rs` opens the engine that `-db` names.
//!
//! The room knows nothing of volumes and sends them no request. It may name `format`, `error` and `threads`.

mod directory;
mod location;
mod locks;
mod rocks;

use std::path::Path;
use std::time::Duration;

pub use location::{Location, Replacement};
pub use locks::Clearing;

use crate::error::{Error, Result};
use crate::format::quoted;
use crate::format::record::{Debris, Record};
use locks::KeyLock;
use rocks::Rocks;

/// An index on one of the engines.
pub enum Index {
    Rocks(Rocks),
}

/// A key that only the owner of this value writes, until it is dropped.
pub struct Held<'a> {
    lock: KeyLock<'a>,
    /// What the index holds for the key.
    pub record: Option<Record>,
}

impl Held<'_> {
    pub fn key(&self) -> &[u8] {
        &self.lock.key
    }
}

/// The debris of one key and version.
#[derive(Debug, Clone)]
pub struct Entry {
    pub key: Vec<u8>,
    pub version: u64,
    pub debris: Debris,
    /// The blobs were deleted, and no request can bring one back any more: the entry ends if they are seen to be gone.
    pub deleted: bool,
}

/// What came of the DELETEs for an entry.
#[derive(Debug, Default)]
pub struct Deleted {
    /// Replicas whose blob is gone for good.
    pub gone: Vec<String>,
    /// The first error of a volume that refused or did not answer.
    pub failed: Option<Error>,
}

/// A write under way. If it is dropped before `flip`, its debris entry stays and the cleaner deletes the blobs.
pub struct Writing<'a> {
    pub held: Held<'a>,
    /// The debris of the version being written. It names every replica that may hold a blob of it.
    pub entry: Entry,
    /// The replicas that this write sends to.
    pub replicas: Vec<String>,
}

/// A key, and the text of its record.
pub type Row = (Box<[u8]>, Box<[u8]>);

/// Calls a method of the engine.
macro_rules! engine {
    ($index:expr, $method:ident($($argument:expr),*)) => {
        match $index {
            Index::Rocks(rocks) => rocks.$method($($argument),*),
        }
    };
}

impl Index {
    /// Opens the RocksDB in this folder, or makes it if `create` is set. `sync`: a write is on disk when it returns.
    pub fn open(folder: &Path, create: bool, sync: bool) -> Result<Index> {
        Rocks::open(folder, create, sync).map(Index::Rocks)
    }

    /// Makes a RocksDB for a bulk load.
    pub fn create(folder: &Path) -> Result<Index> {
        Rocks::create(folder).map(Index::Rocks)
    }

    /// The record of a key.
    pub fn get(&self, key: &[u8]) -> Result<Option<Record>> {
        engine!(self, get(key))
    }

    /// A key's debris, by version.
    pub fn debris(&self, key: &[u8]) -> Result<Vec<(u64, Debris)>> {
        engine!(self, debris(key))
    }

    /// Locks a key, chooses a version and records that these replicas may hold a blob of it. `check` sees the record
    /// under the lock and can refuse the write. Fails with `Locked` if another request writes the key.
    pub fn begin(
        &self,
        key: &[u8],
        replicas: Vec<String>,
        check: impl FnOnce(Option<&Record>) -> Result<()>,
    ) -> Result<Writing<'_>> {
        engine!(self, begin(key, replicas, check))
    }

    /// Locks a key for copies of its blob under the version it has. Fails with `Locked` or `NotFound`.
    pub fn claim(&self, key: &[u8]) -> Result<Writing<'_>> {
        engine!(self, claim(key))
    }

    /// Records that a claimed key is about to be copied to these replicas. Fails with `Locked` while the cleaner
    /// deletes blobs of the same name, and with `Unavailable` if such a deletion may still be carried out.
    pub fn claim_copies(&self, writing: &mut Writing, copies: &[String]) -> Result<()> {
        engine!(self, claim_copies(writing, copies))
    }

    /// Records that blobs of this write may still appear until this time (seconds since 1970), although no volume
    /// confirmed them.
    pub fn doubt(&self, writing: &mut Writing, until: u64) -> Result<()> {
        engine!(self, doubt(writing, until))
    }

    /// Ends a write: `new` becomes the record, the replicas it names are no debris any more, and `surplus`, the
    /// replicas of the old record that are not needed any more, become debris, which is kept this long.
    pub fn flip(&self, writing: Writing, new: &Record, surplus: Vec<String>, keep: Option<Duration>) -> Result<()> {
        engine!(self, flip(writing, new, surplus, keep))
    }

    /// Ends a write that failed. `delete` deletes what the entry names on the write's replicas; what it cannot delete
    /// is left to the cleaner.
    pub fn abandon(&self, writing: Writing, delete: impl FnOnce(&Held, &Entry, &[String]) -> Deleted) -> Result<()> {
        engine!(self, abandon(writing, delete))
    }

    /// Removes a key's record and makes its blobs debris; `check` can refuse that. If there is no record, an earlier
    /// removal may have left debris. Returns the debris that can be deleted now, and the key, which stays locked.
    pub fn remove(&self, key: &[u8], check: impl Fn(&Record) -> Result<()>) -> Result<(Held<'_>, Vec<Entry>)> {
        engine!(self, remove(key, check))
    }

    /// Replaces a key's record by what `change` makes of it, under the key's lock.
    pub fn update(&self, key: &[u8], change: impl Fn(Option<Record>) -> Result<Record>) -> Result<()> {
        engine!(self, update(key, change))
    }

    /// Calls `f` with all debris that may be deleted now. Entries of keys that are being written are among them.
    pub fn due(&self, f: impl FnMut(Entry) -> Result<()>) -> Result<()> {
        engine!(self, due(f))
    }

    /// Locks the key of an entry for the cleaner and reads the entry again. `None` if another request writes the key.
    pub fn hold_to_clean(&self, entry: &mut Entry) -> Result<Option<Held<'_>>> {
        engine!(self, hold_to_clean(entry))
    }

    /// Frees the key while the blobs of this entry are being deleted, so that a volume that hangs keeps no client
    /// waiting. Until the guard is dropped no write uses the version of the entry.
    pub fn release(&self, held: Held, entry: &Entry) -> Clearing<'_> {
        engine!(self, release(held, entry))
    }

    /// Takes the replicas that are gone from an entry, and those that the record names. The last replica takes the
    /// entry with it.
    pub fn forget(&self, held: &Held, entry: &mut Entry, deleted: &Deleted) -> Result<()> {
        engine!(self, forget(held, entry, deleted))
    }

    /// A volume gave no answer to a DELETE of a blob of this key: it may carry it out within the hour.
    pub fn note_unconfirmed_delete(&self, key: &[u8]) {
        engine!(self, note_unconfirmed_delete(key))
    }

    /// Writes from before a crash may still land: until this time (seconds since 1970) a 404 proves nothing for any
    /// debris.
    pub fn suspect_after_crash(&self, until: u64) -> Result<()> {
        engine!(self, suspect_after_crash(until))
    }

    /// Takes the replicas of lost volumes from all debris. Returns the latest time (seconds since 1970) until which
    /// debris is to be kept.
    pub fn forget_lost(&self, is_lost: impl Fn(&str) -> bool) -> Result<u64> {
        engine!(self, forget_lost(is_lost))
    }

    /// How many entries of debris still have blobs to delete.
    pub fn left(&self) -> Result<u64> {
        engine!(self, left())
    }

    /// How many keys are being written.
    pub fn locked(&self) -> usize {
        engine!(self, locked())
    }

    /// The index as it is now, for as long as the view lives.
    pub fn view(&self) -> View<'_> {
        match self {
            Index::Rocks(rocks) => View::Rocks(rocks.view()),
        }
    }

    /// Whether the index holds neither a record nor debris.
    pub fn is_empty(&self) -> Result<bool> {
        engine!(self, is_empty())
    }

    /// Begins a set of changes to an index that nobody else uses, which are written together or not at all.
    pub fn batch(&self) -> Batch<'_> {
        match self {
            Index::Rocks(rocks) => Batch::Rocks(rocks.batch()),
        }
    }

    /// Shows a follower what the master has written since. Does nothing for the index's owner.
    pub fn catch_up(&self) -> Result<()> {
        engine!(self, catch_up())
    }

    /// Flushes everything written so far to the disk.
    pub fn sync(&self) -> Result<()> {
        engine!(self, sync())
    }

    /// Whether the index takes writes.
    pub fn probe(&self) -> Result<()> {
        engine!(self, probe())
    }

    /// The engine's estimate of the number of keys.
    pub fn estimate(&self) -> u64 {
        engine!(self, estimate())
    }

    /// Ends the engine's threads, so that the process can exit.
    pub fn close(&self) {
        engine!(self, close())
    }
}

/// An index as it was at one moment.
pub enum View<'a> {
    Rocks(rocks::View<'a>),
}

impl View<'_> {
    /// Each key and the text of its record, by key.
    pub fn texts(&self) -> Box<dyn Iterator<Item = Result<Row>> + Send + '_> {
        match self {
            View::Rocks(view) => Box::new(view.texts()),
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
        }
    }

    /// Calls `f` with each key that begins with `prefix` and is not below `start`, and the text of its record, in
    /// order, until `f` returns `false`.
    pub fn records(&self, prefix: &[u8], start: &[u8], f: impl FnMut(&[u8], &[u8]) -> Result<bool>) -> Result<()> {
        match self {
            View::Rocks(view) => view.records(prefix, start, f),
        }
    }

    /// Calls `f` with the key, version and debris of each entry whose key begins with `prefix`.
    pub fn debris(&self, prefix: &[u8], f: impl FnMut(&[u8], u64, Debris) -> Result<()>) -> Result<()> {
        match self {
            View::Rocks(view) => view.debris(prefix, f),
        }
    }
}

/// Changes that are written together.
pub enum Batch<'a> {
    Rocks(rocks::Batch<'a>),
}

impl Batch<'_> {
    pub fn put(self, key: &[u8], record: &Record) -> Self {
        match self {
            Batch::Rocks(batch) => Batch::Rocks(batch.put(key, record)),
        }
    }

    /// Replaces the debris of this key and version; debris without replicas is removed.
    pub fn set_debris(self, key: &[u8], version: u64, debris: &Debris) -> Self {
        match self {
            Batch::Rocks(batch) => Batch::Rocks(batch.set_debris(key, version, debris)),
        }
    }

    pub fn commit(self) -> Result<()> {
        match self {
            Batch::Rocks(batch) => batch.commit(),
        }
    }
}

/// Decodes the text of a record; the error names the key.
pub fn record_of(key: &[u8], text: &[u8]) -> Result<Record> {
    Record::decode(text).ok_or_else(|| undecodable(key, text))
}

fn undecodable(key: &[u8], text: &[u8]) -> Error {
    Error::Index(format!("the record of key {} does not decode: {}: rebuild the index", quoted(key), quoted(text)))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn index(name: &str) -> (Index, PathBuf) {
        let folder = std::env::temp_dir().join(format!("mkv-index-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        (Index::open(&folder, true, false).unwrap(), folder)
    }

    fn on(replica: &str) -> Debris {
        Debris { replicas: vec![replica.into()], ..Debris::default() }
    }

    #[test]
    fn the_debris_of_a_key_does_not_hold_that_of_a_longer_key() {
        let (index, folder) = index("debris");
        for (key, version) in [("/a", 0), ("/a", 7), ("/a/bcdefgh", 0), ("/a\0\0\0\0\0\0\0", 9), ("/", 1)] {
            index.batch().set_debris(key.as_bytes(), version, &on("a:1")).commit().unwrap();
        }
        assert_eq!(index.debris(b"/a").unwrap(), [(0, on("a:1")), (7, on("a:1"))]);
        let mut keys = Vec::new();
        index
            .view()
            .debris(b"/a/", |key, version, _| {
                keys.push((key.to_vec(), version));
                Ok(())
            })
            .unwrap();
        assert_eq!(keys, [(b"/a/bcdefgh".to_vec(), 0)]);
        drop(index);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_scan_stays_within_its_prefix() {
        let (index, folder) = index("scan");
        let record = Record { replicas: vec!["a:1".into()], ..Record::default() };
        for key in [b"/a".as_slice(), b"/b", b"/b/1", b"/b\xff", b"/c", b"\xff", b"\xff\xff"] {
            index.batch().put(key, &record).commit().unwrap();
        }
        let scan = |prefix: &[u8], start: &[u8]| {
            let mut keys = Vec::new();
            index
                .view()
                .records(prefix, start, |key, _| {
                    keys.push(key.to_vec());
                    Ok(true)
                })
                .unwrap();
            keys
        };
        assert_eq!(scan(b"/b", b""), [b"/b".to_vec(), b"/b/1".to_vec(), b"/b\xff".to_vec()]);
        assert_eq!(scan(b"/b", b"/b/1"), [b"/b/1".to_vec(), b"/b\xff".to_vec()]);
        assert_eq!(scan(b"/b", b"/d"), Vec::<Vec<u8>>::new());
        assert_eq!(scan(b"\xff", b"/a"), [b"\xff".to_vec(), b"\xff\xff".to_vec()]);
        drop(index);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_flip_makes_the_new_blob_the_record_and_the_old_one_debris() {
        let (index, folder) = index("flip");
        let write = |replica: &str| {
            let writing = index.begin(b"/a", vec![replica.into()], |_| Ok(())).unwrap();
            let old = writing.held.record.clone();
            let surplus = old.map_or(Vec::new(), |old| old.replicas);
            let record = Record { version: writing.entry.version, replicas: vec![replica.into()], ..Record::default() };
            assert_eq!(index.begin(b"/a", Vec::new(), |_| Ok(())).err(), Some(Error::Locked));
            index.flip(writing, &record, surplus, None).unwrap();
            record
        };
        assert_eq!(write("a:1").version, 0);
        assert_eq!(index.debris(b"/a").unwrap(), []);
        let second = write("b:1");
        assert!(second.version > 0);
        assert_eq!(index.get(b"/a").unwrap(), Some(second));
        assert_eq!(index.debris(b"/a").unwrap(), [(0, on("a:1"))]);
        drop(index);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
