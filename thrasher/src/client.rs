//! Sends the requests with ureq, and generates the values. A value is generated from its seed each
//! time it is sent or compared, so a value of any size takes no memory.

use crate::options::{Options, Server};
use base64::prelude::{BASE64_STANDARD, Engine};
use std::io::{self, Read};
use std::{collections::HashMap, sync::Mutex};
use ureq::config::Config;
use ureq::http::{Method, Request, Response, Uri, header, uri::Authority};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use ureq::{Agent, Body, SendBody};

/// The URL of a server, a key or a blob, and the credentials for it.
#[derive(Debug)]
pub struct Target {
    /// Contains no credentials.
    url: String,
    /// The value of the Authorization header.
    authorization: Option<String>,
}

impl Target {
    /// Parses `[http://][user:password@]host[:port]`. `userpass` overrides the URL's credentials.
    pub fn new(url: &str, userpass: Option<&str>) -> Result<Target, String> {
        let scheme = if url.contains("://") { "" } else { "http://" };
        let mut target = Target::from_location(&format!("{scheme}{}", url.trim_end_matches('/')));
        let uri: Uri = target.url.parse().map_err(|e| format!("{url:?}: {e}"))?;
        if uri.scheme_str() != Some("http") || uri.host().is_none() || uri.query().is_some() {
            return Err(format!("{url:?}: expected http://host:port"));
        }
        target.authorization = userpass.map(|u| basic(u.as_bytes())).or(target.authorization);
        Ok(target)
    }

    /// Separates the credentials from a URL and decodes them. ureq would send them percent-encoded.
    fn from_location(url: &str) -> Target {
        let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let Some((userpass, host)) = authority.rsplit_once('@') else {
            return Target { url: url.to_owned(), authorization: None };
        };
        let userpass: Vec<u8> = percent_encoding::percent_decode_str(userpass).collect();
        Target { url: format!("{scheme}://{host}{path}"), authorization: Some(basic(&userpass)) }
    }

    fn at(&self, key: &str) -> Target {
        Target { url: format!("{}{key}", self.url), authorization: self.authorization.clone() }
    }
}

fn basic(userpass: &[u8]) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(userpass))
}

#[derive(Clone, Copy)]
pub enum Operation {
    Write,
    Read,
    Delete,
}

/// The client of one thread. Sharing it would be slow: ureq locks its pool of connections and
/// searches all of it for each request.
pub struct Client<'a> {
    agent: Agent,
    options: &'a Options,
}

