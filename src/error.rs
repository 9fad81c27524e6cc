//! The errors of mkv.
//!
//! Every text is one line that says what is wrong and, if that is not obvious, what to do. `api/status.rs` maps errors
//! to HTTP statuses; `exit_code` maps them to the exit status of the process.

use std::fmt;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, Clone, PartialEq)]
pub enum Error {
    /// A wrong flag or command.
    Usage(String),
    /// A request that is wrong in every state of the store.
    BadRequest(String),
    /// The credentials are missing or wrong.
    Unauthorized,
    /// The state of the key, or a flag of the server, forbids the request.
    Forbidden(&'static str),
    /// No such key.
    NotFound(&'static str),
    /// mkv does not have this method.
    Method,
    /// Another request is writing the key.
    Locked,
    /// The index has the key, but no volume has a replica.
    Gone,
    /// The upload has no value.
    NoValue,
    /// The list is too long without a limit.
    TooMany,
    /// The key is over 1,089 bytes; its length in bytes.
    KeyTooLong(usize),
    /// A condition that the request makes does not hold.
    Precondition,
    /// No multipart upload has this id.
    NoSuchUpload,
    /// A volume refused a request with this status.
    Refused { volume: String, status: u16 },
    /// A volume did not answer. `maybe_done`: it has the request and may still carry it out.
    Unreachable { volume: String, why: String, maybe_done: bool },
    /// The request cannot be carried out now; a later try may succeed.
    Unavailable(String),
    /// The index could not be read or written, or an entry does not decode.
    Index(String),
    /// A command could not do everything that it was asked to do.
    Failed(String),
}

impl Error {
    pub const NOT_FOUND: Error = Error::NotFound("no such key");

    /// The exit status of the process: 2 for a wrong command line, 1 for everything else.
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
            Error::Method => {
                f.write_str("unknown method: use GET, HEAD, PUT, REPLACE, DELETE, UNLINK, RELINK or REBALANCE")
            }
            Error::Locked => f.write_str("another request is writing this key: try again when it is done"),
            Error::Gone => f.write_str("no volume has a replica of this key: run mkv verify, check the volumes' disks"),
            Error::NoValue => f.write_str("send a value of at least one byte, with Content-Length or chunked"),
            Error::TooMany => f.write_str("over 1,000,000 keys: add &limit=N and follow next"),
            Error::KeyTooLong(n) => write!(f, "the key has {n} bytes, 1089 are allowed"),
            Error::Precondition => f.write_str("a condition of the request does not hold: read the key again"),
            Error::NoSuchUpload => f.write_str("no such upload: it was completed, aborted or has expired"),
            Error::Refused { volume, status } => {
                let why = match status {
                    401 => "give a user and password that it accepts, with -userpass",
                    403 => {
                        "its nginx may not read or write there, see owner and mode; or its secret is not that of \
                         -secret, or its clock is wrong"
                    }
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
