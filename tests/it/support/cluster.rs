//! A store for one test: volumes, a master, and the checks that end every test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use percent_encoding::percent_decode_str;
use rustix::process::{Pid, Signal, kill_process};

use crate::support::faulty_proxy::FaultyProxy;
use crate::support::http_client::{self, Answer, Conn, TIMEOUT, follow, target, wait_until};
use crate::support::postgres::Postgres;
use crate::support::reference;
use crate::support::s3;

/// Reserves a loopback address for one test, so that all its ports are free and stay free while a
/// server is down. Dropping the listener releases the address.
pub fn reserve_address() -> (TcpListener, String) {
    loop {
        let [a, b, c, _] = fastrand::u32(..).to_be_bytes();
        let host = format!("127.{}.{b}.{c}", a.clamp(1, 254));
        if let Ok(reserved) = TcpListener::bind((host.as_str(), 2999)) {
            return (reserved, host);
        }
    }
}

/// The store that a test asks for. Defaults: three volumes, three replicas, ten subvolumes.
#[derive(Clone)]
pub struct Setup {
    volumes: usize,
    replicas: usize,
    subvolumes: u32,
    proxied: bool,
    secret: bool,
    s3: bool,
    postgres: bool,
    lease: &'static str,
    pub flags: Vec<String>,
    launcher: Vec<String>,
}

impl Setup {
    pub fn new() -> Setup {
        let (flags, launcher) = Default::default();
        // The same tests run on the other engine.
        let postgres = std::env::var("MKV_ENGINE").is_ok_and(|engine| engine == "postgres");
        let (proxied, secret, s3, lease) = (false, false, false, "lease=2&late=2");
        Setup { volumes: 3, replicas: 3, subvolumes: 10, proxied, secret, s3, postgres, lease, flags, launcher }
    }

    pub fn volumes(self, volumes: usize) -> Setup {
        Setup { volumes, replicas: self.replicas.min(volumes), ..self }
    }

    pub fn replicas(self, replicas: usize) -> Setup {
        Setup { replicas, ..self }
    }

    pub fn replica_count(&self) -> usize {
        self.replicas
    }

    pub fn subvolume_count(&self) -> u32 {
        self.subvolumes
    }

    pub fn subvolumes(self, subvolumes: u32) -> Setup {
        Setup { subvolumes, ..self }
    }

    /// Puts a proxy in front of each volume. The master knows only the proxies.
    pub fn proxied(self) -> Setup {
        Setup { proxied: true, ..self }
    }

    /// Volumes and master share a secret.
    pub fn secret(self) -> Setup {
        Setup { secret: true, ..self }
    }

    /// The master has an S3 endpoint, with the keys of support::s3.
    pub fn s3(self) -> Setup {
        Setup { s3: true, ..self }
    }

    /// Keeps the index in a PostgreSQL, with these options in its URL.
    pub fn postgres(self, lease: &'static str) -> Setup {
        Setup { postgres: true, lease, ..self }
    }

    pub fn flags(self, flags: &[&str]) -> Setup {
        Setup { flags: flags.iter().map(|flag| flag.to_string()).collect(), ..self }
    }

    /// A command that runs the master, for instance with resource limits.
    pub fn launcher(self, words: &[&str]) -> Setup {
        Setup { launcher: words.iter().map(|word| word.to_string()).collect(), ..self }
    }

    pub fn start(self) -> Cluster {
        Cluster::start(self)
    }
}

/// An nginx volume, run by volume.sh.
pub struct Volume {
    pub folder: PathBuf,
    pub address: String,
    /// The file for SECRET.
    pub secret: Option<PathBuf>,
    script: Option<Child>,
}

