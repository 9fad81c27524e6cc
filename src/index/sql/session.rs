//! Sessions: which masters live, and what becomes of the writes of those that do not.
//!
//! Each master has a row in `session` and adds 1 to its `beat` five times in a lease. Every other master notes on its
//! own monotonic clock since when it has seen the beat unchanged, and after a whole lease of that it deletes the row: no
//! two clocks are compared. A look that comes late says nothing about others, so that a database that was away does not
//! make the masters bury each other. A session that was buried is never used again; its master takes a new one.
//!
//! The writes of a buried session become debris, in one statement each and before any of their blobs is deleted. Such a
//! write and its flip contend for one row, so only one of them commits. Leases decide when a takeover may be tried;
//! that nothing is lost does not depend on them.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::connection::Arg::{Bytes, Int, Text};
use super::pool::Failure;
use super::statements as sql;
use super::{Engine, bytes, int, text};
use crate::error::{Error, Result};
use crate::format::quoted;
use crate::threads::lock;

/// An upload whose session was not renewed for this long is given up.
const OUTDATED: Duration = Duration::from_secs(30 * 60);

/// A master, as its row shows it.
#[derive(Debug, Clone)]
pub struct Peer {
    pub id: i64,
    beat: i64,
    /// What it is, and where.
    pub name: String,
    /// The flags on which all masters of a store have to agree.
    pub flags: String,
}

/// What this process knows about sessions.
#[derive(Default)]
pub struct Sessions {
    /// This process's; 0: it has none.
    id: i64,
    renewed: Option<Instant>,
    looked: Option<Instant>,
    peers: Vec<Peer>,
    /// The beat of each session, and since when it has been seen unchanged.
    seen: HashMap<i64, (i64, Instant)>,
    stopped: bool,
}

/// A row of `writing` that is to go, as soon as the database answers.
pub struct Undo {
    pub key: Vec<u8>,
    /// `None`: its BEGIN got no answer. The key's lock is kept until the row is gone.
    pub version: Option<i64>,
    pub session: i64,
}

impl Engine {
    /// Begins a session.
    pub fn enlist(&self) -> Result<()> {
        let (begun, id) = (Instant::now(), fastrand::i64(1..i64::MAX));
        let rows = self.pool.query(sql::OPEN, &[Int(id), Text(&self.name), Text(&self.flags)])?;
        if rows.is_empty() {
            return Err(self.being_filled());
        }
        let mut sessions = lock(&self.sessions);
        sessions.id = id;
        sessions.renewed = Some(begun);
        sessions.seen.clear();
        Ok(())
    }

    pub fn being_filled(&self) -> Error {
        Error::Failed(format!(
            "{}: rebuild or import is filling this database, or was interrupted: wait, or drop it and make it anew",
            self.url
        ))
    }

    /// This process's session.
    pub fn session(&self) -> i64 {
        lock(&self.sessions).id
    }

    /// The thread that keeps the session alive and takes over the writes of others.
    pub fn tend(&self) {
        let mut failing = false;
        loop {
            let sessions = lock(&self.sessions);
            let period = self.url.lease / 5;
            let sessions =
                self.woken.wait_timeout_while(sessions, period, |s| !s.stopped && lock(&self.undo).is_empty());
            if sessions.unwrap_or_else(|e| e.into_inner()).0.stopped {
                return;
            }
            match self.tend_once() {
                Ok(()) => failing = false,
                Err(error) if failing => {
                    log::info!("session: {error}");
                    std::thread::sleep(Duration::from_millis(200));
                }
                Err(error) => {
                    failing = true;
                    log::warn!("session: {error}");
                }
            }
        }
    }

    /// Renews the session, looks at the others, and takes over what dead ones left.
    pub fn tend_once(&self) -> Result<()> {
        if !self.beat()? {
            log::warn!("another master took this one for dead: its uploads under way fail");
            self.enlist()?;
        }
        self.look()?;
        for row in self.pool.query(sql::ORPHANS, &[])? {
            let (key, version, session) = (bytes(&row, 0), int(&row, 1), int(&row, 2));
            log::info!("the write of {} is taken over from a dead master", quoted(key));
            self.pool.query(sql::ABANDON, &[Bytes(key), Int(version), Int(session), Int(self.late())])?;
        }
        self.undo_rows()?;
        Ok(())
    }

