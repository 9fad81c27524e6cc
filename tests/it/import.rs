//! `mkv import`: an index that goleveldb wrote, as a Go master leaves it.
//!
//! The fixtures are in `tests/goleveldb`, each with a text of the records that goleveldb reads in
//! it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::fs::{FlockOperation, flock};

/// A test's folder: `old` is a copy of a fixture, `new` does not exist yet.
struct TestFolder(PathBuf);

impl TestFolder {
    fn new(fixture: &str) -> TestFolder {
        let name = format!("mkv-it-import-{}-{:x}", std::process::id(), fastrand::u32(..));
        let folder = TestFolder(std::env::temp_dir().join(name));
        fs::create_dir_all(folder.old()).unwrap();
        for file in fs::read_dir(fixtures().join(fixture)).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), folder.old().join(file.file_name())).unwrap();
        }
        folder
    }

    fn old(&self) -> PathBuf {
        self.0.join("old")
    }

    fn new_db(&self) -> PathBuf {
        self.0.join("new")
    }

    fn import(&self) -> Output {
        import(&self.old(), &self.new_db())
    }

    fn dump(&self) -> Output {
        mkv(&["-db", self.new_db().to_str().unwrap(), "dump"])
    }

    /// Checks that the import fails with one error line that contains `what` and -leveldb, and
    /// leaves no index.
    fn assert_fails(&self, what: &str) {
        let output = self.import();
        let text = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.starts_with("mkv: ") && text.contains("-leveldb"), "{text}");
        assert!(text.contains(what), "{text}");
        assert!(!self.new_db().join("index").exists() && !self.new_db().join("index.new").exists());
        assert_ne!(self.dump().status.code(), Some(0));
    }
}

impl Drop for TestFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn fixtures() -> PathBuf {
    PathBuf::from("tests/goleveldb")
}

fn mkv(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mkv")).args(words).output().unwrap()
}

fn import(old: &Path, new: &Path) -> Output {
    mkv(&["-db", new.to_str().unwrap(), "import", "-leveldb", old.to_str().unwrap()])
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The lines that `dump` should print: those of the records that decode.
fn expected(fixture: &str, keep: impl Fn(&str) -> bool) -> String {
    let all = fs::read_to_string(fixtures().join(fixture).with_extension("txt")).unwrap();
    all.split_inclusive('\n').filter(|line| keep(line.split_once('\t').unwrap().1)).collect()
}

/// A file's inode, mtime, ctime and content.
type Entry = (u64, i64, i64, i64, i64, Vec<u8>);

/// Everything about a folder that an import could change.
fn fingerprint(folder: &Path) -> BTreeMap<PathBuf, Entry> {
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    files
        .chain([folder.to_path_buf()])
        .map(|path| {
            let meta = fs::metadata(&path).unwrap();
            let content = if meta.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            let times = (meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec());
            (path, (meta.ino(), times.0, times.1, times.2, times.3, content))
        })
        .collect()
}

#[test]
fn import_reads_the_index_of_a_killed_go_master_without_changing_it() {
    let folder = TestFolder::new("killed");
    let before = fingerprint(&folder.old());
    let output = folder.import();
    assert_eq!(text(&output.stderr), "");
    assert_eq!(
        text(&output.stdout),
        "imported 372 live and 149 unlinked keys, 148 half-written, 0 that do not decode\n"
    );
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(fingerprint(&folder.old()), before);
    let dump = text(&folder.dump().stdout);
    assert_eq!(dump, expected("killed", |record| !record.starts_with("INIT")));
}

#[test]
fn import_reads_a_read_only_index() {
    let folder = TestFolder::new("killed");
    for file in fs::read_dir(folder.old()).unwrap() {
        let path = file.unwrap().path();
        let mut permissions = fs::metadata(&path).unwrap().permissions();
        permissions.set_readonly(true);
        fs::set_permissions(&path, permissions).unwrap();
    }
    let before = fingerprint(&folder.old());
    assert_eq!(folder.import().status.code(), Some(0));
    assert_eq!(fingerprint(&folder.old()), before);
}

#[test]
fn import_lists_records_that_do_not_decode_and_imports_the_others() {
    let folder = TestFolder::new("odd");
    let output = folder.import();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stdout), "imported 1 live and 1 unlinked keys, 0 half-written, 121 that do not decode\n");
    let errors = text(&output.stderr);
    let listed: Vec<_> = errors.lines().collect();
    assert_eq!(listed.len(), 102, "{errors}");
    assert!(listed[..100].iter().all(|line| line.contains("key \"/")), "{errors}");
    let binary = r#"key "/\xe6\x97\xa5\xe6\x9c\xac\xe8\xaa\x9e/\xe3\x82\xad\xe3\x83\xbc/2", record "HASH2""#;
    assert!(errors.contains(binary), "{errors}");
    assert!(listed[100].contains("21 more"), "{errors}");
    let dump = text(&folder.dump().stdout);
    assert_eq!(dump, expected("odd", |record| record.contains("localhost")));
}

