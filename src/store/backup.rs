//! Copies of the index on the store's own volumes, so that the loss of the master's machine loses nothing.
//!
//! A copy is a value under one of two keys of the master's own, which take turns: the older one is replaced, by the
//! write protocol, so that the newer one is whole at any time. `rebuild` finds them by the path of their keys.

use std::time::Duration;

use super::{Store, now};
use crate::error::Result;
use crate::format::BACKUP_KEYS;
use crate::volumes::upload::Upload;

/// How often it is looked whether a copy is due, and how soon a copy that failed is tried again.
const LOOK: Duration = Duration::from_secs(60);

impl Store {
    /// The thread that keeps a copy that is no older than this. It never ends.
    pub fn keep_backup(&self, interval: Duration) {
        loop {
            if let Err(error) = self.back_up_if_due(interval.as_secs()) {
                log::error!("no backup of the index was stored; the next try is in a minute: {error}");
            }
            std::thread::sleep(interval.min(LOOK));
        }
    }

    /// When the newest copy was made, in seconds since 1970; 0: there is none.
    pub fn last_backup(&self) -> Result<u64> {
        Ok(self.backup_times()?.into_iter().max().unwrap_or(0))
    }

    /// When the copy under each of the two keys was made.
    fn backup_times(&self) -> Result<Vec<u64>> {
        let time = |key| Ok(self.index.get(key)?.and_then(|record| record.time).unwrap_or(0));
        BACKUP_KEYS.into_iter().map(time).collect()
    }

    fn back_up_if_due(&self, interval: u64) -> Result<()> {
        // The clock may have jumped back.
        if self.last_backup()?.abs_diff(now()) < interval || self.index.is_empty()? {
            return Ok(());
        }
        let times = self.backup_times()?;
        let oldest = (0..times.len()).min_by_key(|n| times[*n]).unwrap_or(0);
        // Before the write begins: the copy does not call itself unfinished.
        let mut backup = self.index.backup(true)?;
        let length = Some(backup.length);
        let upload = Upload { reader: &mut backup, length, content_md5: None };
        self.put(BACKUP_KEYS[oldest], true, upload, self.own_auth())
    }
}
