//! The folder `-db`: its lock, and the database's folders in it.
//!
//! The database is `index/`. A new one is made as `index.new/` and takes its place in one step; `index.old/` is the one
//! before that. `backup.tmp/` is what a backup needs while it is read or unpacked.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{Error as IoError, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags, flock, renameat_with};

use super::backup::{Unpacked, unpack};
use super::history::History;
use super::rocks::Rocks;
use crate::error::{Error, Result};

/// When a follower's index was last known to be current.
const CURRENT: &str = "current";

/// The folder for what a backup needs for a while.
pub(super) const TEMPORARY: &str = "backup.tmp";

/// Locks `dir` against every other command that writes, until the file that this returns is closed, and removes what a
/// crash has left. `create`: makes the folder if it is missing.
pub fn lock_dir(dir: &Path, create: bool) -> Result<File> {
    let wrong = |e: IoError| failed(dir, e);
    if create {
        fs::create_dir_all(dir).map_err(wrong)?;
    } else if !database(dir)?.join("CURRENT").exists() {
        return Err(failed(dir, "there is no index here"));
    }
    let file = lock_file(&dir.join("lock"))
        .map_err(wrong)?
        .map_err(|holder| failed(dir, format!("another mkv (process {holder}) is using it: stop that one first")))?;
    remove(&unpacked_in(dir))?;
    Ok(file)
}

/// Locks a file, which is made if it is missing. If another process holds it, the inner error is that one's id.
pub fn lock_file(path: &Path) -> std::io::Result<std::result::Result<File, String>> {
    let no_links = OFlags::NOFOLLOW.bits() as i32;
    let mut file = File::options().read(true).append(true).create(true).custom_flags(no_links).open(path)?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        let _ = file.read_to_string(&mut holder);
        return Ok(Err(holder.trim().into()));
    }
    // The lock holds without the process id.
    let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
    Ok(Ok(file))
}

/// Where a backup is unpacked below `-db`, while the lock is held.
pub fn unpacked_in(dir: &Path) -> PathBuf {
    dir.join(TEMPORARY)
}

/// Whether a command that writes, such as a running master, holds the lock of this folder.
pub fn is_locked(dir: &Path) -> bool {
    let file = File::open(dir.join("lock"));
    file.is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockShared).is_err())
}

/// The database's folder in `-db`. Fails if `-db` itself is a Go master's index.
pub fn database(dir: &Path) -> Result<PathBuf> {
    if dir.join("CURRENT").exists() {
        let import = format!("import it with mkv -db NEW import -leveldb {}", dir.display());
        return Err(failed(dir, format!("this is the index of a Go minikeyvalue: {import}")));
    }
    Ok(dir.join("index"))
}

/// Makes an empty database, which is to replace the one in `dir`, for a bulk load.
pub fn create_new(dir: &Path) -> Result<Rocks> {
    let folder = dir.join("index.new");
    remove(&folder)?;
    Rocks::create(&folder)
}

/// Unpacks a backup as a database which is to become that of `dir`.
pub fn unpack_new(backup: &mut dyn Read, dir: &Path) -> Result<Unpacked> {
    unpack(backup, &dir.join("index.new"))
}

/// Unpacks a master's checkpoint as a database which is to become that of `dir`. Its history is written last: one that
/// has a history is whole. `asked`: when it was asked for, in milliseconds since 1970.
pub fn unpack_checkpoint(checkpoint: &mut dyn Read, history: &History, asked: i64, dir: &Path) -> Result<()> {
    // Closes it before it is complete.
    drop(unpack_new(checkpoint, dir)?);
    note_time(dir, asked)?;
    history.write(&dir.join("index.new"))
}

/// Writes down when a follower's index was last known to be current, in milliseconds since 1970.
pub fn note_time(dir: &Path, time: i64) -> Result<()> {
    fs::write(dir.join(CURRENT), time.to_string()).map_err(|e| failed(dir, format!("{CURRENT}: {e}")))
}

/// What was written down; 0: nothing.
pub fn noted_time(dir: &Path) -> i64 {
    let text = fs::read_to_string(dir.join(CURRENT)).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// Makes a whole checkpoint, if there is one, the database of `dir`. `keep`: the one before it is kept as `index.old`.
pub fn publish_checkpoint(dir: &Path, keep: bool) -> Result<bool> {
    let is_whole = History::exists(&dir.join("index.new"));
    if is_whole && !keep {
        remove(&database(dir)?)?;
    }
    is_whole.then(|| publish_new(dir)).transpose().map(|published| published.is_some())
}

/// Makes the new database, which must be closed, that of `dir`. The one before it is kept as `index.old`, unless `dir`
/// has none.
pub fn publish_new(dir: &Path) -> Result<()> {
    let [new, index, old] = ["index.new", "index", "index.old"].map(|name| dir.join(name));
    let wrong = |e: IoError| Error::Failed(format!("{} could not become the index: {e}", new.display()));
    if index.exists() {
        renameat_with(CWD, &new, CWD, &index, RenameFlags::EXCHANGE).map_err(|e| wrong(e.into()))?;
        remove(&old)?;
        fs::rename(&new, old).map_err(wrong)?;
    } else {
        fs::rename(&new, index).map_err(wrong)?;
    }
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(wrong)
}

/// Replaces a file in one step, with a text that is on the disk when this returns.
pub fn replace_file(file: &Path, text: &str) -> std::io::Result<()> {
    let mut name = file.file_name().unwrap_or_default().to_os_string();
    name.push(".new");
    let new = file.with_file_name(name);
    // Another user's remains; and a link there must not be followed.
    match fs::remove_file(&new) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut writer = File::create_new(&new)?;
    writeln!(writer, "{text}")?;
    writer.sync_all()?;
    fs::rename(&new, file)?;
    File::open(file.parent().unwrap_or(file))?.sync_all()
}

/// Removes a folder, if there is one.
pub fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::Failed(format!("{}: {e}", folder.display()))),
        _ => Ok(()),
    }
}

pub(super) fn failed(dir: &Path, why: impl Display) -> Error {
    Error::Failed(format!("-db {}: {why}", dir.display()))
}
