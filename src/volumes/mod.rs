//! The volumes: requests to nginx. The only file that names ureq, which reads blobs; what is asked of
//! several volumes at once goes through `fan`.
//!
//! What ureq would do if it were let, and what is done about it here:
//! - it resolves the host before every request, with a timeout on a thread made for that: each
//!   volume has an agent of its own, whose resolver remembers;
//! - it follows redirects, calls a 404 an error and keeps 3 connections: settings, below.

pub mod autoindex;
pub mod client;

use std::collections::HashMap;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, RwLock, mpsc};
use std::time::{Duration, Instant, UNIX_EPOCH};

use md5::{Digest, Md5};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{NextTimeout, TcpConnector};
use ureq::{Agent, Body, http};

use crate::api::metrics::{Histogram, head};
use crate::error::{Error, Result};
use crate::format::record::{Hash, volume_of};
use crate::threads::{Pool, lock};
use autoindex::Entry;
use client::{Answer, Exchange, Line, STALL, Scout, Then};

/// An upload's unit of work, in bytes.
pub const CHUNK: usize = 512 << 10;

/// From how many bytes on a value's digest is computed on a thread of its own, while chunks are sent
/// and others read; and how many chunks of it are in memory then.
const LARGE: u64 = 8 << 20;
const CHUNKS: usize = 2;

/// How long a volume may take for a DELETE.
const DELETE: Duration = Duration::from_secs(10);

/// For how long a volume that gave no answer is asked last.
const DOWN: Duration = Duration::from_secs(3);

/// For how long the others are waited for when one volume has failed an upload.
const AFTER_FAILURE: Duration = Duration::from_secs(2);

pub struct Volumes {
    timeout: Duration,
    known: RwLock<HashMap<String, Arc<Volume>>>,
    scout: OnceLock<Option<Arc<Scout>>>,
    pub pool: Pool,
}

