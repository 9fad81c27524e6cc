//! The log of changes as a master sends it and a follower reads it: `GET /?log&since=CHANGE&run=ID`.
//!
//! ```abnf
//! log    = head LF *update
//! head   = JSON object                       ; see Head
//! update = change length md5 batch
//! change = 8OCTET                            ; the number of the batch's first change, big-endian
//! length = 4OCTET                            ; bytes of the batch, big-endian
//! md5    = 16OCTET                           ; of change and batch
//! batch  = *OCTET                            ; a WriteBatch as RocksDB encodes it
//! ```

use std::io::{BufRead, Read};

use md5::{Digest, Md5};
use serde::{Deserialize, Serialize};

use super::history::History;
use crate::error::{Error, Result};

/// The most bytes of a head, and of a batch.
const HEAD_MAX: u64 = 1 << 20;
const BATCH_MAX: usize = 1 << 30;

/// What a process says of its index before the updates.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// How many promotions led to it.
    pub generation: u64,
    /// `host:port` of the master that it follows; `None`: it is a master.
    pub follows: Option<String>,
    /// The number of its last change.
    pub change: u64,
    /// The column families, in the order of their ids in batches.
    pub families: Vec<String>,
    pub history: History,
    /// Whether the updates go on where the reader is. If not, the reader needs a new checkpoint.
    pub continues: bool,
}

impl Head {
    pub fn encode(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec(self).unwrap_or_default();
        text.push(b'\n');
        text
    }

    pub fn read(log: &mut dyn BufRead) -> Result<Head> {
        let mut line = Vec::new();
        log.take(HEAD_MAX).read_until(b'\n', &mut line).map_err(|e| broken(&e))?;
        serde_json::from_slice(&line).map_err(|e| broken(&e))
    }
}

/// A batch of changes.
#[derive(Debug, PartialEq)]
pub struct Update {
    /// The number of its first change.
    pub change: u64,
    pub batch: Vec<u8>,
}

pub fn encode(out: &mut Vec<u8>, change: u64, batch: &[u8]) {
    out.extend(change.to_be_bytes());
    out.extend((batch.len() as u32).to_be_bytes());
    out.extend(digest(change, batch));
    out.extend(batch);
}

impl Update {
    /// The next one; `None`: there are no more.
    pub fn read(log: &mut dyn BufRead) -> Result<Option<Update>> {
        if log.fill_buf().map_err(|e| broken(&e))?.is_empty() {
            return Ok(None);
        }
        let (mut change, mut length, mut md5) = ([0; 8], [0; 4], [0; 16]);
        for field in [&mut change[..], &mut length, &mut md5] {
            log.read_exact(field).map_err(|e| broken(&e))?;
        }
        let (change, length) = (u64::from_be_bytes(change), u32::from_be_bytes(length) as usize);
        if length > BATCH_MAX {
            return Err(broken(&"a batch is too long"));
        }
        let mut batch = Vec::new();
        log.take(length as u64).read_to_end(&mut batch).map_err(|e| broken(&e))?;
        if batch.len() != length || digest(change, &batch) != md5 {
            return Err(broken(&"a batch is cut or damaged"));
        }
        Ok(Some(Update { change, batch }))
    }
}

fn digest(change: u64, batch: &[u8]) -> [u8; 16] {
    Md5::new().chain_update(change.to_be_bytes()).chain_update(batch).finalize().into()
}

fn broken(why: &dyn std::fmt::Display) -> Error {
    Error::Failed(format!("the master's log cannot be read: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_reads_back_and_no_cut_or_damage_goes_unnoticed() {
        let head = Head { generation: 3, families: vec!["default".into()], continues: true, ..Head::default() };
        let start = head.encode();
        let mut log = start.clone();
        encode(&mut log, 7, b"first");
        let second = log.len();
        encode(&mut log, 9, b"");
        let read = |mut log: &[u8]| -> Result<Vec<Update>> {
            assert_eq!(Head::read(&mut log)?, head);
            std::iter::from_fn(|| Update::read(&mut log).transpose()).collect()
        };
        let updates = [Update { change: 7, batch: b"first".into() }, Update { change: 9, batch: Vec::new() }];
        assert_eq!(read(&log).unwrap(), updates);
        for end in start.len()..log.len() {
            // HTTP tells a cut between two updates.
            let at_a_border = end == start.len() || end == second;
            assert_eq!(read(&log[..end]).is_ok(), at_a_border, "{end}");
        }
        for at in start.len()..log.len() {
            let mut damaged = log.clone();
            damaged[at] ^= 1;
            assert!(read(&damaged).is_err(), "byte {at}");
        }
        assert!(Head::read(&mut &b"{}"[..]).is_err() && Head::read(&mut &b""[..]).is_err());
    }
}
