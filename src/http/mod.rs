//! HTTP: connections, requests and answers. The only file that names tiny_http.
//!
//! What tiny_http would do if it were let, and what is done about it here:
//! - a new connection may wait for a thread for ever: `guard` finds such connections among the
//!   process's own descriptors and opens as many to itself, each of which frees one;
//! - its accept thread ends at the first error, or when it panics for want of a thread: then its
//!   copy of the listener is gone from the descriptors, and `guard` makes another server on another
//!   copy, while the old one's connections go on being served;
//! - it has no timeouts and no limits: the listener's socket timeouts are inherited, `guard` closes
//!   what dribbles its head, `-maxconns` is counted in `Conns`;
//! - it reads pipelined requests without end and in threads that then wait for each other: `Conns`
//!   lets one request of a connection through at a time;
//! - dropping a request reads the rest of its body, with a buffer of its declared length: a request
//!   whose body was not read is answered by `abort`, on the socket itself, which is then closed;
//! - a chunked body that is cut looks whole: `Body` asks the socket before it believes an end.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt::Display;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, SockRef, Socket, Type};
use tiny_http::{Request, Server};

use crate::api::route::{Command, route};
use crate::error::{Error, Result};
use crate::format::record::{Hash, unhex};
use crate::store::list::Page;
use crate::store::{Reply, ReplyBody, Store, Upload};
use crate::threads::{Job, Pool, lock};

/// What is progress in a body, in bytes: a client that sends one byte a second holds the key's lock.
const PROGRESS: usize = 1 << 10;

/// How long a client may make no progress.
const STALL: Duration = Duration::from_secs(60);

/// How long a client may take for a request's head.
const HEAD: Duration = Duration::from_secs(300);

/// For how long after a refusal an upload is still read, so that the client sees the answer.
const LINGER: Duration = Duration::from_secs(2);

/// How long uploads may go on after SIGTERM.
const STOP: Duration = Duration::from_secs(30);

/// The longest body, in bytes: what a file of ext4 can hold. tiny_http allocates what it is told.
const LENGTH_MAX: u64 = 1 << 44;

/// Up to this length tiny_http has read a body before it gives us the request.
const READ_AHEAD: u64 = 1024;

/// How many requests of one connection may wait for their turn.
const PIPELINE: usize = 64;

/// What a socket holds of answers that its client does not read, in bytes.
const SEND_BUFFER: usize = 256 << 10;

/// After how many bytes of answers it is looked at again whether a client reads them.
const LOOK_AFTER: usize = SEND_BUFFER / 8;

/// How many servers there are.
const SERVERS: usize = 2;

/// How often `accept` is given something to do. It would fail after `STALL` without.
const PING: Duration = Duration::from_secs(10);

/// How often the connections are counted, if there are many.
const CENSUS: Duration = Duration::from_secs(1);

/// How soon it is looked again at a connection that may wait for a thread.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// For how long a connection is known as closed when its socket is gone: tiny_http may have read on,
/// and what it makes of a refused body must not look like a new connection's first request.
const REMEMBER: Duration = Duration::from_secs(5);

/// Threads for requests that wait neither for clients nor, but for credentials, for volumes.
const WORKERS: usize = 16;

pub struct Http {
    store: Arc<Store>,
    listener: TcpListener,
    address: SocketAddr,
    conns: Mutex<HashMap<SocketAddr, Conn>>,
    workers: Pool,
    /// When the connections were last counted, and how long that took.
    counted: Mutex<(Instant, Duration)>,
    stopping: AtomicBool,
}

/// What is known of a client's connection.
struct Conn {
    /// When it was first seen, or its last request came or was answered.
    since: Instant,
    /// tiny_http has given it a thread: a request came from it.
    served: bool,
    /// A request of it is being answered.
    busy: bool,
    /// Nothing more is taken from it.
    closed: bool,
    /// One of its descriptors, as of the last census.
    fd: Option<RawFd>,
    /// Bytes of answers since it was last looked at whether they are read.
    unseen: usize,
    waiting: VecDeque<Request>,
}

impl Conn {
    fn new(served: bool) -> Conn {
        Conn {
            since: Instant::now(),
            served,
            busy: served,
            closed: false,
            fd: None,
            unseen: 0,
            waiting: VecDeque::new(),
        }
    }
}

/// An accept thread of tiny_http's.
struct Acceptor {
    /// Its copy of the listener, which is closed when it ends.
    fd: RawFd,
    alive: Arc<AtomicBool>,
}

impl Acceptor {
    fn is_alive(&self) -> bool {
        // SAFETY: the descriptor is only asked what it is. Only `guard` makes another listener.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd) };
        let alive = rustix::net::sockopt::socket_acceptconn(fd) == Ok(true);
        self.alive.store(alive, Ordering::Relaxed);
        alive
    }
}