struct Volume {
    line: Arc<Line>,
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
        Arc::new(Volumes {
            timeout,
            known: RwLock::default(),
            scout: OnceLock::new(),
            pool: Pool::new(usize::MAX),
        })
    }

    fn volume(&self, replica: &str) -> Arc<Volume> {
        let name = volume_of(replica);
        if let Some(volume) = self.known.read().unwrap_or_else(|e| e.into_inner()).get(name) {
            return volume.clone();
        }
        let line = Arc::new(Line::new(name, self.timeout));
        let volume = Arc::new(Volume {
            agent: agent(line.clone(), self.timeout),
            line,
            down: Mutex::default(),
            latency: Mutex::default(),
        });
        let mut known = self.known.write().unwrap_or_else(|e| e.into_inner());
        known.entry(name.to_string()).or_insert(volume).clone()
    }

    /// What is known of each volume that was asked for something, as Prometheus text.
    pub fn write_metrics(&self, text: &mut String) {
        let known = self.known.read().unwrap_or_else(|e| e.into_inner());
        head(text, "mkv_volume_up", "gauge", "Whether the volume answered when last asked.");
        for (name, volume) in &*known {
            let up = lock(&volume.down).is_none();
            text.push_str(&format!("mkv_volume_up{{volume=\"{name}\"}} {}\n", up as u8));
        }
        head(text, "mkv_volume_seconds", "histogram", "From a request to its answer's head.");
        for (name, volume) in &*known {
            let latency = lock(&volume.latency);
            latency.write(text, "mkv_volume_seconds", &format!("volume=\"{name}\""));
        }
    }

    /// Whether the volume of this replica was silent just now.
    pub fn is_down(&self, replica: &str) -> bool {
        self.volume(replica).is_down()
    }

    /// Replicas in random order; those on volumes that were silent just now come last.
    pub fn shuffled(&self, replicas: &[String]) -> Vec<String> {
        let mut order: Vec<(bool, u32, &String)> =
            replicas.iter().map(|r| (self.is_down(r), fastrand::u32(..), r)).collect();
        order.sort();
        order.into_iter().map(|(_, _, replica)| replica.clone()).collect()
    }

    /// Asks one thing of several replicas at the same time: a request without a body. What is GET
    /// has to find room in memory.
    fn ask(
        &self,
        method: &str,
        replicas: &[&str],
        path: &str,
        auth: Option<&str>,
    ) -> Vec<Result<Answer>> {
        let begun = Instant::now();
        let limit = match method {
            "GET" => STALL,
            "DELETE" => DELETE,
            _ => self.timeout,
        };
        let volumes: Vec<_> = replicas.iter().map(|replica| self.volume(replica)).collect();
        let targets = replicas.iter().zip(&volumes);
        let mut fan: Vec<_> = targets
            .map(|(replica, volume)| volume.exchange(method, replica, path, auth, ""))
            .collect();
        client::send(&mut fan, &[], true);
        client::finish(&mut fan, &[], Instant::now() + limit, limit);
        let answer = |((exchange, volume), replica): ((Exchange, &Arc<Volume>), &&str)| {
            let Exchange { outcome, whole, .. } = exchange;
            let outcome = outcome.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()));
            volume.note(replica, begun.elapsed(), outcome.as_ref().err());
            outcome.map_err(|e| Error::Unreachable {
                volume: replica.to_string(),
                why: e.to_string(),
                late: whole && e.kind() == io::ErrorKind::TimedOut,
            })
        };
        fan.into_iter().zip(&volumes).zip(replicas).map(answer).collect()
    }

    /// The length in bytes of the blob on this replica; `None`: it is not there.
    pub fn head(&self, replica: &str, path: &str, auth: Option<&str>) -> Result<Option<u64>> {
        match self.ask("HEAD", &[replica], path, auth).remove(0)? {
            Answer { status: 200, length: Some(length), .. } => Ok(Some(length)),
            Answer { status: 200, .. } => {
                Err(unreachable(replica, "its HEAD has no Content-Length"))
            }
            // 301: a folder.
            Answer { status: 301 | 404, .. } => Ok(None),
            Answer { status, .. } => Err(Error::Refused { volume: replica.into(), status }),
        }
    }

    /// As `head`, of one of these replicas that answered when last asked, without a thread that
    /// waits: `then` gets the replica and its blob's length, or nothing where it takes more than one
    /// question to know.
    pub fn scout(
        &self,
        replicas: &[String],
        path: &str,
        auth: Option<&str>,
        then: impl FnOnce(Option<(String, u64)>) + Send + 'static,
    ) {
        let scout = self.scout.get_or_init(|| Scout::new().ok());
        let first = fastrand::usize(..replicas.len());
        let mut volumes = replicas.iter().cycle().skip(first).take(replicas.len());
        let up = volumes.find_map(|replica| {
            Some((replica, self.volume(replica))).filter(|(_, volume)| !volume.is_down())
        });
        let (Some(scout), Some((replica, volume))) = (scout, up) else { return then(None) };
        let exchange = volume.exchange("HEAD", replica, path, auth, "");
        let (replica, begun) = (replica.clone(), Instant::now());
        let heard: Then = Box::new(move |outcome| match outcome {
            Some(Ok(Answer { status: 200, length: Some(length), .. })) => {
                volume.note(&replica, begun.elapsed(), None);
                then(Some((replica, length)))
            }
            Some(Err(e)) if e.kind() == io::ErrorKind::TimedOut => {
                volume.note(&replica, begun.elapsed(), Some(&e));
                then(None)
            }
            _ => then(None),
        });
        scout.ask(exchange, begun + self.timeout, heard);
    }

    /// An error where two of these volumes, or volumes of these replicas, are one server under two
    /// names: what look like two replicas would be one file, and to delete one would be to delete both.
    pub fn check_distinct<'a>(&self, replicas: impl Iterator<Item = &'a String>) -> Result<()> {
        let mut known: HashMap<SocketAddr, &str> = HashMap::new();
        for replica in replicas {
            let name = volume_of(replica);
            // One that cannot be resolved now cannot be asked for anything either.
            for mut address in self.volume(name).line.addresses().unwrap_or_default() {
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

    /// Whether the volume lets in who shows this, or nothing.
    pub fn admits(&self, volume: &str, auth: Option<&str>) -> Result<bool> {
        match self.ask("HEAD", &[volume], "/", auth).remove(0)?.status {
            200 => Ok(true),
            401 | 403 => Ok(false),
            status => Err(Error::Refused { volume: volume.into(), status }),
        }
    }

    /// Deletes a blob. `true`: it was there and is gone; `false`: it was not there.
    pub fn delete(&self, replica: &str, path: &str, auth: Option<&str>) -> Result<bool> {
        deleted(replica, self.ask("DELETE", &[replica], path, auth).remove(0))
    }

    /// Deletes a blob from several replicas at the same time. `patient`: asks a volume that gave no
    /// answer just now too.
    pub fn delete_all(
        &self,
        replicas: &[String],
        path: &str,
        patient: bool,
        auth: Option<&str>,
    ) -> Vec<Result<bool>> {
        let asked = |replica: &&String| patient || !self.is_down(replica);
        let (ask, skip): (Vec<_>, Vec<_>) = replicas.iter().partition(asked);
        let names: Vec<&str> = ask.iter().map(|replica| replica.as_str()).collect();
        let mut answers = self.ask("DELETE", &names, path, auth).into_iter();
        let outcome = |replica: &String| {
            let silent = || Err(unreachable(replica, "it gave none just now"));
            let answer = if skip.contains(&replica) { None } else { answers.next() };
            deleted(replica, answer.unwrap_or_else(silent))
        };
        replicas.iter().map(outcome).collect()
    }

    /// An error if one of these volumes gave no answer when it was last asked, and still gives none:
    /// no upload is begun that would wait for it.
    pub fn check_silent(&self, replicas: &[String], auth: Option<&str>) -> Result<()> {
        for replica in replicas {
            let volume = self.volume(replica);
            let silent = lock(&volume.down).is_some();
            if silent && let Err(error @ Error::Unreachable { .. }) = self.admits(replica, auth) {
                return Err(error);
            }
        }
        Ok(())
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
        let begun = Instant::now();
        let time = UNIX_EPOCH + Duration::from_secs(value.time);
        let mut source = Source::new(value, self.pool.clone());
        let mut failed = source.read().err();
        if failed.is_none() && source.size == 0 {
            failed = Some(Error::NoValue);
        }
        if let Some(error) = failed {
            return Err(PutFailed { error, late: Vec::new() });
        }
        let headers = format!("Date: {}\r\n{}", httpdate::fmt_http_date(time), source.framing());
        let volumes: Vec<_> = replicas.iter().map(|replica| self.volume(replica)).collect();
        let targets = replicas.iter().zip(&volumes);
        let mut fan: Vec<_> = targets
            .map(|(replica, volume)| volume.exchange("PUT", replica, path, auth, &headers))
            .collect();
        loop {
            let ended = source.ended;
            client::send(&mut fan, source.frame(), ended);
            if source.ended || fan.iter().any(|exchange| exchange.outcome.is_some()) {
                break;
            }
            failed = source.read().err();
            if failed.is_some() {
                break;
            }
        }
        // Who was not sent all of it publishes nothing; the others' answers are waited for, but not
        // for long once one has failed: where a blob appears after all, the debris entry knows.
        client::finish(&mut fan, source.frame(), Instant::now() + STALL, AFTER_FAILURE);
        let (mut error, mut late) = (failed, Vec::new());
        for ((exchange, volume), replica) in fan.iter().zip(&volumes).zip(replicas) {
            let failed = match &exchange.outcome {
                Some(Ok(Answer { status: 200..=299, .. })) if exchange.whole => {
                    volume.note(replica, begun.elapsed(), None);
                    continue;
                }
                Some(Ok(Answer { status, .. })) => {
                    Error::Refused { volume: replica.clone(), status: *status }
                }
                Some(Err(e)) => {
                    volume.note(replica, begun.elapsed(), Some(e));
                    late.extend(exchange.whole.then(|| replica.clone()));
                    unreachable(replica, &e.to_string())
                }
                // Stopped, or not waited for, because of another.
                None => {
                    late.extend(exchange.whole.then(|| replica.clone()));
                    continue;
                }
            };
            error.get_or_insert(failed);
        }
        match error {
            None => Ok(Stored { size: source.size, hash: source.hash }),
            Some(error) => Err(PutFailed { error, late }),
        }
    }

    /// Sends a GET, which may be sent again: a pooled connection that nginx has closed in the
    /// meantime fails on its first use.
    fn get(&self, replica: &str, path: &str, auth: Option<&str>) -> Result<http::Response<Body>> {
        let volume = self.volume(replica);
        let begun = Instant::now();
        let send = || {
            let request = volume.agent.get(format!("http://{replica}{path}"));
            match auth {
                Some(auth) => request.header("authorization", auth),
                None => request,
            }
            .call()
        };
        let answer = match send() {
            Err(ureq::Error::Io(e)) if e.kind() != io::ErrorKind::ConnectionRefused => send(),
            answer => answer,
        };
        let answer = answer.map_err(ureq::Error::into_io);
        volume.note(replica, begun.elapsed(), answer.as_ref().err());
        answer.map_err(|e| unreachable(replica, &e.to_string()))
    }

    /// Opens a blob to read it. `None`: it is not there.
    pub fn read(&self, replica: &str, path: &str, auth: Option<&str>) -> Result<Option<Opened>> {
        let answer = self.get(replica, path, auth)?;
        match answer.status().as_u16() {
            200 => {
                let header = |name| answer.headers().get(name)?.to_str().ok();
                let length = header("content-length")
                    .and_then(|length| length.parse().ok())
                    .ok_or_else(|| unreachable(replica, "its GET has no Content-Length"))?;
                let time = header("last-modified").and_then(autoindex::http_date);
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
    pub fn list(
        &self,
        replicas: &[&str],
        folder: &str,
        auth: Option<&str>,
    ) -> Result<Vec<Vec<Entry>>> {
        let read = |replica: &str, answer: Result<Answer>| match answer? {
            Answer { status: 200, body, .. } => autoindex::parse(&body)
                .map_err(|e| unreachable(replica, &format!("its listing is no JSON: {e}"))),
            Answer { status, .. } => Err(Error::Refused { volume: replica.into(), status }),
        };
        let listing = |(replica, answer): (&&str, Result<Answer>)| {
            let mut listing = read(replica, answer);
            for attempt in 1..5 {
                if listing.is_err() {
                    std::thread::sleep(Duration::from_millis(attempt * attempt * 50));
                    listing = read(replica, self.ask("GET", &[replica], folder, auth).remove(0));
                }
            }
            let why = |e| Error::Failed(format!("no listing of http://{replica}{folder}: {e}"));
            listing.map_err(why)
        };
        replicas.iter().zip(self.ask("GET", replicas, folder, auth)).map(listing).collect()
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

/// A client's value, read chunk by chunk, each framed as it goes out.
struct Source<'a> {
    value: Value<'a>,
    pool: Pool,
    md5: Option<Md5>,
    hashing: Option<Hashing>,
    hash: Option<Hash>,
    size: u64,
    ended: bool,
    /// Whether the value goes out with its length not yet known (RFC 9112, 7.1).
    chunked: bool,
    /// Room for a chunk's size line, the chunk, and what ends a chunked body.
    buffer: Arc<Vec<u8>>,
    /// Where in it the chunk lies as it goes out.
    frame: Range<usize>,
}

/// The digest of a large value, on a thread of its own.
struct Hashing {
    chunks: mpsc::Sender<(Arc<Vec<u8>>, Range<usize>)>,
    /// Buffers whose chunk is done, in their order, and those that were never used.
    free: mpsc::Receiver<Arc<Vec<u8>>>,
    /// Comes when there are no more chunks.
    md5: mpsc::Receiver<Md5>,
}

const SIZE_LINE: usize = 8;
const LAST_CHUNK: &[u8] = b"\r\n0\r\n\r\n";

impl Source<'_> {
    fn new(value: Value, pool: Pool) -> Source {
        let md5 = (value.md5sum || value.expected.is_some()).then(Md5::new);
        let room = value.length.unwrap_or(u64::MAX).min(CHUNK as u64) as usize;
        Source {
            value,
            pool,
            md5,
            hashing: None,
            hash: None,
            size: 0,
            ended: false,
            chunked: false,
            buffer: Arc::new(vec![0; SIZE_LINE + room + LAST_CHUNK.len()]),
            frame: 0..0,
        }
    }

    /// Reads the next chunk. The last one of a value is read without an error only when the value
    /// is as long as the client said, and its digest the one it gave.
    fn read(&mut self) -> Result<()> {
        let lost = || Error::Failed("the thread of the digest is lost: try again".into());
        if let Some(hashing) = &self.hashing {
            self.buffer = hashing.free.recv().map_err(|_| lost())?;
        }
        let buffer = Arc::get_mut(&mut self.buffer).ok_or_else(lost)?;
        let room = buffer.len() - SIZE_LINE - LAST_CHUNK.len();
        let left = self.value.length.map_or(u64::MAX, |length| length - self.size);
        let wanted = left.min(room as u64) as usize;
        let chunk = &mut buffer[SIZE_LINE..SIZE_LINE + wanted];
        let mut filled = 0;
        while filled < wanted {
            match self.value.body.read(&mut chunk[filled..]) {
                Ok(0) if self.value.length.is_some() => {
                    let came = self.size + filled as u64;
                    return Err(Error::BadRequest(format!("the upload ended after {came} bytes")));
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
        let first = self.size == 0;
        self.size += filled as u64;
        self.ended |= self.value.length == Some(self.size);
        // A short value's length is known now, whatever the client said.
        self.chunked |= first && !self.ended && self.value.length.is_none();
        let chunk = SIZE_LINE..SIZE_LINE + filled;
        self.frame = match (self.chunked, filled, self.ended) {
            (false, ..) => chunk.clone(),
            (true, 0, _) => chunk.end + 2..chunk.end + LAST_CHUNK.len(),
            (true, _, true) => 0..chunk.end + LAST_CHUNK.len(),
            (true, _, false) => 0..chunk.end + 2,
        };
        if self.chunked {
            buffer[..SIZE_LINE].copy_from_slice(format!("{filled:06x}\r\n").as_bytes());
            buffer[chunk.end..chunk.end + LAST_CHUNK.len()].copy_from_slice(LAST_CHUNK);
        }
        if self.size > LARGE && !self.ended && self.hashing.is_none() {
            self.hash_aside();
        }
        match (&self.hashing, &mut self.md5) {
            (Some(hashing), _) => {
                hashing.chunks.send((self.buffer.clone(), chunk)).map_err(|_| lost())?;
            }
            (None, Some(md5)) => md5.update(&self.buffer[chunk]),
            (None, None) => {}
        }
        if self.ended {
            if let Some(Hashing { chunks, md5, .. }) = self.hashing.take() {
                drop(chunks);
                self.md5 = Some(md5.recv().map_err(|_| lost())?);
            }
            self.hash = self.md5.take().map(|md5| md5.finalize().into());
            if self.value.expected.is_some() && self.value.expected != self.hash {
                return Err(Error::BadRequest(
                    "the value does not have the Content-MD5 that came with it".into(),
                ));
            }
        }
        Ok(())
    }

    /// Has the digest computed from here on while other things are done.
    fn hash_aside(&mut self) {
        let Some(mut md5) = self.md5.take() else { return };
        let (chunks, work) = mpsc::channel::<(Arc<Vec<u8>>, Range<usize>)>();
        let (done, free) = mpsc::channel();
        let (finish, digest) = mpsc::channel();
        for _ in 1..CHUNKS {
            let _ = done.send(Arc::new(vec![0; self.buffer.len()]));
        }
        let job = Box::new(move || {
            for (buffer, chunk) in work {
                md5.update(&buffer[chunk]);
                let _ = done.send(buffer);
            }
            let _ = finish.send(md5);
        });
        match self.pool.run(job) {
            Ok(()) => self.hashing = Some(Hashing { chunks, free, md5: digest }),
            // No thread can be had: what has been digested comes back at once.
            Err(job) => {
                drop(chunks);
                job();
                self.md5 = digest.recv().ok();
            }
        }
    }

    /// The header line that says how the body is framed.
    fn framing(&self) -> String {
        match self.value.length {
            _ if self.chunked => "Transfer-Encoding: chunked\r\n".into(),
            length => format!("Content-Length: {}\r\n", length.unwrap_or(self.size)),
        }
    }

    /// The chunk that was read, as it goes out.
    fn frame(&self) -> &[u8] {
        &self.buffer[self.frame.clone()]
    }
}

impl Volume {
    /// A request to a replica; `headers`: whole lines beside Host and Authorization.
    fn exchange(
        &self,
        method: &str,
        replica: &str,
        path: &str,
        auth: Option<&str>,
        headers: &str,
    ) -> Exchange {
        let folder = replica.find('/').map_or("", |at| &replica[at..]);
        let auth = auth.map_or(String::new(), |auth| format!("Authorization: {auth}\r\n"));
        let lines = format!("{headers}{auth}");
        Exchange::new(&self.line, method, &format!("{folder}{path}"), &lines)
    }

    fn is_down(&self) -> bool {
        let down = lock(&self.down);
        down.is_some_and(|since| since.elapsed() < DOWN)
    }

    /// Remembers whether the volume gave an answer, and after what time.
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

fn unreachable(replica: &str, why: &str) -> Error {
    Error::Unreachable { volume: replica.into(), why: why.into(), late: false }
}

fn deleted(replica: &str, answer: Result<Answer>) -> Result<bool> {
    match answer?.status {
        200..=299 => Ok(true),
        // 409: the path leads below a plain file.
        404 | 409 => Ok(false),
        status => Err(Error::Refused { volume: replica.into(), status }),
    }
}

/// An agent for one volume.
fn agent(line: Arc<Line>, timeout: Duration) -> Agent {
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
    Agent::with_parts(config, TcpConnector::default(), Known(line))
}

/// Resolves a volume's name to what `fan` knows of it.
struct Known(Arc<Line>);

impl std::fmt::Debug for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Known")
    }
}

impl Resolver for Known {
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
