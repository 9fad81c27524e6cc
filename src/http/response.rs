//! A response and how it is sent: head and text with one write, a stream after its head.

use std::io::{self, BufWriter, Write};
use std::net::TcpStream;

/// A stream is sent in writes of this many bytes.
const PIECE: usize = 64 << 10;

pub struct Response<'a> {
    pub status: u16,
    /// Without Content-Length, Date and Connection, which the server adds.
    pub headers: Vec<(&'static str, String)>,
    /// More headers, whose names are not known in advance.
    pub extra: Vec<(String, String)>,
    pub content: Content<'a>,
}

type WriteFn<'a> = Box<dyn FnOnce(&mut dyn Write) -> io::Result<()> + 'a>;

pub enum Content<'a> {
    Empty,
    Text(String),
    /// `write` writes exactly `length` bytes.
    Stream {
        length: u64,
        write: WriteFn<'a>,
    },
    /// The length is not known before the end; only for HTTP/1.1. What `write` flushes is sent.
    Chunked(WriteFn<'a>),
}

/// Whether the connection is kept after the response.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Next {
    Close,
    Keep,
    /// Keep it and say so, for HTTP/1.0.
    SayKeep,
}

impl Response<'_> {
    /// Sends the response and returns the bytes sent. `buffer` is reused between responses.
    pub(super) fn send(
        self,
        mut socket: &TcpStream,
        to_head: bool,
        next: Next,
        date: &str,
        buffer: &mut Vec<u8>,
    ) -> io::Result<u64> {
        let length = match &self.content {
            Content::Empty => Some(0),
            Content::Text(text) => Some(text.len() as u64),
            Content::Stream { length, .. } => Some(*length),
            Content::Chunked(_) => None,
        };
        buffer.clear();
        self.write_head(buffer, length, next, date)?;
        let head = buffer.len() as u64;
        match self.content {
            Content::Chunked(write) if !to_head => {
                socket.write_all(buffer)?;
                let mut out = BufWriter::with_capacity(PIECE, Chunks { socket, sent: 0 });
                write(&mut out)?;
                out.flush()?;
                let Chunks { sent, .. } = out.into_parts().0;
                socket.write_all(b"0\r\n\r\n")?;
                return Ok(head + sent);
            }
            Content::Stream { write, .. } if !to_head => {
                let mut out = BufWriter::with_capacity(PIECE, socket);
                out.write_all(buffer)?;
                write(&mut out)?;
                out.flush()?;
                return Ok(head + length.unwrap_or_default());
            }
            Content::Text(text) if !to_head => buffer.extend_from_slice(text.as_bytes()),
            _ => {}
        }
        socket.write_all(buffer)?;
        Ok(buffer.len() as u64)
    }

    fn write_head(&self, out: &mut Vec<u8>, length: Option<u64>, next: Next, date: &str) -> io::Result<()> {
        write!(out, "HTTP/1.1 {} {}\r\nDate: {date}\r\n", self.status, reason(self.status))?;
        let extra = self.extra.iter().map(|(name, value)| (name.as_str(), value));
        for (name, value) in self.headers.iter().map(|(name, value)| (*name, value)).chain(extra) {
            for part in [name, ": ", value, "\r\n"] {
                out.extend_from_slice(part.as_bytes());
            }
        }
        // RFC 9110, section 8.6: a 204 has no length, and that of a 304 would be the value's.
        match length {
            _ if matches!(self.status, 204 | 304) => {}
            Some(length) => write!(out, "Content-Length: {length}\r\n")?,
            None => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        }
        out.extend_from_slice(match next {
            Next::Close => b"Connection: close\r\n\r\n",
            Next::Keep => b"\r\n",
            Next::SayKeep => b"Connection: keep-alive\r\n\r\n",
        });
        Ok(())
    }
}

/// A body of unknown length: each write is a chunk (RFC 9112, section 7.1).
struct Chunks<'a> {
    socket: &'a TcpStream,
    /// Bytes, without the framing.
    sent: u64,
}

impl Write for Chunks<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !bytes.is_empty() {
            self.socket.write_all(&[format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat())?;
        }
        self.sent += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The reason phrase of a status.
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        204 => "No Content",
        206 => "Partial Content",
        302 => "Found",
        304 => "Not Modified",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        411 => "Length Required",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        414 => "URI Too Long",
        416 => "Range Not Satisfiable",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "",
    }
}
