//! What only the process that writes the index knows: which keys are being written, and which deletions may still
//! happen after this process stopped waiting for them.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use crate::threads::lock;

/// How long a client waits for the cleaner to free a key, and the cleaner for a client.
const CLIENT_WAIT: Duration = Duration::from_secs(2);
const CLEANER_WAIT: Duration = Duration::from_millis(200);

/// How long a writer that passes others waits for one that does not.
const PASSING_WAIT: Duration = Duration::from_secs(10);

/// How long a deletion without an answer may still be carried out.
pub const UNCONFIRMED: Duration = Duration::from_secs(3600);

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Owner {
    Client,
    /// A client whose writes pass those of others: it holds a key for a moment only.
    Passing,
    Cleaner,
}

/// A key and a version of it.
type Name = (Vec<u8>, u64);

#[derive(Default)]
pub struct Locks {
    held: Mutex<HashMap<Vec<u8>, Owner>>,
    /// Keys and versions whose blobs are being deleted without the key's lock.
    clearing: Mutex<HashSet<Name>>,
    /// Keys and versions that are being written without the key's lock.
    drafts: Mutex<HashSet<Name>>,
    /// Keys with a deletion that got no answer, and when it was sent. One of nginx's processes may carry it out after
    /// another has answered the next request.
    unconfirmed_deletes: Mutex<HashMap<Vec<u8>, Instant>>,
    /// Held while an upload's rows change.
    uploads: Mutex<()>,
    /// When this process found debris at its start: requests of the process before it may still be carried out.
    crash: OnceLock<Instant>,
}

impl Locks {
    /// Locks a key; `None` if another request writes it. A client waits for the cleaner, because no client could know
    /// of that writer, and for writers that hold the key for a moment. The cleaner gives way to clients, after a short
    /// wait.
    pub fn lock(&self, key: &[u8], owner: Owner) -> Option<KeyLock<'_>> {
        let begun = Instant::now();
        let patience = match owner {
            Owner::Client => CLIENT_WAIT,
            Owner::Passing => PASSING_WAIT,
            Owner::Cleaner => CLEANER_WAIT,
        };
        loop {
            match lock(&self.held).entry(key.to_vec()) {
                Entry::Vacant(entry) => {
                    entry.insert(owner);
                    return Some(KeyLock { locks: self, key: key.to_vec(), kept: false });
                }
                Entry::Occupied(holder) if owner == Owner::Client && *holder.get() == Owner::Client => return None,
                Entry::Occupied(_) if begun.elapsed() > patience => return None,
                Entry::Occupied(_) => {}
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// How many keys are locked.
    pub fn count(&self) -> usize {
        lock(&self.held).len()
    }

    /// Until the returned guard is dropped, no write uses this name of the key.
    pub fn clear(&self, key: &[u8], version: u64) -> Clearing<'_> {
        Noted::new(&self.clearing, key, version)
    }

    /// Until the returned guard is dropped, the cleaner leaves this version of the key alone.
    pub fn draft(&self, key: &[u8], version: u64) -> Noted<'_> {
        Noted::new(&self.drafts, key, version)
    }

    /// Whether this version of the key is being written without the key's lock.
    pub fn is_draft(&self, key: &[u8], version: u64) -> bool {
        lock(&self.drafts).contains(&(key.to_vec(), version))
    }

    /// Whether blobs of this key and version are being deleted without the key's lock.
    pub fn is_clearing(&self, key: &[u8], version: u64) -> bool {
        lock(&self.clearing).contains(&(key.to_vec(), version))
    }

    /// Held while the rows of multipart uploads change.
    pub fn uploads(&self) -> MutexGuard<'_, ()> {
        lock(&self.uploads)
    }

    /// The versions of the key that are being written without its lock.
    pub fn drafts_of(&self, key: &[u8]) -> Vec<u64> {
        lock(&self.drafts).iter().filter(|(its, _)| its == key).map(|(_, version)| *version).collect()
    }

    /// Notes a deletion that got no answer, and forgets those that can no longer be carried out.
    pub fn note_unconfirmed_delete(&self, key: &[u8]) {
        let mut deletes = lock(&self.unconfirmed_deletes);
        deletes.retain(|_, at| at.elapsed() < UNCONFIRMED);
        deletes.insert(key.to_vec(), Instant::now());
    }

    /// Whether a deletion of a blob of this key may still be carried out.
    pub fn has_unconfirmed_delete(&self, key: &[u8]) -> bool {
        lock(&self.unconfirmed_deletes).get(key).is_some_and(|at| at.elapsed() < UNCONFIRMED)
    }

    pub fn note_crash(&self) {
        self.crash.get_or_init(Instant::now);
    }

    /// Whether a blob of the plain name of this key, which has neither record nor debris, could be deleted by a request
    /// that is still under way.
    pub fn is_plain_name_unsafe(&self, key: &[u8]) -> bool {
        self.is_clearing(key, 0)
            || self.is_draft(key, 0)
            || self.has_unconfirmed_delete(key)
            || self.crash.get().is_some_and(|at| at.elapsed() < UNCONFIRMED)
    }
}

impl Locks {
    /// Frees a key whose lock was kept.
    pub fn free(&self, key: &[u8]) {
        lock(&self.held).remove(key);
    }
}

/// Frees the key when it is dropped.
pub struct KeyLock<'a> {
    locks: &'a Locks,
    pub key: Vec<u8>,
    kept: bool,
}

impl KeyLock<'_> {
    /// Keeps the key locked, until `Locks::free`.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for KeyLock<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.locks.free(&self.key);
        }
    }
}

/// Deletions under way of one key's blobs of one version.
pub type Clearing<'a> = Noted<'a>;

/// A key and version in a set, until it is dropped.
pub struct Noted<'a> {
    names: &'a Mutex<HashSet<Name>>,
    name: Name,
}

impl Noted<'_> {
    fn new<'a>(names: &'a Mutex<HashSet<Name>>, key: &[u8], version: u64) -> Noted<'a> {
        let name = (key.to_vec(), version);
        lock(names).insert(name.clone());
        Noted { names, name }
    }
}

impl Drop for Noted<'_> {
    fn drop(&mut self) {
        lock(self.names).remove(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_one_lock() {
        let locks = Locks::default();
        let held = locks.lock(b"/a", Owner::Client);
        assert!(held.is_some());
        assert!(locks.lock(b"/a", Owner::Client).is_none());
        assert!(locks.lock(b"/b", Owner::Client).is_some());
        drop(held);
        assert!(locks.lock(b"/a", Owner::Client).is_some());
    }
}
