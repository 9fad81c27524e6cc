//! The index: RocksDB with the records and the debris, and the locks of keys.
//!
//! The only file that names rocksdb. On disk, under `-db`: `lock`, held by every command that
//! writes, and `index/`, the database. Records lie under their key; debris lies in a column family
//! of its own under the key and 8 bytes of version, big-endian.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBRawIterator,
    DBRecoveryMode, LogLevel, PrefixRange, ReadOptions, SnapshotWithThreadMode, WriteBatch,
    WriteOptions,
};
use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, Result};
use crate::format::record::{Debris, Record};
use crate::threads::lock;

const DEBRIS: &str = "debris";
const VERSION_BYTES: usize = 8;

/// How long a client waits where the cleaner holds its key, and the cleaner where a client does.
const CLIENT_WAITS: Duration = Duration::from_secs(2);
const CLEANER_WAITS: Duration = Duration::from_millis(200);

pub struct Index {
    db: DB,
    sync: bool,
    /// The keys that are being written, and whether it is the cleaner who holds them.
    locks: Mutex<HashMap<Vec<u8>, bool>>,
    /// It is another process's, and read beside it.
    follower: bool,
}

/// The folder's lock, held while this value lives (flock, so that it ends with the process).
pub struct DirLock(#[allow(dead_code)] File);

/// Locks `dir` against every other command that writes, making the folder if `create` says so.
pub fn lock_dir(dir: &Path, create: bool) -> Result<DirLock> {
    let wrong = |e: std::io::Error| Error::Failed(format!("-db {}: {e}", dir.display()));
    if !create && !folder(dir)?.join("CURRENT").exists() {
        return Err(Error::Failed(format!("-db {}: there is no index here", dir.display())));
    }
    if create {
        std::fs::create_dir_all(dir).map_err(wrong)?;
    }
    let path = dir.join("lock");
    let file = File::options().read(true).append(true).create(true).open(path);
    let mut file = file.map_err(wrong)?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        let _ = file.read_to_string(&mut holder);
        let text = format!(
            "-db {}: another mkv (process {}) is using it: stop that one first",
            dir.display(),
            holder.trim()
        );
        return Err(Error::Failed(text));
    }
    // Whose lock it is, for the message above; the lock holds without it.
    let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
    Ok(DirLock(file))
}

/// Whether a command that writes, such as a running master, holds the lock of this folder.
pub fn is_locked(dir: &Path) -> bool {
    let file = File::open(dir.join("lock"));
    file.is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockShared).is_err())
}

/// The database's folder in `-db`; an error where a Go master's index lies there instead.
pub fn folder(dir: &Path) -> Result<PathBuf> {
    if dir.join("CURRENT").exists() {
        let text = format!(
            "-db {0} is the index of a Go minikeyvalue: import it with mkv -db NEW import -leveldb {0}",
            dir.display()
        );
        return Err(Error::Failed(text));
    }
    Ok(dir.join("index"))
}

/// Whether tables or logs of a database lie in this folder.
fn has_tables(folder: &Path) -> bool {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut kinds = files.filter_map(|file| Some(file.path().extension()?.to_owned()));
    kinds.any(|kind| kind == "sst" || kind == "log")
}

fn options() -> rocksdb::Options {
    let mut options = rocksdb::Options::default();
    options.create_missing_column_families(true);
    // A log that is torn at its end is what a crash leaves; damage in its middle is an error, so
    // that no acknowledged write vanishes in silence.
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    // A master's memory goes up and down with what is not in a table yet.
    options.set_write_buffer_size(4 << 20);
    options.set_max_total_wal_size(128 << 20);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    options.set_log_level(LogLevel::Warn);
    options.set_stats_dump_period_sec(0);
    // Batches of one or two entries: to share them out costs more wake-ups than it saves.
    options.set_allow_concurrent_memtable_write(false);
    options
}

fn families(cache: &Cache) -> Vec<ColumnFamilyDescriptor> {
    let family = |name| {
        let mut table = BlockBasedOptions::default();
        table.set_block_cache(cache);
        table.set_bloom_filter(10.0, false);
        let mut options = options();
        options.set_block_based_table_factory(&table);
        ColumnFamilyDescriptor::new(name, options)
    };
    vec![family("default"), family(DEBRIS)]
}

fn cache() -> Cache {
    Cache::new_lru_cache(64 << 20)
}

