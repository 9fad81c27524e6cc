//! The volumes: requests to nginx. The only file that names ureq.
//!
//! What ureq would do if it were let, and what is done about it here:
//! - it resolves the host before every request, with a timeout on a thread made for that: each
//!   volume has an agent of its own, whose connector resolves when it connects and remembers;
//! - it sets socket timeouts for every read and probes a connection with three system calls: `Wire`
//!   polls instead, and looks once before a connection is used again;
//! - while a body is sent it does not listen: `Wire` looks for an early answer before each write;
//! - a body that ends early makes it spin, or end a chunked body as if it were whole: `Feed` ends
//!   in an error, never in an early end;
//! - it follows redirects, calls a 404 an error and keeps 3 connections: settings, below.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use md5::{Digest, Md5};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, recv};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport,
};
use ureq::{Agent, Body, SendBody, http};

use crate::error::{Error, Result};
use crate::listing::{self, Entry};
use crate::metrics::{Histogram, head};
use crate::pool::{Job, Pool};
use crate::record::Hash;

/// An upload's unit of work; four of them are under way at most, so an upload takes 1 MiB.
pub const CHUNK: usize = 256 << 10;

/// How long a volume may take for the next step of a transfer, and for its answer to a PUT: nginx
/// can be silent for long while the disk writes back.
const STALL: Duration = Duration::from_secs(60);

/// How long a volume may take for a DELETE.
const DELETE: Duration = Duration::from_secs(10);

/// For how long a volume that gave no answer is asked last.
const DOWN: Duration = Duration::from_secs(3);

/// For how long a resolved address is used.
const RESOLVED: Duration = Duration::from_secs(60);

pub struct Volumes {
    timeout: Duration,
    known: RwLock<HashMap<String, Arc<Volume>>>,
    pub pool: Pool,
}

struct Volume {
    agent: Agent,
    /// When the volume last gave no answer; `None`: it answers.
    down: Mutex<Option<Instant>>,
    latency: Mutex<Histogram>,
}

/// A value on its way from a client.
pub struct Value<'a> {
    /// Ends in `Ok(0)` only at the value's true end.
    pub body: &'a mut dyn Read,
    /// Bytes, where the client said so.
    pub length: Option<u64>,
    /// The digest that the client gave.
    pub expected: Option<Hash>,
    /// Whether to compute the digest where none is expected.
    pub md5sum: bool,
    /// Seconds since 1970.
    pub time: u64,
}

/// What was stored on every replica.
#[derive(Debug)]
pub struct Stored {
    pub size: u64,
    pub hash: Option<Hash>,
}

/// Why a PUT failed, and where its blob may appear later all the same.
#[derive(Debug)]
pub struct PutFailed {
    pub error: Error,
    pub late: Vec<String>,
}

impl Volumes {
    /// `timeout`: how long a HEAD, or a connection, may take.
    pub fn new(timeout: Duration) -> Arc<Volumes> {
        Arc::new(Volumes { timeout, known: RwLock::default(), pool: Pool::new(usize::MAX) })
    }

    fn volume(&self, replica: &str) -> Arc<Volume> {
        let name = replica.split('/').next().unwrap_or(replica);
        if let Some(volume) = self.known.read().unwrap_or_else(|e| e.into_inner()).get(name) {
            return volume.clone();
        }
        let volume = Arc::new(Volume {
            agent: agent(name, self.timeout),
            down: Mutex::default(),
            latency: Mutex::default(),
        });
        let mut known = self.known.write().unwrap_or_else(|e| e.into_inner());
        known.entry(name.to_string()).or_insert(volume).clone()
    }

    /// What is known of each volume that was asked for something, as Prometheus text.
    pub fn write_metrics(&self, text: &mut String) {
        let known = self.known.read().unwrap_or_else(|e| e.into_inner());
        head(
            text,
            "mkv_volume_up",
            "gauge",
            "Whether the volume gave an answer when it was last asked.",
        );
        for (name, volume) in &*known {
            let up = volume.down.lock().unwrap_or_else(|e| e.into_inner()).is_none();
            text.push_str(&format!("mkv_volume_up{{volume=\"{name}\"}} {}\n", up as u8));
        }
        head(
            text,
            "mkv_volume_seconds",
            "histogram",
            "From a request to a volume to its answer's head.",
        );
        for (name, volume) in &*known {
            let latency = volume.latency.lock().unwrap_or_else(|e| e.into_inner());
            latency.write(text, "mkv_volume_seconds", &format!("volume=\"{name}\""));
        }
    }

