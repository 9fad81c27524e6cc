//! A blocking HTTP/1.1 client for the volumes: connect, send, read the response.
//!
//! One thread reaches several volumes at once: it sends to all of them, then waits for all responses
//! against one deadline (`await_all`). HEAD, PUT, DELETE and listings go this way; single blobs are
//! read with ureq, in `mod.rs`. ureq does not fit here: it holds a thread for each request under way,
//! and while it sends a body it does not notice a volume's early refusal.
//!
//! - Nothing blocks for longer than `STALL`, or past the caller's deadline.
//! - A request whose idle connection the volume had closed is sent once more on a new one.
//! - `Call::sent_whole` says whether the volume may carry out a request that has no response.
//!
//! It knows nothing of replicas and blobs, follows no redirect and judges no status.

use std::fmt::Display;
use std::io::{self, ErrorKind, IoSlice, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use crate::threads::lock;

/// How long a volume may make no progress. nginx can be silent for long while its disk writes back.
pub const STALL: Duration = Duration::from_secs(60);

/// A blocked write returns this often, so that a volume which refuses without reading on is heard.
const TICK: Duration = Duration::from_secs(1);

/// How long resolved addresses are used.
const RESOLVED: Duration = Duration::from_secs(60);

/// How long an idle connection is kept: a stock nginx closes its own after 75 s.
const IDLE: Duration = Duration::from_secs(50);
const IDLE_MAX: usize = 64;

/// Bytes of a response's head, at most.
const HEAD_MAX: usize = 64 << 10;

/// The addresses of one volume, and its idle connections.
#[derive(Debug)]
pub struct Connections {
    host: String,
    timeout: Duration,
    addresses: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
    /// Where the volume accepted the latest connection.
    peer: Mutex<Option<SocketAddr>>,
    idle: Mutex<Vec<(Instant, TcpStream)>>,
}

impl Connections {
    /// `host`: with a port, or port 80 is meant. `timeout`: for connecting to one address.
    pub fn new(host: &str, timeout: Duration) -> Connections {
        let (addresses, peer, idle) = Default::default();
        Connections { host: host.into(), timeout, addresses, peer, idle }
    }

    /// The host's addresses, resolved at most `RESOLVED` ago.
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

    /// The address that accepted the latest connection: a name may have others that nobody answers at.
    pub fn peer(&self) -> io::Result<SocketAddr> {
        let peer = *lock(&self.peer);
        let first = || self.addresses()?.first().copied().ok_or_else(|| io::Error::other("its name has no address"));
        peer.map_or_else(first, Ok)
    }

    /// Resolves the name anew next time: the volume may have moved.
    pub fn forget_addresses(&self) {
        *lock(&self.addresses) = None;
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let mut failed = io::Error::other("its name has no address");
        for address in self.addresses()? {
            match TcpStream::connect_timeout(&address, self.timeout) {
                Ok(socket) => {
                    socket.set_nodelay(true)?;
                    socket.set_write_timeout(Some(TICK))?;
                    socket.set_read_timeout(Some(self.timeout))?;
                    *lock(&self.peer) = Some(address);
                    return Ok(socket);
                }
                Err(e) => failed = e,
            }
        }
        self.forget_addresses();
        Err(failed)
    }

    /// An idle connection that the volume has not closed in the meantime.
    fn reuse(&self) -> Option<TcpStream> {
        loop {
            let (since, socket) = lock(&self.idle).pop()?;
            if since.elapsed() < IDLE && !has_input(&socket) {
                return Some(socket);
            }
        }
    }

    fn keep(&self, socket: TcpStream) {
        let mut idle = lock(&self.idle);
        if idle.len() == IDLE_MAX {
            idle.remove(0);
        }
        idle.push((Instant::now(), socket));
    }
}

/// A volume's response.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    /// Its Content-Length.
    pub length: Option<u64>,
    /// The body of a GET's 200, otherwise empty.
    pub body: Vec<u8>,
    chunked: bool,
    persistent: bool,
}

/// Bytes that are received at a time: the head of a response first, then as many as there are already.
const READ: RangeInclusive<usize> = 1 << 10..=64 << 10;

/// A part of a request's body, in three pieces.
pub type Part<'a> = [&'a [u8]; 3];

