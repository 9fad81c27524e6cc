//! The folder `-db`: its lock and where the database lies in it.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, Result};

/// The folder's lock. The kernel frees it when the process ends (flock).
pub struct DirLock(#[allow(dead_code)] File);

/// Locks `dir` against every other command that writes. `create`: makes the folder if it is missing.
pub fn lock_dir(dir: &Path, create: bool) -> Result<DirLock> {
    let wrong = |e: std::io::Error| Error::Failed(format!("-db {}: {e}", dir.display()));
    if !create && !database(dir)?.join("CURRENT").exists() {
        return Err(Error::Failed(format!("-db {}: there is no index here", dir.display())));
    }
    if create {
        std::fs::create_dir_all(dir).map_err(wrong)?;
    }
    let path = dir.join("lock");
    let mut file = File::options().read(true).append(true).create(true).open(path).map_err(wrong)?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        let _ = file.read_to_string(&mut holder);
        return Err(Error::Failed(format!(
            "-db {}: another mkv (process {}) is using it: stop that one first",
            dir.display(),
            holder.trim()
        )));
    }
    // The process id is for the message above; the lock holds without it.
    let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
    Ok(DirLock(file))
}

/// Whether a command that writes, such as a running master, holds the lock of this folder.
pub fn is_locked(dir: &Path) -> bool {
    let file = File::open(dir.join("lock"));
    file.is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockShared).is_err())
}

/// The database's folder in `-db`. Fails if `-db` itself is a Go master's index.
pub fn database(dir: &Path) -> Result<PathBuf> {
    if dir.join("CURRENT").exists() {
        return Err(Error::Failed(format!(
            "-db {0} is the index of a Go minikeyvalue: import it with mkv -db NEW import -leveldb {0}",
            dir.display()
        )));
    }
    Ok(dir.join("index"))
}