    /// Replicas in random order; those on volumes that were silent just now come last.
    pub fn shuffled(&self, replicas: &[String]) -> Vec<String> {
        let mut order: Vec<(bool, u32, &String)> =
            replicas.iter().map(|r| (self.volume(r).is_down(), fastrand::u32(..), r)).collect();
        order.sort();
        order.into_iter().map(|(_, _, replica)| replica.clone()).collect()
    }

    /// The length in bytes of the blob on this replica; `None`: it is not there.
    pub fn head(&self, replica: &str, path: &str, auth: Option<&str>) -> Result<Option<u64>> {
        let answer = self.ask(replica, self.timeout, |agent| {
            let request = agent.head(url(replica, path));
            with_auth(request, auth).config().timeout_global(Some(self.timeout)).build().call()
        })?;
        match answer.status().as_u16() {
            200 => match length_of(&answer) {
                Some(length) => Ok(Some(length)),
                None => Err(unreachable(replica, "its HEAD has no Content-Length")),
            },
            // 301: a folder.
            301 | 404 => Ok(None),
            status => Err(Error::Refused { volume: replica.into(), status }),
        }
    }

    /// Whether the volume lets in who shows this, or nothing.
    pub fn admits(&self, volume: &str, auth: Option<&str>) -> Result<bool> {
        let answer = self.ask(volume, self.timeout, |agent| {
            let request = agent.head(url(volume, "/"));
            with_auth(request, auth).config().timeout_global(Some(self.timeout)).build().call()
        })?;
        match answer.status().as_u16() {
            200 => Ok(true),
            401 | 403 => Ok(false),
            status => Err(Error::Refused { volume: volume.into(), status }),
        }
    }

    /// Deletes a blob. `true`: it was there and is gone; `false`: it was not there.
    pub fn delete(&self, replica: &str, path: &str, auth: Option<&str>) -> Result<bool> {
        let answer = self.ask(replica, DELETE, |agent| {
            let request = agent.delete(url(replica, path));
            with_auth(request, auth).config().timeout_global(Some(DELETE)).build().call()
        })?;
        match answer.status().as_u16() {
            200..=299 => Ok(true),
            // 409: the path leads below a plain file.
            404 | 409 => Ok(false),
            status => Err(Error::Refused { volume: replica.into(), status }),
        }
    }

    /// Deletes a blob from several replicas at the same time. `patient`: asks a volume that gave no
    /// answer just now too.
    pub fn delete_all(
        self: &Arc<Self>,
        replicas: &[String],
        path: &str,
        patient: bool,
        auth: Option<&str>,
    ) -> Vec<Result<bool>> {
        let (this, path, auth) = (self.clone(), path.to_string(), auth.map(String::from));
        self.pool.each(replicas.to_vec(), move |replica| {
            if !patient && this.volume(&replica).is_down() {
                return Err(unreachable(&replica, "it gave none just now"));
            }
            this.delete(&replica, &path, auth.as_deref())
        })
    }