impl Client<'_> {
    pub fn new(options: &Options) -> Client<'_> {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_idle_connections(1000)
            .proxy(None)
            .user_agent("thrasher")
            .accept("")
            .accept_encoding("")
            // These timeouts are set once for each connection. With one for the whole request, ureq
            // would set the time left before each read, and start a thread to resolve the host.
            .timeout_connect(Some(options.timeout))
            .timeout_per_read(Some(options.timeout))
            .timeout_per_write(Some(options.timeout))
            .build();
        let agent = Agent::with_parts(config, DefaultConnector::default(), Addresses::default());
        Client { agent, options }
    }

    /// Returns an error if a server does not answer. Any status will do.
    pub fn check_servers(&self) -> Result<(), String> {
        self.options.targets.iter().try_for_each(|target| {
            let answer = self.agent.get(&target.url).call();
            answer.map(drop).map_err(|e| format!("cannot reach {}: {e}", target.url))
        })
    }

    /// Writes the value, or reads and compares it, or deletes it. With `--direct` a write or delete
    /// goes to each volume in turn, and a read to a random one.
    pub fn perform(&self, operation: Operation, key: &str, value: &Value) -> Result<(), String> {
        let mut targets = self.options.targets.iter().map(|target| target.at(key));
        match operation {
            Operation::Write => {
                targets.try_for_each(|t| drain(self.send(Method::PUT, &t, Some(value.clone()), 201)?))
            }
            Operation::Read => {
                let target = fastrand::choice(targets).ok_or("no target")?;
                let blob = match self.options.server {
                    Server::Master => self.redirect(&target)?,
                    Server::Volumes | Server::Filer => target,
                };
                let mut response = self.send(Method::GET, &blob, None, 200)?;
                let compared = value.clone().compare(response.body_mut().as_reader());
                compared.map_err(|e| format!("{}: {e}", blob.url))
            }
            Operation::Delete => targets.try_for_each(|t| drain(self.send(Method::DELETE, &t, None, 204)?)),
        }
    }

    /// Asks the master for the URL of a key's blob.
    fn redirect(&self, target: &Target) -> Result<Target, String> {
        let response = self.send(Method::GET, target, None, 302)?;
        let location = response.headers().get(header::LOCATION).and_then(|l| l.to_str().ok());
        let blob = Target::from_location(location.ok_or("302 without a Location")?);
        drain(response).map(|_| blob)
    }

    /// Sends one request and does not follow redirects. A status other than `expected` is an error,
    /// except that nginx answers 204 to a PUT that overwrites a file.
    fn send(
        &self,
        method: Method,
        target: &Target,
        value: Option<Value>,
        expected: u16,
    ) -> Result<Response<Body>, String> {
        let mut request = Request::builder().method(method).uri(&target.url);
        if let Some(authorization) = &target.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        let mut body = SendBody::none();
        if let Some(value) = value {
            // Without a length, ureq would use chunked encoding.
            request = request.header(header::CONTENT_LENGTH, value.left);
            body = SendBody::from_owned_reader(value);
        }
        let answer = request.body(body).map_err(Into::into).and_then(|r| self.agent.run(r));
        let mut response = answer.map_err(|e| format!("{}: {e}", target.url))?;
        let status = response.status().as_u16();
        if status == expected || status == 204 && self.options.server == Server::Volumes {
            return Ok(response);
        }
        let mut reason = String::new();
        // A body that is cut short or not text does not matter: the status says enough.
        let _ = response.body_mut().as_reader().take(200).read_to_string(&mut reason);
        Err(format!("{}: status {status} {}", target.url, reason.trim().escape_debug()))
    }
}

/// Reads a body to its end, so that ureq can reuse the connection.
fn drain(mut response: Response<Body>) -> Result<(), String> {
    let drained = io::copy(&mut response.body_mut().as_reader(), &mut io::sink());
    drained.map(drop).map_err(|e| e.to_string())
}

/// Caches the addresses of hosts. Without it, ureq would resolve the host for every request, even
/// if it then reuses a connection.
#[derive(Debug, Default)]
struct Addresses(Mutex<HashMap<Authority, ResolvedSocketAddrs>>);

impl Resolver for Addresses {
    fn resolve(&self, uri: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let authority = uri.authority().ok_or(ureq::Error::HostNotFound)?;
        let mut known = self.0.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(addresses) = known.get(authority) {
            return Ok(addresses.clone());
        }
        let addresses = DefaultResolver::default().resolve(uri, config, timeout)?;
        known.insert(authority.clone(), addresses.clone());
        Ok(addresses)
    }
}

/// The unread rest of a value. Its bytes are generated from the seed as they are read.
#[derive(Clone)]
pub struct Value {
    random: fastrand::Rng,
    /// Number of bytes not yet read.
    left: u64,
}

impl Value {
    /// A value of `len` bytes.
    pub fn new(seed: u64, len: u64) -> Value {
        Value { random: fastrand::Rng::with_seed(seed), left: len }
    }

    pub fn len(&self) -> u64 {
        self.left
    }