pub const NO_BODY: Part = [&[]; 3];

/// One request to one volume.
pub struct Call {
    to: Arc<Connections>,
    /// The request's head.
    head: Vec<u8>,
    /// `None`: not connected yet, or the call is over.
    socket: Option<TcpStream>,
    /// The connection was an idle one. Before the connection is made: an idle one will do.
    reused: bool,
    /// Only the first part of the body was sent, which the caller still has.
    first: bool,
    /// All of the request was sent, at least once: the volume may carry it out.
    pub sent_whole: bool,
    /// Received, and not used yet.
    input: Vec<u8>,
    pub outcome: Option<io::Result<Response>>,
}

impl Call {
    /// `headers`: whole lines.
    pub fn new(to: &Arc<Connections>, method: &str, target: impl Display, headers: impl Display) -> Call {
        let head = format!("{method} {target} HTTP/1.1\r\nHost: {}\r\n{headers}\r\n", to.host);
        Call {
            to: to.clone(),
            head: head.into_bytes(),
            socket: None,
            reused: true,
            first: true,
            sent_whole: false,
            input: Vec::new(),
            outcome: None,
        }
    }

    /// Sends a part of the body, which may be in pieces; the head goes with the first one. `last`: the
    /// request ends with it. Returns false once the call has an outcome: an early refusal, or an error.
    pub fn send(&mut self, part: Part, last: bool) -> bool {
        if self.outcome.is_some() {
            return false;
        }
        let sent = match &self.socket {
            None => self.start(part),
            Some(socket) => {
                self.first = false;
                check_silent(socket).and_then(|()| write_all(socket, &mut part.map(IoSlice::new)))
            }
        };
        let Err(error) = sent else {
            self.sent_whole |= last;
            return true;
        };
        // The volume may have sent an error before closing; read it.
        match self.receive(Instant::now() + TICK) {
            Ok(response) => self.outcome = Some(Ok(response)),
            Err(_) if self.can_be_sent_again(&error) => self.send_again(part, last),
            Err(_) => self.outcome = Some(Err(error)),
        }
        self.outcome.is_none()
    }

    fn start(&mut self, [a, b, c]: Part) -> io::Result<()> {
        let idle = if self.reused { self.to.reuse() } else { None };
        self.reused = idle.is_some();
        let socket = idle.map_or_else(|| self.to.connect(), Ok)?;
        let socket = self.socket.insert(socket);
        write_all(socket, &mut [&self.head[..], a, b, c].map(IoSlice::new))
    }

    /// Whether a failure only means that the volume had closed its idle connection.
    fn can_be_sent_again(&self, error: &io::Error) -> bool {
        let untouched = self.first && self.input.is_empty();
        self.reused && untouched && error.kind() != ErrorKind::TimedOut
    }

    /// Sends the request on a new connection. `part`: the first of the body.
    fn send_again(&mut self, part: Part, last: bool) {
        (self.socket, self.reused) = (None, false);
        self.send(part, last);
    }

    /// Reads the response of a request that was sent. `part`: the last of its body.
    fn finish(&mut self, part: Part, deadline: Instant) {
        match self.receive(deadline) {
            Err(error) if self.can_be_sent_again(&error) => self.send_again(part, true),
            outcome => self.outcome = Some(outcome),
        }
    }

    /// Whether a response is to be read.
    fn waits(&self) -> bool {
        self.sent_whole && self.outcome.is_none() && self.socket.is_some()
    }

    fn has_failed(&self) -> bool {
        !matches!(self.outcome, None | Some(Ok(Response { status: 200..=299, .. })))
    }

    /// Reads the response. `deadline` is for its head; a body that is collected only has to make
    /// progress.
    fn receive(&mut self, deadline: Instant) -> io::Result<Response> {
        let mut response = loop {
            match Response::parse(&mut self.input)? {
                Some(response) => break response,
                None => self.read_more(deadline)?,
            }
        };
        let has_no_body = response.status == 204 || self.head.starts_with(b"HEAD ");
        // A short body of an error comes with its head; a longer one is not worth waiting for.
        let mut rest = if has_no_body { Some(0) } else { response.length };
        if response.status == 200 && self.head.starts_with(b"GET ") {
            response.body = self.read_body(&response)?;
            rest = Some(0);
        }
        let complete = rest == Some(self.input.len() as u64);
        if let Some(socket) = self.socket.take()
            && (response.persistent && complete && self.sent_whole)
        {
            self.to.keep(socket);
        }
        Ok(response)
    }

