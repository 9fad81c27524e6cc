//! A client's socket with a buffer and a timeout for each read.

use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::net::TcpStream;
use std::time::Duration;

use super::Refusal;

/// Bytes of the buffer. Most heads fit.
const BUFFER: usize = 4 << 10;

pub struct Input {
    reader: BufReader<TcpStream>,
    /// The socket's read timeout as it is set now.
    timeout: Option<Duration>,
}

impl Input {
    pub fn new(socket: TcpStream) -> Input {
        Input { reader: BufReader::with_capacity(BUFFER, socket), timeout: None }
    }

    pub fn socket(&self) -> &TcpStream {
        self.reader.get_ref()
    }

    /// The bytes that have arrived and are not consumed.
    pub fn buffered(&self) -> &[u8] {
        self.reader.buffer()
    }

    pub fn consume(&mut self, count: usize) {
        self.reader.consume(count);
    }

    /// Waits for input and returns the number of buffered bytes. 0: the client has closed the connection.
    pub fn wait(&mut self, within: Duration) -> io::Result<usize> {
        self.limit(within)?;
        loop {
            match self.reader.fill_buf() {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                filled => return filled.map(<[u8]>::len),
            }
        }
    }

    /// Reads into `buffer`. Large reads bypass the internal buffer.
    pub fn read(&mut self, buffer: &mut [u8], within: Duration) -> io::Result<usize> {
        self.limit(within)?;
        loop {
            match self.reader.read(buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }

    fn limit(&mut self, within: Duration) -> io::Result<()> {
        if self.timeout != Some(within) {
            // A socket takes a timeout of 0 as "no timeout".
            self.socket().set_read_timeout(Some(within.max(Duration::from_millis(1))))?;
            self.timeout = Some(within);
        }
        Ok(())
    }

    /// Moves buffered bytes to `line`, up to and including the next CRLF. Returns whether there was one. Fails if a
    /// line ends in a bare LF, or if `line` would exceed `limit` bytes.
    pub fn take_line(&mut self, line: &mut Vec<u8>, limit: usize) -> Result<bool, Refusal> {
        let bytes = self.reader.buffer();
        let end = bytes.iter().position(|byte| *byte == b'\n').map(|at| at + 1);
        let count = end.unwrap_or(bytes.len());
        if line.len() + count > limit {
            return Err(Refusal::HeadTooLarge);
        }
        line.extend_from_slice(&bytes[..count]);
        self.reader.consume(count);
        if end.is_some() && !line.ends_with(b"\r\n") {
            return Err(Refusal::Malformed("a line does not end in CRLF"));
        }
        Ok(end.is_some())
    }
}
