//! RocksDB: records under their key, debris in a column family under the key and 8 bytes of version (big-endian).
//!
//! The only files that name rocksdb are this one and those below it. It opens, reads, scans and writes batches;
//! `write.rs` has the verbs of the store's protocols on them, `drafts.rs` those of S3, `log.rs` those of followers. A batch
//! survives a killed process as soon as `commit` returns and, with `sync`, a power cut.

mod drafts;
mod log;
mod tail;
mod write;

use std::fmt::Display;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::AtomicUsize;

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBRecoveryMode, Direction, IteratorMode,
    LogLevel, PrefixRange, ReadOptions, SnapshotWithThreadMode, WriteBatch,
};

use super::locks::Locks;
use super::scrub::Scrub;
use super::{Entry, Row, Stage, record_of, undecodable};
use crate::error::{Error, Result};
use crate::format::quoted;
use crate::format::record::{Debris, Record};

/// The name and version of the database.
pub const ENGINE: &str = concat!("RocksDB ", env!("MKV_ROCKSDB"));

/// The column families.
const RECORDS: &str = "default";
const DEBRIS: &str = "debris";
const UPLOADS: &str = "uploads";

const FAMILIES: [&str; 3] = [RECORDS, DEBRIS, UPLOADS];

const VERSION_BYTES: usize = 8;

/// Bytes of a memtable. Small ones keep a master's memory flat; a bulk load is three times as fast with large ones.
const WRITE_BUFFER: usize = 4 << 20;
const BULK_WRITE_BUFFER: usize = 16 << 20;

/// Bytes of the block cache.
const CACHE: usize = 64 << 20;

pub use log::Following;

pub struct Rocks {
    db: DB,
    sync: bool,
    /// It belongs to another process, which may write it meanwhile.
    secondary: bool,
    pub(super) locks: Locks,
    /// The lock of the folder `-db`, where the index was opened through it.
    pub(super) folder_lock: Option<File>,
    /// Backups that are being read.
    pub(super) backups: AtomicUsize,
    lineage: log::Lineage,
}

impl Rocks {
    /// Opens the database in this folder, or makes it if `create` is set. `sync`: a write is on disk when it returns.
    pub fn open(folder: &Path, create: bool, sync: bool) -> Result<Rocks> {
        Rocks::open_keeping(folder, create, sync, 0)
    }

    /// The same, and keeps about so many MiB of the log of what is in tables already, for followers.
    pub fn open_keeping(folder: &Path, create: bool, sync: bool, log: u64) -> Result<Rocks> {
        let wrong = |e: &dyn Display| {
            Error::Index(format!(
                "the index {} does not open ({e}): if this stays so, move it away and run mkv rebuild",
                folder.display()
            ))
        };
        // RocksDB would create a database there and delete the tables of the one before.
        if !folder.join("CURRENT").exists() && has_tables(folder) {
            return Err(wrong(&"its file CURRENT is missing"));
        }
        let mut options = options();
        options.create_if_missing(create);
        options.set_wal_size_limit_mb(log);
        let db = DB::open_cf_descriptors(&options, folder, families(&FAMILIES)).map_err(|e| wrong(&e))?;
        let (locks, folder_lock, backups, lineage) = Default::default();
        Ok(Rocks { db, sync, secondary: false, locks, folder_lock, backups, lineage })
    }

    /// Makes a database for a bulk load.
    pub fn create(folder: &Path) -> Result<Rocks> {
        let index = Rocks::open(folder, true, false)?;
        let buffer = BULK_WRITE_BUFFER.to_string();
        index.db.set_options(&[("write_buffer_size", &buffer)]).map_err(index_error)?;
        Ok(index)
    }

