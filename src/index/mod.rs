//! The index: what lies where, what must be deleted, and which keys are being written.
//!
//! This file offers the store the verbs of its protocols: begin a write, claim a record for copies, flip, remove,
//! update, hold debris, forget. Each verb changes the index at once or not at all. Locks, versions and deletions
//! without an answer live behind the verbs.
//! `drafts.rs` has those of S3, where writers of a key pass each other, and of multipart uploads. Two engines have them:
//!
//! - `rocks.rs`: RocksDB, embedded, for one master; `directory.rs` is its folder, `-db`, and `backup.rs` makes one file
//!   of it. `log.rs` is how its changes travel to a follower, `history.rs` says which copy can take them, and `role.rs`
//!   whether a folder is a master's or a follower's
//! - `sql/`: PostgreSQL, for several masters
//!
//! `location.rs` opens the engine that `-db` names.
//!
//! The room knows nothing of volumes and sends them no request. It may name `format`, `error` and `threads`.

/// Calls a method of the engine.
macro_rules! engine {
    ($index:expr, $method:ident($($argument:expr),*)) => {
        match $index {
            Index::Rocks(rocks) => rocks.$method($($argument),*),
            Index::Sql(sql) => sql.$method($($argument),*),
        }
    };
}

mod backup;
mod directory;
mod drafts;
mod history;
mod location;
mod locks;
pub mod log;
mod rocks;
mod role;
pub mod scrub;
mod sql;
mod view;

use std::path::Path;
use std::time::Duration;

pub use backup::{Backup, Unpacked, unpack};
pub use directory::{is_locked, lock_dir, lock_file, publish_checkpoint, remove, unpack_checkpoint};
pub use drafts::{Draft, Judge, MultipartUpload, Part};
pub use location::{LOG, Location, Replacement};
pub use locks::Clearing;
pub use rocks::{ENGINE, Following};
pub use role::Role;
pub use sql::{Peer, Url, boot_time};
pub use view::{Batch, View};

use crate::error::{Error, Result};
use crate::format::quoted;
use crate::format::record::{Debris, Record};
use locks::KeyLock;
use log::{Head, Update};
use rocks::Rocks;
use scrub::Scrub;
use sql::Sql;

/// An index on one of the engines.
pub enum Index {
    Rocks(Box<Rocks>),
    Sql(Sql),
}

impl From<Rocks> for Index {
    fn from(rocks: Rocks) -> Index {
        Index::Rocks(Box::new(rocks))
    }
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
    pub stage: Stage,
}

impl Entry {
    /// Whether DELETEs may be sent for it now.
    pub fn may_delete(&self) -> bool {
        match self.stage {
            Stage::Marked { at } => boot_time().saturating_sub(at) < MARKED,
            _ => true,
        }
    }
}

/// How far the deletion of an entry is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Stage {
    /// Its blobs are to be deleted.
    Due,
    /// The same, and they have the version of the key's record: the entry was marked at this time, counted from the
    /// start of the machine.
    Marked { at: Duration },
    /// They were deleted. When no request can bring one back any more, the entry ends, if they are seen to be gone.
    Deleted,
}

/// What came of the DELETEs for an entry.
#[derive(Debug, Default)]
pub struct Deleted {
    /// The replicas that were asked: those that the entry names and the record does not.
    pub asked: Vec<String>,
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
    /// Whether it may replace a live record.
    replace: bool,
    /// Its row in a database.
    trace: Option<sql::Trace<'a>>,
}

impl Writing<'_> {
    /// Whether it cannot be completed: another master takes this one for dead.
    pub fn is_lost(&self) -> bool {
        self.trace.as_ref().is_some_and(sql::Trace::is_lost)
    }
}

/// How long after it was marked DELETEs may be sent for an entry.
const MARKED: Duration = Duration::from_secs(10);

/// A key, and the text of its record.
pub type Row = (Box<[u8]>, Box<[u8]>);

impl Index {
    /// Opens the RocksDB in this folder, or makes it if `create` is set. `sync`: a write is on disk when it returns.
    pub fn open(folder: &Path, create: bool, sync: bool) -> Result<Index> {
        Rocks::open(folder, create, sync).map(Index::from)
    }

    /// Makes a RocksDB for a bulk load.
    pub fn create(folder: &Path) -> Result<Index> {
        Rocks::create(folder).map(Index::from)
    }

    /// The record of a key.
    pub fn get(&self, key: &[u8]) -> Result<Option<Record>> {
        engine!(self, get(key))
    }

    /// A key's debris, by version.
    pub fn debris(&self, key: &[u8]) -> Result<Vec<(u64, Debris)>> {
        engine!(self, debris(key))
    }

