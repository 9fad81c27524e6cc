//! Reading: where a client finds a value.

use super::Store;
use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::quoted;
use crate::format::record::Record;
use crate::volumes::Auth;

/// A value that a volume has just been seen to hold.
pub struct Located {
    pub record: Record,
    /// `host:port[/svXX]` of the replica, and the blob's path below it, with its leading `/`.
    pub replica: String,
    pub path: String,
    /// Whether the value lies where placement wants it.
    pub balanced: bool,
}

impl Store {
    /// Finds a replica of a live key. `None`: there is no such key. Fails with `Gone` if no volume has the value, and
    /// with `Unreachable` if a volume that does not answer may have it. `failed`: replicas, each with the blob's path,
    /// that the caller could not read.
    pub fn get(&self, key: &[u8], auth: Auth, failed: &[&str]) -> Result<Option<Located>> {
        let mut found = self.index.get(key)?;
        loop {
            let Some(record) = found.filter(Record::live) else { return Ok(None) };
            match self.find(key, &record, auth, failed) {
                Ok(replica) => {
                    let balanced = record.replicas == self.place(key);
                    let path = path(key, record.version);
                    return Ok(Some(Located { record, replica, path, balanced }));
                }
                Err(error) => {
                    found = self.index.get(key)?;
                    // A record that has changed was replaced or deleted meanwhile: look again.
                    if found.as_ref() == Some(&record) {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// A replica that holds the record's blob in its full length. Volumes are asked one by one, in random order.
    pub(super) fn find(&self, key: &[u8], record: &Record, auth: Auth, skipped: &[&str]) -> Result<String> {
        let (blob, mut failed) = (path(key, record.version), None);
        for replica in self.volumes.shuffled(&record.replicas) {
            if skipped.iter().any(|skipped| skipped.strip_prefix(&*replica) == Some(&blob)) {
                let why = format!("{replica} answers the master and not the front: see both error logs");
                failed = Some(Error::Unavailable(why));
                continue;
            }
            match self.volumes.head(&replica, &blob, auth) {
                Ok(Some(length)) if record.size.is_none_or(|size| size == length) => {
                    return Ok(replica);
                }
                Ok(found) => {
                    let found = found.map_or("has no blob".into(), |n| format!("has {n} bytes"));
                    log::warn!("{}: {replica} {found}", quoted(key));
                }
                Err(error) => failed = Some(error),
            }
        }
        Err(match failed {
            None => Error::Gone,
            Some(Error::Refused { volume, status }) if status != 401 && status != 403 => {
                let why = format!("it answered {status}");
                Error::Unreachable { volume, why, maybe_done: false }
            }
            Some(error) => error,
        })
    }
}