impl Volume {
    fn launch(&mut self) {
        assert!(self.script.is_none(), "{} is already running", self.address);
        let (host, port) = self.address.split_once(':').expect("host:port");
        let log = fs::File::options()
            .append(true)
            .create(true)
            .open(self.folder.with_extension("log"))
            .expect("the log can be written");
        let mut command = child_command("TERM");
        command
            // The working directory's volume.sh: clones may share a target folder, so the path of
            // this binary says nothing.
            .arg("./volume.sh")
            .arg(&self.folder)
            .env("BIND", host)
            .env("PORT", port)
            .env_remove("AUTH")
            .env_remove("SECRET")
            .envs(self.secret.iter().map(|file| ("SECRET", file)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        self.script = Some(command.spawn().expect("volume.sh starts"));
    }

    fn wait_until_ready(&mut self) {
        let line = first_line(self.script.as_mut().expect("the script has been started"));
        let log = fs::read_to_string(self.folder.with_extension("log")).unwrap_or_default();
        assert!(line.contains(" serves "), "volume.sh does not serve: {line}{log}");
    }

    pub fn start(&mut self) {
        self.launch();
        self.wait_until_ready();
    }

    /// Stops nginx gracefully.
    pub fn stop(&mut self) {
        if let Some(mut script) = self.script.take() {
            signal(script.id(), Signal::TERM);
            wait(&mut script, "volume.sh");
        }
    }

    /// Kills nginx and its workers with SIGKILL.
    pub fn kill(&mut self) {
        let Some(mut script) = self.script.take() else { return };
        for pid in self.nginx().expect("nginx runs") {
            signal(pid, Signal::KILL);
        }
        wait(&mut script, "volume.sh");
    }

    /// Stops the workers with SIGSTOP: the volume accepts connections but never answers.
    pub fn freeze(&self) {
        for pid in &self.nginx().expect("nginx runs")[1..] {
            signal(*pid, Signal::STOP);
        }
    }

    pub fn thaw(&self) {
        for pid in self.nginx().iter().flatten() {
            signal(*pid, Signal::CONT);
        }
    }

    /// The process ids of nginx and its workers, nginx first, or `None` if it does not run.
    fn nginx(&self) -> Option<Vec<u32>> {
        let text = fs::read_to_string(self.folder.join(".nginx/nginx.pid")).ok()?;
        let nginx: u32 = text.trim().parse().ok()?;
        let parent = format!("PPid:\t{nginx}");
        let mut pids = vec![nginx];
        for entry in fs::read_dir("/proc").expect("/proc is mounted").flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            if status.lines().any(|line| line == parent) {
                pids.push(pid);
            }
        }
        (pids.len() > 1).then_some(pids)
    }

    /// The blobs on the volume's disk, by path. Skips names that begin with a dot.
    pub fn files(&self) -> BTreeMap<String, PathBuf> {
        let mut files = BTreeMap::new();
        walk(&self.folder, "", &mut files);
        files
    }

    /// The number of files in nginx's temporary folder: uploads in progress or left behind.
    pub fn temporary_files(&self) -> usize {
        let mut files = BTreeMap::new();
        walk(&self.folder.join(".nginx/temp"), "", &mut files);
        files.len()
    }
}

fn walk(folder: &Path, below: &str, files: &mut BTreeMap<String, PathBuf>) {
    // A folder may disappear during the walk, as a blob may.
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        let path = format!("{below}/{name}");
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(&entry.path(), &path, files),
            Ok(_) => drop(files.insert(path, entry.path())),
            Err(_) => {}
        }
    }
}

/// Another master of the same store.
pub struct Master {
    child: Child,
    pub address: String,
}

impl Master {
    /// Stops the process with SIGSTOP.
    pub fn freeze(&self) {
        stop_process(self.child.id());
    }

    pub fn thaw(&self) {
        signal(self.child.id(), Signal::CONT);
    }

    #[track_caller]
    pub fn send(&self, method: &str, key: impl AsRef<[u8]>, body: impl AsRef<[u8]>) -> Answer {
        http_client::ask(&self.address, method, &target(key), &[], Some(body.as_ref()))
    }

