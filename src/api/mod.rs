//! The HTTP API: parses a request, lets the store carry it out, and makes the response.
//!
//! - `route.rs`: method and target to command
//! - `auth.rs`: basic authorization
//! - `accel.rs`: GET through the front (`-accel`)
//! - `handlers.rs`: command to response
//! - `status.rs`: error to status
//! - `metrics.rs`: what the master counts, as Prometheus text
//! - `health.rs`: whether the index and the volumes are well
//! - `samples.rs`: what the master counted in the last 15 minutes
//! - `page/`: the page for operators
//! - `text.rs`: numbers, sizes and times in words
//!
//! All statuses and headers are made here and nowhere else. The room decides nothing about a key; it reaches past the
//! store to index and volumes only for metrics, health, backups, the log and authorization.

mod accel;
pub mod auth;
pub mod handlers;
mod health;
mod metrics;
mod page;
pub mod route;
mod samples;
mod status;
mod text;

use std::time::Duration;

#[derive(Debug, Clone)]
pub struct Config {
    /// Where to redirect a GET of a key that is not here: `host:port`.
    pub fallback: Option<String>,
    /// Whether every request needs a login that the volumes accept.
    pub basicauth: bool,
    /// The flags that were given, for the page. No secrets.
    pub flags: Vec<(String, String)>,
    /// Whether to let the front fetch blobs, in place of redirects, for the requests that come through it.
    pub accel: bool,
    /// How long the signature of a redirect is valid.
    pub linktime: Duration,
    /// How old the backup of the index on the volumes may become; `None`: there is none.
    pub backup: Option<Duration>,
}
