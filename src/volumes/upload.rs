//! Uploads: one value, streamed to all its replicas at the same time.
//!
//! A value is read in chunks of 512 KiB, and each chunk goes to every replica before the next one is
//! read; at most two are in memory, whatever the value's size. The digest of a large value is
//! computed on a thread of its own.
//!
//! nginx publishes a file when its body is complete. So the last byte goes out only when the value
//! is known to be as long as the client said, with the digest that it gave, and a body that fails is
//! never ended as if it were whole: its connections are closed.

use std::io::{ErrorKind, Read};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender, bounded};
use md5::{Digest, Md5};

use super::client::{self, Call, Part, Response, STALL};
use super::{Auth, Volume, Volumes, unreachable};
use crate::error::{Error, Result};
use crate::format::record::Hash;

/// Bytes of a chunk.
pub const CHUNK: usize = 512 << 10;

/// The chunks of a large value that are in memory: one is sent while the other one is hashed.
const CHUNKS: usize = 2;

/// From this many bytes on a digest is computed on a thread of its own.
const LARGE: u64 = 8 << 20;

/// How long the other volumes are waited for once one has failed.
const AFTER_FAILURE: Duration = Duration::from_secs(2);

/// A value that is being received.
pub struct Upload<'a> {
    /// Ends in `Ok(0)` only at the value's true end.
    pub reader: &'a mut dyn Read,
    /// Bytes; `None`: not known before the end.
    pub length: Option<u64>,
    /// The digest that the value has to have.
    pub content_md5: Option<Hash>,
}

#[derive(Debug, Clone, Copy)]
pub struct PutOptions {
    /// The blob's mtime, in seconds since 1970.
    pub time: u64,
    /// Whether to compute the digest of a value that comes without one.
    pub md5sum: bool,
    /// Whether the value may be empty.
    pub empty: bool,
}

/// A value that every replica has stored.
#[derive(Debug)]
pub struct Stored {
    /// Bytes.
    pub size: u64,
    pub hash: Option<Hash>,
}

#[derive(Debug)]
pub struct PutFailed {
    pub error: Error,
    /// Replicas that were sent the whole value and did not answer: their blob may appear later.
    pub maybe_stored: Vec<String>,
}

impl From<Error> for PutFailed {
    fn from(error: Error) -> PutFailed {
        PutFailed { error, maybe_stored: Vec::new() }
    }
}

impl Volumes {
    /// Stores a value on all replicas. On an error no replica is sent the rest of it, but some may
    /// have stored it: the caller deletes it from all of them.
    pub fn put(
        &self,
        replicas: &[String],
        path: &str,
        mut upload: Upload,
        options: PutOptions,
        auth: Auth,
    ) -> std::result::Result<Stored, PutFailed> {
        let begun = Instant::now();
        let mut chunks = Chunks::new(&mut upload, options.md5sum);
        chunks.read()?;
        if chunks.size == 0 && !options.empty {
            return Err(Error::NoValue.into());
        }
        let time = httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(options.time));
        let headers = format!("Date: {time}\r\n{}", chunks.framing());
        let volumes: Vec<_> = replicas.iter().map(|replica| self.volume(replica)).collect();
        let targets = replicas.iter().zip(&volumes);
        let mut calls: Vec<_> = targets
            .map(|(replica, volume)| volume.call("PUT", &volume.target("PUT", replica, path), auth, &headers))
            .collect();
        let sent = send_all(&mut calls, &mut chunks);
        client::await_all(&mut calls, chunks.part(), Instant::now() + STALL, AFTER_FAILURE);
        let (mut error, mut maybe_stored) = (sent.err(), Vec::new());
        for ((call, volume), replica) in calls.iter().zip(&volumes).zip(replicas) {
            let answered = matches!(call.outcome, Some(Ok(_)));
            if call.sent_whole && !answered {
                maybe_stored.push(replica.clone());
            }
            if let Err(failed) = volume.judge_put(replica, call, begun) {
                error.get_or_insert(failed);
            }
        }
        match error {
            None => Ok(Stored { size: chunks.size, hash: chunks.hash }),
            Some(error) => Err(PutFailed { error, maybe_stored }),
        }
    }
}

impl Volume {
    fn judge_put(&self, replica: &str, call: &Call, begun: Instant) -> Result<()> {
        match &call.outcome {
            Some(Ok(Response { status: 200..=299, .. })) if call.sent_whole => {
                self.note(replica, begun.elapsed(), None);
                Ok(())
            }
            Some(Ok(Response { status, .. })) => Err(Error::Refused { volume: replica.into(), status: *status }),
            Some(Err(e)) => {
                self.note(replica, begun.elapsed(), Some(e));
                Err(unreachable(replica, &e.to_string()))
            }
            // Stopped, or not waited for, because another one failed.
            None => Ok(()),
        }
    }
}

