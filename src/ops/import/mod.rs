//! `import`: the index of a Go minikeyvalue, a LevelDB that goleveldb wrote, into an index of ours.
//!
//! The LevelDB is only read. Records go over unchanged; a half-written one becomes debris.

pub mod leveldb;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::record::{Debris, Record, State};
use crate::index::{Index, database, lock_dir};
use leveldb::{read, wrong};

/// The records that do not decode and are listed; the others are only counted.
const LISTED: u64 = 100;

pub struct Config {
    pub db: PathBuf,
    /// The folder of the Go master's index.
    pub leveldb: PathBuf,
}

#[derive(Default)]
struct Counts {
    live: u64,
    unlinked: u64,
    half_written: u64,
    undecodable: u64,
    /// Keys whose blob the Go master put where mkv does not look.
    elsewhere: u64,
}

/// Carries out `mkv -db NEW import -leveldb OLD`. The index is filled as `index.new` and becomes
/// `index` as its last step, so that an import that was stopped leaves none.
pub fn run(config: &Config) -> Result<()> {
    let Config { db, leveldb: old } = config;
    let _held = hold(old)?;
    keep_apart(db, old)?;
    let folder = database(db)?;
    let _lock = lock_dir(db, true)?;
    refuse_used(&folder)?;
    let new = folder.with_extension("new");
    let publish = || {
        remove(&folder)?;
        fs::rename(&new, &folder)?;
        File::open(db)?.sync_all()
    };
    let in_db = |e: io::Error| Error::Failed(format!("-db {}: {e}", db.display()));
    remove(&new).map_err(in_db)?;
    let counts = fill(&new, old).inspect_err(|_| drop(remove(&new)))?;
    publish().map_err(in_db)?;
    let Counts { live, unlinked, half_written, undecodable, elsewhere } = counts;
    println!(
        "imported {live} live and {unlinked} unlinked keys, {half_written} half-written, \
         {undecodable} that do not decode"
    );
    match (undecodable, elsewhere) {
        (0, 0) => Ok(()),
        (0, n) => Err(Error::Failed(format!(
            "{n} keys have blobs under names that mkv does not use: REPLACE each with the bytes at the URL above"
        ))),
        (n, elsewhere) => Err(Error::Failed(format!(
            "{n} records do not decode and were left out: PUT these keys again or rebuild; {elsewhere} \
             keys are to be stored again, as named above"
        ))),
    }
}

/// Where a Go store has a key's blob, if that is not where mkv looks: the Go master used plain base64
/// up to the 255 bytes that a file's name may have, and its nginx took two slashes for one.
fn elsewhere(key: &[u8]) -> Option<String> {
    let ours = path(key, 0);
    let mut theirs = format!("{}{}", &ours[..7], STANDARD.encode(key));
    while theirs.contains("//") {
        theirs = theirs.replace("//", "/");
    }
    (theirs != ours).then_some(theirs)
}

/// Takes the lock that a running Go master has; a copy of a folder may come without one.
fn hold(old: &Path) -> Result<Option<File>> {
    if !old.join("CURRENT").is_file() {
        let text = "there is no LevelDB here: give the folder that was the Go master's -db";
        return Err(wrong(old, text));
    }
    let lock = match File::open(old.join("LOCK")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        lock => lock.map_err(|e| wrong(&old.join("LOCK"), e))?,
    };
    flock(&lock, FlockOperation::NonBlockingLockShared)
        .map_err(|_| wrong(old, "a Go master is using it: stop that one first"))?;
    Ok(Some(lock))
}

/// Neither may the new index lie in the old one, nor the old one where the new one will.
fn keep_apart(db: &Path, old: &Path) -> Result<()> {
    let io = |e: io::Error| wrong(old, e);
    let source = old.canonicalize().map_err(io)?;
    let around = std::path::absolute(db).map_err(io)?;
    let around = around.ancestors().find_map(|path| path.canonicalize().ok());
    let within = ["index", "index.new"].map(|name| db.join(name).canonicalize());
    if around.is_some_and(|path| path.starts_with(&source))
        || within.iter().flatten().any(|path| source.starts_with(path))
    {
        return Err(wrong(old, "it stays as it is: give a -db outside of it"));
    }
    Ok(())
}

/// An import is a store's beginning: an index that holds anything is not added to.
fn refuse_used(folder: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    let text = format!("the index {} is not empty: give another -db", folder.display());
    if Index::open(folder, false, false)?.is_empty()? { Ok(()) } else { Err(Error::Failed(text)) }
}

fn remove(folder: &Path) -> io::Result<()> {
    if folder.exists() { fs::remove_dir_all(folder) } else { Ok(()) }
}

