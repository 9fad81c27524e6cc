//! The volumes: nginx servers that hold the blobs as plain files.
//!
//! `Volumes` has a verb for each thing that mkv asks of them: HEAD, PUT, DELETE, listings, reading a
//! blob, and how full the disks are. The verbs that go to several replicas reach them at the same time from the
//! caller's thread, through `client`; a single blob is read with ureq, which only this file and `remote.rs` name.
//! Addresses and idle connections are kept for each volume, and so is whether it answered when last
//! asked.
//!
//! With `-secret` every request is signed: `secret.rs` has the rule, and `Volume::target` calls it.
//!
//! Every verb ends: after -voltimeout (HEAD), 10 s (DELETE), or 60 s without progress. An error names
//! its volume and says whether the volume may yet do what it was asked.
//!
//! This room does not know what is stored: no key, record or debris. It retries nothing but a request
//! whose idle connection was closed and a listing that was cut short.

pub mod autoindex;
mod client;
mod links;
pub mod remote;
pub mod secret;
pub mod space;
pub mod upload;

use std::collections::HashMap;
use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use md5::{Digest, Md5};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{NextTimeout, TcpConnector};
use ureq::{Agent, Body, http};

use crate::error::{Error, Result};
use crate::format::record::{Hash, volume_of};
use crate::histogram::Histogram;
use crate::threads::{Pool, lock};
use autoindex::Entry;
use client::{Call, Connections, NO_BODY, Response, STALL};
use secret::Secret;
use space::{Disk, Space};
use upload::CHUNK;

/// How long a volume may take for a DELETE.
const DELETE: Duration = Duration::from_secs(10);

/// How long a volume that gave no answer is asked last.
const DOWN: Duration = Duration::from_secs(3);

/// The Authorization header to send to a volume, if any.
pub type Auth<'a> = Option<&'a str>;

pub struct Volumes {
    timeout: Duration,
    /// Signs all requests and links; `None`: the volumes answer without a signature.
    secret: Option<Arc<Secret>>,
    known: RwLock<HashMap<String, Arc<Volume>>>,
    pub pool: Pool,
}

struct Volume {
    connections: Arc<Connections>,
    agent: Agent,
    secret: Option<Arc<Secret>>,
    /// When the volume last gave no answer; `None`: it answers.
    down: Mutex<Option<Instant>>,
    latency: Mutex<Histogram>,
    space: Mutex<Space>,
}

/// The state of a volume that was asked for something.
pub struct Snapshot {
    pub name: String,
    /// Whether it answered when last asked.
    pub up: bool,
    /// From a request to its response.
    pub latency: Histogram,
}

impl Volumes {
    /// `timeout`: how long a HEAD, or a connection, may take.
    pub fn new(timeout: Duration, secret: Option<Secret>) -> Arc<Volumes> {
        let (known, secret) = (RwLock::default(), secret.map(Arc::new));
        Arc::new(Volumes { timeout, secret, known, pool: Pool::default() })
    }

    fn volume(&self, replica: &str) -> Arc<Volume> {
        let name = volume_of(replica);
        if let Some(volume) = self.known.read().unwrap_or_else(|e| e.into_inner()).get(name) {
            return volume.clone();
        }
        let connections = Arc::new(Connections::new(name, self.timeout));
        let agent = agent(connections.clone(), self.timeout, STALL);
        let (secret, (down, latency, space)) = (self.secret.clone(), Default::default());
        let volume = Arc::new(Volume { connections, agent, secret, down, latency, space });
        let mut known = self.known.write().unwrap_or_else(|e| e.into_inner());
        known.entry(name.to_string()).or_insert(volume).clone()
    }

    pub fn snapshot(&self) -> Vec<Snapshot> {
        let known = self.known.read().unwrap_or_else(|e| e.into_inner());
        let snapshot = |(name, volume): (&String, &Arc<Volume>)| Snapshot {
            name: name.clone(),
            up: lock(&volume.down).is_none(),
            latency: lock(&volume.latency).clone(),
        };
        known.iter().map(snapshot).collect()
    }

    /// Whether the volume of this replica gave no answer in the last 3 s.
    pub fn is_down(&self, replica: &str) -> bool {
        self.volume(replica).is_down()
    }

    /// Replicas in random order, those on volumes that are down last.
    pub fn shuffled(&self, replicas: &[String]) -> Vec<String> {
        let mut order: Vec<(bool, u32, &String)> =
            replicas.iter().map(|r| (self.is_down(r), fastrand::u32(..), r)).collect();
        order.sort();
        order.into_iter().map(|(_, _, replica)| replica.clone()).collect()
    }

