//! A raw HTTP/1.1 client that can also violate the protocol.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};

/// How long to wait for an answer.
pub const TIMEOUT: Duration = Duration::from_secs(30);

const KEY_SET: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// A key as a request target.
pub fn target(key: impl AsRef<[u8]>) -> String {
    percent_encode(key.as_ref(), KEY_SET).to_string()
}

#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    /// The value of a header. Panics if it occurs twice.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
        let value = found.next().map(|(_, value)| value.as_str());
        assert!(found.next().is_none(), "two headers {name}: {self:?}");
        value
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Panics if the status is different.
    #[track_caller]
    pub fn expect(self, status: u16) -> Answer {
        assert_eq!(self.status, status, "{:?}: {}", self.headers, self.text());
        self
    }

    /// GET and HEAD of a missing key are answered as the Go master answers them.
    #[track_caller]
    pub fn expect_missing(self) -> Answer {
        let answer = self.expect(404);
        assert_eq!((answer.header("Content-Length"), answer.text().as_str()), (Some("0"), ""));
        answer
    }

    /// The answer is an error of this status whose text is one line that holds `word`.
    #[track_caller]
    pub fn expect_error(self, status: u16, word: &str) -> Answer {
        let answer = self.expect(status);
        let text = answer.text();
        assert!(text.ends_with('\n') && text.lines().count() == 1 && text.len() > 10, "not one line: {text:?}");
        assert!(text.contains(word), "{word} is missing: {text}");
        answer
    }
}

/// A connection to the master or to a volume.
pub struct Conn {
    pub socket: TcpStream,
    unread: Vec<u8>,
}

impl Conn {
    pub fn open(address: &str) -> Conn {
        Conn::try_open(address).unwrap_or_else(|e| panic!("no connection to {address}: {e}"))
    }

    pub fn try_open(address: &str) -> io::Result<Conn> {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.set_write_timeout(Some(TIMEOUT))?;
        Ok(Conn { socket, unread: Vec::new() })
    }

    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Conn {
        self.socket.write_all(bytes.as_ref()).expect("the server reads the request");
        self
    }

    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Sends a request's head.
    #[track_caller]
    pub fn head(&mut self, method: &str, target: &str, headers: &[(&str, &str)]) -> &mut Conn {
        self.send(head(method, target, headers))
    }

    /// Sends a request and waits for its answer. Adds the Content-Length of a body.
    #[track_caller]
    pub fn ask(&mut self, method: &str, target: &str, headers: &[(&str, &str)], body: Option<&[u8]>) -> Answer {
        let length = body.map_or(0, <[u8]>::len).to_string();
        let mut headers = headers.to_vec();
        if body.is_some() {
            headers.push(("Content-Length", &length));
        }
        self.head(method, target, &headers);
        // The server may refuse the body and close before it has read all of it.
        let _ = self.try_send(body.unwrap_or_default());
        self.answer_to(method)
    }

    /// The next final answer, to any method but HEAD.
    #[track_caller]
    pub fn answer(&mut self) -> Answer {
        self.answer_to("GET")
    }

    #[track_caller]
    pub fn answer_to(&mut self, method: &str) -> Answer {
        loop {
            match self.next_answer(method) {
                Ok(Some(answer)) if answer.status < 200 => {}
                Ok(Some(answer)) => return answer,
                Ok(None) => panic!("the connection was closed without an answer to {method}"),
                Err(why) => panic!("no answer to {method}: {why}"),
            }
        }
    }

    /// The next answer, which may be an interim one, or `None` if the connection closed first.
    pub fn next_answer(&mut self, method: &str) -> Result<Option<Answer>, String> {
        let end = loop {
            if let Some(end) = find(&self.unread, b"\r\n\r\n") {
                break end;
            }
            match self.read_more() {
                Ok(0) if self.unread.is_empty() => return Ok(None),
                Ok(0) => return Err(format!("cut: {}", self.unread.escape_ascii())),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(e) => return Err(e.to_string()),
            }
        };
        let text = String::from_utf8(self.unread.drain(..end + 4).collect()).map_err(|e| e.to_string())?;
        let mut lines = text.trim_end().split("\r\n");
        let first = lines.next().unwrap_or_default();
        let status = first
            .strip_prefix("HTTP/1.1 ")
            .or(first.strip_prefix("HTTP/1.0 "))
            .and_then(|rest| rest.get(..3)?.parse().ok())
            .ok_or_else(|| format!("no status line: {first:?}"))?;
        let headers: Vec<(String, String)> = lines
            .map(|line| {
                let (name, value) = line.split_once(':').ok_or(line)?;
                Ok((name.to_string(), value.trim().to_string()))
            })
            .collect::<Result<_, &str>>()?;
        let mut answer = Answer { status, headers, body: Vec::new() };
        if method == "HEAD" || status < 200 || status == 204 || status == 304 {
            return Ok(Some(answer));
        }
        let length = answer.header("content-length").map(|text| text.parse::<usize>());
        if answer.header("transfer-encoding").is_some_and(|value| value == "chunked") {
            answer.body = self.chunked().map_err(|e| format!("chunks: {e}"))?;
        } else if let Some(length) = length {
            let length = length.map_err(|e| format!("Content-Length: {e}"))?;
            while self.unread.len() < length {
                match self.read_more() {
                    Ok(n) if n > 0 => {}
                    other => return Err(format!("body of {length} bytes: {other:?}")),
                }
            }
            answer.body = self.unread.drain(..length).collect();
        } else {
            while self.read_more().map_err(|e| e.to_string())? > 0 {}
            answer.body = std::mem::take(&mut self.unread);
        }
        Ok(Some(answer))
    }