/// Makes an index of what the LevelDB holds.
fn fill(folder: &Path, old: &Path) -> Result<Counts> {
    let index = Index::create(folder)?;
    let mut counts = Counts::default();
    read(old, |rows| {
        let mut batch = index.batch();
        for (key, (_, text)) in rows {
            let Some(text) = text else { continue };
            batch = match Record::decode(&text) {
                Some(record) if record.state == State::HalfWritten => {
                    counts.half_written += 1;
                    let blobs = Debris { replicas: record.replicas, ..Debris::default() };
                    batch.set_debris(&key, 0, &blobs)
                }
                Some(record) => {
                    *if record.live() { &mut counts.live } else { &mut counts.unlinked } += 1;
                    if let Some(there) = elsewhere(&key) {
                        counts.elsewhere += 1;
                        let key = key.escape_ascii();
                        eprintln!("store again: key \"{key}\", its blob is http://{}{there}", record.replicas[0]);
                    }
                    batch.put(&key, &record)
                }
                None => {
                    counts.undecodable += 1;
                    if counts.undecodable <= LISTED {
                        let (key, text) = (key.escape_ascii(), text.escape_ascii());
                        eprintln!("does not decode: key \"{key}\", record \"{text}\"");
                    }
                    batch
                }
            };
        }
        batch.commit()
    })?;
    if counts.undecodable > LISTED {
        eprintln!("does not decode: {} more", counts.undecodable - LISTED);
    }
    index.sync()?;
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use leveldb::log_records;

    fn fixture(name: &str) -> PathBuf {
        Path::new("tests/goleveldb").join(name)
    }

    /// A folder of this test's own, empty.
    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("mkv-import-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn import(old: &Path, new: &Path) -> Result<()> {
        run(&Config { db: new.into(), leveldb: old.into() })
    }

    /// What goleveldb read in a fixture.
    fn expected(name: &str) -> Vec<(Vec<u8>, String)> {
        let text = fs::read_to_string(fixture(name).with_extension("txt")).unwrap();
        text.lines()
            .map(|line| line.split_once('\t').unwrap())
            .map(|(key, text)| (percent_encoding::percent_decode_str(key).collect(), text.into()))
            .collect()
    }

    fn read_all(folder: &Path) -> Result<Vec<(Vec<u8>, String)>> {
        let mut all = Vec::new();
        read(folder, |rows| {
            let text = |value: Option<Vec<u8>>| Some(String::from_utf8(value?).unwrap());
            all.extend(rows.into_iter().filter_map(|(key, (_, value))| Some((key, text(value)?))));
            Ok(())
        })?;
        Ok(all)
    }

    #[test]
    fn all_that_goleveldb_reads_is_read_in_its_order() {
        for name in ["killed", "odd", "empty"] {
            assert_eq!(read_all(&fixture(name)).unwrap(), expected(name), "{name}");
        }
    }

    #[test]
    fn records_arrive_unchanged_and_half_written_ones_as_debris() {
        let new = folder("records");
        import(&fixture("killed"), &new).unwrap();
        let index = Index::open(&new.join("index"), false, false).unwrap();
        let (mut records, mut debris) = (Vec::new(), Vec::new());
        index
            .view()
            .records(b"", b"", |key, text| {
                records.push((key.to_vec(), String::from_utf8(text.to_vec()).unwrap()));
                Ok(true)
            })
            .unwrap();
        index
            .view()
            .debris(b"", |key, version, entry| {
                debris.push((key.to_vec(), version, entry));
                Ok(())
            })
            .unwrap();
        let (half, whole): (Vec<_>, Vec<_>) =
            expected("killed").into_iter().partition(|(_, text)| text.starts_with("INIT"));
        assert_eq!(records, whole);
        let blobs = |text: String| Record::decode(text.as_bytes()).unwrap().replicas;
        let half: Vec<_> = half
            .into_iter()
            .map(|(key, text)| (key, 0, Debris { replicas: blobs(text), ..Debris::default() }))
            .collect();
        assert!(!half.is_empty());
        assert_eq!(debris, half);
        drop(index);
        fs::remove_dir_all(new).unwrap();
    }

    #[test]
    fn a_log_that_is_cut_anywhere_gives_its_first_records() {
        let data = fs::read(fixture("killed/000045.log")).unwrap();
        let whole = log_records(&data).unwrap();
        for cut in (0..data.len()).step_by(61).chain(data.len() - 200..data.len()) {
            let records = log_records(&data[..cut]).unwrap();
            assert!(records.len() < whole.len() && whole.starts_with(&records), "{cut}");
        }
        assert_eq!(log_records(&[&data[..], &[0; 99]].concat()), Some(whole));
    }

    /// What is cut off a log's end may go: nothing tells it from what was never written.
    #[test]
    fn damage_is_an_error_that_names_the_file_or_changes_nothing() {
        let seed = std::env::var("MKV_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
        println!("MKV_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let copy = folder("damage");
        let names: Vec<_> = fs::read_dir(fixture("killed"))
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        for name in &names {
            fs::copy(fixture("killed").join(name), copy.join(name)).unwrap();
        }
        let whole = expected("killed");
        let is_log = |name: &str| name.ends_with(".log") || name.starts_with("MANIFEST");
        for name in names.iter().filter(|name| name.contains("0000") || *name == "CURRENT") {
            let data = fs::read(copy.join(name)).unwrap();
            for _ in 0..40 {
                let mut bad = data.clone();
                let at = random.usize(..bad.len());
                match random.u8(..3) {
                    0 => bad[at] ^= 1 << random.u8(..8),
                    1 => bad[at..].iter_mut().take(random.usize(1..600)).for_each(|b| *b = 0),
                    _ => bad.truncate(at),
                }
                fs::write(copy.join(name), &bad).unwrap();
                match read_all(&copy) {
                    Ok(_) if is_log(name) && log_records(&bad).is_some() => {}
                    Ok(rows) => assert!(rows == whole, "{name} {at}"),
                    Err(error) => assert!(error.to_string().contains("-leveldb: /"), "{error}"),
                }
            }
            fs::write(copy.join(name), &data).unwrap();
        }
        assert_eq!(read_all(&copy).unwrap(), whole);
        fs::remove_dir_all(copy).unwrap();
    }
}
