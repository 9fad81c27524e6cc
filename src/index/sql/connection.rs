//! A blocking connection to PostgreSQL: prepared statements with binary parameters, COPY, SCRAM, TLS.
//!
//! `postgres-protocol` makes and parses the messages; this file is the loop over the socket. The crate `postgres` would
//! do more, but it waits for ever on a server that was stopped, and runs on tokio. Here the socket has timeouts: 2 s to
//! connect and for each answer at the login, 6 s for others. A statement that runs into them may have been carried out or not.
//!
//! Every statement is a transaction of its own.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::IsNull;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use postgres_protocol::message::backend::{ErrorFields, Message};
use postgres_protocol::message::frontend;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::url::Url;
use crate::error::{Error, Result};

const CONNECT: Duration = Duration::from_secs(2);
const ANSWER: Duration = Duration::from_secs(6);

/// What the server itself allows a statement. It does not end a commit that waits for a standby, so `ANSWER` is needed.
const STATEMENT_MS: u32 = 3000;

/// The OID of the type bytea.
const BYTEA: i32 = 17;

/// The certificates that this system trusts.
const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";

#[derive(Debug)]
pub enum Failure {
    /// The statement may have been carried out or not; the connection is of no more use.
    Lost(io::Error),
    /// The server refused: SQLSTATE and text.
    Refused(String, String),
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Failure {
        Failure::Lost(e)
    }
}

/// A parameter of a statement.
#[derive(Debug, Clone, Copy)]
pub enum Arg<'a> {
    Bytes(&'a [u8]),
    Text(&'a str),
    /// An array of bytea.
    Keys(&'a [&'a [u8]]),
    Int(i64),
    Bool(bool),
}

pub type Row = Vec<Option<Bytes>>;

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

pub struct Connection {
    stream: Box<dyn Stream>,
    socket: TcpStream,
    input: BytesMut,
    output: BytesMut,
    /// Names of prepared statements, by the address of their text.
    prepared: HashMap<usize, String>,
}

impl Connection {
    /// Connects to the first host that takes writes.
    pub fn open(url: &Url, tls: Option<&Arc<ClientConfig>>) -> std::result::Result<Connection, Failure> {
        let mut failed = Vec::new();
        for host in &url.hosts {
            let opened = Connection::to(host, url, tls).and_then(|mut connection| {
                let rows = connection.query("SHOW transaction_read_only", &[])?;
                let is_off = rows.first().and_then(|row| row[0].as_deref()) == Some(b"off");
                if is_off { Ok(connection) } else { Err(io::Error::other("it is read-only").into()) }
            });
            match opened {
                Ok(connection) => return Ok(connection),
                Err(Failure::Lost(e)) => failed.push(format!("{host}: {e}")),
                Err(Failure::Refused(code, text)) => failed.push(format!("{host}: {text} ({code})")),
            }
        }
        Err(io::Error::other(failed.join("; ")).into())
    }