    /// An error if one of these volumes gave no answer when it was last asked, and still gives none:
    /// no upload is begun that would wait for it.
    pub fn check_silent(&self, replicas: &[String], auth: Option<&str>) -> Result<()> {
        for replica in replicas {
            let volume = self.volume(replica);
            let silent = volume.down.lock().unwrap_or_else(|e| e.into_inner()).is_some();
            if silent && let Err(error @ Error::Unreachable { .. }) = self.admits(replica, auth) {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Sends a request that may be sent again: a pooled connection that nginx has closed in the
    /// meantime fails on its first use.
    fn ask(
        &self,
        replica: &str,
        limit: Duration,
        send: impl Fn(&Agent) -> std::result::Result<http::Response<Body>, ureq::Error>,
    ) -> Result<http::Response<Body>> {
        let volume = self.volume(replica);
        let begun = Instant::now();
        let answer = match send(&volume.agent) {
            Err(ureq::Error::Io(e))
                if e.kind() != io::ErrorKind::ConnectionRefused && begun.elapsed() < limit =>
            {
                send(&volume.agent)
            }
            answer => answer,
        };
        volume.note(replica, begun.elapsed(), answer.as_ref().err());
        answer.map_err(|e| failure(replica, e))
    }

    /// Streams a value to all replicas at the same time. When this returns an error, no replica gets
    /// the rest of it.
    ///
    /// The end of the value goes out only when it is known to be what the client said it would be:
    /// nginx publishes a file when its body is complete.
    pub fn put(
        &self,
        replicas: &[String],
        path: &str,
        value: Value,
        auth: Option<&str>,
    ) -> std::result::Result<Stored, PutFailed> {
        let early = |error| PutFailed { error, late: Vec::new() };
        let mut source = Source::new(value);
        let first = source.next().map_err(early)?.ok_or_else(|| early(Error::NoValue))?;
        // A short value's length is known now, whatever the client said.
        let length = if source.ended { Some(source.size) } else { source.value.length };
        let date =
            httpdate::fmt_http_date(std::time::UNIX_EPOCH + Duration::from_secs(source.value.time));
        let (done, results) = bounded(replicas.len());
        let mut feeds = Vec::new();
        for replica in replicas {
            let (feed, chunks) = bounded::<Option<Arc<Vec<u8>>>>(1);
            let feeder = Feed {
                chunks,
                current: first.clone(),
                at: 0,
                left: length,
                used: 0,
                whole: false,
                stopped: false,
            };
            let sending = Sending {
                volume: self.volume(replica),
                url: url(replica, path),
                replica: replica.clone(),
                length,
                date: date.clone(),
                auth: auth.map(String::from),
                feed: feeder,
            };
            let done = done.clone();
            let job = Box::new(move || drop(done.send((sending.replica.clone(), sending.run()))));
            feeds.push(feed);
            // A value of one chunk needs nobody to feed it, so the last replica is this thread's own.
            let own = source.ended && feeds.len() == replicas.len();
            if let Err(job) = if own { Err(job as Job) } else { self.pool.run(job) } {
                if !own {
                    return Err(early(Error::Unavailable(
                        "no thread is free: try again later".into(),
                    )));
                }
                job();
            }
        }
        drop(done);
        let fed = if source.ended { Ok(()) } else { feed_all(&mut source, feeds) };
        let whole = matches!(fed, Ok(()) | Err(None)) && source.ended;
        let Outcome { error, late } = gather(results, replicas, whole);
        let error = match (fed, error) {
            (Ok(()), None) => return Ok(source.stored()),
            (Err(Some(error)), _) | (_, Some(error)) => error,
            (Err(None), None) => Error::Unavailable("the upload was stopped: try again".into()),
        };
        Err(PutFailed { error, late })
    }

    /// Opens a blob to read it. `None`: it is not there.
    pub fn read(&self, replica: &str, path: &str, auth: Option<&str>) -> Result<Option<Opened>> {
        let answer = self
            .ask(replica, STALL, |agent| with_auth(agent.get(url(replica, path)), auth).call())?;
        match answer.status().as_u16() {
            200 => {
                let length = length_of(&answer)
                    .ok_or_else(|| unreachable(replica, "its GET has no Content-Length"))?;
                let time = answer
                    .headers()
                    .get("last-modified")
                    .and_then(|at| listing::http_date(at.to_str().ok()?));
                Ok(Some(Opened { length, time, body: Box::new(answer.into_body().into_reader()) }))
            }
            301 | 404 => Ok(None),
            status => Err(Error::Refused { volume: replica.into(), status }),
        }
    }

    /// The md5 of a blob and its length in bytes. `None`: it is not there.
    pub fn digest(
        &self,
        replica: &str,
        path: &str,
        auth: Option<&str>,
    ) -> Result<Option<(Hash, u64)>> {
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

    /// What lies in a folder of a volume; `folder` is a path that ends in `/`. nginx hides names that
    /// begin with a dot, and cuts a listing short when a file vanishes while it is made.
    pub fn list(&self, replica: &str, folder: &str, auth: Option<&str>) -> Result<Vec<Entry>> {
        let mut failed = None;
        for attempt in 0..5 {
            std::thread::sleep(Duration::from_millis(attempt * attempt * 50));
            match self.list_once(replica, folder, auth) {
                Ok(entries) => return Ok(entries),
                Err(error) => failed = Some(error),
            }
        }
        let why = failed.map_or(String::new(), |error| error.to_string());
        Err(Error::Failed(format!("no listing of http://{replica}{folder}: {why}")))
    }

    fn list_once(&self, replica: &str, folder: &str, auth: Option<&str>) -> Result<Vec<Entry>> {
        let answer = self
            .ask(replica, STALL, |agent| with_auth(agent.get(url(replica, folder)), auth).call())?;
        if answer.status() != 200 {
            return Err(Error::Refused {
                volume: replica.into(),
                status: answer.status().as_u16(),
            });
        }
        let mut text = Vec::new();
        let read = answer.into_body().into_reader().read_to_end(&mut text);
        read.map_err(|e| unreachable(replica, &e.to_string()))?;
        listing::parse(&text)
            .map_err(|e| unreachable(replica, &format!("its listing is no JSON: {e}")))
    }
}

/// A blob that is being read.
pub struct Opened {
    /// Bytes.
    pub length: u64,
    /// The file's mtime, in seconds since 1970.
    pub time: Option<u64>,
    pub body: Box<dyn Read + Send>,
}

/// Reads the rest of the value and hands it to every replica. `Err(None)`: a replica takes no more.
fn feed_all(
    source: &mut Source,
    feeds: Vec<Sender<Option<Arc<Vec<u8>>>>>,
) -> std::result::Result<(), Option<Error>> {
    // When the feeds are dropped without an end, what they feed ends in an error.
    while let Some(chunk) = source.next().map_err(Some)? {
        for feed in &feeds {
            feed.send(Some(chunk.clone())).map_err(|_| None)?;
        }
    }
    for feed in &feeds {
        // Where the length was known, the replica had all it asked for and may be gone.
        let _ = feed.send(None);
    }
    Ok(())
}

struct Outcome {
    error: Option<Error>,
    /// Replicas that were sent the whole value and have not answered.
    late: Vec<String>,
}

/// Collects the replicas' answers. After the first bad one the rest has 2 s: the PUT has failed, and
/// where a hung volume publishes its blob after all, the debris entry knows.
fn gather(results: Receiver<(String, Sent)>, replicas: &[String], whole: bool) -> Outcome {
    let mut outcome = Outcome { error: None, late: Vec::new() };
    let mut silent = replicas.to_vec();
    let mut deadline = None;
    while !silent.is_empty() {
        let result = match deadline {
            None => results.recv().ok(),
            Some(deadline) => results.recv_deadline(deadline).ok(),
        };
        let Some((replica, sent)) = result else { break };
        silent.retain(|r| *r != replica);
        if let Err(failed) = sent {
            if failed.late {
                outcome.late.push(replica);
            }
            deadline = Some(Instant::now() + Duration::from_secs(2));
            if !failed.stopped {
                outcome.error.get_or_insert(failed.error);
            }
        }
    }
    if whole {
        outcome.late.extend(silent);
    }
    outcome
}

type Sent = std::result::Result<(), SendFailed>;

struct SendFailed {
    error: Error,
    /// The volume was sent the whole value and has not answered: it may publish it yet.
    late: bool,
    /// It is not this replica that failed: the upload was stopped because of another.
    stopped: bool,
}

/// One replica's part of an upload.
struct Sending {
    volume: Arc<Volume>,
    replica: String,
    url: String,
    length: Option<u64>,
    date: String,
    auth: Option<String>,
    feed: Feed,
}

impl Sending {
    fn run(mut self) -> Sent {
        let begun = Instant::now();
        let mut answer = self.send();
        // A pooled connection that nginx has closed in the meantime fails on its first use.
        if matches!(&answer, Err(ureq::Error::Io(e)) if Early::of(e).is_none())
            && self.feed.rewind()
        {
            answer = self.send();
        }
        let early = answer.as_ref().err().and_then(|e| match e {
            ureq::Error::Io(e) => Early::of(e),
            _ => None,
        });
        let status = early.or(answer.as_ref().ok().map(|answer| answer.status().as_u16()));
        match status {
            Some(200..=299) if early.is_none() => {
                self.volume.note(&self.replica, begun.elapsed(), None)
            }
            Some(status) => {
                let error = Error::Refused { volume: self.replica, status };
                return Err(SendFailed { error, late: false, stopped: false });
            }
            None => {}
        }
        let (late, stopped) = (self.feed.whole, self.feed.stopped);
        answer.map(drop).map_err(|e| {
            if !stopped {
                self.volume.note(&self.replica, begun.elapsed(), Some(&e));
            }
            SendFailed { error: failure(&self.replica, e), late, stopped }
        })
    }

    fn send(&mut self) -> std::result::Result<http::Response<Body>, ureq::Error> {
        let mut request = with_auth(self.volume.agent.put(&self.url), self.auth.as_deref())
            .header("date", &self.date);
        if let Some(length) = self.length {
            request = request.header("content-length", length);
        }
        request.send(SendBody::from_reader(&mut self.feed))
    }
}

/// A client's value, read chunk by chunk.
struct Source<'a> {
    value: Value<'a>,
    md5: Option<Md5>,
    hash: Option<Hash>,
    size: u64,
    ended: bool,
}

impl Source<'_> {
    fn new(value: Value) -> Source {
        let md5 = (value.md5sum || value.expected.is_some()).then(Md5::new);
        Source { value, md5, hash: None, size: 0, ended: false }
    }

    /// The next chunk; `None` after the last one. The last chunk of a value whose length is known is
    /// given only when its digest is the expected one.
    fn next(&mut self) -> Result<Option<Arc<Vec<u8>>>> {
        if self.ended {
            return Ok(None);
        }
        let left = self.value.length.map_or(u64::MAX, |length| length - self.size);
        let mut chunk = vec![0; left.min(CHUNK as u64) as usize];
        let mut filled = 0;
        while filled < chunk.len() {
            match self.value.body.read(&mut chunk[filled..]) {
                Ok(0) if self.value.length.is_some() => {
                    return Err(Error::BadRequest(format!(
                        "the upload ended after {} bytes",
                        self.size + filled as u64
                    )));
                }
                Ok(0) => {
                    self.ended = true;
                    break;
                }
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::BadRequest(format!("the upload was cut short: {e}"))),
            }
        }
        chunk.truncate(filled);
        self.size += filled as u64;
        self.ended |= self.value.length == Some(self.size);
        if let Some(md5) = &mut self.md5 {
            md5.update(&chunk);
        }
        if self.ended {
            self.hash = self.md5.take().map(|md5| md5.finalize().into());
            if self.value.expected.is_some() && self.value.expected != self.hash {
                return Err(Error::BadRequest(
                    "the value does not have the Content-MD5 that came with it".into(),
                ));
            }
        }
        Ok((filled > 0).then(|| Arc::new(chunk)))
    }

    fn stored(self) -> Stored {
        Stored { size: self.size, hash: self.hash }
    }
}

/// The body of one replica's PUT.
struct Feed {
    chunks: Receiver<Option<Arc<Vec<u8>>>>,
    current: Arc<Vec<u8>>,
    at: usize,
    /// Bytes still to give, where the length is known.
    left: Option<u64>,
    /// Chunks taken from the channel.
    used: usize,
    /// Whether all of it was given.
    whole: bool,
    /// Whether the upload was stopped from the other side.
    stopped: bool,
}

impl Feed {
    /// Goes back to the beginning, if that is still at hand.
    fn rewind(&mut self) -> bool {
        self.left = self.left.map(|left| left + self.at as u64);
        (self.at, self.whole) = (0, false);
        self.used == 0
    }
}

impl Read for Feed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == Some(0) {
            return Ok(0);
        }
        if self.at == self.current.len() {
            match self.chunks.recv() {
                Ok(Some(chunk)) => (self.current, self.at, self.used) = (chunk, 0, self.used + 1),
                Ok(None) if self.left.is_none() => {
                    self.whole = true;
                    return Ok(0);
                }
                Ok(None) | Err(_) => {
                    self.stopped = true;
                    return Err(io::Error::other("the upload was stopped"));
                }
            }
        }
        let rest = &self.current[self.at..];
        let n = rest.len().min(buffer.len());
        buffer[..n].copy_from_slice(&rest[..n]);
        self.at += n;
        self.left = self.left.map(|left| left - n as u64);
        self.whole = self.left == Some(0);
        Ok(n)
    }
}

