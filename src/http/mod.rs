//! A small blocking HTTP/1.1 server (RFC 9112).
//!
//! One thread accepts connections. Each connection has a thread of its own, which reads a request, lets
//! the `Handler` answer it, writes the response and goes on with the next request.
//!
//! It promises that a handler sees only well-formed requests, that `Ok(0)` from a body is the body's
//! true end, and that no client costs more than one thread and about 100 KiB, however it behaves: heads,
//! idle connections, bodies and unread responses all have limits. Whatever could be read in two ways is
//! refused and ends its connection, so that no part of it is taken for another request.
//!
//! It knows nothing of what is served, and words no response: those come from the handler.

mod body;
mod connection;
mod input;
mod request;
mod response;
mod server;

use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::Duration;

pub use body::Body;
pub use request::Request;
pub use response::{Content, Response};
pub use server::Server;

pub struct Config {
    /// Empty: every address of the machine.
    pub host: String,
    /// 0: one that the kernel chooses.
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