/// Sends the chunks until the last one, or until a volume fails: then none is sent the rest. An error
/// is one of the client's body.
fn send_all(calls: &mut [Call], chunks: &mut Chunks) -> Result<()> {
    while calls.iter_mut().all(|call| call.send(chunks.part(), chunks.ended)) && !chunks.ended {
        chunks.read()?;
    }
    Ok(())
}

/// Reads an upload chunk by chunk, and frames each chunk as it is sent (RFC 9112, 7.1).
struct Chunks<'a, 'b> {
    upload: &'a mut Upload<'b>,
    md5: Option<Md5>,
    hashing: Option<Hashing>,
    /// The digest, at the end.
    hash: Option<Hash>,
    /// Bytes that were read so far.
    size: u64,
    ended: bool,
    /// Whether the body is sent chunked: its length is not known.
    chunked: bool,
    buffer: Arc<Vec<u8>>,
    /// Bytes of the chunk in the buffer.
    filled: usize,
    /// What frames the chunk in a chunked body.
    size_line: String,
    line_end: &'static [u8],
}

/// The digest of a large value, on a thread of its own.
struct Hashing {
    /// Chunks, with their length.
    chunks: Sender<(Arc<Vec<u8>>, usize)>,
    /// Buffers to read into: their chunk is hashed.
    free: Receiver<Arc<Vec<u8>>>,
    /// Ends once `chunks` is closed.
    thread: JoinHandle<Md5>,
}

fn cut_short(e: &std::io::Error) -> Error {
    Error::BadRequest(format!("the upload was cut short: {e}"))
}

fn lost() -> Error {
    Error::Failed("the thread of the digest is lost: try again".into())
}

impl<'a, 'b> Chunks<'a, 'b> {
    fn new(upload: &'a mut Upload<'b>, md5sum: bool) -> Chunks<'a, 'b> {
        let room = upload.length.unwrap_or(u64::MAX).min(CHUNK as u64) as usize;
        Chunks {
            md5: (md5sum || upload.content_md5.is_some()).then(Md5::new),
            upload,
            hashing: None,
            hash: None,
            size: 0,
            ended: false,
            chunked: false,
            buffer: Arc::new(vec![0; room]),
            filled: 0,
            size_line: String::new(),
            line_end: b"",
        }
    }

    /// Reads the next chunk. The last one is read without an error only if the value has the length
    /// and the digest that the client gave.
    fn read(&mut self) -> Result<()> {
        if let Some(hashing) = &self.hashing {
            self.buffer = hashing.free.recv().map_err(|_| lost())?;
        }
        let first = self.size == 0;
        self.fill()?;
        self.size += self.filled as u64;
        self.ended |= self.upload.length == Some(self.size);
        // A value that ends in the first chunk has a known length, whatever the client said.
        self.chunked |= first && !self.ended && self.upload.length.is_none();
        if self.chunked {
            let filled = self.filled;
            self.size_line = if filled > 0 { format!("{filled:x}\r\n") } else { String::new() };
            self.line_end = match (filled, self.ended) {
                (0, _) => b"0\r\n\r\n",
                (_, true) => b"\r\n0\r\n\r\n",
                (_, false) => b"\r\n",
            };
        }
        self.digest()
    }

    /// Fills the buffer as far as the value goes.
    fn fill(&mut self) -> Result<()> {
        let left = self.upload.length.map_or(u64::MAX, |length| length - self.size);
        let buffer = Arc::get_mut(&mut self.buffer).ok_or_else(lost)?;
        let wanted = left.min(buffer.len() as u64) as usize;
        self.filled = 0;
        while self.filled < wanted {
            match self.upload.reader.read(&mut buffer[self.filled..wanted]) {
                Ok(0) if self.upload.length.is_some() => {
                    let came = self.size + self.filled as u64;
                    return Err(Error::BadRequest(format!("the upload ended after {came} bytes")));
                }
                Ok(0) => {
                    self.ended = true;
                    break;
                }
                Ok(n) => self.filled += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(cut_short(&e)),
            }
        }
        if self.upload.length == Some(self.size + self.filled as u64) {
            self.check_end()?;
        }
        Ok(())
    }

    /// Fails unless the reader ends here: some know only at the end whether the value is right.
    fn check_end(&mut self) -> Result<()> {
        loop {
            match self.upload.reader.read(&mut [0]) {
                Ok(0) => return Ok(()),
                Ok(_) => return Err(Error::BadRequest("the upload is longer than its length says".into())),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(cut_short(&e)),
            }
        }
    }