    /// Sends a request without a body to several replicas at the same time. The body of a GET's 200
    /// is collected in memory.
    fn ask(&self, method: &str, replicas: &[&str], path: &str, auth: Auth) -> Vec<Result<Response>> {
        let limit = match method {
            "GET" => STALL,
            "DELETE" => DELETE,
            _ => self.timeout,
        };
        self.ask_within(limit, method, replicas, |volume, replica| volume.target(method, replica, path), auth)
    }

    /// The same within this time, with the target that `target` makes for each replica.
    fn ask_within(
        &self,
        limit: Duration,
        method: &str,
        replicas: &[&str],
        target: impl Fn(&Volume, &str) -> String,
        auth: Auth,
    ) -> Vec<Result<Response>> {
        let begun = Instant::now();
        let volumes: Vec<_> = replicas.iter().map(|replica| self.volume(replica)).collect();
        let targets = replicas.iter().zip(&volumes);
        let call = |(replica, volume): (&&str, &Arc<Volume>)| volume.call(method, &target(volume, replica), auth, "");
        let mut calls: Vec<_> = targets.map(call).collect();
        for call in &mut calls {
            call.send(NO_BODY, true);
        }
        client::await_all(&mut calls, NO_BODY, begun + limit, limit);
        let answer = |((call, volume), replica): ((Call, &Arc<Volume>), &&str)| {
            let outcome = call.outcome.unwrap_or_else(|| Err(ErrorKind::TimedOut.into()));
            volume.note(replica, begun.elapsed(), outcome.as_ref().err());
            outcome.map_err(|e| Error::Unreachable {
                volume: replica.to_string(),
                why: e.to_string(),
                // nginx deletes before it answers: once the connection has ended, the blob is
                // either gone or stays.
                maybe_done: call.sent_whole && e.kind() == ErrorKind::TimedOut,
            })
        };
        calls.into_iter().zip(&volumes).zip(replicas).map(answer).collect()
    }

    /// The length in bytes of the blob on this replica; `None`: it is not there.
    pub fn head(&self, replica: &str, path: &str, auth: Auth) -> Result<Option<u64>> {
        match self.ask("HEAD", &[replica], path, auth).remove(0)? {
            Response { status: 200, length: Some(length), .. } => Ok(Some(length)),
            Response { status: 200, .. } => Err(unreachable(replica, "its HEAD has no Content-Length")),
            // 301: a folder.
            Response { status: 301 | 404, .. } => Ok(None),
            Response { status, .. } => Err(Error::Refused { volume: replica.into(), status }),
        }
    }

