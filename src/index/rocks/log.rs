//! The log of changes, which followers read, and what a follower makes of it.
//!
//! RocksDB numbers all changes. A follower's copy begins as a checkpoint of its master's database and takes over the
//! batches of the master's log one by one, so that both have the same numbers. `history.rs` says when a copy is still a
//! part of the master's index. The numbers of the column families in a batch mean the same families in both databases,
//! because all versions of mkv make them in the same order; that is checked.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant, SystemTime};

use rocksdb::checkpoint::Checkpoint;
use rocksdb::{DB, Options, WriteBatch, WriteOptions};

use super::tail::Tail;
use super::{Rocks, index_error};
use crate::error::{Error, Result};
use crate::format::record::Debris;
use crate::index::directory::{note_time, noted_time};
use crate::index::history::History;
use crate::index::log::{Head, Update, encode};
use crate::index::role::Role;
use crate::index::sql::boot_time;
use crate::threads::lock;

/// How long a reader of the log waits for changes, and how often they are looked for.
const WAIT: Duration = Duration::from_millis(300);
const LOOK: Duration = Duration::from_millis(10);

/// The same with `-sync`, where each look reads a log file of some MiB from its beginning.
const LOOK_IN_FILE: Duration = Duration::from_millis(50);

/// Send this many changes without waiting for more, and about this many bytes at once.
const MANY: u64 = 10_000;
const BYTES: usize = 4 << 20;

/// Write down this often when the index was last known to be current.
const NOTE: Duration = Duration::from_secs(1);

/// Where an index comes from, and whether it goes on.
#[derive(Default)]
pub struct Lineage {
    /// How many promotions led to it.
    generation: AtomicU64,
    history: Mutex<History>,
    families: Vec<String>,
    following: Option<Following>,
    /// The last changes, once a follower has asked for the log.
    tail: RwLock<Option<Mutex<Tail>>>,
}

/// What a follower knows of its master.
pub struct Following {
    /// `host:port`.
    pub master: String,
    /// Held while a batch is taken over, and during a promotion.
    taking: Mutex<()>,
    /// The index is a master's: no batch is taken over any more.
    promoted: AtomicBool,
    /// This process has become a master.
    ended: AtomicBool,
    /// When the index was last known to be current, in milliseconds since the machine started.
    current: AtomicI64,
    /// When that was written down, in the same unit.
    noted: AtomicI64,
    /// How many changes the master was ahead then.
    behind: AtomicU64,
}

impl Following {
    /// Time since the index was last known to be current.
    pub fn age(&self) -> Duration {
        let age = boot_time().as_millis() as i64 - self.current.load(Ordering::Relaxed);
        Duration::from_millis(age.max(0) as u64)
    }

    /// The error for a change of this index by anybody else.
    pub fn refusal(&self) -> Error {
        Error::Unavailable(format!("this is a follower, which writes nothing: ask http://{}", self.master))
    }

    /// How many changes the master was ahead when it last answered.
    pub fn behind(&self) -> u64 {
        self.behind.load(Ordering::Relaxed)
    }
}

impl Rocks {
    /// Makes a copy of the database, as it is now, in a folder of the same disk that does not exist yet.
    pub fn checkpoint(&self, folder: &Path) -> Result<()> {
        Checkpoint::new(&self.db).and_then(|checkpoint| checkpoint.create_checkpoint(folder)).map_err(index_error)
    }

    /// Begins to write: notes a new run and, in a folder that was just promoted, deals with the old master's debris.
    pub fn begin_run(&mut self, role: Role) -> Result<()> {
        self.trace_families()?;
        self.take_over(role)
    }

    /// Begins to follow the master of this role.
    pub fn begin_following(&mut self, role: &Role) -> Result<()> {
        self.trace_families()?;
        let (Some(master), db) = (role.follows.clone(), self.parent()) else { return Ok(()) };
        let age = wall_clock() - noted_time(db);
        let (taking, promoted, ended, behind) = Default::default();
        let (current, noted) = (AtomicI64::new(boot_time().as_millis() as i64 - age), AtomicI64::new(i64::MIN));
        self.lineage.following = Some(Following { master, taking, promoted, ended, current, noted, behind });
        self.lineage.generation = role.generation.into();
        *lock(&self.lineage.history) = History::read(self.folder())?;
        Ok(())
    }

    fn trace_families(&mut self) -> Result<()> {
        self.lineage.families = DB::list_cf(&Options::default(), self.folder()).map_err(index_error)?;
        Ok(())
    }

    /// The folder `-db`.
    fn parent(&self) -> &Path {
        self.folder().parent().unwrap_or(self.folder())
    }

    /// How many promotions led to this index.
    pub fn generation(&self) -> u64 {
        self.lineage.generation.load(Ordering::Relaxed)
    }