    fn to(host: &str, url: &Url, tls: Option<&Arc<ClientConfig>>) -> std::result::Result<Connection, Failure> {
        let mut failed = io::Error::other("its name has no address");
        for address in host.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, CONNECT) {
                Ok(socket) => return Connection::log_in(socket, host, url, tls),
                Err(e) => failed = e,
            }
        }
        Err(failed.into())
    }

    fn log_in(
        mut socket: TcpStream,
        host: &str,
        url: &Url,
        tls: Option<&Arc<ClientConfig>>,
    ) -> std::result::Result<Connection, Failure> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(CONNECT))?;
        socket.set_write_timeout(Some(ANSWER))?;
        let own = socket.try_clone()?;
        let stream: Box<dyn Stream> = match tls {
            None => Box::new(socket),
            Some(config) => {
                let name = host.rsplit_once(':').map_or(host, |(name, _)| name).trim_matches(['[', ']']);
                let name = ServerName::try_from(name.to_string()).map_err(io::Error::other)?;
                let mut request = BytesMut::new();
                frontend::ssl_request(&mut request);
                socket.write_all(&request)?;
                let mut answer = [0];
                socket.read_exact(&mut answer)?;
                if answer != *b"S" {
                    return Err(io::Error::other("it has no TLS: turn ssl on, or use sslmode=disable").into());
                }
                let client = ClientConnection::new(config.clone(), name).map_err(io::Error::other)?;
                Box::new(StreamOwned::new(client, socket))
            }
        };
        let (input, output) = (BytesMut::with_capacity(8192), BytesMut::with_capacity(1024));
        let mut connection = Connection { stream, socket: own, input, output, prepared: HashMap::new() };
        connection.start(url)?;
        connection.socket.set_read_timeout(Some(ANSWER))?;
        Ok(connection)
    }

    /// Authenticates, and waits until the server is ready.
    fn start(&mut self, url: &Url) -> std::result::Result<(), Failure> {
        let limit = format!("-c statement_timeout={STATEMENT_MS}");
        let parameters = [
            ("user", url.user.as_str()),
            ("database", url.database.as_str()),
            ("application_name", "mkv"),
            ("client_encoding", "UTF8"),
            ("options", limit.as_str()),
        ];
        frontend::startup_message(parameters, &mut self.output)?;
        self.flush()?;
        let mut scram: Option<ScramSha256> = None;
        let unexpected = || io::Error::other("it asks for a login that mkv does not know: use scram-sha-256");
        loop {
            match self.message()? {
                Message::AuthenticationCleartextPassword => {
                    frontend::password_message(url.password.as_bytes(), &mut self.output)?;
                    self.flush()?;
                }
                Message::AuthenticationSasl(body) => {
                    let known = body.mechanisms().any(|name| Ok(name == SCRAM_SHA_256))?;
                    let new = ScramSha256::new(url.password.as_bytes(), ChannelBinding::unsupported());
                    let new = scram.insert(if known { new } else { return Err(unexpected().into()) });
                    frontend::sasl_initial_response(SCRAM_SHA_256, new.message(), &mut self.output)?;
                    self.flush()?;
                }
                Message::AuthenticationSaslContinue(body) => {
                    let scram = scram.as_mut().ok_or_else(unexpected)?;
                    scram.update(body.data())?;
                    frontend::sasl_response(scram.message(), &mut self.output)?;
                    self.flush()?;
                }
                Message::AuthenticationSaslFinal(body) => scram.as_mut().ok_or_else(unexpected)?.finish(body.data())?,
                Message::ReadyForQuery(_) => return Ok(()),
                Message::ErrorResponse(body) => return Err(refusal(body.fields())),
                Message::AuthenticationOk
                | Message::ParameterStatus(_)
                | Message::BackendKeyData(_)
                | Message::NoticeResponse(_) => {}
                _ => return Err(unexpected().into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.output)?;
        self.stream.flush()?;
        self.output.clear();
        Ok(())
    }

    fn message(&mut self) -> io::Result<Message> {
        loop {
            if let Some(message) = Message::parse(&mut self.input)? {
                return Ok(message);
            }
            let mut buffer = [0; 16384];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.input.extend_from_slice(&buffer[..count]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // What a socket's timeout is called.
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Err(ErrorKind::TimedOut.into()),
                Err(e) => return Err(e),
            }
        }
    }

    /// Runs one statement, in one round trip, also the first time that it is used.
    pub fn query(&mut self, sql: &'static str, args: &[Arg]) -> std::result::Result<Vec<Row>, Failure> {
        let address = sql.as_ptr() as usize;
        let name = match self.prepared.get(&address) {
            Some(name) => name.clone(),
            None => {
                let name = format!("s{}", self.prepared.len());
                frontend::parse(&name, sql, [], &mut self.output)?;
                name
            }
        };
        let put = |arg: &Arg, buffer: &mut BytesMut| {
            match arg {
                Arg::Bytes(bytes) => buffer.extend_from_slice(bytes),
                Arg::Text(text) => buffer.extend_from_slice(text.as_bytes()),
                Arg::Keys(keys) => {
                    // One dimension, no NULLs, the type's OID, the length, the first index.
                    for number in [1, 0, BYTEA, keys.len() as i32, 1] {
                        buffer.extend_from_slice(&number.to_be_bytes());
                    }
                    for key in *keys {
                        buffer.extend_from_slice(&(key.len() as i32).to_be_bytes());
                        buffer.extend_from_slice(key);
                    }
                }
                Arg::Int(number) => buffer.extend_from_slice(&number.to_be_bytes()),
                Arg::Bool(is) => buffer.extend_from_slice(&[u8::from(*is)]),
            }
            Ok(IsNull::No)
        };
        frontend::bind("", &name, [1], args.iter(), put, [1], &mut self.output)
            .map_err(|_| io::Error::other("a parameter is too long"))?;
        frontend::execute("", 0, &mut self.output)?;
        frontend::sync(&mut self.output);
        self.flush()?;
        self.results(|connection| drop(connection.prepared.insert(address, name.clone())))
    }

    /// Runs a statement without parameters and results that is not prepared.
    pub fn run(&mut self, sql: &str) -> std::result::Result<(), Failure> {
        frontend::query(sql, &mut self.output)?;
        self.flush()?;
        self.results(|_| {}).map(drop)
    }

    /// Sends rows in COPY's text form to `COPY … FROM STDIN`.
    pub fn copy(&mut self, sql: &str, rows: &[u8]) -> std::result::Result<(), Failure> {
        frontend::query(sql, &mut self.output)?;
        self.flush()?;
        loop {
            match self.message()? {
                Message::CopyInResponse(_) => break,
                Message::ErrorResponse(body) => {
                    let refused = refusal(body.fields());
                    self.results(|_| {})?;
                    return Err(refused);
                }
                _ => {}
            }
        }
        frontend::CopyData::new(rows)?.write(&mut self.output);
        frontend::copy_done(&mut self.output);
        self.flush()?;
        self.results(|_| {}).map(drop)
    }

    /// Reads up to the end of a statement.
    fn results(&mut self, parsed: impl Fn(&mut Connection)) -> std::result::Result<Vec<Row>, Failure> {
        let (mut rows, mut failed) = (Vec::new(), None);
        loop {
            match self.message()? {
                Message::ParseComplete => parsed(self),
                Message::DataRow(body) => {
                    let buffer = body.buffer_bytes();
                    let cells = body.ranges().map(|range| Ok(range.map(|range| buffer.slice(range))));
                    rows.push(cells.collect()?);
                }
                Message::ErrorResponse(body) => failed = Some(refusal(body.fields())),
                // A commit whose wait for a standby was cancelled is called a success, with a warning.
                Message::NoticeResponse(body) => {
                    if let Failure::Refused(code, text) = refusal(body.fields())
                        && code.starts_with("01")
                    {
                        failed = Some(Failure::Lost(io::Error::other(text)));
                    }
                }
                Message::ReadyForQuery(_) => return failed.map_or(Ok(rows), Err),
                _ => {}
            }
        }
    }

    /// Whether an idle connection can still be used.
    pub fn is_open(&self) -> bool {
        let peeked = self.socket.set_nonblocking(true).and_then(|()| self.socket.peek(&mut [0]));
        let idle = peeked.is_err_and(|e| e.kind() == ErrorKind::WouldBlock);
        idle && self.socket.set_nonblocking(false).is_ok()
    }
}

fn refusal(mut fields: ErrorFields) -> Failure {
    let (mut code, mut text) = (String::new(), String::new());
    while let Ok(Some(field)) = fields.next() {
        let value = || String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            b'C' => code = value(),
            b'M' => text = value(),
            _ => {}
        }
    }
    Failure::Refused(code, text)
}

/// What TLS to the server needs; `None`: the URL says that there is none.
pub fn tls(url: &Url) -> Result<Option<Arc<ClientConfig>>> {
    if !url.tls {
        return Ok(None);
    }
    let file = url.root.clone().unwrap_or_else(|| SYSTEM_ROOTS.into());
    let wrong = |e: &dyn std::fmt::Display| Error::Failed(format!("sslrootcert {}: {e}", file.display()));
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(&file).map_err(|e| wrong(&e))? {
        // Systems have old certificates that cannot be parsed.
        let _ = roots.add(certificate.map_err(|e| wrong(&e))?);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.map_err(|e| wrong(&e))?.with_root_certificates(roots).with_no_client_auth();
    Ok(Some(Arc::new(config)))
}
