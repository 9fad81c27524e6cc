//! A request's body (RFC 9112, sections 6 and 7), as a reader.
//!
//! `Ok(0)` means that the body is complete. If it is cut short, malformed or too slow, every further read
//! fails. Chunk extensions and trailers are read and ignored; their length is bounded.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use httparse::{EMPTY_HEADER, Status};

use super::input::Input;
use super::request::{FIELDS_MAX, HEAD_MAX, Request};
use super::{Counters, Refusal};

/// A client that sends fewer bytes than this in each stall timeout is too slow.
const PROGRESS: usize = 1 << 10;

/// The longest line with a chunk's size, in bytes, its extensions and CRLF included.
const SIZE_LINE_MAX: usize = 256;

pub struct Body<'a> {
    input: &'a mut Input,
    counters: &'a Counters,
    state: State,
    /// The Content-Length. `None`: the body is chunked.
    length: Option<u64>,
    /// The client waits for `100 Continue`.
    expected: bool,
    stall_timeout: Duration,
    /// How long we have waited for the client since its last 1 KiB, and the bytes received since then.
    waited: Duration,
    came: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    /// This many bytes of the body are left.
    Length(u64),
    /// A chunk's size line follows.
    Size,
    /// This many bytes of a chunk are left; its CRLF follows.
    Chunk(u64),
    Ended,
    /// A read has failed, so the position in the body is unknown.
    Broken,
}

impl<'a> Body<'a> {
    pub(super) fn new(
        input: &'a mut Input,
        request: &Request,
        stall_timeout: Duration,
        counters: &'a Counters,
    ) -> Body<'a> {
        let state = match request.length {
            Some(0) => State::Ended,
            Some(length) => State::Length(length),
            None => State::Size,
        };
        Body {
            input,
            counters,
            state,
            length: request.length,
            expected: request.expects_continue,
            stall_timeout,
            waited: Duration::ZERO,
            came: 0,
        }
    }

    /// The Content-Length in bytes. `None`: the body is chunked.
    pub fn length(&self) -> Option<u64> {
        self.length
    }

    pub(super) fn socket(&self) -> &TcpStream {
        self.input.socket()
    }

    /// The bytes that the client will still send. `None`: unknown.
    pub(super) fn rest(&self) -> Option<u64> {
        match self.state {
            // A client that waits for `100 Continue` and gets a final response may send the body or not.
            _ if self.expected => None,
            State::Ended => Some(0),
            State::Length(left) => Some(left),
            _ => None,
        }
    }

    /// Sends `100 Continue` if the client waits for it, also where the body is empty: some clients take the next
    /// response for an answer to this request otherwise.
    pub fn accept(&mut self) -> io::Result<()> {
        self.send_continue()
    }

    /// Sends `100 Continue`, unless the client has already begun to send the body (RFC 9110, 10.1.1).
    fn send_continue(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.expected) && self.input.buffered().is_empty() {
            self.input.socket().write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        Ok(())
    }

    /// Records the outcome of a wait that began at `begun`, and returns it. Fails if the client is too slow.
    fn note(&mut self, came: io::Result<usize>, begun: Instant) -> io::Result<usize> {
        let limit = self.stall_timeout;
        let stalled = || {
            let text = format!("less than 1 KiB came in {limit:?}");
            io::Error::new(ErrorKind::TimedOut, text)
        };
        let count = match came {
            Ok(0) => return Err(io::Error::new(ErrorKind::UnexpectedEof, "the client went away")),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(stalled()),
            came => came?,
        };
        self.waited += begun.elapsed();
        self.came += count;
        if self.came >= PROGRESS {
            (self.waited, self.came) = (Duration::ZERO, 0);
        } else if self.waited > limit {
            return Err(stalled());
        }
        Ok(count)
    }

    /// Appends the next line to `lines`.
    fn read_line(&mut self, lines: &mut Vec<u8>, limit: usize) -> io::Result<()> {
        loop {
            let begun = Instant::now();
            let waited = self.input.wait(self.stall_timeout);
            let before = lines.len();
            let whole = self.input.take_line(lines, limit).map_err(|refusal| match refusal {
                Refusal::Malformed(why) => io::Error::other(why),
                _ => io::Error::other("a chunk's size line or the trailers are too long"),
            })?;
            self.note(waited.map(|_| lines.len() - before), begun)?;
            if whole {
                return Ok(());
            }
        }
    }

    /// Reads up to the next chunk's first byte, or to the end of the body.
    fn next_chunk(&mut self) -> io::Result<State> {
        let mut line = Vec::new();
        self.read_line(&mut line, SIZE_LINE_MAX)?;
        match chunk_size(&line) {
            Some(0) => {}
            Some(size) => return Ok(State::Chunk(size)),
            None => return Err(io::Error::other("a chunk's size is malformed")),
        }
        let (mut trailers, mut start) = (Vec::new(), 0);
        while !trailers[start..].starts_with(b"\r\n") {
            start = trailers.len();
            self.read_line(&mut trailers, HEAD_MAX)?;
        }
        check_trailers(&trailers)
    }

    /// Reads what follows the last byte of a chunk.
    fn end_chunk(&mut self) -> io::Result<State> {
        let mut line = Vec::new();
        self.read_line(&mut line, 2)?;
        Ok(State::Size)
    }

    /// Reads some of the `left` bytes. Returns the bytes read, and how many are left after them.
    fn read_some(&mut self, buffer: &mut [u8], left: u64) -> io::Result<(usize, u64)> {
        let most = buffer.len().min(left.try_into().unwrap_or(usize::MAX));
        let begun = Instant::now();
        let read = self.input.read(&mut buffer[..most], self.stall_timeout);
        let count = self.note(read, begun)?;
        self.counters.received.fetch_add(count as u64, Ordering::Relaxed);
        Ok((count, left - count as u64))
    }
}

