//! What only the process that writes the index knows: which keys are being written, and which deletions may still
//! happen after this process stopped waiting for them.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::threads::lock;

/// How long a client waits for the cleaner to free a key, and the cleaner for a client.
const CLIENT_WAIT: Duration = Duration::from_secs(2);
const CLEANER_WAIT: Duration = Duration::from_millis(200);

/// How long a deletion without an answer may still be carried out.
pub const UNCONFIRMED: Duration = Duration::from_secs(3600);

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Owner {
    Client,
    Cleaner,
}

#[derive(Default)]
pub struct Locks {
    held: Mutex<HashMap<Vec<u8>, Owner>>,
    /// Keys and versions whose blobs are being deleted without the key's lock.
    clearing: Mutex<HashSet<(Vec<u8>, u64)>>,
    /// Keys with a deletion that got no answer, and when it was sent. One of nginx's processes may carry it out after
    /// another has answered the next request.
    unconfirmed_deletes: Mutex<HashMap<Vec<u8>, Instant>>,
    /// When this process found debris at its start: requests of the process before it may still be carried out.
    crash: OnceLock<Instant>,
}

impl Locks {
    /// Locks a key; `None` if another request writes it. A client waits for the cleaner, because no client could know
    /// of that writer. The cleaner gives way to clients, after a short wait.
    pub fn lock(&self, key: &[u8], owner: Owner) -> Option<KeyLock<'_>> {
        let begun = Instant::now();
        let patience = if owner == Owner::Client { CLIENT_WAIT } else { CLEANER_WAIT };
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
        let name = (key.to_vec(), version);
        lock(&self.clearing).insert(name.clone());
        Clearing { locks: self, name }
    }

    /// Whether blobs of this key and version are being deleted without the key's lock.
    pub fn is_clearing(&self, key: &[u8], version: u64) -> bool {
        lock(&self.clearing).contains(&(key.to_vec(), version))
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
pub struct Clearing<'a> {
    locks: &'a Locks,
    name: (Vec<u8>, u64),
}

impl Drop for Clearing<'_> {
    fn drop(&mut self) {
        lock(&self.locks.clearing).remove(&self.name);
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
