//! Backups: the index as one file, and the way back.
//!
//! A backup is a tar. It holds the files of a RocksDB checkpoint below `index/`, then `MD5SUMS`, which names each of
//! them as md5sum(1) does, then the end of the tar. So a download that was cut short, and a file that has rotted, are
//! no backup.
//!
//! A checkpoint consists of hard links and some small copies. It lies in `backup.tmp/` below `-db` and is removed when
//! the backup has been read; what a crash leaves there is removed by the next command that writes.

use std::fmt::{Display, Write as _};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use md5::{Digest, Md5};

use super::Index;
use super::directory::{TEMPORARY, remove};
use super::rocks::Rocks;
use crate::error::{Error, Result};
use crate::format::record::{Hash, hex};
use crate::format::tar::{BLOCK, Member, padding};

/// How many backups may be read at the same time: each keeps old tables on the disk.
const MOST: usize = 4;

const FOLDER: &str = "index/";
const SUMS: &str = "MD5SUMS";

/// The most bytes of `MD5SUMS`.
const SUMS_MAX: u64 = 64 << 20;

/// A file of the checkpoint, and its bytes.
type Listed = (String, u64);

/// A consistent copy of the index. Reading it gives the backup's file.
pub struct Backup<'a> {
    /// When it was made, in seconds since 1970.
    pub time: u64,
    /// Bytes of the whole file.
    pub length: u64,
    checkpoint: Checkpoint<'a>,
    /// Files to be read yet.
    files: std::vec::IntoIter<Listed>,
    file: Option<Reading>,
    /// The text of `MD5SUMS` so far; `None`: it was read.
    sums: Option<String>,
    /// Framing to be read before the file goes on.
    framing: io::Cursor<Vec<u8>>,
}

struct Reading {
    name: String,
    file: File,
    /// Bytes to be read yet.
    left: u64,
    size: u64,
    md5: Md5,
}

/// The folder of a checkpoint, which goes with this value.
struct Checkpoint<'a> {
    index: &'a Rocks,
    folder: PathBuf,
}

impl Drop for Checkpoint<'_> {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.folder) {
            log::warn!("a checkpoint stays until the next start: {error}");
        }
        self.index.backups.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Rocks {
    /// Makes a consistent copy of the index as it is now. Writes go on meanwhile. `own`: it is the master's, which does
    /// not wait for clients that read others.
    pub fn backup(&self, own: bool) -> Result<Backup<'_>> {
        let checkpoint = self.make_checkpoint(own)?;
        let wrong = |e: io::Error| Error::Index(format!("{}: {e}", checkpoint.folder.display()));
        let mut files = Vec::new();
        for file in fs::read_dir(&checkpoint.folder).map_err(wrong)? {
            let file = file.map_err(wrong)?;
            let size = file.metadata().map_err(wrong)?.len();
            files.push((file.file_name().to_string_lossy().into_owned(), size));
        }
        files.sort();
        let sums: u64 = files.iter().map(|(name, _)| sum_line(&[0; 16], name).len() as u64).sum();
        let whole = |size: u64| (BLOCK + padding(size)) as u64 + size;
        let length = files.iter().map(|(_, size)| whole(*size)).sum::<u64>() + whole(sums) + 2 * BLOCK as u64;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (file, sums, framing) = (None, Some(String::new()), io::Cursor::default());
        Ok(Backup { time, length, checkpoint, files: files.into_iter(), file, sums, framing })
    }

    fn make_checkpoint(&self, own: bool) -> Result<Checkpoint<'_>> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let others = self.backups.fetch_add(1, Ordering::Relaxed);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let parent = self.folder().with_file_name(TEMPORARY);
        let checkpoint = Checkpoint { index: self, folder: parent.join(number.to_string()) };
        if others >= MOST && !own {
            return Err(Error::Unavailable(format!("{MOST} backups are being read: try again when one is done")));
        }
        let wrong = |e| Error::Index(format!("{}: {e}", parent.display()));
        fs::create_dir_all(&parent).map_err(wrong)?;
        self.checkpoint(&checkpoint.folder)?;
        Ok(checkpoint)
    }
}

impl Read for Backup<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.framing.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            if let Some(file) = &mut self.file {
                if file.left > 0 {
                    return file.read(buffer);
                }
                self.end_file();
            } else if !self.begin_member()? {
                return Ok(0);
            }
        }
    }
}