/// How many there are but for those that were closed and are only remembered.
fn open(conns: &HashMap<SocketAddr, Conn>) -> usize {
    conns.values().filter(|conn| !conn.closed).count()
}

/// A request's turn on its connection.
#[derive(Clone, Copy)]
struct Turn {
    peer: SocketAddr,
    begun: Instant,
    /// It is the connection's last: tiny_http takes no more.
    last: bool,
}

impl Turn {
    fn new(peer: SocketAddr) -> Turn {
        Turn { peer, begun: Instant::now(), last: false }
    }
}

/// What a request's headers say of its body and its sender.
#[derive(Default)]
struct Head {
    /// Bytes of the body; `None`: chunked.
    length: Option<u64>,
    /// The client waits for a word before it sends the body.
    expect: bool,
    /// The client has no further request.
    last: bool,
    content_md5: Option<Hash>,
    authorization: Option<String>,
}

impl Head {
    fn has_body(&self) -> bool {
        self.expect || self.length.is_none_or(|length| length > READ_AHEAD)
    }
}

/// Serves the store until SIGTERM or SIGINT, and then ends the process's work in order.
pub fn serve(store: Arc<Store>) -> Result<()> {
    raise_descriptor_limit();
    store.check()?;
    store.distrust()?;
    let options = &store.options;
    let listener = listen(&options.host, options.port)?;
    let address = listener.local_addr().map_err(|e| Error::Failed(e.to_string()))?;
    let http = Arc::new(Http {
        store: store.clone(),
        listener,
        address,
        conns: Mutex::default(),
        workers: Pool::new(WORKERS),
        counted: Mutex::new((Instant::now(), Duration::ZERO)),
        stopping: AtomicBool::new(false),
    });
    let servers = (0..SERVERS).map(|_| http.make_server()).collect::<Result<Vec<_>>>()?;
    let (guard, cleaner) = (http.clone(), store.clone());
    spawn("mkv-guard", move || guard.guard(servers))?;
    spawn("mkv-cleaner", move || cleaner.clean())?;
    let looker = store.clone();
    spawn("mkv-look", move || looker.look_for_blobs())?;
    let wrong = |e: io::Error| Error::Failed(format!("signals: {e}"));
    let mut signals = signal_hook::iterator::Signals::new([15, 2]).map_err(wrong)?;
    println!("mkv listens on {address}");
    signals.wait().for_each(drop);
    http.stop();
    store.index.sync()?;
    store.index.close();
    Ok(())
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = std::thread::Builder::new().name(name.into()).spawn(work);
    thread.map(drop).map_err(|e| Error::Failed(format!("no thread can be started: {e}")))
}

/// How many descriptors there may be as the process is now.
fn slots() -> RawFd {
    let most = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX).min(1 << 20);
    // With no descriptor left this cannot be read: then all that are allowed are in use.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let slots = status.lines().find_map(|line| line.strip_prefix("FDSize:"));
    slots.and_then(|slots| slots.trim().parse().ok()).unwrap_or(most).min(most) as RawFd
}

/// Tries whether tiny_http would get its threads now.
fn spare_threads() -> io::Result<()> {
    let (hold, held) = crossbeam_channel::bounded::<()>(0);
    let start = |_| {
        let held = held.clone();
        std::thread::Builder::new().spawn(move || held.recv().is_ok())
    };
    let started: Vec<_> = (0..8).map(start).collect();
    drop(hold);
    started.into_iter().try_for_each(|thread| thread.map(|thread| drop(thread.join())))
}

/// Every connection costs two descriptors: the limit that was set for shells is no limit for us.
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

fn listen(host: &str, port: u16) -> Result<TcpListener> {
    let wrong = |e: io::Error| {
        let place = if host.is_empty() { "every address" } else { host };
        Error::Failed(format!(
            "cannot listen on {place}, port {port}: {e}: choose another -port or -host"
        ))
    };
    let bind = |address: SocketAddr| -> io::Result<TcpListener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        // What an accepted socket inherits: a client that makes no progress is let go.
        socket.set_read_timeout(Some(STALL))?;
        socket.set_write_timeout(Some(STALL))?;
        socket.set_tcp_nodelay(true)?;
        // The kernel's own choice would depend on the client.
        socket.set_send_buffer_size(SEND_BUFFER)?;
        socket.bind(&address.into())?;
        socket.listen(4096)?;
        Ok(socket.into())
    };
    if host.is_empty() {
        // A machine without IPv6 has no such address.
        return bind((Ipv6Addr::UNSPECIFIED, port).into())
            .or_else(|_| bind(([0, 0, 0, 0], port).into()))
            .map_err(wrong);
    }
    let addresses = std::net::ToSocketAddrs::to_socket_addrs(&(host, port)).map_err(wrong)?;
    let mut result = Err(io::Error::other("it has no address"));
    for address in addresses {
        result = result.or_else(|_| bind(address));
    }
    result.map_err(wrong)
}