    /// The master that this index follows.
    pub fn following(&self) -> Option<&Following> {
        self.lineage.following.as_ref().filter(|following| !following.ended.load(Ordering::Relaxed))
    }

    /// The number of the last change, and the last run.
    pub fn position(&self) -> (u64, String) {
        (self.db.latest_sequence_number(), lock(&self.lineage.history).last().to_string())
    }

    /// What this process says of its index. `at`: the position of a reader of the log.
    pub fn head(&self, at: Option<(u64, &str)>) -> Head {
        let Lineage { history, families, .. } = &self.lineage;
        let (change, history) = (self.db.latest_sequence_number(), lock(history).clone());
        Head {
            generation: self.generation(),
            follows: self.following().map(|following| following.master.clone()),
            change,
            families: families.clone(),
            continues: at.is_some_and(|(since, run)| since <= change && history.contains(run, since)),
            history,
        }
    }

    /// The log after this change, for a reader whose last run this is. Waits for a change, for `WAIT` at most.
    pub fn log(&self, since: u64, run: &str) -> Vec<u8> {
        let look = if self.keep_tail() { LOOK } else { LOOK_IN_FILE };
        let (begun, behind) = (Instant::now(), || self.db.latest_sequence_number().saturating_sub(since));
        while behind() <= MANY {
            std::thread::sleep(look);
            if behind() > 0 || begun.elapsed() > WAIT {
                break;
            }
        }
        let mut head = self.head(Some((since, run)));
        let mut updates = Vec::new();
        if head.continues && head.change > since {
            let read = if self.read_tail(since, &mut updates) { Ok(()) } else { self.read_log(since, &mut updates) };
            if let Err(why) = &read {
                log::info!("a follower needs a new checkpoint, its last change is {since}: {why}");
            }
            head.continues = read.is_ok();
        }
        [head.encode(), updates].concat()
    }

    /// Keeps the last changes in memory from now on. `false`: with `-sync` the log on the disk has to do, because writes
    /// that are made one at a time cannot share a flush.
    fn keep_tail(&self) -> bool {
        if self.sync {
            return false;
        }
        let is_kept = self.lineage.tail.read().unwrap_or_else(|e| e.into_inner()).is_some();
        if !is_kept {
            // Waits for the writes under way, which know nothing of it.
            self.lineage.tail.write().unwrap_or_else(|e| e.into_inner()).get_or_insert_default();
        }
        true
    }

    fn read_tail(&self, since: u64, out: &mut Vec<u8>) -> bool {
        let tail = self.lineage.tail.read().unwrap_or_else(|e| e.into_inner());
        tail.as_ref().is_some_and(|tail| lock(tail).read(since, out))
    }

    /// Writes a batch of this process. While the last changes are kept, batches are written one at a time, so that their
    /// numbers are known.
    pub(super) fn write(&self, batch: WriteBatch) -> Result<()> {
        let mut options = WriteOptions::default();
        options.set_sync(self.sync);
        let tail = self.lineage.tail.read().unwrap_or_else(|e| e.into_inner());
        let Some(tail) = &*tail else { return self.db.write_opt(batch, &options).map_err(index_error) };
        let (count, text) = (batch.len() as u64, batch.data().to_vec());
        let mut tail = lock(tail);
        self.db.write_opt(batch, &options).map_err(index_error)?;
        tail.push(self.db.latest_sequence_number() + 1 - count, count, text);
        Ok(())
    }

    /// Reads the log after this change. Fails if it does not go back so far.
    fn read_log(&self, since: u64, out: &mut Vec<u8>) -> Result<()> {
        let gap = || Error::Failed("the log does not go back so far".into());
        let mut next = since + 1;
        for update in self.db.get_updates_since(since).map_err(index_error)? {
            let (change, batch) = update.map_err(index_error)?;
            if change != next {
                return Err(gap());
            }
            encode(out, change, batch.data());
            next = change + batch.len() as u64;
            if out.len() > BYTES {
                break;
            }
        }
        if next > since + 1 { Ok(()) } else { Err(gap()) }
    }

    /// Takes over what the master says of its index. `false`: this copy is no part of that one, or too far behind.
    pub fn accept(&self, head: &Head) -> Result<bool> {
        let Some(following) = self.following() else { return Ok(false) };
        let wrong = |why: &str| Error::Failed(format!("http://{}: {why}", following.master));
        if let Some(master) = &head.follows {
            return Err(wrong(&format!("it is a follower itself: follow http://{master}")));
        }
        if head.generation < self.generation() {
            return Err(wrong("this follower has followed a newer master, which was promoted: follow that one"));
        }
        if !self.lineage.families.starts_with(&head.families) {
            return Err(wrong("it is newer than this mkv: update this one first"));
        }
        if head.continues {
            self.remember(head)?;
        }
        Ok(head.continues)
    }