impl Index {
    /// Opens the database in this folder, making it if `create` says so. `sync`: a write is on
    /// disk when it returns.
    pub fn open(folder: &Path, create: bool, sync: bool) -> Result<Index> {
        let wrong = |e: &dyn std::fmt::Display| {
            let text = format!(
                "the index {} does not open ({e}): if this stays so, move it away and run mkv rebuild",
                folder.display()
            );
            Error::Index(text)
        };
        // RocksDB would begin a new database there, and delete the tables of the one before.
        if !folder.join("CURRENT").exists() && has_tables(folder) {
            return Err(wrong(&"its file CURRENT is missing"));
        }
        let mut options = options();
        options.create_if_missing(create);
        let db =
            DB::open_cf_descriptors(&options, folder, families(&cache())).map_err(|e| wrong(&e))?;
        Ok(Index { db, sync, locks: Mutex::default(), follower: false })
    }

    /// Makes the database that a run fills with many keys, from larger buffers: in a third of the time.
    pub fn fresh(folder: &Path) -> Result<Index> {
        let index = Index::open(folder, true, false)?;
        let buffer = (16 << 20).to_string();
        index.db.set_options(&[("write_buffer_size", &buffer)]).map_err(index_error)?;
        Ok(index)
    }

    /// Opens the database in this folder to read it, beside a running master too. It shows the
    /// moment of the last `catch_up`.
    pub fn follow(folder: &Path) -> Result<Index> {
        let wrong = |e: &dyn std::fmt::Display| {
            Error::Index(format!("the index {} cannot be read: {e}", folder.display()))
        };
        if !folder.join("CURRENT").exists() {
            return Err(wrong(&"there is none: check -db"));
        }
        let scratch = std::env::temp_dir().join(format!("mkv-follow-{:x}", fastrand::u64(..)));
        let no_scratch = |e| Error::Failed(format!("{}: {e}: set TMPDIR", scratch.display()));
        std::fs::create_dir(&scratch).map_err(no_scratch)?;
        // A follower has to keep open what the primary may delete.
        let mut options = options();
        options.set_max_open_files(-1);
        let db =
            DB::open_cf_descriptors_as_secondary(&options, folder, &scratch, families(&cache()));
        // It holds RocksDB's log, which nobody reads.
        let _ = std::fs::remove_dir_all(&scratch);
        let db = db.map_err(|e| wrong(&e))?;
        let index = Index { db, sync: false, locks: Mutex::default(), follower: true };
        index.catch_up()?;
        Ok(index)
    }

    /// Shows a follower what the running master has written since; the index's owner knows it.
    pub fn catch_up(&self) -> Result<()> {
        if !self.follower {
            return Ok(());
        }
        self.db.try_catch_up_with_primary().map_err(index_error)
    }

    fn debris_family(&self) -> &ColumnFamily {
        self.db.cf_handle(DEBRIS).expect("the database was opened with it")
    }

    /// What the index holds for a key.
    pub fn get(&self, key: &[u8]) -> Result<Option<Record>> {
        let found = self.db.get_pinned(key).map_err(index_error)?;
        found.map(|text| decode(key, Record::decode(&text), &text)).transpose()
    }

    /// A key's debris, by version.
    pub fn debris(&self, key: &[u8]) -> Result<Vec<(u64, Debris)>> {
        let mut found = Vec::new();
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound([key, &[0xff; VERSION_BYTES + 1]].concat());
        let mut rows = self.db.raw_iterator_cf_opt(self.debris_family(), options);
        rows.seek([key, &[0; VERSION_BYTES]].concat());
        while let Some((name, text)) = rows.item() {
            // Between two versions of a key lie longer keys that begin with it.
            if name.len() == key.len() + VERSION_BYTES {
                let (key, version) = split_version(name)?;
                found.push((version, decode(key, Debris::decode(text), text)?));
            }
            rows.next();
        }
        rows.status().map_err(index_error)?;
        Ok(found)
    }

    /// One entry of debris.
    pub fn debris_entry(&self, key: &[u8], version: u64) -> Result<Option<Debris>> {
        let found = self.db.get_pinned_cf(self.debris_family(), debris_name(key, version));
        let found = found.map_err(index_error)?;
        found.map(|text| decode(key, Debris::decode(&text), &text)).transpose()
    }

