//! One request to several volumes at the same time, from one thread: HEAD, PUT, DELETE, listings.
//!
//! They do not go through ureq, which holds a thread for each request under way and does not listen
//! while it sends. Blobs are read with it (`volumes`). What it gave is in bench/RESULTS.md.
//!
//! `Scout` goes one step further for the HEAD of a GET: one thread hears the answers of all.

use std::collections::HashMap;
use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, epoll, poll};
use rustix::net::{RecvFlags, recv};

use crate::threads::lock;

/// How long a volume may make no progress: nginx can be silent for long while the disk writes back.
pub const STALL: Duration = Duration::from_secs(60);

/// For how long a resolved address is used.
const RESOLVED: Duration = Duration::from_secs(60);

/// For how long, and how many, connections without a request are kept. A stock nginx closes its own
/// after 75 s.
const IDLE: Duration = Duration::from_secs(50);
const IDLE_MOST: usize = 64;

/// An answer's head, in bytes, at most.
const HEAD_MOST: usize = 64 << 10;

/// The way to one volume: its addresses, and connections that wait for the next request.
pub struct Line {
    host: String,
    timeout: Duration,
    addresses: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
    idle: Mutex<Vec<(Instant, TcpStream)>>,
}

impl Line {
    /// `timeout`: how long a connection may take to come about.
    pub fn new(host: &str, timeout: Duration) -> Line {
        Line { host: host.into(), timeout, addresses: Mutex::default(), idle: Mutex::default() }
    }

    /// The host's addresses, as they were resolved not long ago.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        let known = lock(&self.addresses).clone();
        if let Some((_, addresses)) = known.filter(|(at, _)| at.elapsed() < RESOLVED) {
            return Ok(addresses);
        }
        let has_port = self.host.rsplit(']').next().is_some_and(|end| end.contains(':'));
        let port = if has_port { "" } else { ":80" };
        let addresses: Vec<_> = format!("{}{port}", self.host).to_socket_addrs()?.collect();
        *lock(&self.addresses) = Some((Instant::now(), addresses.clone()));
        Ok(addresses)
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let mut failed = io::Error::other("its name has no address");
        for address in self.addresses()? {
            match TcpStream::connect_timeout(&address, self.timeout) {
                Ok(socket) => {
                    socket.set_nodelay(true)?;
                    socket.set_nonblocking(true)?;
                    return Ok(socket);
                }
                Err(e) => failed = e,
            }
        }
        // Resolves anew next time: the volume may have moved.
        *lock(&self.addresses) = None;
        Err(failed)
    }

    /// A connection that waits and that nginx has not closed in the meantime.
    fn take(&self) -> Option<TcpStream> {
        loop {
            let (at, socket) = lock(&self.idle).pop()?;
            let open = || recv(&socket, &mut [0], RecvFlags::PEEK) == Err(rustix::io::Errno::AGAIN);
            if at.elapsed() < IDLE && open() {
                return Some(socket);
            }
        }
    }

    fn put_back(&self, socket: TcpStream) {
        let mut idle = lock(&self.idle);
        if idle.len() == IDLE_MOST {
            idle.remove(0);
        }
        idle.push((Instant::now(), socket));
    }
}

/// A volume's answer.
#[derive(Debug, Default)]
pub struct Answer {
    pub status: u16,
    /// Its Content-Length.
    pub length: Option<u64>,
    /// The body of a GET's 200.
    pub body: Vec<u8>,
}

/// The body of an answer, while it comes.
struct Incoming {
    answer: Answer,
    chunked: bool,
    /// Bytes still to come: of the body, or of a chunk and the line's end behind it.
    left: u64,
    /// A chunk is under way; one without bytes is the last.
    chunk: Option<u64>,
    /// The connection serves the next request too.
    stays: bool,
}

/// One request to one volume, under way.
pub struct Exchange {
    line: Arc<Line>,
    /// `None`: not yet connected, or the exchange is over.
    socket: Option<TcpStream>,
    /// The connection has served before: nginx may be about to close it.
    reused: bool,
    head: Vec<u8>,
    /// Bytes that are sent of the head and the frame behind it.
    sent: usize,
    /// The frame at hand is the first, so all can be sent once more.
    first: bool,
    /// All of the request is sent.
    pub whole: bool,
    input: Vec<u8>,
    incoming: Option<Incoming>,
    pub outcome: Option<io::Result<Answer>>,
}