    /// An error where two of these volumes, or volumes of these replicas, are one server under two
    /// names: two replicas would then be one file, and deleting one would delete both.
    pub fn check_distinct<'a>(&self, replicas: impl Iterator<Item = &'a String>) -> Result<()> {
        let mut known: HashMap<SocketAddr, &str> = HashMap::new();
        for replica in replicas {
            let name = volume_of(replica);
            // A name that does not resolve now cannot be asked for anything either.
            let addresses = self.volume(name).connections.addresses().unwrap_or_default();
            for mut address in addresses {
                address.set_ip(address.ip().to_canonical());
                let other = known.insert(address, name).filter(|other| *other != name);
                if let Some(other) = other {
                    return Err(Error::Failed(format!(
                        "{other} and {name} are names of one server, {address}: a volume has one name, which is changed by mkv rebuild"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Whether the volume accepts this Authorization header, or requests without one, and the
    /// signature of a master with `-secret`.
    pub fn accepts_login(&self, volume: &str, auth: Auth) -> Result<bool> {
        match self.ask("HEAD", &[volume], "/", auth).remove(0)?.status {
            200 => Ok(true),
            401 | 403 => Ok(false),
            status => Err(Error::Refused { volume: volume.into(), status }),
        }
    }

    /// The disks of each of these volumes, read at most every 10 s; empty where they are not known.
    pub fn disks(&self, names: &[String], auth: Auth) -> Vec<Arc<Vec<Disk>>> {
        let due = |name: &&String| lock(&self.volume(name).space).begin();
        let due: Vec<&str> = names.iter().filter(due).map(String::as_str).collect();
        let target = |volume: &Volume, replica: &str| volume.target("GET", replica, space::PATH);
        let answers = self.ask_within(self.timeout, "GET", &due, target, auth);
        for (name, answer) in due.iter().zip(answers) {
            if let Ok(Response { status: 200, body, .. }) = answer {
                lock(&self.volume(name).space).read(&body);
            }
        }
        names.iter().map(|name| lock(&self.volume(name).space).disks()).collect()
    }

    /// Deletes a blob. `true`: it was there and is gone; `false`: it was not there.
    pub fn delete(&self, replica: &str, path: &str, auth: Auth) -> Result<bool> {
        self.delete_all(&[replica.to_string()], path, true, auth).remove(0)
    }

    /// Deletes a blob from several replicas at the same time. `patient`: also asks volumes that are
    /// down; otherwise they count as unreachable.
    pub fn delete_all(&self, replicas: &[String], path: &str, patient: bool, auth: Auth) -> Vec<Result<bool>> {
        let asked = |replica: &&String| patient || !self.is_down(replica);
        let asked: Vec<&str> = replicas.iter().filter(asked).map(String::as_str).collect();
        let mut answers = self.ask("DELETE", &asked, path, auth).into_iter();
        let outcome = |replica: &String| {
            let answer = if asked.contains(&replica.as_str()) { answers.next() } else { None };
            match answer.unwrap_or_else(|| Err(unreachable(replica, "it gave none just now")))?.status {
                200..=299 => Ok(true),
                // 409: the path leads below a plain file.
                404 | 409 => Ok(false),
                status => Err(Error::Refused { volume: replica.into(), status }),
            }
        };
        replicas.iter().map(outcome).collect()
    }

    /// An error if one of these volumes gave no answer when last asked, and still gives none. So no
    /// upload begins that would wait for it.
    pub fn check_silent(&self, replicas: &[String], auth: Auth) -> Result<()> {
        for replica in replicas {
            let silent = lock(&self.volume(replica).down).is_some();
            if silent && let Err(e @ Error::Unreachable { .. }) = self.accepts_login(replica, auth) {
                return Err(e);
            }
        }
        Ok(())
    }

    /// Sends a GET with ureq. It is sent again where a pooled connection fails on its first use: the
    /// volume may have closed it in the meantime.
    fn get(&self, replica: &str, path: &str, range: Option<(u64, u64)>, auth: Auth) -> Result<http::Response<Body>> {
        let volume = self.volume(replica);
        let begun = Instant::now();
        let send = || {
            let target = volume.target("GET", replica, path);
            let request = volume.agent.get(format!("http://{}{target}", volume_of(replica)));
            let request = match auth {
                Some(auth) => request.header("authorization", auth),
                None => request,
            };
            match range {
                Some((first, last)) => request.header("range", format!("bytes={first}-{last}")),
                None => request,
            }
            .call()
        };
        let answer = match send() {
            Err(ureq::Error::Io(e)) if e.kind() != ErrorKind::ConnectionRefused => send(),
            answer => answer,
        };
        let answer = answer.map_err(ureq::Error::into_io);
        volume.note(replica, begun.elapsed(), answer.as_ref().err());
        answer.map_err(|e| {
            volume.connections.forget_addresses();
            unreachable(replica, &e.to_string())
        })
    }

    /// Opens a blob to read it. `None`: it is not there.
    pub fn read(&self, replica: &str, path: &str, auth: Auth) -> Result<Option<Opened>> {
        self.read_range(replica, path, None, auth)
    }

    /// The same from the first byte of a range to its last one, inclusive.
    pub fn read_range(
        &self,
        replica: &str,
        path: &str,
        range: Option<(u64, u64)>,
        auth: Auth,
    ) -> Result<Option<Opened>> {
        let answer = self.get(replica, path, range, auth)?;
        match answer.status().as_u16() {
            // A volume that ignores ranges would send the whole blob: its length tells.
            200 | 206 => {
                Opened::new(answer).map(Some).ok_or_else(|| unreachable(replica, "its GET has no Content-Length"))
            }
            301 | 404 => Ok(None),
            status => Err(Error::Refused { volume: replica.into(), status }),
        }
    }

    /// The md5 of a blob and its length in bytes. `None`: it is not there.
    pub fn digest(&self, replica: &str, path: &str, auth: Auth) -> Result<Option<(Hash, u64)>> {
        let Some(mut blob) = self.read(replica, path, auth)? else { return Ok(None) };
        let mut md5 = Md5::new();
        let mut chunk = vec![0; CHUNK];
        loop {
            match blob.body.read(&mut chunk) {
                Ok(0) => return Ok(Some((md5.finalize().into(), blob.length))),
                Ok(n) => md5.update(&chunk[..n]),
                Err(e) => return Err(unreachable(replica, &e.to_string())),
            }
        }
    }

    /// Lists a folder of several replicas; `folder` is a path that ends in `/`. nginx hides names
    /// that begin with a dot, and cuts a listing short when a file vanishes while it is made: then it
    /// is asked again.
    pub fn list(&self, replicas: &[&str], folder: &str, auth: Auth) -> Vec<Result<Vec<Entry>>> {
        let read = |replica: &str, answer: Result<Response>| match answer? {
            Response { status: 200, body, .. } => {
                autoindex::parse(&body).map_err(|e| unreachable(replica, &format!("its listing is no JSON: {e}")))
            }
            Response { status, .. } => Err(Error::Refused { volume: replica.into(), status }),
        };
        let listing = |(replica, answer): (&&str, Result<Response>)| {
            let mut listing = read(replica, answer);
            for attempt in 1..5 {
                if listing.is_err() {
                    std::thread::sleep(Duration::from_millis(attempt * attempt * 50));
                    listing = read(replica, self.ask("GET", &[replica], folder, auth).remove(0));
                }
            }
            listing
        };
        replicas.iter().zip(self.ask("GET", replicas, folder, auth)).map(listing).collect()
    }

    /// Whether there are folders of blobs on a volume or its subvolumes.
    pub fn has_blobs(&self, volume: &str, auth: Auth) -> Result<bool> {
        let mut places = vec![volume.to_string()];
        while let Some(place) = places.pop() {
            for entry in self.list(&[&place], "/", auth).remove(0)? {
                if autoindex::is_hex_folder(&entry) {
                    return Ok(true);
                }
                if place == volume && autoindex::is_subvolume(&entry) {
                    places.push(format!("{volume}/{}", entry.name));
                }
            }
        }
        Ok(false)
    }
}

/// The `Authorization` header for `user:pass` (RFC 7617).
pub fn basic_auth(userpass: &[u8]) -> String {
    format!("Basic {}", STANDARD.encode(userpass))
}

/// A blob that is being read.
pub struct Opened {
    /// Bytes.
    pub length: u64,
    /// The file's mtime, in seconds since 1970.
    pub time: Option<u64>,
    /// Ends in an error where the volume ends it before `length`.
    pub body: Box<dyn Read + Send>,
}

impl Opened {
    fn new(answer: http::Response<Body>) -> Option<Opened> {
        let header = |name| answer.headers().get(name)?.to_str().ok();
        let length = header("content-length")?.parse().ok()?;
        let time = header("last-modified").and_then(autoindex::http_date);
        Some(Opened { length, time, body: Box::new(answer.into_body().into_reader()) })
    }
}

impl Volume {
    /// The target of a request for a path of a replica, signed for this method.
    fn target(&self, method: &str, replica: &str, path: &str) -> String {
        let target = Target(replica, path);
        let signature = self.secret.as_ref().map(|secret| secret.query(method, &target, secret::OWN));
        format!("{target}{}", signature.unwrap_or_default())
    }

    /// `lines`: headers beside Host and Authorization, each with its end.
    fn call(&self, method: &str, target: &str, auth: Auth, lines: &str) -> Call {
        let auth = auth.map_or(String::new(), |auth| format!("Authorization: {auth}\r\n"));
        Call::new(&self.connections, method, target, format_args!("{lines}{auth}"))
    }

    fn is_down(&self) -> bool {
        lock(&self.down).is_some_and(|since| since.elapsed() < DOWN)
    }

    /// Remembers whether the volume answered, and after what time. Logs each change.
    fn note(&self, replica: &str, time: Duration, error: Option<&io::Error>) {
        lock(&self.latency).observe(time);
        let mut down = lock(&self.down);
        match (error, &*down) {
            (Some(e), None) => log::warn!("volume {replica} gives no answer: {e}"),
            (None, Some(_)) => log::warn!("volume {replica} answers again"),
            _ => {}
        }
        *down = error.map(|_| Instant::now());
    }
}

/// A replica and a path below it, as the path of a URL.
struct Target<'a>(&'a str, &'a str);

impl fmt::Display for Target<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Target(replica, path) = self;
        write!(f, "{}{path}", &replica[volume_of(replica).len()..])
    }
}

fn unreachable(replica: &str, why: &str) -> Error {
    Error::Unreachable { volume: replica.into(), why: why.into(), maybe_done: false }
}

/// ureq's agent for one volume. By default ureq follows redirects, takes a status of 400 and above for
/// an error, and keeps 3 idle connections.
fn agent(connections: Arc<Connections>, timeout: Duration, stall: Duration) -> Agent {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .proxy(None)
        .user_agent("mkv")
        .timeout_connect(Some(timeout))
        .timeout_per_read(Some(stall))
        .max_idle_connections(64)
        .max_idle_connections_per_host(64)
        .max_idle_age(Duration::from_secs(50))
        .build();
    Agent::with_parts(config, TcpConnector::default(), KnownAddresses(connections))
}

/// ureq resolves the host before every request, with a timeout on a new thread. This resolver
/// remembers the addresses.
#[derive(Debug)]
struct KnownAddresses(Arc<Connections>);

impl Resolver for KnownAddresses {
    fn resolve(
        &self,
        _: &http::Uri,
        _: &ureq::config::Config,
        _: NextTimeout,
    ) -> std::result::Result<ResolvedSocketAddrs, ureq::Error> {
        let mut addresses = self.empty();
        self.0.addresses()?.into_iter().take(16).for_each(|address| addresses.push(address));
        Ok(addresses)
    }
}
