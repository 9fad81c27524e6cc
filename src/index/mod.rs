//! The index: what lies where, what must be deleted, and which keys are being written.
//!
//! This file offers the store the verbs of its protocols: begin a write, claim a record for copies, flip, remove,
//! update, hold debris, forget. Each verb changes the index in one batch or not at all. Locks, versions and deletions
//! without an answer live behind the verbs, so that another engine can stand beside RocksDB.
//!
//! On disk, under `-db`: `lock`, which every command that writes holds, `index/`, the database, and `verify.json`, the
//! result of the last `verify`. `backup.rs` makes one file of the database.
//!
//! The room knows nothing of volumes and sends no request. It may name `format`, `error` and `threads`.

mod backup;
mod directory;
mod locks;
mod rocks;
pub mod scrub;

use std::time::{SystemTime, UNIX_EPOCH};

pub use backup::{Backup, Unpacked, unpack};
use directory::TEMPORARY;
pub use directory::{
    create_new, database, is_locked, lock_dir, lock_file, publish_new, remove, unpack_new, unpacked_in,
};
pub use locks::Clearing;
pub use rocks::{Batch, ENGINE, Index, View, record_of};

use crate::error::{Error, Result};
use crate::format::record::{Debris, Record};
use locks::{KeyLock, Owner};

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
}

/// A write under way. If it is dropped before `flip`, its debris entry stays and the cleaner deletes the blobs.
pub struct Writing<'a> {
    pub held: Held<'a>,
    /// The debris of the version being written. It names every replica that may hold a blob of it.
    pub entry: Entry,
    /// The replicas that this write sends to.
    pub replicas: Vec<String>,
}