impl Volume {
    fn is_down(&self) -> bool {
        let down = self.down.lock().unwrap_or_else(|e| e.into_inner());
        down.is_some_and(|since| since.elapsed() < DOWN)
    }

    /// Remembers whether the volume gave an answer, and after what time.
    fn note(&self, replica: &str, time: Duration, error: Option<&ureq::Error>) {
        self.latency.lock().unwrap_or_else(|e| e.into_inner()).observe(time);
        let mut down = self.down.lock().unwrap_or_else(|e| e.into_inner());
        match (error, &*down) {
            (Some(e), None) => log::warn!("volume {replica} gives no answer: {e}"),
            (None, Some(_)) => log::warn!("volume {replica} answers again"),
            _ => {}
        }
        *down = error.map(|_| Instant::now());
    }
}

fn url(replica: &str, path: &str) -> String {
    format!("http://{replica}{path}")
}

fn with_auth<B>(request: ureq::RequestBuilder<B>, auth: Option<&str>) -> ureq::RequestBuilder<B> {
    match auth {
        Some(auth) => request.header("authorization", auth),
        None => request,
    }
}

fn length_of(answer: &http::Response<Body>) -> Option<u64> {
    answer.headers().get("content-length")?.to_str().ok()?.parse().ok()
}

fn unreachable(replica: &str, why: &str) -> Error {
    Error::Unreachable { volume: replica.into(), why: why.into() }
}

