//! Following a master: the thread that trails its log, and what a master with a peer does.
//!
//! A follower asks for the changes after its last one, takes them over, and asks again. Where the log does not go back
//! so far, it fetches a checkpoint, while readers go on with the old index, and ends: the process starts again with the
//! new one. A promoted follower becomes a master in place.
//!
//! A master with a peer asks now and then whether the peer was promoted in its place. If so, it ends.

use std::io::BufReader;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::Store;
use crate::error::{Error, Result};
use crate::index::log::{Head, Update};
use crate::index::{boot_time, unpack_checkpoint};
use crate::volumes::remote::Remote;

/// Give up on a master that is silent for this long. It answers within a second.
const SILENT: Duration = Duration::from_secs(5);

/// Give up on a backup that makes no progress for this long.
const STALL: Duration = Duration::from_secs(60);

/// The pause after a failure, and between looks at a peer.
const RETRY: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_secs(5);

/// Poll interval for the request of `mkv promote`.
const ASKED: Duration = Duration::from_millis(100);

/// The file in `-db` with which `mkv promote` asks a running follower.
pub const REQUEST: &str = "promote";

/// Another process with the same store: the master that this one follows, or the one that may be promoted in its place.
pub struct Peer {
    /// The folder of this process's index.
    pub db: PathBuf,
    log: Remote,
    backup: Remote,
}

/// Why a process with a peer has to end.
#[derive(Debug, PartialEq)]
pub enum Ended {
    /// A new checkpoint lies beside the index: start again with it.
    Replaced,
    Failed(Error),
}

impl Peer {
    /// `host`: `host:port`. `auth`: the `Authorization` header for it. `timeout`: for a connection.
    pub fn new(db: PathBuf, host: &str, auth: Option<&str>, timeout: Duration) -> Peer {
        let remote = |stall| Remote::new(host, auth, timeout, stall);
        Peer { db, log: remote(SILENT), backup: remote(STALL) }
    }

    /// `host:port`.
    pub fn host(&self) -> &str {
        self.log.host()
    }

    /// What the peer says of its index.
    pub fn head(&self) -> Result<Head> {
        Head::read(&mut BufReader::new(self.log.get("/?log")?.body))
    }

    /// Fetches a checkpoint of the peer, which has to be a master, and unpacks it beside the index.
    pub fn fetch_checkpoint(&self) -> Result<()> {
        // Ask before the checkpoint is made: a run that begins in between makes the checkpoint useless, but not wrong.
        let head = self.head()?;
        if let Some(master) = head.follows {
            return Err(Error::Failed(format!("http://{} is a follower itself: follow http://{master}", self.host())));
        }
        let asked =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64);
        log::warn!("fetching a checkpoint of http://{}", self.host());
        let mut checkpoint = self.backup.get("/?backup")?;
        unpack_checkpoint(&mut checkpoint.body, &head.history, asked, &self.db)
    }

    /// Fails if the peer is a master that was promoted after this one of this generation.
    pub fn check_not_promoted(&self, generation: u64) -> Result<()> {
        // A peer that does not answer cannot be seen to be promoted.
        let Ok(head) = self.head() else { return Ok(()) };
        match head.follows {
            None if head.generation > generation => Err(Error::Failed(format!(
                "http://{} was promoted in place of this master: start this one again, and it follows",
                self.host()
            ))),
            None => {
                log::error!("http://{} is a master of this store too: stop one of the two", self.host());
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Store {
    /// Fails if this process follows a master: it writes nothing then.
    pub fn check_master(&self) -> Result<()> {
        self.index.following().map_or(Ok(()), |following| Err(following.refusal()))
    }

    /// The thread of a process with a peer: returns when the process has to end.
    pub fn follow(&self, peer: &Peer) -> Ended {
        let mut last = None;
        while self.index.following().is_some() {
            let done = self.trail(peer).and_then(|continues| match continues {
                false => peer.fetch_checkpoint().map(|()| Some(Ended::Replaced)),
                true => Ok(None),
            });
            match done {
                Ok(None) => last = None,
                Ok(Some(ended)) if self.index.following().is_some() => return ended,
                Ok(Some(_)) => {}
                Err(error) => {
                    // Warn once of a failure that repeats itself.
                    if last.as_ref() != Some(&error) {
                        log::warn!("{error}");
                    }
                    last = Some(error);
                    std::thread::sleep(RETRY);
                }
            }
        }
        loop {
            if let Err(error) = peer.check_not_promoted(self.index.generation()) {
                return Ended::Failed(error);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Takes over the changes after the last one. `false`: the log does not go back so far.
    fn trail(&self, peer: &Peer) -> Result<bool> {
        let (asked, (since, run)) = (boot_time(), self.index.position()?);
        let mut log = BufReader::new(peer.log.get(&format!("/?log&since={since}&run={run}"))?.body);
        let head = Head::read(&mut log)?;
        if !self.index.accept(&head)? {
            return Ok(false);
        }
        while let Some(update) = Update::read(&mut log)? {
            self.index.apply(&update)?;
        }
        self.index.note_current(&head, asked)?;
        Ok(true)
    }

    /// The thread of a follower that waits for `mkv promote`. `begin`: starts what only a master does. Returns an error
    /// when the process has to end.
    pub fn await_promotion(&self, peer: &Peer, begin: impl FnOnce() -> Result<()>) -> Result<()> {
        let request = peer.db.join(REQUEST);
        while !request.exists() {
            std::thread::sleep(ASKED);
        }
        self.index.promote()?;
        self.suspect_after_crash()?;
        self.index.lead()?;
        begin()?;
        std::fs::remove_file(&request).map_err(|e| Error::Failed(format!("{}: {e}", request.display())))
    }
}
