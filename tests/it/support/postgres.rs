//! A private PostgreSQL for one test: a primary, and a synchronous standby where the test is about failover.
//!
//! PostgreSQL refuses to run as root; then it runs as the user postgres, whom its Debian package makes.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Signal, geteuid};

use crate::support::cluster::{process_states, signal, stop_process, wait};
use crate::support::http_client::wait_at_most;

const PASSWORD: &str = "p@ss wörd";

pub struct Postgres {
    data: PathBuf,
    host: String,
    pub port: u16,
    flags: Vec<String>,
    server: Option<Child>,
}

impl Postgres {
    /// Makes a cluster in this folder, with an empty database `mkv`, and starts it on a free port of this address.
    /// `flags`: settings for the server.
    pub fn start(folder: &Path, host: &str, flags: &[&str]) -> Postgres {
        let home = folder.join("postgres");
        fs::create_dir(&home).expect("the folder can be created");
        fs::write(home.join("password"), PASSWORD).expect("the file can be written");
        own(&home);
        let data = home.join("data");
        let flags = flags.iter().map(|flag| flag.to_string()).collect();
        let mut postgres = Postgres { data, host: host.into(), port: free_port(host), flags, server: None };
        let password = format!("--pwfile={}", home.join("password").display());
        let made = tool("initdb")
            .args(["-N", "-U", "mkv", "-A", "scram-sha-256", "--locale=C", "-E", "UTF8"])
            .args([password.as_str(), "-D"])
            .arg(&postgres.data)
            .output()
            .expect("initdb starts");
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        postgres.launch();
        postgres.ask_in("postgres", "CREATE DATABASE mkv");
        postgres
    }

    /// A standby of this primary, which then waits for it with each commit. It is started too.
    pub fn add_standby(&mut self, folder: &Path) -> Postgres {
        let home = folder.join("standby");
        fs::create_dir(&home).expect("the folder can be created");
        own(&home);
        let data = home.join("data");
        let copied = tool("pg_basebackup")
            .env("PGPASSWORD", PASSWORD)
            .args(["-R", "-c", "fast", "-h", &self.host, "-p", &self.port.to_string(), "-U", "mkv", "-D"])
            .arg(&data)
            .output()
            .expect("pg_basebackup starts");
        assert!(copied.status.success(), "pg_basebackup: {}", String::from_utf8_lossy(&copied.stderr));
        let flags = self.flags.clone();
        let mut standby = Postgres { data, host: self.host.clone(), port: free_port(&self.host), flags, server: None };
        standby.launch();
        self.ask_in("postgres", "ALTER SYSTEM SET synchronous_standby_names = '*'");
        self.ask_in("postgres", "SELECT pg_reload_conf()");
        wait_at_most(Duration::from_secs(20), "the standby is synchronous", || {
            self.ask_in("postgres", "SELECT sync_state FROM pg_stat_replication").contains("sync")
        });
        standby
    }

    pub fn launch(&mut self) {
        assert!(self.server.is_none(), "PostgreSQL runs already");
        let log = fs::File::options().append(true).create(true).open(self.data.with_extension("log"));
        let log = log.expect("the log can be written");
        let mut command = setpriv();
        command.args(["--pdeathsig", "QUIT", "--"]).arg(binary("postgres")).arg("-D").arg(&self.data);
        command.args(["-h", &self.host, "-p", &self.port.to_string()]).arg("-k").arg(self.data.parent().unwrap());
        for flag in ["fsync=off", "shared_buffers=32MB", "max_connections=120"] {
            command.args(["-c", flag]);
        }
        self.flags.iter().for_each(|flag| _ = command.args(["-c", flag]));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.server = Some(command.spawn().expect("postgres starts"));
        wait_at_most(Duration::from_secs(30), "PostgreSQL answers", || {
            let ended = self.server.as_mut().unwrap().try_wait().expect("the process can be waited for");
            if let Some(status) = ended {
                let log = fs::read_to_string(self.data.with_extension("log")).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(20).collect();
                panic!("PostgreSQL has ended, {status}: {tail:#?}");
            }
            self.psql("postgres", "SELECT 1").status.success()
        });
    }

    fn pid(&self) -> u32 {
        self.server.as_ref().expect("PostgreSQL runs").id()
    }

