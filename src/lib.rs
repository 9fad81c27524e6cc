//! mkv, a distributed key-value store: the library behind the program, the benchmarks and the fuzz targets.
//!
//! The way of a request through the rooms:
//!
//! ```text
//! client ─▶ http/    connections, heads, bodies, responses
//!             ├▶ api/      method and target to command, outcome to response
//!             └▶ s3/       the same for S3, on a port of its own
//!                  └▶ store/    read, write, replicas, cleaner
//!                       ├▶ format/   key to path and volumes; the record codec
//!                       ├▶ index/    records, debris, locks of keys
//!                       └▶ volumes/  requests to nginx
//! ops/: rebuild, rebalance, verify, import, dump, backup, restore
//! ```

pub mod api;
pub mod cli;
pub mod completions;
pub mod error;
pub mod format;
pub mod histogram;
pub mod http;
pub mod index;
pub mod logging;
pub mod man;
pub mod ops;
pub mod s3;
pub mod serve;
pub mod store;
pub mod threads;
pub mod volumes;