#[test]
fn import_fails_while_a_go_master_runs() {
    let folder = TestFolder::new("killed");
    let lock = File::open(folder.old().join("LOCK")).unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    folder.assert_fails("stop that one first");
    drop(lock);
    assert_eq!(folder.import().status.code(), Some(0));
}

#[test]
fn import_fails_when_the_new_index_is_not_empty() {
    let folder = TestFolder::new("killed");
    assert_eq!(folder.import().status.code(), Some(0));
    let dump = folder.dump().stdout;
    let output = folder.import();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("is not empty: give another -db"));
    assert_eq!(folder.dump().stdout, dump);
}

#[test]
fn import_accepts_an_empty_new_index() {
    let folder = TestFolder::new("killed");
    let output = import(&fixtures().join("empty"), &folder.new_db());
    let summary = "imported 0 live and 0 unlinked keys, 0 half-written, 0 that do not decode\n";
    assert_eq!(text(&output.stdout), summary);
    assert_eq!(folder.import().status.code(), Some(0));
    assert!(!folder.dump().stdout.is_empty());
}

#[test]
fn import_of_a_damaged_index_leaves_no_new_index() {
    for (name, change) in [
        ("000038.ldb", (|data| data.truncate(3000)) as fn(&mut Vec<u8>)),
        ("000038.ldb", |data| data.clear()),
        ("000037.ldb", |data| data[500] ^= 1),
        ("000044.ldb", |data| *data.last_mut().unwrap() ^= 1),
        ("000045.log", |data| data[500] ^= 1),
        ("MANIFEST-000043", |data| data[100] ^= 1),
        ("CURRENT", |data| data.clear()),
    ] {
        let folder = TestFolder::new("killed");
        let path = folder.old().join(name);
        let mut data = fs::read(&path).unwrap();
        change(&mut data);
        fs::write(&path, data).unwrap();
        folder.assert_fails(&format!("{name}: it is damaged"));
    }
}

#[test]
fn import_of_a_partial_copy_leaves_no_new_index() {
    let folder = TestFolder::new("killed");
    fs::remove_file(folder.old().join("000038.ldb")).unwrap();
    folder.assert_fails("000038.ldb");
    let folder = TestFolder::new("killed");
    fs::remove_file(folder.old().join("000045.log")).unwrap();
    fs::remove_file(folder.old().join("000047.log")).unwrap();
    folder.assert_fails("its log is missing");
}

#[test]
fn import_of_a_folder_that_is_not_leveldb_creates_nothing() {
    let folder = TestFolder::new("empty");
    fs::remove_file(folder.old().join("CURRENT")).unwrap();
    folder.assert_fails("there is no LevelDB here");
    fs::remove_dir_all(folder.old()).unwrap();
    folder.assert_fails("there is no LevelDB here");
    fs::write(folder.old(), "a file").unwrap();
    folder.assert_fails("there is no LevelDB here");
    assert!(!folder.new_db().exists());
}

#[test]
fn import_fails_when_the_two_indexes_overlap() {
    let folder = TestFolder::new("killed");
    let before = fingerprint(&folder.old());
    for new in [folder.old(), folder.old().join("new"), folder.old().join("a/../new")] {
        let output = import(&folder.old(), &new);
        assert_eq!(output.status.code(), Some(1), "{}", new.display());
        assert!(text(&output.stderr).contains("-leveldb"));
        assert_eq!(fingerprint(&folder.old()), before);
    }
    for name in ["index", "index.new"] {
        let old = folder.new_db().join(name);
        fs::create_dir_all(folder.new_db()).unwrap();
        fs::rename(folder.old(), &old).unwrap();
        let before = fingerprint(&old);
        assert_eq!(import(&old, &folder.new_db()).status.code(), Some(1), "{name}");
        assert_eq!(fingerprint(&old), before);
        fs::rename(&old, folder.old()).unwrap();
    }
}

#[test]
fn an_interrupted_import_starts_over() {
    let folder = TestFolder::new("killed");
    assert_eq!(import(&fixtures().join("odd"), &folder.new_db()).status.code(), Some(1));
    fs::rename(folder.new_db().join("index"), folder.new_db().join("index.new")).unwrap();
    assert_eq!(folder.import().status.code(), Some(0));
    assert!(!folder.new_db().join("index.new").exists());
    let dump = text(&folder.dump().stdout);
    assert_eq!(dump, expected("killed", |record| !record.starts_with("INIT")));
}
