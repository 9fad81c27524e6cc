//! The connections of one process to the database, and what its answers mean.
//!
//! After a failure one thread at a time tries to connect again, once a second, and all others fail at once, so that a
//! database that hangs does not take the threads of all clients. A connection that fails takes the idle ones with it:
//! they lead to the same server, which may not be the primary any more.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustls::ClientConfig;

use super::connection::{Arg, Connection, Failure as Lost, Row, tls};
use super::url::Url;
use crate::error::{Error, Result};
use crate::threads::lock;

/// How long a thread waits for a connection.
const WAIT: Duration = Duration::from_secs(5);

/// How often a database that is away is tried.
const RETRY: Duration = Duration::from_secs(1);

/// A connection that was idle for longer is looked at before it is used.
const IDLE: Duration = Duration::from_secs(60);

/// How often a statement is repeated that ran into another one.
const CONFLICTS: u32 = 10;

/// Why a statement gave no result.
#[derive(Debug)]
pub enum Failure {
    /// It was not carried out: the database is away or busy.
    Away(String),
    /// It may have been carried out or not.
    Doubt(String),
    /// The database refused it.
    Refused(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Away(why) => write!(f, "the database is away: {why}"),
            Failure::Doubt(why) => write!(f, "in doubt: the database gave no answer: {why}"),
            Failure::Refused(why) => write!(f, "the database refused a statement: {why}"),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        match failure {
            Failure::Refused(_) => Error::Index(failure.to_string()),
            _ => Error::Unavailable(failure.to_string()),
        }
    }
}

pub struct Pool {
    url: Url,
    tls: Option<Arc<ClientConfig>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    idle: Vec<(Connection, Instant)>,
    /// Connections that are idle, in use, or being opened.
    open: usize,
    down: Option<Down>,
}

/// A database that did not answer.
struct Down {
    why: String,
    /// Whether a thread is connecting to it.
    trying: bool,
    /// Whether connecting has failed.
    failed: bool,
    next: Instant,
}

impl Pool {
    pub fn new(url: Url) -> Result<Pool> {
        let tls = tls(&url)?;
        Ok(Pool { url, tls, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Runs one statement. All statements of this engine can be repeated.
    pub fn query(&self, sql: &'static str, args: &[Arg]) -> std::result::Result<Vec<Row>, Failure> {
        self.with(|connection| connection.query(sql, args))
    }

    /// Runs one statement that only reads, once more if its connection has just broken.
    pub fn read(&self, sql: &'static str, args: &[Arg]) -> std::result::Result<Vec<Row>, Failure> {
        let begun = Instant::now();
        match self.query(sql, args) {
            Err(Failure::Doubt(_)) if begun.elapsed() < RETRY => self.query(sql, args),
            result => result,
        }
    }

    /// Calls `f` with a connection, again where the server says that it ran into another transaction.
    pub fn with<T>(
        &self,
        f: impl Fn(&mut Connection) -> std::result::Result<T, Lost>,
    ) -> std::result::Result<T, Failure> {
        let mut attempts = 0;
        loop {
            let mut connection = self.take()?;
            attempts += 1;
            let (code, text) = match f(&mut connection) {
                Ok(result) => {
                    self.give_back(connection);
                    return Ok(result);
                }
                Err(Lost::Lost(e)) => {
                    self.note_failure(connection, &e.to_string());
                    return Err(Failure::Doubt(e.to_string()));
                }
                Err(Lost::Refused(code, text)) => (code, text),
            };
            match code.as_str() {
                "40001" | "40P01" if attempts <= CONFLICTS => {
                    self.give_back(connection);
                    std::thread::sleep(Duration::from_millis(fastrand::u64(..10)));
                }
                // A time-out of the server's: it carried out nothing.
                "57014" | "55P03" if attempts < 2 => self.give_back(connection),
                "40001" | "40P01" | "57014" | "55P03" => {
                    self.give_back(connection);
                    return Err(Failure::Away(text));
                }
                // A standby, a server that starts or has too many clients.
                "25006" | "57P03" | "53300" => {
                    self.note_failure(connection, &text);
                    return Err(Failure::Away(text));
                }
                "57P01" | "57P02" | "57P04" | "40003" => {
                    self.note_failure(connection, &text);
                    return Err(Failure::Doubt(text));
                }
                _ if code.starts_with("08") => {
                    self.note_failure(connection, &text);
                    return Err(Failure::Doubt(text));
                }
                _ => {
                    self.give_back(connection);
                    return Err(Failure::Refused(format!("{text} ({code})")));
                }
            }
        }
    }

    fn take(&self) -> std::result::Result<Connection, Failure> {
        let deadline = Instant::now() + WAIT;
        let mut state = lock(&self.state);
        loop {
            let now = Instant::now();
            let wait = deadline.saturating_duration_since(now);
            if let Some(down) = &mut state.down {
                if !down.trying && now >= down.next {
                    down.trying = true;
                    state.open += 1;
                    break;
                }
                if down.failed || wait.is_zero() {
                    return Err(Failure::Away(down.why.clone()));
                }
            } else if let Some((connection, since)) = state.idle.pop() {
                if since.elapsed() < IDLE || connection.is_open() {
                    return Ok(connection);
                }
                state.open -= 1;
                continue;
            } else if state.open < self.url.connections {
                state.open += 1;
                break;
            } else if wait.is_zero() {
                return Err(Failure::Away(format!("all {} connections are in use", self.url.connections)));
            }
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(|e| e.into_inner()).0;
        }
        drop(state);
        self.connect()
    }

    fn connect(&self) -> std::result::Result<Connection, Failure> {
        let opened = Connection::open(&self.url, self.tls.as_ref());
        let mut state = lock(&self.state);
        self.changed.notify_all();
        match opened {
            Ok(connection) => {
                state.down = None;
                Ok(connection)
            }
            Err(e) => {
                let why = match e {
                    Lost::Lost(e) => e.to_string(),
                    Lost::Refused(code, text) => format!("{text} ({code})"),
                };
                state.open -= 1;
                drop_idle(&mut state);
                let next = Instant::now() + RETRY;
                state.down = Some(Down { why: why.clone(), trying: false, failed: true, next });
                Err(Failure::Away(why))
            }
        }
    }

    fn give_back(&self, connection: Connection) {
        lock(&self.state).idle.push((connection, Instant::now()));
        self.changed.notify_one();
    }

    /// Closes a connection that failed, and the idle ones.
    fn note_failure(&self, connection: Connection, why: &str) {
        drop(connection);
        let mut state = lock(&self.state);
        state.open -= 1;
        drop_idle(&mut state);
        if state.down.is_none() {
            state.down = Some(Down { why: why.into(), trying: false, failed: false, next: Instant::now() });
        }
        self.changed.notify_all();
    }
}

fn drop_idle(state: &mut MutexGuard<State>) {
    state.open -= state.idle.len();
    state.idle.clear();
}