    /// Locks a key, chooses a version and records that these replicas may hold a blob of it. `replace`: also if the
    /// record is live. `check` sees the record under the lock and can refuse the write. Fails with `Locked` if another
    /// request writes the key.
    pub fn begin(
        &self,
        key: &[u8],
        replicas: Vec<String>,
        replace: bool,
        check: impl FnOnce(Option<&Record>) -> Result<()>,
    ) -> Result<Writing<'_>> {
        match self {
            Index::Rocks(rocks) => rocks.begin(key, replicas, replace, check),
            Index::Sql(sql) => sql.begin(key, replicas, replace, false, check),
        }
    }

    /// Locks a key for copies of its blob under the version it has. Fails with `Locked` or `NotFound`.
    pub fn claim(&self, key: &[u8]) -> Result<Writing<'_>> {
        engine!(self, claim(key))
    }

    /// Records that a claimed key is about to be copied to these replicas. Fails with `Locked` while the cleaner
    /// deletes blobs of the same name, and with `Unavailable` if such a deletion may still be carried out.
    pub fn claim_copies<'a>(&'a self, writing: &mut Writing<'a>, copies: &[String]) -> Result<()> {
        engine!(self, claim_copies(writing, copies))
    }

    /// Records that blobs of this write may still appear until this time (seconds since 1970), although no volume
    /// confirmed them.
    pub fn doubt(&self, writing: &mut Writing, until: u64) -> Result<()> {
        engine!(self, doubt(writing, until))
    }

    /// Ends a write: `new` becomes the record, the replicas it names are no debris any more, and `surplus`, the
    /// replicas of the old record that are not needed any more, become debris, which is kept this long. Fails with
    /// `Locked` if another master has changed the record in a way that this write may not replace, and with
    /// `Unavailable` if another master has taken it over or, in doubt, if it is not known whether it was carried out.
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
    /// `passing`: drafts of the key do not matter.
    pub fn remove(
        &self,
        key: &[u8],
        passing: bool,
        check: impl Fn(&Record) -> Result<()>,
    ) -> Result<(Held<'_>, Vec<Entry>)> {
        engine!(self, remove(key, passing, check))
    }

    /// Replaces a key's record by what `change` makes of it, under the key's lock. `passing`: drafts of the key do not
    /// matter.
    pub fn update(&self, key: &[u8], passing: bool, change: impl Fn(Option<Record>) -> Result<Record>) -> Result<()> {
        engine!(self, update(key, passing, change))
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

    /// Says that blobs of an entry are about to be deleted, `record` being the key's. `false`: the entry has changed,
    /// and they stay.
    pub fn mark(&self, entry: &mut Entry, record: Option<&Record>) -> Result<bool> {
        match self {
            Index::Rocks(_) => Ok(true),
            Index::Sql(sql) => sql.mark(entry, record),
        }
    }

    /// Takes the replicas that are gone from an entry, and those that the record names. The last replica takes the
    /// entry with it.
    pub fn forget(&self, held: &Held, entry: &mut Entry, deleted: &Deleted) -> Result<()> {
        match self {
            Index::Rocks(rocks) => rocks.forget(held, entry, deleted),
            Index::Sql(sql) => sql.forget(entry, deleted),
        }
    }

    /// The same for an entry whose key was released. If a writer has come meanwhile, the entry may stay as it is.
    pub fn forget_released(&self, clearing: Clearing, entry: &mut Entry, deleted: &Deleted) -> Result<()> {
        let forgotten = match self {
            Index::Rocks(rocks) => match rocks.hold_to_clean(entry)? {
                Some(held) => rocks.forget(&held, entry, deleted),
                None => Ok(()),
            },
            Index::Sql(sql) => sql.forget(entry, deleted),
        };
        drop(clearing);
        forgotten
    }

    /// Makes a consistent copy of the index as it is now. Writes go on meanwhile. `own`: it is the master's, which does
    /// not wait for clients that read others.
    pub fn backup(&self, own: bool) -> Result<Backup<'_>> {
        match self {
            Index::Rocks(rocks) => rocks.backup(own),
            Index::Sql(_) => Err(Error::Failed("the index is in PostgreSQL: back it up with pg_dump".into())),
        }
    }

    /// The result of the last `verify`; `None`: there is none, or it cannot be read.
    pub fn last_verify(&self) -> Option<Scrub> {
        engine!(self, last_verify())
    }

    /// Replaces the result of the last `verify`. The time of the last deep one is kept.
    pub fn keep_verify(&self, scrub: Scrub) -> Result<()> {
        let scrub = scrub.after(self.last_verify());
        engine!(self, keep_verify(&scrub))
    }

    /// Makes a blob debris that neither the record nor debris names. `false`: nobody else uses this index, so the
    /// caller can delete the blob.
    pub fn condemn(&self, key: &[u8], version: u64, replica: &str) -> Result<bool> {
        match self {
            Index::Rocks(_) => Ok(false),
            Index::Sql(sql) => sql.condemn(key, version, replica).map(|()| true),
        }
    }

    /// A volume gave no answer to a DELETE of a blob of this key: it may carry it out within the hour.
    pub fn note_unconfirmed_delete(&self, key: &[u8]) {
        // A database has this in its entries.
        if let Index::Rocks(rocks) = self {
            rocks.note_unconfirmed_delete(key);
        }
    }

    /// Writes from before a crash may still land: until this time (seconds since 1970) a 404 proves nothing for any
    /// debris.
    pub fn suspect_after_crash(&self, until: u64) -> Result<()> {
        match self {
            Index::Rocks(rocks) => rocks.suspect_after_crash(until),
            // A takeover does this for its rows.
            Index::Sql(_) => Ok(()),
        }
    }

    /// Takes the replicas of lost volumes from all debris. Returns the latest time (seconds since 1970) until which
    /// debris is to be kept.
    pub fn forget_lost(&self, is_lost: impl Fn(&str) -> bool) -> Result<u64> {
        engine!(self, forget_lost(is_lost))
    }

    /// The number of entries of debris, counted up to `most`.
    pub fn count_debris(&self, most: usize) -> Result<usize> {
        self.view().entries().take(most).try_fold(0, |count, entry| entry.map(|_| count + 1))
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
            Index::Sql(sql) => View::Sql(sql),
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
            Index::Sql(sql) => Batch::Sql(sql.batch()),
        }
    }

    /// Shows a secondary what the master has written since. Does nothing for the index's owner.
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

    /// The highest version that the engine takes.
    pub fn max_version(&self) -> u64 {
        match self {
            Index::Rocks(_) => u64::MAX,
            Index::Sql(_) => i64::MAX as u64,
        }
    }

    /// Whether this process is known to be able to write. If not, others can.
    pub fn is_ready(&self) -> bool {
        match self {
            Index::Rocks(_) => true,
            Index::Sql(sql) => sql.is_ready(),
        }
    }

    /// Whether this process is the one that deletes what no live master is about to delete.
    pub fn leads(&self) -> bool {
        match self {
            Index::Rocks(_) => true,
            Index::Sql(sql) => sql.leads(),
        }
    }

    /// All processes that write this index, this one among them, and warnings for the operator. `None`: there is only
    /// this one.
    pub fn peers(&self) -> Option<(Vec<Peer>, Vec<String>)> {
        match self {
            Index::Rocks(_) => None,
            Index::Sql(sql) => Some((sql.peers(), sql.warnings())),
        }
    }

    /// The master that this index follows; `None`: this process may write it.
    pub fn following(&self) -> Option<&Following> {
        match self {
            Index::Rocks(rocks) => rocks.following(),
            Index::Sql(_) => None,
        }
    }

    /// How many promotions led to this index.
    pub fn generation(&self) -> u64 {
        match self {
            Index::Rocks(rocks) => rocks.generation(),
            Index::Sql(_) => 0,
        }
    }

    fn rocks(&self) -> Result<&Rocks> {
        match self {
            Index::Rocks(rocks) => Ok(rocks),
            Index::Sql(_) => Err(Error::Failed("the index is in PostgreSQL: start another mkv server on it".into())),
        }
    }

    /// What a follower has to know of this index, as `log::Head`, without updates.
    pub fn head(&self) -> Result<Vec<u8>> {
        Ok(self.rocks()?.head(None).encode())
    }

    /// The log of changes after this one, for a reader that has followed this run last, as `log` says. Waits for a
    /// change, up to a second.
    pub fn log(&self, since: u64, run: &str) -> Result<Vec<u8>> {
        Ok(self.rocks()?.log(since, run))
    }

    /// A follower's last change, and the last run of its history.
    pub fn position(&self) -> Result<(u64, String)> {
        Ok(self.rocks()?.position())
    }

    /// Whether a follower can take over the updates behind this head. If not, it needs a new checkpoint. Fails if it may
    /// not follow that process.
    pub fn accept(&self, head: &Head) -> Result<bool> {
        self.rocks()?.accept(head)
    }

    /// Takes over an update.
    pub fn apply(&self, update: &Update) -> Result<()> {
        self.rocks()?.apply(update)
    }

    /// Notes that a follower has taken over all updates behind this head, which was asked for at this time since the
    /// machine started.
    pub fn note_current(&self, head: &Head, asked: Duration) -> Result<()> {
        self.rocks()?.note_current(head, asked);
        Ok(())
    }

    /// Makes a follower's index a master's, also after a crash. No update is taken over any more. `lead` follows.
    pub fn promote(&self) -> Result<()> {
        self.rocks()?.promote()
    }

    /// From now on this process writes the index.
    pub fn lead(&self) -> Result<()> {
        self.rocks()?.lead();
        Ok(())
    }

    /// Ends the engine's threads, so that the process can exit.
    pub fn close(&self) {
        engine!(self, close())
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
            let writing = index.begin(b"/a", vec![replica.into()], true, |_| Ok(())).unwrap();
            let old = writing.held.record.clone();
            let surplus = old.map_or(Vec::new(), |old| old.replicas);
            let record = Record { version: writing.entry.version, replicas: vec![replica.into()], ..Record::default() };
            assert_eq!(index.begin(b"/a", Vec::new(), true, |_| Ok(())).err(), Some(Error::Locked));
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