impl Read for Body<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || self.state == State::Ended {
            return Ok(0);
        }
        let mut state = std::mem::replace(&mut self.state, State::Broken);
        self.send_continue()?;
        if state == State::Chunk(0) {
            state = self.end_chunk()?;
        }
        if state == State::Size {
            state = self.next_chunk()?;
        }
        let (count, state) = match state {
            State::Length(left) => match self.read_some(buffer, left)? {
                (count, 0) => (count, State::Ended),
                (count, left) => (count, State::Length(left)),
            },
            State::Chunk(left) => {
                let (count, left) = self.read_some(buffer, left)?;
                (count, State::Chunk(left))
            }
            State::Ended => (0, State::Ended),
            State::Size | State::Broken => return Err(io::Error::other("the body is broken")),
        };
        self.state = state;
        Ok(count)
    }
}

/// Not inlined, so that an upload does not keep stack space for the fields.
#[inline(never)]
fn check_trailers(trailers: &[u8]) -> io::Result<State> {
    match httparse::parse_headers(trailers, &mut [EMPTY_HEADER; FIELDS_MAX]) {
        Ok(Status::Complete(_)) => Ok(State::Ended),
        _ => Err(io::Error::other("the trailers are malformed, or over 100")),
    }
}

/// Parses a chunk's size line: `1*HEXDIG *( BWS ";" ext ) CRLF`. Extensions are not parsed.
fn chunk_size(line: &[u8]) -> Option<u64> {
    let line = line.strip_suffix(b"\r\n")?;
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (size, rest) = line.split_at(digits);
    let extension = rest.trim_ascii_start();
    let is_text = |byte: &u8| !byte.is_ascii_control() || *byte == b'\t';
    let is_right = rest.is_empty() || extension.starts_with(b";") && rest.iter().all(is_text);
    let size = std::str::from_utf8(size).ok().filter(|_| is_right)?;
    u64::from_str_radix(size, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const STALL: Duration = Duration::from_millis(200);

    /// Reads a body that a client sends in two pieces. Returns it, and what follows it on the connection.
    fn read(headers: &str, sent: &str) -> (io::Result<String>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut input = Input::new(listener.accept().unwrap().0);
        let (first, second) = sent.split_at(sent.len() / 2);
        client.write_all(first.as_bytes()).unwrap();
        let _ = input.wait(STALL);
        client.write_all(second.as_bytes()).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let head = format!("PUT / HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n");
        let mut fields = crate::http::request::NO_FIELDS;
        let request = Request::parse(head.as_bytes(), &mut fields).unwrap();
        let counters = Counters::default();
        let mut body = Body::new(&mut input, &request, STALL, &counters);
        let mut text = String::new();
        let result = body.read_to_string(&mut text);
        if result.is_err() {
            assert!(body.read(&mut [0; 9]).is_err(), "{sent:?}: it ends after an error");
        }
        let mut rest = String::new();
        let _ = input.wait(STALL);
        rest.push_str(std::str::from_utf8(input.buffered()).unwrap());
        (result.map(|_| text), rest)
    }

    #[test]
    fn a_body_ends_where_its_length_says() {
        for (sent, body, rest) in [("value", "value", ""), ("valueGET /", "value", "GET /")] {
            let (read, after) = read("Content-Length: 5", sent);
            assert_eq!((read.unwrap().as_str(), after.as_str()), (body, rest));
        }
        assert!(read("Content-Length: 5", "valu").0.is_err());
        assert_eq!(read("X: y", "GET /").0.unwrap(), "");
    }

    #[test]
    fn a_chunked_body_ends_behind_its_trailers() {
        for (sent, body) in [
            ("0\r\n\r\n", ""),
            ("5\r\nvalue\r\n0\r\n\r\n", "value"),
            ("05\r\nvalue\r\n00\r\n\r\n", "value"),
            ("2;a=b\r\nva\r\n3 ; c=\"d\"\r\nlue\r\n0;e\r\n\r\n", "value"),
            ("A\r\n0123456789\r\n0\r\nX-Trailer: y\r\nContent-Length: 3\r\n\r\n", "0123456789"),
        ] {
            let (read, after) = read("Transfer-Encoding: chunked", &format!("{sent}GET /"));
            assert_eq!((read.unwrap().as_str(), after.as_str()), (body, "GET /"), "{sent:?}");
        }
    }

    #[test]
    fn a_malformed_or_cut_chunked_body_is_an_error() {
        let long = format!("5;{}\r\nvalue\r\n0\r\n\r\n", "x".repeat(SIZE_LINE_MAX));
        let trailer = format!("0\r\nX: {}\r\n\r\n", "x".repeat(HEAD_MAX));
        let trailers = format!("0\r\n{}\r\n", "X: y\r\n".repeat(FIELDS_MAX + 1));
        for sent in [
            "",
            "5\r\nvalue",
            "5\r\nvalue\r\n",
            "5\r\nvalue\r\n0\r\n",
            "5\r\nvalue0\r\n\r\n",
            "5\r\nvalueX\r\n0\r\n\r\n",
            "5\nvalue\n0\n\n",
            "5\r\nvalue\n0\r\n\r\n",
            "5 \r\nvalue\r\n0\r\n\r\n",
            " 5\r\nvalue\r\n0\r\n\r\n",
            "5 5\r\nvalue\r\n0\r\n\r\n",
            "+5\r\nvalue\r\n0\r\n\r\n",
            "-5\r\nvalue\r\n0\r\n\r\n",
            "0x5\r\nvalue\r\n0\r\n\r\n",
            "5;\rx\r\nvalue\r\n0\r\n\r\n",
            "5;\0\r\nvalue\r\n0\r\n\r\n",
            "\r\nvalue\r\n0\r\n\r\n",
            ";x\r\nvalue\r\n0\r\n\r\n",
            "10000000000000005\r\nvalue\r\n0\r\n\r\n",
            "0\r\n folded\r\n\r\n",
            "0\r\nno colon\r\n\r\n",
            "0\r\nX: y\n\r\n",
            &long,
            &trailer,
            &trailers,
        ] {
            let result = read("Transfer-Encoding: chunked", sent).0;
            assert!(result.is_err(), "{:?}: {result:?}", &sent[..sent.len().min(80)]);
        }
    }
}
