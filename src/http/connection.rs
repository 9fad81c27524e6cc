//! One client's connection: requests are read, answered and written one after the other.

use std::io::{self, ErrorKind};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use super::body::Body;
use super::input::Input;
use super::request::{HEAD_MAX, NO_FIELDS, Request};
use super::response::Next;
use super::server::{Counted, Server};
use super::{Handler, Refusal};

/// How long a connection is read after its last response. If it were closed with unread bytes, the kernel
/// would reset it, and the client could lose the response.
const LINGER: Duration = Duration::from_secs(2);

/// An unread body of at most this many bytes is skipped, so that the connection can be kept.
const SKIP_MAX: u64 = 64 << 10;

/// An idle connection keeps buffers of at most this many bytes.
const KEEP: usize = 2 << 10;

pub struct Connection<'a, H> {
    server: &'a Server<H>,
    input: Input,
    head: Vec<u8>,
    output: Vec<u8>,
    date: Date,
}

/// Frees a large buffer. Shrinking it in place would fragment the heap.
fn trim(buffer: &mut Vec<u8>) {
    if buffer.capacity() > KEEP {
        *buffer = Vec::new();
    }
}

/// The text of the Date header, formatted once a second.
#[derive(Default)]
struct Date {
    second: u64,
    text: String,
}

impl Date {
    fn now(&mut self) -> &str {
        let now = SystemTime::now();
        let second = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        if self.second != second || self.text.is_empty() {
            (self.second, self.text) = (second, httpdate::fmt_http_date(now));
        }
        &self.text
    }
}

impl<'a, H: Handler> Connection<'a, H> {
    pub fn new(server: &'a Server<H>, socket: TcpStream) -> io::Result<Connection<'a, H>> {
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(server.config.stall_timeout))?;
        let (head, output) = (Vec::new(), Vec::new());
        Ok(Connection { server, input: Input::new(socket), head, output, date: Date::default() })
    }

    /// Answers requests until the client, an error or a limit ends the connection.
    pub fn serve(&mut self) {
        loop {
            let goes_on = match self.read_head() {
                Ok(true) => self.answer(),
                Ok(false) => return,
                Err(refusal) => return self.refuse(refusal),
            };
            match goes_on {
                Ok(true) => {}
                Ok(false) => return self.linger(),
                Err(error) => return log::debug!("a connection has failed: {error}"),
            }
            trim(&mut self.head);
            trim(&mut self.output);
        }
    }

    /// Sends a refusal and ends the connection.
    pub fn refuse(&mut self, refusal: Refusal) {
        match self.send_refusal(refusal) {
            Ok(_) => self.linger(),
            Err(error) => log::debug!("a refusal was not sent: {error}"),
        }
    }

    /// Reads the next head including its empty line. `false`: the client has closed the connection or was idle for
    /// too long.
    fn read_head(&mut self) -> Result<bool, Refusal> {
        self.head.clear();
        let (mut begun, mut start, mut skipped) = (Instant::now(), 0, false);
        loop {
            if !self.input.take_line(&mut self.head, HEAD_MAX)? {
                let is_first = self.head.is_empty();
                if !self.wait(begun)? {
                    return Ok(false);
                }
                if is_first {
                    begun = Instant::now();
                }
            } else if self.head[start..] != *b"\r\n" {
                start = self.head.len();
            } else if start > 0 || skipped {
                return Ok(true);
            } else {
                // RFC 9112, 2.2: one empty line before a request is ignored.
                skipped = true;
                self.head.clear();
            }
        }
    }

    /// Waits for more of a head that began at `begun`. `false`: the client has closed the connection or was idle for
    /// too long.
    fn wait(&mut self, begun: Instant) -> Result<bool, Refusal> {
        // Without this check, a TLS client would wait until the timeout.
        if self.head.first().is_some_and(|first| !first.is_ascii_graphic() && *first != b'\r') {
            return Err(Refusal::Malformed("this is no HTTP"));
        }
        let (config, idle) = (&self.server.config, self.head.is_empty());
        let left = config.head_timeout.saturating_sub(begun.elapsed());
        match self.input.wait(if idle { config.idle_timeout } else { left }) {
            Ok(0) => Ok(false),
            Ok(_) if idle || !left.is_zero() => Ok(true),
            Err(error) if idle || error.kind() != ErrorKind::WouldBlock => Ok(false),
            _ => Err(Refusal::HeadTimeout),
        }
    }

    /// Answers the request whose head was read. Returns whether the connection is kept.
    fn answer(&mut self) -> io::Result<bool> {
        let busy = Counted::new(&self.server.busy);
        let mut fields = NO_FIELDS;
        let request = match Request::parse(&self.head, &mut fields) {
            Ok(_) if self.server.is_stopping() => return self.send_refusal(Refusal::Stopping),
            Ok(request) => request,
            Err(refusal) => return self.send_refusal(refusal),
        };
        let server = self.server;
        let mut body = Body::new(&mut self.input, &request, server.config.stall_timeout, &server.counters);
        let response = server.handler.handle(&request, &mut body);
        let goes_on = !request.close && body.rest().is_some_and(|rest| rest <= SKIP_MAX) && !server.is_stopping();
        let next = match request.minor {
            _ if !goes_on => Next::Close,
            0 => Next::SayKeep,
            _ => Next::Keep,
        };
        let date = self.date.now();
        let to_head = request.method == "HEAD";
        let sent = response.send(body.socket(), to_head, next, date, &mut self.output)?;
        server.counters.sent.fetch_add(sent, Ordering::Relaxed);
        drop(busy);
        // io::copy clears 8 KiB of stack before it finds out that there is nothing to copy.
        if goes_on && body.rest() != Some(0) {
            io::copy(&mut body, &mut io::sink())?;
        }
        Ok(goes_on)
    }

    /// Sends a refusal. Returns false: the connection is not kept.
    fn send_refusal(&mut self, refusal: Refusal) -> io::Result<bool> {
        let response = self.server.handler.refuse(refusal);
        let (socket, date) = (self.input.socket(), self.date.now());
        let sent = response.send(socket, false, Next::Close, date, &mut self.output)?;
        self.server.counters.sent.fetch_add(sent, Ordering::Relaxed);
        Ok(false)
    }

    /// Discards input until the client closes the connection, for `LINGER` at most.
    fn linger(&mut self) {
        let until = Instant::now() + LINGER;
        if self.input.socket().shutdown(Shutdown::Write).is_err() {
            return;
        }
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            match self.input.wait(left) {
                Ok(count) if count > 0 => self.input.consume(count),
                _ => return,
            }
        }
    }
}