    fn digest(&mut self) -> Result<()> {
        if self.size > LARGE && !self.ended && self.hashing.is_none() {
            self.start_hashing();
        }
        if let Some(hashing) = &self.hashing {
            let chunk = (self.buffer.clone(), self.filled);
            hashing.chunks.send(chunk).map_err(|_| lost())?;
        } else if let Some(md5) = &mut self.md5 {
            md5.update(&self.buffer[..self.filled]);
        }
        if !self.ended {
            return Ok(());
        }
        if let Some(Hashing { chunks, thread, .. }) = self.hashing.take() {
            drop(chunks);
            self.md5 = Some(thread.join().map_err(|_| lost())?);
        }
        self.hash = self.md5.take().map(|md5| md5.finalize().into());
        if self.upload.content_md5.is_some() && self.upload.content_md5 != self.hash {
            let text = "the value does not have the Content-MD5 that came with it";
            return Err(Error::BadRequest(text.into()));
        }
        Ok(())
    }

    /// Moves the digest to a thread of its own; without one it stays on this thread.
    fn start_hashing(&mut self) {
        let Some(mut md5) = self.md5.clone() else { return };
        let (chunks, work) = bounded::<(Arc<Vec<u8>>, usize)>(CHUNKS);
        let (done, free) = bounded(CHUNKS);
        for _ in 1..CHUNKS {
            let _ = done.send(Arc::new(vec![0; self.buffer.len()]));
        }
        let thread = std::thread::Builder::new().name("mkv-md5".into()).spawn(move || {
            for (buffer, filled) in work {
                md5.update(&buffer[..filled]);
                let _ = done.send(buffer);
            }
            md5
        });
        self.hashing = thread.ok().map(|thread| Hashing { chunks, free, thread });
    }

    /// The header line that says how the body is framed.
    fn framing(&self) -> String {
        match self.upload.length {
            _ if self.chunked => "Transfer-Encoding: chunked\r\n".into(),
            length => format!("Content-Length: {}\r\n", length.unwrap_or(self.size)),
        }
    }

    /// The chunk that was read, as it is sent.
    fn part(&self) -> Part<'_> {
        [self.size_line.as_bytes(), &self.buffer[..self.filled], self.line_end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value's framing and body as they would be sent, up to an error.
    fn sent(value: &[u8], length: Option<u64>, content_md5: Option<Hash>) -> (Vec<u8>, Result<(String, Hash)>) {
        let mut reader = value;
        let mut upload = Upload { reader: &mut reader, length, content_md5 };
        let mut chunks = Chunks::new(&mut upload, true);
        let (mut body, mut framing) = (Vec::new(), None);
        while !chunks.ended {
            if let Err(error) = chunks.read() {
                return (body, Err(error));
            }
            framing.get_or_insert_with(|| chunks.framing());
            body.extend(chunks.part().concat());
        }
        assert_eq!(chunks.size, value.len() as u64);
        (body, Ok((framing.unwrap(), chunks.hash.unwrap())))
    }

    /// The chunks of a chunked body, joined; it has to end with the last one.
    fn decoded(mut body: &[u8]) -> Vec<u8> {
        let mut value = Vec::new();
        loop {
            let Ok(httparse::Status::Complete((n, size))) = httparse::parse_chunk_size(body) else {
                panic!("no size line");
            };
            let (chunk, rest) = body[n..].split_at(size as usize);
            value.extend_from_slice(chunk);
            body = rest.strip_prefix(b"\r\n").unwrap();
            if size == 0 {
                assert!(body.is_empty());
                return value;
            }
        }
    }

    fn value(length: usize) -> Vec<u8> {
        (0..length).map(|n| (n / 7 + n / 1000) as u8).collect()
    }

    #[test]
    fn a_value_is_sent_whole_with_its_length_or_chunked() {
        for length in [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, (LARGE as usize) * 2 + 3] {
            let value = value(length);
            let md5: Hash = Md5::digest(&value).into();
            let (body, outcome) = sent(&value, Some(length as u64), Some(md5));
            assert_eq!(outcome, Ok((format!("Content-Length: {length}\r\n"), md5)));
            assert!(body == value);
            let (body, outcome) = sent(&value, None, Some(md5));
            if length < CHUNK {
                assert_eq!(outcome, Ok((format!("Content-Length: {length}\r\n"), md5)));
                assert!(body == value);
            } else {
                assert_eq!(outcome, Ok(("Transfer-Encoding: chunked\r\n".into(), md5)));
                assert!(decoded(&body) == value);
            }
        }
    }

    #[test]
    fn a_body_that_is_short_or_has_another_digest_is_never_ended() {
        for length in [1, CHUNK, CHUNK + 1, 2 * CHUNK, (LARGE as usize) * 2 + 3] {
            let value = value(length);
            let (body, outcome) = sent(&value, Some(length as u64 + 1), None);
            assert!(body.len() <= length && outcome.is_err());
            let (body, outcome) = sent(&value, Some(length as u64), Some([7; 16]));
            assert!(body.len() < length && outcome.is_err());
            let (body, outcome) = sent(&value, None, Some([7; 16]));
            assert!(!body.ends_with(b"0\r\n\r\n") && outcome.is_err());
        }
    }
}
