//! `mkv backup`: a copy of a running master's index as a file, and `mkv restore`: an index from such a file.
//!
//! A backup gets its name when it is whole: it was written to the disk, unpacked and opened. Only then older ones are
//! deleted, and only files that have a backup's name.
//!
//! A restored index forgets which blobs were to be deleted: since the backup was made, one of them may have become a
//! value, and the cleaner must not delete it.

use std::fs::{self, File};
use std::io::{BufReader, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::format::record::Debris;
use crate::format::time::{readable, stamp};
use crate::index::{Location, Unpacked, lock_file, remove, unpack};
use crate::store::now;
use crate::volumes::remote::Remote;

/// How long the master may make no progress.
const STALL: Duration = Duration::from_secs(60);

pub struct Config {
    /// Where backups are kept.
    pub dir: PathBuf,
    /// `host:port` of the running master.
    pub master: String,
    /// The `Authorization` header for the master.
    pub auth: Option<String>,
    /// How many backups stay.
    pub keep: usize,
    /// How long a connection to the master may take.
    pub timeout: Duration,
}

pub fn run(config: &Config) -> Result<()> {
    let (begun, dir) = (Instant::now(), &config.dir);
    fs::create_dir_all(dir).map_err(|e| failed(dir, e))?;
    let [lock, part, check] = [".mkv-backup.lock", ".mkv-backup.part", ".mkv-backup.check"].map(|name| dir.join(name));
    let _lock = lock_file(&lock).map_err(|e| failed(&lock, e))?.map_err(|holder| {
        Error::Failed(format!("{}: mkv backup (process {holder}) is writing there: wait until it ends", dir.display()))
    })?;
    let checked = download(config, &part).and_then(|bytes| Ok((bytes, unpack_file(&part, &check)?.keys)));
    remove(&check)?;
    let (bytes, keys) = checked.inspect_err(|_| drop(fs::remove_file(&part)))?;
    let name = publish(dir, &part)?;
    let seconds = begun.elapsed().as_secs_f64();
    println!("{}: {keys} keys, {bytes} bytes, {seconds:.1} s", dir.join(&name).display());
    delete_old(dir, &name, config.keep)
}

fn failed(path: &Path, e: std::io::Error) -> Error {
    Error::Failed(format!("{}: {e}", path.display()))
}

/// Writes the master's backup to this file, and returns its bytes.
fn download(config: &Config, part: &Path) -> Result<u64> {
    let master = Remote::new(&config.master, config.auth.as_deref(), config.timeout, STALL);
    let mut backup = master.get("/?backup")?;
    // What a crash has left goes; a link that lies there must not be followed.
    let mut file = match fs::remove_file(part) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => File::create_new(part),
    }
    .map_err(|e| failed(part, e))?;
    let copied = std::io::copy(&mut backup.body, &mut file).and_then(|bytes| file.sync_all().map(|()| bytes));
    copied.map_err(|e| Error::Failed(format!("the backup could not be written to {}: {e}", part.display())))
}

/// Unpacks the backup in this file.
pub fn unpack_file(file: &Path, folder: &Path) -> Result<Unpacked> {
    let mut backup = BufReader::with_capacity(1 << 20, File::open(file).map_err(|e| failed(file, e))?);
    unpack(&mut backup, folder).map_err(|e| named(file, e))
}

fn named(file: &Path, error: Error) -> Error {
    Error::Failed(format!("{}: {error}", file.display()))
}

/// Gives a whole backup its name, which is the time.
fn publish(dir: &Path, part: &Path) -> Result<String> {
    let (mut time, name_at) = (now(), |time| format!("mkv-{}.tar", stamp(time)));
    // The lock keeps others from making the same one.
    while dir.join(name_at(time)).exists() {
        time += 1;
    }
    let name = name_at(time);
    let published = fs::rename(part, dir.join(&name)).and_then(|()| File::open(dir)?.sync_all());
    published.map(|()| name).map_err(|e| failed(dir, e))
}

/// Deletes the oldest backups beside the new one until `keep` are left.
fn delete_old(dir: &Path, new: &str, keep: usize) -> Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| failed(dir, e))? {
        let name = entry.map_err(|e| failed(dir, e))?.file_name().to_string_lossy().into_owned();
        if is_backup(&name) && name != new {
            names.push(name);
        }
    }
    names.sort();
    // The new one stays, whatever the clock says.
    let surplus = (names.len() + 1).saturating_sub(keep.max(1));
    for name in &names[..surplus] {
        let file = dir.join(name);
        match fs::remove_file(&file) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(failed(&file, e)),
            _ => log::info!("{} is deleted", file.display()),
        }
    }
    Ok(())
}

/// Whether a file has a name that `publish` gives, as `mkv-20261125-042236.tar`.
fn is_backup(name: &str) -> bool {
    let stamp = name.strip_prefix("mkv-").and_then(|rest| rest.strip_suffix(".tar")).unwrap_or_default();
    let is_right = |(n, byte): (usize, u8)| if n == 8 { byte == b'-' } else { byte.is_ascii_digit() };
    stamp.len() == 15 && stamp.bytes().enumerate().all(is_right)
}

/// Makes a backup the index of `db`, which must have none.
pub fn restore(db: &Location, file: &Path) -> Result<()> {
    // Opened first: a wrong name makes no folder.
    let mut backup = BufReader::with_capacity(1 << 20, File::open(file).map_err(|e| failed(file, e))?);
    let replacement = db.replace()?;
    db.check_vacant()?;
    let restored = replacement.unpack(&mut backup).and_then(|unpacked| forget_debris(&unpacked).map(|()| unpacked));
    let Unpacked { index, time, keys } = match restored {
        Ok(unpacked) => unpacked,
        Err(error) => {
            replacement.discard()?;
            return Err(named(file, error));
        }
    };
    // Closes the index: its folder is renamed now.
    drop(index);
    replacement.publish(false)?;
    println!("the index holds {keys} keys, as of {} UTC", readable(time));
    Ok(())
}

/// What was to be deleted, or was a part of an upload, can have become a value since.
fn forget_debris(unpacked: &Unpacked) -> Result<()> {
    let index = &unpacked.index;
    index.uploads(|upload| index.end_upload(&upload))?;
    for entry in index.view().entries() {
        let entry = entry?;
        index.batch().set_debris(&entry.key, entry.version, &Debris::default()).commit()?;
    }
    index.sync()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_backups_are_recognised() {
        assert!(is_backup(&format!("mkv-{}.tar", stamp(now()))));
        for name in ["mkv-20261125-042236.tar.gz", "mkv-20261125.tar", "mkv-2026112-5042236.tar", "x", "mkv-.tar", ""] {
            assert!(!is_backup(name), "{name}");
        }
    }

    #[test]
    fn the_oldest_go_and_the_new_one_stays_even_if_the_clock_went_back() {
        let dir = std::env::temp_dir().join(format!("mkv-keep-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let name = |day: u32| format!("mkv-202611{day:02}-000000.tar");
        let write = |name: &str| fs::write(dir.join(name), "x").unwrap();
        let left = || {
            let files = fs::read_dir(&dir).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<_> = files.collect();
            names.sort();
            names
        };
        (10..15).for_each(|day| write(&name(day)));
        write("mkv.tar");
        write(&name(1));
        delete_old(&dir, &name(1), 3).unwrap();
        assert_eq!(left(), [name(1), name(13), name(14), "mkv.tar".into()]);
        delete_old(&dir, &name(1), 1).unwrap();
        assert_eq!(left(), [name(1), "mkv.tar".into()]);
        fs::remove_dir_all(dir).unwrap();
    }
}