    #[track_caller]
    pub fn ask(&self, method: &str, target: &str) -> Answer {
        http_client::ask(&self.address, method, target, &[], None)
    }
}

impl Drop for Master {
    fn drop(&mut self) {
        signal(self.child.id(), Signal::KILL);
        let _ = self.child.wait();
    }
}

/// What a redirect says about a key.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyInfo {
    pub replicas: Vec<String>,
    /// The blob's path, the same below each replica.
    pub path: String,
    pub version: u64,
    pub md5: Option<String>,
    pub balanced: bool,
}

pub struct Cluster {
    pub folder: PathBuf,
    pub host: String,
    pub volumes: Vec<Volume>,
    pub proxies: Vec<FaultyProxy>,
    pub setup: Setup,
    /// The database of the index, if it is not in a folder.
    pub postgres: Option<Postgres>,
    /// A synchronous standby of it.
    pub standby: Option<Postgres>,
    /// Masters that share the requests of this test.
    pub others: Vec<Master>,
    /// The addresses of the volumes in the master's -volumes.
    pub names: Vec<String>,
    master: Option<Child>,
    /// The port that the master listens on; 0 before its first start.
    port: u16,
    /// Keys whose debris may outlast the test.
    allowed_debris: BTreeSet<Vec<u8>>,
    mounted: Vec<PathBuf>,
    _reserved: TcpListener,
}

impl Cluster {
    pub fn new() -> Cluster {
        Setup::new().start()
    }

    fn start(setup: Setup) -> Cluster {
        Cluster::start_with(setup, |_| {})
    }