fn failure(replica: &str, error: ureq::Error) -> Error {
    let why = match error {
        ureq::Error::Io(e) => e.to_string(),
        ureq::Error::Timeout(_) => "it took too long".into(),
        e => e.to_string(),
    };
    unreachable(replica, &why)
}

/// An agent for one volume.
fn agent(name: &str, timeout: Duration) -> Agent {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .proxy(None)
        .user_agent("mkv")
        .timeout_connect(Some(timeout))
        .timeout_per_read(Some(STALL))
        .max_idle_connections(64)
        .max_idle_connections_per_host(64)
        .max_idle_age(Duration::from_secs(50))
        .build();
    let port = if name.rsplit(']').next().unwrap_or(name).contains(':') { "" } else { ":80" };
    Agent::with_parts(
        config,
        Connect { host: format!("{name}{port}"), known: Mutex::default() },
        AtConnect,
    )
}

/// Stands for ureq's resolver: `Connect` resolves, and only when it connects.
#[derive(Debug)]
struct AtConnect;

impl Resolver for AtConnect {
    fn resolve(
        &self,
        _: &http::Uri,
        _: &ureq::config::Config,
        _: NextTimeout,
    ) -> std::result::Result<ResolvedSocketAddrs, ureq::Error> {
        let mut addresses = self.empty();
        addresses.push(([0, 0, 0, 0], 0).into());
        Ok(addresses)
    }
}