    /// Returns an error if the reader's bytes differ from this value.
    fn compare(mut self, mut reader: impl Read) -> Result<(), String> {
        let len = self.left;
        // The buffer is larger than a small value, so that surplus bytes are found.
        let mut got = vec![0; (len.min(64 << 10) as usize & !7) + 8];
        let mut expected = got.clone();
        loop {
            let at = len - self.left;
            let mut n = 0;
            while n < got.len() {
                match reader.read(&mut got[n..]).map_err(|e| format!("at {at} of {len}: {e}"))? {
                    0 => break,
                    more => n += more,
                }
            }
            let m = self.read(&mut expected).map_err(|e| e.to_string())?;
            if got[..n] != expected[..m] {
                let same = got[..n].iter().zip(&expected[..m]).take_while(|(a, b)| a == b).count();
                let verb = if same == n {
                    "ends"
                } else if same == m {
                    "goes on"
                } else {
                    "differs"
                };
                return Err(format!("value {verb} at byte {} of {len}", at + same as u64));
            }
            if n == 0 {
                return Ok(());
            }
        }
    }
}

impl Read for Value {
    /// Fills the buffer up to a multiple of 8 bytes, because the generator makes 8 bytes at a time:
    /// the value then does not depend on the sizes of the buffers. A buffer must have at least 8.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.left.min(buffer.len() as u64 & !7);
        self.random.fill(&mut buffer[..n as usize]);
        self.left -= n;
        Ok(n as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(mut value: Value, piece: usize) -> Vec<u8> {
        let (mut bytes, mut buffer) = (Vec::new(), vec![0; piece]);
        loop {
            match value.read(&mut buffer).expect("reading a value cannot fail") {
                0 => return bytes,
                n => bytes.extend(&buffer[..n]),
            }
        }
    }

    #[test]
    fn a_value_does_not_depend_on_the_size_of_the_reads() {
        for len in [1, 8, 25, 65_535, 65_536, 65_537, 200_000] {
            let whole = bytes(Value::new(1, len), 1 << 20);
            assert_eq!(whole.len() as u64, len);
            for piece in [8, 13, 1000, 100_001] {
                assert!(bytes(Value::new(1, len), piece) == whole, "{len} in pieces of {piece}");
            }
        }
    }

    #[test]
    fn values_differ_between_seeds_and_do_not_repeat() {
        let value = bytes(Value::new(1, 128 << 10), 1 << 20);
        assert_ne!(value[..25], bytes(Value::new(2, 25), 32));
        assert_ne!(value[..64 << 10], value[64 << 10..]);
    }

    #[test]
    fn compare_reports_missing_surplus_and_wrong_bytes() {
        for len in [25, 64 << 10, 200_000] {
            let good = bytes(Value::new(1, len), 1 << 20);
            let compare = |bytes: &[u8]| Value::new(1, len).compare(bytes);
            let error = |verb, at| Err(format!("value {verb} at byte {at} of {len}"));
            assert_eq!(compare(&good), Ok(()));
            assert_eq!(compare(&good[..24]), error("ends", 24));
            assert_eq!(compare(&[&good[..], b"x"].concat()), error("goes on", len));
            for wrong in [0, 24, len - 1] {
                let mut bad = good.clone();
                bad[wrong as usize] ^= 1;
                assert_eq!(compare(&bad), error("differs", wrong));
            }
        }
    }

    #[test]
    fn credentials_in_a_location_become_a_header() {
        let plain = Target::from_location("http://volume:3001/sv00/ab/cd/L2Zv@b==");
        assert_eq!(plain.url, "http://volume:3001/sv00/ab/cd/L2Zv@b==");
        assert_eq!(plain.authorization, None);
        let secret = Target::from_location("http://joe:p%40ss%3A@volume:3001/ab/cd/L2Zv");
        assert_eq!(secret.url, "http://volume:3001/ab/cd/L2Zv");
        assert_eq!(secret.authorization, Some(basic(b"joe:p@ss:")));
    }

    #[test]
    fn the_scheme_and_a_trailing_slash_are_optional() {
        for url in ["localhost:3000", "http://localhost:3000/", "joe:x@localhost:3000"] {
            assert_eq!(Target::new(url, None).expect(url).url, "http://localhost:3000");
        }
        let target = Target::new("joe:x@localhost", Some("ann:y")).expect("a good URL");
        assert_eq!(target.authorization, Some(basic(b"ann:y")));
    }
}
