//! The frozen formats: where a blob lies and what the index holds for a key.
//!
//! Everything here is pure: no I/O, no clock, no other room. docs/formats.md has the grammars; `tests/vectors.json`
//! holds golden vectors. A store written by the Go minikeyvalue is readable in place, so none of these rules may
//! change.

pub mod placement;
pub mod record;
pub mod tar;
pub mod time;

use std::fmt::Display;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};

/// The characters that stay as they are in a percent-encoded key: RFC 3986's unreserved ones and `/`.
const KEY_SET: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// A key as it stands in a URL.
pub fn percent_encoded(key: &[u8]) -> impl Display {
    percent_encode(key, KEY_SET)
}

/// A key as messages and logs show it: in quotes, on one line, with escapes for what is not printable ASCII.
pub fn quoted(key: &[u8]) -> String {
    format!("\"{}\"", key.escape_ascii())
}

/// Keys below it are the master's own: clients can read them, and write none.
const OWN_KEYS: &[u8] = b"/.mkv/";

/// The keys of the index's backups, which take turns.
pub const BACKUP_KEYS: [&[u8]; 2] = [b"/.mkv/backup/1", b"/.mkv/backup/2"];

/// Whether a key is the master's own.
pub fn is_own(key: &[u8]) -> bool {
    key.starts_with(OWN_KEYS)
}
