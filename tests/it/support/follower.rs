//! A follower of a test's master: a real process with a folder of its own.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use rustix::process::Signal;
use serde_json::Value;

use crate::support::cluster::{Cluster, first_line, signal, stop_process, wait};
use crate::support::http_client::{self, Answer, Conn, head, target, wait_until};

pub struct Follower {
    pub db: PathBuf,
    pub address: String,
    /// Its flags beside those of the store, and the command.
    pub args: Vec<String>,
    log: PathBuf,
    child: Option<Child>,
}

impl Cluster {
    /// Starts a follower of the master, with these flags.
    #[track_caller]
    pub fn start_follower(&self, flags: &[&str]) -> Follower {
        let from = format!("http://{}", self.address());
        let mut follower = self.new_follower(&[&["follow", "-from", &from], flags].concat());
        follower.start(self);
        follower
    }

    /// A follower that is not started yet.
    pub fn new_follower(&self, args: &[&str]) -> Follower {
        let (db, log) = (self.folder.join("follower"), self.folder.join("follower.log"));
        let args = args.iter().map(|arg| arg.to_string()).collect();
        Follower { db, address: format!("{}:5000", self.host), args, log, child: None }
    }
}

impl Follower {
    #[track_caller]
    pub fn start(&mut self, c: &Cluster) {
        self.try_start(c).unwrap_or_else(|line| panic!("{line}\n{}", self.log()));
    }

    /// Starts the process. If it exits instead, returns what it prints on stderr.
    pub fn try_start(&mut self, c: &Cluster) -> Result<(), String> {
        let before = self.log().len();
        let log = fs::File::options().append(true).create(true).open(&self.log).expect("the log can be written");
        let db = self.db.to_str().expect("the path is UTF-8");
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        let mut command = c.mkv_command(&[&["-db", db, "-host", &c.host, "-port", "5000", "-v"], &args[..]].concat());
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn();
        let mut child = child.expect("the follower starts");
        if first_line(&mut child).starts_with("mkv listens on ") {
            self.child = Some(child);
            return Ok(());
        }
        wait(&mut child, "the follower that failed to start");
        Err(self.log().split_off(before))
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// How many checkpoints it has fetched.
    pub fn checkpoints(&self) -> usize {
        self.log().matches("fetching a checkpoint").count()
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the follower runs").id()
    }

    pub fn freeze(&self) {
        stop_process(self.pid());
    }

    pub fn thaw(&self) {
        signal(self.pid(), Signal::CONT);
    }

    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("the follower runs");
        signal(child.id(), Signal::KILL);
        wait(&mut child, "the killed follower");
    }

    /// Stops it with SIGTERM.
    #[track_caller]
    pub fn stop(&mut self) {
        let mut child = self.child.take().expect("the follower runs");
        signal(child.id(), Signal::TERM);
        wait(&mut child, "the stopped follower");
        assert_eq!(child.wait().unwrap().code(), Some(0), "{}", self.log());
    }

    #[track_caller]
    pub fn ask(&self, method: &str, target: &str) -> Answer {
        http_client::ask(&self.address, method, target, &[], None)
    }

    #[track_caller]
    pub fn get(&self, key: impl AsRef<[u8]>) -> Answer {
        self.ask("GET", &target(key))
    }

    #[track_caller]
    pub fn send(&self, method: &str, key: impl AsRef<[u8]>, body: impl AsRef<[u8]>) -> Answer {
        http_client::ask(&self.address, method, &target(key), &[], Some(body.as_ref()))
    }

    /// How old its state may be, in seconds.
    #[track_caller]
    pub fn key_age(&self) -> u64 {
        let answer = self.ask("GET", "/?list&limit=1").expect(200);
        answer.header("Key-Age").expect("a follower says its age").parse().expect("Key-Age is a number")
    }

    /// Waits until it has all changes that the master has now.
    #[track_caller]
    pub fn wait_until_caught_up(&self, c: &Cluster) {
        let wanted = change(&c.address());
        wait_until("the follower has caught up", || try_change(&self.address).is_some_and(|change| change >= wanted));
    }

    /// The same the other way round: waits until the master, which follows this one now, has all changes of this one.
    #[track_caller]
    pub fn wait_until_followed_by(&self, c: &Cluster) {
        let wanted = change(&self.address);
        wait_until("the old master has caught up", || try_change(&c.address()).is_some_and(|change| change >= wanted));
    }

    pub fn dump(&self, c: &Cluster) -> String {
        c.mkv(&["dump", "-db", self.db.to_str().unwrap()]).expect(0).out
    }
}

/// The number of the last change that a process has.
#[track_caller]
pub fn change(address: &str) -> u64 {
    log_head(address)["change"].as_u64().expect("a change has a number")
}

/// The same; `None` while the process starts again with another index.
fn try_change(address: &str) -> Option<u64> {
    let mut conn = Conn::try_open(address).ok()?;
    conn.try_send(&head("GET", "/?log", &[])).ok()?;
    let answer = conn.next_answer("GET").ok()??;
    serde_json::from_slice::<Value>(&answer.body).ok()?["change"].as_u64()
}

/// What a process says of its index.
#[track_caller]
pub fn log_head(address: &str) -> Value {
    let answer = http_client::ask(address, "GET", "/?log", &[], None).expect(200);
    serde_json::from_slice(&answer.body).expect("JSON")
}

impl Drop for Follower {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("the follower's log:");
            tail.iter().rev().for_each(|line| eprintln!("  {line}"));
        }
        if self.child.is_some() {
            self.kill();
        }
    }
}