    fn read_body(&mut self, response: &Response) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        if !response.chunked {
            self.read_exactly(response.length.ok_or_else(not_http)?, &mut body)?;
            return Ok(body);
        }
        loop {
            match httparse::parse_chunk_size(&self.input) {
                Ok(httparse::Status::Complete((n, size))) => {
                    self.input.drain(..n);
                    self.read_exactly(size, &mut body)?;
                    // The line's end behind the chunk; behind the last one, that of the body.
                    self.read_exactly(2, &mut Vec::new())?;
                    if size == 0 {
                        return Ok(body);
                    }
                }
                Ok(httparse::Status::Partial) if self.input.len() < 64 => {
                    self.read_more(Instant::now() + STALL)?;
                }
                _ => return Err(not_http()),
            }
        }
    }

    fn read_exactly(&mut self, mut left: u64, body: &mut Vec<u8>) -> io::Result<()> {
        loop {
            let n = self.input.len().min(left.try_into().unwrap_or(usize::MAX));
            body.extend(self.input.drain(..n));
            left -= n as u64;
            if left == 0 {
                return Ok(());
            }
            self.read_more(Instant::now() + STALL)?;
        }
    }

    /// Receives at least one byte into `input`.
    fn read_more(&mut self, deadline: Instant) -> io::Result<()> {
        let socket = self.socket.as_ref().ok_or(ErrorKind::NotConnected)?;
        let before = self.input.len();
        // On the heap: the stack of an idle connection's thread keeps what it once used.
        self.input.resize(before + before.clamp(*READ.start(), *READ.end()), 0);
        let received = loop {
            // A blocking receive spares a poll. It returns after the connection's timeout.
            let blocks = deadline.saturating_duration_since(Instant::now()) > self.to.timeout / 2;
            let flags = if blocks { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
            match recv(socket, &mut self.input[before..], flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if let Err(e) = wait(&mut [PollFd::new(socket, PollFlags::IN)], deadline) {
                        break Err(e);
                    }
                }
                Err(e) => break Err(e.into()),
                Ok((0, _)) => break Err(io::Error::new(ErrorKind::ConnectionReset, "it closed the connection")),
                Ok((count, _)) => break Ok(count),
            }
        };
        self.input.truncate(before + received.as_ref().copied().unwrap_or(0));
        received.map(drop)
    }
}

/// Waits for the responses to the requests that were sent whole. `part`: the last one of their body,
/// in case it was the first too and has to be sent again.
///
/// Once a call has failed, the others have `after_failure` more at most; those that do not answer in
/// it have no outcome. Without a failure, a call that is not answered in time has an error as its
/// outcome.
pub fn await_all(calls: &mut [Call], part: Part, mut deadline: Instant, after_failure: Duration) {
    if let [call] = calls {
        while call.waits() {
            call.finish(part, deadline);
        }
    }
    let mut failed = false;
    loop {
        if !failed && calls.iter().any(Call::has_failed) {
            failed = true;
            deadline = deadline.min(Instant::now() + after_failure);
        }
        let mut waiting: Vec<_> = calls.iter_mut().filter(|call| call.waits()).collect();
        let sockets = waiting.iter().filter_map(|call| call.socket.as_ref());
        let mut fds: Vec<_> = sockets.map(|s| PollFd::new(s, PollFlags::IN)).collect();
        if fds.is_empty() {
            return;
        }
        let came = wait(&mut fds, deadline);
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        match came {
            Ok(()) => {
                let ready = waiting.into_iter().zip(ready).filter(|(_, ready)| *ready);
                ready.for_each(|(call, _)| call.finish(part, deadline));
            }
            Err(_) if failed => return,
            Err(e) => waiting.iter_mut().for_each(|call| {
                call.outcome = Some(Err(io::Error::new(e.kind(), e.to_string())));
            }),
        }
    }
}