/// Connects to one volume, and remembers its addresses until they are old or fail.
#[derive(Debug)]
struct Connect {
    host: String,
    known: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
}

impl Connect {
    fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        let known = self.known.lock().unwrap_or_else(|e| e.into_inner()).clone();
        if let Some((_, addresses)) = known.filter(|(at, _)| at.elapsed() < RESOLVED) {
            return Ok(addresses);
        }
        let addresses: Vec<_> = self.host.to_socket_addrs()?.collect();
        *self.known.lock().unwrap_or_else(|e| e.into_inner()) =
            Some((Instant::now(), addresses.clone()));
        Ok(addresses)
    }
}

impl Connector for Connect {
    type Out = Wire;

    fn connect(
        &self,
        details: &ConnectionDetails,
        _: Option<()>,
    ) -> std::result::Result<Option<Wire>, ureq::Error> {
        let mut failed = io::Error::other("its name has no address");
        for address in self.addresses()? {
            match TcpStream::connect_timeout(&address, *details.timeout.after) {
                Ok(socket) => {
                    socket.set_nodelay(true)?;
                    socket.set_write_timeout(Some(STALL))?;
                    let buffers = LazyBuffers::new(16 << 10, 64 << 10);
                    return Ok(Some(Wire {
                        socket,
                        buffers,
                        held: Vec::new(),
                        state: Stage::Quiet,
                    }));
                }
                Err(e) => failed = e,
            }
        }
        *self.known.lock().unwrap_or_else(|e| e.into_inner()) = None;
        Err(failed.into())
    }
}

