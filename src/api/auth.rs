//! Basic authorization (RFC 7617): the volumes decide which logins are right; the master asks them and caches the
//! answers.

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
use crate::volumes::{Volumes, basic_auth};

/// How long an accepted and a rejected login are cached.
const ACCEPTED: Duration = Duration::from_secs(30);
const REJECTED: Duration = Duration::from_secs(1);

/// The most logins in the cache.
const CACHED_MAX: usize = 10_000;

/// The characters that stay as they are in the user part of a URL: RFC 3986's unreserved ones.
const USER_SET: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A client's credentials.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The value of the `Authorization` header, in its canonical form.
    pub header: String,
    /// `user:pass@`, percent-encoded for a URL.
    pub url: String,
}

impl Credentials {
    /// Parses `user:pass`. `None` if there is no colon, or a control character.
    pub fn new(userpass: &[u8]) -> Option<Credentials> {
        if userpass.iter().any(u8::is_ascii_control) {
            return None;
        }
        let colon = userpass.iter().position(|byte| *byte == b':')?;
        let encoded = |part| percent_encode(part, USER_SET).to_string();
        Some(Credentials {
            header: basic_auth(userpass),
            url: format!("{}:{}@", encoded(&userpass[..colon]), encoded(&userpass[colon + 1..])),
        })
    }

    /// Parses an `Authorization` header. `None` if it is not a valid one of basic authorization.
    pub fn parse(header: &str) -> Option<Credentials> {
        let (scheme, text) = header.split_once(' ')?;
        let userpass = STANDARD.decode(text.trim()).ok()?;
        scheme.eq_ignore_ascii_case("basic").then(|| Credentials::new(&userpass))?
    }
}

/// Asks volumes whether they accept a login, and caches their answers under a salted digest.
pub struct Authenticator {
    volumes: Arc<Volumes>,
    names: Vec<String>,
    salt: [u8; 16],
    cache: Mutex<HashMap<Hash, (Instant, bool)>>,
}

impl Authenticator {
    /// Fails if a volume accepts anonymous requests: it would accept every password.
    pub fn new(volumes: Arc<Volumes>, names: &[String]) -> Result<Authenticator> {
        for name in names {
            if matches!(volumes.check_login(name, None), Ok(true)) {
                return Err(Error::Failed(format!(
                    "-basicauth: volume {name} lets everybody in: start it with AUTH=/path/.htpasswd"
                )));
            }
        }
        let salt = std::array::from_fn(|_| fastrand::u8(..));
        Ok(Authenticator { volumes, names: names.to_vec(), salt, cache: Mutex::default() })
    }

    /// The credentials of an `Authorization` header, or `Unauthorized` if the volumes reject them.
    pub fn login(&self, header: Option<&str>) -> Result<Credentials> {
        let credentials = header.and_then(Credentials::parse).ok_or(Error::Unauthorized)?;
        let accepted = match self.cached(&credentials) {
            Some(accepted) => accepted,
            None => self.ask(&credentials)?,
        };
        if accepted { Ok(credentials) } else { Err(Error::Unauthorized) }
    }

    fn cached(&self, credentials: &Credentials) -> Option<bool> {
        let cache = lock(&self.cache);
        let (at, accepted) = cache.get(&self.digest(credentials))?;
        (at.elapsed() < if *accepted { ACCEPTED } else { REJECTED }).then_some(*accepted)
    }

    /// Asks one volume, and the next one if it does not answer.
    fn ask(&self, credentials: &Credentials) -> Result<bool> {
        let mut failed = Error::Unavailable("no volume answers to check the login".into());
        for name in self.volumes.shuffled(&self.names) {
            match self.volumes.check_login(&name, Some(&credentials.header)) {
                // Ignore volumes that also accept anonymous requests.
                Ok(true) if matches!(self.volumes.check_login(&name, None), Ok(true)) => {
                    log::error!("volume {name} lets everybody in: start it with AUTH=/path/.htpasswd");
                }
                Ok(accepted) => {
                    let mut cache = lock(&self.cache);
                    if cache.len() >= CACHED_MAX {
                        cache.clear();
                    }
                    cache.insert(self.digest(credentials), (Instant::now(), accepted));
                    return Ok(accepted);
                }
                Err(error) => failed = Error::Unavailable(error.to_string()),
            }
        }
        Err(failed)
    }

    /// Drops a login from the cache, because a volume has just rejected it.
    pub fn forget(&self, credentials: &Credentials) {
        lock(&self.cache).remove(&self.digest(credentials));
    }

    fn digest(&self, credentials: &Credentials) -> Hash {
        Md5::new().chain_update(self.salt).chain_update(&credentials.header).finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unusual_credentials_are_encoded() {
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
    fn other_headers_are_no_credentials() {
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
