//! What a rebuild carries over from: the index in `-db`, the one that `-from` names, or the newest backup on the
//! volumes.
//!
//! A backup on a volume that cannot be used never ends a rebuild: another replica of it is read, then the older backup,
//! then the rebuild goes on without one, and says so.

use std::path::Path;

use super::backup::unpack_file;
use super::rebuild::Config;
use super::scan::{Blob, find};
use crate::error::{Error, Result};
use crate::format::BACKUP_KEYS;
use crate::format::placement::path;
use crate::format::time::readable;
use crate::index::{Index, Location, Unpacked, unpack};
use crate::store::{self, is_lost};
use crate::volumes::Volumes;

/// What a rebuild knows beside the blobs.
#[derive(Default)]
pub struct Old {
    pub index: Option<Index>,
    /// The index may be older than the blobs.
    pub is_copy: bool,
    /// Something to carry over from is there, and cannot be read.
    pub is_lost: bool,
}

/// Finds the index to carry over from. One that `-from` names must open; a damaged one in `-db` is what rebuild is for.
pub fn old_index(config: &Config, store: &store::Config, volumes: &Volumes) -> Result<Old> {
    if let Some(from) = &config.from {
        let index = match from {
            Location::Folder(file) if file.is_file() => unpack_file(file, &config.db.scratch())?.index,
            from => from.open_to_read()?,
        };
        return Ok(Old { index: Some(index), is_copy: true, is_lost: false });
    }
    let exists = config.db.exists()?;
    let damage = match exists.then(|| config.db.open_to_read()) {
        None => None,
        Some(Err(Error::Index(text))) => Some(text),
        Some(opened) => return Ok(Old { index: Some(opened?), ..Old::default() }),
    };
    let (backup, is_lost) = match config.nobackup {
        true => (None, false),
        false => newest_backup(store, volumes, &config.db.scratch())?,
    };
    match (damage, &backup) {
        (Some(text), None) => eprintln!("{text}: its unlinked states, hashes and debris are lost"),
        (Some(text), Some(_)) => eprintln!("{text}: the backup takes its place"),
        (None, _) => {}
    }
    let is_lost = backup.is_none() && (is_lost || exists);
    Ok(Old { is_copy: backup.is_some(), index: backup.map(|backup| backup.index), is_lost })
}

/// A backup on the volumes.
struct Found {
    path: String,
    blob: Blob,
}

/// Unpacks the newest backup on the volumes that is whole. The other value: there is one that is not.
fn newest_backup(store: &store::Config, volumes: &Volumes, folder: &Path) -> Result<(Option<Unpacked>, bool)> {
    let found = all_backups(store, volumes)?;
    for Found { path, blob } in &found {
        let url = format!("http://{}{path}", blob.replica);
        let unpacked = volumes.read(&blob.replica, path, store.auth.as_deref()).and_then(|opened| {
            let mut opened = opened.ok_or_else(|| Error::Index("it is not there any more".into()))?;
            unpack(&mut opened.body, folder)
        });
        match unpacked {
            Ok(backup) => {
                println!("carrying over from the backup of {} UTC: {url}", readable(backup.time));
                return Ok((Some(backup), false));
            }
            // Without room for a backup a rebuild would lose what the backup has.
            Err(error @ Error::Failed(_)) => {
                return Err(Error::Failed(format!("{error}: make room, or add -nobackup to do without the backup")));
            }
            Err(error) => eprintln!("{url} is left out: {error}"),
        }
    }
    if !found.is_empty() {
        eprintln!("no backup on the volumes can be used: unlinked states, hashes and debris are lost");
    }
    Ok((None, !found.is_empty()))
}

/// All replicas of all backups, the newest first.
fn all_backups(store: &store::Config, volumes: &Volumes) -> Result<Vec<Found>> {
    let names = store.placement.volumes.iter().filter(|volume| !is_lost(&store.lost, volume));
    let names: Vec<String> = names.cloned().collect();
    let mut found = Vec::new();
    for key in BACKUP_KEYS {
        for blob in find(volumes, &names, store.auth.as_deref(), key)? {
            if !is_lost(&store.lost, &blob.replica) {
                found.push(Found { path: path(key, blob.version), blob });
            }
        }
    }
    found.sort_by_key(|Found { blob, .. }| std::cmp::Reverse((blob.time, blob.version, blob.size)));
    Ok(found)
}