    /// Opens the database in this folder for reading, also beside a running master. It shows the state at the last
    /// `catch_up`.
    pub fn open_to_read(folder: &Path) -> Result<Rocks> {
        let wrong = |e: &dyn Display| Error::Index(format!("the index {} cannot be read: {e}", folder.display()));
        if !folder.join("CURRENT").exists() {
            return Err(wrong(&"there is none: check -db"));
        }
        let scratch = std::env::temp_dir().join(format!("mkv-secondary-{:x}", fastrand::u64(..)));
        let no_scratch = |e| Error::Failed(format!("{}: {e}: set TMPDIR", scratch.display()));
        std::fs::create_dir(&scratch).map_err(no_scratch)?;
        // The primary may delete tables that the secondary still needs.
        let mut options = options();
        options.set_max_open_files(-1);
        // Before its first start with this mkv a database has no uploads.
        let known = DB::list_cf(&options, folder).unwrap_or_default();
        let names: Vec<&str> =
            FAMILIES.into_iter().filter(|name| *name != UPLOADS || known.iter().any(|k| k == name)).collect();
        let db = DB::open_cf_descriptors_as_secondary(&options, folder, &scratch, families(&names));
        // The folder holds only RocksDB's own log, which nobody reads.
        let _ = std::fs::remove_dir_all(&scratch);
        let db = db.map_err(|e| wrong(&e))?;
        let (locks, folder_lock, backups, lineage) = Default::default();
        let index = Rocks { db, sync: false, secondary: true, locks, folder_lock, backups, lineage };
        index.catch_up()?;
        Ok(index)
    }

    /// Shows a secondary what the master has written since. Does nothing for the index's owner.
    pub fn catch_up(&self) -> Result<()> {
        if !self.secondary {
            return Ok(());
        }
        self.db.try_catch_up_with_primary().map_err(index_error)
    }

    fn family(&self, name: &str) -> &ColumnFamily {
        self.db.cf_handle(name).expect("the database was opened with it")
    }

    /// The record of a key.
    pub fn get(&self, key: &[u8]) -> Result<Option<Record>> {
        let found = self.db.get_pinned(key).map_err(index_error)?;
        found.map(|text| record_of(key, &text)).transpose()
    }

    /// A key's debris, by version.
    pub fn debris(&self, key: &[u8]) -> Result<Vec<(u64, Debris)>> {
        let mut found = Vec::new();
        let mut options = ReadOptions::default();
        options.set_iterate_range([key, &[0; VERSION_BYTES]].concat()..[key, &[0xff; VERSION_BYTES + 1]].concat());
        for row in self.db.iterator_cf_opt(self.family(DEBRIS), options, IteratorMode::Start) {
            let (name, text) = row.map_err(index_error)?;
            // Longer keys that begin with this one lie between its versions.
            if name.len() == key.len() + VERSION_BYTES {
                let Entry { version, debris, .. } = entry_of(&name, &text)?;
                found.push((version, debris));
            }
        }
        Ok(found)
    }

    /// The debris of a key and version; empty if there is none.
    pub fn debris_entry(&self, key: &[u8], version: u64) -> Result<Debris> {
        let found = self.db.get_pinned_cf(self.family(DEBRIS), debris_name(key, version));
        let found = found.map_err(index_error)?;
        found.map_or(Ok(Debris::default()), |text| debris_of(key, &text))
    }

