//! A small blocking HTTP/1.1 server (RFC 9112).
//!
//! One thread accepts connections. Each connection has a thread of its own, which reads a request, lets
//! the `Handler` answer it, writes the response and goes on with the next request.
//!
//! It promises that a handler sees only well-formed requests, that `Ok(0)` from a body means the body is
//! complete, and that a client costs at most one thread and about 100 KiB: heads, idle connections, bodies and
//! unread responses all have limits. An ambiguous request is refused and its connection closed, so that no part of
//! it can be taken for another request (request smuggling).
//!
//! It knows nothing of what is served. The handler makes all responses, also the refusals.

mod body;
mod connection;
mod input;
mod request;
mod response;
mod server;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::Duration;

pub use body::Body;
pub use request::Request;
pub use response::{Content, Response};
pub use server::Server;

#[derive(Debug, Clone)]
pub struct Config {
    /// The address to listen on. Empty: all addresses of the machine.
    pub host: String,
    /// 0: the kernel chooses a free port.
    pub port: u16,
    pub max_connections: usize,
    /// From a head's first byte to its last.
    pub head_timeout: Duration,
    /// From a response, or a new connection, to the next request's first byte.
    pub idle_timeout: Duration,
    /// How long a client may take for 1 KiB of a body, or to make room for more of a response.
    pub stall_timeout: Duration,
}

pub trait Handler: Send + Sync + 'static {
    /// Answers a request. It reads as much of the body as it needs.
    fn handle<'a>(&'a self, request: &Request<'_>, body: &mut Body<'_>) -> Response<'a>;

    /// The response to a request that the server refuses by itself.
    fn refuse(&self, refusal: Refusal) -> Response<'_>;
}

impl<H: Handler> Handler for Arc<H> {
    fn handle<'a>(&'a self, request: &Request<'_>, body: &mut Body<'_>) -> Response<'a> {
        (**self).handle(request, body)
    }

    fn refuse(&self, refusal: Refusal) -> Response<'_> {
        (**self).refuse(refusal)
    }
}

/// Why the server refuses a request by itself. The connection ends with the response.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Refusal {
    /// The request breaks the rule that the text states.
    Malformed(&'static str),
    /// The head has over 64 KiB or over 100 fields.
    HeadTooLarge,
    /// Neither HTTP/1.0 nor HTTP/1.1.
    Version,
    /// The head was not complete within `head_timeout`.
    HeadTimeout,
    TooManyConnections,
    /// The server is stopping.
    Stopping,
}

/// What the server counts.
#[derive(Default)]
pub struct Counters {
    /// Connections open now.
    pub connections: AtomicUsize,
    /// Bytes of bodies received, without their chunks' framing.
    pub received: AtomicU64,
    /// Bytes of responses sent.
    pub sent: AtomicU64,
}