    /// Ends all its processes with SIGKILL.
    pub fn crash(&mut self) {
        let mut server = self.server.take().expect("PostgreSQL runs");
        let killed = self.each_process(server.id(), Signal::KILL);
        wait(&mut server, "PostgreSQL");
        // The next server does not start before all have left its memory.
        let is_gone = |pid: &u32| process_states(*pid).iter().all(|state| *state == 'Z');
        wait_at_most(Duration::from_secs(10), "its processes have ended", || killed.iter().all(is_gone));
    }

    /// Stops all its processes with SIGSTOP: the kernel goes on accepting connections.
    pub fn freeze(&self) {
        self.each_process(self.pid(), Signal::STOP);
    }

    pub fn thaw(&self) {
        self.each_process(self.pid(), Signal::CONT);
    }

    fn each_process(&self, server: u32, how: Signal) -> Vec<u32> {
        // It starts no more processes meanwhile.
        stop_process(server);
        let mut pids = vec![server];
        for entry in fs::read_dir("/proc").expect("/proc is mounted").flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
            let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            pids.extend(pid.filter(|_| status.lines().any(|line| line == format!("PPid:\t{server}"))));
        }
        pids.iter().for_each(|pid| signal(*pid, how));
        pids
    }

    /// Stops the process that sends the log to the standby.
    pub fn freeze_sender(&self) {
        let pid = self.ask_in("postgres", "SELECT pid FROM pg_stat_replication");
        signal(pid.trim().parse().expect("a standby is connected"), Signal::STOP);
    }

    /// Makes a standby the primary.
    pub fn promote(&self) {
        self.ask_in("postgres", "SELECT pg_promote()");
        wait_at_most(Duration::from_secs(20), "the standby is the primary", || {
            self.ask_in("postgres", "SHOW transaction_read_only").trim() == "off"
        });
    }

    /// The URL of the database mkv on these servers.
    pub fn url(&self, others: &[&Postgres], options: &str) -> String {
        let hosts = [self].into_iter().chain(others.iter().copied()).map(|p| format!("{}:{}", p.host, p.port));
        let (hosts, password) = (hosts.collect::<Vec<_>>().join(","), "p%40ss%20w%C3%B6rd");
        format!("postgres://mkv:{password}@{hosts}/mkv?sslmode=disable&{options}")
    }

    /// The answer to a statement on the database mkv: one line for each row.
    #[track_caller]
    pub fn ask(&self, statement: &str) -> String {
        self.ask_in("mkv", statement)
    }

    #[track_caller]
    pub fn ask_in(&self, database: &str, statement: &str) -> String {
        let output = self.psql(database, statement);
        assert!(output.status.success(), "{statement}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn psql(&self, database: &str, statement: &str) -> std::process::Output {
        let mut command = Command::new(binary("psql"));
        command.env("PGPASSWORD", PASSWORD).env("PGCONNECT_TIMEOUT", "3").args(["-XAtq", "-U", "mkv"]);
        command.args(["-h", &self.host, "-p", &self.port.to_string(), "-d", database, "-c", statement]);
        command.output().expect("psql starts")
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let Some(mut server) = self.server.take() else { return };
        // It ends at once, and leaves none of its shared memory behind.
        self.each_process(server.id(), Signal::CONT);
        signal(server.id(), Signal::QUIT);
        wait(&mut server, "PostgreSQL");
    }
}

/// The path of one of PostgreSQL's programs. Debian keeps those of the server away from PATH.
fn binary(name: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = versions.map(|version| version.path().join("bin").join(name)).filter(|path| path.exists()).max();
    found.unwrap_or_else(|| name.into())
}

fn tool(name: &str) -> Command {
    let mut command = setpriv();
    command.arg("--").arg(binary(name)).current_dir("/");
    command
}

/// Runs a program as a user that PostgreSQL accepts.
fn setpriv() -> Command {
    let mut command = Command::new("setpriv");
    if geteuid().is_root() {
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
    }
    command
}

/// Gives a folder to that user.
fn own(folder: &Path) {
    if geteuid().is_root() {
        let given = Command::new("chown").args(["-R", "postgres:postgres"]).arg(folder).status();
        assert!(given.expect("chown starts").success());
    }
}

fn free_port(host: &str) -> u16 {
    TcpListener::bind((host, 0)).and_then(|listener| listener.local_addr()).expect("a port is free").port()
}