impl Index {
    /// Locks a key, chooses a version and records that these replicas may hold a blob of it. `check` sees the record
    /// under the lock and can refuse the write. Fails with `Locked` if another request writes the key.
    pub fn begin(
        &self,
        key: &[u8],
        replicas: Vec<String>,
        check: impl FnOnce(Option<&Record>) -> Result<()>,
    ) -> Result<Writing<'_>> {
        let held = self.hold(key, Owner::Client)?.ok_or(Error::Locked)?;
        check(held.record.as_ref())?;
        let version = self.new_version(key, held.record.as_ref())?;
        let debris = Debris { replicas: replicas.clone(), ..Debris::default() };
        let entry = Entry { key: key.into(), version, debris };
        self.put_entry(&entry)?;
        Ok(Writing { held, entry, replicas })
    }

    /// Locks a key for copies of its blob under the version it has. Fails with `Locked` or `NotFound`.
    pub fn claim(&self, key: &[u8]) -> Result<Writing<'_>> {
        let held = self.hold(key, Owner::Client)?.ok_or(Error::Locked)?;
        let version = held.record.as_ref().ok_or(Error::NOT_FOUND)?.version;
        let debris = self.debris_entry(key, version)?;
        let entry = Entry { key: key.into(), version, debris };
        Ok(Writing { held, entry, replicas: Vec::new() })
    }

    /// Records that a claimed key is about to be copied to these replicas. Fails with `Locked` while the cleaner
    /// deletes blobs of the same name, and with `Unavailable` if such a deletion may still be carried out.
    pub fn claim_copies(&self, writing: &mut Writing, copies: &[String]) -> Result<()> {
        let key = writing.held.key();
        if self.locks.is_clearing(key, writing.entry.version) {
            return Err(Error::Locked);
        }
        if self.locks.has_unconfirmed_delete(key) {
            let text = "a deletion of this key got no answer: try again in an hour";
            return Err(Error::Unavailable(text.into()));
        }
        writing.entry.debris.merge(&Debris { replicas: copies.to_vec(), ..Debris::default() });
        writing.replicas = copies.to_vec();
        self.put_entry(&writing.entry)
    }

    /// Records that blobs of this write may still appear until this time (seconds since 1970), although no volume
    /// confirmed them.
    pub fn doubt(&self, writing: &mut Writing, until: u64) -> Result<()> {
        let debris = &mut writing.entry.debris;
        debris.doubtful_until = debris.doubtful_until.max(until);
        self.put_entry(&writing.entry)
    }

    /// Ends a write: `new` becomes the record, the replicas it names are no debris any more, and `surplus`, the
    /// replicas of the old record that are not needed any more, become debris that is kept until `keep_until`.
    pub fn flip(&self, writing: Writing, new: &Record, surplus: Vec<String>, keep_until: u64) -> Result<()> {
        let Writing { held, entry: Entry { key, version, mut debris }, .. } = writing;
        debris.replicas.retain(|replica| !new.replicas.contains(replica));
        let mut batch = self.batch().put(&key, new);
        if let Some(old) = held.record.as_ref().filter(|_| !surplus.is_empty()) {
            let surplus = Debris { keep_until, replicas: surplus, ..Debris::default() };
            if old.version == version {
                debris.merge(&surplus);
            } else {
                let mut entry = self.debris_entry(&key, old.version)?;
                entry.merge(&surplus);
                batch = batch.set_debris(&key, old.version, &entry);
            }
        }
        batch.set_debris(&key, version, &debris).commit()
    }

    /// Removes a key's record and makes its blobs debris; `check` can refuse that. If there is no record, an earlier
    /// removal may have left debris. Returns the debris that can be deleted now, and the key, which stays locked.
    pub fn remove(&self, key: &[u8], check: impl FnOnce(&Record) -> Result<()>) -> Result<(Held<'_>, Vec<Entry>)> {
        let mut held = self.hold(key, Owner::Client)?.ok_or(Error::Locked)?;
        let entry = |(version, debris)| Entry { key: key.into(), version, debris };
        let Some(record) = held.record.take() else {
            let entries: Vec<Entry> = self.debris(key)?.into_iter().map(entry).collect();
            return if entries.is_empty() { Err(Error::NOT_FOUND) } else { Ok((held, entries)) };
        };
        check(&record)?;
        let version = record.version;
        let mut debris = self.debris_entry(key, version)?;
        debris.merge(&Debris { replicas: record.replicas, ..Debris::default() });
        self.batch().remove(key).set_debris(key, version, &debris).commit()?;
        Ok((held, vec![entry((version, debris))]))
    }

    /// Replaces a key's record by what `change` makes of it, under the key's lock.
    pub fn update(&self, key: &[u8], change: impl FnOnce(Option<Record>) -> Result<Record>) -> Result<()> {
        let mut held = self.hold(key, Owner::Client)?.ok_or(Error::Locked)?;
        self.batch().put(key, &change(held.record.take())?).commit()
    }

    /// Calls `f` with all debris that may be deleted at this time (seconds since 1970). Entries of keys that are being
    /// written are among them.
    pub fn due(&self, now: u64, mut f: impl FnMut(Entry) -> Result<()>) -> Result<()> {
        self.view().entries().try_for_each(|entry| {
            let entry = entry?;
            if entry.debris.keep_until <= now { f(entry) } else { Ok(()) }
        })
    }

    /// Locks the key of an entry for the cleaner and reads the entry again. `None` if another request writes the key.
    pub fn hold_to_clean(&self, entry: &mut Entry) -> Result<Option<Held<'_>>> {
        let held = self.hold(&entry.key, Owner::Cleaner)?;
        if held.is_some() {
            entry.debris = self.debris_entry(&entry.key, entry.version)?;
        }
        Ok(held)
    }

    /// Frees the key while the blobs of this entry are being deleted, so that a volume that hangs keeps no client
    /// waiting. Until the guard is dropped no write uses the version of the entry.
    pub fn release(&self, held: Held, entry: &Entry) -> Clearing<'_> {
        let guard = self.locks.clear(held.key(), entry.version);
        drop(held);
        guard
    }

    /// Takes replicas from an entry, and those that the record names. The last replica takes the entry with it.
    pub fn forget(&self, held: &Held, entry: &mut Entry, gone: &[String]) -> Result<()> {
        let version = entry.version;
        let is_record = |replica: &String| held.record.as_ref().is_some_and(|r| r.is_at(version, replica));
        self.drop_replicas(entry, |replica| gone.contains(replica) || is_record(replica))
    }

    fn drop_replicas(&self, entry: &mut Entry, is_gone: impl Fn(&String) -> bool) -> Result<()> {
        let before = entry.debris.replicas.len();
        entry.debris.replicas.retain(|replica| !is_gone(replica));
        if entry.debris.replicas.len() < before { self.put_entry(entry) } else { Ok(()) }
    }

    fn put_entry(&self, Entry { key, version, debris }: &Entry) -> Result<()> {
        self.batch().set_debris(key, *version, debris).commit()
    }

    /// A volume gave no answer to a DELETE of a blob of this key: it may carry it out within the hour.
    pub fn note_unconfirmed_delete(&self, key: &[u8]) {
        self.locks.note_unconfirmed_delete(key);
    }

    /// Writes from before a crash may still land: until this time (seconds since 1970) a 404 proves nothing for any
    /// debris.
    pub fn suspect_after_crash(&self, until: u64) -> Result<()> {
        for entry in self.view().entries() {
            let mut entry = entry?;
            self.locks.note_crash();
            entry.debris.doubtful_until = entry.debris.doubtful_until.max(until);
            self.put_entry(&entry)?;
        }
        Ok(())
    }

    /// Takes the replicas of lost volumes from all debris. Returns the latest time (seconds since 1970) until which
    /// debris is to be kept.
    pub fn forget_lost(&self, is_lost: impl Fn(&str) -> bool) -> Result<u64> {
        let mut keep_until = 0;
        for entry in self.view().entries() {
            let mut entry = entry?;
            keep_until = keep_until.max(entry.debris.keep_until);
            self.drop_replicas(&mut entry, |replica| is_lost(replica))?;
        }
        Ok(keep_until)
    }

    /// How many keys are being written.
    pub fn locked(&self) -> usize {
        self.locks.count()
    }

    fn hold(&self, key: &[u8], owner: Owner) -> Result<Option<Held<'_>>> {
        let Some(lock) = self.locks.lock(key, owner) else { return Ok(None) };
        Ok(Some(Held { lock, record: self.get(key)? }))
    }

    /// The version of a blob that is about to be written. No path ever holds two values: the plain name is used only if
    /// no blob of the key can lie anywhere; otherwise the version is one that the key never had.
    fn new_version(&self, key: &[u8], old: Option<&Record>) -> Result<u64> {
        let debris = self.debris(key)?;
        let versions = debris.iter().map(|(version, _)| *version).chain(old.map(|old| old.version));
        let highest = match versions.max() {
            Some(highest) => highest,
            None if self.locks.is_plain_name_unsafe(key) => 0,
            None => return Ok(0),
        };
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let micros = since.map_or(0, |since| since.as_micros() as u64);
        Ok(micros.max(highest + 1))
    }
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
            index.flip(writing, &record, surplus, 0).unwrap();
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