    /// Writes down the master's generation and history, before the first change that they stand for.
    fn remember(&self, head: &Head) -> Result<()> {
        if head.generation != self.generation() {
            Role { generation: head.generation, ..Role::read(self.parent())? }.write(self.parent())?;
            self.lineage.generation.store(head.generation, Ordering::Relaxed);
        }
        let mut history = lock(&self.lineage.history);
        if *history != head.history {
            head.history.write(self.folder())?;
            *history = head.history.clone();
        }
        Ok(())
    }

    /// Takes over a batch.
    pub fn apply(&self, update: &Update) -> Result<()> {
        let Some(following) = self.following() else { return Ok(()) };
        let _taking = lock(&following.taking);
        let last = self.db.latest_sequence_number();
        if following.promoted.load(Ordering::Relaxed) || update.change != last + 1 {
            return Err(Error::Failed(format!("change {} does not follow change {last}", update.change)));
        }
        let batch = WriteBatch::from_data(&update.batch);
        let end = last + batch.len() as u64;
        self.db.write_opt(batch, &WriteOptions::default()).map_err(index_error)?;
        if self.db.latest_sequence_number() != end {
            return Err(Error::Index(format!("after change {} the numbers differ from the master's", update.change)));
        }
        Ok(())
    }

    /// Notes that the index is as the master's was when the head was asked for, at this time since the machine started.
    pub fn note_current(&self, head: &Head, asked: Duration) {
        let Some(following) = self.following() else { return };
        let behind = head.change.saturating_sub(self.db.latest_sequence_number());
        following.behind.store(behind, Ordering::Relaxed);
        if behind > 0 {
            return;
        }
        let asked = asked.as_millis() as i64;
        following.current.store(asked, Ordering::Relaxed);
        if asked.saturating_sub(following.noted.swap(asked, Ordering::Relaxed)) > NOTE.as_millis() as i64 {
            let time = wall_clock() - boot_time().as_millis() as i64 + asked;
            if let Err(error) = note_time(self.parent(), time) {
                log::warn!("{error}");
            }
        }
    }

    /// Makes the copy a master's index, which is that also after a crash. `lead` has to follow.
    pub fn promote(&self) -> Result<()> {
        let Some(following) = self.following() else { return Ok(()) };
        let _taking = lock(&following.taking);
        self.sync()?;
        let role = Role::read(self.parent())?.promoted();
        role.write(self.parent())?;
        following.promoted.store(true, Ordering::Relaxed);
        log::warn!("promoted; the index was last known to be current {:.1} s ago", following.age().as_secs_f64());
        self.take_over(role)
    }

    /// Fails if only the master's changes may be written.
    pub fn check_owner(&self) -> Result<()> {
        let following = self.following().filter(|following| !following.promoted.load(Ordering::Relaxed));
        following.map_or(Ok(()), |following| Err(following.refusal()))
    }

    /// From now on this process writes the index.
    pub fn lead(&self) {
        if let Some(following) = self.following() {
            following.ended.store(true, Ordering::Relaxed);
        }
    }

    fn take_over(&self, role: Role) -> Result<()> {
        let mut history = History::read(self.folder())?;
        history.begin(self.db.latest_sequence_number());
        history.write(self.folder())?;
        *lock(&self.lineage.history) = history;
        self.lineage.generation.store(role.generation, Ordering::Relaxed);
        if role.inherits {
            let left = self.inherit()?;
            self.sync()?;
            Role { inherits: false, ..role }.write(self.parent())?;
            log::warn!(
                "this is generation {}; {left} blobs that the old master was writing or deleting are left alone: mkv \
                 verify names them",
                role.generation
            );
        }
        Ok(())
    }

    /// Deals with debris that another master has left. What a record has replaced can be deleted, after a look at the
    /// record's replicas. All else may have become a value in changes that were lost: it is forgotten. Returns how many
    /// entries were.
    fn inherit(&self) -> Result<u64> {
        let (now, mut forgotten) = (wall_clock() as u64 / 1000, 0);
        for entry in self.view().entries() {
            let mut entry = entry?;
            // A part of an upload that goes on; or surplus, which waits.
            if entry.debris.keep_until > now {
                continue;
            }
            let version = self.get(&entry.key)?.map(|record| record.version);
            if version.is_some_and(|version| version >= entry.version) {
                entry.debris.keep_until = now;
            } else {
                entry.debris = Debris::default();
                forgotten += 1;
            }
            self.batch().set_debris(&entry.key, entry.version, &entry.debris).commit()?;
        }
        Ok(forgotten)
    }
}

/// Milliseconds since 1970.
fn wall_clock() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}