impl Exchange {
    /// `headers`: whole lines.
    pub fn new(line: &Arc<Line>, method: &str, target: &str, headers: &str) -> Exchange {
        let head = format!("{method} {target} HTTP/1.1\r\nHost: {}\r\n{headers}\r\n", line.host);
        Exchange {
            socket: line.take(),
            line: line.clone(),
            reused: true,
            head: head.into_bytes(),
            sent: 0,
            first: true,
            whole: false,
            input: Vec::new(),
            incoming: None,
            outcome: None,
        }
    }

    fn connect(&mut self) {
        (self.reused, self.sent, self.whole, self.outcome) = (false, 0, false, None);
        match self.line.connect() {
            Ok(socket) => self.socket = Some(socket),
            Err(e) => self.outcome = Some(Err(e)),
        }
    }

    /// What failed only because nginx closed a connection that had served before is tried on a new
    /// one.
    fn again(&mut self) -> bool {
        let failed = matches!(&self.outcome, Some(Err(e)) if e.kind() != io::ErrorKind::TimedOut);
        let untouched = self.input.is_empty() && self.incoming.is_none();
        let again = failed && self.reused && self.first && untouched;
        if again {
            self.connect();
        }
        again
    }

    /// Sends what the connection takes of the head and this frame.
    fn push(&mut self, frame: &[u8], last: bool) {
        while let (Some(mut socket), None) = (self.socket.as_ref(), &self.outcome) {
            let head = &self.head[self.sent.min(self.head.len())..];
            let body = &frame[self.sent.saturating_sub(self.head.len())..];
            if head.is_empty() && body.is_empty() {
                self.whole = last;
                return;
            }
            match socket.write_vectored(&[IoSlice::new(head), IoSlice::new(body)]) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    // The reason may stand in front of the broken pipe.
                    self.listen();
                    self.outcome.get_or_insert(Err(e));
                }
            }
        }
    }

    fn is_sent(&self, frame: &[u8]) -> bool {
        self.outcome.is_some() || self.sent == self.head.len() + frame.len()
    }

    /// Takes what has come, without waiting. Before all is sent that can only be a refusal.
    fn listen(&mut self) {
        let (Some(mut socket), None) = (self.socket.as_ref(), &self.outcome) else { return };
        let mut buffer = [0; 4096];
        match socket.read(&mut buffer) {
            Ok(0) => {
                let why = "it closed the connection";
                self.outcome = Some(Err(io::Error::new(io::ErrorKind::ConnectionReset, why)));
            }
            Ok(n) => {
                self.input.extend_from_slice(&buffer[..n]);
                if self.incoming.is_some() { self.read_body() } else { self.parse() }
            }
            Err(e)
                if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => self.outcome = Some(Err(e)),
        }
    }

    /// What a wait for this exchange and others came to.
    fn take(&mut self, came: &io::Result<bool>) {
        match came {
            Ok(true) => self.listen(),
            Ok(false) => self.outcome = Some(Err(late())),
            Err(e) => self.outcome = Some(Err(io::Error::new(e.kind(), e.to_string()))),
        }
    }

    fn has_failed(&self) -> bool {
        !matches!(self.outcome, None | Some(Ok(Answer { status: 200..=299, .. })))
    }

    fn parse(&mut self) {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut answer = httparse::Response::new(&mut headers);
        let end = match answer.parse(&self.input) {
            Ok(httparse::Status::Complete(end)) => end,
            Ok(httparse::Status::Partial) if self.input.len() < HEAD_MOST => return,
            _ => {
                self.outcome = Some(Err(io::Error::other("its answer is not HTTP")));
                return;
            }
        };
        let status = answer.code.unwrap_or(0);
        if status < 200 {
            self.input.drain(..end);
            if !self.input.is_empty() {
                self.parse();
            }
            return;
        }
        let header = |name: &str| {
            let found = answer.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
            found.and_then(|header| std::str::from_utf8(header.value).ok())
        };
        let length = header("content-length").and_then(|length| length.parse().ok());
        let body = match status {
            204 | 304 => 0,
            _ if self.head.starts_with(b"HEAD ") => 0,
            _ => length.unwrap_or(u64::MAX),
        };
        let stays = !header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        let chunked = header("transfer-encoding").is_some();
        let answer = Answer { status, length, body: Vec::new() };
        self.input.drain(..end);
        if self.head.starts_with(b"GET ") && status == 200 {
            let left = if chunked { 0 } else { body };
            self.incoming = Some(Incoming { answer, chunked, left, chunk: None, stays });
            return self.read_body();
        }
        // Else the connection is closed: it is not worth waiting for the rest.
        let complete = body == self.input.len() as u64;
        self.end(answer, stays && complete);
    }

    /// Takes what has come of a body.
    fn read_body(&mut self) {
        let Some(incoming) = &mut self.incoming else { return };
        loop {
            let n = self.input.len().min(incoming.left.try_into().unwrap_or(usize::MAX));
            incoming.answer.body.extend(self.input.drain(..n));
            incoming.left -= n as u64;
            if incoming.left > 0 {
                return;
            }
            if let Some(size) = incoming.chunk.take() {
                incoming.answer.body.truncate(incoming.answer.body.len() - 2);
                incoming.chunked = size > 0;
            }
            if !incoming.chunked {
                break;
            }
            match httparse::parse_chunk_size(&self.input) {
                Ok(httparse::Status::Complete((n, size))) if size < u64::MAX - 2 => {
                    self.input.drain(..n);
                    (incoming.chunk, incoming.left) = (Some(size), size + 2);
                }
                Ok(httparse::Status::Partial) if self.input.len() < 64 => return,
                _ => {
                    self.outcome = Some(Err(io::Error::other("its answer is not HTTP")));
                    return;
                }
            }
        }
        let (answer, stays) = (std::mem::take(&mut incoming.answer), incoming.stays);
        self.end(answer, stays && self.input.is_empty());
    }

    /// The exchange is over. `stays`: the connection is good for the next.
    fn end(&mut self, answer: Answer, stays: bool) {
        self.outcome = Some(Ok(answer));
        if let Some(socket) = self.socket.take()
            && stays
            && self.whole
        {
            self.line.put_back(socket);
        }
    }
}

fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it took too long")
}

/// Waits for one of these; `false`: the time is up.
fn ready(fds: &mut [PollFd], until: Instant) -> io::Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match poll(fds, left.try_into().ok().as_ref()) {
            Ok(n) => return Ok(n > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Sends each exchange's head, where that has not been sent, and a frame of the body that they
/// share. When this returns, all have it or have an outcome.
pub fn send(exchanges: &mut [Exchange], frame: &[u8], last: bool) {
    for exchange in &mut *exchanges {
        if exchange.socket.is_none() && exchange.outcome.is_none() {
            exchange.connect();
        } else if exchange.sent > 0 {
            (exchange.sent, exchange.first) = (exchange.head.len(), false);
            exchange.listen();
        }
    }
    loop {
        for exchange in &mut *exchanges {
            exchange.push(frame, last);
            if exchange.again() {
                exchange.push(frame, last);
            }
        }
        let mut fds = Vec::new();
        for exchange in exchanges.iter().filter(|exchange| !exchange.is_sent(frame)) {
            let socket = exchange.socket.as_ref();
            fds.extend(socket.map(|s| PollFd::new(s, PollFlags::IN | PollFlags::OUT)));
        }
        if fds.is_empty() {
            return;
        }
        let moved = ready(&mut fds, Instant::now() + STALL);
        let waits = |exchange: &&mut Exchange| !exchange.is_sent(frame);
        exchanges.iter_mut().filter(waits).for_each(|exchange| exchange.take(&moved));
    }
}

/// Waits for the answers of those that were sent everything. `frame`: the last one, in case it was
/// the first too and is needed again. Once one has failed, the others have until `hurry` from then,
/// and may be left without an outcome. A body that is collected only has to go on coming.
pub fn finish(exchanges: &mut [Exchange], frame: &[u8], mut until: Instant, hurry: Duration) {
    let mut failed = false;
    loop {
        for exchange in exchanges.iter_mut().filter(|exchange| exchange.whole) {
            if exchange.again() {
                send(std::slice::from_mut(exchange), frame, true);
            }
        }
        if !failed && exchanges.iter().any(Exchange::has_failed) {
            failed = true;
            until = until.min(Instant::now() + hurry);
        }
        let waits = |exchange: &&mut Exchange| exchange.whole && exchange.outcome.is_none();
        let mut fds = Vec::new();
        for exchange in exchanges.iter_mut().filter(waits) {
            fds.extend(exchange.socket.as_ref().map(|socket| PollFd::new(socket, PollFlags::IN)));
        }
        if fds.is_empty() {
            return;
        }
        let came = ready(&mut fds, until);
        if !failed && exchanges.iter().any(|exchange| exchange.incoming.is_some()) {
            until = until.max(Instant::now() + STALL);
        }
        if failed && matches!(came, Ok(false)) {
            return;
        }
        exchanges.iter_mut().filter(waits).for_each(|exchange| exchange.take(&came));
    }
}

/// What is done with an answer; `None`: there is no connection to ask on without waiting.
pub type Then = Box<dyn FnOnce(Option<io::Result<Answer>>) + Send>;

/// Requests whose answers one thread waits for.
pub struct Scout {
    epoll: OwnedFd,
    asked: Mutex<HashMap<RawFd, (Exchange, Instant, Then)>>,
}

/// How often the scout looks for exchanges that take too long.
const LOOK: Duration = Duration::from_millis(50);

impl Scout {
    pub fn new() -> io::Result<Arc<Scout>> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let scout = Arc::new(Scout { epoll, asked: Mutex::default() });
        let this = scout.clone();
        std::thread::Builder::new().name("mkv-scout".into()).spawn(move || this.hear())?;
        Ok(scout)
    }

    /// Sends a request without a body, and has `then` called, by whatever thread, but soon.
    pub fn ask(&self, mut exchange: Exchange, until: Instant, then: Then) {
        exchange.push(&[], true);
        if exchange.whole { self.await_answer(exchange, until, then) } else { then(None) }
    }

    fn await_answer(&self, exchange: Exchange, until: Instant, then: Then) {
        let Some(fd) = exchange.socket.as_ref().map(AsRawFd::as_raw_fd) else { return then(None) };
        // The socket stays open, and its number its own, as long as it is in `asked`.
        let mut asked = lock(&self.asked);
        let (exchange, ..) = &*asked.entry(fd).insert_entry((exchange, until, then)).into_mut();
        let data = epoll::EventData::new_u64(fd as u64);
        let socket = exchange.socket.as_ref();
        let added =
            socket.is_some_and(|s| epoll::add(&self.epoll, s, data, epoll::EventFlags::IN).is_ok());
        let failed = if added { None } else { asked.remove(&fd) };
        drop(asked);
        if let Some((.., then)) = failed {
            then(None);
        }
    }

    fn hear(&self) {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
        let mut looked = Instant::now();
        loop {
            let pause = LOOK.try_into().ok();
            let _ = epoll::wait(&self.epoll, spare_capacity(&mut events), pause.as_ref());
            let mut asked = lock(&self.asked);
            let heard = events.drain(..).map(|event| event.data.u64() as RawFd);
            let mut done: Vec<_> = heard.filter_map(|fd| asked.remove(&fd)).collect();
            if looked.elapsed() > LOOK {
                looked = Instant::now();
                let late = asked.extract_if(|_, (_, until, _)| *until < looked);
                done.extend(late.map(|(_, asked)| asked));
            }
            drop(asked);
            for (mut exchange, until, then) in done {
                if let Some(socket) = &exchange.socket {
                    let _ = epoll::delete(&self.epoll, socket);
                }
                exchange.listen();
                match exchange.outcome.take() {
                    None if Instant::now() < until => self.await_answer(exchange, until, then),
                    outcome => {
                        let outcome = outcome.unwrap_or_else(|| Err(late()));
                        let _ = catch_unwind(AssertUnwindSafe(|| then(Some(outcome))));
                    }
                }
            }
        }
    }
}
