//! Basic authorization (RFC 7617): the volumes decide who is right, the master asks and remembers.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// The header's value for `user:pass`.
pub fn basic(userpass: &str) -> String {
    format!("Basic {}", STANDARD.encode(userpass))
}
