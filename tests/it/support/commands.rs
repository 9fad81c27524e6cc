//! Runs mkv's commands, and compares disks and indexes before and after.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rocksdb::{DB, IteratorMode, Options};
use rustix::process::Signal;

use crate::support::cluster::{Cluster, assert_same_bytes, child_command, signal, wait};
use crate::support::http_client::{self, Conn, target, wait_until};
use crate::support::reference;

/// The result of a command.
#[derive(Debug)]
pub struct CommandOutput {
    /// `None` if the command was killed.
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl CommandOutput {
    #[track_caller]
    pub fn expect(self, code: i32) -> CommandOutput {
        assert_eq!(self.code, Some(code), "stdout:\n{}stderr:\n{}", self.out, self.err);
        self
    }

    /// Checks that a line of the output contains this text.
    #[track_caller]
    pub fn prints(self, text: &str) -> CommandOutput {
        assert!(self.lines().any(|line| line.contains(text)), "{text:?} is missing: {self:#?}");
        self
    }

    #[track_caller]
    pub fn does_not_print(self, text: &str) -> CommandOutput {
        assert!(!self.lines().any(|line| line.contains(text)), "{text:?} is printed: {self:#?}");
        self
    }

    /// Checks for exit status 1 and a single error line that contains all these words.
    #[track_caller]
    pub fn fails(self, words: &[&str]) -> CommandOutput {
        let result = self.expect(1);
        let errors: Vec<&str> = result.err.lines().filter(|line| line.starts_with("mkv: ")).collect();
        assert_eq!(errors.len(), 1, "not exactly one error: {result:#?}");
        for word in words {
            assert!(errors[0].contains(word), "{word:?} is missing: {result:#?}");
        }
        result
    }

    /// Checks that the command succeeded, or failed only because of debris: for some seconds after
    /// a crash, a 404 does not prove that a blob is gone, and the debris stays.
    #[track_caller]
    pub fn expect_success_except_debris(self) {
        if self.code != Some(0) {
            let result = self.expect(1).prints("debris").does_not_print(" 1 failed");
            result.does_not_print("replicas").does_not_print("versions").does_not_print("does not know");
        }
    }

    fn lines(&self) -> impl Iterator<Item = &str> {
        self.out.lines().chain(self.err.lines())
    }

    /// The number in front of this text in the output.
    #[track_caller]
    pub fn number_before(&self, before: &str) -> u64 {
        let end = self.out.find(before).unwrap_or_else(|| panic!("no {before:?}: {self:#?}"));
        let digits = self.out[..end].rsplit(|c: char| !c.is_ascii_digit()).next();
        let number = digits.and_then(|digits| digits.parse().ok());
        number.unwrap_or_else(|| panic!("no number before {before:?}: {self:#?}"))
    }
}

/// Every blob on the disks, with a description of its length, md5 and mtime.
pub type DiskContents = BTreeMap<PathBuf, String>;

/// A command that is running.
pub struct RunningCommand {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl RunningCommand {
    fn start(c: &Cluster, command: &mut Command) -> RunningCommand {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = c.folder.join(format!("command-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        let (out, err) = (name.with_extension("out"), name.with_extension("err"));
        let file = |path| fs::File::create(path).expect("an output file can be created");
        let child = command.stdin(Stdio::null()).stdout(file(&out)).stderr(file(&err)).spawn();
        RunningCommand { child: child.expect("the command starts"), out, err }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the process can be waited for").is_none()
    }

    #[track_caller]
    pub fn wait_until_prints(&mut self, text: &str) {
        wait_until(&format!("{:?} contains {text:?}", self.out), || {
            fs::read_to_string(&self.out).is_ok_and(|out| out.contains(text))
        });
    }

    #[track_caller]
    pub fn wait(mut self) -> CommandOutput {
        wait(&mut self.child, "the command");
        self.result()
    }

    /// Kills the command with SIGKILL.
    #[track_caller]
    pub fn kill(mut self) -> CommandOutput {
        signal(self.pid(), Signal::KILL);
        wait(&mut self.child, "the killed command");
        self.result()
    }

    fn result(&mut self) -> CommandOutput {
        let read =
            |path: &Path| String::from_utf8_lossy(&fs::read(path).expect("the output file can be read")).into_owned();
        let code = self.child.wait().expect("the exit status is available").code();
        CommandOutput { code, out: read(&self.out), err: read(&self.err) }
    }
}

impl Drop for RunningCommand {
    fn drop(&mut self) {
        if self.is_running() {
            signal(self.pid(), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

impl Cluster {
    pub fn db(&self) -> PathBuf {
        self.folder.join("db")
    }

    /// `mkv` with the store's flags. Flags in `args` override them.
    pub fn mkv_command(&self, args: &[&str]) -> Command {
        let mut command = child_command("KILL");
        let secret = self.secret();
        command
            .arg(env!("CARGO_BIN_EXE_mkv"))
            .arg("-db")
            .arg(self.db())
            .args(["-volumes", &self.names.join(",")])
            .args(["-replicas", &self.setup.replica_count().to_string()])
            .args(["-subvolumes", &self.setup.subvolume_count().to_string()])
            .args(secret.iter().flat_map(|file| [Path::new("-secret"), file]))
            .args(args);
        command
    }

    pub fn start_command(&self, args: &[&str]) -> RunningCommand {
        RunningCommand::start(self, &mut self.mkv_command(args))
    }

    #[track_caller]
    pub fn mkv(&self, args: &[&str]) -> CommandOutput {
        self.start_command(args).wait()
    }

    pub fn dump(&self) -> String {
        self.mkv(&["dump"]).expect(0).out
    }

    /// Checks with `verify -deep` that the store is whole.
    #[track_caller]
    pub fn assert_verified(&self) {
        self.mkv(&["verify", "-deep"]).expect(0).prints("the store is whole");
    }

    /// Puts these keys, each with its `value_of`.
    #[track_caller]
    pub fn fill(&self, keys: &[Vec<u8>]) {
        self.for_each_key(keys, |conn, key| {
            conn.ask("PUT", &target(key), &[], Some(&value_of(key))).expect(201);
        });
    }

    /// Checks that each key redirects to a file that holds its `value_of`.
    #[track_caller]
    pub fn assert_reads_back(&self, keys: &[Vec<u8>]) {
        self.for_each_key(keys, |conn, key| {
            let answer = conn.ask("GET", &target(key), &[], None).expect(302);
            let url = answer.header("Location").and_then(|url| url.strip_prefix("http://"));
            let url = url.expect("a redirect has a Location");
            let (name, path) = url.split_once('/').expect("the URL has a path");
            let bytes = fs::read(self.file(name, path)).unwrap_or_else(|e| panic!("{url}: {e}"));
            assert_same_bytes(&bytes, &value_of(key), url);
        });
    }

    fn for_each_key(&self, keys: &[Vec<u8>], f: impl Fn(&mut Conn, &[u8]) + Sync) {
        let (address, f) = (self.address(), &f);
        thread::scope(|scope| {
            for part in keys.chunks(keys.len().div_ceil(4).max(1)) {
                let address = &address;
                scope.spawn(move || {
                    let mut conn = Conn::open(address);
                    part.iter().for_each(|key| f(&mut conn, key));
                });
            }
        });
    }

    /// The contents of all disks.
    pub fn disk_contents(&self) -> DiskContents {
        let files = self.volumes.iter().flat_map(|volume| volume.files().into_values());
        files
            .map(|file| {
                let (bytes, seconds) = (fs::read(&file).expect("a blob can be read"), mtime(&file));
                let text = format!("{} bytes {} of {seconds}", bytes.len(), reference::md5(&bytes));
                (file, text)
            })
            .collect()
    }

    /// Checks that nothing on the disks has changed.
    #[track_caller]
    pub fn assert_disks(&self, before: &DiskContents) {
        let after = self.disk_contents();
        let differ: Vec<_> = before
            .iter()
            .filter(|(file, text)| after.get(*file) != Some(text))
            .chain(after.iter().filter(|(file, _)| !before.contains_key(*file)))
            .map(|(file, _)| (file, before.get(file), after.get(file)))
            .collect();
        assert!(differ.is_empty(), "before and after: {differ:#?}");
    }

    /// The index's files and their bytes.
    pub fn index_files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        files_below(&self.db().join("index"))
    }

    #[track_caller]
    pub fn assert_index_files(&self, before: &BTreeMap<PathBuf, Vec<u8>>) {
        let after = self.index_files();
        assert!(after.keys().eq(before.keys()), "files before: {:?}, now: {:?}", before.keys(), after.keys());
        let differ: Vec<_> = before.keys().filter(|file| after[*file] != before[*file]).collect();
        assert!(differ.is_empty(), "changed files: {differ:?}");
    }

    /// The debris of a stopped master: key, version and the text of each entry.
    pub fn debris(&self) -> Vec<(String, u64, String)> {
        let families = ["default", "debris"];
        let index = self.db().join("index");
        let index = DB::open_cf_for_read_only(&Options::default(), index, families, false).expect("the index opens");
        let family = index.cf_handle("debris").expect("the column family exists");
        let rows = index.iterator_cf(family, IteratorMode::Start);
        rows.map(|row| {
            let (name, entry) = row.expect("an entry can be read");
            let (key, version) = name.split_last_chunk::<8>().expect("a debris name ends with a version");
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            (text(key), u64::from_be_bytes(*version), text(&entry))
        })
        .collect()
    }

    /// Stores a blob directly on a volume, with this mtime. The master does not learn of it.
    #[track_caller]
    pub fn store_blob(&self, replica: &str, path: &str, value: impl AsRef<[u8]>, time: u64) {
        let (host, below) = replica.split_at(replica.find('/').unwrap_or(replica.len()));
        let date = httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(time));
        let encoded = target(format!("{below}{path}"));
        let headers = [("Date", date.as_str())];
        let put = http_client::ask(host, "PUT", &encoded, &headers, Some(value.as_ref()));
        // nginx answers 204 when it overwrites a file.
        assert!(matches!(put.status, 201 | 204), "{put:?}");
    }

    /// The folder of a replica's disk.
    pub fn disk_folder(&self, replica: &str) -> PathBuf {
        let below = replica.split_once('/').map_or("", |(_, subvolume)| subvolume);
        self.volumes[self.volume_index(replica)].folder.join(below)
    }

    /// Makes a disk look unmounted, until `simulate_mount`.
    pub fn simulate_unmount(&self, disk: &Path) {
        fs::create_dir(disk.join(".away")).expect("the folder can be created");
        for name in visible_names(disk) {
            fs::rename(disk.join(&name), disk.join(".away").join(&name)).expect("the entry can be moved");
        }
    }

    pub fn simulate_mount(&self, disk: &Path) {
        for name in visible_names(&disk.join(".away")) {
            let _ = fs::remove_dir_all(disk.join(&name));
            fs::rename(disk.join(".away").join(&name), disk.join(&name)).expect("the entry can be moved");
        }
        fs::remove_dir(disk.join(".away")).expect("the folder is empty");
    }

    /// Removes everything from a disk, as if an empty one had replaced it.
    pub fn erase_disk(&self, disk: &Path) {
        for name in visible_names(disk) {
            fs::remove_dir_all(disk.join(name)).expect("the folder can be removed");
        }
    }
}

/// The names in a folder that do not begin with a dot.
fn visible_names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("the folder can be read").flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| !name.starts_with('.')).collect()
}

/// Every file below a folder, with its bytes.
pub fn files_below(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("the folder can be read").flatten() {
        match entry.file_type().expect("the file type is known").is_dir() {
            true => files.extend(files_below(&entry.path())),
            false => _ = files.insert(entry.path(), fs::read(entry.path()).expect("the file can be read")),
        }
    }
    files
}

/// Copies a folder with `cp -a`.
pub fn copy_folder(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(copied.expect("cp starts").success(), "cp failed for {}", from.display());
}

/// A file's mtime, in seconds since 1970.
pub fn mtime(file: &Path) -> i64 {
    fs::metadata(file).expect("the file exists").mtime()
}

/// Flips one bit of a file, as a failing disk does: length and mtime stay the same.
pub fn flip_a_bit(file: &Path) {
    let time = fs::metadata(file).and_then(|data| data.modified()).expect("the file has an mtime");
    let mut bytes = fs::read(file).expect("a blob can be read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(file, bytes).expect("a blob can be written");
    fs::File::options().write(true).open(file).unwrap().set_modified(time).unwrap();
}

/// A test value for a key. Its length varies from key to key, and no two keys share a value.
pub fn value_of(key: &[u8]) -> Vec<u8> {
    let seed = reference::md5(key);
    let length = 1 + usize::from_str_radix(&seed[..3], 16).expect("hex digits") / 2;
    [key, seed.repeat(length / 32 + 1).as_bytes()].concat()[..key.len() + length].to_vec()
}

/// `count` numbered keys below `prefix`.
pub fn numbered_keys(prefix: &str, count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|n| format!("{prefix}{n:04}").into_bytes()).collect()
}

/// The current time, in seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970").as_secs()
}

/// The key's record in a dump.
pub fn record<'a>(dump: &'a str, key: &str) -> Option<&'a str> {
    let key = target(key);
    dump.lines().find_map(|line| line.strip_prefix(&key)?.strip_prefix('\t'))
}

/// The key's replicas in a dump.
#[track_caller]
pub fn replicas(dump: &str, key: &str) -> Vec<String> {
    let record = record(dump, key).unwrap_or_else(|| panic!("{key} is missing:\n{dump}"));
    let start = record.find("127.").expect("test volumes have a loopback address");
    record[start..].split(',').map(String::from).collect()
}

/// Runs a command and returns its peak memory in MiB.
pub fn peak_memory(c: &Cluster, args: &[&str]) -> (u64, CommandOutput) {
    let mut command = c.start_command(args);
    let (status, mut peak_mib) = (format!("/proc/{}/status", command.pid()), 0);
    while command.is_running() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        peak_mib = peak_mib.max(kib.unwrap_or(0) >> 10);
        thread::sleep(Duration::from_millis(2));
    }
    (peak_mib, command.wait())
}