impl Backup<'_> {
    /// Begins the next file, or `MD5SUMS` and the end; `false`: all was read.
    fn begin_member(&mut self) -> io::Result<bool> {
        let time = self.time;
        let header = |name: String, size| Member { name, size, time }.encode().to_vec();
        let framing = if let Some((name, size)) = self.files.next() {
            let file = File::open(self.checkpoint.folder.join(&name))?;
            let framing = header(format!("{FOLDER}{name}"), size);
            self.file = Some(Reading { name, file, left: size, size, md5: Md5::new() });
            framing
        } else if let Some(sums) = self.sums.take() {
            let size = sums.len() as u64;
            let end = vec![0; padding(size) + 2 * BLOCK];
            [header(SUMS.into(), size), sums.into_bytes(), end].concat()
        } else {
            return Ok(false);
        };
        self.framing = io::Cursor::new(framing);
        Ok(true)
    }

    fn end_file(&mut self) {
        let (Some(Reading { name, md5, size, .. }), Some(sums)) = (self.file.take(), &mut self.sums) else { return };
        sums.push_str(&sum_line(&md5.finalize().into(), &name));
        self.framing = io::Cursor::new(vec![0; padding(size)]);
    }
}

impl Reading {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = buffer.len().min(self.left.try_into().unwrap_or(usize::MAX));
        let count = self.file.read(&mut buffer[..room])?;
        if count == 0 {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, format!("{} is shorter than it was", self.name)));
        }
        self.md5.update(&buffer[..count]);
        self.left -= count as u64;
        Ok(count)
    }
}

/// A line of `MD5SUMS`.
fn sum_line(hash: &Hash, name: &str) -> String {
    format!("{}  {FOLDER}{name}\n", hex(hash))
}

/// An index that was unpacked from a backup.
pub struct Unpacked {
    pub index: Index,
    /// When the backup was made, in seconds since 1970.
    pub time: u64,
    pub keys: u64,
}

/// Unpacks a backup into a folder, which is made anew, opens it, and reads all of it. On an error the folder may hold a
/// part.
pub fn unpack(backup: &mut dyn Read, folder: &Path) -> Result<Unpacked> {
    remove(folder)?;
    let disk = |e: io::Error| Error::Failed(format!("{}: {e}", folder.display()));
    fs::create_dir_all(folder).map_err(disk)?;
    let (mut sums, mut time) = (String::new(), 0);
    while let Some(next) = unpack_member(backup, folder, &mut sums)? {
        time = next;
    }
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(disk)?;
    // RocksDB writes a little when it opens: a disk without room for that says nothing about the backup.
    let wrong =
        |e: Error| if e.to_string().contains("No space left") { Error::Failed(e.to_string()) } else { broken(e) };
    let index = Rocks::open(folder, false, false).map_err(wrong)?;
    let keys = index.read_all().map_err(wrong)?;
    Ok(Unpacked { index: index.into(), time, keys })
}

/// Unpacks one file and notes its sum, and returns its time; `None`: this was the end, and all is as it has to be.
fn unpack_member(backup: &mut dyn Read, folder: &Path, sums: &mut String) -> Result<Option<u64>> {
    let Member { name, size, time } =
        Member::decode(&read_block(backup)?).ok_or_else(|| broken("a file's header is damaged"))?;
    if name == SUMS {
        let mut text = String::new();
        (&mut *backup).take(size.min(SUMS_MAX)).read_to_string(&mut text).map_err(broken)?;
        skip_padding(backup, size)?;
        let is_end = read_block(backup)? == [0; BLOCK];
        return if text == *sums && is_end {
            Ok(None)
        } else {
            Err(broken("its bytes are not those that it was made of"))
        };
    }
    let file = name.strip_prefix(FOLDER).filter(|file| is_file_name(file));
    let file = file.ok_or_else(|| broken(format!("it has a file {name:?}")))?;
    let hash = write_file(backup, size, &folder.join(file))?;
    skip_padding(backup, size)?;
    let _ = write!(sums, "{}", sum_line(&hash, file));
    Ok(Some(time))
}

/// Whether this may be a file of RocksDB's.
fn is_file_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    name.bytes().all(allowed) && name.starts_with(|first: char| first.is_ascii_alphanumeric())
}

fn write_file(backup: &mut dyn Read, size: u64, path: &Path) -> Result<Hash> {
    let disk = |e: io::Error| Error::Failed(format!("{}: {e}", path.display()));
    let mut file = File::create_new(path).map_err(|e| match e.kind() {
        ErrorKind::AlreadyExists => broken("a file is in it twice"),
        _ => disk(e),
    })?;
    let (mut md5, mut left, mut buffer) = (Md5::new(), size, vec![0; 64 << 10]);
    while left > 0 {
        let room = buffer.len().min(left.try_into().unwrap_or(usize::MAX));
        let count = match backup.read(&mut buffer[..room]) {
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Ok(0) => return Err(broken("it ends early")),
            read => read.map_err(broken)?,
        };
        md5.update(&buffer[..count]);
        file.write_all(&buffer[..count]).map_err(disk)?;
        left -= count as u64;
    }
    file.sync_all().map_err(disk)?;
    Ok(md5.finalize().into())
}