impl Response {
    /// Takes a head from the start of `input`; `None`: it is not there yet. Interim responses (1xx)
    /// are skipped.
    fn parse(input: &mut Vec<u8>) -> io::Result<Option<Response>> {
        loop {
            let mut headers = [const { MaybeUninit::uninit() }; 64];
            let mut head = httparse::Response::new(&mut []);
            let config = httparse::ParserConfig::default();
            let end = match config.parse_response_with_uninit_headers(&mut head, input, &mut headers) {
                Ok(httparse::Status::Complete(end)) => end,
                Ok(httparse::Status::Partial) if input.len() < HEAD_MAX => return Ok(None),
                _ => return Err(not_http()),
            };
            let header = |name: &str| {
                let found = head.headers.iter().find(|h| h.name.eq_ignore_ascii_case(name));
                found.and_then(|header| std::str::from_utf8(header.value).ok())
            };
            let closes = header("connection").is_some_and(|v| v.eq_ignore_ascii_case("close"));
            let response = Response {
                status: head.code.unwrap_or(0),
                length: header("content-length").and_then(|length| length.parse().ok()),
                body: Vec::new(),
                chunked: header("transfer-encoding").is_some(),
                persistent: head.version == Some(1) && !closes,
            };
            input.drain(..end);
            if response.status >= 200 {
                return Ok(Some(response));
            }
        }
    }
}

/// Whether there is something to read: bytes, the end of the stream or an error.
fn has_input(socket: &TcpStream) -> bool {
    recv(socket, &mut [0], RecvFlags::PEEK | RecvFlags::DONTWAIT) != Err(Errno::AGAIN)
}

/// An error where the volume has answered before the end of the request: it refuses.
fn check_silent(socket: &TcpStream) -> io::Result<()> {
    if has_input(socket) { Err(ErrorKind::BrokenPipe.into()) } else { Ok(()) }
}

