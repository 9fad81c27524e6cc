//! Basic authorization (RFC 7617): the volumes decide who is right, the master asks and remembers.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use md5::{Digest, Md5};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};

use crate::error::{Error, Result};
use crate::format::record::Hash;
use crate::threads::lock;
use crate::volumes::Volumes;

/// How long a yes and a no are remembered.
const YES: Duration = Duration::from_secs(30);
const NO: Duration = Duration::from_secs(1);

/// The most answers that are remembered.
const MOST: usize = 10_000;

/// What is left as it is in the user part of a URL: RFC 3986's unreserved characters.
const USER_SET: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A client's credentials.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The header's value, made anew.
    pub header: String,
    /// `user:pass@`, percent-encoded, to stand in a URL.
    pub url: String,
}

impl Credentials {
    /// `user:pass`, which may hold any bytes but control characters; `None`: there is no colon.
    pub fn new(userpass: &[u8]) -> Option<Credentials> {
        if userpass.iter().any(u8::is_ascii_control) {
            return None;
        }
        let colon = userpass.iter().position(|byte| *byte == b':')?;
        let encoded = |part| percent_encode(part, USER_SET).to_string();
        Some(Credentials {
            header: format!("Basic {}", STANDARD.encode(userpass)),
            url: format!("{}:{}@", encoded(&userpass[..colon]), encoded(&userpass[colon + 1..])),
        })
    }

    /// From an Authorization header; `None`: it is none of this kind.
    pub fn parse(header: &str) -> Option<Credentials> {
        let (scheme, text) = header.split_once(' ')?;
        let userpass = STANDARD.decode(text.trim()).ok()?;
        scheme.eq_ignore_ascii_case("basic").then(|| Credentials::new(&userpass))?
    }
}

/// Asks volumes who may come in, and remembers their answers under a salted digest.
pub struct Gate {
    volumes: Arc<Volumes>,
    names: Vec<String>,
    salt: [u8; 16],
    known: Mutex<HashMap<Hash, (Instant, bool)>>,
}

impl Gate {
    pub fn new(volumes: Arc<Volumes>, names: &[String]) -> Gate {
        let salt = std::array::from_fn(|_| fastrand::u8(..));
        Gate { volumes, names: names.to_vec(), salt, known: Mutex::default() }
    }

    /// An error where a volume lets everybody in: any password would pass there.
    pub fn check(&self) -> Result<()> {
        for name in &self.names {
            if matches!(self.volumes.accepts_login(name, None), Ok(true)) {
                return Err(Error::Failed(format!(
                    "-basicauth: volume {name} lets everybody in: start it with AUTH=/path/.htpasswd"
                )));
            }
        }
        Ok(())
    }

    /// What is remembered of these credentials.
    pub fn remembered(&self, credentials: &Credentials) -> Option<bool> {
        let known = lock(&self.known);
        let (at, right) = known.get(&self.digest(credentials))?;
        (at.elapsed() < if *right { YES } else { NO }).then_some(*right)
    }

    /// Whether these credentials are right: asks one volume, or another where it does not answer.
    pub fn ask(&self, credentials: &Credentials) -> Result<bool> {
        let mut failed = Error::Unavailable("no volume says who may come in".into());
        for name in self.volumes.shuffled(&self.names) {
            match self.volumes.accepts_login(&name, Some(&credentials.header)) {
                // A yes counts only from a volume that does not say yes to nobody.
                Ok(true) if matches!(self.volumes.accepts_login(&name, None), Ok(true)) => {
                    log::error!(
                        "volume {name} lets everybody in: start it with AUTH=/path/.htpasswd"
                    );
                }
                Ok(right) => {
                    let mut known = lock(&self.known);
                    if known.len() >= MOST {
                        known.clear();
                    }
                    known.insert(self.digest(credentials), (Instant::now(), right));
                    return Ok(right);
                }
                Err(error) => failed = Error::Unavailable(error.to_string()),
            }
        }
        Err(failed)
    }

    /// A volume has just said no to these credentials.
    pub fn forget(&self, credentials: &Credentials) {
        lock(&self.known).remove(&self.digest(credentials));
    }

    fn digest(&self, credentials: &Credentials) -> Hash {
        Md5::new().chain_update(self.salt).chain_update(&credentials.header).finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_of_every_kind_come_through() {
        for (userpass, url) in [
            ("me:secret", "me:secret@"),
            ("me:a:b@c/d%e f", "me:a%3Ab%40c%2Fd%25e%20f@"),
            (":", ":@"),
            ("é:ü", "%C3%A9:%C3%BC@"),
        ] {
            let header = format!("bAsIc {}", STANDARD.encode(userpass));
            let credentials = Credentials::parse(&header).unwrap();
            assert_eq!(credentials.url, url);
            assert_eq!(credentials.header, format!("Basic {}", STANDARD.encode(userpass)));
        }
    }

    #[test]
    fn what_is_no_basic_header_is_nobody() {
        for header in [
            "",
            "Basic",
            "Basic ",
            "Basic !!!",
            "Basic bWU=",
            "Bearer bWU6c2VjcmV0",
            "bWU6c2VjcmV0",
            "Basic bWU6c2VjcmV0AA==",
        ] {
            assert!(Credentials::parse(header).is_none(), "{header}");
        }
    }
}