    fn chunked(&mut self) -> io::Result<Vec<u8>> {
        let cut = || io::Error::other("cut");
        let mut body = Vec::new();
        loop {
            let end = loop {
                if let Some(end) = find(&self.unread, b"\r\n") {
                    break end;
                }
                if self.read_more()? == 0 {
                    return Err(cut());
                }
            };
            let line: Vec<u8> = self.unread.drain(..end + 2).collect();
            let text = String::from_utf8_lossy(&line);
            let size = usize::from_str_radix(text.trim(), 16).map_err(io::Error::other)?;
            while self.unread.len() < size + 2 {
                if self.read_more()? == 0 {
                    return Err(cut());
                }
            }
            body.extend(self.unread.drain(..size));
            self.unread.drain(..2);
            if size == 0 {
                return Ok(body);
            }
        }
    }

    fn read_more(&mut self) -> io::Result<usize> {
        let mut buffer = [0; 64 << 10];
        let n = self.socket.read(&mut buffer)?;
        self.unread.extend_from_slice(&buffer[..n]);
        Ok(n)
    }

    /// Waits until the server closes the connection, and returns what it sent before.
    #[track_caller]
    pub fn read_until_closed(&mut self) -> Vec<u8> {
        loop {
            match self.read_more() {
                Ok(0) => return std::mem::take(&mut self.unread),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {
                    return std::mem::take(&mut self.unread);
                }
                Err(e) => panic!("the server does not close the connection: {e}"),
            }
        }
    }

    /// Whether data arrives, or the connection closes, within this time.
    pub fn readable(&mut self, within: Duration) -> bool {
        self.socket.set_read_timeout(Some(within.max(Duration::from_millis(1)))).unwrap();
        let seen = self.socket.peek(&mut [0]);
        self.socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        !matches!(seen, Err(e) if e.kind() == io::ErrorKind::WouldBlock)
    }

    /// Shuts down the sending side. Answers can still be read.
    pub fn shutdown_write(&mut self) -> &mut Conn {
        self.socket.shutdown(Shutdown::Write).expect("the connection is open");
        self
    }

    /// Closes with a TCP reset, as a killed process with unread data does.
    pub fn reset(self) {
        let _ = socket2::SockRef::from(&self.socket).set_linger(Some(Duration::ZERO));
    }
}

/// The bytes of a request's head.
pub fn head(method: &str, target: &str, headers: &[(&str, &str)]) -> Vec<u8> {
    let mut text = format!("{method} {target} HTTP/1.1\r\nHost: mkv.test\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    text.into_bytes()
}

/// Encodes a body as chunks of these lengths, repeated as needed, without the last chunk.
pub fn chunks(body: &[u8], lengths: &[usize]) -> Vec<u8> {
    let mut coded = Vec::with_capacity(body.len() + body.len() / 8);
    let mut rest = body;
    let mut lengths = lengths.iter().cycle();
    while !rest.is_empty() {
        let (chunk, tail) = rest.split_at(rest.len().min(*lengths.next().expect("lengths is not empty")));
        coded.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        coded.extend_from_slice(chunk);
        coded.extend_from_slice(b"\r\n");
        rest = tail;
    }
    coded
}

pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// Sends one request on a connection of its own.
#[track_caller]
pub fn ask(address: &str, method: &str, target: &str, headers: &[(&str, &str)], body: Option<&[u8]>) -> Answer {
    Conn::open(address).ask(method, target, headers, body)
}

/// Reads the URL of a redirect.
#[track_caller]
pub fn follow(redirect: &Answer) -> Answer {
    let location = redirect.header("Location").expect("a redirect has a Location");
    let rest = location.strip_prefix("http://").expect("the Location is a URL");
    let (host, path) = rest.split_at(rest.find('/').expect("the Location has a path"));
    ask(host, "GET", path, &[], None)
}

/// Polls until the condition holds. Panics with `what` after `TIMEOUT`.
#[track_caller]
pub fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    wait_at_most(TIMEOUT, what, condition);
}

#[track_caller]
pub fn wait_at_most(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < limit, "after {limit:?}, still waiting until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    hay.windows(needle.len()).position(|window| window == needle)
}