/// Writes all of these. A volume that answers while it reads no further ends it with an error.
fn write_all(mut socket: &TcpStream, mut parts: &mut [IoSlice]) -> io::Result<()> {
    IoSlice::advance_slices(&mut parts, 0);
    let mut moved = Instant::now();
    while !parts.is_empty() {
        match socket.write_vectored(parts) {
            Ok(n) => {
                IoSlice::advance_slices(&mut parts, n);
                moved = Instant::now();
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock && moved.elapsed() < STALL => {
                check_silent(socket)?;
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Err(timed_out()),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Waits until one of these is ready; an error where none is before the deadline.
fn wait(fds: &mut [PollFd], deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(fds, left.try_into().ok().as_ref()) {
            Ok(0) => return Err(timed_out()),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn timed_out() -> io::Error {
    io::Error::new(ErrorKind::TimedOut, "it took too long")
}

fn not_http() -> io::Error {
    io::Error::other("its answer is not HTTP")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;

    /// A server that does what the script says, and the connections to it.
    fn server(script: impl FnOnce(TcpListener) + Send + 'static) -> Arc<Connections> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || script(listener));
        Arc::new(Connections::new(&host, Duration::from_secs(1)))
    }

    /// Accepts a connection, if there is none yet, reads a request without a body, and responds.
    fn serve(listener: &TcpListener, socket: Option<TcpStream>, response: &[u8]) -> TcpStream {
        let mut socket = socket.unwrap_or_else(|| listener.accept().unwrap().0);
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            socket.read_exact(&mut byte).unwrap();
            request.push(byte[0]);
        }
        socket.write_all(response).unwrap();
        socket
    }

    const EMPTY: &[u8] = b"HTTP/1.1 204 No Content\r\n\r\n";

    fn ask(to: &Arc<Connections>, method: &str) -> Call {
        let mut calls = [Call::new(to, method, "/", "")];
        calls[0].send(NO_BODY, true);
        let limit = Duration::from_secs(5);
        await_all(&mut calls, NO_BODY, Instant::now() + limit, limit);
        let [call] = calls;
        call
    }

    #[test]
    fn a_body_arrives_whole_in_whatever_pieces_it_comes() {
        let head = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n";
        for (framed, persistent) in [
            ("Content-Length: 9\r\n\r\nsome text", true),
            ("Transfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n5\r\n text\r\n0\r\n\r\n", true),
            ("Connection: close\r\nContent-Length: 9\r\n\r\nsome text", false),
        ] {
            let response = format!("{head}{framed}").into_bytes();
            for piece in [1, 2, 3, 7, 1000] {
                let response = response.clone();
                let to = server(move |listener| {
                    let mut socket = serve(&listener, None, b"");
                    for piece in response.chunks(piece) {
                        socket.write_all(piece).unwrap();
                        std::thread::sleep(Duration::from_micros(100));
                    }
                    let _ = socket.read(&mut [0]);
                });
                let response = ask(&to, "GET").outcome.unwrap().unwrap();
                assert_eq!((response.status, &response.body[..]), (200, &b"some text"[..]));
                assert_eq!(lock(&to.idle).len(), usize::from(persistent));
            }
        }
    }

    #[test]
    fn a_body_that_ends_early_is_an_error() {
        for framed in [
            "Content-Length: 10\r\n\r\nsome text",
            "Transfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n5\r\n text\r\n",
            "Transfer-Encoding: chunked\r\n\r\nx\r\nsome\r\n",
            "\r\nsome text",
        ] {
            let response = format!("HTTP/1.1 200 OK\r\n{framed}").into_bytes();
            let to = server(move |listener| drop(serve(&listener, None, &response)));
            assert!(ask(&to, "GET").outcome.unwrap().is_err(), "{framed}");
        }
    }

    #[test]
    fn a_request_on_a_closed_connection_is_sent_again() {
        let to = server(|listener| {
            let socket = serve(&listener, None, EMPTY);
            drop(serve(&listener, Some(socket), b""));
            serve(&listener, None, EMPTY);
        });
        for _ in 0..2 {
            assert_eq!(ask(&to, "DELETE").outcome.unwrap().unwrap().status, 204);
        }
    }

    #[test]
    fn a_request_that_cannot_be_sent_again_may_have_been_done() {
        let to = server(|listener| {
            let socket = serve(&listener, None, EMPTY);
            let socket = serve(&listener, Some(socket), b"");
            drop(listener);
            drop(socket);
        });
        assert!(ask(&to, "DELETE").outcome.unwrap().is_ok());
        let call = ask(&to, "DELETE");
        assert!(call.outcome.unwrap().is_err() && call.sent_whole);
        let call = ask(&to, "DELETE");
        assert!(call.outcome.unwrap().is_err() && !call.sent_whole);
    }

    #[test]
    fn a_refusal_is_heard_while_the_volume_reads_nothing() {
        let to = server(|listener| {
            let mut socket = serve(&listener, None, b"");
            // By then the way is full, and the client waits for room.
            std::thread::sleep(Duration::from_millis(500));
            socket.write_all(b"HTTP/1.1 500 Refused\r\nContent-Length: 0\r\n\r\n").unwrap();
            std::thread::sleep(Duration::from_secs(20));
        });
        let begun = Instant::now();
        let mut call = Call::new(&to, "PUT", "/", "Content-Length: 1000000000\r\n");
        while call.send([&[b'v'; 1 << 20], b"", b""], false) {}
        assert_eq!(call.outcome.unwrap().unwrap().status, 500);
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        assert!(lock(&to.idle).is_empty());
    }

    #[test]
    fn once_a_call_has_failed_the_others_have_little_time() {
        let silent = server(|listener| {
            let socket = serve(&listener, None, b"");
            std::thread::sleep(Duration::from_secs(20));
            drop(socket);
        });
        let refusing = server(|listener| {
            serve(&listener, None, b"HTTP/1.1 500 Refused\r\nContent-Length: 0\r\n\r\n");
        });
        let begun = Instant::now();
        let mut calls = [Call::new(&silent, "PUT", "/", ""), Call::new(&refusing, "PUT", "/", "")];
        calls.iter_mut().for_each(|call| assert!(call.send(NO_BODY, true)));
        let soon = Duration::from_millis(100);
        await_all(&mut calls, NO_BODY, begun + Duration::from_secs(20), soon);
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        let [silent, refusing] = calls;
        assert!(silent.outcome.is_none() && silent.sent_whole);
        assert_eq!(refusing.outcome.unwrap().unwrap().status, 500);
    }
}