    /// The index as it is now, for as long as the view lives.
    pub fn view(&self) -> View<'_> {
        // A secondary has no snapshots, but it changes only when it catches up.
        View { index: self, snapshot: (!self.secondary).then(|| self.db.snapshot()) }
    }

    /// Whether the index holds neither a record nor debris.
    pub fn is_empty(&self) -> Result<bool> {
        let view = self.view();
        let first = view.rows(RECORDS, b"", b"").chain(view.rows(DEBRIS, b"", b"")).next();
        Ok(first.transpose()?.is_none())
    }

    /// Begins a set of changes that are written together or not at all.
    pub fn batch(&self) -> Batch<'_> {
        Batch { index: self, batch: WriteBatch::default() }
    }

    /// Flushes everything written so far to the disk.
    pub fn sync(&self) -> Result<()> {
        self.db.flush_wal(true).map_err(index_error)
    }

    /// Writes a batch that changes nothing, to see whether the index takes writes. A follower writes only what its master
    /// has written.
    pub fn probe(&self) -> Result<()> {
        if self.following().is_some() {
            return self.get(b"").map(drop);
        }
        self.batch().set_debris(b"", 0, &Debris::default()).commit()
    }

    /// RocksDB's estimate of the number of keys.
    pub fn estimate(&self) -> u64 {
        self.db.property_int_value("rocksdb.estimate-num-keys").ok().flatten().unwrap_or(0)
    }

    pub fn last_verify(&self) -> Option<Scrub> {
        Scrub::read(self.folder().parent()?)
    }

    pub fn keep_verify(&self, scrub: &Scrub) -> Result<()> {
        scrub.write(self.folder().parent().unwrap_or(self.folder()))
    }

    /// The database's folder.
    pub(super) fn folder(&self) -> &Path {
        self.db.path()
    }

    /// Reads everything, and returns the number of keys.
    pub(super) fn read_all(&self) -> Result<u64> {
        let view = self.view();
        view.rows(DEBRIS, b"", b"").try_for_each(|row| row.map(drop))?;
        view.texts().try_fold(0, |keys, row| row.map(|_| keys + 1))
    }

    /// Ends RocksDB's threads, so that the process can exit.
    pub fn close(&self) {
        self.db.cancel_all_background_work(true);
    }
}

pub struct Batch<'a> {
    index: &'a Rocks,
    batch: WriteBatch,
}

impl Batch<'_> {
    pub fn put(mut self, key: &[u8], record: &Record) -> Self {
        self.batch.put(key, record.encode());
        self
    }

    pub fn remove(mut self, key: &[u8]) -> Self {
        self.batch.delete(key);
        self
    }

    /// Replaces the debris of this key and version; debris without replicas is removed.
    pub fn set_debris(mut self, key: &[u8], version: u64, debris: &Debris) -> Self {
        let name = debris_name(key, version);
        if debris.replicas.is_empty() {
            self.batch.delete_cf(self.index.family(DEBRIS), name);
        } else {
            self.batch.put_cf(self.index.family(DEBRIS), name, debris.encode());
        }
        self
    }

    /// Replaces a row of the uploads, or removes it.
    fn set_upload(mut self, name: &[u8], text: Option<String>) -> Self {
        match text {
            Some(text) => self.batch.put_cf(self.index.family(UPLOADS), name, text),
            None => self.batch.delete_cf(self.index.family(UPLOADS), name),
        }
        self
    }

    pub fn commit(self) -> Result<()> {
        self.index.check_owner()?;
        self.index.write(self.batch)
    }
}

pub struct View<'a> {
    index: &'a Rocks,
    snapshot: Option<SnapshotWithThreadMode<'a, DB>>,
}