    /// Takes a key's lock, which every writer of the key holds; `None`: another writer has it. The
    /// cleaner is waited for: it is no writer that a client could know of.
    pub fn lock(&self, key: &[u8]) -> Option<KeyLock<'_>> {
        self.take_lock(key, false)
    }

    /// Takes a key's lock for the cleaner, which gives way to writers, and to its own other threads,
    /// but waits a little for them.
    pub fn lock_to_clean(&self, key: &[u8]) -> Option<KeyLock<'_>> {
        self.take_lock(key, true)
    }

    fn take_lock(&self, key: &[u8], cleaner: bool) -> Option<KeyLock<'_>> {
        let begun = Instant::now();
        loop {
            match lock(&self.locks).entry(key.to_vec()) {
                Entry::Vacant(entry) => {
                    entry.insert(cleaner);
                    return Some(KeyLock { index: self, key: key.to_vec() });
                }
                Entry::Occupied(entry) if !cleaner && !*entry.get() => return None,
                Entry::Occupied(_) => {}
            }
            if begun.elapsed() > if cleaner { CLEANER_WAITS } else { CLIENT_WAITS } {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The number of keys that are locked now.
    pub fn locked(&self) -> usize {
        lock(&self.locks).len()
    }

    /// Begins a change: entries that are written together or not at all.
    pub fn change(&self) -> Change<'_> {
        Change { index: self, batch: WriteBatch::default() }
    }

    /// The index as it is now, for as long as the view lives.
    pub fn view(&self) -> View<'_> {
        // A follower has no snapshots; what it shows changes only when it catches up.
        View { index: self, snapshot: (!self.follower).then(|| self.db.snapshot()) }
    }

    /// Whether there is neither a record nor debris.
    pub fn is_empty(&self) -> Result<bool> {
        let mut empty = true;
        let view = self.view();
        for family in [None, Some(self.debris_family())] {
            let mut rows = view.rows(family, b"");
            rows.seek_to_first();
            rows.status().map_err(index_error)?;
            empty &= !rows.valid();
        }
        Ok(empty)
    }

    /// Brings all that was written so far to the disk.
    pub fn sync(&self) -> Result<()> {
        self.db.flush_wal(true).map_err(index_error)
    }

    /// Whether the index takes a write: one that changes nothing.
    pub fn probe(&self) -> Result<()> {
        self.change().drop_debris(b"", 0).commit()
    }

    /// RocksDB's estimate of the number of keys.
    pub fn estimate(&self) -> u64 {
        self.db.property_int_value("rocksdb.estimate-num-keys").ok().flatten().unwrap_or(0)
    }

    /// Ends RocksDB's own threads, so that the process can exit.
    pub fn close(&self) {
        self.db.cancel_all_background_work(true);
    }
}

pub struct KeyLock<'a> {
    index: &'a Index,
    key: Vec<u8>,
}

impl Drop for KeyLock<'_> {
    fn drop(&mut self) {
        lock(&self.index.locks).remove(&self.key);
    }
}

pub struct Change<'a> {
    index: &'a Index,
    batch: WriteBatch,
}

impl Change<'_> {
    pub fn put(mut self, key: &[u8], record: &Record) -> Self {
        self.batch.put(key, record.encode());
        self
    }

    pub fn remove(mut self, key: &[u8]) -> Self {
        self.batch.delete(key);
        self
    }

    /// Adds to the entry of this key and version, which the caller's lock on the key protects.
    pub fn grow_debris(self, key: &[u8], version: u64, more: &Debris) -> Result<Self> {
        let mut entry = self.index.debris_entry(key, version)?.unwrap_or_default();
        entry.grow(more);
        Ok(self.set_debris(key, version, &entry))
    }

    /// Replaces the entry of this key and version; one without volumes goes.
    pub fn set_debris(mut self, key: &[u8], version: u64, entry: &Debris) -> Self {
        let name = debris_name(key, version);
        if entry.replicas.is_empty() {
            self.batch.delete_cf(self.index.debris_family(), name);
        } else {
            self.batch.put_cf(self.index.debris_family(), name, entry.encode());
        }
        self
    }

    pub fn drop_debris(self, key: &[u8], version: u64) -> Self {
        self.set_debris(key, version, &Debris::default())
    }

    /// Writes the change: it survives a killed process from here on, and a power cut where the
    /// index was opened with `sync`.
    pub fn commit(self) -> Result<()> {
        let mut options = WriteOptions::default();
        options.set_sync(self.index.sync);
        self.index.db.write_opt(self.batch, &options).map_err(index_error)
    }
}

pub struct View<'a> {
    index: &'a Index,
    snapshot: Option<SnapshotWithThreadMode<'a, DB>>,
}

