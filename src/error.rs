//! The errors of mkv; the one place that maps them to HTTP statuses and to exit codes.
//!
//! Every text is one line that says what is wrong and, where that is not plain, what to do.

use std::fmt;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, Clone, PartialEq)]
pub enum Error {
    /// A wrong flag or command.
    Usage(String),
    /// A request that no state of the store could make right.
    BadRequest(String),
    /// Credentials are missing or wrong.
    Unauthorized,
    /// A request that the state of the key or a flag of the server forbids.
    Forbidden(&'static str),
    /// No such key.
    NotFound(&'static str),
    /// A method that mkv does not have.
    Method,
    /// Another writer holds the key.
    Locked,
    /// The index has the key, the volumes have no replica of it.
    Gone,
    /// An upload without a value.
    NoValue,
    /// A list that needs a limit.
    TooMany,
    /// A key over 1,024 bytes.
    KeyTooLong(usize),
    /// A volume answered with a status that is none of the good ones.
    Refused { volume: String, status: u16 },
    /// A volume gave no answer. `maybe_done`: it has the request, and may yet carry it out.
    Unreachable { volume: String, why: String, maybe_done: bool },
    /// The master is stopping or full, or another part that should answer does not.
    Unavailable(String),
    /// The index could not be read or written, or holds what does not decode.
    Index(String),
    /// A command could not do all that it was asked.
    Failed(String),
}

impl Error {
    /// The HTTP status (RFC 9110) that tells a client of this error.
    pub fn status(&self) -> u16 {
        match self {
            Error::Usage(_) | Error::BadRequest(_) => 400,
            Error::Unauthorized => 401,
            Error::Forbidden(_) => 403,
            Error::NotFound(_) => 404,
            Error::Method => 405,
            Error::Locked => 409,
            Error::Gone => 410,
            Error::NoValue => 411,
            Error::TooMany => 413,
            Error::KeyTooLong(_) => 414,
            Error::Refused { .. } | Error::Index(_) | Error::Failed(_) => 500,
            Error::Unreachable { .. } | Error::Unavailable(_) => 503,
        }
    }

    /// A word for what went wrong, for the metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Error::Refused { .. } => "volume_refused",
            Error::Unreachable { .. } => "volume_unreachable",
            Error::Index(_) => "index",
            Error::Locked => "locked",
            Error::Gone => "no_replica",
            Error::Unavailable(_) | Error::Failed(_) => "unavailable",
            _ => "client",
        }
    }

    /// What the process exits with: 2 for a wrong command line, 1 for everything else.
    pub fn exit_code(&self) -> i32 {
        if matches!(self, Error::Usage(_)) { 2 } else { 1 }
    }
}

impl std::error::Error for Error {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Usage(text)
            | Error::BadRequest(text)
            | Error::Unavailable(text)
            | Error::Index(text)
            | Error::Failed(text) => f.write_str(text),
            Error::Forbidden(text) | Error::NotFound(text) => f.write_str(text),
            Error::Unauthorized => f.write_str("send a user and password that the volumes accept"),
            Error::Method => f.write_str(
                "unknown method: use GET, HEAD, PUT, REPLACE, DELETE, UNLINK, RELINK or REBALANCE",
            ),
            Error::Locked => {
                f.write_str("another request is writing this key: try again when it is done")
            }
            Error::Gone => f.write_str(
                "no volume has a replica of this key: run mkv verify, check the volumes' disks",
            ),
            Error::NoValue => {
                f.write_str("send a value of at least one byte, with Content-Length or chunked")
            }
            Error::TooMany => f.write_str("over 1,000,000 keys: add &limit=N and follow next"),
            Error::KeyTooLong(n) => write!(f, "the key has {n} bytes, 1024 are allowed"),
            Error::Refused { volume, status } => {
                let why = match status {
                    401 => "give a user and password that it accepts, with -userpass",
                    403 => "its nginx may not read or write there, see owner and mode",
                    409 => "a folder lies where the blob belongs, or a blob where its folder does",
                    500 => "see its nginx error log, is its disk full or read-only?",
                    _ => "see its nginx error log",
                };
                write!(f, "volume {volume} answered {status}: {why}")
            }
            Error::Unreachable { volume, why, .. } => {
                write!(f, "volume {volume} gives no answer ({why}): is its nginx running?")
            }
        }
    }
}
