//! Accepting connections, and the end of a server.
//!
//! No error ends the accept loop. When the process is out of descriptors or threads, it tries again every 10 ms;
//! new connections wait in the kernel's queue meanwhile, and open ones are served.

use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::net::{Shutdown, shutdown};
use socket2::{Domain, Socket, Type};

use super::connection::Connection;
use super::{Config, Counters, Handler, Refusal};
use crate::threads::{Job, Pool};

/// The pause after a failure to accept or to start a thread.
const RETRY: Duration = Duration::from_millis(10);

/// How many connections above the limit get a 503 at the same time. Further ones are closed without a response.
const REFUSED_MAX: usize = 64;

/// The socket's send buffer in bytes: what the kernel holds for a client that does not read.
const SEND_BUFFER: usize = 256 << 10;

/// The listen backlog: how many new connections may wait in the kernel.
const BACKLOG: i32 = 4096;

pub struct Server<H> {
    pub(super) config: Config,
    pub(super) handler: H,
    pub(super) counters: Arc<Counters>,
    /// Requests that are being answered.
    pub(super) busy: AtomicUsize,
    /// Connections above the limit that are being sent a 503.
    refused: AtomicUsize,
    listener: TcpListener,
    threads: Pool,
    stopping: AtomicBool,
}

/// Adds one to a counter until it is dropped.
pub(super) struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    pub fn new(count: &'a AtomicUsize) -> Counted<'a> {
        count.fetch_add(1, Ordering::SeqCst);
        Counted(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl<H: Handler> Server<H> {
    /// Listens; connections wait until `run` accepts them.
    pub fn bind(config: Config, counters: Arc<Counters>, handler: H) -> io::Result<Arc<Server<H>>> {
        let listener = listen(&config.host, config.port)?;
        Ok(Arc::new(Server {
            config,
            handler,
            counters,
            busy: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
            listener,
            threads: Pool::default(),
            stopping: AtomicBool::new(false),
        }))
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Accepts connections until `stop`.
    pub fn run(self: &Arc<Self>) {
        let mut warned = None;
        while !self.is_stopping() {
            match self.listener.accept() {
                Ok((socket, _)) => self.start(socket, &mut warned),
                Err(error) => self.pause(&mut warned, &error.to_string()),
            }
        }
    }

    /// Serves a connection on its own thread. Waits until a thread can be started.
    fn start(self: &Arc<Self>, socket: TcpStream, warned: &mut Option<Instant>) {
        let open = self.counters.connections.load(Ordering::SeqCst);
        let full = open >= self.config.max_connections;
        if full && self.refused.load(Ordering::SeqCst) >= REFUSED_MAX {
            return;
        }
        self.count(full).fetch_add(1, Ordering::SeqCst);
        let server = self.clone();
        let mut job: Job = Box::new(move || server.serve(socket, full));
        while let Err(back) = self.threads.run(job) {
            if self.is_stopping() {
                return;
            }
            self.pause(warned, "no thread can be started");
            job = back;
        }
    }

    /// Pauses after a failure, and logs it at most once a second.
    fn pause(&self, warned: &mut Option<Instant>, failure: &str) {
        if !self.is_stopping() && warned.is_none_or(|at| at.elapsed() > Duration::from_secs(1)) {
            log::warn!("new connections have to wait: {failure}");
            *warned = Some(Instant::now());
        }
        std::thread::sleep(RETRY);
    }

    fn count(&self, full: bool) -> &AtomicUsize {
        if full { &self.refused } else { &self.counters.connections }
    }

    /// Serves a connection that has already been counted.
    fn serve(&self, socket: TcpStream, full: bool) {
        let _open = Counted(self.count(full));
        match Connection::new(self, socket) {
            Ok(mut connection) if full => connection.refuse(Refusal::TooManyConnections),
            Ok(mut connection) => connection.serve(),
            Err(error) => log::debug!("a new connection has failed: {error}"),
        }
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Stops accepting connections, refuses new requests, and waits at most `drain` for the requests under way.
    pub fn stop(&self, drain: Duration) {
        self.stopping.store(true, Ordering::SeqCst);
        // Wakes `accept`.
        let _ = shutdown(&self.listener, Shutdown::Read);
        let begun = Instant::now();
        while begun.elapsed() < drain && self.busy.load(Ordering::SeqCst) > 0 {
            std::thread::sleep(RETRY);
        }
    }
}

fn listen(host: &str, port: u16) -> io::Result<TcpListener> {
    if host.is_empty() {
        // A machine without IPv6 has no such address.
        return bind((Ipv6Addr::UNSPECIFIED, port).into()).or_else(|_| bind(([0, 0, 0, 0], port).into()));
    }
    let mut result = Err(io::Error::other("it has no address"));
    for address in (host, port).to_socket_addrs()? {
        result = result.or_else(|_| bind(address));
    }
    result
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Accepted sockets inherit it.
    socket.set_send_buffer_size(SEND_BUFFER)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::super::{Body, Content, Request, Response};
    use super::*;
    use std::io::{Read, Write};
    use std::thread;

    struct Panics;

    impl Handler for Panics {
        fn handle<'a>(&'a self, request: &Request<'_>, _: &mut Body<'_>) -> Response<'a> {
            assert_eq!(request.target, "/", "on purpose");
            Response { status: 204, headers: Vec::new(), extra: Vec::new(), content: Content::Empty }
        }

        fn refuse(&self, _: Refusal) -> Response<'_> {
            Response { status: 400, headers: Vec::new(), extra: Vec::new(), content: Content::Empty }
        }
    }

    /// The first bytes of the answer on a connection.
    fn ask(socket: &mut TcpStream, target: &str) -> String {
        write!(socket, "GET {target} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut bytes = [0; 12];
        let count = socket.read(&mut bytes).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    }

    #[test]
    fn a_panic_in_a_handler_ends_its_own_connection_only() {
        let minute = Duration::from_secs(60);
        let config = Config {
            host: "127.0.0.1".into(),
            port: 0,
            max_connections: 2,
            head_timeout: minute,
            idle_timeout: minute,
            stall_timeout: minute,
        };
        let server = Server::bind(config, Arc::default(), Panics).unwrap();
        let address = server.address().unwrap();
        let front = server.clone();
        let front = thread::spawn(move || front.run());
        let mut kept = TcpStream::connect(address).unwrap();
        assert_eq!(ask(&mut kept, "/"), "HTTP/1.1 204");
        for _ in 0..5 {
            assert_eq!(ask(&mut TcpStream::connect(address).unwrap(), "/panic"), "");
            while server.counters.connections.load(Ordering::SeqCst) > 1 {
                thread::yield_now();
            }
        }
        assert_eq!(server.busy.load(Ordering::SeqCst), 0);
        server.stop(Duration::ZERO);
        front.join().unwrap();
    }
}
