//! `mkv import`: makes an index from that of a Go minikeyvalue, a LevelDB written by goleveldb.
//!
//! The LevelDB is only read. Records are copied unchanged; a half-written one becomes debris.
//!
//! With `-index` it copies another index of mkv: from a folder to a database, and back.

pub mod leveldb;

use std::fs::File;
use std::io;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, Result};
use crate::format::placement::path;
use crate::format::quoted;
use crate::format::record::{Debris, Record, State};
use crate::index::{Entry, Index, Location, Replacement};
use leveldb::{read, wrong};

/// How many of the records that do not decode are listed. The others are only counted.
const LISTED: u64 = 100;

#[derive(Default)]
struct Counts {
    live: u64,
    unlinked: u64,
    half_written: u64,
    undecodable: u64,
    /// Keys whose blob the Go master put where mkv does not look.
    elsewhere: u64,
}

/// Rows of an index that are written together.
const BATCH: usize = 1000;

/// Carries out `mkv -db NEW import -index OLD`. The new index can be used when all of it is there.
pub fn copy(db: &Location, old: &Location) -> Result<()> {
    if old.is_in_use()? {
        return Err(Error::Failed("-index: a master uses it: stop it first".into()));
    }
    let (from, replacement) = (old.open_to_read()?, db.replace()?);
    replacement.check_empty()?;
    let counts = copy_all(&from, &replacement).inspect_err(|_| drop(replacement.discard()))?;
    replacement.publish(true)?;
    println!("imported {} keys and {} entries of debris", counts.0, counts.1);
    Ok(())
}

fn copy_all(from: &Index, replacement: &Replacement) -> Result<(u64, u64)> {
    let (index, mut counts) = (replacement.create()?, (0, 0));
    let view = from.view();
    let mut records = view.all_records().peekable();
    while records.peek().is_some() {
        let mut batch = index.batch();
        for row in records.by_ref().take(BATCH) {
            let (key, record) = row?;
            batch = batch.put(&key, &record);
            counts.0 += 1;
        }
        batch.commit()?;
    }
    for entry in view.entries() {
        let Entry { key, version, debris, .. } = entry?;
        index.batch().set_debris(&key, version, &debris).commit()?;
        counts.1 += 1;
    }
    index.take_uploads(from)?;
    index.sync()?;
    Ok(counts)
}

/// Carries out `mkv -db NEW import -leveldb OLD`. The new index takes its place as the last step, so that an
/// interrupted import leaves none.
pub fn run(db: &Location, old: &Path) -> Result<()> {
    let _held = hold(old)?;
    if let Location::Folder(folder) = db {
        keep_apart(folder, old)?;
    }
    let replacement = db.replace()?;
    replacement.check_empty()?;
    let counts = fill(&replacement, old).inspect_err(|_| drop(replacement.discard()))?;
    replacement.publish(true)?;
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

/// The path of a key's blob in a Go store, if it is not the path that mkv uses: the Go master used plain base64 up to
/// the 255 bytes that a file's name may have, and its nginx merges slashes.
fn elsewhere(key: &[u8]) -> Option<String> {
    let ours = path(key, 0);
    let mut theirs = format!("{}{}", &ours[..7], STANDARD.encode(key));
    while theirs.contains("//") {
        theirs = theirs.replace("//", "/");
    }
    (theirs != ours).then_some(theirs)
}

/// Takes the lock that a running Go master holds. A copy of the folder may lack the lock's file.
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

/// Fails if `-db` lies in the old index, or the old index in a folder of `-db` that the import replaces.
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

/// Fills the new index with the records of the LevelDB.
fn fill(replacement: &Replacement, old: &Path) -> Result<Counts> {
    let index = replacement.create()?;
    let mut counts = Counts::default();
    read(old, |rows| {
        let mut batch = index.batch();
        for (key, (_, text)) in rows {
            let Some(text) = text else { continue };
            let Some(record) = Record::decode(&text) else {
                counts.undecodable += 1;
                if counts.undecodable <= LISTED {
                    eprintln!("does not decode: key {}, record {}", quoted(&key), quoted(&text));
                }
                continue;
            };
            if record.state == State::HalfWritten {
                counts.half_written += 1;
                let blobs = Debris { replicas: record.replicas, ..Debris::default() };
                batch = batch.set_debris(&key, 0, &blobs);
                continue;
            }
            *if record.live() { &mut counts.live } else { &mut counts.unlinked } += 1;
            if let Some(path) = elsewhere(&key) {
                counts.elsewhere += 1;
                eprintln!("store again: key {}, its blob is http://{}{path}", quoted(&key), record.replicas[0]);
            }
            batch = batch.put(&key, &record);
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
    use std::fs;
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
        run(&Location::Folder(new.clone()), &fixture("killed")).unwrap();
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