/// A connection to a volume.
#[derive(Debug)]
struct Wire {
    socket: TcpStream,
    buffers: LazyBuffers,
    /// A request's head, held back so that it goes out together with what follows.
    held: Vec<u8>,
    /// Where the connection is in its life.
    state: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    /// New, or just seen to be open: nothing waits to be read.
    Quiet,
    /// A request is being sent.
    Sending,
    /// An answer was read.
    Answered,
}

impl Wire {
    /// What waits to be read, without taking it: `WouldBlock` where nothing does.
    fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(recv(&self.socket, buffer, RecvFlags::PEEK | RecvFlags::DONTWAIT)?.0)
    }

    /// Sends what was held back, and `amount` bytes of the output buffer.
    fn send(&mut self, amount: usize) -> std::result::Result<(), ureq::Error> {
        let output = &self.buffers.output()[..amount];
        let sent = if self.held.is_empty() {
            self.socket.write_all(output)
        } else if self.held.len() + amount <= 8 << 10 {
            self.held.extend_from_slice(output);
            self.socket.write_all(&self.held)
        } else {
            self.socket.write_all(&self.held).and_then(|()| self.socket.write_all(output))
        };
        self.held.clear();
        sent.map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => ureq::Error::Timeout(ureq::Timeout::SendBody),
            // The answer may stand in front of the broken pipe.
            _ => {
                let mut line = [0; 12];
                match self.peek(&mut line) {
                    Ok(n) if n > 0 => Early::from_line(&line[..n]).into(),
                    _ => e.into(),
                }
            }
        })
    }
}

impl Transport for Wire {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(
        &mut self,
        amount: usize,
        _: NextTimeout,
    ) -> std::result::Result<(), ureq::Error> {
        if self.state != Stage::Sending {
            self.state = Stage::Sending;
            self.held.extend_from_slice(&self.buffers.output()[..amount]);
            return Ok(());
        }
        // A volume that refuses says so at once and then reads no more.
        if self.held.is_empty() {
            let mut line = [0; 12];
            match self.peek(&mut line) {
                Ok(n) => return Err(Early::from_line(&line[..n]).into()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.send(amount)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> std::result::Result<bool, ureq::Error> {
        if !self.held.is_empty() {
            self.send(0)?;
        }
        self.state = Stage::Answered;
        let timeout = timeout.for_read();
        let limit = (*timeout.after).min(STALL).try_into().ok();
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        if poll(&mut fds, limit.as_ref()).map_err(io::Error::from)? == 0 {
            return Err(ureq::Error::Timeout(timeout.reason));
        }
        let n = self.socket.read(self.buffers.input_append_buf())?;
        self.buffers.input_appended(n);
        Ok(n > 0)
    }

    fn is_open(&mut self) -> bool {
        // Asked when a connection is put back, and again when it is taken out: only then it counts.
        if self.state == Stage::Answered {
            self.state = Stage::Quiet;
            return true;
        }
        matches!(self.peek(&mut [0]), Err(e) if e.kind() == io::ErrorKind::WouldBlock)
    }
}

/// The status of an answer that came while the body was still being sent; 0: the connection ended.
#[derive(Debug)]
struct Early(u16);

impl Early {
    fn from_line(line: &[u8]) -> io::Error {
        // HTTP/1.1 500
        let status =
            line.get(9..12).and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
        match status {
            Some(status) => io::Error::other(Early(status)),
            None => io::Error::new(io::ErrorKind::ConnectionReset, "it closed the connection"),
        }
    }

    fn of(error: &io::Error) -> Option<u16> {
        error.get_ref()?.downcast_ref::<Early>().map(|early| early.0)
    }
}

impl std::error::Error for Early {}

impl std::fmt::Display for Early {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "it answered {} while the body was being sent", self.0)
    }
}