    /// Calls `prepare` once the volumes' folders exist and before nginx starts.
    pub fn start_with(setup: Setup, prepare: impl FnOnce(&mut Cluster)) -> Cluster {
        let (reserved, host) = reserve_address();
        let folder = std::env::temp_dir().join(format!("mkv-test-{}", host.replace('.', "-")));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("the temporary folder can be created");
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).expect("the folder's mode can be set");
        let mut cluster = Cluster {
            volumes: Vec::new(),
            proxies: Vec::new(),
            names: Vec::new(),
            master: None,
            port: 0,
            allowed_debris: BTreeSet::new(),
            mounted: Vec::new(),
            postgres: None,
            standby: None,
            others: Vec::new(),
            _reserved: reserved,
            folder,
            host,
            setup,
        };
        for n in 1..=cluster.setup.volumes {
            let folder = cluster.folder.join(format!("v{n}"));
            fs::create_dir(&folder).expect("a volume's folder can be created");
            let address = format!("{}:{}", cluster.host, 3000 + n);
            cluster.volumes.push(Volume { folder, address, secret: cluster.secret(), script: None });
        }
        if let Some(file) = cluster.secret() {
            let made = Command::new(env!("CARGO_BIN_EXE_mkv")).arg("secret").arg(&file).status();
            assert!(made.expect("mkv starts").success());
        }
        if let Some(file) = cluster.s3_keys() {
            fs::write(&file, s3::keys_file()).expect("the keys can be written");
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("the file's mode can be set");
        }
        if cluster.setup.postgres {
            cluster.postgres = Some(Postgres::start(&cluster.folder, &cluster.host, &[]));
        }
        prepare(&mut cluster);
        cluster.volumes.iter_mut().for_each(Volume::launch);
        for (n, volume) in cluster.volumes.iter_mut().enumerate() {
            volume.wait_until_ready();
            if cluster.setup.proxied {
                let address = format!("{}:{}", cluster.host, 4001 + n);
                cluster.proxies.push(FaultyProxy::start(&address, &volume.address));
                cluster.names.push(address);
            } else {
                cluster.names.push(volume.address.clone());
            }
        }
        cluster.start_master();
        cluster
    }

    /// Mounts a small tmpfs on this folder. Returns `false` if the user may not mount.
    pub fn mount_small_disk(&mut self, folder: &Path, size: &str) -> bool {
        let options = format!("size={size},mode=755");
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &options, "mkv-test"]);
        let mounted = command.arg(folder).output().is_ok_and(|output| output.status.success());
        self.mounted.extend(mounted.then(|| folder.to_path_buf()));
        mounted
    }

    /// Restarts all volumes in parallel.
    pub fn restart_volumes(&mut self, kill: bool) {
        for volume in &mut self.volumes {
            if kill { volume.kill() } else { volume.stop() }
        }
        self.start_volumes();
    }

    /// Starts the volumes that are not running.
    pub fn start_volumes(&mut self) {
        let mut down: Vec<_> = self.volumes.iter_mut().filter(|v| v.script.is_none()).collect();
        down.iter_mut().for_each(|volume| volume.launch());
        down.iter_mut().for_each(|volume| volume.wait_until_ready());
    }

    /// The file with the secret that volumes and master share.
    pub fn secret(&self) -> Option<PathBuf> {
        self.setup.secret.then(|| self.folder.join("secret"))
    }

    /// The file of -s3keys.
    pub fn s3_keys(&self) -> Option<PathBuf> {
        self.setup.s3.then(|| self.folder.join("s3keys"))
    }

    pub fn each_proxy(&self, act: impl Fn(&FaultyProxy)) {
        self.proxies.iter().for_each(act);
    }

    /// The value of -db.
    pub fn db_flag(&self) -> String {
        let standbys: Vec<&Postgres> = self.standby.iter().collect();
        let url = self.postgres.as_ref().map(|postgres| postgres.url(&standbys, self.setup.lease));
        url.unwrap_or_else(|| self.folder.join("db").to_string_lossy().into_owned())
    }

    /// Whether this can be the version of a key's first blob: with a database no blob has the plain name.
    pub fn is_first(&self, version: u64) -> bool {
        version == 0 || self.postgres.is_some()
    }

    // The master.

    /// The command line that starts the master. The first start takes any free port, later ones the
    /// same.
    pub fn master_command(&self) -> Command {
        let mut command = child_command("KILL");
        let secret = self.secret();
        command
            .args(&self.setup.launcher)
            .arg(env!("CARGO_BIN_EXE_mkv"))
            .args(["-db", &self.db_flag()])
            .args(["-volumes", &self.names.join(",")])
            .args(["-replicas", &self.setup.replicas.to_string()])
            .args(["-subvolumes", &self.setup.subvolumes.to_string()])
            .args(["-host", &self.host, "-port", &self.port.to_string(), "-v"])
            .args(secret.iter().flat_map(|file| [Path::new("-secret"), file]));
        if let Some(file) = self.s3_keys() {
            command.args(["-s3", &s3::PORT.to_string()]).arg("-s3keys").arg(file);
        }
        command.args(&self.setup.flags).arg("server").stdin(Stdio::null());
        command
    }

    #[track_caller]
    pub fn start_master(&mut self) {
        self.try_start_master().unwrap_or_else(|error| panic!("{error}\n{}", self.log()));
    }

    /// Starts the master. If it exits instead, checks for exit status 1 and one line of error, and
    /// returns that line.
    #[track_caller]
    pub fn try_start_master(&mut self) -> Result<(), String> {
        assert!(self.master.is_none(), "the master runs already");
        let log = fs::File::options().append(true).create(true).open(self.folder.join("master.log"));
        let before = self.log().len();
        let mut command = self.master_command();
        command.stdout(Stdio::piped()).stderr(log.expect("the log can be written"));
        let mut master = command.spawn().expect("the master starts");
        let line = first_line(&mut master);
        let address = line.strip_prefix("mkv listens on ");
        if let Some(port) = address.and_then(|address| address.trim().rsplit(':').next()) {
            self.port = port.parse().expect("a port is a number");
            self.master = Some(master);
            return Ok(());
        }
        wait(&mut master, "the master that failed to start");
        let status = master.wait().expect("the exit status is available");
        let output = self.log().split_off(before);
        let errors: Vec<&str> = output.lines().filter(|line| line.starts_with("mkv: ")).collect();
        assert!(status.code() == Some(1) && errors.len() == 1, "{line}{status}:\n{output}");
        Err(errors[0].into())
    }

    pub fn master_pid(&self) -> u32 {
        self.master.as_ref().expect("the master runs").id()
    }

    /// A memory figure from /proc, in KiB: VmRSS is the current size, VmHWM the peak.
    pub fn memory_kib(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.master_pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub fn open_descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.master_pid())).unwrap().count()
    }

    /// Kills the master with SIGKILL.
    pub fn kill_master(&mut self) {
        let mut master = self.master.take().expect("the master runs");
        signal(master.id(), Signal::KILL);
        wait(&mut master, "the killed master");
    }

    /// Sends SIGTERM without waiting for the exit.
    pub fn terminate_master(&self) {
        signal(self.master_pid(), Signal::TERM);
    }

    /// Waits until a terminated master has exited.
    pub fn wait_for_master_exit(&mut self) -> ExitStatus {
        wait(self.master.as_mut().expect("the master runs"), "the master after SIGTERM");
        self.master.take().expect("the master runs").wait().expect("the exit status is available")
    }

    pub fn stop_master(&mut self) {
        self.terminate_master();
        let status = self.wait_for_master_exit();
        assert_eq!(status.code(), Some(0), "the master's exit:\n{}", self.log());
    }

    pub fn restart_master(&mut self) {
        self.stop_master();
        self.start_master();
    }

    /// Restarts the master with other flags.
    pub fn restart_with(&mut self, flags: &[&str]) {
        self.setup.flags = flags.iter().map(|flag| flag.to_string()).collect();
        self.restart_master();
    }

    /// Starts another master, with further flags.
    pub fn start_another(&self, flags: &[&str]) -> Master {
        let log = fs::File::options().append(true).create(true).open(self.folder.join("master.log"));
        let mut command = self.master_command();
        command.args(["-port", "0"]).args(flags).stdout(Stdio::piped()).stderr(log.expect("the log can be written"));
        let mut child = command.spawn().expect("the master starts");
        let line = first_line(&mut child);
        let address = line.strip_prefix("mkv listens on ").unwrap_or_else(|| panic!("{line}\n{}", self.log()));
        Master { child, address: address.trim().into() }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("master.log")).unwrap_or_default()
    }

    // Requests.

    /// The address of the master, or of one of several.
    pub fn address(&self) -> String {
        match self.others.get(fastrand::usize(..=self.others.len())) {
            Some(other) => other.address.clone(),
            None => format!("{}:{}", self.host, self.port),
        }
    }

    pub fn conn(&self) -> Conn {
        Conn::open(&self.address())
    }

    #[track_caller]
    pub fn ask(&self, method: &str, key: impl AsRef<[u8]>) -> Answer {
        self.ask_target(method, &target(key))
    }

    #[track_caller]
    pub fn ask_target(&self, method: &str, target: &str) -> Answer {
        http_client::ask(&self.address(), method, target, &[], None)
    }

    /// Sends a request with headers and a body. Adds the Content-Length.
    #[track_caller]
    pub fn send(
        &self,
        method: &str,
        key: impl AsRef<[u8]>,
        headers: &[(&str, &str)],
        body: impl AsRef<[u8]>,
    ) -> Answer {
        http_client::ask(&self.address(), method, &target(key), headers, Some(body.as_ref()))
    }

    #[track_caller]
    pub fn put(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Answer {
        self.send("PUT", key, &[], value)
    }

    #[track_caller]
    pub fn replace(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Answer {
        self.send("REPLACE", key, &[], value)
    }

    #[track_caller]
    pub fn get(&self, key: impl AsRef<[u8]>) -> Answer {
        self.ask("GET", key)
    }

    /// All keys of a list, read page by page.
    #[track_caller]
    pub fn keys(&self, prefix: &str, list: &str) -> Vec<Vec<u8>> {
        let mut keys: Vec<Vec<u8>> = Vec::new();
        let mut start = String::new();
        loop {
            let query = format!("{prefix}?{list}&encoding=url&limit=1000&start={start}");
            let answer = self.ask_target("GET", &query).expect(200);
            let page: serde_json::Value = serde_json::from_slice(&answer.body).expect("JSON");
            for key in page["keys"].as_array().expect("a list of keys") {
                keys.push(percent_decode_str(key.as_str().expect("a key is a string")).collect());
            }
            start = page["next"].as_str().expect("next is a string").to_string();
            if start.is_empty() {
                return keys;
            }
        }
    }

    pub fn live(&self) -> Vec<Vec<u8>> {
        self.keys("/", "list")
    }

    pub fn unlinked(&self) -> Vec<Vec<u8>> {
        self.keys("/", "unlinked")
    }

    /// The keys with debris.
    pub fn keys_with_debris(&self) -> Vec<Vec<u8>> {
        self.keys("/", "writing")
    }

    /// Reads what the master says about a live key, and checks that the headers agree with each
    /// other.
    #[track_caller]
    pub fn key_info(&self, key: impl AsRef<[u8]>) -> KeyInfo {
        let key = key.as_ref();
        let answer = self.get(key).expect(302);
        assert_eq!(answer.header("Content-Length"), Some("0"));
        let header = |name| answer.header(name).unwrap_or_else(|| panic!("{name} is missing"));
        let replicas: Vec<String> = header("Key-Volumes").split(',').map(String::from).collect();
        let balanced = match header("Key-Balance") {
            "balanced" => true,
            "unbalanced" => false,
            other => panic!("Key-Balance: {other}"),
        };
        let location = header("Location").strip_prefix("http://").expect("a URL");
        let location = location.split('?').next().unwrap_or_default();
        let path = replicas
            .iter()
            .find_map(|replica| location.strip_prefix(replica.as_str()))
            .unwrap_or_else(|| panic!("{location} is on none of {replicas:?}"))
            .to_string();
        let version = reference::version_of(&path);
        assert_eq!(path, reference::path(key, version), "the path of {}", key.escape_ascii());
        assert_eq!(balanced, replicas == self.placement(key), "the balance of {replicas:?}");
        let md5 = answer.header("Content-Md5").map(String::from);
        KeyInfo { replicas, path, version, md5, balanced }
    }

    /// The replicas that placement wants for the key.
    pub fn placement(&self, key: impl AsRef<[u8]>) -> Vec<String> {
        reference::place(key.as_ref(), &self.names, self.setup.replicas, self.setup.subvolumes)
    }

    /// The index of the volume that holds this replica.
    pub fn volume_index(&self, replica: &str) -> usize {
        let name = replica.split('/').next();
        let found = self.names.iter().position(|n| Some(n.as_str()) == name);
        found.unwrap_or_else(|| panic!("{replica} is on none of {:?}", self.names))
    }

    /// The index of the volume that should hold the key's nth replica.
    pub fn holder(&self, key: impl AsRef<[u8]>, replica: usize) -> usize {
        self.volume_index(&self.placement(key)[replica])
    }

    /// The file of a blob.
    pub fn file(&self, replica: &str, path: &str) -> PathBuf {
        let below = replica.split_once('/').map_or("", |(_, subvolume)| subvolume);
        let folder = &self.volumes[self.volume_index(replica)].folder;
        folder.join(below).join(path.trim_start_matches('/'))
    }

    /// The files of a live key's replicas.
    #[track_caller]
    pub fn files(&self, key: impl AsRef<[u8]>) -> Vec<PathBuf> {
        let found = self.key_info(key);
        found.replicas.iter().map(|replica| self.file(replica, &found.path)).collect()
    }

    /// Every blob on every volume: `host:port/svXX/…` and its file.
    pub fn blobs(&self) -> BTreeMap<String, PathBuf> {
        self.volumes
            .iter()
            .zip(&self.names)
            .flat_map(|(volume, name)| {
                volume.files().into_iter().map(move |(path, file)| (format!("{name}{path}"), file))
            })
            .collect()
    }

    /// Checks the value as a client reads it, and as every replica's disk holds it.
    #[track_caller]
    pub fn assert_value(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> KeyInfo {
        let (key, value) = (key.as_ref(), value.as_ref());
        let read = follow(&self.get(key).expect(302)).expect(200);
        assert_same_bytes(&read.body, value, "the value that a client reads");
        let found = self.key_info(key);
        for replica in &found.replicas {
            let file = self.file(replica, &found.path);
            let stored = fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            assert_same_bytes(&stored, value, replica);
        }
        if let Some(md5) = &found.md5 {
            assert_eq!(*md5, reference::md5(value), "Content-Md5 of {}", key.escape_ascii());
        }
        found
    }

    /// Checks that the key cannot be read, is not listed, is not locked, and, once the cleaner is
    /// done, has no blob.
    #[track_caller]
    pub fn assert_absent(&self, key: impl AsRef<[u8]>) {
        let key = key.as_ref();
        self.get(key).expect(404);
        assert!(!self.live().contains(&key.to_vec()), "{} is listed", key.escape_ascii());
        self.wait_until_cleaned();
        let paths = self.blobs();
        let plain = reference::path(key, 0);
        let left: Vec<_> = paths.keys().filter(|blob| blob.contains(&plain)).collect();
        assert!(left.is_empty(), "blobs of {}: {left:?}", key.escape_ascii());
        self.ask("RELINK", key).expect(404);
    }

    /// Waits until the cleaner has cleared all debris, except that of `allow_debris`.
    #[track_caller]
    pub fn wait_until_cleaned(&self) {
        let mut left = Vec::new();
        let started = Instant::now();
        loop {
            left.clear();
            left.extend(self.keys_with_debris().into_iter().filter(|key| !self.allowed_debris.contains(key)));
            if left.is_empty() {
                return;
            }
            assert!(
                started.elapsed() < TIMEOUT,
                "after {TIMEOUT:?}, debris is left for {:?}\n{}",
                left.iter().map(|key| key.escape_ascii().to_string()).collect::<Vec<_>>(),
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets this key's debris outlast the test, because a 404 does not yet prove that its blob is
    /// gone.
    pub fn allow_debris(&mut self, key: impl AsRef<[u8]>) {
        self.allowed_debris.insert(key.as_ref().to_vec());
    }

    /// Checks that every blob of the index is on its volumes with the right bytes, and that the
    /// volumes hold no other blob. Waits for the cleaner first.
    #[track_caller]
    pub fn assert_whole(&mut self) {
        self.proxies.iter().for_each(FaultyProxy::remove_faults);
        self.start_volumes();
        if self.master.is_none() {
            self.start_master();
        }
        self.wait_until_cleaned();
        let mut expected = BTreeMap::new();
        let mut expect = |key: &[u8]| {
            let found = self.key_info(key);
            for replica in &found.replicas {
                expected.insert(format!("{replica}{}", found.path), found.md5.clone());
            }
        };
        let unlinked = self.unlinked();
        // A list of everything leaves out the master's own keys.
        for key in self.live().into_iter().chain(self.keys("/.mkv/", "list")) {
            assert!(!unlinked.contains(&key), "{} is listed as live and as unlinked", key.escape_ascii());
            expect(&key);
        }
        for key in unlinked {
            // The master describes only live keys.
            self.ask("RELINK", &key).expect(204);
            expect(&key);
            self.ask("UNLINK", &key).expect(204);
        }
        let stored = self.blobs();
        let missing: Vec<_> = expected.keys().filter(|blob| !stored.contains_key(*blob)).collect();
        let surplus: Vec<_> = stored.keys().filter(|blob| !expected.contains_key(*blob)).collect();
        assert!(missing.is_empty(), "blobs of the index are missing: {missing:?}");
        assert!(surplus.is_empty(), "blobs are not in the index: {surplus:?}");
        for (blob, file) in stored {
            let bytes = fs::read(&file).expect("a blob can be read");
            match &expected[&blob] {
                Some(md5) => assert_eq!(reference::md5(&bytes), *md5, "the md5 of {blob}"),
                None => assert!(!bytes.is_empty(), "{blob} is empty"),
            }
        }
        wait_until("no upload is left in a temporary folder", || {
            self.volumes.iter().all(|volume| volume.temporary_files() == 0)
        });
        let log = self.log();
        let panics: Vec<_> = log.lines().filter(|line| line.contains("panicked at")).collect();
        assert!(panics.is_empty(), "{panics:?}:\n{log}");
    }

    /// Stops all processes and removes all files.
    fn tear_down(&mut self) {
        self.proxies.clear();
        for volume in &self.volumes {
            if let Some(script) = &volume.script {
                volume.thaw();
                signal(script.id(), Signal::TERM);
            }
        }
        if let Some(mut master) = self.master.take() {
            signal(master.id(), Signal::KILL);
            wait(&mut master, "the killed master");
        }
        self.volumes.iter_mut().for_each(Volume::stop);
        self.others.clear();
        (self.standby, self.postgres) = (None, None);
        for folder in &self.mounted {
            let _ = Command::new("umount").arg(folder).output();
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Drop for Cluster {
    /// Checks the store unless the test has failed.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            eprintln!("the master's log:");
            tail.iter().rev().for_each(|line| eprintln!("  {line}"));
            return self.tear_down();
        }
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            self.assert_whole();
            self.stop_master();
        }));
        self.tear_down();
        if let Err(panic) = checked {
            std::panic::resume_unwind(panic);
        }
    }
}

#[track_caller]
pub fn assert_same_bytes(actual: &[u8], expected: &[u8], place: &str) {
    let differ = actual.iter().zip(expected).position(|(a, b)| a != b);
    assert!(
        actual.len() == expected.len() && differ.is_none(),
        "{place}: {} bytes instead of {}, first difference at {differ:?}",
        actual.len(),
        expected.len()
    );
}

/// A command whose process is sent this signal when the test process dies.
pub fn child_command(signal: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", signal, "--"]);
    command
}

pub fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32).expect("a process id is positive");
    // The process may have exited already.
    let _ = kill_process(pid, signal);
}

/// Stops a process with SIGSTOP, and waits until all its threads stand still.
pub fn stop_process(pid: u32) {
    signal(pid, Signal::STOP);
    wait_until("the process stands still", || process_states(pid).iter().all(|state| "TZ".contains(*state)));
}

/// The states of a process's threads, as ps shows them; none if it is gone.
pub fn process_states(pid: u32) -> Vec<char> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stats = tasks.filter_map(|task| fs::read_to_string(task.path().join("stat")).ok());
    stats.filter_map(|stat| stat.rsplit(") ").next()?.chars().next()).collect()
}

/// Waits for a process to exit.
#[track_caller]
pub fn wait(process: &mut Child, what: &str) {
    wait_until(&format!("{what} has exited"), || process.try_wait().expect("the process can be waited for").is_some());
}

/// The first line that a process prints. A thread drains the rest.
pub fn first_line(process: &mut Child) -> String {
    let out = process.stdout.take().expect("stdout is a pipe");
    let (send, line) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            let _ = send.send(line);
        }
    });
    line.recv_timeout(TIMEOUT).unwrap_or_else(|e| format!("no first line ({e})\n"))
}