impl Http {
    fn conns(&self) -> MutexGuard<'_, HashMap<SocketAddr, Conn>> {
        lock(&self.conns)
    }

    /// Makes a server: an accept thread of tiny_http's and a thread that receives.
    fn make_server(self: &Arc<Self>) -> Result<Acceptor> {
        let wrong = |e: &dyn Display| Error::Failed(format!("no server can be started: {e}"));
        // Where no thread can be had, tiny_http panics, if it comes to that: in a thread of its own.
        spare_threads().map_err(|e| wrong(&e))?;
        let listener = self.listener.try_clone().map_err(|e| wrong(&e))?;
        let (fd, alive) = (listener.as_raw_fd(), Arc::new(AtomicBool::new(true)));
        let server = catch_unwind(|| Server::from_listener(listener, None))
            .map_err(|_| wrong(&"no thread"))?;
        let (http, server) = (self.clone(), server.map_err(|e| wrong(&e))?);
        let acceptor = Acceptor { fd, alive: alive.clone() };
        spawn("mkv-front", move || http.receive(server, &alive))?;
        Ok(acceptor)
    }

    /// Receives a server's requests. There is one such thread for a server: so the requests of a
    /// connection are seen in their order.
    fn receive(self: Arc<Self>, server: Server, alive: &AtomicBool) {
        loop {
            match server.recv_timeout(HEAD + STALL) {
                Ok(Some(request)) => drop(catch_unwind(AssertUnwindSafe(|| self.accept(request)))),
                // The connections of a server that accepts no more have all ended by now.
                Ok(None) if !alive.load(Ordering::Relaxed) => return,
                Ok(None) => {}
                Err(error) if self.stopping.load(Ordering::Relaxed) => log::debug!("{error}"),
                Err(error) => log::warn!("accepting connections failed: {error}"),
            }
        }
    }

    /// Takes a request in its connection's turn.
    fn accept(self: &Arc<Self>, request: Request) {
        let Some(peer) = request.remote_addr().copied() else { return };
        let most = self.store.options.maxconns;
        let mut conns = self.conns();
        if conns.len() >= most {
            drop(conns);
            // Many of them may be gone by now.
            let (at, cost) = *lock(&self.counted);
            if at.elapsed() > cost * 10 {
                self.census();
            }
            conns = self.conns();
        }
        let open = if conns.len() >= most { open(&conns) } else { 0 };
        let too_many = || Error::Unavailable("too many connections: try again later".into()).into();
        match conns.entry(peer) {
            Entry::Vacant(entry) => {
                entry.insert(Conn::new(true));
                if open >= most {
                    drop(conns);
                    return self.abort(request, Turn::new(peer), too_many());
                }
            }
            Entry::Occupied(mut entry) => {
                let conn = entry.get_mut();
                // The census has counted it, but lets through what may be our own.
                if !conn.served && open > most {
                    (conn.served, conn.busy) = (true, true);
                    drop(conns);
                    return self.abort(request, Turn::new(peer), too_many());
                }
                (conn.since, conn.served) = (Instant::now(), true);
                if conn.closed {
                    let ended = !conn.busy;
                    drop(conns);
                    // Its client may have taken the port for another connection.
                    if !ended || !self.is_open(peer) {
                        return self.discard(request, peer);
                    }
                    self.conns().insert(peer, Conn::new(true));
                    return self.handle(request, Turn::new(peer));
                }
                if conn.busy {
                    conn.waiting.push_back(request);
                    if conn.waiting.len() > PIPELINE {
                        conn.closed = true;
                        drop(conns);
                        self.close(peer);
                    }
                    return;
                }
                conn.busy = true;
            }
        }
        drop(conns);
        self.handle(request, Turn::new(peer));
    }

    /// Ends a connection's turn, in which so many bytes were answered, and begins the next.
    fn done(self: &Arc<Self>, peer: SocketAddr, answered: usize) {
        let mut conns = self.conns();
        let Some(conn) = conns.get_mut(&peer) else { return };
        conn.since = Instant::now();
        conn.unseen += answered;
        let next = conn.waiting.pop_front().filter(|_| !conn.closed);
        conn.busy = next.is_some();
        let rest = if conn.closed { std::mem::take(&mut conn.waiting) } else { VecDeque::new() };
        drop(conns);
        rest.into_iter().for_each(|request| self.discard(request, peer));
        if let Some(request) = next {
            // Not here: a client could make one call out of any number of answers, and keep to itself
            // a thread that hears volumes for all.
            let http = self.clone();
            let turn = Turn::new(peer);
            let job = Box::new(move || http.handle(request, turn));
            self.workers.run(job).unwrap_or_else(|job| job());
        }
    }

    fn handle(self: &Arc<Self>, request: Request, turn: Turn) {
        let head = match head(&request) {
            Ok(_) if self.stopping.load(Ordering::Relaxed) => {
                Err(Error::Unavailable("the master is stopping".into()))
            }
            head => head,
        };
        let head = match head {
            Ok(head) => head,
            // Where the request ends is not known.
            Err(error) => return self.abort(request, turn, error.into()),
        };
        let turn = Turn { last: head.last, ..turn };
        let command = route(request.method().as_str(), request.url()).and_then(|command| {
            if head.has_body() && !matches!(command, Command::Put { .. }) {
                return Err(Error::BadRequest("only PUT and REPLACE take a body".into()));
            }
            Ok(command)
        });
        self.dispatch(request, turn, head, command)
    }

    /// Has a request answered on the thread that fits it: at once what needs none that waits, for
    /// clients (a thread of its own) or for volumes (a worker).
    fn dispatch(
        self: &Arc<Self>,
        request: Request,
        turn: Turn,
        head: Head,
        command: Result<Command>,
    ) {
        let client = self.store.known_client(head.authorization.as_deref());
        // No thread that others need waits for a client that does not read.
        if !self.takes_answers(turn.peer) {
            return self.queue(request, turn, head, command, true);
        }
        // Many of these may wait for a volume that hangs; UNLINK and what else there is go on.
        let short =
            matches!(command, Ok(Command::Unlink(_) | Command::Metrics | Command::Health) | Err(_));
        let error = match (client, &command) {
            (Some(Err(error)), _) => error,
            (Some(Ok(_)), Err(error)) => error.clone(),
            (Some(Ok(_)), Ok(Command::Get { key, path })) => {
                let (http, key, path) = (self.clone(), key.clone(), path.clone());
                return self.store.get_at_once(&key, &path, move |reply| match reply {
                    Some(reply) => {
                        http.answer(request, turn, reply.unwrap_or_else(Reply::from));
                    }
                    None => http.queue(request, turn, head, command, true),
                });
            }
            _ => return self.queue(request, turn, head, command, !short),
        };
        if head.has_body() {
            self.abort(request, turn, error.into());
        } else {
            self.answer(request, turn, error.into());
        }
    }

    /// Has a request answered by a thread that may wait; `long`: by one that is not a worker, unless
    /// the machine has no other.
    fn queue(
        self: &Arc<Self>,
        request: Request,
        turn: Turn,
        head: Head,
        command: Result<Command>,
        long: bool,
    ) {
        let http = self.clone();
        let job: Job = Box::new(move || {
            let work = AssertUnwindSafe(|| http.work(request, turn, head, command));
            if catch_unwind(work).is_err() {
                log::error!("a request of {} failed: its connection is closed", turn.peer);
                http.close(turn.peer);
                http.done(turn.peer, 0);
            }
        });
        let pool = if long { &self.store.volumes.pool } else { &self.workers };
        if let Err(job) = pool.run(job).or_else(|job| self.workers.run(job)) {
            log::error!("no thread can be had for a request of {}", turn.peer);
            self.close(turn.peer);
            // The request goes with it; its connection is closed, so there is nothing to drain.
            drop(job);
            self.done(turn.peer, 0);
        }
    }

    fn work(
        self: &Arc<Self>,
        mut request: Request,
        turn: Turn,
        head: Head,
        command: Result<Command>,
    ) {
        let mut body = Body {
            http: self,
            peer: turn.peer,
            left: head.length,
            begun: false,
            ended: false,
            waited: Duration::ZERO,
            got: 0,
            request: &mut request,
        };
        let metrics = &self.store.metrics;
        let uploads = u64::from(matches!(command, Ok(Command::Put { .. })));
        metrics.uploads.fetch_add(uploads, Ordering::Relaxed);
        let upload =
            Upload { length: head.length, content_md5: head.content_md5, reader: &mut body };
        let reply = self
            .store
            .client(head.authorization.as_deref())
            .and_then(|client| self.store.run(command?, upload, client.as_ref()));
        metrics.uploads.fetch_sub(uploads, Ordering::Relaxed);
        let unread = !body.ended && (head.has_body() || body.begun);
        let reply = reply.unwrap_or_else(Reply::from);
        if unread { self.abort(request, turn, reply) } else { self.answer(request, turn, reply) }
    }

    /// Answers a request whose body, if it has one, was read.
    fn answer(self: &Arc<Self>, request: Request, turn: Turn, reply: Reply) {
        let page = match &reply.body {
            ReplyBody::Text(_) => None,
            ReplyBody::List(list) => match Page::new(&self.store.index, list) {
                Ok(page) => Some(page),
                Err(error) => return self.answer(request, turn, error.into()),
            },
        };
        self.count(&request, turn, &reply);
        let (length, buffer) =
            page.as_ref().map_or((None, 0), |page| (Some(page.length), 64 << 10));
        let bytes = response(&request, &reply, length, turn.last);
        let size = bytes.len() + length.unwrap_or(0) as usize;
        let mut writer = io::BufWriter::with_capacity(buffer, request.into_writer());
        let broken = |e: io::Error| Error::Failed(e.to_string());
        let sent = writer.write_all(&bytes).map_err(broken);
        let sent = sent.and_then(|()| page.map_or(Ok(()), |page| page.write(&mut writer)));
        let sent = sent.and_then(|()| writer.flush().map_err(broken));
        // The connection's next answer waits for this.
        drop(writer);
        if let Err(error) = sent {
            log::debug!("an answer to {} was not sent: {error}", turn.peer);
            self.close(turn.peer);
        }
        self.store.metrics.sent.fetch_add(size as u64, Ordering::Relaxed);
        self.done(turn.peer, size);
    }

    /// Answers a request whose body was not read, or has no certain end, and closes its connection.
    /// The client has some time to read the answer before the connection is cut.
    fn abort(self: &Arc<Self>, request: Request, turn: Turn, reply: Reply) {
        self.count(&request, turn, &reply);
        let peer = turn.peer;
        if let Some(conn) = self.conns().get_mut(&peer) {
            conn.closed = true;
        }
        let bytes = response(&request, &reply, None, true);
        let http = self.clone();
        let job = Box::new(move || {
            http.end(request, peer, |socket| {
                let _ = socket.write_all(&bytes).and_then(|()| socket.shutdown(Shutdown::Write));
                linger(socket);
            });
            http.done(peer, 0);
        });
        if let Err(job) = self.store.volumes.pool.run(job) {
            // Without a thread nobody lingers.
            self.close(peer);
            job();
        }
    }

    /// Ends a request that came on a connection from which nothing more is taken.
    fn discard(self: &Arc<Self>, request: Request, peer: SocketAddr) {
        let http = self.clone();
        let job = Box::new(move || http.end(request, peer, |_| ()));
        self.store.volumes.pool.run(job).unwrap_or_else(|job| job());
    }

    /// Closes a connection, with some last words, and drops its request.
    fn end(&self, request: Request, peer: SocketAddr, words: impl FnOnce(&mut TcpStream)) {
        let huge = request.body_length().is_some_and(|length| length as u64 > LENGTH_MAX);
        let fds = if huge { self.sockets() } else { Vec::new() };
        if let Some(mut socket) = self.find(peer) {
            words(&mut socket);
            let _ = socket.shutdown(Shutdown::Both);
        }
        if !huge {
            return;
        }
        // To drop it would be to allocate its length, which aborts the process. tiny_http's thread
        // for the connection now waits for ever for this request to end; nothing uses the
        // connection's descriptors any more, so they are closed here.
        std::mem::forget(request);
        for (fd, _) in fds.into_iter().filter(|(_, other)| *other == peer) {
            // SAFETY: one owner was forgotten in the line above, the other belongs to the thread
            // that waits: neither will ever close, or use, this descriptor.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }

    /// Counts and logs an answered request. What a query holds is not logged.
    fn count(&self, request: &Request, turn: Turn, reply: &Reply) {
        let (method, status) = (request.method().as_str(), reply.status);
        let path = request.url().split('?').next().unwrap_or_default().escape_debug();
        let time = turn.begun.elapsed();
        self.store.metrics.count(method, status, reply.error, time);
        match &reply.body {
            // 410: a value is lost.
            ReplyBody::Text(text) if status >= 500 || status == 410 => {
                log::error!("{method} {path} {status}: {}", text.trim_end())
            }
            _ if self.store.options.verbose => {
                log::info!("{method} {path} {status} {} ms", time.as_millis())
            }
            _ => {}
        }
    }

    /// Closes a client's connection, whatever it is doing.
    fn close(&self, peer: SocketAddr) {
        if let Some(socket) = self.find(peer) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// The process's descriptors that are connections of clients: descriptor and peer. tiny_http
    /// shows none of them; each connection has two.
    fn sockets(&self) -> Vec<(RawFd, SocketAddr)> {
        (0..slots()).filter_map(|fd| Some((fd, self.client_of(fd)?))).collect()
    }

    /// The clients whose bytes wait. One system call tells them from all that are idle.
    fn unread(&self) -> HashSet<SocketAddr> {
        // SAFETY: as in `client_of`.
        let fd =
            |fd| PollFd::from_borrowed_fd(unsafe { BorrowedFd::borrow_raw(fd) }, PollFlags::IN);
        let mut fds: Vec<PollFd> = (0..slots()).map(fd).collect();
        if let Err(error) = poll(&mut fds, Some(&Timespec::default())) {
            log::warn!("poll: {error}");
        }
        let readable = fds.iter().filter(|fd| fd.revents().contains(PollFlags::IN));
        let unread =
            readable.map(|fd| fd.as_fd()).filter(|fd| rustix::io::ioctl_fionread(fd) != Ok(0));
        unread.filter_map(|fd| self.client_of(fd.as_raw_fd())).collect()
    }

    /// The client behind a descriptor, if it is the connection of one.
    fn client_of(&self, fd: RawFd) -> Option<SocketAddr> {
        // SAFETY: the descriptor is only asked what it is. If it is closed, or another by then, the
        // answer is an error or about that other one; `find` asks again before anything is done.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let local = SocketAddr::try_from(rustix::net::getsockname(fd).ok()?).ok()?;
        let peer = SocketAddr::try_from(rustix::net::getpeername(fd).ok()??).ok()?;
        (local.port() == self.address.port()).then_some(peer)
    }

    /// A descriptor of our own for a client's connection.
    fn find(&self, peer: SocketAddr) -> Option<TcpStream> {
        let duplicate = |fd| {
            // SAFETY: a duplicate is made and then asked who it is; see `client_of`.
            let own = unsafe { BorrowedFd::borrow_raw(fd) };
            let own = TcpStream::from(rustix::io::fcntl_dupfd_cloexec(own, 0).ok()?);
            (own.peer_addr().ok()? == peer).then_some(own)
        };
        let known = self.conns().get(&peer).and_then(|conn| conn.fd);
        known.and_then(duplicate).or_else(|| {
            // One of its two may be closed since it was seen: tiny_http is done with a direction.
            let all = self.sockets().into_iter();
            all.filter(|(_, other)| *other == peer).find_map(|(fd, _)| duplicate(fd))
        })
    }

    /// Whether this client has a connection of which we have not closed both directions.
    fn is_open(&self, peer: SocketAddr) -> bool {
        self.find(peer).is_some_and(|socket| {
            let mut fds = [PollFd::new(&socket, PollFlags::OUT)];
            let polled = poll(&mut fds, Some(&Timespec::default()));
            polled.is_ok() && !fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
        })
    }

    /// Whether the next answers to this client go out without waiting for it to read the last ones.
    /// It is looked at now and then: a few answers find room in the socket's buffer.
    fn takes_answers(&self, peer: SocketAddr) -> bool {
        if self.conns().get(&peer).is_none_or(|conn| conn.unseen < LOOK_AFTER) {
            return true;
        }
        // At least a third of the buffer is free then.
        let takes = self.find(peer).is_some_and(|socket| {
            let mut fds = [PollFd::new(&socket, PollFlags::OUT)];
            poll(&mut fds, Some(&Timespec::default())) == Ok(1)
        });
        if takes && let Some(conn) = self.conns().get_mut(&peer) {
            conn.unseen = 0;
        }
        takes
    }

    /// Frees connections that wait for a thread of tiny_http's, closes those that are too many or
    /// too slow, and replaces servers. It pauses in proportion to what a look costs.
    fn guard(self: Arc<Self>, mut servers: Vec<Acceptor>) {
        // At how many looks each connection had bytes that no thread reads.
        let mut before: HashMap<SocketAddr, u32> = HashMap::new();
        let (mut count_at, mut ping_at) = (Instant::now(), Instant::now() + PING);
        loop {
            let begun = Instant::now();
            if begun >= count_at {
                self.census();
                let rest = (begun.elapsed() * 200).clamp(Duration::from_millis(100), CENSUS);
                count_at = Instant::now() + rest;
            }
            self.replace(&mut servers);
            let mut waiting = HashMap::new();
            for peer in self.unread() {
                if !self.conns().get(&peer).is_some_and(|conn| conn.served) {
                    waiting.insert(peer, before.get(&peer).map_or(0, |looks| looks + 1));
                }
            }
            before = waiting;
            // Each needs one connection to its own server. What that does not free soon waits for
            // something else, and is tried more and more rarely.
            let is_new = |looks: &&u32| **looks <= 16;
            let due = |looks: &&u32| **looks > 0 && (is_new(looks) || looks.is_power_of_two());
            let stuck = before.values().filter(due).count();
            let mut connections = stuck * SERVERS;
            if begun >= ping_at {
                // One accept thread may take several.
                connections += 2 * SERVERS;
                ping_at = begun + PING;
            }
            let _ = (0..connections).try_for_each(|_| self.connect().map(drop));
            let rest = (begun.elapsed() * 300).clamp(LOOK_AGAIN * 2, Duration::from_millis(100));
            let soon = before.values().filter(is_new).count() > 0;
            std::thread::sleep(if soon { LOOK_AGAIN } else { rest });
        }
    }

    /// Makes another server for each that accepts no more, once it would not end at once too.
    fn replace(self: &Arc<Self>, servers: &mut Vec<Acceptor>) {
        servers.retain(Acceptor::is_alive);
        while servers.len() < SERVERS
            && !self.stopping.load(Ordering::Relaxed)
            && self.has_spare_descriptors()
        {
            match self.make_server() {
                Ok(server) => {
                    // One that has ended since, and whose number this one got.
                    servers.retain(|other| other.fd != server.fd);
                    servers.push(server);
                }
                Err(error) => return log::warn!("{error}"),
            }
        }
    }

    /// Counts the connections there are, and closes those that are too many or too slow.
    fn census(&self) {
        let begun = Instant::now();
        let there: HashMap<SocketAddr, RawFd> =
            self.sockets().into_iter().map(|(fd, peer)| (peer, fd)).collect();
        self.store.metrics.connections.store(there.len() as u64, Ordering::Relaxed);
        let mut close = Vec::new();
        let mut conns = self.conns();
        let recent = |conn: &Conn| conn.closed && conn.since.elapsed() < REMEMBER;
        conns.retain(|peer, conn| conn.busy || there.contains_key(peer) || recent(conn));
        let own = self.own_address().ip();
        let mut room = self.store.options.maxconns.saturating_sub(open(&conns));
        for (peer, fd) in there {
            let full = room == 0 && peer.ip() != own;
            match conns.entry(peer) {
                Entry::Vacant(_) if full => close.push(peer),
                Entry::Vacant(entry) => {
                    room = room.saturating_sub(1);
                    entry.insert(Conn::new(false));
                }
                Entry::Occupied(mut entry) => {
                    let conn = entry.get_mut();
                    conn.fd = Some(fd);
                    if !conn.busy && conn.since.elapsed() > HEAD {
                        close.push(peer);
                    }
                }
            }
        }
        drop(conns);
        for peer in close {
            self.close(peer);
        }
        let mut counted = lock(&self.counted);
        *counted = (Instant::now(), begun.elapsed());
    }

    fn has_spare_descriptors(&self) -> bool {
        let spare: Vec<_> = (0..8).map_while(|_| self.listener.try_clone().ok()).collect();
        spare.len() == 8
    }

    /// The listener's address as a client on this machine reaches it.
    fn own_address(&self) -> SocketAddr {
        let mut address = self.address;
        if address.ip().is_unspecified() {
            address.set_ip(match address.ip() {
                IpAddr::V4(_) => IpAddr::from([127, 0, 0, 1]),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        address
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let socket = TcpStream::connect_timeout(&self.own_address(), Duration::from_secs(1))?;
        // Closed with a reset: nothing is left in TIME_WAIT.
        SockRef::from(&socket).set_linger(Some(Duration::ZERO))?;
        Ok(socket)
    }

    /// Takes no new connections, and waits for the requests under way.
    fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Read);
        let begun = Instant::now();
        while begun.elapsed() < STOP && self.conns().values().any(|conn| conn.busy) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// What a request's headers say, or why they cannot be believed.
fn head(request: &Request) -> Result<Head> {
    let wrong = |text: &str| Err(Error::BadRequest(text.into()));
    let mut head = Head::default();
    let (mut lengths, mut encodings, mut upgrade) = (0, 0, false);
    head.last = *request.http_version() < (1, 1);
    if !is_token(request.method().as_str()) {
        return wrong("the method is no token");
    }
    for header in request.headers() {
        let (name, value) = (header.field.as_str().as_str(), header.value.as_str());
        // Whoever takes a bare LF for a line's end sees another request here than tiny_http does.
        if !is_token(name) || value.bytes().any(|byte| byte.is_ascii_control() && byte != b'\t') {
            return wrong("a header's name is no token, or its value holds a control character");
        }
        if name.eq_ignore_ascii_case("content-length") {
            let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
            match value.parse().ok().filter(|length| digits && *length <= LENGTH_MAX) {
                Some(length) => head.length = Some(length),
                None => return wrong("Content-Length is not a number of bytes, or too large"),
            }
            lengths += 1;
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            if !value.eq_ignore_ascii_case("chunked") {
                return wrong("Transfer-Encoding: only chunked is understood");
            }
            encodings += 1;
        } else if name.eq_ignore_ascii_case("expect") {
            head.expect = true;
        } else if name.eq_ignore_ascii_case("connection") {
            let value = value.to_ascii_lowercase();
            upgrade |= value.contains("upgrade");
            let stays = value.contains("keep-alive") || !head.last;
            head.last = value.contains("close") || upgrade || !stays;
        } else if name.eq_ignore_ascii_case("content-md5") {
            head.content_md5 = Some(content_md5(value)?);
        } else if name.eq_ignore_ascii_case("authorization") {
            head.authorization = Some(value.to_string());
        }
    }
    if lengths + encodings > 1 {
        return wrong("more than one Content-Length or Transfer-Encoding");
    }
    if encodings > 0 && *request.http_version() < (1, 1) {
        return wrong("Transfer-Encoding: HTTP/1.0 has none");
    }
    if upgrade && lengths + encodings > 0 {
        return wrong("a request that asks for an upgrade can have no body");
    }
    if lengths + encodings == 0 {
        head.length = Some(0);
    }
    Ok(head)
}

/// Whether a text is a token (RFC 9110), as methods and the names of headers are.
fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

/// A digest in base64 (RFC 1864), or in hex, as GET shows it.
fn content_md5(text: &str) -> Result<Hash> {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let digest =
        unhex(&text.to_ascii_lowercase()).or_else(|| STANDARD.decode(text).ok()?.try_into().ok());
    digest.ok_or_else(|| {
        Error::BadRequest("Content-MD5 is neither base64 nor hex of 16 bytes".into())
    })
}

/// A response in one piece; of a page, whose length this is, its head.
fn response(request: &Request, reply: &Reply, page: Option<u64>, close: bool) -> Vec<u8> {
    let reason = tiny_http::StatusCode(reply.status).default_reason_phrase();
    let date = httpdate::fmt_http_date(SystemTime::now());
    let body = if let ReplyBody::Text(text) = &reply.body { text.as_str() } else { "" };
    let mut text = format!("HTTP/1.1 {} {reason}\r\nDate: {date}\r\n", reply.status);
    for (name, value) in &reply.headers {
        text.extend([*name, ": ", value.as_str(), "\r\n"]);
    }
    if reply.status != 204 {
        let length = page.unwrap_or(body.len() as u64);
        text.push_str(&format!("Content-Length: {length}\r\n"));
    }
    text.push_str(if close { "Connection: close\r\n\r\n" } else { "\r\n" });
    if request.method().as_str() != "HEAD" {
        text.push_str(body);
    }
    text.into_bytes()
}

/// Reads what the client still sends: were the connection cut with bytes unread, the client could
/// lose the answer.
fn linger(socket: &mut TcpStream) {
    let until = Instant::now() + LINGER;
    let mut scratch = [0; 64 << 10];
    while let Some(left) =
        until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    {
        if socket.set_read_timeout(Some(left)).is_err()
            || !matches!(socket.read(&mut scratch), Ok(1..))
        {
            return;
        }
    }
}

/// The body of an upload: its end is its true end, everything else is an error.
struct Body<'a> {
    http: &'a Http,
    peer: SocketAddr,
    request: &'a mut Request,
    /// Bytes still to come; `None`: chunked.
    left: Option<u64>,
    begun: bool,
    ended: bool,
    /// How long it was waited for the client, and what came in bytes, since the last `PROGRESS`.
    waited: Duration,
    got: usize,
}

impl Read for Body<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ended || self.left == Some(0) {
            self.ended = true;
            return Ok(0);
        }
        self.begun = true;
        let begun = Instant::now();
        let n = match self.request.as_reader().read(buffer) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::other("nothing came for 60 s"));
            }
            result => result?,
        };
        (self.waited, self.got) = (self.waited + begun.elapsed(), self.got + n);
        if self.got >= PROGRESS {
            (self.waited, self.got) = (Duration::ZERO, 0);
        }
        if n == 0 && (self.left.is_some() || self.client_is_gone()) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the client went away"));
        }
        self.http.store.metrics.received.fetch_add(n as u64, Ordering::Relaxed);
        self.left = self.left.map(|left| left - n as u64);
        self.ended = self.left == Some(0) || n == 0;
        if self.waited > STALL && !self.ended {
            return Err(io::Error::other("less than 1 KiB came in 60 s"));
        }
        Ok(n)
    }
}

impl Body<'_> {
    /// The reader of a chunked body ends without an error when the client goes away inside a chunk.
    /// Then the connection is at its end too.
    fn client_is_gone(&self) -> bool {
        let Some(socket) = self.http.find(self.peer) else { return true };
        match recv(&socket, &mut [0], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((n, _)) => n == 0,
            Err(e) => e != rustix::io::Errno::AGAIN,
        }
    }
}