fn read_block(backup: &mut dyn Read) -> Result<[u8; BLOCK]> {
    let mut block = [0; BLOCK];
    match backup.read_exact(&mut block) {
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Err(broken("it ends early")),
        read => read.map(|()| block).map_err(broken),
    }
}

fn skip_padding(backup: &mut dyn Read, size: u64) -> Result<()> {
    let mut block = [0; BLOCK];
    match backup.read_exact(&mut block[..padding(size)]) {
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Err(broken("it ends early")),
        Ok(()) if block != [0; BLOCK] => Err(broken("there are bytes between its files")),
        read => read.map_err(broken),
    }
}

fn broken(why: impl Display) -> Error {
    Error::Index(format!("this is no whole backup: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::record::{Debris, Record};

    /// A folder for a test, with an index of `keys` keys and one entry of debris below it.
    fn store(name: &str, keys: u64) -> (Rocks, PathBuf) {
        let folder = std::env::temp_dir().join(format!("mkv-backup-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let index = Rocks::open(&folder.join("index"), true, false).unwrap();
        let record = Record { replicas: vec!["a:1".into()], ..Record::default() };
        for n in 0..keys {
            index.batch().put(format!("/{n}").as_bytes(), &record).commit().unwrap();
        }
        let debris = Debris { replicas: vec!["b:1".into()], ..Debris::default() };
        index.batch().set_debris(b"/debris", 7, &debris).commit().unwrap();
        (index, folder)
    }

    fn bytes(mut backup: Backup) -> Vec<u8> {
        let mut bytes = Vec::new();
        backup.read_to_end(&mut bytes).unwrap();
        assert_eq!(backup.length, bytes.len() as u64);
        bytes
    }

    #[test]
    fn a_backup_is_the_index_at_the_moment_when_it_was_made() {
        let (index, folder) = store("whole", 1000);
        let backup = index.backup(false).unwrap();
        index.batch().remove(b"/1").set_debris(b"/debris", 7, &Debris::default()).commit().unwrap();
        let time = backup.time;
        let bytes = bytes(backup);
        let copy = unpack(&mut &bytes[..], &folder.join("copy")).unwrap();
        assert_eq!((copy.keys, copy.time), (1000, time));
        assert!(copy.index.get(b"/1").unwrap().is_some() && index.get(b"/1").unwrap().is_none());
        assert_eq!(copy.index.debris(b"/debris").unwrap().len(), 1);
        assert_eq!(fs::read_dir(folder.join(TEMPORARY)).unwrap().count(), 0);
        drop((index, copy));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_backup_that_is_cut_or_damaged_is_none() {
        let (index, folder) = store("cut", 100);
        let whole = bytes(index.backup(false).unwrap());
        let copy = folder.join("copy");
        let is_whole = |bytes: &[u8]| match unpack(&mut &bytes[..], &copy) {
            Ok(_) => true,
            Err(error) => {
                assert!(error.to_string().starts_with("this is no whole backup: "), "{error}");
                false
            }
        };
        // The last block is a second one of zeros.
        for length in (0..=whole.len()).step_by(BLOCK) {
            assert_eq!(is_whole(&whole[..length]), length + BLOCK >= whole.len(), "{length} of {}", whole.len());
        }
        for at in (0..whole.len() - BLOCK).step_by(97) {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            assert!(!is_whole(&bytes), "byte {at}");
        }
        drop(index);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_backup_writes_only_into_its_folder() {
        for name in ["", ".", "..", ".x", "a/b", "../x", "/x", "a\\b", "é", "-x"] {
            assert!(!is_file_name(name), "{name}");
        }
        for name in ["CURRENT", "MANIFEST-000005", "000012.sst", "OPTIONS-000007"] {
            assert!(is_file_name(name), "{name}");
        }
    }

    #[test]
    fn only_a_few_backups_are_read_at_the_same_time() {
        let (index, folder) = store("few", 1);
        let backups: Vec<_> = (0..MOST).map(|_| index.backup(false).unwrap()).collect();
        assert!(matches!(index.backup(false), Err(Error::Unavailable(_))) && index.backup(true).is_ok());
        drop(backups);
        assert!(index.backup(false).is_ok());
        drop(index);
        fs::remove_dir_all(folder).unwrap();
    }
}