impl View<'_> {
    fn rows(&self, family: Option<&ColumnFamily>, prefix: &[u8]) -> DBRawIterator<'_> {
        let db = &self.index.db;
        match (&self.snapshot, family) {
            (Some(snapshot), Some(family)) => snapshot.raw_iterator_cf_opt(family, within(prefix)),
            (Some(snapshot), None) => snapshot.raw_iterator_opt(within(prefix)),
            (None, Some(family)) => db.raw_iterator_cf_opt(family, within(prefix)),
            (None, None) => db.raw_iterator_opt(within(prefix)),
        }
    }

    /// Calls `f` with the keys that begin with `prefix` and are not below `start`, and the texts of
    /// their records, in order, until it says `false`.
    pub fn records(
        &self,
        prefix: &[u8],
        start: &[u8],
        mut f: impl FnMut(&[u8], &[u8]) -> Result<bool>,
    ) -> Result<()> {
        let mut rows = self.rows(None, prefix);
        rows.seek(start.max(prefix));
        while let Some((key, text)) = rows.item() {
            if !f(key, text)? {
                return Ok(());
            }
            rows.next();
        }
        rows.status().map_err(index_error)
    }

    /// Calls `f` with every entry of debris whose key begins with `prefix`: key, version, entry.
    /// They come in the order of key and version run together.
    pub fn debris(
        &self,
        prefix: &[u8],
        mut f: impl FnMut(&[u8], u64, Debris) -> Result<()>,
    ) -> Result<()> {
        let mut rows = self.rows(Some(self.index.debris_family()), prefix);
        rows.seek(prefix);
        while let Some((name, text)) = rows.item() {
            let (key, version) = split_version(name)?;
            if key.starts_with(prefix) {
                f(key, version, decode(key, Debris::decode(text), text)?)?;
            }
            rows.next();
        }
        rows.status().map_err(index_error)
    }
}

/// Reads what begins with the prefix, and nothing behind it: a scan must not step over the
/// tombstones of the whole index to find that its prefix has ended.
fn within(prefix: &[u8]) -> ReadOptions {
    let mut options = ReadOptions::default();
    options.set_iterate_range(PrefixRange(prefix));
    options
}

/// What the text of a key's record or debris stands for, or an error that names the key.
pub fn decode<T>(key: &[u8], decoded: Option<T>, text: &[u8]) -> Result<T> {
    decoded.ok_or_else(|| {
        Error::Index(format!(
            "the record of key \"{}\" does not decode: \"{}\": rebuild the index",
            key.escape_ascii(),
            text.escape_ascii()
        ))
    })
}

fn debris_name(key: &[u8], version: u64) -> Vec<u8> {
    [key, &version.to_be_bytes()].concat()
}

fn split_version(name: &[u8]) -> Result<(&[u8], u64)> {
    let (key, version) = name.split_last_chunk::<VERSION_BYTES>().ok_or_else(|| {
        Error::Index(format!("an entry of debris has no version: \"{}\"", name.escape_ascii()))
    })?;
    Ok((key, u64::from_be_bytes(*version)))
}

fn index_error(e: rocksdb::Error) -> Error {
    Error::Index(format!(
        "the index failed ({e}): check its disk and restart the master; if it is damaged, move index/ away and run mkv rebuild"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(name: &str) -> (Index, PathBuf) {
        let folder = std::env::temp_dir().join(format!("mkv-index-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        (Index::open(&folder, true, false).unwrap(), folder)
    }

    fn on(replica: &str) -> Debris {
        Debris { until: 0, wait: 0, replicas: vec![replica.into()] }
    }

    #[test]
    fn debris_of_a_key_is_not_that_of_a_longer_key() {
        let (index, folder) = index("debris");
        for (key, version) in
            [("/a", 0), ("/a", 7), ("/a/bcdefgh", 0), ("/a\0\0\0\0\0\0\0", 9), ("/", 1)]
        {
            index
                .change()
                .grow_debris(key.as_bytes(), version, &on("a:1"))
                .unwrap()
                .commit()
                .unwrap();
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
            index.change().put(key, &record).commit().unwrap();
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
    fn a_key_has_one_lock() {
        let (index, folder) = index("lock");
        let lock = index.lock(b"/a");
        assert!(lock.is_some() && index.lock(b"/a").is_none() && index.lock(b"/b").is_some());
        drop(lock);
        assert!(index.lock(b"/a").is_some());
        drop(index);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
