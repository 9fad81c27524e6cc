//! The URL of the database, as `-db` gives it:
//!
//! ```text
//! postgres://user:password@host:port,host:port/database?sslmode=verify-full&sslrootcert=FILE&conns=32&lease=15&late=3600
//! ```
//!
//! The password may come from PGPASSWORD instead, since `ps` shows flags. The first host that takes writes is used.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use percent_encoding::percent_decode_str;

use crate::error::{Error, Result};

const PORT: &str = "5432";

#[derive(Clone)]
pub struct Url {
    /// `host:port` of each server.
    pub hosts: Vec<String>,
    pub user: String,
    pub password: String,
    pub database: String,
    /// Whether to connect with TLS and to check the server's certificate and name.
    pub tls: bool,
    /// A PEM file with the certificates to trust; by default those of the system.
    pub root: Option<PathBuf>,
    /// The most connections.
    pub connections: usize,
    /// A master whose session was not renewed for this long counts as dead.
    pub lease: Duration,
    /// How long a request without an answer may still be carried out by a volume.
    pub late: Duration,
}

impl Url {
    /// Whether `-db` is a URL, and not a folder.
    pub fn is_url(text: &str) -> bool {
        text.starts_with("postgres://") || text.starts_with("postgresql://")
    }

    /// Parses a URL. `password`: the one to use if the URL has none.
    pub fn parse(text: &str, password: Option<String>) -> Result<Url> {
        let wrong =
            |why: &str| Error::Usage(format!("-db: {why}: write postgres://user@host:5432,host2:5432/database"));
        let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let (_, rest) = text.split_once("://").ok_or_else(|| wrong("this is no URL"))?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (server, database) =
            rest.split_once('/').filter(|(_, name)| !name.is_empty()).ok_or_else(|| wrong("it names no database"))?;
        let (login, hosts) = server.rsplit_once('@').ok_or_else(|| wrong("it names no user"))?;
        let (user, given) = login.split_once(':').unwrap_or((login, ""));
        let password = if given.is_empty() { password.unwrap_or_default() } else { decode(given) };
        let hosts: Vec<String> = hosts.split(',').map(with_port).collect();
        if user.is_empty() || hosts.iter().any(|host| host.is_empty() || host.starts_with(':')) {
            return Err(wrong("user or host is missing"));
        }
        let mut url = Url {
            hosts,
            user: decode(user),
            password,
            database: decode(database),
            tls: true,
            root: None,
            connections: 32,
            lease: Duration::from_secs(15),
            late: Duration::from_secs(3600),
        };
        for option in query.split('&').filter(|option| !option.is_empty()) {
            url.set(option.split_once('=').unwrap_or((option, ""))).ok_or_else(|| {
                let all = "sslmode=disable or verify-full, sslrootcert=FILE, conns=N, lease=SECONDS, late=SECONDS";
                Error::Usage(format!("-db: {option}: expected {all}"))
            })?;
        }
        Ok(url)
    }

    fn set(&mut self, option: (&str, &str)) -> Option<()> {
        let seconds = |text: &str| text.trim_end_matches('s').parse().ok().filter(|n| (1..=86400).contains(n));
        match option {
            ("sslmode", "disable") => self.tls = false,
            ("sslmode", "verify-full") => self.tls = true,
            ("sslrootcert", file) => self.root = Some(percent_decode_str(file).decode_utf8().ok()?.into_owned().into()),
            ("conns", count) => self.connections = count.parse().ok().filter(|n| (2..=1000).contains(n))?,
            ("lease", text) => self.lease = Duration::from_secs(seconds(text)?),
            ("late", text) => self.late = Duration::from_secs(seconds(text)?),
            _ => return None,
        }
        Some(())
    }
}

/// The URL without its user and password.
impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "postgres://{}/{}", self.hosts.join(","), self.database)
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

fn with_port(host: &str) -> String {
    let has_port = host.rsplit_once(':').is_some_and(|(name, port)| !port.ends_with(']') && !name.is_empty());
    if has_port || host.is_empty() { host.to_string() } else { format!("{host}:{PORT}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_a_user_hosts_and_a_database() {
        let url = Url::parse("postgres://me:p%40ss@a,b:7,[::1],[::1]:9/x%2Fy?sslmode=disable&lease=2s&conns=4", None)
            .unwrap();
        assert_eq!(url.hosts, ["a:5432", "b:7", "[::1]:5432", "[::1]:9"]);
        assert_eq!((&*url.user, &*url.password, &*url.database), ("me", "p@ss", "x/y"));
        assert_eq!((url.tls, url.connections, url.lease.as_secs(), url.late.as_secs()), (false, 4, 2, 3600));
        assert_eq!(format!("{url:?}"), "postgres://a:5432,b:7,[::1]:5432,[::1]:9/x/y");
        let url = Url::parse("postgresql://me@a/x", Some("secret".into())).unwrap();
        assert!(url.tls && url.password == "secret" && Url::is_url("postgresql://me@a/x") && !Url::is_url("/x"));
    }

    #[test]
    fn a_wrong_url_is_an_error() {
        for text in ["postgres://a/x", "postgres://me@a", "postgres://me@a/", "postgres://me@/x", "postgres://@a/x"] {
            assert!(Url::parse(text, None).is_err(), "{text}");
        }
        for option in ["sslmode=require", "lease=0", "conns=1", "x=1", "lease=soon"] {
            assert!(Url::parse(&format!("postgres://me@a/x?{option}"), None).is_err(), "{option}");
        }
    }
}
