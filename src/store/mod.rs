//! The store: keys and values, on an index and volumes. With `format` it is the part to read first.
//!
//! - `read.rs`: GET, and where a reader finds a value
//! - `write.rs`: PUT, REPLACE, DELETE, UNLINK, RELINK; its header is the write protocol
//! - `objects.rs`: the same for S3, where writers of a key pass each other
//! - `multipart.rs`: uploads in parts
//! - `replicas.rs`: one key's replicas moved, copied and checked (REBALANCE, `rebalance`, `verify -repair`)
//! - `cleaner.rs`: deletes debris in the background
//! - `list.rs`: pages of keys
//! - `stats.rs`: keys and bytes by volume, prefix and size
//! - `backup.rs`: copies of the index on the store's own volumes
//! - `follow.rs`: trails another master's log, and becomes a master in its place
//!
//! It promises that a value acknowledged is a value kept: debris names every place where a blob may lie before its
//! first byte is sent, one index batch makes a value visible, and only what the index no longer names is deleted.
//!
//! It knows nothing of HTTP statuses or headers, of flags, or of RocksDB, and it prints nothing. It may name `format`,
//! `index` and `volumes`.

mod backup;
mod cleaner;
pub mod follow;
mod list;
mod multipart;
mod objects;
mod read;
mod replicas;
pub mod stats;
mod write;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender, bounded};

pub use list::{Detail, List, Listed, Page};
pub use objects::Step;
pub use read::Located;
pub use replicas::Plan;

pub use crate::index::{MultipartUpload, Part};

use crate::error::Result;
use crate::format::placement::Placement;
use crate::format::record::volume_of;
use crate::index::Index;
use crate::volumes::Volumes;

/// What the store is told at its start.
#[derive(Debug, Clone)]
pub struct Config {
    pub placement: Placement,
    /// A key must be unlinked before it can be deleted, and is never replaced.
    pub protect: bool,
    /// Whether to keep the md5 of each value.
    pub md5sum: bool,
    /// The `Authorization` header that the master itself sends to volumes.
    pub auth: Option<String>,
    /// How long the copies of a rebalance rest before the replicas that they replace may be deleted.
    pub settle: Duration,
    /// How long a multipart upload may take before its parts are deleted.
    pub uploads: Duration,
    /// Volumes (`host:port`) and subvolumes (`host:port/svXX`) that are gone for good.
    pub lost: Vec<String>,
}

pub struct Store {
    pub config: Config,
    pub index: Index,
    pub volumes: Arc<Volumes>,
    wake: Sender<()>,
    woken: Receiver<()>,
}

impl Store {
    pub fn new(config: Config, index: Index, volumes: Arc<Volumes>) -> Arc<Store> {
        let (wake, woken) = bounded(1);
        Arc::new(Store { config, index, volumes, wake, woken })
    }

    /// The replicas that should hold a key.
    pub fn place(&self, key: &[u8]) -> Vec<String> {
        self.config.placement.place(key)
    }

    /// The credentials that the master itself sends to volumes.
    pub fn own_auth(&self) -> Option<&str> {
        self.config.auth.as_deref()
    }

    /// Whether a replica lies on a volume or subvolume that is gone for good.
    pub fn is_lost(&self, replica: &str) -> bool {
        is_lost(&self.config.lost, replica)
    }

    /// Fails if two of the volumes are one server under two names.
    pub fn check_volumes(&self) -> Result<()> {
        self.volumes.check_distinct(self.config.placement.volumes.iter())
    }

    /// Tells the cleaner that there is something to delete.
    fn wake_cleaner(&self) {
        // A full channel means that it has been told.
        let _ = self.wake.try_send(());
    }
}

/// Whether a replica lies on a volume or subvolume of this list.
pub fn is_lost(lost: &[String], replica: &str) -> bool {
    lost.iter().any(|lost| lost == replica || lost == volume_of(replica))
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