impl View<'_> {
    /// The rows whose name begins with `prefix` and is not below `start`, in order.
    fn rows(&self, family: &str, prefix: &[u8], start: &[u8]) -> impl Iterator<Item = Result<Row>> {
        // Without the upper bound a scan would step over the tombstones behind its prefix.
        let mut options = ReadOptions::default();
        options.set_iterate_range(PrefixRange(prefix));
        self.rows_with(options, family, prefix, start)
    }

    fn rows_with(
        &self,
        options: ReadOptions,
        family: &str,
        prefix: &[u8],
        start: &[u8],
    ) -> impl Iterator<Item = Result<Row>> {
        let (family, mode) = (self.index.family(family), IteratorMode::From(start.max(prefix), Direction::Forward));
        let rows = match &self.snapshot {
            Some(snapshot) => snapshot.iterator_cf_opt(family, options, mode),
            None => self.index.db.iterator_cf_opt(family, options, mode),
        };
        rows.map(|row| row.map_err(index_error))
    }

    /// Each key and the text of its record, by key.
    pub fn texts(&self) -> impl Iterator<Item = Result<Row>> {
        // A pass over everything must not push the blocks of the requests out of the cache.
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        self.rows_with(options, RECORDS, b"", b"")
    }

    /// Each entry of debris, in the order of key and version run together.
    pub fn entries(&self) -> impl Iterator<Item = Result<Entry>> {
        self.rows(DEBRIS, b"", b"").map(|row| row.and_then(|(name, text)| entry_of(&name, &text)))
    }

    /// Calls `f` with each key that begins with `prefix` and is not below `start`, and the text of its record, in
    /// order, until `f` returns `false`.
    pub fn records(&self, prefix: &[u8], start: &[u8], mut f: impl FnMut(&[u8], &[u8]) -> Result<bool>) -> Result<()> {
        for row in self.rows(RECORDS, prefix, start) {
            let (key, text) = row?;
            if !f(&key, &text)? {
                break;
            }
        }
        Ok(())
    }

    /// Calls `f` with the key, version and debris of each entry whose key begins with `prefix`, in the order of key
    /// and version run together.
    pub fn debris(&self, prefix: &[u8], mut f: impl FnMut(&[u8], u64, Debris) -> Result<()>) -> Result<()> {
        for row in self.rows(DEBRIS, prefix, b"") {
            let (name, text) = row?;
            let Entry { key, version, debris, .. } = entry_of(&name, &text)?;
            if key.starts_with(prefix) {
                f(&key, version, debris)?;
            }
        }
        Ok(())
    }
}

fn options() -> rocksdb::Options {
    let mut options = rocksdb::Options::default();
    options.create_missing_column_families(true);
    // A crash leaves a log that is torn at its end. Damage in the middle is an error, so that no acknowledged write
    // vanishes unnoticed.
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options.set_write_buffer_size(WRITE_BUFFER);
    options.set_max_total_wal_size(128 << 20);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    options.set_log_level(LogLevel::Warn);
    options.set_stats_dump_period_sec(0);
    // Batches hold one or two entries; concurrent memtable writes cost more than they save.
    options.set_allow_concurrent_memtable_write(false);
    options
}

fn families(names: &[&str]) -> Vec<ColumnFamilyDescriptor> {
    let cache = Cache::new_lru_cache(CACHE);
    let family = |name: &&str| {
        let mut table = BlockBasedOptions::default();
        table.set_block_cache(&cache);
        table.set_bloom_filter(10.0, false);
        let mut options = options();
        options.set_block_based_table_factory(&table);
        ColumnFamilyDescriptor::new(*name, options)
    };
    names.iter().map(family).collect()
}

/// Whether tables or logs of a database lie in this folder.
fn has_tables(folder: &Path) -> bool {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut kinds = files.filter_map(|file| Some(file.path().extension()?.to_owned()));
    kinds.any(|kind| kind == "sst" || kind == "log")
}

fn debris_of(key: &[u8], text: &[u8]) -> Result<Debris> {
    Debris::decode(text).ok_or_else(|| undecodable(key, text))
}

fn debris_name(key: &[u8], version: u64) -> Vec<u8> {
    [key, &version.to_be_bytes()].concat()
}

/// Decodes a row of debris.
fn entry_of(name: &[u8], text: &[u8]) -> Result<Entry> {
    let (key, version) = name
        .split_last_chunk::<VERSION_BYTES>()
        .ok_or_else(|| Error::Index(format!("an entry of debris has no version: {}", quoted(name))))?;
    let version = u64::from_be_bytes(*version);
    Ok(Entry { key: key.into(), version, debris: debris_of(key, text)?, stage: Stage::Due })
}

fn index_error(e: rocksdb::Error) -> Error {
    Error::Index(format!(
        "the index failed ({e}): check its disk and restart the master; if it is damaged, move index/ away and run mkv \
         rebuild"
    ))
}