    /// Renews the session. `false`: it is no more. As a commit, it also shows that what was committed before is safe.
    pub fn beat(&self) -> std::result::Result<bool, Failure> {
        let (begun, id) = (Instant::now(), self.session());
        let lives = !self.pool.query(sql::BEAT, &[Int(id)])?.is_empty();
        let mut sessions = lock(&self.sessions);
        if lives && sessions.id == id {
            sessions.renewed = Some(begun);
        }
        Ok(lives)
    }

    fn look(&self) -> std::result::Result<(), Failure> {
        let (begun, lease) = (Instant::now(), self.url.lease);
        let peer = |row: &super::Row| Peer {
            id: int(row, 0),
            beat: int(row, 1),
            name: text(row, 2).unwrap_or_default(),
            flags: text(row, 3).unwrap_or_default(),
        };
        let peers: Vec<Peer> = self.pool.query(sql::LOOK, &[])?.iter().map(peer).collect();
        let mut dead = Vec::new();
        {
            let mut sessions = lock(&self.sessions);
            let in_time = sessions.looked.is_some_and(|looked| looked.elapsed() < lease / 2);
            for peer in peers.iter().filter(|peer| peer.flags != self.flags) {
                if !sessions.peers.iter().any(|known| known.id == peer.id) {
                    log::warn!("{} has other flags: {}; here: {}", peer.name, peer.flags, self.flags);
                }
            }
            let mut seen = HashMap::new();
            for peer in peers.iter().filter(|peer| peer.id != sessions.id) {
                let before = sessions.seen.get(&peer.id).filter(|(beat, _)| in_time && *beat == peer.beat);
                let since = before.map_or(begun, |(_, since)| *since);
                if begun - since > lease {
                    dead.push((peer.id, peer.beat, peer.name.clone()));
                }
                seen.insert(peer.id, (peer.beat, since));
            }
            sessions.seen = seen;
            sessions.looked = Some(Instant::now());
            sessions.peers = peers;
        }
        for (id, beat, name) in dead {
            if !self.pool.query(sql::BURY, &[Int(id), Int(beat)])?.is_empty() {
                log::warn!("{name} has not renewed its session for {} s: its writes are taken over", lease.as_secs());
            }
        }
        Ok(())
    }

    /// Removes the row of a write that nobody goes on with, now or as soon as the database answers.
    pub fn undo_later(&self, undo: Undo) {
        lock(&self.undo).push(undo);
        let _sessions = lock(&self.sessions);
        self.woken.notify_all();
    }

    fn undo_rows(&self) -> std::result::Result<(), Failure> {
        let rows = std::mem::take(&mut *lock(&self.undo));
        for (n, Undo { key, version, session }) in rows.iter().enumerate() {
            let done = match version {
                Some(version) => {
                    self.pool.query(sql::ABANDON, &[Bytes(key), Int(*version), Int(*session), Int(self.late())])
                }
                None => self.pool.query(sql::UNDO, &[Bytes(key), Int(*session)]),
            };
            if let Err(failure) = done {
                let left = rows.into_iter().skip(n);
                lock(&self.undo).extend(left);
                return Err(failure);
            }
            if version.is_none() {
                self.locks.free(key);
            }
        }
        Ok(())
    }

    /// Whether an upload that began under this session cannot be completed.
    pub fn is_lost(&self, session: i64) -> bool {
        let sessions = lock(&self.sessions);
        sessions.id != session || sessions.renewed.is_none_or(|at| at.elapsed() > OUTDATED)
    }

    /// Whether the last beat is younger than two periods.
    pub fn is_ready(&self) -> bool {
        let period = self.url.lease / 5;
        lock(&self.sessions).renewed.is_some_and(|at| at.elapsed() < 2 * period + Duration::from_millis(500))
    }

    /// The live masters and commands, this one among them.
    pub fn peers(&self) -> Vec<Peer> {
        lock(&self.sessions).peers.clone()
    }

    /// Whether this session is the one that cleans up what no live master is about to: one is enough.
    pub fn leads(&self) -> bool {
        let sessions = lock(&self.sessions);
        sessions.peers.first().is_none_or(|first| first.id >= sessions.id)
    }

    /// Ends the session, and the thread that tends it.
    pub fn retire(&self) {
        let id = {
            let mut sessions = lock(&self.sessions);
            sessions.stopped = true;
            self.woken.notify_all();
            std::mem::take(&mut sessions.id)
        };
        // Without an answer the others bury it.
        if id != 0
            && let Err(failure) = self.pool.query(sql::CLOSE, &[Int(id)])
        {
            log::info!("session: {failure}");
        }
    }
}
